//! One sequence and what it remembers.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use rwkv_core::model::Logits;
use rwkv_kernels::kernels::sample::{ALL_MASKED, NOT_FINITE};
use rwkv_state::{EncodedState, ResidentState, StateFormat, StateStore};

use crate::engine::{Engine, Error, Job};
use crate::gpu::{Ahead, Record};
use crate::sample::{Counts, Sampler};

/// Logits computed at a time when every position's are wanted.
pub(crate) const LOGITS_AT_ONCE: usize = 1 << 22;

/// One sequence: its state, the logits of its last token, and what sampling needs to know of its past.
///
/// It owns all of this; the model is shared. A call that fails leaves it as it was.
#[derive(Clone, Debug)]
pub struct Session {
    pub(crate) engine: Engine,
    pub(crate) sequence: Sequence,
}

/// All that a sequence shows.
#[derive(Clone, Debug)]
pub(crate) struct Sequence {
    pub(crate) memory: Memory,
    /// The logits of the last token.
    pub(crate) shown: Shown,
    /// Tokens read.
    pub(crate) position: u64,
    /// How often each token was generated.
    pub(crate) counts: Counts,
    /// The tokens that can be undone, oldest first.
    recent: VecDeque<Recent>,
    /// The logits of the token before those, if it had any.
    floor: Shown,
}

/// A token that can be undone.
#[derive(Clone, Copy, Debug)]
struct Recent {
    token: u32,
    generated: bool,
}

/// The logits of a token.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shown {
    /// `[V]`, once they are on the host.
    logits: OnceLock<Arc<[f32]>>,
    /// Whether the token's record has them on the device. Those from a file are on the host alone.
    on_device: bool,
}

impl Shown {
    /// Logits on the host.
    pub(crate) fn of(logits: &[f32]) -> Self {
        Self { logits: OnceLock::from(Arc::from(logits)), on_device: false }
    }

    /// Those that are on the host.
    pub(crate) fn on_host(&self) -> Option<&[f32]> {
        self.logits.get().map(|logits| &**logits)
    }

    /// Whether there are any.
    pub(crate) fn is_some(&self) -> bool {
        self.on_device || self.logits.get().is_some()
    }

    /// Logits on the device, if there are any, until someone asks for them.
    pub(crate) const fn on_device(on_device: bool) -> Self {
        Self { logits: OnceLock::new(), on_device }
    }
}

/// A state, where its engine runs.
#[derive(Clone, Debug)]
pub(crate) enum Memory {
    /// On the CPU.
    Host(ResidentState),
    /// On the GPU. Clones share it.
    Device(Record),
}

impl Memory {
    /// Tokens that can be undone.
    fn pending(&self) -> usize {
        match self {
            Self::Host(state) => state.pending(),
            Self::Device(record) => record.pending(),
        }
    }

    pub(crate) const fn state(&mut self) -> Option<&mut ResidentState> {
        match self {
            Self::Host(state) => Some(state),
            Self::Device(_) => None,
        }
    }

    pub(crate) const fn record(&mut self) -> Option<&mut Record> {
        match self {
            Self::Host(_) => None,
            Self::Device(record) => Some(record),
        }
    }
}

/// A moment of a session, to return to. Clones share it.
#[derive(Clone, Debug)]
pub struct Snapshot {
    engine: Engine,
    sequence: Arc<Sequence>,
}

impl Sequence {
    fn new(memory: Memory) -> Self {
        let (shown, floor) = (Shown::default(), Shown::default());
        Self { memory, shown, position: 0, counts: Counts::new(), recent: VecDeque::new(), floor }
    }

    /// Notes that tokens were read, and what they show.
    pub(crate) fn read(&mut self, tokens: &[u32], shown: Shown) {
        let before = std::mem::replace(&mut self.shown, shown);
        self.position += tokens.len() as u64;
        let (undone_before, pending) = (self.recent.len(), self.memory.pending());
        let recent = |&token| Recent { token, generated: false };
        self.recent.extend(tokens[tokens.len().saturating_sub(pending)..].iter().map(recent));
        self.recent.drain(..self.recent.len().saturating_sub(pending));
        if undone_before == 0 || undone_before + tokens.len() > pending {
            // Of what is pending now, the first is of these tokens.
            self.floor = if tokens.len() == pending { before } else { Shown::default() };
        }
    }

    /// Notes that the last token was generated, and which it is.
    pub(crate) fn generated(&mut self, token: u32) {
        self.counts.add(token);
        if let Some(last) = self.recent.back_mut() {
            *last = Recent { token, generated: true };
        }
    }
}

impl Session {
    pub(crate) fn new(engine: Engine) -> Self {
        let sequence = Sequence::new(engine.empty());
        Self { engine, sequence }
    }

    /// The engine it runs on.
    #[must_use]
    pub const fn engine(&self) -> &Engine {
        &self.engine
    }

    /// How many tokens it has read.
    #[must_use]
    pub const fn position(&self) -> u64 {
        self.sequence.position
    }

    /// Reads a prompt.
    ///
    /// # Errors
    ///
    /// If there are no tokens or one is outside the vocabulary, or the GPU failed.
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<(), Error> {
        self.engine.clone().step(&mut [(self, tokens)])
    }

    /// Reads one token and gives the logits `[V]` of the next.
    ///
    /// # Errors
    ///
    /// If the token is outside the vocabulary, or the GPU failed.
    pub fn step(&mut self, token: u32) -> Result<&[f32], Error> {
        self.prefill(&[token])?;
        self.logits()
    }

    /// The logits `[V]` of the next token.
    ///
    /// # Errors
    ///
    /// If no token was read yet, it is not known which was read last (see [`Self::rollback`]), or the GPU failed.
    pub fn logits(&self) -> Result<&[f32], Error> {
        let Sequence { memory, shown: Shown { logits, on_device }, recent, .. } = &self.sequence;
        if logits.get().is_none() {
            let found: Arc<[f32]> = match (memory, self.engine.gpu(), recent.back()) {
                (Memory::Device(record), Some(gpu), _) if *on_device => gpu.logits(record)?.into(),
                // Those after the token were undone: it is read once more.
                (.., Some(last)) if self.engine.skips().is_none() => {
                    let mut before = self.fork();
                    before.rollback(1)?;
                    before.step(last.token)?.into()
                }
                _ => return Err(Error::NoLogits),
            };
            // If another thread was faster, its copy is as good.
            let _ = logits.set(found);
        }
        logits.get().map(|logits| &**logits).ok_or(Error::NoLogits)
    }

    /// Whether there are logits, or can be.
    pub(crate) fn has_logits(&self) -> bool {
        let again = self.engine.skips().is_none() && !self.sequence.recent.is_empty();
        self.sequence.shown.is_some() || again
    }

    /// As [`Self::logits`], if there are any.
    pub(crate) fn last_logits(&self) -> Result<Option<&[f32]>, Error> {
        match self.logits() {
            Ok(logits) => Ok(Some(logits)),
            Err(Error::NoLogits) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads tokens and gives the logits after each, `[T, V]`.
    ///
    /// # Errors
    ///
    /// If there are no tokens or one is outside the vocabulary, or the GPU failed.
    pub fn logits_of(&mut self, tokens: &[u32]) -> Result<Vec<f32>, Error> {
        let mut all = Vec::new();
        self.each_pass(tokens, |_, logits| all.extend_from_slice(logits))?;
        Ok(all)
    }

    /// Reads tokens and gives the natural logarithm of the probability of each, given all before it. The first token of
    /// an empty session follows nothing: it has none, and the result is one shorter.
    ///
    /// # Errors
    ///
    /// If there are no tokens or one is outside the vocabulary, or the GPU failed.
    pub fn score(&mut self, tokens: &[u32]) -> Result<Vec<f64>, Error> {
        let mut scores = self.engine.clone().score(&mut [(self, tokens)])?;
        Ok(scores.pop().unwrap_or_default())
    }

    /// Reads tokens, as many at a time as is sensible, and shows each time the index of the first and the logits
    /// `[T, V]`.
    fn each_pass(&mut self, tokens: &[u32], mut each: impl FnMut(usize, &[f32])) -> Result<(), Error> {
        self.engine.check(tokens)?;
        let vocab = self.engine.config().vocab;
        let at_once = (LOGITS_AT_ONCE / vocab).clamp(1, self.engine.logit_rows());
        let engine = self.engine.clone();
        // What the sequence was is kept until it is done.
        let mut sequence = self.sequence.clone();
        let (decodes, mut start) = (tokens.len() == 1, 0);
        while start < tokens.len() {
            let most = (tokens.len() - start).min(at_once);
            let (mask, most) = engine.mask(sequence.position, decodes, most);
            let job =
                Job { sequence: &mut sequence, tokens: &tokens[start..start + most], logits: Logits::All };
            each(start, &engine.run(&mut [job], &mask)?);
            start += most;
        }
        self.sequence = sequence;
        Ok(())
    }

    /// Chooses the next token, without reading it.
    ///
    /// # Errors
    ///
    /// If no token was read yet, none can be chosen, or the GPU failed.
    pub fn sample(&self, sampler: &Sampler) -> Result<u32, Error> {
        self.sample_except(&[], sampler)
    }

    /// As [`Self::sample`], but none of the `masked` tokens.
    pub(crate) fn sample_except(&self, masked: &[u32], sampler: &Sampler) -> Result<u32, Error> {
        let Sequence { counts, position, .. } = &self.sequence;
        Ok(sampler.sample_except(masked, self.logits()?, counts, *position)?)
    }

    /// Reads a token that was chosen: as [`Self::step`], and the penalties know of it.
    ///
    /// # Errors
    ///
    /// If the token is outside the vocabulary, or the GPU failed.
    pub fn accept(&mut self, token: u32) -> Result<&[f32], Error> {
        self.prefill(&[token])?;
        self.sequence.generated(token);
        self.logits()
    }

    /// Generates tokens without end. Each is read before it is given out, so that the session can go on from any.
    ///
    /// After an error there are no more. On a GPU, steps run ahead of the host; those whose token is never taken leave no
    /// trace.
    pub fn generate(&mut self, sampler: Sampler) -> impl Iterator<Item = Result<u32, Error>> {
        let (mut failed, mut stream) = (false, Stream::new(sampler, Vec::new()));
        std::iter::from_fn(move || {
            let token = (!failed).then(|| {
                let token = stream.choose(self, usize::MAX)?;
                stream.accept(self, token)?;
                Ok(token)
            })?;
            failed = token.is_err();
            Some(token)
        })
    }

    /// A session that stands where this one does and goes its own way.
    #[must_use]
    pub fn fork(&self) -> Self {
        self.clone()
    }

    /// Remembers where the session stands.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        Snapshot { engine: self.engine.clone(), sequence: Arc::new(self.sequence.clone()) }
    }

    /// Returns to where a session stood.
    ///
    /// # Errors
    ///
    /// If that session is of another engine.
    pub fn restore(&mut self, snapshot: &Snapshot) -> Result<(), Error> {
        if !snapshot.engine.is(&self.engine) {
            return Err(Error::ForeignSnapshot);
        }
        self.sequence.clone_from(&snapshot.sequence);
        Ok(())
    }

    /// Tokens that [`Self::rollback`] can undo: those read since the state was last written, of which there are up to
    /// [`Resident::capacity`](rwkv_state::Resident::capacity).
    #[must_use]
    pub fn pending(&self) -> usize {
        self.sequence.memory.pending()
    }

    /// Undoes the last `tokens` tokens, exactly and without recomputing: the state, the position and the penalties'
    /// counts are what they were before them. So are the logits, but they are computed anew when they are asked for, by
    /// reading the token before once more: most who go back read another token first. If all that is pending is undone,
    /// they are those from before the first token undone; there are none if that token came in one call with tokens before it.
    /// An engine that leaves layers out does not know which it left out then, and has none either way.
    /// For longer ways back there is [`Self::snapshot`].
    ///
    /// To be able to undo the next [`Resident::capacity`](rwkv_state::Resident::capacity) tokens, [`Self::fold`] first.
    ///
    /// # Errors
    ///
    /// If fewer tokens are [pending](Self::pending); the session is as it was.
    pub fn rollback(&mut self, tokens: usize) -> Result<(), Error> {
        let Sequence { memory, shown, position, counts, recent, floor } = &mut self.sequence;
        match memory {
            Memory::Host(state) => state.rollback(tokens)?,
            Memory::Device(record) => record.rollback(tokens)?,
        }
        let undone = recent.split_off(recent.len().saturating_sub(tokens));
        undone.into_iter().filter(|of| of.generated).for_each(|of| counts.remove(of.token));
        if tokens > 0 {
            *shown = if recent.is_empty() { floor.clone() } else { Shown::default() };
        }
        *position -= tokens as u64;
        Ok(())
    }

    /// Writes the state out: nothing is [pending](Self::pending) then, and the next tokens can be undone, as many as may
    /// be pending.
    ///
    /// # Errors
    ///
    /// If the GPU failed; the session is as it was.
    pub fn fold(&mut self) -> Result<(), Error> {
        match (&mut self.sequence.memory, self.engine.gpu()) {
            (Memory::Host(state), _) => state.fold(),
            (Memory::Device(record), Some(gpu)) => *record = gpu.fold(record)?,
            (Memory::Device(_), None) => return Err(Error::ForeignState),
        }
        self.sequence.recent.clear();
        Ok(())
    }

    /// The state in canonical order (see [`rwkv_state::layout`]).
    ///
    /// # Errors
    ///
    /// If the GPU failed.
    pub fn state(&self) -> Result<Vec<f32>, Error> {
        let mut state = Vec::new();
        self.state_in(&mut state)?;
        Ok(state)
    }

    /// As [`Self::state`], in the memory of `state`; what is in it is lost.
    pub(crate) fn state_in(&self, state: &mut Vec<f32>) -> Result<(), Error> {
        let layout = self.engine.state_layout();
        match (&self.sequence.memory, self.engine.gpu()) {
            (Memory::Host(of), _) => of.to_canonical_in(state),
            (Memory::Device(record), Some(gpu)) => {
                *state = layout.from_device(self.engine.resident(), &gpu.state(record)?)?;
            }
            (Memory::Device(_), None) => return Err(Error::ForeignState),
        }
        Ok(())
    }

    /// Starts over from a state in canonical order. What led to it is unknown: the position is zero, the penalties know of
    /// no token, and there are no logits until a token is read.
    ///
    /// # Errors
    ///
    /// If the state has other extents, or the GPU failed.
    pub fn start_from(&mut self, state: &[f32]) -> Result<(), Error> {
        let layout = self.engine.state_layout();
        self.sequence = Sequence::new(match self.engine.gpu() {
            None => Memory::Host(ResidentState::from_canonical(&layout, self.engine.resident(), state)?),
            Some(gpu) => Memory::Device(gpu.start_from(&layout.to_device(self.engine.resident(), state)?)?),
        });
        Ok(())
    }

    /// Writes where the session stands to the file at `path`, for [`Engine::load_session`]: the state in `format`, the
    /// position, the penalties' counts, and the logits of the last token, exactly. What is at `path` is replaced whole or
    /// not at all.
    ///
    /// # Errors
    ///
    /// If the file cannot be written, a value of the state is not finite, or the GPU failed.
    pub fn save(&self, path: impl AsRef<Path>, format: StateFormat) -> Result<(), Error> {
        Ok(self.stored(format)?.save(path)?)
    }

    /// As [`Self::save`], to a store under `key`, for [`Engine::load_from`]: on this machine or another.
    ///
    /// # Errors
    ///
    /// If the store does not take it, a value of the state is not finite, or the GPU failed.
    pub fn save_to(&self, store: &dyn StateStore, key: &str, format: StateFormat) -> Result<(), Error> {
        Ok(store.put(key, &self.stored(format)?)?)
    }

    /// Where the session stands, as it is stored.
    fn stored(&self, format: StateFormat) -> Result<rwkv_state::Snapshot, Error> {
        let logits = self.last_logits()?.map(<[f32]>::to_vec);
        Ok(rwkv_state::Snapshot {
            model: self.engine.fingerprint().to_owned(),
            tokenizer: self.engine.tokenizer_fingerprint(),
            position: self.position(),
            state: EncodedState::encode(&self.engine.state_layout(), &self.state()?, format)?,
            counts: self.sequence.counts.iter().collect(),
            logits,
        })
    }
}

/// Tokens that a session generates: chosen, and then read or not.
#[derive(Debug)]
pub(crate) struct Stream {
    sampler: Sampler,
    masked: Vec<u32>,
    /// On a GPU, the steps that are under way.
    ahead: Option<Ahead>,
    /// The state after the token that was chosen last.
    next: Option<Record>,
}

impl Stream {
    /// None of the `masked` tokens is ever chosen.
    pub(crate) const fn new(sampler: Sampler, masked: Vec<u32>) -> Self {
        Self { sampler, masked, ahead: None, next: None }
    }

    /// Chooses the next token of the session, which the stream alone moves on. `most` is how many more are wanted.
    pub(crate) fn choose(&mut self, session: &Session, most: usize) -> Result<u32, Error> {
        let (Sequence { memory, counts, position, shown, .. }, gpu) =
            (&session.sequence, session.engine.gpu());
        let (Memory::Device(record), Some(gpu)) = (memory, gpu) else {
            return session.sample_except(&self.masked, &self.sampler);
        };
        if !shown.on_device {
            return session.sample_except(&self.masked, &self.sampler);
        }
        self.sampler.validate()?;
        let ahead = match &mut self.ahead {
            Some(ahead) => ahead,
            none => {
                let skips = session.engine.skips();
                none.insert(gpu.ahead(record, *position, self.sampler, &self.masked, counts, skips)?)
            }
        };
        let taken = gpu.next(ahead, most)?;
        if matches!(taken.token, ALL_MASKED | NOT_FINITE) {
            // The host says what is wrong with the logits; what was run ahead is worth nothing.
            self.ahead = None;
            return session.sample_except(&self.masked, &self.sampler);
        }
        self.next = Some(taken.record);
        Ok(taken.token)
    }

    /// Has the session read the token that was chosen.
    pub(crate) fn accept(&mut self, session: &mut Session, token: u32) -> Result<(), Error> {
        match self.next.take() {
            None => session.accept(token).map(|_| ()),
            Some(record) => {
                let sequence = &mut session.sequence;
                sequence.memory = Memory::Device(record);
                sequence.read(&[token], Shown::on_device(true));
                sequence.generated(token);
                Ok(())
            }
        }
    }
}
