//! A request that runs: what it has read, what was chosen for it, and what was handed out.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;

use rwkv_core::model::Logits;
use rwkv_kernels::kernels::sample::{ALL_MASKED, NOT_FINITE, SamplerRow};

use super::queue::{Arrival, Event, Piece, Request};
use super::{Error, NoToken};
use crate::engine::{self, Engine, Job};
use crate::gpu::{Input, Part};
use crate::sample::{self, Counts, Sampler};
use crate::session::{Sequence, Session, Shown};
use crate::text::{FinishReason, Writer};
use crate::tokenizer::Tokenizer;

/// A sequence's share of a pass.
#[derive(Clone, Copy, Debug)]
pub(super) struct Share {
    /// Which of those that run.
    pub(super) index: usize,
    pub(super) tokens: usize,
    /// Whether they are of the prompt, or one that was chosen.
    pub(super) of_prompt: bool,
    /// Whether the next token is chosen.
    pub(super) choose: bool,
}

/// Why there is no token.
#[derive(Debug)]
pub(super) enum Refused {
    Logits(NoToken),
    Other(engine::Error),
}

impl Refused {
    /// A token that the device chose, or its code for none.
    pub(super) const fn on_device(token: u32) -> Result<u32, Self> {
        match token {
            ALL_MASKED => Err(Self::Logits(NoToken::AllMasked)),
            NOT_FINITE => Err(Self::Logits(NoToken::NotFinite)),
            token => Ok(token),
        }
    }
}

impl From<engine::Error> for Refused {
    fn from(error: engine::Error) -> Self {
        match error {
            engine::Error::Sample(sample::Error::AllMasked { .. }) => Self::Logits(NoToken::AllMasked),
            engine::Error::Sample(sample::Error::NotFinite { .. }) => Self::Logits(NoToken::NotFinite),
            other => Self::Other(other),
        }
    }
}

/// A token that was chosen and not read.
#[derive(Clone, Copy, Debug)]
enum Next {
    /// One that the host knows.
    Known(u32),
    /// The one at this place of those that the last pass chose, on the device.
    Chosen(u32),
}

/// A request that runs.
///
/// Invariant: `taken <= fed + 1`, `fed <= asked <= taken + 1`. On a GPU a token is read before the host knows it.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) id: u64,
    events: Sender<Event>,
    cancelled: Arc<AtomicBool>,
    /// After all that passes were given.
    sequence: Sequence,
    /// What it was before it read a token that the host does not know; the counts aside.
    before: Option<Sequence>,
    prompt: Vec<u32>,
    /// Tokens of the prompt that passes were given.
    read: usize,
    sampler: Sampler,
    max_tokens: usize,
    /// Tokens that passes were to choose.
    asked: usize,
    /// Of these, those that were handed out.
    taken: usize,
    /// Of these, those that passes were given.
    fed: usize,
    next: Next,
    writer: Writer,
    /// Its row of the counts on the device.
    pub(super) counts: Option<u32>,
    pub(super) failed: Option<Error>,
}

impl Running {
    pub(super) fn new(arrival: Arrival) -> Self {
        let Arrival { id, request, writer, events, cancelled } = arrival;
        let Request { session, prompt, options } = request;
        Self {
            id,
            events,
            cancelled,
            sequence: session.sequence,
            before: None,
            prompt,
            read: 0,
            sampler: options.sampler,
            max_tokens: options.max_tokens,
            asked: 0,
            taken: 0,
            fed: 0,
            next: Next::Chosen(0),
            writer,
            counts: None,
            failed: None,
        }
    }

    /// What was generated before, if it is penalised.
    pub(super) fn counted(&self) -> Option<&Counts> {
        self.sampler.penalises().then_some(&self.sequence.counts)
    }

    /// Tokens of the prompt that no pass was given.
    pub(super) const fn unread(&self) -> usize {
        self.prompt.len() - self.read
    }

    /// Whether the next that it reads is a token that was chosen.
    pub(super) const fn generates(&self) -> bool {
        self.fed < self.asked
    }

    /// Whether another token is to be chosen.
    pub(super) const fn wants(&self) -> bool {
        self.writer.finished.is_none() && self.asked < self.max_tokens
    }

    /// Whether it is over: its session has read all that it gave out, an end of text aside; or no one wants it.
    pub(super) fn leaves(&self) -> bool {
        let through = self.writer.finished.is_some() && self.unread() == 0 && self.fed == self.taken;
        through || self.failed.is_some() || self.cancelled.load(Ordering::Relaxed)
    }

    /// What it reads.
    fn input<'a>(share: &Share, prompt: &'a [u32], read: usize, next: &'a Next) -> Input<'a> {
        match next {
            _ if share.of_prompt => Input::Given(&prompt[read..][..share.tokens]),
            Next::Known(token) => Input::Given(std::slice::from_ref(token)),
            Next::Chosen(place) => Input::Chosen(*place),
        }
    }

    /// Its share of a pass on the host.
    pub(super) fn job(&mut self, share: &Share) -> Result<Job<'_>, engine::Error> {
        let Self { sequence, prompt, read, next, .. } = self;
        let Input::Given(tokens) = Self::input(share, prompt, *read, next) else {
            return Err(engine::Error::ForeignState);
        };
        let logits = if share.choose { Logits::Last } else { Logits::None };
        Ok(Job { sequence, tokens, logits })
    }

    /// Its share of a pass on the device.
    pub(super) fn part(&mut self, share: &Share) -> Result<Part<'_>, engine::Error> {
        let Self { sequence, before, prompt, read, next, sampler, counts, .. } = self;
        let input = Self::input(share, prompt, *read, next);
        if let Input::Chosen(_) = input {
            let counted = std::mem::take(&mut sequence.counts);
            *before = Some(sequence.clone());
            sequence.counts = counted;
        }
        let position = sequence.position + share.tokens as u64;
        let row = || SamplerRow::new(sampler, position, *counts);
        Ok(Part {
            input,
            sampler: share.choose.then(row).transpose()?,
            record: sequence.memory.record().ok_or(engine::Error::ForeignState)?,
        })
    }

    /// Notes that the device was given its share.
    pub(super) fn read_on_device(&mut self, share: &Share) {
        let tokens = match Self::input(share, &self.prompt, self.read, &self.next) {
            Input::Given(tokens) => tokens,
            // Which it is will be noted when it is known.
            Input::Chosen(_) => &[0],
        };
        self.sequence.read(tokens, Shown::default());
    }

    /// Notes that a pass was given its share, and which of its choices it is for.
    pub(super) fn moved(&mut self, share: &Share, place: Option<u32>) {
        if share.of_prompt {
            self.read += share.tokens;
        } else {
            self.fed += 1;
            if let Next::Known(token) = self.next {
                self.sequence.generated(token);
            }
        }
        if let Some(place) = place {
            self.asked += 1;
            self.next = Next::Chosen(place);
        }
    }

    /// Chooses the next token on the host, none of those masked.
    pub(super) fn choose(&self, masked: &[u32]) -> Result<u32, engine::Error> {
        let Sequence { counts, position, shown, .. } = &self.sequence;
        let logits = shown.on_host().ok_or(engine::Error::NoLogits)?;
        Ok(self.sampler.sample_except(masked, logits, counts, *position)?)
    }

    /// Hands out a token that was chosen.
    pub(super) fn take(&mut self, token: Result<u32, Refused>, tokenizer: Option<&Tokenizer>) {
        // Whether a pass reads it already.
        let is_fed = self.fed > self.taken;
        let written = token.and_then(|token| Ok((token, self.writer.push(tokenizer, token)?)));
        let (token, mut text) = match written {
            Ok(written) => written,
            Err(Refused::Other(error)) => return self.failed = Some(Error::Request(error)),
            Err(Refused::Logits(why)) => {
                let position = self.sequence.position - u64::from(is_fed);
                return self.failed = Some(Error::NoToken { position, why });
            }
        };
        let ends_text = self.writer.finished == Some(FinishReason::EndOfText);
        if !ends_text {
            self.taken += 1;
            if is_fed {
                self.sequence.generated(token);
            } else {
                self.next = Next::Known(token);
            }
        } else if let (true, Some(mut before)) = (is_fed, self.before.take()) {
            self.fed -= 1;
            before.counts = std::mem::take(&mut self.sequence.counts);
            self.sequence = before;
        }
        if self.writer.finished.is_some() {
            text.push_str(&self.writer.finish());
        }
        let token = (!ends_text).then_some(token);
        if token.is_some() || !text.is_empty() {
            self.tell(Event::Piece(Piece { token, text }));
        }
    }

    /// Tells whoever has the handle. If no one has, the request is cancelled.
    fn tell(&self, event: Event) {
        if self.events.send(event).is_err() {
            self.cancelled.store(true, Ordering::Relaxed);
        }
    }

    /// Tells that it failed.
    pub(super) fn fail(self, error: Error) {
        self.tell(Event::Failed(error));
    }

    /// Tells how it ended.
    pub(super) fn end(mut self, engine: &Engine) {
        if let Some(error) = self.failed.take() {
            self.fail(error);
        } else if let Some(reason) = self.writer.finished {
            let Self { mut sequence, events, .. } = self;
            sequence.shown = Shown::default();
            // Without a handle no one has a use for it.
            let _ = events.send(Event::Ended(reason, Box::new(Session { engine: engine.clone(), sequence })));
        }
    }
}
