//! Speed and memory of the CPU executor, at the shape of a released model.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, ensure};
use rwkv_core::Real;
use rwkv_core::compare::nmse;
use rwkv_core::model::{Logits, Model, Options, Segment, State};
use rwkv_core::ops::linear::Matrix;
use rwkv_model::engine::Device;
use rwkv_model::{Checkpoint, Engine, EngineOptions, Recipe};

use crate::gpu::token;
use crate::machine::{Reading, peak_memory};
use crate::random_model::{self, SHAPES};

/// Tokens of the prefill case.
const PROMPT: usize = 512;

/// Sessions of the batch case.
const BATCH: usize = 8;

/// The executor may be so many times as far from an f64 run as plain loops in f32 are: it rounds as often, in another
/// order.
const FACTOR: f64 = 4.0;

/// What must be reached (the project's targets).
const DECODE_SHARE: f64 = 0.6;
const PREFILL_RATIO: f64 = 6.0;
const MEMORY_RATIO: f64 = 1.15;

#[expect(clippy::print_stdout, reason = "the report")]
pub(crate) fn report(scratch: &Path, repeats: usize, weights: &Recipe) -> anyhow::Result<bool> {
    let cases = random_model::with(&SHAPES[0], scratch, |path| Cases::new(path, repeats, weights))?;

    let mut reached = true;
    let mut target = |what: String, good: bool| {
        println!("                    target {what}: {}", if good { "reached" } else { "NOT reached" });
        reached &= good;
    };
    let [fast, plain] = cases.errors;
    println!(
        "0.4B shape, random weights, {weights}: {fast:.1e} from the reference in f64, plain loops in f32 {plain:.1e}"
    );
    println!("  load              {:8.2} s    from the page cache", cases.load);
    let gb = cases.streamed as f64 / 1e9;
    let ceiling = gb / cases.reading.median;
    println!("  plain f32 sum     {ceiling:8.1} GB/s {}", cases.reading);
    let (decode, rate) = (1.0 / cases.decode.median, gb / cases.decode.median);
    let share = rate / ceiling;
    println!(
        "  decode            {decode:8.1} tokens/s, {rate:.1} GB/s of weights, {:.0} % of the sum {}",
        100.0 * share,
        cases.decode
    );
    target(format!("{:.0} %", 100.0 * DECODE_SHARE), share >= DECODE_SHARE);
    println!("    zeros skipped   {:8.1} tokens/s {}", 1.0 / cases.decode_sparse.median, cases.decode_sparse);
    println!("    {BATCH} sessions      {:8.1} tokens/s {}", BATCH as f64 / cases.batch.median, cases.batch);
    let prefill = PROMPT as f64 / cases.prefill.median;
    println!(
        "  prefill {PROMPT}       {prefill:8.1} tokens/s, {:.0} GFLOP/s, {:.1} times decode {}",
        2.0 * cases.prefill_params as f64 * prefill / 1e9,
        prefill / decode,
        cases.prefill
    );
    target(format!("{PREFILL_RATIO} times"), prefill / decode >= PREFILL_RATIO);
    if let [Some(loading), Some(running)] = cases.peaks {
        let [loading, running, weights] = [loading, running, cases.weights].map(|bytes| bytes as f64 / 1e9);
        println!(
            "  peak memory       {loading:8.2} GB to load, {:.3} times the weights' {weights:.2} GB; {running:.2} GB \
             with a prompt of {PROMPT}",
            loading / weights
        );
        target(format!("{MEMORY_RATIO} times"), loading / weights <= MEMORY_RATIO);
    }
    Ok(reached)
}

/// A case's times, in seconds.
pub(crate) struct Times {
    pub(crate) median: f64,
    low: f64,
    high: f64,
    count: usize,
}

impl std::fmt::Display for Times {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "({:.1} ms, {:.1} to {:.1}, {} times)",
            self.median * 1e3,
            self.low * 1e3,
            self.high * 1e3,
            self.count
        )
    }
}

impl Times {
    pub(crate) fn new(mut seconds: Vec<f64>) -> Self {
        seconds.sort_by(f64::total_cmp);
        let count = seconds.len();
        Self { median: seconds[count / 2], low: seconds[0], high: seconds[count - 1], count }
    }

    /// Whether they are over before a clock has settled.
    pub(crate) fn are_short(&self) -> bool {
        self.median < 0.25
    }

    /// Whether they are steady, and no faster than those before, but for noise.
    pub(crate) fn confirm(&self, before: &Self) -> bool {
        self.median <= 1.1 * self.low && self.median >= 0.97 * before.median
    }
}

struct Cases {
    /// Of the executor and of plain loops in f32, against f64.
    errors: [f64; 2],
    load: f64,
    /// Bytes of weights that a decode step reads.
    streamed: usize,
    /// Parameters that every token of a prompt meets: the head only meets the last.
    prefill_params: usize,
    weights: u64,
    /// Bytes that were held at most, until the model was loaded and until it had run.
    peaks: [Option<u64>; 2],
    reading: Times,
    decode: Times,
    decode_sparse: Times,
    batch: Times,
    prefill: Times,
}

impl Cases {
    fn new(path: &Path, repeats: usize, weights: &Recipe) -> anyhow::Result<Self> {
        let begun = Instant::now();
        let on_cpu =
            EngineOptions { device: Device::Cpu, weights: weights.clone(), ..EngineOptions::default() };
        let dense_only = EngineOptions { skip_zeros: false, ..on_cpu.clone() };
        let checkpoint = Checkpoint::open(path)?;
        let engine = Engine::new(&checkpoint, dense_only, &|_| {})?;
        let load = begun.elapsed().as_secs_f64();
        let loading = peak_memory();

        // everything once, before anything else takes memory
        let prompt: Vec<u32> = (0..PROMPT).map(token).collect();
        engine.session().prefill(&prompt)?;
        engine.session().step(1)?;
        let peaks = [loading, peak_memory()];
        let errors = verify(&checkpoint, weights, &engine)?;

        let config = *checkpoint.config();
        let streamed = usize::try_from(engine.weight_bytes())?;
        let sum = Reading::new(streamed);
        let skipping = Engine::new(&checkpoint, on_cpu, &|_| {})?;
        same_bits(&engine, &skipping, &prompt)?;
        let (mut dense, mut sparse) = (engine.session(), skipping.session());
        let mut sessions: Vec<_> = (0..BATCH).map(|_| engine.session()).collect();
        let [mut reading, mut decode, mut decode_sparse, mut prefill, mut batch] = [const { Vec::new() }; 5];
        for index in 0..repeats + 2 {
            let time = |times: &mut Vec<f64>, run: &mut dyn FnMut() -> anyhow::Result<()>| {
                let begun = Instant::now();
                run()?;
                if index >= 2 {
                    times.push(begun.elapsed().as_secs_f64()); // the first two warm up
                }
                anyhow::Ok(())
            };
            let tokens = [token(index)];
            time(&mut reading, &mut || {
                sum.run();
                Ok(())
            })?;
            time(&mut decode, &mut || Ok(dense.prefill(&tokens)?))?;
            time(&mut decode_sparse, &mut || Ok(sparse.prefill(&tokens)?))?;
            time(&mut batch, &mut || {
                let mut batch: Vec<_> = sessions.iter_mut().map(|s| (s, &tokens[..])).collect();
                Ok(engine.step(&mut batch)?)
            })?;
            if index % 3 == 2 {
                let mut fresh = engine.session();
                time(&mut prefill, &mut || Ok(fresh.prefill(&prompt)?))?;
            }
        }
        Ok(Self {
            errors,
            load,
            streamed,
            prefill_params: config.streamed_params() - config.vocab * config.width,
            weights: engine.weight_bytes() + embedding_bytes(&checkpoint),
            peaks,
            reading: Times::new(reading),
            decode: Times::new(decode),
            decode_sparse: Times::new(decode_sparse),
            batch: Times::new(batch),
            prefill: Times::new(prefill),
        })
    }
}

/// What a decode step does not read.
fn embedding_bytes(checkpoint: &Checkpoint) -> u64 {
    checkpoint.tensors().find(|(name, _)| *name == "emb.weight").map_or(0, |(_, entry)| entry.bytes())
}

/// Compares a few tokens, one by one and in one call, with the reference in plain loops and f64. Returns how far the
/// executor and plain f32 are from it, as root mean square errors relative to the logits.
fn verify(checkpoint: &Checkpoint, weights: &Recipe, engine: &Engine) -> anyhow::Result<[f64; 2]> {
    let tokens = [1, 65535, 77];
    let exact: Vec<f64> = reference(checkpoint, weights, &tokens)?;
    let plain: Vec<f32> = reference(checkpoint, weights, &tokens)?;
    let whole = engine.session().logits_of(&tokens)?;
    let mut session = engine.session();
    let mut steps = Vec::new();
    for token in tokens {
        steps.extend_from_slice(session.step(token)?);
    }
    ensure!(whole == steps, "a prompt and its tokens one by one give different logits");
    let plain = nmse(&plain, &exact, f64::INFINITY)?.sqrt();
    let fast =
        nmse(&whole, &exact, (FACTOR * plain).powi(2)).context("the executor against the reference")?;
    Ok([fast.sqrt(), plain])
}

/// Every way that is timed gives the same bits: a prompt whole and in parts, zeros multiplied and skipped, a session alone
/// and among others.
fn same_bits(engine: &Engine, skipping: &Engine, prompt: &[u32]) -> anyhow::Result<()> {
    let (mut whole, mut parts) = (engine.session(), engine.session());
    whole.prefill(prompt)?;
    for part in prompt.chunks(prompt.len() / 3) {
        parts.prefill(part)?;
    }
    ensure!(whole.logits()? == parts.logits()?, "a prompt in parts gives different logits");
    let mut skips = skipping.session();
    skips.start_from(&whole.state()?)?;
    let mut crowd: Vec<_> = (0..BATCH).map(|_| whole.fork()).collect();
    let mut batch: Vec<_> = crowd.iter_mut().map(|s| (s, &prompt[..1])).collect();
    engine.step(&mut batch)?;
    let alone = whole.step(prompt[0])?;
    ensure!(skips.step(prompt[0])? == alone, "skipping zeros gives different logits");
    for session in &crowd {
        ensure!(session.logits()? == alone, "a session among others gives different logits");
    }
    Ok(())
}

fn reference<R: Real>(checkpoint: &Checkpoint, weights: &Recipe, tokens: &[u32]) -> anyhow::Result<Vec<R>> {
    let model: Model<R, Matrix<f32>> = checkpoint.load_with(weights, &|_| {})?;
    let mut state = State::new(checkpoint.config());
    let segment = Segment { tokens, state: &mut state, logits: Logits::All };
    Ok(model.forward(&mut [segment], Options::default()))
}

#[cfg(test)]
mod tests {
    use super::Times;

    #[test]
    fn times_of_a_clock_that_moved_are_not_confirmed() {
        let times = |ms: [f64; 3]| Times::new(ms.map(|of| of * 1e-3).to_vec());
        let low = times([29.0, 29.1, 28.9]);
        let moving = times([28.7, 21.4, 29.1]);
        let high = times([19.0, 31.0, 19.2]);
        assert!(!moving.confirm(&low), "most are slower than the fastest");
        assert!(!high.confirm(&low), "it still becomes faster");
        assert!(high.confirm(&high), "one that is slower is an accident");
        assert!(high.confirm(&times([18.9, 18.9, 19.0])), "noise");
        assert!(high.are_short() && !times([1900.0, 2500.0, 2600.0]).are_short());
    }
}
