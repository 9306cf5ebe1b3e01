//! One sequence and what it remembers.

use std::borrow::Cow;
use std::sync::Arc;

use rayon::prelude::*;
use rwkv_core::model::{Logits, Segment, State};
use rwkv_core::ops::softmax::log_probability;

use crate::engine::{Engine, Error};
use crate::sample::{Counts, Sampler};

/// Logits computed at a time when every position's are wanted.
const LOGITS_AT_ONCE: usize = 1 << 22;

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
    pub(crate) state: State<f32>,
    /// Of the last token, `[V]`; empty before the first.
    pub(crate) logits: Vec<f32>,
    /// Tokens read.
    pub(crate) position: u64,
    /// How often each token was generated.
    pub(crate) counts: Counts,
}

/// A moment of a session, to return to. Clones share it.
#[derive(Clone, Debug)]
pub struct Snapshot {
    engine: Engine,
    sequence: Arc<Sequence>,
}

impl Session {
    pub(crate) fn new(engine: Engine) -> Self {
        let state = State::new(engine.config());
        let sequence = Sequence { state, logits: Vec::new(), position: 0, counts: Counts::default() };
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
    /// If there are no tokens or one is outside the vocabulary.
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<(), Error> {
        self.engine.clone().step(&mut [(self, tokens)])
    }

    /// Reads one token and gives the logits `[V]` of the next.
    ///
    /// # Errors
    ///
    /// If the token is outside the vocabulary.
    pub fn step(&mut self, token: u32) -> Result<&[f32], Error> {
        self.prefill(&[token])?;
        Ok(&self.sequence.logits)
    }

    /// The logits `[V]` of the next token.
    ///
    /// # Errors
    ///
    /// If no token was read yet.
    pub fn logits(&self) -> Result<&[f32], Error> {
        if self.sequence.logits.is_empty() { Err(Error::NoLogits) } else { Ok(&self.sequence.logits) }
    }

    /// Reads tokens and gives the logits after each, `[T, V]`.
    ///
    /// # Errors
    ///
    /// If there are no tokens or one is outside the vocabulary.
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
    /// If there are no tokens or one is outside the vocabulary.
    pub fn score(&mut self, tokens: &[u32]) -> Result<Vec<f64>, Error> {
        self.engine.check(tokens)?;
        let before = self.logits().ok().map(|logits| log_probability(logits, tokens[0]));
        let mut scores: Vec<f64> = before.into_iter().collect();
        let vocab = self.engine.config().vocab;
        self.each_pass(tokens, |start, logits| {
            let next = &tokens[start + 1..];
            scores.par_extend(
                logits.par_chunks_exact(vocab).zip(next).map(|(row, &next)| log_probability(row, next)),
            );
        })?;
        Ok(scores)
    }

    /// Reads tokens, as many at a time as is sensible, and shows each time the index of the first and the logits
    /// `[T, V]`.
    fn each_pass(&mut self, tokens: &[u32], mut each: impl FnMut(usize, &[f32])) -> Result<(), Error> {
        self.engine.check(tokens)?;
        let vocab = self.engine.config().vocab;
        let at_once = (LOGITS_AT_ONCE / vocab).clamp(1, self.engine.pass_tokens());
        for (tokens, start) in tokens.chunks(at_once).zip((0..).step_by(at_once)) {
            let state = &mut self.sequence.state;
            let logits = self.engine.forward(&mut [Segment { tokens, state, logits: Logits::All }]);
            self.sequence.position += tokens.len() as u64;
            each(start, &logits);
            logits[logits.len() - vocab..].clone_into(&mut self.sequence.logits);
        }
        Ok(())
    }

    /// Chooses the next token, without reading it.
    ///
    /// # Errors
    ///
    /// If no token was read yet, or none can be chosen.
    pub fn sample(&self, sampler: &Sampler) -> Result<u32, Error> {
        self.sample_except(&[], sampler)
    }

    /// As [`Self::sample`], but none of the `masked` tokens.
    pub(crate) fn sample_except(&self, masked: &[u32], sampler: &Sampler) -> Result<u32, Error> {
        let mut logits = Cow::Borrowed(self.logits()?);
        if !masked.is_empty() {
            let logits = logits.to_mut();
            masked.iter().for_each(|&token| logits[token as usize] = f32::NEG_INFINITY);
        }
        Ok(sampler.sample(&logits, &self.sequence.counts, self.sequence.position)?)
    }

    /// Reads a token that was chosen: as [`Self::step`], and the penalties know of it.
    ///
    /// # Errors
    ///
    /// If the token is outside the vocabulary.
    pub fn accept(&mut self, token: u32) -> Result<&[f32], Error> {
        self.step(token)?;
        self.sequence.counts.add(token);
        Ok(&self.sequence.logits)
    }

    /// Generates tokens without end. Each is read before it is given out, so that the session can go on from any.
    ///
    /// After an error there are no more.
    pub fn generate(&mut self, sampler: Sampler) -> impl Iterator<Item = Result<u32, Error>> {
        let mut failed = false;
        std::iter::from_fn(move || {
            let token = (!failed).then(|| {
                let token = self.sample(&sampler)?;
                self.accept(token)?;
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

    /// The state in canonical order (see [`rwkv_state::layout`]).
    ///
    /// # Panics
    ///
    /// Never: a session's state has its engine's extents.
    #[must_use]
    pub fn state(&self) -> Vec<f32> {
        self.engine.state_layout().flatten(&self.sequence.state).expect("extents of the engine")
    }

    /// Starts over from a state in canonical order. What led to it is unknown: the position is zero, the penalties know of
    /// no token, and there are no logits until a token is read.
    ///
    /// # Errors
    ///
    /// If the state has other extents.
    pub fn start_from(&mut self, state: &[f32]) -> Result<(), Error> {
        let state = self.engine.state_layout().unflatten(state)?;
        self.sequence = Sequence { state, ..Self::new(self.engine.clone()).sequence };
        Ok(())
    }
}
