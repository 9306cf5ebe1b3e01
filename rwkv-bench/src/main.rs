//! What the engine reaches on this machine, beside what the machine gives.
//!
//! Every case is checked before it is timed: the engine's logits against the reference in f64, every other way to run it
//! against those, bit for bit. Every figure stands beside the limit it is measured against, taken in the same run.

mod gpu;
mod machine;
mod quality;
mod random_model;
mod speed;
mod state_speed;
mod states;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::ensure;
use clap::{Parser, Subcommand};

/// Measures the engine.
#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Args {
    #[command(subcommand)]
    part: Option<Part>,
    #[command(flatten)]
    cpu: CpuArgs,
}

/// A part of what can be measured; the CPU by default.
#[derive(Subcommand)]
enum Part {
    /// The GPU, at the shapes of released models.
    Gpu(gpu::GpuArgs),
    /// Where the time of a model's passes goes on the GPU.
    Profile(gpu::ProfileArgs),
    /// What ways to hold states bring, with many sequences side by side on the GPU.
    StateSpeed(state_speed::StateSpeedArgs),
    /// What every way to hold a state costs in quality, on the bundled model.
    States(states::StatesArgs),
}

#[derive(clap::Args)]
struct CpuArgs {
    /// Where the random model is written, and deleted again: 0.9 GB.
    #[arg(long, default_value = "target/bench")]
    scratch: PathBuf,
    /// Times each case so often.
    #[arg(long, default_value_t = 15)]
    repeats: usize,
    /// The bundled model and its held-out text.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../rwkv-model/assets/books-10m"))]
    assets: PathBuf,
    /// Leave out the quality figures over the whole text, which take minutes.
    #[arg(long)]
    quick: bool,
}

#[expect(clippy::print_stdout, reason = "the report")]
fn run(args: &Args) -> anyhow::Result<()> {
    println!("{}\n", machine::describe());
    match &args.part {
        Some(Part::Gpu(args)) => return gpu::report(args),
        Some(Part::Profile(args)) => return gpu::profile(args),
        Some(Part::StateSpeed(args)) => return state_speed::report(args),
        Some(Part::States(args)) => return states::report(args),
        None => {}
    }
    let args = &args.cpu;
    let fast = speed::report(&args.scratch, args.repeats.max(1))?;
    println!();
    let exact = quality::report(&args.assets, args.quick)?;
    ensure!(fast && exact, "not everything was reached: see above");
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
