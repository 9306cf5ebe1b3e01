//! How requests come in, and how what they come to goes out.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::Error;
use crate::engine::{self, Engine};
use crate::session::Session;
use crate::text::{FinishReason, TextOptions, Writer};

/// What is to be generated.
#[derive(Clone, Debug)]
pub struct Request {
    /// Where it begins: [`Engine::session`], or any other of the engine's. Prompts that begin alike are best read once, by a
    /// session that each request has a [fork](Session::fork) of.
    pub session: Session,
    /// Tokens to read first, one at least.
    pub prompt: Vec<u32>,
    /// How tokens are chosen, and where they end. Without a tokenizer there is no text, and there can be no stop sequences.
    pub options: TextOptions,
}

/// What a token adds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The token; none with what was held back when the model ended the text.
    pub token: Option<u32>,
    /// What it adds to the text. It may be nothing: see [`Text`](crate::text::Text).
    pub text: String,
}

/// What happens to a request.
#[derive(Debug)]
pub(super) enum Event {
    Piece(Piece),
    Ended(FinishReason, Box<Session>),
    Failed(Error),
}

/// A request that waits.
#[derive(Debug)]
pub(super) struct Arrival {
    pub(super) id: u64,
    pub(super) request: Request,
    pub(super) writer: Writer,
    pub(super) events: Sender<Event>,
    pub(super) cancelled: Arc<AtomicBool>,
}

/// Why no more requests are taken.
#[derive(Debug)]
pub(super) enum Over {
    Gone,
    Failed(Arc<engine::Error>),
}

impl Over {
    fn error(&self) -> Error {
        match self {
            Self::Gone => Error::Gone,
            Self::Failed(error) => Error::Engine(Arc::clone(error)),
        }
    }
}

/// What queues, handles and the scheduler share.
#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Requests that wait, at most.
    limit: usize,
}

#[derive(Debug)]
struct State {
    waiting: VecDeque<Arrival>,
    /// The number of the next request.
    next: u64,
    queues: usize,
    over: Option<Over>,
}

impl Shared {
    pub(super) const fn new(limit: usize) -> Self {
        let state = State { waiting: VecDeque::new(), next: 0, queues: 0, over: None };
        Self { state: Mutex::new(state), changed: Condvar::new(), limit }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing is done under the lock that could panic half way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The request that has waited longest.
    pub(super) fn take(&self) -> Option<Arrival> {
        self.lock().waiting.pop_front()
    }

    /// Waits until there is a request; without any, whether there are queues.
    pub(super) fn wait(&self) -> bool {
        let idle = |state: &mut State| state.waiting.is_empty() && state.queues > 0;
        let state = self.changed.wait_while(self.lock(), idle).unwrap_or_else(PoisonError::into_inner);
        !state.waiting.is_empty()
    }

    /// Takes no more requests, and tells those that wait.
    pub(super) fn end(&self, over: Over) {
        let mut state = self.lock();
        let waiting = std::mem::take(&mut state.waiting);
        let over = state.over.get_or_insert(over);
        for arrival in waiting {
            // Without a handle no one is to be told.
            let _ = arrival.events.send(Event::Failed(over.error()));
        }
    }
}

/// Where requests are handed in, from any thread. Clones are the same queue; a scheduler that [runs](super::Scheduler::run)
/// ends once all are dropped.
#[derive(Debug)]
pub struct Queue {
    engine: Engine,
    shared: Arc<Shared>,
}

impl Queue {
    pub(super) fn new(engine: Engine, shared: Arc<Shared>) -> Self {
        shared.lock().queues += 1;
        Self { engine, shared }
    }

    /// Hands in a request.
    ///
    /// # Errors
    ///
    /// If as many wait as may; if the engine cannot run the request, since its prompt is empty or has a token outside the
    /// vocabulary, its session is another engine's, a setting of its sampler is out of its range, or a stop sequence is
    /// empty or there is no tokenizer for it; or if the engine failed or the scheduler is gone.
    pub fn submit(&self, request: Request) -> Result<Handle, Error> {
        let Request { session, prompt, options } = &request;
        if !session.engine().is(&self.engine) {
            return Err(engine::Error::ForeignSession { index: 0 }.into());
        }
        self.engine.check(prompt)?;
        options.sampler.validate().map_err(engine::Error::from)?;
        if !options.stop.is_empty() {
            self.engine.tokenizer()?;
        }
        let writer = Writer::new(options.max_tokens, options.stop.clone())?;
        let (events, received) = channel();
        let cancelled = Arc::new(AtomicBool::new(false));

        let mut state = self.shared.lock();
        if let Some(over) = &state.over {
            return Err(over.error());
        }
        let waiting = state.waiting.len();
        if waiting >= self.shared.limit {
            return Err(Error::Full { waiting });
        }
        let id = state.next;
        state.next += 1;
        state.waiting.push_back(Arrival { id, request, writer, events, cancelled: Arc::clone(&cancelled) });
        self.shared.changed.notify_all();
        drop(state);
        Ok(Handle { id, shared: Arc::clone(&self.shared), events: received, cancelled, end: None })
    }

    /// Requests that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.shared.lock().waiting.len()
    }
}

impl Clone for Queue {
    fn clone(&self) -> Self {
        Self::new(self.engine.clone(), Arc::clone(&self.shared))
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.shared.lock().queues -= 1;
        self.shared.changed.notify_all();
    }
}

/// Where what a request comes to goes out: an iterator over its pieces, which waits for each. After an error there are no
/// more.
///
/// Dropping it cancels the request: a place in the queue is free at once, and what a sequence takes before the next pass.
#[derive(Debug)]
pub struct Handle {
    id: u64,
    shared: Arc<Shared>,
    events: Receiver<Event>,
    cancelled: Arc<AtomicBool>,
    end: Option<(FinishReason, Option<Box<Session>>)>,
}

impl Handle {
    /// The next piece, if it is there already.
    pub fn ready(&mut self) -> Option<Result<Piece, Error>> {
        if self.end.is_some() {
            return None;
        }
        match self.events.try_recv() {
            Ok(event) => self.receive(event),
            Err(std::sync::mpsc::TryRecvError::Empty) => None,
            Err(std::sync::mpsc::TryRecvError::Disconnected) => self.receive(Event::Failed(Error::Gone)),
        }
    }

    fn receive(&mut self, event: Event) -> Option<Result<Piece, Error>> {
        match event {
            Event::Piece(piece) => Some(Ok(piece)),
            Event::Ended(reason, session) => {
                self.end = Some((reason, Some(session)));
                None
            }
            Event::Failed(error) => {
                self.end = Some((FinishReason::Error, None));
                Some(Err(error))
            }
        }
    }

    /// Why the request is over, once it is and all its pieces were taken.
    #[must_use]
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.end.as_ref().map(|(reason, _)| *reason)
    }

    /// The session, once the request is over and has not failed. It has read the prompt and all that was generated, the
    /// tokens of a stop sequence too, but no end of text. Its logits were not kept: where nothing is
    /// [pending](Session::pending) it has none until it reads a token.
    #[must_use]
    pub fn into_session(mut self) -> Option<Session> {
        self.end.take()?.1.map(|session| *session)
    }
}

impl Iterator for Handle {
    type Item = Result<Piece, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.end.is_some() {
            return None;
        }
        let event = self.events.recv().unwrap_or(Event::Failed(Error::Gone));
        self.receive(event)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Relaxed);
        let withdrawn = {
            let mut state = self.shared.lock();
            let place = state.waiting.binary_search_by_key(&self.id, |arrival| arrival.id);
            place.ok().and_then(|place| state.waiting.remove(place))
        };
        // What it held is let go of outside of the lock.
        drop(withdrawn);
    }
}
