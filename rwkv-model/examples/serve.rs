//! Serves requests that come at random times, and says how fast: tokens a second, the time to the first token, and the time
//! between tokens.
//!
//! ```text
//! cargo run --release --example serve -- --sessions 256 --rate 32
//! ```

mod common;

use std::io::{Write, stdout};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Parser;
use rwkv_core::rng::SplitMix64;
use rwkv_model::scheduler::{Handle, Options, Request, Scheduler};
use rwkv_model::{EngineOptions, FinishReason, Sampler, TextOptions};

/// Serves requests that come at random times.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    model: common::ModelArgs,
    /// Requests in all.
    #[arg(long, default_value_t = 256)]
    sessions: usize,
    /// Requests a second, on average; they come independently of each other.
    #[arg(long, default_value_t = 32.0)]
    rate: f64,
    /// Tokens of a pass, at most.
    #[arg(long, default_value_t = Options::default().budget)]
    budget: usize,
    /// Requests that run side by side, at most.
    #[arg(long, default_value_t = 256)]
    running: usize,
    /// The longest prompt; any length up to it is as likely.
    #[arg(long, default_value_t = 256)]
    prompt: usize,
    /// The longest answer; any length up to it is as likely.
    #[arg(long, default_value_t = 128)]
    answer: usize,
    /// The same seed gives the same requests.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// A request, and when what happened to it.
struct Served {
    handle: Handle,
    came: Instant,
    tokens: Vec<Instant>,
}

/// A whole number from 1 to `most`.
fn length(most: usize, rng: &mut SplitMix64) -> anyhow::Result<usize> {
    Ok(1 + usize::try_from(rng.next_u64() % most.max(1) as u64)?)
}

/// The 50th and the 99th percentile, in milliseconds.
fn percentiles(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let at = |percent: usize| match times.len() {
        0 => f64::NAN,
        n => times[(n * percent).div_ceil(100).max(1) - 1].as_secs_f64() * 1e3,
    };
    format!("{:8.1} ms at the 50th percentile, {:8.1} ms at the 99th", at(50), at(99))
}

fn run(args: &Args) -> anyhow::Result<()> {
    ensure!(args.rate > 0.0 && args.rate.is_finite(), "--rate {}: it must be above 0", args.rate);
    let engine = args.model.open_with(EngineOptions {
        pass_tokens: args.budget,
        sessions: args.running.min(args.sessions),
        ..EngineOptions::default()
    })?;
    let options = Options { running: args.running, waiting: args.sessions.max(1), budget: args.budget };
    let (mut scheduler, queue) = Scheduler::new(&engine, options)?;
    let mut rng = SplitMix64::new(args.seed);
    let vocab = engine.config().vocab as u64;

    // When each comes, after the one before it: exponentially distributed.
    let (mut requests, mut at) = (Vec::new(), Duration::ZERO);
    for seed in 0..args.sessions as u64 {
        let unit = (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        at += Duration::from_secs_f64(-(1.0 - unit).ln() / args.rate);
        let tokens = (0..length(args.prompt, &mut rng)?).map(|_| u32::try_from(rng.next_u64() % vocab));
        let prompt = tokens.collect::<Result<_, _>>()?;
        let (sampler, max_tokens) = (Sampler { seed, ..Sampler::default() }, length(args.answer, &mut rng)?);
        let options = TextOptions { sampler, max_tokens, stop: Vec::new() };
        requests.push((at, Request { session: engine.session(), prompt, options }));
    }
    let read: usize = requests.iter().map(|(_, request)| request.prompt.len()).sum();

    // What is made at first use is there before it is timed.
    engine.prepare()?;
    let warm = TextOptions { max_tokens: 2, ..TextOptions::default() };
    let request = Request { session: engine.session(), prompt: vec![0; args.budget], options: warm };
    drop((queue.submit(request)?, while scheduler.tick()?.is_some() {}));

    let (begun, mut served) = (Instant::now(), Vec::new());
    let (mut passes, mut most) = (0usize, 0);
    let mut coming = requests.into_iter().peekable();
    loop {
        while let Some((at, request)) = coming.next_if(|(at, _)| *at <= begun.elapsed()) {
            served.push(Served { handle: queue.submit(request)?, came: begun + at, tokens: Vec::new() });
        }
        if scheduler.tick()?.is_none() {
            let Some((at, _)) = coming.peek() else { break };
            std::thread::sleep(at.saturating_sub(begun.elapsed()));
            continue;
        }
        (passes, most) = (passes + 1, most.max(scheduler.running()));
        let now = Instant::now();
        for Served { handle, tokens, .. } in &mut served {
            while let Some(piece) = handle.ready() {
                tokens.extend(piece.context("a request failed")?.token.map(|_| now));
            }
        }
    }
    let took = begun.elapsed().as_secs_f64();
    let unfinished = |of: &&Served| of.handle.finish_reason().is_none_or(|why| why == FinishReason::Error);
    ensure!(served.iter().find(unfinished).is_none(), "a request is not over");

    let generated: usize = served.iter().map(|of| of.tokens.len()).sum();
    let first = served.iter().filter_map(|of| Some(of.tokens.first()?.duration_since(of.came))).collect();
    let between = served.iter().flat_map(|of| of.tokens.windows(2).map(|at| at[1] - at[0])).collect();
    let mut out = stdout();
    writeln!(out, "{}", engine.report()?.device)?;
    writeln!(
        out,
        "{} requests in {took:.1} s, {most} side by side at most, {passes} passes of {} tokens at most",
        args.sessions, args.budget
    )?;
    writeln!(
        out,
        "generated             {:8.0} tokens/s, {generated} in all, beside {read} of prompts",
        generated as f64 / took
    )?;
    writeln!(out, "time to first token   {}", percentiles(first))?;
    writeln!(out, "time between tokens   {}", percentiles(between))?;
    Ok(())
}

fn main() -> ExitCode {
    common::end(run(&Args::parse()))
}
