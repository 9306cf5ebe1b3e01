//! Continues a text, by default with the bundled model, and says how fast.
//!
//! ```text
//! cargo run --release --example generate -- "It was"
//! ```

use std::io::{IsTerminal, Write, stdout};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use rwkv_model::tokenizer::World;
use rwkv_model::{Engine, EngineOptions, Sampler, TextOptions, Tokenizer};

/// The model that comes with the sources.
const BUNDLED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/books-10m/model.safetensors");

/// Continues a text.
#[derive(Parser)]
struct Args {
    /// What to continue.
    prompt: String,
    /// Checkpoint: .safetensors or .pth.
    #[arg(long, default_value = BUNDLED)]
    model: PathBuf,
    /// Vocabulary file, for models whose tokens are not bytes.
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// Tokens to generate, at most.
    #[arg(long, default_value_t = 256)]
    tokens: usize,
    /// 0 always takes the most probable token.
    #[arg(long, default_value_t = Sampler::default().temperature)]
    temperature: f32,
    /// Keep the most probable tokens up to this share.
    #[arg(long, default_value_t = Sampler::default().top_p)]
    top_p: f32,
    /// The same seed gives the same text.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// End before this text; may be given several times.
    #[arg(long)]
    stop: Vec<String>,
}

#[expect(clippy::print_stderr, reason = "the figures go beside the text, not into it")]
fn run(args: &Args) -> anyhow::Result<()> {
    let tokenizer = args.tokenizer.as_ref().map(|path| {
        World::open(path).map(Tokenizer::World).with_context(|| format!("vocabulary {}", path.display()))
    });
    let options = EngineOptions { tokenizer: tokenizer.transpose()?, ..EngineOptions::default() };

    let style = ProgressStyle::with_template("loading {bar:40} {bytes}/{total_bytes}")?;
    let bar = ProgressBar::no_length().with_style(style); // hidden where there is no terminal
    let engine = Engine::open_with(&args.model, options, &|progress| {
        bar.set_length(progress.total);
        bar.set_position(progress.done);
    })?;
    bar.finish_and_clear();

    let mut session = engine.session();
    let prompt = engine.tokenizer()?.encode(&args.prompt);
    let begun = Instant::now();
    session.prefill(&prompt).context("the prompt")?;
    let prefill = begun.elapsed().as_secs_f64();

    let sampler =
        Sampler { temperature: args.temperature, top_p: args.top_p, seed: args.seed, ..Sampler::default() };
    let begun = Instant::now();
    let mut text = session.text(TextOptions { sampler, max_tokens: args.tokens, stop: args.stop.clone() })?;
    let mut out = stdout();
    write!(out, "{}", args.prompt)?;
    for piece in &mut text {
        write!(out, "{}", piece?)?;
        if out.is_terminal() {
            out.flush()?;
        }
    }
    writeln!(out)?;
    let (decoded, decode) = (text.tokens(), begun.elapsed().as_secs_f64());

    eprintln!(
        "prefill: {} tokens, {:.0} tokens/s; decode: {decoded} tokens, {:.0} tokens/s",
        prompt.len(),
        prompt.len() as f64 / prefill,
        decoded as f64 / decode,
    );
    Ok(())
}

#[expect(clippy::print_stderr, reason = "one sentence, not a backtrace")]
fn main() -> ExitCode {
    run(&Args::parse()).map_or_else(
        |error| {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        },
        |()| ExitCode::SUCCESS,
    )
}
