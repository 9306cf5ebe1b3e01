//! What the examples share: opening a model, and how they end.

use std::io::{self, Write, stderr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use indicatif::{ProgressBar, ProgressStyle};
use rwkv_model::engine::Device;
use rwkv_model::tokenizer::World;
use rwkv_model::{Engine, EngineOptions, Recipe, Tokenizer};

/// The model that comes with the sources.
const BUNDLED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/books-10m/model.safetensors");

/// Which model.
#[derive(clap::Args)]
pub(crate) struct ModelArgs {
    /// Checkpoint: .safetensors or .pth.
    #[arg(long, default_value = BUNDLED)]
    model: PathBuf,
    /// Vocabulary file, for models whose tokens are not bytes.
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// What it runs on: auto, cpu, gpu, or gpu:NAME for part of a GPU's name or its number.
    #[arg(long, default_value = "auto")]
    device: Device,
    /// What the matrices are quantised to as they are read: f16, int8 or int4, then perhaps others for some of them, such
    /// as int4,ffn.value=int8,head=int8.
    #[arg(long, default_value_t)]
    weights: Recipe,
}

impl ModelArgs {
    /// Opens it, with a bar where there is a terminal.
    #[allow(clippy::allow_attributes, dead_code, reason = "not every example sets options of its own")]
    pub(crate) fn open(&self) -> Result<Engine, rwkv_model::Error> {
        self.open_with(EngineOptions::default())
    }

    /// As [`Self::open`], with other options than those of the command line.
    pub(crate) fn open_with(&self, options: EngineOptions) -> Result<Engine, rwkv_model::Error> {
        let world = |path: &PathBuf| World::open(path).map(Tokenizer::World);
        let tokenizer = self.tokenizer.as_ref().map(world).transpose()?;
        let options = EngineOptions {
            tokenizer,
            device: self.device.clone(),
            weights: self.weights.clone(),
            ..options
        };
        let bar = bar("loading {bar:40} {bytes}/{total_bytes}");
        let engine = Engine::open_with(Path::new(&self.model), options, &|progress| {
            bar.set_length(progress.total);
            bar.set_position(progress.done);
        })?;
        bar.finish_and_clear();
        Ok(engine)
    }
}

/// A progress bar; hidden where there is no terminal.
pub(crate) fn bar(template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::no_length().with_style(style)
}

/// Says what went wrong in one sentence. A reader that has seen enough, such as `head`, is nothing wrong.
pub(crate) fn end(result: anyhow::Result<()>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    let closed = |cause: &io::Error| cause.kind() == io::ErrorKind::BrokenPipe;
    if error.downcast_ref().is_some_and(closed) {
        return ExitCode::SUCCESS;
    }
    // where even this cannot be written, the exit code says it
    let _ = writeln!(stderr(), "error: {error:#}");
    ExitCode::FAILURE
}
