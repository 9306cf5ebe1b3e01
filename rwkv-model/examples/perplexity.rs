//! How well a model predicts a text: bits per byte, the lower the better.
//!
//! The text is read in windows, each from an empty state. Every token of a window is predicted from those before it in
//! the window; windows overlap by one token, so that every token of the text but the first is predicted once.
//!
//! ```text
//! cargo run --release --example perplexity -- FILE
//! ```

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, ensure};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use rwkv_model::tokenizer::World;
use rwkv_model::{Engine, EngineOptions, Tokenizer};

/// The model that comes with the sources.
const BUNDLED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/books-10m/model.safetensors");

/// Prints bits per byte of a text.
#[derive(Parser)]
struct Args {
    /// The text.
    file: PathBuf,
    /// Checkpoint: .safetensors or .pth.
    #[arg(long, default_value = BUNDLED)]
    model: PathBuf,
    /// Vocabulary file, for models whose tokens are not bytes.
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// Tokens predicted in a window.
    #[arg(long, default_value_t = 1024)]
    window: usize,
    /// Read only so many bytes of the text.
    #[arg(long)]
    bytes: Option<usize>,
}

#[expect(clippy::print_stdout, reason = "the result")]
fn run(args: &Args) -> anyhow::Result<()> {
    let tokenizer = args.tokenizer.as_ref().map(|path| {
        World::open(path).map(Tokenizer::World).with_context(|| format!("vocabulary {}", path.display()))
    });
    let options = EngineOptions { tokenizer: tokenizer.transpose()?, ..EngineOptions::default() };
    let engine = Engine::open_with(&args.model, options, &|_| {})?;
    let mut text = std::fs::read(&args.file).with_context(|| args.file.display().to_string())?;
    text.truncate(args.bytes.unwrap_or(usize::MAX));
    let tokens = engine.tokenizer()?.encode(&text);
    ensure!(tokens.len() > 1, "{}: a text of {} tokens predicts nothing", args.file.display(), tokens.len());
    ensure!(args.window > 0, "a window has at least one token");

    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} tokens, {msg}, {eta} left")?;
    let bar = ProgressBar::new(tokens.len() as u64 - 1).with_style(style);
    let (mut nats, mut predicted, mut bytes) = (0.0, 0, 0);
    for start in (0..tokens.len() - 1).step_by(args.window) {
        let window = &tokens[start..(start + args.window + 1).min(tokens.len())];
        let scores = engine.session().score(window)?;
        nats -= scores.iter().sum::<f64>();
        predicted += scores.len();
        bytes += engine.tokenizer()?.decode(&window[1..])?.len();
        bar.set_position(predicted as u64);
        bar.set_message(format!("{:.4} bits per byte", nats / std::f64::consts::LN_2 / bytes as f64));
    }
    bar.finish_and_clear();
    let bits = nats / std::f64::consts::LN_2;
    println!(
        "{:.5} bits per byte, perplexity {:.3} per token ({predicted} tokens, {bytes} bytes, windows of {})",
        bits / bytes as f64,
        (nats / predicted as f64).exp(),
        args.window,
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
