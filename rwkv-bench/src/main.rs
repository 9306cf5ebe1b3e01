//! What the engine reaches on this machine, beside what the machine gives: by default, what each optimisation brings and
//! costs. It runs alone: kernels, the bundled model and its text are in the program. (Of the parts, `cpu`, `states` and
//! `weights`, and `growth` and `profile` without a shape, read the bundled model from files.)
//!
//! Every case is checked before it is timed: on the CPU the engine's logits against the reference in f64, and every other
//! way to run it against those, bit for bit; on the GPU its logits against the CPU executor's, within what rounding does.
//! Every figure stands beside the limit it is measured against, taken in the same run.

mod assets;
mod chunks;
mod gpu;
mod growth;
mod harness;
mod machine;
mod optimisations;
mod picture;
mod progress;
mod quality;
mod random_model;
mod retention;
mod speed;
mod state_speed;
mod states;
mod table;
mod tiles;
mod variant;
mod weights;

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
    optimisations: optimisations::OptimisationArgs,
}

/// A part of what can be measured; by default what each optimisation brings and costs.
#[derive(Subcommand)]
enum Part {
    /// The CPU, at the shape of a released model, and the quality figures recorded for the bundled one.
    Cpu(CpuArgs),
    /// How well a model predicts, in any way to run it.
    Quality(Box<harness::QualityArgs>),
    /// The GPU, at the shapes of released models.
    Gpu(gpu::GpuArgs),
    /// Where chunks in the state update are faster than one token after another.
    Chunks(chunks::ChunksArgs),
    /// How time grows with sequences side by side, and with the length of a prompt.
    Growth(growth::GrowthArgs),
    /// Where the time of a model's passes goes on the GPU.
    Profile(gpu::ProfileArgs),
    /// What ways to hold states bring, with many sequences side by side on the GPU.
    StateSpeed(state_speed::StateSpeedArgs),
    /// What every way to hold a state costs in quality, on the bundled model.
    States(states::StatesArgs),
    /// Every tile of `matmul` at the products of a layer, each by itself.
    Tiles(tiles::TilesArgs),
    /// What quantised weights cost in quality and take in memory, on the bundled model.
    Weights(weights::WeightsArgs),
}

#[derive(clap::Args)]
struct CpuArgs {
    /// Where the random model is written, and deleted again: 0.9 GB.
    #[arg(long, default_value = "target/bench")]
    scratch: PathBuf,
    /// Times each case so often.
    #[arg(long, default_value_t = 15)]
    repeats: usize,
    /// What the random model's matrices are quantised to: f16, int8 or int4, then perhaps others for some of them.
    #[arg(long, default_value_t)]
    weights: rwkv_model::Recipe,
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
        None => optimisations::run(&args.optimisations),
        Some(Part::Quality(args)) => harness::report(args),
        Some(Part::Gpu(args)) => gpu::report(args),
        Some(Part::Chunks(args)) => chunks::report(args),
        Some(Part::Growth(args)) => growth::report(args),
        Some(Part::Profile(args)) => gpu::profile(args),
        Some(Part::StateSpeed(args)) => state_speed::report(args),
        Some(Part::States(args)) => states::report(args),
        Some(Part::Tiles(args)) => tiles::report(args),
        Some(Part::Weights(args)) => weights::report(args),
        Some(Part::Cpu(args)) => cpu(args),
    }
}

#[expect(clippy::print_stdout, reason = "the report")]
fn cpu(args: &CpuArgs) -> anyhow::Result<()> {
    let fast = speed::report(&args.scratch, args.repeats.max(1), &args.weights)?;
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
