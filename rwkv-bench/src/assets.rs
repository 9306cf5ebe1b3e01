//! The model and the text that the program has in it, so that it runs alone, and those that it is given instead.

use std::path::{Path, PathBuf};

use anyhow::Context;
use rwkv_model::checkpoint::source::MemorySource;
use rwkv_model::checkpoint::{self, Checkpoint};
use rwkv_model::tokenizer::World;
use rwkv_model::{EngineOptions, Tokenizer};

/// `books-10m`.
pub(crate) static MODEL: &[u8] =
    include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../rwkv-model/assets/books-10m/model.safetensors"));

/// Its held-out text.
static TEXT: &[u8] =
    include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../rwkv-model/assets/books-10m/valid.txt"));

/// What is measured on.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct ModelArgs {
    /// A checkpoint; by default books-10m, which is in the program.
    #[arg(long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// Its vocabulary, where its tokens are not bytes.
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// A text; by default the one that books-10m did not see.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
}

impl ModelArgs {
    /// The checkpoint.
    pub(crate) fn checkpoint(&self) -> anyhow::Result<Checkpoint> {
        Ok(match &self.model {
            Some(path) => Checkpoint::open(path)?,
            None => Checkpoint::from_source(
                "books-10m",
                Box::new(MemorySource(MODEL)),
                checkpoint::Options::default(),
            )?,
        })
    }

    /// The same on another checkpoint.
    pub(crate) fn on(&self, path: PathBuf) -> Self {
        Self { model: Some(path), ..self.clone() }
    }

    /// The file, if it is one.
    pub(crate) fn path(&self) -> Option<&Path> {
        self.model.as_deref()
    }

    /// The model's name.
    pub(crate) fn name(&self) -> String {
        let name = self.model.as_deref().and_then(Path::file_name);
        name.map_or_else(|| "books-10m".to_owned(), |name| name.to_string_lossy().into_owned())
    }

    /// Options with the vocabulary.
    pub(crate) fn options(&self) -> anyhow::Result<EngineOptions> {
        let world = |path: &PathBuf| World::open(path).map(Tokenizer::World);
        let tokenizer = self.tokenizer.as_ref().map(world).transpose()?;
        Ok(EngineOptions { tokenizer, ..EngineOptions::default() })
    }

    /// The text.
    pub(crate) fn text(&self) -> anyhow::Result<Vec<u8>> {
        let Some(path) = &self.text else { return Ok(TEXT.to_vec()) };
        std::fs::read(path).with_context(|| path.display().to_string())
    }
}
