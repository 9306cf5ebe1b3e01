//! Speed and memory of the CPU executor, at the shape of a released model.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, ensure};
use rwkv_core::compare::nmse;
use rwkv_core::model::{Logits, Model, Options, Segment, State};
use rwkv_core::ops::linear::Matrix;
use rwkv_model::{Checkpoint, Engine, EngineOptions};

use crate::machine::{Reading, peak_memory};
use crate::random_model::{self, SHAPE_0_4B};

/// Tokens of the prefill case.
const PROMPT: usize = 512;

/// Sessions of the batch case.
const BATCH: usize = 8;

/// How far the executor may be from plain loops in f32. A sum of 4,096 products strays by a few units in the last place
/// times its square root, 4e-6; a hundred of them in a row by ten times that; squared, 1.6e-9.
const NMSE_LIMIT: f64 = 1e-8;

/// What must be reached (the project's targets).
const DECODE_SHARE: f64 = 0.6;
const PREFILL_RATIO: f64 = 6.0;
const MEMORY_RATIO: f64 = 1.15;

fn token(index: usize) -> u32 {
    u32::try_from(index * 7919 % 65521).unwrap_or_default()
}

#[expect(clippy::print_stdout, reason = "the report")]
pub(crate) fn report(scratch: &Path, repeats: usize) -> anyhow::Result<()> {
    std::fs::create_dir_all(scratch).with_context(|| scratch.display().to_string())?;
    let path = scratch.join("random-0.4b.safetensors");
    random_model::write(&SHAPE_0_4B, &path)?;
    let cases = Cases::new(&path, repeats);
    std::fs::remove_file(&path)?;
    let cases = cases?;

    let verdict = |good: bool| if good { "reached" } else { "NOT reached" };
    println!("0.4B shape, random F16 weights, checked against the reference (nmse {:.1e})", cases.nmse);
    println!("  load              {:8.2} s    from the page cache", cases.load);
    let gb = cases.streamed as f64 / 1e9;
    let ceiling = gb / cases.reading.median;
    println!("  plain f32 sum     {ceiling:8.1} GB/s {}", cases.reading);
    for (name, time) in [("decode", &cases.decode), ("decode, zeros skipped", &cases.decode_sparse)] {
        let rate = gb / time.median;
        println!(
            "  {name}\n                    {:8.1} tokens/s, {rate:.1} GB/s of weights, {:.0} % of the sum {time}",
            1.0 / time.median,
            100.0 * rate / ceiling
        );
    }
    let share = gb / cases.decode.median / ceiling;
    println!("                    target {:.0} %: {}", 100.0 * DECODE_SHARE, verdict(share >= DECODE_SHARE));
    println!(
        "  decode, {BATCH} sessions\n                    {:8.1} tokens/s {}",
        BATCH as f64 / cases.batch.median,
        cases.batch
    );
    let (prefill, decode) = (PROMPT as f64 / cases.prefill.median, 1.0 / cases.decode.median);
    let flops = 2.0 * cases.streamed as f64 / 2.0 * prefill;
    println!(
        "  prefill {PROMPT}\n                    {prefill:8.1} tokens/s, {:.0} GFLOP/s, {:.1} times decode {}",
        flops / 1e9,
        prefill / decode,
        cases.prefill
    );
    println!(
        "                    target {PREFILL_RATIO} times: {}",
        verdict(prefill / decode >= PREFILL_RATIO)
    );
    if let Some(peak) = cases.peak {
        let ratio = peak as f64 / cases.weights as f64;
        println!(
            "  peak memory       {:8.2} GB, {ratio:.3} times the weights' {:.2} GB",
            peak as f64 / 1e9,
            cases.weights as f64 / 1e9
        );
        println!("                    target {MEMORY_RATIO} times: {}", verdict(ratio <= MEMORY_RATIO));
    }
    Ok(())
}

/// A case's times, in seconds.
struct Times {
    median: f64,
    low: f64,
    high: f64,
}

impl std::fmt::Display for Times {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "({:.1} ms, {:.1} to {:.1})", self.median * 1e3, self.low * 1e3, self.high * 1e3)
    }
}

impl Times {
    fn new(mut seconds: Vec<f64>) -> Self {
        seconds.sort_by(f64::total_cmp);
        Self { median: seconds[seconds.len() / 2], low: seconds[0], high: seconds[seconds.len() - 1] }
    }
}

struct Cases {
    nmse: f64,
    load: f64,
    /// Bytes of weights that a decode step reads.
    streamed: usize,
    weights: u64,
    peak: Option<u64>,
    reading: Times,
    decode: Times,
    decode_sparse: Times,
    batch: Times,
    prefill: Times,
}

impl Cases {
    fn new(path: &Path, repeats: usize) -> anyhow::Result<Self> {
        let begun = Instant::now();
        let dense_only = EngineOptions { skip_zeros: false, ..EngineOptions::default() };
        let checkpoint = Checkpoint::open(path)?;
        let engine = Engine::new(&checkpoint, dense_only, &|_| {})?;
        let load = begun.elapsed().as_secs_f64();

        // everything once, before anything else takes memory
        let prompt: Vec<u32> = (0..PROMPT).map(token).collect();
        engine.session().prefill(&prompt)?;
        engine.session().step(1)?;
        let peak = peak_memory();
        let nmse = verify(&checkpoint, &engine)?;

        let streamed = 2 * engine.config().streamed_params();
        let sum = Reading::new(streamed);
        let mut session = engine.session();
        let [mut reading, mut decode, mut prefill, mut batch] = [const { Vec::new() }; 4];
        let mut sessions: Vec<_> = (0..BATCH).map(|_| engine.session()).collect();
        for index in 0..repeats + 2 {
            let time = |times: &mut Vec<f64>, run: &mut dyn FnMut() -> anyhow::Result<()>| {
                let begun = Instant::now();
                run()?;
                if index >= 2 {
                    times.push(begun.elapsed().as_secs_f64()); // the first two warm up
                }
                anyhow::Ok(())
            };
            time(&mut reading, &mut || {
                sum.run();
                Ok(())
            })?;
            time(&mut decode, &mut || Ok(session.step(token(index)).map(|_| ())?))?;
            let tokens = [token(index)];
            time(&mut batch, &mut || {
                let mut batch: Vec<_> = sessions.iter_mut().map(|s| (s, &tokens[..])).collect();
                Ok(engine.step(&mut batch)?)
            })?;
            if index % 3 == 0 {
                let mut fresh = engine.session();
                time(&mut prefill, &mut || Ok(fresh.prefill(&prompt)?))?;
            }
        }
        drop((session, sessions, engine));

        let engine = Engine::new(&checkpoint, EngineOptions::default(), &|_| {})?;
        let mut session = engine.session();
        let mut decode_sparse = Vec::new();
        for index in 0..repeats + 2 {
            let begun = Instant::now();
            session.step(token(index))?;
            decode_sparse.push(begun.elapsed().as_secs_f64());
        }
        decode_sparse.drain(..2);
        Ok(Self {
            nmse,
            load,
            streamed,
            weights: checkpoint.bytes(),
            peak,
            reading: Times::new(reading),
            decode: Times::new(decode),
            decode_sparse: Times::new(decode_sparse),
            batch: Times::new(batch),
            prefill: Times::new(prefill),
        })
    }
}

/// Compares a few tokens with the reference in plain loops, token by token and in one call.
fn verify(checkpoint: &Checkpoint, engine: &Engine) -> anyhow::Result<f64> {
    let tokens = [1, 65535, 77];
    let reference: Model<f32, Matrix<f32>> = checkpoint.load(&|_| {})?;
    let mut state = State::new(engine.config());
    let segment = Segment { tokens: &tokens, state: &mut state, logits: Logits::All };
    let want = reference.forward(&mut [segment], Options::default());
    drop(reference);
    let whole = engine.session().logits_of(&tokens)?;
    let mut session = engine.session();
    let mut steps = Vec::new();
    for token in tokens {
        steps.extend_from_slice(session.step(token)?);
    }
    ensure!(whole == steps, "a prompt and its tokens one by one give different logits");
    nmse(&whole, &want, NMSE_LIMIT).context("the executor against the reference")
}
