//! A model, ready to run any number of sessions.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;
use rwkv_core::ModelConfig;
use rwkv_core::fast::linear::Packed;
use rwkv_core::model::{Logits, Model, Options, Segment, Skip, Wkv};
use rwkv_core::ops::softmax::log_probability;
use rwkv_state::layout::WrongLength;
use rwkv_state::snapshot::{self, Digest};
use rwkv_state::{Resident, ResidentState, StateLayout, StateStore, format, lazy, resident, store};

use crate::checkpoint::{self, Checkpoint, LoraLayout, Progress};
use crate::gpu;
use crate::recipe::Recipe;
use crate::session::{LOGITS_AT_ONCE, Memory, Sequence, Session, Shown};
use crate::skip::{Mask, Skipping};
use crate::tokenizer::Tokenizer;
use crate::{sample, tokenizer};

/// What an engine or a session can report.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    /// The GPU cannot do it, or did not.
    #[error(transparent)]
    Gpu(#[from] gpu::Error),
    /// The vocabulary, a token or a stop sequence is refused.
    #[error(transparent)]
    Tokenizer(#[from] tokenizer::Error),
    /// No token can be chosen.
    #[error(transparent)]
    Sample(#[from] sample::Error),
    /// A state of another model's extents.
    #[error(transparent)]
    State(#[from] WrongLength),
    /// States that cannot be held as asked for.
    #[error(transparent)]
    Resident(#[from] resident::Error),
    /// A lazy state does not go with the model.
    #[error(transparent)]
    Lazy(lazy::Error),
    /// A rollback of more tokens than are pending.
    #[error("cannot roll back {asked} tokens: {pending} are pending")]
    Rollback {
        /// Tokens to undo.
        asked: usize,
        /// Tokens that can be undone: see [`Session::pending`].
        pending: usize,
    },
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
    /// Logits were asked for before the session read a token, or after what it read last was undone, whose logits are gone.
    #[error("there are no logits of the last token: read one")]
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
    /// A state that is elsewhere than the engine.
    #[error("the state is not where the engine runs")]
    ForeignState,
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
    /// A state that cannot be stored.
    #[error(transparent)]
    Encoding(#[from] format::Error),
    /// A session cannot be saved or loaded.
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
    /// A store does not take a session, or does not have it.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// A saved session of another model.
    #[error("{file}: a session of model {found}, not of {expected}")]
    OtherModel {
        /// The file, or the key in a store.
        file: String,
        /// Fingerprint of the session's model.
        found: String,
        /// Fingerprint of the engine's: see [`Engine::fingerprint`].
        expected: String,
    },
    /// A saved session whose tokens mean something else.
    #[error("{file}: a session with tokenizer {found}, not with {expected}")]
    OtherTokenizer {
        /// The file, or the key in a store.
        file: String,
        /// Fingerprint of the session's tokenizer.
        found: String,
        /// Fingerprint of the engine's: see [`Engine::tokenizer_fingerprint`].
        expected: String,
    },
    /// A saved session that says it is of the model, with a state of another layout.
    #[error("{file}: a state of {found}, expected {expected}")]
    OtherLayout {
        /// The file, or the key in a store.
        file: String,
        /// The layout of its state.
        found: StateLayout,
        /// The layout of the model's.
        expected: StateLayout,
    },
    /// A saved session that says it is of the model, with tokens of another vocabulary.
    #[error("{file}: {what} {found}, and the vocabulary has {vocab}")]
    OtherVocabulary {
        /// The file, or the key in a store.
        file: String,
        /// What there is of another vocabulary.
        what: &'static str,
        /// How many logits, or which token.
        found: usize,
        /// The length of the model's vocabulary.
        vocab: usize,
    },
    /// A form of the state update that there is not.
    #[error("chunks of no tokens")]
    EmptyChunks,
    /// Chunks, of which nothing is pending, and states that would have to be deferred or rounded at every token.
    #[error(
        "the state update is by chunks, and states are {0:?}, not single precision written at every token"
    )]
    ChunkedState(Resident),
    /// The threads could not be started.
    #[error("starting {threads} threads: {reason}")]
    Threads {
        /// How many were wanted.
        threads: usize,
        /// What the system said.
        reason: String,
    },
}

impl From<lazy::Error> for Error {
    /// Of what a session asks of its state, a rollback alone can go too far; extents are the engine's own.
    fn from(error: lazy::Error) -> Self {
        match error {
            lazy::Error::Rollback { asked, pending } => Self::Rollback { asked, pending },
            lazy::Error::Resident(error) => Self::Resident(error),
            other => Self::Lazy(other),
        }
    }
}

/// What an engine runs on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// A GPU if there is a real one that can run the model, or the environment has `RWKV_ADAPTER`; the CPU otherwise.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU: by part of its name or by its number, or the fastest there is.
    Gpu(Option<String>),
}

/// As programs take it from a command line: `auto`, `cpu`, `gpu`, or `gpu:` and part of its name or its number.
impl std::str::FromStr for Device {
    type Err = UnknownDevice;

    fn from_str(text: &str) -> Result<Self, UnknownDevice> {
        match text.split_once(':') {
            None if text == "auto" => Ok(Self::Auto),
            None if text == "cpu" => Ok(Self::Cpu),
            None if text == "gpu" => Ok(Self::Gpu(None)),
            Some(("gpu", adapter)) if !adapter.is_empty() => Ok(Self::Gpu(Some(adapter.to_owned()))),
            _ => Err(UnknownDevice(text.to_owned())),
        }
    }
}

/// A text that names no device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no device: auto, cpu, gpu or gpu:NAME")]
pub struct UnknownDevice(pub String);

/// Tokens in a pass on the CPU, at most.
const CPU_PASS_TOKENS: usize = 512;

/// How an engine is set up.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// The vocabulary. By default bytes are tokens where the model has 256, and there is none otherwise.
    pub tokenizer: Option<Tokenizer>,
    /// Which way round the adapters are, where the file does not tell.
    pub lora: Option<LoraLayout>,
    /// Tokens in a pass, as far as the device has that many in one, and the CPU no more than 512, which keep it busy: longer
    /// prompts take several. More need more memory; the results are the same, on a GPU but for rounding (see [`Self::batch_invariant`]).
    pub pass_tokens: usize,
    /// What it runs on.
    pub device: Device,
    /// What its sessions' states are held in, and how many tokens they can undo.
    pub state: Resident,
    /// GPU: sequences side by side for which memory is made at the start. More is made when more come, and all that is
    /// there is copied then.
    pub sessions: usize,
    /// Whether the channel mix skips the weights of hidden units that are zero: on a GPU of a token of one sequence, on the
    /// CPU of a few too. The results are the same, on a GPU but for rounding.
    pub skip_zeros: bool,
    /// CPU: whether the factors of adapters are widened to single precision as they are read, for measurements: by default
    /// they are held as the file has them. The results are the same.
    pub wide_adapters: bool,
    /// The form of the state update over prompts; by default the fastest, as far as it was measured: on a GPU with subgroups of
    /// 16 one token after another, but with one sum for four of them, otherwise one token after another.
    /// Chunks are more arithmetic, a fifth by 16 tokens and four fifths by 64, in a shorter chain. They were fastest on no
    /// device, and are there to be measured: on the CPU of any length, in plain loops; on a GPU of 16, 32 or 64 tokens, with
    /// fusion, states held as they are by default, and without [`Self::batch_invariant`]. Sums of both are of another order: a
    /// sequence's results depend on how its tokens are split over calls, but for rounding.
    pub wkv: Option<Wkv>,
    /// Layers that are left out, if any.
    pub skip: Option<Skipping>,
    /// CPU: threads, for loading and running; by default as many as the machine has.
    pub threads: Option<NonZeroUsize>,
    /// What the weights of matrices are quantised to as they are read. Those that the file has quantised stay as they are.
    /// GPU: refused if one decodes to more than a half holds.
    pub weights: Recipe,
    /// GPU: whether a sequence's results are the same bits whatever runs beside it and however its tokens are split over
    /// passes, at the cost of speed for single sequences, and for prompts where [`Self::state`] is not the default.
    /// Otherwise they agree but for rounding, and states in halves or bytes are rounded once in a pass over a prompt, not each
    /// time that they would be token by token. On the CPU they are always the same bits, but for chunks ([`Self::wkv`]).
    pub batch_invariant: bool,
    /// GPU: whether operations are fused. Without, each is a dispatch of its own, for measurements.
    pub fused: bool,
    /// GPU: whether the group norm of what the heads answer, its bonus and its gate are in the dispatch of the state update over a
    /// few tokens of a sequence. Without, they are a dispatch of their own, as they are over prompts and without [`Self::fused`] in
    /// any case; for measurements. The results are the same but for rounding.
    pub fused_norm: bool,
    /// GPU: whether kernels keep to what every device has, whatever this one has beyond it.
    pub portable: bool,
    /// GPU: whether dispatches are timed, for [`Engine::profile`].
    pub timestamps: bool,
    /// GPU: a file in which compiled kernels are kept for the next time, where the device's driver can. It is trusted as
    /// the program is.
    pub pipeline_cache: Option<PathBuf>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            tokenizer: None,
            lora: None,
            pass_tokens: 2048,
            device: Device::Auto,
            state: Resident::default(),
            sessions: 1,
            skip_zeros: true,
            wide_adapters: false,
            wkv: None,
            skip: None,
            threads: None,
            weights: Recipe::default(),
            batch_invariant: false,
            fused: true,
            fused_norm: true,
            portable: false,
            timestamps: false,
            pipeline_cache: None,
        }
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

#[derive(Clone, Debug)]
struct Inner {
    executor: Arc<Executor>,
    tokenizer: Option<Tokenizer>,
    fingerprint: String,
    /// Tokens that the model has and the tokenizer has not.
    mute: Vec<u32>,
    pass_tokens: usize,
    skip: Option<Skipping>,
}

#[derive(Debug)]
enum Executor {
    Cpu(Box<Cpu>),
    Gpu(Box<gpu::Executor>),
}

/// A model on the CPU.
#[derive(Debug)]
struct Cpu {
    model: Model<f32, Packed>,
    forward: Options<'static>,
    /// The state before the first token.
    empty: ResidentState,
    threads: Option<rayon::ThreadPool>,
}

/// A sequence's share of a pass.
pub(crate) struct Job<'a> {
    pub(crate) sequence: &'a mut Sequence,
    pub(crate) tokens: &'a [u32],
    pub(crate) logits: Logits,
}

/// A sequence's way through the passes of a call.
struct Feed<'a> {
    sequence: &'a mut Sequence,
    /// What is left of its tokens.
    tokens: &'a [u32],
    /// Whether it was given one.
    decodes: bool,
}

impl<'a> Feed<'a> {
    const fn new(sequence: &'a mut Sequence, tokens: &'a [u32]) -> Self {
        Self { sequence, tokens, decodes: tokens.len() == 1 }
    }
}

impl Cpu {
    fn open(
        checkpoint: &Checkpoint,
        options: &EngineOptions,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<Self, Error> {
        let threads = options.threads.map(|threads| pool(threads.get())).transpose()?;
        let load = || checkpoint.load_with(&options.weights, progress);
        let mut model: Model<f32, Packed> = match &threads {
            Some(pool) => pool.install(load),
            None => load(),
        }?;
        if options.wide_adapters {
            model.adapter_factors().for_each(Packed::widen);
        }
        let empty = ResidentState::new(&StateLayout::new(&model.config), options.state)?;
        let wkv = options.wkv.unwrap_or_default();
        let forward = Options { wkv, skip_zeros: options.skip_zeros, skip: Skip::default() };
        Ok(Self { model, forward, empty, threads })
    }

    fn forward(&self, segments: &mut [Segment<'_, ResidentState>], skip: Skip<'_>) -> Vec<f32> {
        self.on_threads(|| self.model.forward(segments, Options { skip, ..self.forward }))
    }

    /// Runs something on a thread of the engine's, so that it does not change threads at each of its parallel loops.
    fn on_threads<T: Send>(&self, run: impl FnOnce() -> T + Send) -> T {
        match &self.threads {
            Some(pool) => pool.install(run),
            None => rayon::scope(|_| run()),
        }
    }
}

impl Executor {
    fn open(
        checkpoint: &Checkpoint,
        options: &EngineOptions,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<Self, Error> {
        let named = |adapter: Option<String>| gpu::Setup {
            adapter,
            weights: options.weights.clone(),
            state: options.state,
            wkv: options.wkv,
            sessions: options.sessions,
            pass_tokens: options.pass_tokens.max(1),
            skip_zeros: options.skip_zeros,
            batch_invariant: options.batch_invariant,
            fused: options.fused,
            fused_norm: options.fused_norm,
            portable: options.portable,
            timestamps: options.timestamps,
            pipeline_cache: options.pipeline_cache.clone(),
        };
        let open = |adapter| gpu::Executor::open(checkpoint, named(adapter), progress).map(Box::new);
        match &options.device {
            Device::Gpu(adapter) => Ok(Self::Gpu(open(adapter.clone())?)),
            Device::Auto if std::env::var_os(rwkv_kernels::gpu::ADAPTER).is_some() => {
                Ok(Self::Gpu(open(None)?))
            }
            Device::Auto if gpu::suits(checkpoint.config()) => Ok(Self::Gpu(open(None)?)),
            Device::Auto | Device::Cpu => Ok(Self::Cpu(Box::new(Cpu::open(checkpoint, options, progress)?))),
        }
    }

    const fn config(&self) -> &ModelConfig {
        match self {
            Self::Cpu(cpu) => &cpu.model.config,
            Self::Gpu(gpu) => gpu.config(),
        }
    }

    /// Runs sequences side by side: moves each on, with its logits if they are wanted, and gives all rows of logits
    /// `[rows, V]` of those that want all. If it fails, none has changed.
    fn run(&self, jobs: &mut [Job<'_>], skip: Skip<'_>) -> Result<Vec<f32>, Error> {
        let rows = match self {
            Self::Cpu(cpu) => {
                let segments = jobs.iter_mut().map(|job| {
                    let state = job.sequence.memory.state().ok_or(Error::ForeignState)?;
                    Ok(Segment { tokens: job.tokens, state, logits: job.logits })
                });
                let rows = cpu.forward(&mut segments.collect::<Result<Vec<_>, Error>>()?, skip);
                let mut rest = rows.as_slice();
                for job in &mut *jobs {
                    let mine = job.logits.rows(job.tokens.len()) * cpu.model.config.vocab;
                    let (own, others) = rest.split_at(mine);
                    let last = own.chunks_exact(cpu.model.config.vocab).last();
                    job.sequence.read(job.tokens, last.map_or_else(Shown::default, Shown::of));
                    rest = others;
                }
                rows
            }
            Self::Gpu(gpu) => {
                let records = jobs.iter_mut().map(|job| {
                    let record = job.sequence.memory.record().ok_or(Error::ForeignState)?;
                    Ok(gpu::Job { tokens: job.tokens, record, logits: job.logits })
                });
                let rows = gpu.pass(&mut records.collect::<Result<Vec<_>, Error>>()?, skip)?;
                for job in &mut *jobs {
                    job.sequence.read(job.tokens, Shown::on_device(job.logits != Logits::None));
                }
                rows
            }
        };
        Ok(rows)
    }
}

/// What an engine runs on, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The device, by name.
    pub device: String,
    /// GPU: the kernels, each in the variant that was chosen.
    pub kernels: Vec<String>,
    /// GPU: dispatches of a token of one sequence, in the layers.
    pub step_dispatches: usize,
    /// GPU: dispatches of a pass over several rows, in the layers.
    pub batch_dispatches: usize,
    /// Tokens of one sequence that are generated together, at most, and then come at the same time.
    pub together: usize,
    /// GPU: whether some matrices are in blocks. One token at a time, vectors are multiplied by those with two digits of eight bits, in units
    /// of which the largest in each 32 has 32,512; but not by the channel mix's value.
    pub blocks: bool,
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
    /// On a GPU the kernels for products of several rows are compiled when a pass first has so many, by classes that end at 16,
    /// 32, 64 and so on up to 2,048 rows. With cooperative matrices that pass takes longer by up to a second: once on a
    /// machine, if its driver or [`EngineOptions::pipeline_cache`] keeps what was compiled. Who minds has a session read a
    /// prompt of that length first.
    ///
    /// # Errors
    ///
    /// As [`Self::open_with`].
    pub fn new(
        checkpoint: &Checkpoint,
        options: EngineOptions,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<Self, Error> {
        options.state.check()?;
        match options.wkv {
            Some(Wkv::Chunked(0)) => return Err(Error::EmptyChunks),
            Some(Wkv::Chunked(_)) if !options.state.is_plain() => {
                return Err(Error::ChunkedState(options.state));
            }
            _ => {}
        }
        let model = checkpoint.config().vocab;
        let executor = Executor::open(checkpoint, &options, progress)?;
        let bytes = || (model == 256).then_some(Tokenizer::Bytes);
        let tokenizer = options.tokenizer.or_else(bytes);
        if let Some(tokenizer) = tokenizer.as_ref().map(Tokenizer::vocab_len).filter(|&len| len > model) {
            return Err(Error::TokenizerTooLarge { tokenizer, model });
        }
        let vocab = u32::try_from(model).unwrap_or(u32::MAX);
        let without_bytes = |tokenizer: &Tokenizer| {
            (0..vocab).filter(|&token| tokenizer.token_bytes(token).is_err()).collect()
        };
        let engine = Self(Arc::new(Inner {
            mute: tokenizer.as_ref().map(without_bytes).unwrap_or_default(),
            pass_tokens: match &executor {
                Executor::Cpu(_) => options.pass_tokens.clamp(1, CPU_PASS_TOKENS),
                Executor::Gpu(gpu) => gpu.rows(),
            },
            fingerprint: fingerprint(checkpoint)?,
            executor: Arc::new(executor),
            tokenizer,
            skip: None,
        }));
        if options.skip.is_some() { engine.skipping(options.skip) } else { Ok(engine) }
    }

    /// An engine on the same weights that leaves out other layers, or none. Sessions belong to the one or the other.
    ///
    /// # Errors
    ///
    /// On a GPU, if operations are not fused, or states are rounded with a dither of their decays, which decay does not
    /// stop where a layer is left out.
    pub fn skipping(&self, skip: Option<Skipping>) -> Result<Self, Error> {
        if let (Some(gpu), true) = (self.gpu(), skip.is_some()) {
            gpu.can_skip()?;
        }
        Ok(Self(Arc::new(Inner { skip, ..(*self.0).clone() })))
    }

    /// Which layers are left out, if any.
    #[must_use]
    pub fn skips(&self) -> Option<&Skipping> {
        self.0.skip.as_ref()
    }

    /// What it runs on.
    ///
    /// # Errors
    ///
    /// If the GPU failed.
    pub fn report(&self) -> Result<Report, Error> {
        match &*self.0.executor {
            Executor::Cpu(_) => Ok(Report {
                device: "CPU".to_owned(),
                kernels: Vec::new(),
                step_dispatches: 0,
                batch_dispatches: 0,
                together: 1,
                blocks: false,
            }),
            Executor::Gpu(gpu) => {
                let [step_dispatches, batch_dispatches] = gpu.dispatches()?;
                Ok(Report {
                    device: gpu.device().name(),
                    kernels: gpu.variants(),
                    step_dispatches,
                    batch_dispatches,
                    together: gpu.together(),
                    blocks: gpu.blocks(),
                })
            }
        }
    }

    /// Bytes of its matrices, as they are held: of the layers, their adapters and the head.
    #[must_use]
    pub fn weight_bytes(&self) -> u64 {
        match &*self.0.executor {
            Executor::Cpu(cpu) => cpu.model.matrices().map(|of| of.bytes() as u64).sum(),
            Executor::Gpu(gpu) => gpu.weight_bytes(),
        }
    }

    /// GPU: how long the dispatches took since the last call, if [`EngineOptions::timestamps`] are set and the device
    /// has them.
    ///
    /// # Errors
    ///
    /// If the GPU failed.
    pub fn profile(&self) -> Result<gpu::Profile, Error> {
        match &*self.0.executor {
            Executor::Cpu(_) => Ok(gpu::Profile::default()),
            Executor::Gpu(gpu) => Ok(gpu.profile()?),
        }
    }

    /// Compiles what passes of any number of tokens need, some seconds on a machine that has never run the model, for which
    /// other calls wait. Without it the first pass of about so many tokens waits for what it needs, about half a second.
    ///
    /// # Errors
    ///
    /// If the GPU failed.
    pub fn prepare(&self) -> Result<(), Error> {
        match &*self.0.executor {
            Executor::Cpu(_) => Ok(()),
            Executor::Gpu(gpu) => Ok(gpu.prepare(self.skips().is_some())?),
        }
    }

    /// Waits until the device has done all that it was given: calls that read no result return before.
    ///
    /// # Errors
    ///
    /// If the GPU failed.
    pub fn wait(&self) -> Result<(), Error> {
        match &*self.0.executor {
            Executor::Cpu(_) => Ok(()),
            Executor::Gpu(gpu) => Ok(gpu.wait()?),
        }
    }

    /// The model's extents.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        self.0.executor.config()
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
    /// If a session is of another engine, has no tokens, or has one outside the vocabulary, or the GPU failed. Then no session
    /// changed.
    pub fn step(&self, batch: &mut [(&mut Session, &[u32])]) -> Result<(), Error> {
        self.whole(batch, |batch| {
            self.run_all(batch.iter_mut().map(|(of, tokens)| Feed::new(&mut of.sequence, tokens)).collect())
        })
    }

    /// As [`Self::step`], and gives for each session what [`Session::score`] does: the natural logarithms of its tokens'
    /// probabilities.
    ///
    /// # Errors
    ///
    /// As those of [`Self::step`], or if the GPU failed.
    pub fn score(&self, batch: &mut [(&mut Session, &[u32])]) -> Result<Vec<Vec<f64>>, Error> {
        self.whole(batch, |batch| self.score_all(batch))
    }

    /// Runs a batch that was checked; if that fails, its sessions are what they were.
    fn whole<T>(
        &self,
        batch: &mut [(&mut Session, &[u32])],
        run: impl FnOnce(&mut [(&mut Session, &[u32])]) -> Result<T, Error>,
    ) -> Result<T, Error> {
        for (index, (session, tokens)) in batch.iter().enumerate() {
            if !session.engine.is(self) {
                return Err(Error::ForeignSession { index });
            }
            self.check(tokens)?;
        }
        // What a sequence was is kept until all its passes are done.
        let before: Vec<Option<Sequence>> = batch.iter().map(|(session, _)| self.before(session)).collect();
        let done = run(batch);
        if done.is_err() {
            for ((session, _), before) in batch.iter_mut().zip(before) {
                before.into_iter().for_each(|before| session.sequence = before);
            }
        }
        done
    }

    /// What a session was, where a pass can fail: on a GPU, where it is not copied.
    fn before(&self, session: &Session) -> Option<Sequence> {
        matches!(*self.0.executor, Executor::Gpu(_)).then(|| session.sequence.clone())
    }

    /// Runs sequences over their tokens, as many at a time as a pass has room for.
    fn run_all(&self, mut rest: Vec<Feed<'_>>) -> Result<(), Error> {
        while !rest.is_empty() {
            let (mut room, mut jobs, mut shared) = (self.0.pass_tokens, Vec::new(), None);
            for Feed { sequence, tokens, decodes } in &mut rest {
                if room == 0 || jobs.len() == self.segments() {
                    break;
                }
                let (mask, most) = self.mask(sequence.position, *decodes, tokens.len().min(room));
                if *shared.get_or_insert_with(|| mask.clone()) != mask {
                    continue; // in a later pass
                }
                let (now, later) = tokens.split_at(most);
                *tokens = later;
                room -= now.len();
                let logits = if later.is_empty() { Logits::Last } else { Logits::None };
                jobs.push(Job { sequence, tokens: now, logits });
            }
            self.run(&mut jobs, &shared.unwrap_or_default())?;
            rest.retain(|of| !of.tokens.is_empty());
        }
        Ok(())
    }

    /// Runs sequences over their tokens, in passes that show all logits, in which each has as many tokens as the others.
    fn score_all(&self, batch: &mut [(&mut Session, &[u32])]) -> Result<Vec<Vec<f64>>, Error> {
        let vocab = self.config().vocab;
        let room = (LOGITS_AT_ONCE / vocab).clamp(1, self.logit_rows());
        let mut scores: Vec<Vec<f64>> = Vec::with_capacity(batch.len());
        for (session, tokens) in &*batch {
            let before = session.last_logits()?.map(|logits| log_probability(logits, tokens[0]));
            scores.push(before.into_iter().collect());
        }
        let mut rest: Vec<(&mut Vec<f64>, Feed<'_>)> = scores
            .iter_mut()
            .zip(batch)
            .map(|(of, (session, tokens))| (of, Feed::new(&mut session.sequence, tokens)))
            .collect();
        while !rest.is_empty() {
            let first = rest.first().map(|(_, of)| self.mask(of.sequence.position, of.decodes, 1).0);
            let mask = first.unwrap_or_default();
            let alike = |of: &Feed<'_>| self.mask(of.sequence.position, of.decodes, 1).0 == mask;
            let most = self.segments().min(room);
            let mut pass: Vec<_> = rest.iter_mut().filter(|(_, of)| alike(of)).take(most).collect();
            let each = room / pass.len();
            let (mut jobs, mut next) = (Vec::with_capacity(pass.len()), Vec::with_capacity(pass.len()));
            for (scores, Feed { sequence, tokens, decodes }) in &mut pass {
                let (_, run) = self.mask(sequence.position, *decodes, tokens.len().min(each));
                let (now, later) = tokens.split_at(run);
                jobs.push(Job { sequence, tokens: now, logits: Logits::All });
                // The last token's row predicts the next pass's first.
                next.push((scores, now.len(), &tokens[1..tokens.len().min(now.len() + 1)]));
                *tokens = later;
            }
            let rows = self.run(&mut jobs, &mask)?;
            let mut others = rows.as_slice();
            let own: Vec<&[f32]> = next
                .iter()
                .map(|(_, now, _)| {
                    let (own, rest) = others.split_at(now * vocab);
                    others = rest;
                    own
                })
                .collect();
            next.par_iter_mut().zip(own).for_each(|((scores, _, next), own)| {
                let rows = own.par_chunks_exact(vocab).zip(&**next);
                scores.par_extend(rows.map(|(row, &next)| log_probability(row, next)));
            });
            rest.retain(|(_, of)| !of.tokens.is_empty());
        }
        drop(rest);
        Ok(scores)
    }

    /// The layers that a sequence leaves out at its next token, and at how many of the next `tokens` it does.
    pub(crate) fn mask(&self, position: u64, decodes: bool, tokens: usize) -> (Mask, usize) {
        Mask::next(self.skips(), self.config().n_layers, position, decodes, tokens)
    }

    /// Runs something on a thread of the engine's, which is told how many passes can run side by side: one on a GPU.
    pub(crate) fn on_threads<T: Send>(&self, run: impl FnOnce(usize) -> T + Send) -> T {
        match &*self.0.executor {
            Executor::Cpu(cpu) => cpu.on_threads(|| run(rayon::current_num_threads())),
            Executor::Gpu(_) => run(1),
        }
    }

    /// What its sessions' states are held in.
    #[must_use]
    pub fn resident(&self) -> Resident {
        match &*self.0.executor {
            Executor::Cpu(cpu) => cpu.empty.resident(),
            Executor::Gpu(gpu) => gpu.resident(),
        }
    }

    /// Tokens in a pass, at most.
    pub(crate) fn pass_tokens(&self) -> usize {
        self.0.pass_tokens
    }

    /// Sequences in a pass, at most.
    pub(crate) fn segments(&self) -> usize {
        match &*self.0.executor {
            Executor::Cpu(_) => usize::MAX,
            Executor::Gpu(gpu) => gpu.segments(),
        }
    }

    /// Rows of logits that a pass gives, at most.
    pub(crate) fn logit_rows(&self) -> usize {
        match &*self.0.executor {
            Executor::Cpu(_) => self.0.pass_tokens,
            Executor::Gpu(gpu) => gpu.logit_rows(),
        }
    }

    /// Whether two are the same.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Tokens that the model has and the tokenizer has not: released models are padded to a round vocabulary.
    pub(crate) fn mute(&self) -> &[u32] {
        &self.0.mute
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

    /// Runs one pass: see [`Executor::run`].
    pub(crate) fn run(&self, jobs: &mut [Job<'_>], mask: &Mask) -> Result<Vec<f32>, Error> {
        self.0.executor.run(jobs, mask.skip(self.skips()))
    }

    /// The GPU, if that is what it runs on.
    pub(crate) fn gpu(&self) -> Option<&gpu::Executor> {
        match &*self.0.executor {
            Executor::Cpu(_) => None,
            Executor::Gpu(gpu) => Some(gpu),
        }
    }

    /// The state before the first token.
    pub(crate) fn empty(&self) -> Memory {
        match &*self.0.executor {
            Executor::Cpu(cpu) => Memory::Host(cpu.empty.clone()),
            Executor::Gpu(gpu) => Memory::Device(gpu.empty()),
        }
    }

    /// What tells the model from others: 16 hexadecimal digits, the same for the same weights in any container, dialect,
    /// and type that holds them exactly, on any machine and device.
    ///
    /// It is a [`Digest`] of the extents, of every vector, of the first row of every matrix, and of the first element of
    /// every adapter's factor: training changes all of them. It does not guard against those who mean harm.
    #[must_use]
    pub fn fingerprint(&self) -> &str {
        &self.0.fingerprint
    }

    /// What tells the vocabulary from others, if there is one: a [`Digest`] of every token and its bytes.
    #[must_use]
    pub fn tokenizer_fingerprint(&self) -> Option<String> {
        let tokenizer = self.0.tokenizer.as_ref()?;
        let mut digest = Digest::new();
        for token in 0..u32::try_from(tokenizer.vocab_len()).unwrap_or(u32::MAX) {
            if let Ok(bytes) = tokenizer.token_bytes(token) {
                digest.number(token.into());
                digest.field(bytes);
            }
        }
        Some(digest.to_string())
    }

    /// A session that goes on where the one stood that [`Session::save`] wrote to `path`, on whatever device that ran. It
    /// has the position, the counts and the logits of that one exactly, and its state within the format's error.
    ///
    /// # Errors
    ///
    /// If the file cannot be read or is damaged; if it is of another model, or both have a tokenizer and they differ; or
    /// if the GPU failed.
    pub fn load_session(&self, path: impl AsRef<Path>) -> Result<Session, Error> {
        let path = path.as_ref();
        self.resumed(rwkv_state::Snapshot::load(path)?, || path.display().to_string())
    }

    /// As [`Self::load_session`], from a store: the session that [`Session::save_to`] put there under `key`.
    ///
    /// # Errors
    ///
    /// If the store does not have it or failed, or it is damaged; if it is of another model, or both have a tokenizer and
    /// they differ; or if the GPU failed.
    pub fn load_from(&self, store: &dyn StateStore, key: &str) -> Result<Session, Error> {
        self.resumed(store.get(key)?, || key.to_owned())
    }

    /// A session that goes on from a snapshot, which came from `file`.
    fn resumed(&self, snapshot: rwkv_state::Snapshot, file: impl Fn() -> String) -> Result<Session, Error> {
        let rwkv_state::Snapshot { model, tokenizer, position, state, counts, logits } = snapshot;
        if model != self.fingerprint() {
            return Err(Error::OtherModel {
                file: file(),
                found: model,
                expected: self.0.fingerprint.clone(),
            });
        }
        if let (Some(found), Some(expected)) = (tokenizer, self.tokenizer_fingerprint())
            && found != expected
        {
            return Err(Error::OtherTokenizer { file: file(), found, expected });
        }
        let (found, expected) = (*state.layout(), self.state_layout());
        if found != expected {
            return Err(Error::OtherLayout { file: file(), found, expected });
        }
        let vocab = self.config().vocab;
        let other = |what, found| Error::OtherVocabulary { file: file(), what, found, vocab };
        if let Some(found) = logits.as_ref().map(Vec::len).filter(|&len| len != vocab) {
            return Err(other("the number of logits is", found));
        }
        if let Some(token) = counts.keys().map(|&token| token as usize).find(|&token| token >= vocab) {
            return Err(other("a generated token is", token));
        }
        let mut session = self.session();
        session.start_from(&state.decode())?;
        let sequence = &mut session.sequence;
        sequence.position = position;
        sequence.counts = counts.into_iter().collect();
        sequence.shown = logits.map_or_else(Shown::default, |logits| Shown::of(&logits));
        Ok(session)
    }
}

/// See [`Engine::fingerprint`]. Every element is widened to 32 bits, little endian.
fn fingerprint(checkpoint: &Checkpoint) -> Result<String, checkpoint::Error> {
    let ModelConfig { n_layers, width, n_heads, head_size, hidden, vocab, ranks } = *checkpoint.config();
    let mut digest = Digest::new();
    for extent in [n_layers, width, n_heads, head_size, hidden, vocab, ranks.w, ranks.a, ranks.v, ranks.g] {
        digest.number(extent as u64);
    }
    let reader = checkpoint.reader(&|_| {});
    let mut add = |name: &str, values: Vec<f32>| {
        digest.field(name.as_bytes());
        digest.number(values.len() as u64);
        values.iter().for_each(|value| digest.bytes(&value.to_le_bytes()));
    };
    for (name, entry) in checkpoint.tensors() {
        let part = name.rsplit('.').next().unwrap_or_default();
        if name.contains(".att.x_") {
            continue; // some files hold these as one
        }
        // Files hold vectors with axes of one, and factors either way round.
        let axes: Vec<usize> = entry.shape.iter().copied().filter(|&extent| extent != 1).collect();
        let len = match axes.last() {
            Some(_) if ["w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2"].contains(&part) => 1,
            Some(&row) => row,
            None => 1,
        };
        let values = if checkpoint.is_quantised(name) {
            reader.bytes(name, len).map(|bytes| bytes.into_iter().map(f32::from).collect())
        } else {
            reader.elements(name, 0..len).map(|values| values.widen())
        };
        add(name, values.map_err(|fault| checkpoint.error(fault))?);
    }
    for layer in 0..n_layers {
        let prefix = format!("blocks.{layer}.att.");
        add(&prefix, reader.mixes(&prefix).map_err(|fault| checkpoint.error(fault))?);
    }
    Ok(digest.to_string())
}

#[cfg(test)]
mod tests {
    use super::{Device, UnknownDevice};

    #[test]
    fn devices_are_named() {
        let gpu = |name: &str| Device::Gpu(Some(name.to_owned()));
        let named = [("auto", Device::Auto), ("cpu", Device::Cpu), ("gpu", Device::Gpu(None))];
        for (text, device) in named.into_iter().chain([("gpu:1", gpu("1")), ("gpu:H200: b", gpu("H200: b"))])
        {
            assert_eq!(text.parse(), Ok(device), "{text}");
        }
        for text in ["", "GPU", "gpu:", "cpu:0", "cuda"] {
            assert_eq!(text.parse::<Device>(), Err(UnknownDevice(text.to_owned())), "{text:?}");
        }
    }
}
