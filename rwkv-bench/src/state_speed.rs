//! What holding states in less, or writing them seldom, brings: sequences side by side, a token of each at a time.
//!
//! For each way to hold states the logits are first compared with those of single precision, then the device is kept busy
//! for half a second, then steps are timed. Beside the tokens a second stands how fast the heads' kernel reads and writes
//! states, timed by itself, and what a copy reaches.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, ensure};
use clap::Args;
use rwkv_core::compare::nmse;
use rwkv_model::engine::Device;
use rwkv_model::{Checkpoint, Engine, EngineOptions, Error, Resident, Session};

use crate::gpu::{busy, token};
use crate::random_model::{self, shape_of};
use crate::speed::Times;

/// Measures ways to hold states, side by side on the GPU.
#[derive(Args)]
pub(crate) struct StateSpeedArgs {
    /// The shape, by name.
    #[arg(long, default_value = "1.5B")]
    shape: String,
    /// The GPU: part of its name, or its number.
    #[arg(long)]
    adapter: Option<String>,
    /// Where the random model is written, and deleted again.
    #[arg(long, default_value = "target/bench")]
    scratch: PathBuf,
    /// Sequences side by side.
    #[arg(long, value_delimiter = ',', default_value = "1,32,128,512,1024")]
    batch: Vec<usize>,
    /// Tokens of each sequence that are timed at once: a multiple of what may be pending, so that folds are among them.
    #[arg(long, default_value_t = 32)]
    tokens: usize,
    /// How often.
    #[arg(long, default_value_t = 3)]
    windows: usize,
    /// Only the ways of these names, beside single precision.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
}

/// The ways, by format and the tokens that may be pending, the one to compare with first, and how far their logits may be
/// from its: rounding; what halves round of states; what bytes do.
fn ways() -> Vec<(String, Resident, f64)> {
    let lazy = [4, 8, 16].map(|c| (format!("F32/{c}"), Resident::lazy(c), 1e-9));
    let halves = [4, 8, 16].map(|c| (format!("F16/{c}"), Resident::f16(c), 1e-5));
    let bytes = [16, 32].map(|c| (format!("Int8/{c}"), Resident::int8(c), 1e-3));
    let first = [("F32".to_owned(), Resident::default(), 1e-9)];
    let dithered = [("F16 dithered".to_owned(), Resident::f16_dithered(), 1e-5)];
    first.into_iter().chain(lazy).chain(dithered).chain(halves).chain(bytes).collect()
}

pub(crate) fn report(args: &StateSpeedArgs) -> anyhow::Result<()> {
    random_model::with(shape_of(&args.shape)?, &args.scratch, |path| measure_all(args, path))
}

#[expect(clippy::print_stdout, reason = "the report")]
fn measure_all(args: &StateSpeedArgs, path: &Path) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(path)?;
    let most = args.batch.iter().copied().max().unwrap_or(1);
    let (mut reference, mut plain) = (Vec::new(), vec![f64::NAN; args.batch.len()]);
    let wanted = |name: &String| args.only.is_empty() || args.only.contains(name);
    for (name, state, limit) in ways().into_iter().filter(|(name, state, _)| state.is_plain() || wanted(name))
    {
        let options = EngineOptions {
            device: Device::Gpu(args.adapter.clone()),
            state,
            pass_tokens: most.max(64),
            sessions: most,
            timestamps: true,
            ..EngineOptions::default()
        };
        let engine = match Engine::new(&checkpoint, options, &|_| {}) {
            Ok(engine) => engine,
            // A way may take more than the device binds for so many sequences; the others are still to be measured.
            Err(error @ Error::Gpu(_)) if !reference.is_empty() => {
                println!("{name:<20} {most:>6} sequences: {:#}", anyhow::Error::from(error));
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        if reference.is_empty() {
            println!("{} on {}", args.shape, engine.report()?.device);
            println!(
                "state                 batch   tokens/s  against F32       ms a step  heads, us    state GB/s"
            );
        }
        let logits = verify(&engine)?;
        if reference.is_empty() {
            reference = logits.iter().copied().map(f64::from).collect();
        }
        let limit = limit.max(crate::gpu::limit(&engine)?);
        nmse(&logits, &reference, limit).with_context(|| format!("{name}: the logits"))?;
        for (&n, plain) in args.batch.iter().zip(&mut plain) {
            let Measured { step, heads_us, gb_s } = measure(&engine, n, args)?;
            let rate = n as f64 / step.median;
            if plain.is_nan() {
                *plain = rate;
            }
            println!(
                "{name:<20} {n:>6} {rate:>10.0} {:>+10.1} % {:>14.3} {heads_us:>10.1} {gb_s:>13.0}   {step}",
                100.0 * (rate / *plain - 1.0),
                1e3 * step.median,
            );
        }
    }
    Ok(())
}

/// Logits of three sequences after some tokens, read one at a time and several at once.
fn verify(engine: &Engine) -> anyhow::Result<Vec<f32>> {
    let mut sessions: Vec<Session> = (0..3).map(|_| engine.session()).collect();
    for (at, session) in sessions.iter_mut().enumerate() {
        let prompt: Vec<u32> = (0..20 + at).map(|i| token(i + 31 * at)).collect();
        session.prefill(&prompt)?;
    }
    for at in 0..40 {
        step(engine, &mut sessions, at)?;
    }
    let logits = sessions.iter().map(|session| Ok(session.logits()?.to_vec()));
    Ok(logits.collect::<anyhow::Result<Vec<_>>>()?.concat())
}

/// A token of each sequence.
fn step(engine: &Engine, sessions: &mut [Session], at: usize) -> anyhow::Result<()> {
    let tokens: Vec<[u32; 1]> = (0..sessions.len()).map(|i| [token(17 * i + at)]).collect();
    let mut batch: Vec<_> = sessions.iter_mut().zip(&tokens).map(|(s, t)| (s, &t[..])).collect();
    Ok(engine.step(&mut batch)?)
}

struct Measured {
    /// Seconds of a step.
    step: Times,
    /// Of a dispatch of the heads.
    heads_us: f64,
    /// States that it reads and writes.
    gb_s: f64,
}

fn measure(engine: &Engine, n: usize, args: &StateSpeedArgs) -> anyhow::Result<Measured> {
    let mut sessions: Vec<Session> = (0..n).map(|_| engine.session()).collect();
    let mut at = 0;
    let mut steps = |sessions: &mut [Session], n: usize| {
        for _ in 0..n {
            step(engine, sessions, at)?;
            at += 1;
        }
        anyhow::Ok(engine.wait()?)
    };
    busy(engine, || steps(&mut sessions, 4))?;
    let time = |_| {
        let begun = Instant::now();
        steps(&mut sessions, args.tokens)?;
        anyhow::Ok(begun.elapsed().as_secs_f64() / args.tokens as f64)
    };
    let step = Times::new((0..args.windows.max(1)).map(time).collect::<Result<_, _>>()?);
    engine.profile()?;
    steps(&mut sessions, args.tokens)?;
    let profile = engine.profile()?;
    let heads: Vec<_> = profile.dispatches.iter().filter(|of| of.part == "heads").collect();
    ensure!(!heads.is_empty(), "the device has no timestamps");
    let ns: f64 = heads.iter().map(|of| of.ns).sum();
    let bytes: u64 = heads.iter().map(|of| of.bytes * n as u64).sum();
    Ok(Measured { step, heads_us: ns / 1e3 / heads.len() as f64, gb_s: bytes as f64 / ns })
}
