//! Speed of the GPU executor at the shapes of released models, beside web-rwkv's and the limit.
//!
//! Each model is random F16 weights, the same file for both engines. The logits are first compared with the CPU
//! executor's, then the device is kept busy for half a second, then windows are timed. [`profile`] is of one model, and
//! tells where the time goes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Args;
use half::f16;
use rwkv_core::compare::nmse;
use rwkv_model::engine::{Device, Report};
use rwkv_model::gpu::Profile;
use rwkv_model::{Checkpoint, Engine, EngineOptions, Recipe, Sampler, Session};
use serde_json::json;

use crate::optimisations::ceiling::gpu_copy;
use crate::random_model::{self, shape_of};
use crate::speed::Times;
use crate::variant::{GRAMMAR, Variant};

/// Measures the GPU.
#[derive(Args)]
pub(crate) struct GpuArgs {
    /// The shapes, by name.
    #[arg(long, value_delimiter = ',', default_value = "0.4B,1.5B,2.9B,7.2B")]
    shapes: Vec<String>,
    /// What the matrices are quantised to: f16, int8 or int4, then perhaps others for some of them.
    #[arg(long, default_value_t)]
    weights: Recipe,
    /// The GPU: part of its name, or its number.
    #[arg(long)]
    adapter: Option<String>,
    /// Where the random models are written, and deleted again: 15 GB for the largest.
    #[arg(long, default_value = "target/bench")]
    scratch: PathBuf,
    /// The program of `rwkv-bench/web-rwkv`, to measure beside, up to 256 sequences.
    #[arg(long)]
    peer: Option<PathBuf>,
    /// Prompt lengths.
    #[arg(long, value_delimiter = ',', default_value = "512,2048")]
    prefill: Vec<usize>,
    /// Sequences side by side.
    #[arg(long, value_delimiter = ',', default_value = "8,32,128")]
    batch: Vec<usize>,
    /// Without comparing with one dispatch for each operation.
    #[arg(long)]
    no_unfused: bool,
    /// Where a Chrome trace of a decode step goes.
    #[arg(long)]
    trace: Option<PathBuf>,
}

/// Measures where the time of a model's passes goes, dispatch by dispatch.
#[derive(Args)]
pub(crate) struct ProfileArgs {
    /// The checkpoint.
    #[arg(
        long,
        default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../rwkv-model/assets/books-10m/model.safetensors")
    )]
    model: PathBuf,
    /// Random weights of a released shape instead: 0.4B, 1.5B, 2.9B, 7.2B.
    #[arg(long, conflicts_with = "model")]
    shape: Option<String>,
    /// Where they are written, and deleted again.
    #[arg(long, default_value = "target/bench")]
    scratch: PathBuf,
    /// The GPU: part of its name, or its number.
    #[arg(long)]
    adapter: Option<String>,
    /// What the matrices are quantised to.
    #[arg(long, default_value_t)]
    weights: Recipe,
    /// Tokens generated one after the other.
    #[arg(long, default_value_t = 16)]
    tokens: usize,
    /// Prompts of so many tokens, each by itself.
    #[arg(long, value_delimiter = ',', value_name = "N")]
    prompt: Vec<usize>,
    /// A token for each of so many sequences side by side.
    #[arg(long, value_delimiter = ',', value_name = "N")]
    batch: Vec<usize>,
    /// With one dispatch for each operation.
    #[arg(long)]
    unfused: bool,
    /// Another way to run the engine.
    #[arg(long, value_name = "SETTINGS", long_help = GRAMMAR)]
    with: Option<Variant>,
    /// Where a Chrome trace goes.
    #[arg(long, value_name = "FILE", default_value = "target/profile.json")]
    trace: PathBuf,
}

/// Tokens of a window, at least.
const WINDOW: usize = 64;

/// Windows that are timed.
const WINDOWS: usize = 9;

/// Windows that are timed where each takes longer.
const LONG_WINDOWS: usize = 3;

/// How long a device is kept busy before it is timed: an idle one is clocked down.
const WARM: Duration = Duration::from_millis(500);

/// How often a case is timed again, at most.
const AGAIN: usize = 2;

/// The mean square error that is let pass: rounding. At these widths sums of thousands of terms are off by some 1e-6 of
/// their size, whatever their order, and a layer adds a tenth of what it reads. A wrong kernel is off by far more.
const LIMIT: f64 = 1e-10;

/// The same where cooperative matrices multiply, which round what they read to halves, by 2.8e-4 of its size in the mean; some
/// hundred products follow each other: a hundred times its square.
const LIMIT_OF_HALVES: f64 = 1e-5;

/// The same where vectors are multiplied by blocks of weights in units of which the largest of 32 has 32,512, so that half of one is lost at
/// most: of normal numbers, whose largest is 2.3 in the mean, 2.1e-5 of their size in the mean. Again some hundred products.
const LIMIT_OF_BLOCKS: f64 = 5e-8;

/// What is let pass on an engine's device.
pub(crate) fn limit(engine: &Engine) -> anyhow::Result<f64> {
    let report = engine.report()?;
    Ok(match (of_halves(&report), report.blocks) {
        (true, _) => LIMIT_OF_HALVES,
        (false, true) => LIMIT_OF_BLOCKS,
        (false, false) => LIMIT,
    })
}

/// Whether an engine multiplies by cooperative matrices.
pub(crate) fn rounds_to_halves(engine: &Engine) -> anyhow::Result<bool> {
    Ok(of_halves(&engine.report()?))
}

fn of_halves(report: &Report) -> bool {
    report.kernels.iter().any(|label| label.contains("coop"))
}

/// A token of a text without sense, of a released vocabulary.
pub(crate) fn token(index: usize) -> u32 {
    u32::try_from(index * 7919 % 65521).unwrap_or_default()
}

/// One that the model of an engine has.
pub(crate) fn token_of(engine: &Engine, index: usize) -> u32 {
    token(index) % u32::try_from(engine.config().vocab).unwrap_or(u32::MAX)
}

#[expect(clippy::print_stdout, reason = "the report")]
pub(crate) fn report(args: &GpuArgs) -> anyhow::Result<()> {
    let peer = args.peer.as_deref().map(|program| Peer::new(program, &args.weights)).transpose()?;
    for name in &args.shapes {
        println!("{name}");
        random_model::with(shape_of(name)?, &args.scratch, |path| measure(args, peer.as_ref(), path))?;
    }
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the report")]
fn measure(args: &GpuArgs, peer: Option<&Peer<'_>>, path: &Path) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(path)?;
    let device = Device::Gpu(args.adapter.clone());
    let weights = args.weights.clone();
    let options = EngineOptions { device, weights, timestamps: true, ..EngineOptions::default() };

    let begun = Instant::now();
    let engine = Engine::new(&checkpoint, options.clone(), &|_| {})?;
    engine.wait()?;
    let load = begun.elapsed().as_secs_f64();
    let report = engine.report()?;
    println!("  device            {}", report.device);
    println!("  kernels           {}", report.kernels.join(" "));
    println!("  dispatches        {} a token, {} a pass", report.step_dispatches, report.batch_dispatches);
    println!("  load              {load:8.2} s, {:.1} GB/s", checkpoint.bytes() as f64 / load / 1e9);
    println!("  weights           {}, {}", memory(&engine), args.weights);
    let reference = Reference::new(&checkpoint, &args.weights)?;
    let error = reference.verify(&engine)?;
    println!("  logits            {error:.1e} from the CPU executor's");

    let bytes = engine.weight_bytes() as f64;
    let fused = decode(&engine)?;
    println!(
        "  decode            {:8.1} tokens/s, {:.0} GB/s if all weights were read {}",
        fused.rate(),
        bytes * fused.rate() / 1e9,
        fused.times
    );
    for &tokens in &args.prefill {
        let prompt: Vec<u32> = (0..tokens).map(token).collect();
        let times = windows(&engine, LONG_WINDOWS, || {
            engine.session().prefill(&prompt)?;
            Ok(engine.wait()?)
        })?;
        println!("  prefill {tokens:<9} {:8.0} tokens/s {times}", tokens as f64 / times.median);
    }
    for &n in &args.batch {
        let mut sessions: Vec<Session> = (0..n).map(|_| engine.session()).collect();
        let times = windows(&engine, LONG_WINDOWS, || {
            for at in 0..8 {
                let tokens: Vec<[u32; 1]> = (0..n).map(|i| [token(i + at)]).collect();
                let mut batch: Vec<_> = sessions.iter_mut().zip(&tokens).map(|(s, t)| (s, &t[..])).collect();
                engine.step(&mut batch)?;
            }
            Ok(engine.wait()?)
        })?;
        println!("  decode, {n:>3} side by side {:8.1} tokens/s {times}", 8.0 * n as f64 / times.median);
    }
    let mut session = engine.session();
    session.prefill(&[1])?;
    warm(&mut session)?;
    engine.profile()?;
    for _ in session.generate(Sampler::greedy()).take(16) {}
    let profile = engine.profile()?;
    kernels(&profile, copies(args.adapter.clone())?);
    if let Some(path) = &args.trace {
        std::fs::write(path, trace(&profile)?)?;
    }
    drop((session, engine));

    // One dispatch for each operation multiplies halves.
    if !args.no_unfused && args.weights == Recipe::default() {
        let engine = Engine::new(&checkpoint, EngineOptions { fused: false, ..options }, &|_| {})?;
        reference.verify(&engine)?;
        let unfused = decode(&engine)?;
        println!(
            "  decode, not fused {:8.1} tokens/s, {} dispatches; fused is {:+.0} % {}",
            unfused.rate(),
            engine.report()?.step_dispatches,
            100.0 * (fused.rate() / unfused.rate() - 1.0),
            unfused.times
        );
    }
    if let Some(peer) = peer {
        compare(args, peer, path)?;
    }
    Ok(())
}

/// A prompt and single tokens after it, with the logits that the CPU executor gives after each.
struct Reference(Vec<(Vec<u32>, Vec<f64>)>);

impl Reference {
    fn new(checkpoint: &Checkpoint, weights: &Recipe) -> anyhow::Result<Self> {
        let cpu = EngineOptions { device: Device::Cpu, weights: weights.clone(), ..EngineOptions::default() };
        let cpu = Engine::new(checkpoint, cpu, &|_| {})?;
        let (mut session, mut at) = (cpu.session(), 0);
        let logits = [3, 1, 1].map(|part| {
            let tokens: Vec<u32> = (at..at + part).map(token).collect();
            at += part;
            session.prefill(&tokens)?;
            anyhow::Ok((tokens, session.logits()?.iter().copied().map(f64::from).collect()))
        });
        Ok(Self(logits.into_iter().collect::<Result<_, _>>()?))
    }

    /// The largest error of an engine's logits, relative to their size.
    fn verify(&self, engine: &Engine) -> anyhow::Result<f64> {
        let (mut session, mut worst) = (engine.session(), 0f64);
        let limit = limit(engine)?;
        for (tokens, want) in &self.0 {
            session.prefill(tokens)?;
            worst = worst.max(nmse(session.logits()?, want, limit).context("the CPU's logits")?);
        }
        Ok(worst.sqrt())
    }
}

/// Windows of tokens that are generated one after the other.
struct Decode {
    window: usize,
    times: Times,
}

impl Decode {
    /// Tokens a second.
    fn rate(&self) -> f64 {
        self.window as f64 / self.times.median
    }
}

/// Times [`WINDOWS`] of them.
fn decode(engine: &Engine) -> anyhow::Result<Decode> {
    // Whole groups of those that come at the same time: of any other number, most windows would end early or late.
    let window = WINDOW.next_multiple_of(engine.report()?.together);
    let mut session = engine.session();
    session.prefill(&[1])?;
    warm(&mut session)?;
    let mut tokens = session.generate(Sampler::greedy());
    let mut times = Vec::new();
    for _ in 0..WINDOWS {
        let begun = Instant::now();
        for token in tokens.by_ref().take(window) {
            token?;
        }
        times.push(begun.elapsed().as_secs_f64());
    }
    Ok(Decode { window, times: Times::new(times) })
}

fn warm(session: &mut Session) -> anyhow::Result<()> {
    let begun = Instant::now();
    for token in session.generate(Sampler::greedy()) {
        token?;
        if begun.elapsed() > WARM {
            break;
        }
    }
    Ok(())
}

/// Runs a case once, so that its kernels are compiled, waits for the device, then repeats it for [`WARM`].
pub(crate) fn busy(engine: &Engine, mut run: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
    run()?;
    engine.wait()?;
    let begun = Instant::now();
    while begun.elapsed() < WARM {
        run()?;
    }
    Ok(engine.wait()?)
}

/// Runs a case for [`WARM`], and then times it. A short one again, up to [`AGAIN`] times, until that makes it no faster: a
/// clock that fell while kernels were compiled is not always up by then. The fastest try counts.
pub(crate) fn windows(
    engine: &Engine,
    n: usize,
    mut run: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<Times> {
    let mut best = warm_windows(engine, n, &mut run)?;
    let most = if best.are_short() { AGAIN } else { 0 };
    for _ in 0..most {
        let again = warm_windows(engine, n, &mut run)?;
        let settled = again.confirm(&best);
        if again.median < best.median {
            best = again;
        }
        if settled {
            break;
        }
    }
    Ok(best)
}

fn warm_windows(
    engine: &Engine,
    n: usize,
    mut run: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<Times> {
    busy(engine, &mut run)?;
    let time = |_| {
        let begun = Instant::now();
        run()?;
        anyhow::Ok(begun.elapsed().as_secs_f64())
    };
    Ok(Times::new((0..n).map(time).collect::<Result<_, _>>()?))
}

/// What the matrices take, for people, beside what all that a step reads takes in halves.
fn memory(engine: &Engine) -> String {
    let halves = size_of::<f16>() * engine.config().streamed_params();
    let bytes = engine.weight_bytes() as f64;
    format!("{:8.2} GB, {:.2} of what halves take", bytes / 1e9, bytes / halves as f64)
}

/// Bytes a second that a copy on the device reads and writes: the ceiling of kernels.
pub(crate) fn copies(adapter: Option<String>) -> anyhow::Result<f64> {
    let mut copy = gpu_copy(adapter)?;
    let begun = Instant::now();
    let mut best = copy.rate()?;
    while begun.elapsed() < WARM {
        best = best.max(copy.rate()?);
    }
    Ok(best)
}

/// Prints the time of each part of a pass, the longest first; `copies` is bytes a second.
#[expect(clippy::print_stdout, reason = "the report")]
fn kernels(profile: &Profile, copies: f64) {
    let mut parts: BTreeMap<(&str, &str), (u32, f64, u64)> = BTreeMap::new();
    for of in &profile.dispatches {
        let part = parts.entry((&of.kernel, of.part)).or_default();
        *part = (part.0 + 1, part.1 + of.ns, part.2 + of.bytes);
    }
    let total: f64 = parts.values().map(|(_, ns, _)| ns).sum();
    let mut parts: Vec<_> = parts.into_iter().collect();
    parts.sort_by(|(_, (_, a, _)), (_, (_, b, _))| b.total_cmp(a));
    println!("    {:.0} GB/s are copied on the device: what kernels are shares of.", copies / 1e9);
    println!(
        "    kernel                      part            calls  us each   bytes each     GB/s  of copies   share"
    );
    for ((kernel, part), (calls, ns, bytes)) in parts {
        println!(
            "    {kernel:<27} {part:<15} {calls:>5} {:>8.2} {:>12} {:>8.0} {:>9.1}% {:>6.1}%",
            ns / 1e3 / f64::from(calls),
            bytes / u64::from(calls),
            bytes as f64 / ns,
            100.0 * (bytes as f64 / ns) / (copies / 1e9),
            100.0 * ns / total
        );
    }
}

/// A trace for `chrome://tracing`.
fn trace(profile: &Profile) -> serde_json::Result<String> {
    let event = |of: &rwkv_model::gpu::Dispatch| {
        json!({
            "name": of.part,
            "cat": of.kernel,
            "ph": "X",
            "ts": of.start_ns / 1e3,
            "dur": of.ns / 1e3,
            "pid": 0,
            "tid": 0,
            "args": { "kernel": of.kernel, "bytes": of.bytes },
        })
    };
    serde_json::to_string(&profile.dispatches.iter().map(event).collect::<Vec<_>>())
}

/// Where the time goes.
#[expect(clippy::print_stdout, reason = "the report")]
pub(crate) fn profile(args: &ProfileArgs) -> anyhow::Result<()> {
    let options = EngineOptions {
        device: Device::Gpu(args.adapter.clone()),
        fused: !args.unfused,
        weights: args.weights.clone(),
        timestamps: true,
        ..EngineOptions::default()
    };
    let with = args.with.clone().unwrap_or_else(Variant::plain);
    ensure!(with.rest.is_none(), "{}: states do not rest within a pass", with.name);
    let options = with.apply(options);
    let open = |path: &Path| Ok(Engine::open_with(path, options, &|_| {})?);
    let engine = match &args.shape {
        None => open(&args.model)?,
        Some(name) => random_model::with(shape_of(name)?, &args.scratch, open)?,
    };
    println!("model   {}", args.shape.clone().unwrap_or_else(|| args.model.display().to_string()));
    println!("device  {}", engine.report()?.device);
    println!("with    {}", with.name);
    println!("weights {}, {}", memory(&engine).trim_start(), args.weights);
    let copies = copies(args.adapter.clone())?;

    // Each once to make the device busy, and once to measure.
    let mut all = Profile::default();
    if args.tokens > 0 {
        let mut session = engine.session();
        session.prefill(&[token_of(&engine, 1)])?;
        warm(&mut session)?;
        let what = format!("{} tokens, one after the other", args.tokens);
        timed((&engine, copies), &mut all, &what, args.tokens, || {
            session.generate(Sampler::greedy()).take(args.tokens).try_for_each(|token| Ok(token.map(drop)?))
        })?;
    }
    for &n in &args.prompt {
        let prompt = tokens(&engine, n);
        let read = || Ok(engine.session().prefill(&prompt)?);
        busy(&engine, || read().and_then(|()| Ok(engine.wait()?)))?;
        let passes = n.div_ceil(EngineOptions::default().pass_tokens);
        timed((&engine, copies), &mut all, &format!("a prompt of {n} tokens"), passes, read)?;
    }
    for &n in &args.batch {
        let tokens = tokens(&engine, n);
        let mut sessions: Vec<Session> = (0..n).map(|_| engine.session()).collect();
        let mut read = || {
            let mut batch: Vec<_> = sessions.iter_mut().zip(tokens.chunks(1)).collect();
            Ok(engine.step(&mut batch)?)
        };
        busy(&engine, || read().and_then(|()| Ok(engine.wait()?)))?;
        timed((&engine, copies), &mut all, &format!("a token for each of {n} sequences"), 1, read)?;
    }
    println!(
        "\nA timestamp between two dispatches costs some microseconds, which each of them seems to take longer here.\n\
         Bytes are those of the weights and states that one row reads and writes."
    );
    if let Some(folder) = args.trace.parent() {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    std::fs::write(&args.trace, trace(&all)?).with_context(|| args.trace.display().to_string())?;
    println!("trace   {}, for chrome://tracing or ui.perfetto.dev", args.trace.display());
    Ok(())
}

/// So many tokens that the model has.
fn tokens(engine: &Engine, n: usize) -> Vec<u32> {
    (0..n).map(|index| token_of(engine, index)).collect()
}

/// Prints where the time of something goes, of which the passes are known, and adds it to what was timed.
#[expect(clippy::print_stdout, reason = "the report")]
fn timed(
    (engine, copies): (&Engine, f64),
    all: &mut Profile,
    what: &str,
    passes: usize,
    run: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    engine.wait()?;
    engine.profile()?;
    run()?;
    engine.wait()?;
    let mut profile = engine.profile()?;
    ensure!(!profile.dispatches.is_empty(), "the device tells no time between dispatches");

    // Every pass begins with the embedding.
    let timed = profile.dispatches.iter().filter(|of| of.part == "embedding").count();
    let sum: f64 = profile.dispatches.iter().map(|of| of.ns).sum();
    // A few are begun ahead of the last token. The device keeps no more than some thousand timestamps.
    let part = if timed < passes { format!(" of {passes}") } else { String::new() };
    println!("\ntimed   {what}: {timed}{part} passes, {:.1} us each\n", sum / 1e3 / timed.max(1) as f64);
    kernels(&profile, copies);
    let end = all.dispatches.last().map_or(0.0, |of| of.start_ns + of.ns);
    profile.dispatches.iter_mut().for_each(|of| of.start_ns += end);
    all.dispatches.append(&mut profile.dispatches);
    Ok(())
}

/// The peer, with what it has that is nearest to a recipe.
struct Peer<'a> {
    program: &'a Path,
    quant: &'static str,
}

impl<'a> Peer<'a> {
    fn new(program: &'a Path, weights: &Recipe) -> anyhow::Result<Self> {
        let quant = match weights.to_string().as_str() {
            "f16" => "none",
            "int8" => "int8",
            "int4" => "nf4",
            other => anyhow::bail!("--peer: it has no weights like {other}"),
        };
        Ok(Self { program, quant })
    }
}

/// Runs the peer on the same model.
fn compare(args: &GpuArgs, peer: &Peer<'_>, model: &Path) -> anyhow::Result<()> {
    let converted = model.with_extension("st");
    let run = |of: &mut Command| {
        let done = of.status()?;
        ensure!(done.success(), "{of:?}: {done}");
        anyhow::Ok(())
    };
    run(Command::new(peer.program).arg("convert").args([model, &converted]))?;
    let mut command = Command::new(peer.program);
    command.arg(&converted).args(["--decode", "64", "--json", "--batch", "1"]);
    // It numbers its sequences by a byte.
    command.args(args.batch.iter().filter(|batch| (2..=256).contains(*batch)).map(usize::to_string));
    command.arg("--prefill").args(args.prefill.iter().map(usize::to_string));
    command.args(["--quant", peer.quant]);
    if let Some(adapter) = &args.adapter {
        command.args(["--adapter", adapter]);
    }
    let done = run(&mut command);
    std::fs::remove_file(&converted)?;
    done
}
