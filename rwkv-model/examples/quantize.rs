//! Writes a checkpoint as a safetensors file with quantised matrices, which opens like any other.
//!
//! ```text
//! cargo run --release --example quantize -- MODEL int8 OUT.safetensors
//! ```

use std::io::{Write, stdout};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use rwkv_model::{Checkpoint, Recipe};

/// Quantises a checkpoint.
#[derive(Parser)]
struct Args {
    /// Checkpoint: .safetensors or .pth.
    model: PathBuf,
    /// What to: f16, int8 or int4, then perhaps others for some matrices, such as int4,ffn.value=int8,head=int8,0.att.key=f16.
    weights: Recipe,
    /// The file to write.
    out: PathBuf,
}

fn run(args: &Args) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(&args.model)?;
    let style = ProgressStyle::with_template("quantising {bar:40} {bytes}/{total_bytes}, {eta} left")?;
    let bar = ProgressBar::new(checkpoint.bytes()).with_style(style);
    checkpoint.write_quantised(&args.out, &args.weights, &|progress| bar.set_position(progress.done))?;
    bar.finish_and_clear();
    let bytes = std::fs::metadata(&args.out)?.len();
    writeln!(stdout(), "{}: {bytes} bytes, of {}", args.out.display(), checkpoint.bytes())?;
    Ok(())
}

fn main() -> ExitCode {
    common::end(run(&Args::parse()))
}

mod common;
