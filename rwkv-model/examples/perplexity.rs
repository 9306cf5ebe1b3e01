//! How well a model predicts a text: bits per byte, the lower the better.
//!
//! ```text
//! cargo run --release --example perplexity -- FILE
//! ```

mod common;

use std::io::{Write, stdout};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, ensure};
use clap::Parser;
use rwkv_model::quality;

/// Prints bits per byte of a text.
#[derive(Parser)]
struct Args {
    /// The text.
    file: PathBuf,
    #[command(flatten)]
    model: common::ModelArgs,
    /// Tokens predicted in a window; each begins with an empty state.
    #[arg(long, default_value_t = 1024)]
    window: usize,
    /// Read only so many bytes of the text.
    #[arg(long)]
    bytes: Option<usize>,
}

fn run(args: &Args) -> anyhow::Result<()> {
    let engine = args.model.open()?;
    let mut text = std::fs::read(&args.file).with_context(|| args.file.display().to_string())?;
    text.truncate(args.bytes.unwrap_or(usize::MAX));
    let bar = common::bar("{bar:40} {pos}/{len} bytes, {msg} bits per byte, {eta} left");
    bar.set_length(text.len() as u64);
    let score = quality::windows(&engine, &text, args.window, |score| {
        bar.set_position(score.bytes as u64);
        bar.set_message(format!("{:.4}", score.bits_per_byte()));
    })?;
    bar.finish_and_clear();
    ensure!(score.tokens > 0, "{}: a text of less than two tokens predicts nothing", args.file.display());
    writeln!(
        stdout(),
        "{:.5} bits per byte, perplexity {:.3} per token ({} tokens, {} bytes, windows of {})",
        score.bits_per_byte(),
        score.perplexity(),
        score.tokens,
        score.bytes,
        args.window,
    )?;
    Ok(())
}

fn main() -> ExitCode {
    common::end(run(&Args::parse()))
}
