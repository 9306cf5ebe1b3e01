//! web-rwkv 0.10.20, measured as rwkv-bench measures the engine: the peer to compare with, in a process of its own.
//!
//! Each measurement is one line on the standard output, JSON with `--json`. Nothing is timed before its logits are
//! finite and agree with those that web-rwkv gives in chunks of 32 tokens.

mod convert;
mod layout;
mod measure;
mod peer;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, ensure};
use clap::{Parser, Subcommand};
use memmap2::Mmap;
use serde::Serialize;

use measure::Figure;
use peer::{CHUNK_MAX, CHUNK_STEP, Peer, Precision, Quant};

const ENGINE: &str = "web-rwkv 0.10.20";

/// Measures web-rwkv.
#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct Args {
    /// A model in web-rwkv's layout, which `convert` writes.
    #[arg(required = true)]
    model: Option<PathBuf>,
    /// Times greedy decoding, so many tokens of each sequence a window.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    decode: Option<u32>,
    /// Sequences that are decoded together, a case each: at most 256, above 32 best in multiples of 32.
    #[arg(long, value_name = "B", num_args = 1.., default_values_t = [1], requires = "decode")]
    batch: Vec<usize>,
    /// Times prompts of so many tokens, a case each.
    #[arg(long, value_name = "T", num_args = 1.., value_parser = clap::value_parser!(u32).range(1..))]
    prefill: Vec<u32>,
    /// Chunks to try for prompts, of which the fastest is reported: multiples of 32 below 256.
    #[arg(long, value_name = "TOKENS", num_args = 1.., default_values_t = [64, 128, 192, 224])]
    chunk: Vec<usize>,
    /// Windows of a case, the median of which is reported.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    windows: u32,
    /// Prints the logits after these tokens from an empty state.
    #[arg(long, value_name = "TOKENS", num_args = 1..)]
    logits: Vec<u32>,
    /// Prints them after each of the tokens, a row each, not after the last alone.
    #[arg(long, requires = "logits")]
    every: bool,
    /// What activations are held in: F16 is fastest and overflows on some models.
    #[arg(long, value_enum, default_value_t = Precision::F16)]
    precision: Precision,
    /// What the matrices of the layers are quantised to as they are loaded.
    #[arg(long, value_enum, default_value_t = Quant::None)]
    quant: Quant,
    /// A part of the adapter's name; otherwise the fastest.
    #[arg(long, env = "RWKV_ADAPTER", default_value = "", hide_default_value = true)]
    adapter: String,
    /// Prints a JSON object a line.
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Converts a safetensors model of official names, in F16, BF16 or F32, to web-rwkv's layout.
    Convert { from: PathBuf, to: PathBuf },
}

/// A line of the output.
#[derive(Serialize)]
struct Line<'a> {
    engine: &'static str,
    adapter: &'a str,
    quant: &'static str,
    #[serde(flatten)]
    what: What,
}

#[derive(Serialize)]
#[serde(untagged)]
enum What {
    Load {
        case: &'static str,
        seconds: f64,
    },
    Figure {
        precision: &'static str,
        #[serde(flatten)]
        figure: Figure,
    },
    /// `[T, V]`; a logit that is not finite is null.
    Logits {
        case: &'static str,
        precision: &'static str,
        tokens: Vec<u32>,
        logits: Vec<Vec<f32>>,
    },
}

#[expect(clippy::print_stdout, reason = "the report")]
async fn run(args: Args) -> anyhow::Result<()> {
    if let Some(Command::Convert { from, to }) = &args.command {
        return convert::convert(from, to).with_context(|| format!("converting {}", from.display()));
    }
    let fits = |chunk: usize| chunk > 0 && chunk.is_multiple_of(CHUNK_STEP) && chunk <= CHUNK_MAX;
    for &chunk in &args.chunk {
        ensure!(fits(chunk), "--chunk {chunk}: not a multiple of {CHUNK_STEP} up to {CHUNK_MAX}");
    }
    let path = args.model.as_deref().unwrap_or(Path::new(""));
    let peer =
        Peer::open(path, &args.adapter, args.quant).await.with_context(|| path.display().to_string())?;
    let print = |what: What| -> anyhow::Result<()> {
        let line = Line { engine: ENGINE, adapter: &peer.adapter, quant: args.quant.name(), what };
        println!("{}", if args.json { serde_json::to_string(&line)? } else { line.what.text() });
        Ok(())
    };
    if !args.json {
        let (dims, quant) = (&peer.dims, args.quant.name());
        println!(
            "{ENGINE} on {}, {} layers of {}, quantised: {quant}",
            peer.adapter, dims.layers, dims.width
        );
    }
    print(What::Load { case: "load", seconds: peer.load_seconds })?;

    let precision = args.precision;
    let name = match precision {
        Precision::F16 => "f16",
        Precision::F32 => "f32",
    };
    let windows = args.windows as usize;
    if !args.logits.is_empty() {
        let slots = peer.slots(1, precision).await?;
        let flat = slots.feed(&[&args.logits], 2 * CHUNK_STEP, args.every).await?.remove(0);
        let logits = flat.chunks(peer.dims.vocab).map(<[f32]>::to_vec).collect();
        print(What::Logits { case: "logits", precision: name, tokens: args.logits, logits })?;
    }
    if let Some(steps) = args.decode {
        for &batch in &args.batch {
            let figure = measure::decode(&peer, precision, batch, steps as usize, windows).await?;
            print(What::Figure { precision: name, figure })?;
        }
    }
    for &tokens in &args.prefill {
        let figure = measure::prefill(&peer, precision, tokens as usize, &args.chunk, windows).await?;
        print(What::Figure { precision: name, figure })?;
    }
    Ok(())
}

impl What {
    fn text(&self) -> String {
        match self {
            Self::Load { seconds, .. } => format!("load          {seconds:8.2} s"),
            Self::Figure { figure: f, .. } => format!(
                "{:<7} {:>5} x {:<3} {:10.1} tokens/s  {:9.3} ms, spread {:.0} % of {} windows, chunk {}, nmse {:.0e}",
                f.case,
                f.tokens,
                f.batch,
                f.tokens_per_second,
                f.median_ms,
                100.0 * f.spread,
                f.windows,
                f.chunk,
                f.nmse
            ),
            Self::Logits { logits, .. } => {
                let row = |row: &Vec<f32>| row.iter().map(f32::to_string).collect::<Vec<_>>().join(" ");
                logits.iter().map(row).collect::<Vec<_>>().join("\n")
            }
        }
    }
}

/// A file, mapped.
#[expect(unsafe_code, reason = "web-rwkv reads from memory, and a model may be larger than it")]
fn map(path: &Path) -> anyhow::Result<Mmap> {
    let file = File::open(path)?;
    // SAFETY: the mapping is only read, and the model is not written to while it is measured or converted.
    Ok(unsafe { Mmap::map(&file) }?)
}

/// Ends the process from wherever it is.
#[expect(clippy::print_stderr, reason = "one sentence, not a backtrace")]
fn fail(error: &anyhow::Error) -> ! {
    eprintln!("error: {error:#}");
    std::process::exit(1)
}

fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().build().context("threads");
    match runtime.and_then(|runtime| runtime.block_on(run(args))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}
