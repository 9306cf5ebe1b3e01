//! A model, ready to run any number of sessions.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

use rwkv_core::ModelConfig;
use rwkv_core::fast::linear::Packed;
use rwkv_core::model::{Logits, Model, Options, Segment, Wkv};
use rwkv_state::StateLayout;
use rwkv_state::layout::WrongLength;

use crate::checkpoint::{self, Checkpoint, LoraLayout, Progress};
use crate::session::Session;
use crate::tokenizer::Tokenizer;
use crate::{sample, tokenizer};

/// What an engine or a session can report.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    /// The vocabulary, a token or a stop sequence is refused.
    #[error(transparent)]
    Tokenizer(#[from] tokenizer::Error),
    /// No token can be chosen.
    #[error(transparent)]
    Sample(#[from] sample::Error),
    /// A state of another model's extents.
    #[error(transparent)]
    State(#[from] WrongLength),
    /// A token that the model does not have.
    #[error("token {token}, at index {index}, is outside the vocabulary of {vocab}")]
    Token {
        /// The token.
        token: u32,
        /// Where it stands among the tokens given.
        index: usize,
        /// The length of the vocabulary.
        vocab: usize,
    },
    /// No tokens where at least one is needed.
    #[error("no tokens were given")]
    NoTokens,
    /// Logits were asked for before the session read a token.
    #[error("there are no logits: the session has not read a token yet")]
    NoLogits,
    /// A session of another engine.
    #[error("session {index} belongs to another engine")]
    ForeignSession {
        /// Its place in the call.
        index: usize,
    },
    /// A snapshot of another engine's session.
    #[error("the snapshot belongs to another engine")]
    ForeignSnapshot,
    /// Text was asked for, and the model's tokens mean nothing without a vocabulary.
    #[error("the model has a vocabulary of {vocab} tokens: name the vocabulary file")]
    NoTokenizer {
        /// The length of the vocabulary.
        vocab: usize,
    },
    /// A tokenizer with more tokens than the model.
    #[error("the tokenizer has {tokenizer} tokens, the model only {model}")]
    TokenizerTooLarge {
        /// The tokenizer's tokens.
        tokenizer: usize,
        /// The model's.
        model: usize,
    },
    /// The threads could not be started.
    #[error("starting {threads} threads: {reason}")]
    Threads {
        /// How many were wanted.
        threads: usize,
        /// What the system said.
        reason: String,
    },
}

/// How an engine is set up.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// The vocabulary. By default bytes are tokens where the model has 256, and there is none otherwise.
    pub tokenizer: Option<Tokenizer>,
    /// Which way round the adapters are, where the file does not tell.
    pub lora: Option<LoraLayout>,
    /// Tokens in a pass: longer prompts take several. More need more memory; the results are the same.
    pub pass_tokens: usize,
    /// Whether the channel mix skips the weights of hidden units that are zero. The results are the same.
    pub skip_zeros: bool,
    /// Threads, for loading and running; by default as many as the machine has.
    pub threads: Option<NonZeroUsize>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { tokenizer: None, lora: None, pass_tokens: 512, skip_zeros: true, threads: None }
    }
}

/// More threads than this are a mistake, and enough to exhaust a machine.
const MAX_THREADS: usize = 1024;

fn pool(threads: usize) -> Result<rayon::ThreadPool, Error> {
    let refuse = |reason: String| Error::Threads { threads, reason };
    if threads > MAX_THREADS {
        return Err(refuse(format!("at most {MAX_THREADS}")));
    }
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().map_err(|error| refuse(error.to_string()))
}

/// A model, ready to run. Clones share it.
#[derive(Clone, Debug)]
pub struct Engine(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    model: Model<f32, Packed>,
    tokenizer: Option<Tokenizer>,
    /// Tokens that the model has and the tokenizer has not.
    mute: Vec<u32>,
    pass_tokens: usize,
    forward: Options,
    threads: Option<rayon::ThreadPool>,
}

impl Engine {
    /// Opens the checkpoint at `path`.
    ///
    /// # Errors
    ///
    /// If the checkpoint cannot be read.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        Self::open_with(path, EngineOptions::default(), &|_| {})
    }

    /// As [`Self::open`], with options; `progress` is told how loading goes, from several threads.
    ///
    /// # Errors
    ///
    /// If the checkpoint cannot be read or does not go with the options.
    pub fn open_with(
        path: impl AsRef<Path>,
        options: EngineOptions,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<Self, Error> {
        let checkpoint = Checkpoint::open_with(path, checkpoint::Options { lora: options.lora })?;
        Self::new(&checkpoint, options, progress)
    }

    /// Loads an opened checkpoint.
    ///
    /// # Errors
    ///
    /// As [`Self::open_with`].
    pub fn new(
        checkpoint: &Checkpoint,
        options: EngineOptions,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<Self, Error> {
        let model = checkpoint.config().vocab;
        let bytes = || (model == 256).then_some(Tokenizer::Bytes);
        let tokenizer = options.tokenizer.or_else(bytes);
        if let Some(tokenizer) = tokenizer.as_ref().map(Tokenizer::vocab_len).filter(|&len| len > model) {
            return Err(Error::TokenizerTooLarge { tokenizer, model });
        }
        let threads = options.threads.map(|threads| pool(threads.get())).transpose()?;
        let load = || checkpoint.load(progress);
        let model: Model<f32, Packed> = match &threads {
            Some(pool) => pool.install(load),
            None => load(),
        }?;
        let vocab = u32::try_from(model.config.vocab).unwrap_or(u32::MAX);
        let without_bytes = |tokenizer: &Tokenizer| {
            (0..vocab).filter(|&token| tokenizer.token_bytes(token).is_err()).collect()
        };
        Ok(Self(Arc::new(Inner {
            mute: tokenizer.as_ref().map(without_bytes).unwrap_or_default(),
            model,
            tokenizer,
            pass_tokens: options.pass_tokens.max(1),
            forward: Options { wkv: Wkv::Sequential, skip_zeros: options.skip_zeros },
            threads,
        })))
    }

    /// The model's extents.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.0.model.config
    }

    /// The layout of its sessions' states.
    #[must_use]
    pub fn state_layout(&self) -> StateLayout {
        StateLayout::new(self.config())
    }

    /// The vocabulary.
    ///
    /// # Errors
    ///
    /// If there is none: the model's tokens are not bytes, and the options named no other.
    pub fn tokenizer(&self) -> Result<&Tokenizer, Error> {
        self.0.tokenizer.as_ref().ok_or(Error::NoTokenizer { vocab: self.config().vocab })
    }

    /// A new sequence, which has read nothing.
    #[must_use]
    pub fn session(&self) -> Session {
        Session::new(self.clone())
    }

    /// Feeds tokens to several sessions side by side, any number to each: next tokens and prompts in any mix. The
    /// weights are read once for all of them. Each session's results are those it would have alone.
    ///
    /// # Errors
    ///
    /// If a session is of another engine, has no tokens, or has one outside the vocabulary. Then no session changed.
    pub fn step(&self, batch: &mut [(&mut Session, &[u32])]) -> Result<(), Error> {
        for (index, (session, tokens)) in batch.iter().enumerate() {
            if !session.engine.is(self) {
                return Err(Error::ForeignSession { index });
            }
            self.check(tokens)?;
        }
        let mut rest: Vec<_> =
            batch.iter_mut().map(|(session, tokens)| (&mut session.sequence, *tokens)).collect();
        while !rest.is_empty() {
            let mut room = self.0.pass_tokens;
            let mut segments = Vec::new();
            let mut finished = Vec::new();
            for (sequence, tokens) in &mut rest {
                let (now, later) = tokens.split_at(tokens.len().min(room));
                *tokens = later;
                room -= now.len();
                if !now.is_empty() {
                    let logits = if later.is_empty() { Logits::Last } else { Logits::None };
                    sequence.position += now.len() as u64;
                    segments.push(Segment { tokens: now, state: &mut sequence.state, logits });
                    if later.is_empty() {
                        finished.push(&mut sequence.logits);
                    }
                }
            }
            let logits = self.forward(&mut segments);
            for (kept, row) in finished.into_iter().zip(logits.chunks_exact(self.config().vocab)) {
                row.clone_into(kept);
            }
            rest.retain(|(_, tokens)| !tokens.is_empty());
        }
        Ok(())
    }

    /// Whether two are the same.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Tokens that the model has and the tokenizer has not: released models are padded to a round vocabulary.
    pub(crate) fn mute(&self) -> &[u32] {
        &self.0.mute
    }

    pub(crate) fn pass_tokens(&self) -> usize {
        self.0.pass_tokens
    }

    /// Checks that there are tokens, and that the model has them.
    pub(crate) fn check(&self, tokens: &[u32]) -> Result<(), Error> {
        let vocab = self.config().vocab;
        if tokens.is_empty() {
            return Err(Error::NoTokens);
        }
        match tokens.iter().position(|&token| token as usize >= vocab) {
            Some(index) => Err(Error::Token { token: tokens[index], index, vocab }),
            None => Ok(()),
        }
    }

    pub(crate) fn forward(&self, segments: &mut [Segment<'_, f32>]) -> Vec<f32> {
        let mut run = || self.0.model.forward(segments, self.0.forward);
        match &self.0.threads {
            Some(pool) => pool.install(run),
            // on a worker, so that the pass does not change threads at each of its parallel loops
            None => rayon::scope(|_| run()),
        }
    }
}
