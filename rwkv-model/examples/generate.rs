//! Continues a text, by default with the bundled model, and says how fast.
//!
//! ```text
//! cargo run --release --example generate -- "It was"
//! ```

mod common;

use std::ffi::OsString;
use std::io::{IsTerminal, Write, stderr, stdout};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use clap::Parser;
use rwkv_model::{Sampler, TextOptions};

/// Continues a text.
#[derive(Parser)]
struct Args {
    /// What to continue: any bytes.
    prompt: OsString,
    #[command(flatten)]
    model: common::ModelArgs,
    /// Tokens to generate, at most.
    #[arg(long, default_value_t = 256)]
    tokens: usize,
    /// How freely tokens are drawn: above 1 more, below 1 less; 0 always takes the most probable.
    #[arg(long, default_value_t = Sampler::default().temperature, allow_negative_numbers = true)]
    temperature: f32,
    /// Keep the most probable tokens up to this share, above 0 and at most 1.
    #[arg(long, default_value_t = Sampler::default().top_p, allow_negative_numbers = true)]
    top_p: f32,
    /// The same seed gives the same text.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// End before this text; may be given several times.
    #[arg(long)]
    stop: Vec<String>,
}

fn run(args: &Args) -> anyhow::Result<()> {
    let engine = args.model.open()?;
    let prompt = args.prompt.as_encoded_bytes();
    let mut session = engine.session();
    let tokens = engine.tokenizer()?.encode(prompt);
    let begun = Instant::now();
    session.prefill(&tokens).context("the prompt")?;
    engine.wait()?;
    let prefill = begun.elapsed().as_secs_f64();

    let sampler =
        Sampler { temperature: args.temperature, top_p: args.top_p, seed: args.seed, ..Sampler::default() };
    let options = TextOptions { sampler, max_tokens: args.tokens, stop: args.stop.clone() };
    let begun = Instant::now();
    let mut text = session.text(options)?;
    let mut out = stdout();
    out.write_all(prompt)?;
    for piece in &mut text {
        write!(out, "{}", piece?)?;
        if out.is_terminal() {
            out.flush()?;
        }
    }
    writeln!(out)?;
    let (decoded, decode) = (text.tokens(), begun.elapsed().as_secs_f64());

    // beside the text, not in it
    writeln!(
        stderr(),
        "{}: prefill: {} tokens, {:.0} tokens/s; decode: {decoded} tokens, {:.0} tokens/s",
        engine.report()?.device,
        tokens.len(),
        tokens.len() as f64 / prefill,
        decoded as f64 / decode,
    )?;
    Ok(())
}

fn main() -> ExitCode {
    common::end(run(&Args::parse()))
}
