//! Many requests on one engine: sequences join and leave between passes, and a long prompt stalls no one.
//!
//! A [`Scheduler`] owns the sequences that run and moves all of them on by one pass at each [`tick`](Scheduler::tick); a
//! [`Queue`] takes requests from any thread; a [`Handle`] is where a request's tokens and text come out, and dropping it
//! cancels the request. [`Scheduler::run`] ticks until there is no queue left, on a thread of the caller's.
//!
//! ```no_run
//! use rwkv_model::scheduler::{Options, Request, Scheduler};
//! use rwkv_model::{Engine, TextOptions};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let engine = Engine::open("model.safetensors")?;
//! engine.prepare()?; // or the first requests wait for what is compiled
//! let (scheduler, queue) = Scheduler::new(&engine, Options::default())?;
//! let thread = std::thread::spawn(move || scheduler.run());
//!
//! let prompt = engine.tokenizer()?.encode("The Eiffel Tower");
//! let mut answer = queue.submit(Request { session: engine.session(), prompt, options: TextOptions::default() })?;
//! for piece in &mut answer {
//!     print!("{}", piece?.text);
//! }
//! let session = answer.into_session(); // to save, or to go on with
//! drop(queue);
//! thread.join().expect("it does not panic")?;
//! # Ok(())
//! # }
//! ```
//!
//! # What a pass holds
//!
//! Of a budget of `B` tokens, with at most `R` sequences running, `R <= B`:
//!
//! - one token of each sequence that generates;
//! - of the rest, an equal share for each prompt that is being read; what one does not need, longer ones get.
//!
//! A request runs as soon as fewer than `R` do, first come, first served. From this follows, whatever others ask for:
//!
//! - A sequence that generates gets a token from every pass.
//! - A prompt is read by `q = floor(B / R)` tokens a pass at least, and so `P` tokens within `ceil(P / q)` passes. The last of
//!   these chooses the first token.
//! - A request of `P` tokens that generates `N` is over within `ceil(P / q) + N` passes from its first. It is in the first
//!   pass after at most `floor(S / R)` others, where `S` is the sum of this over those before it that are not over.
//!
//! On a GPU, tokens are chosen on the device, and each pass is under way while the host hands out what the one before it
//! chose: tokens come one pass later, and a sequence that ends is one row too many in one pass.
//!
//! # What does not matter
//!
//! Invariant: a request's tokens, its text and the session that it leaves are those of [`Session::text`](crate::Session::text) alone, whatever runs
//! beside it, to the bit where the engine [promises it](crate). Tokens that the tokenizer does not have are never chosen.
//!
//! Invariant: one request's failure is its own. That of the device is everyone's, and told to everyone.
//!
//! Invariant: neither the requests that wait nor those that run are more than the options say, and what waits in a handle
//! is no more than the request asked for.

mod queue;
mod running;

use std::collections::VecDeque;
use std::sync::Arc;

use rayon::prelude::*;

pub use self::queue::{Handle, Piece, Queue, Request};
use self::queue::{Over, Shared};
use self::running::{Refused, Running, Share};
use crate::engine::{self, Engine};
use crate::gpu::{self, Chooser, Chosen};
use crate::skip::Mask;

/// Why a request is not run, or not on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Options that cannot be.
    #[error("{0:?}: the engine has passes of {max_running} sequences and {max_budget} tokens", options)]
    Options {
        /// The options.
        options: Options,
        /// Sequences in a pass of the engine, at most.
        max_running: usize,
        /// Tokens in a pass of the engine, at most: [`EngineOptions::pass_tokens`](crate::EngineOptions::pass_tokens), or
        /// as far as the device goes.
        max_budget: usize,
    },
    /// Sequences that leave layers out do not share passes.
    #[error("the engine leaves layers out: its sequences do not share passes")]
    Skips,
    /// As many requests wait as may.
    #[error("{waiting} requests are waiting, as many as may")]
    Full {
        /// How many.
        waiting: usize,
    },
    /// The request is not one that the engine can run, or there is no room for it beside the others.
    #[error(transparent)]
    Request(#[from] engine::Error),
    /// Logits of which no token can be chosen.
    #[error("after {position} tokens, {why}")]
    NoToken {
        /// Tokens that the sequence had read.
        position: u64,
        /// What is wrong with its logits.
        why: NoToken,
    },
    /// The engine failed, and all requests with it.
    #[error("the engine failed: {0}")]
    Engine(#[source] Arc<engine::Error>),
    /// The scheduler was dropped.
    #[error("the scheduler is gone")]
    Gone,
}

/// What can be wrong with logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoToken {
    /// One is not finite, before the penalties or after them.
    #[error("a logit is not finite")]
    NotFinite,
    /// Every token is masked.
    #[error("all tokens are masked")]
    AllMasked,
}

/// How requests are taken and packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Sequences that run side by side, at most; 1 at least. On a GPU,
    /// [`EngineOptions::sessions`](crate::EngineOptions::sessions) is best as many.
    pub running: usize,
    /// Requests that wait, at most; 1 at least, since all pass through the queue.
    pub waiting: usize,
    /// Tokens of a pass, at most, and no fewer than sequences run. With more, prompts are read faster, and sequences that
    /// generate wait longer for each token.
    pub budget: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { running: 128, waiting: 1024, budget: 512 }
    }
}

/// What was in a pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pass {
    /// Sequences that generate: a token of each.
    pub generating: usize,
    /// Tokens of prompts.
    pub read: usize,
}

/// Runs requests side by side.
#[derive(Debug)]
pub struct Scheduler {
    engine: Engine,
    options: Options,
    shared: Arc<Shared>,
    /// In the order in which they came.
    running: Vec<Running>,
    /// On a GPU, what chooses.
    chooser: Option<Chooser>,
    /// Passes whose tokens were not handed out, the oldest first.
    flights: VecDeque<Flight>,
}

/// The tokens that a pass chose.
#[derive(Debug)]
struct Flight {
    /// For whom.
    ids: Vec<u64>,
    tokens: Tokens,
}

#[derive(Debug)]
enum Tokens {
    Host(Vec<Result<u32, engine::Error>>),
    Device(Chosen),
}

impl Scheduler {
    /// A scheduler, and the queue that it takes requests from.
    ///
    /// # Errors
    ///
    /// If an option is out of its range, or beyond the engine's passes; if the engine leaves layers out; or if the GPU failed.
    pub fn new(engine: &Engine, options: Options) -> Result<(Self, Queue), Error> {
        let Options { running, budget, waiting } = options;
        let (max_running, max_budget) = (engine.segments(), engine.pass_tokens());
        if waiting == 0 || running == 0 || running > budget.min(max_running) || budget > max_budget {
            return Err(Error::Options { options, max_running, max_budget });
        }
        if engine.skips().is_some() {
            return Err(Error::Skips);
        }
        let chooser = engine.gpu().map(|gpu| gpu.chooser(engine.mute()));
        let chooser = chooser.transpose().map_err(engine::Error::from)?;
        let shared = Arc::new(Shared::new(waiting));
        let queue = Queue::new(engine.clone(), Arc::clone(&shared));
        let (engine, running, flights) = (engine.clone(), Vec::new(), VecDeque::new());
        Ok((Self { engine, options, shared, running, chooser, flights }, queue))
    }

    /// Requests that run.
    #[must_use]
    pub const fn running(&self) -> usize {
        self.running.len()
    }

    /// Runs passes until every [`Queue`] is dropped and every request is over; waits while there is none.
    ///
    /// # Errors
    ///
    /// If the engine failed. Every request was told so.
    pub fn run(mut self) -> Result<(), Error> {
        while self.tick()?.is_some() || self.shared.wait() {}
        Ok(())
    }

    /// Lets go of requests that were cancelled, takes up those for which there is room, runs a pass over all, and hands out
    /// what was chosen. Says what was in the pass; nothing, if there was nothing to do.
    ///
    /// # Errors
    ///
    /// If the engine failed. Every request was told so, and those to come will be.
    pub fn tick(&mut self) -> Result<Option<Pass>, Error> {
        self.advance().map_err(|error| {
            let error = Arc::new(error);
            self.flights.clear();
            self.running.drain(..).for_each(|of| of.fail(Error::Engine(Arc::clone(&error))));
            self.shared.end(Over::Failed(Arc::clone(&error)));
            Error::Engine(error)
        })
    }

    fn advance(&mut self) -> Result<Option<Pass>, engine::Error> {
        self.leave();
        self.admit()?;
        let pass = self.pass()?;
        // On a GPU, one pass is under way while the one before it is handed out.
        let ahead = usize::from(self.chooser.is_some() && pass.is_some());
        let waited = self.flights.len() > ahead;
        while self.flights.len() > ahead {
            self.collect()?;
        }
        self.leave();
        Ok(pass.or(waited.then(Pass::default)))
    }

    /// Takes up requests that wait, while there is room.
    fn admit(&mut self) -> Result<(), engine::Error> {
        while self.running.len() < self.options.running
            && let Some(arrival) = self.shared.take()
        {
            let mut of = Running::new(arrival);
            if let (Some(gpu), Some(chooser), Some(counts)) =
                (self.engine.gpu(), &mut self.chooser, of.counted())
            {
                match gpu.count(chooser, counts).map_err(engine::Error::from) {
                    Ok(row) => of.counts = Some(row),
                    Err(error) if is_of_all(&error) => {
                        self.running.push(of);
                        return Err(error);
                    }
                    Err(error) => {
                        of.fail(Error::Request(error));
                        continue;
                    }
                }
            }
            self.running.push(of);
        }
        Ok(())
    }

    /// Runs a pass over all, if there are any.
    fn pass(&mut self) -> Result<Option<Pass>, engine::Error> {
        loop {
            let shares = self.shares();
            let Some(last) = shares.iter().map(|of| of.index).max() else { return Ok(None) };
            match self.submit(&shares) {
                Ok(()) => {
                    let count = |prompts| shares.iter().filter(move |of| of.of_prompt == prompts);
                    let read = count(true).map(|of| of.tokens).sum();
                    return Ok(Some(Pass { generating: count(false).count(), read }));
                }
                Err(error) if is_of_all(&error) => return Err(error),
                // Where there is no memory for so many sequences there is for fewer: the last to come goes.
                Err(error) => {
                    self.running[last].failed = Some(Error::Request(error));
                    self.leave();
                }
            }
        }
    }

    /// What the next pass is made of: those that generate, in their order, and then prompts.
    fn shares(&self) -> Vec<Share> {
        let all = || self.running.iter().enumerate();
        let generating = all().filter(|(_, of)| of.generates());
        let one =
            |(index, of): (usize, &Running)| Share { index, tokens: 1, of_prompt: false, choose: of.wants() };
        let mut shares: Vec<Share> = generating.map(one).collect();
        let mut room = self.options.budget - shares.len();
        let mut prompts: Vec<(usize, usize)> =
            all().map(|(index, of)| (of.unread(), index)).filter(|&(unread, _)| unread > 0).collect();
        // From the shortest on, each takes no more than its part of what is left.
        prompts.sort_unstable();
        let n = prompts.len();
        for (before, (unread, index)) in prompts.into_iter().enumerate() {
            let tokens = unread.min(room / (n - before));
            room -= tokens;
            let choose = tokens == unread && self.running[index].wants();
            shares.push(Share { index, tokens, of_prompt: true, choose });
        }
        shares
    }

    /// Begins a pass. If that fails, no sequence has changed.
    fn submit(&mut self, shares: &[Share]) -> Result<(), engine::Error> {
        let Self { engine, running, chooser, .. } = self;
        let ids = shares.iter().filter(|of| of.choose).map(|of| running[of.index].id).collect();
        let mut by_index: Vec<_> = running.iter_mut().map(Some).collect();
        let mut parts: Vec<_> =
            shares.iter().filter_map(|share| Some((share, by_index[share.index].take()?))).collect();
        let tokens = match (engine.gpu(), chooser) {
            (Some(gpu), Some(chooser)) => {
                let rows = parts.iter_mut().map(|(share, of)| of.part(share));
                let mut rows = rows.collect::<Result<Vec<_>, _>>()?;
                let chosen = gpu.pass_choosing(chooser, &mut rows)?;
                for (share, of) in &mut parts {
                    of.read_on_device(share);
                }
                Tokens::Device(chosen)
            }
            _ => {
                let jobs = parts.iter_mut().map(|(share, of)| of.job(share));
                engine.run(&mut jobs.collect::<Result<Vec<_>, _>>()?, &Mask::default())?;
                Tokens::Host(Vec::new())
            }
        };
        let mut places = 0..;
        for (share, of) in &mut parts {
            of.moved(share, if share.choose { places.next() } else { None });
        }
        let tokens = match tokens {
            Tokens::Host(_) => {
                let choosing = parts.par_iter().filter(|(share, _)| share.choose);
                Tokens::Host(choosing.map(|(_, of)| of.choose(engine.mute())).collect())
            }
            device => device,
        };
        self.flights.push_back(Flight { ids, tokens });
        Ok(())
    }

    /// Waits for the oldest pass under way, and hands out what it chose.
    fn collect(&mut self) -> Result<(), engine::Error> {
        let Some(Flight { ids, tokens }) = self.flights.pop_front() else { return Ok(()) };
        let tokens: Vec<Result<u32, Refused>> = match (tokens, self.engine.gpu(), &mut self.chooser) {
            (Tokens::Device(chosen), Some(gpu), Some(chooser)) => {
                gpu.chosen(chooser, chosen)?.into_iter().map(Refused::on_device).collect()
            }
            (Tokens::Device(_), ..) => return Err(engine::Error::ForeignState),
            (Tokens::Host(tokens), ..) => tokens.into_iter().map(|of| of.map_err(Refused::from)).collect(),
        };
        let tokenizer = self.engine.tokenizer().ok();
        for (id, token) in ids.into_iter().zip(tokens) {
            // Those that have left have no use for it.
            if let Ok(index) = self.running.binary_search_by_key(&id, |of| of.id) {
                self.running[index].take(token, tokenizer);
            }
        }
        Ok(())
    }

    /// Lets those go that are through, were cancelled, or failed.
    fn leave(&mut self) {
        for of in self.running.extract_if(.., |of| of.leaves()) {
            if let (Some(chooser), Some(row)) = (&mut self.chooser, of.counts) {
                chooser.forget(row);
            }
            of.end(&self.engine);
        }
    }
}

/// Those that wait, and those that run, are told.
impl Drop for Scheduler {
    fn drop(&mut self) {
        self.shared.end(Over::Gone);
    }
}

/// Whether an error is that of the device, and not of what was asked of it.
const fn is_of_all(error: &engine::Error) -> bool {
    use gpu::Error::{Device, Lost, Map, Poll};
    matches!(error, engine::Error::Gpu(Device(_) | Lost(_) | Map(_) | Poll(_)))
}

#[cfg(test)]
mod tests {
    use super::{Error, Options, Request, Scheduler};
    use crate::engine::{self, Device, Engine, EngineOptions};
    use crate::{TextOptions, gpu};

    /// Those that run and those that wait are told, and so is whoever comes later.
    #[test]
    fn a_device_that_is_lost() {
        if rwkv_kernels::gpu::device_for_tests().is_none() {
            return;
        }
        let model = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/books-10m/model.safetensors");
        let options = EngineOptions { device: Device::Gpu(None), ..EngineOptions::default() };
        let engine = Engine::open_with(model, options, &|_| {}).unwrap();
        let options = Options { running: 1, waiting: 2, budget: 8 };
        let (mut scheduler, queue) = Scheduler::new(&engine, options).unwrap();
        let request =
            || Request { session: engine.session(), prompt: vec![65; 5], options: TextOptions::default() };
        let lost = |error: &Error| match error {
            Error::Engine(error) => matches!(**error, engine::Error::Gpu(gpu::Error::Lost(_))),
            _ => false,
        };
        let mut handles = [queue.submit(request()).unwrap(), queue.submit(request()).unwrap()];
        scheduler.tick().unwrap();
        assert_eq!((scheduler.running(), queue.waiting()), (1, 1), "one runs, one waits");
        engine.gpu().unwrap().device().device().destroy();
        let error = (0..3).find_map(|_| scheduler.tick().err()).unwrap();
        assert!(lost(&error), "{error}");
        for handle in &mut handles {
            let last = handle.last().unwrap();
            assert!(last.as_ref().is_err_and(lost), "{last:?}");
        }
        assert_eq!((scheduler.running(), queue.waiting()), (0, 0), "none is left");
        assert!(lost(&queue.submit(request()).unwrap_err()), "nor taken");
        assert!(scheduler.tick().unwrap().is_none(), "nothing to do");
    }
}
