//! The scheduler against a model of it: requests come, are cancelled and fail at random, and each comes to what it comes to
//! alone, to the bit, within the passes that the module states.
//!
//! Every test runs on the CPU, and on a GPU that is batch-invariant, where there is one.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::sync::OnceLock;

use proptest::prelude::*;
use rwkv_core::rng::SplitMix64;
use rwkv_model::engine::Device;
use rwkv_model::scheduler::{Error, Handle, NoToken, Options, Queue, Request, Scheduler};
use rwkv_model::skip::{self, Skipping};
use rwkv_model::tokenizer::World;
use rwkv_model::{Engine, EngineOptions, FinishReason, Sampler, Session, TextOptions, Tokenizer};
use support::{Tensor, alone, engine, on_cpu, on_gpu, random_model, safetensors};

const VOCAB: usize = 260;

/// A model that ends texts now and then, and whose tokens are the end of text, 256 bytes, and three that the tokenizer does
/// not have.
fn model() -> Vec<u8> {
    let mut model = random_model([2, 1, 64, 64, VOCAB, 6], 7);
    let head = model.iter_mut().find(|of| of.name == "head.weight").unwrap();
    let mut values = head.values();
    values[..64].iter_mut().for_each(|value| *value *= 2.0);
    *head = Tensor::new("head.weight", &head.shape.clone(), &values);
    safetensors(&model)
}

fn engines() -> &'static [Engine] {
    static ENGINES: OnceLock<Vec<Engine>> = OnceLock::new();
    let lines: String = (0..256).map(|b| format!("{} b'\\x{b:02x}' 1\n", b + 1)).collect();
    let world = Tokenizer::World(World::parse(&lines).unwrap());
    let open = |options| {
        let tokenizer = Some(world.clone());
        engine(model(), EngineOptions { tokenizer, pass_tokens: 16, batch_invariant: true, ..options })
    };
    ENGINES.get_or_init(|| [Some(on_cpu()), on_gpu()].into_iter().flatten().map(open).collect())
}

/// Passes by which tokens are handed out later than they are chosen.
fn late(engine: &Engine) -> usize {
    usize::from(engine.report().unwrap().device != "CPU")
}

/// Something to ask for.
#[derive(Clone, Debug)]
struct Ask {
    prompt: usize,
    seed: u64,
    max_tokens: usize,
    sampler: usize,
    stops: bool,
    /// Whether it begins where another session stands.
    forks: bool,
    /// Whether it begins with a state of which no logit is finite.
    poisoned: bool,
}

#[derive(Clone, Debug)]
enum Act {
    Ask(Ask),
    Tick(usize),
    Cancel(usize),
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let ask = (1usize..40, any::<u64>(), 0usize..12, 0usize..3, any::<bool>(), any::<bool>(), 0u8..8);
    let ask = ask.prop_map(|(prompt, seed, max_tokens, sampler, stops, forks, poisoned)| Ask {
        prompt,
        seed,
        max_tokens,
        sampler,
        stops,
        forks,
        poisoned: poisoned == 0,
    });
    let act = prop_oneof![
        5 => ask.prop_map(Act::Ask),
        4 => (1usize..5).prop_map(Act::Tick),
        1 => (0usize..8).prop_map(Act::Cancel),
    ];
    prop::collection::vec(act, 1..24)
}

fn options() -> impl Strategy<Value = Options> {
    let options = (1usize..6, 1usize..6, 0usize..16);
    options.prop_map(|(running, waiting, more)| Options {
        running,
        waiting,
        budget: (running + more).min(16),
    })
}

impl Ask {
    fn request(&self, engine: &Engine, other: &Session) -> Request {
        let mut rng = SplitMix64::new(self.seed);
        let prompt = (0..self.prompt).map(|_| u32::try_from(rng.next_u64() % 256).unwrap()).collect();
        let sampler = [
            Sampler::greedy(),
            Sampler { seed: self.seed, ..Sampler::default() },
            Sampler {
                seed: self.seed,
                temperature: 1.5,
                top_p: 1.0,
                presence_penalty: 2.0,
                frequency_penalty: 0.5,
                ..Sampler::default()
            },
        ][self.sampler];
        let stop = if self.stops { ('A'..='z').map(String::from).collect() } else { Vec::new() };
        let mut session = if self.forks { other.fork() } else { engine.session() };
        if self.poisoned {
            session.start_from(&vec![f32::NAN; engine.state_layout().len()]).unwrap();
        }
        Request { session, prompt, options: TextOptions { sampler, max_tokens: self.max_tokens, stop } }
    }
}

/// What a request comes to.
#[derive(Debug, PartialEq)]
struct Outcome {
    text: String,
    tokens: usize,
    reason: FinishReason,
    /// The position at which no token could be chosen.
    failed_at: Option<u64>,
    /// The state and the position in the end, and what comes next.
    after: Option<After>,
}

/// The bits of a state, the position, and tokens that come next, as long as there are any.
type After = (Vec<u32>, u64, Vec<u32>);

/// All that a session is, in the end.
fn after(mut session: Session) -> After {
    let bits = |x: f32| if x.is_nan() { f32::NAN } else { x }.to_bits();
    let (state, position) = (session.state().unwrap().into_iter().map(bits).collect(), session.position());
    session.prefill(&[3]).unwrap();
    let sampler = Sampler { presence_penalty: 3.0, temperature: 2.0, top_p: 1.0, ..Sampler::default() };
    (state, position, session.generate(sampler).take(3).map_while(Result::ok).collect())
}

/// What it comes to alone.
fn by_itself(request: &Request) -> Outcome {
    let mut session = request.session.fork();
    session.prefill(&request.prompt).unwrap();
    let mut of = session.text(request.options.clone()).unwrap();
    let pieces: Vec<_> = of.by_ref().collect();
    let (reason, tokens) = (of.finish_reason().unwrap(), of.tokens());
    let failed = reason == FinishReason::Error;
    Outcome {
        text: pieces.into_iter().filter_map(Result::ok).collect(),
        tokens,
        reason,
        failed_at: failed.then(|| session.position()),
        after: (!failed).then(|| after(session)),
    }
}

/// A request that was taken.
struct Live {
    handle: Handle,
    want: Outcome,
    text: String,
    /// The tick in which each token came.
    tokens: Vec<usize>,
    failed_at: Option<u64>,
    /// It was handed in after so many ticks, and has its first token and its end after so many.
    since: usize,
    first: usize,
    last: usize,
    /// Passes that it is in, at most.
    passes: usize,
}

impl Live {
    /// Takes what is there after a tick.
    fn look(&mut self, tick: usize) {
        while let Some(piece) = self.handle.ready() {
            match piece {
                Ok(piece) => {
                    self.text.push_str(&piece.text);
                    self.tokens.extend(piece.token.map(|_| tick));
                }
                Err(Error::NoToken { position, why: NoToken::NotFinite }) => self.failed_at = Some(position),
                Err(error) => panic!("{error}"),
            }
        }
        assert!(self.text.starts_with(&self.want.text[..self.text.len().min(self.want.text.len())]), "text");
    }

    fn is_over(&self) -> bool {
        self.handle.finish_reason().is_some()
    }

    /// Checks a request that is over.
    fn check(self, tick: usize) {
        let Self { handle, want, text, tokens, failed_at, first, last, since, .. } = self;
        assert!(tick <= last, "over after {tick} ticks, of {last}, handed in after {since}");
        assert!(tokens.first().is_none_or(|&at| at <= first), "{tokens:?}: first after {first}");
        assert!(tokens.windows(2).all(|of| of[1] == of[0] + 1), "a token in every tick: {tokens:?}");
        let reason = handle.finish_reason().unwrap();
        let got = Outcome {
            text,
            tokens: tokens.len(),
            reason,
            failed_at,
            after: handle.into_session().map(after),
        };
        assert_eq!(got, want, "as alone");
    }
}

/// Takes what there is, and lets those go that are over.
fn look(live: &mut Vec<Live>, tick: usize) {
    live.iter_mut().for_each(|of| of.look(tick));
    live.extract_if(.., |of| of.is_over()).for_each(|of| of.check(tick));
}

fn history(engine: &Engine, options: Options, acts: &[Act]) {
    let (mut scheduler, queue) = Scheduler::new(engine, options).unwrap();
    let mut other = alone(engine, &[9, 8, 7]);
    other.text(TextOptions { max_tokens: 4, ..TextOptions::default() }).unwrap().for_each(drop);
    let (mut live, mut ticks): (Vec<Live>, usize) = (Vec::new(), 0);
    let q = options.budget / options.running;
    let tick = |scheduler: &mut Scheduler, live: &mut Vec<Live>, ticks: &mut usize| {
        let pass = scheduler.tick().unwrap();
        *ticks += 1;
        look(live, *ticks);
        let (pass, running) = (pass.unwrap_or_default(), scheduler.running());
        assert!(pass.generating + pass.read <= options.budget, "{pass:?} beyond {options:?}");
        assert!(running <= options.running && queue.waiting() <= options.waiting, "bounds");
    };
    for act in acts {
        match act {
            Act::Ask(ask) => {
                let request = ask.request(engine, &other);
                let want = by_itself(&request);
                let waiting = queue.waiting();
                match queue.submit(request) {
                    Ok(handle) => {
                        assert!(waiting < options.waiting, "there was room");
                        let before: usize = live.iter().map(|of| of.passes).sum::<usize>() / options.running;
                        let (read, late) = (ask.prompt.div_ceil(q), late(engine));
                        let first = ticks + before + read + late;
                        let passes = read + ask.max_tokens;
                        let last = ticks + before + passes + late;
                        let (text, tokens, failed_at) = (String::new(), Vec::new(), None);
                        let since = ticks;
                        live.push(Live { handle, want, text, tokens, failed_at, since, first, last, passes });
                    }
                    Err(Error::Full { waiting: full }) => {
                        assert_eq!([full, waiting], [options.waiting; 2], "full");
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            Act::Tick(n) => (0..*n).for_each(|_| tick(&mut scheduler, &mut live, &mut ticks)),
            Act::Cancel(n) if !live.is_empty() => drop(live.remove(n % live.len())),
            Act::Cancel(_) => {}
        }
    }
    while !live.is_empty() {
        tick(&mut scheduler, &mut live, &mut ticks);
    }
    while scheduler.tick().unwrap().is_some() {}
    assert_eq!((scheduler.running(), queue.waiting()), (0, 0), "all have left");
}

/// The histories have every way to end in them, or they would test little.
#[test]
fn requests_end_in_every_way() {
    let engine = &engines()[0];
    let mut ways = std::collections::BTreeMap::new();
    for seed in 0..100 {
        let (sampler, stops, poisoned) = (1 + seed % 2, seed % 3 == 0, seed % 8 == 0);
        let of = Ask { seed: seed as u64, sampler, stops, poisoned, ..ask(5, 11) };
        let reason = by_itself(&of.request(engine, &engine.session())).reason;
        *ways.entry(format!("{reason:?}").split('(').next().unwrap().to_owned()).or_insert(0) += 1;
    }
    assert!(ways.len() == 4 && ways.values().all(|&n| n >= 10), "{ways:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn requests_come_to_what_they_come_to_alone(options in options(), acts in acts()) {
        engines().iter().for_each(|engine| history(engine, options, &acts));
    }
}

fn ask(prompt: usize, max_tokens: usize) -> Ask {
    Ask { prompt, seed: 5, max_tokens, sampler: 0, stops: false, forks: false, poisoned: false }
}

/// Of a model that has no end of text.
fn endless(options: EngineOptions) -> Engine {
    engine(
        safetensors(&random_model([1, 1, 64, 16, 256, 4], 7)),
        EngineOptions { pass_tokens: 16, batch_invariant: true, ..options },
    )
}

fn tokens_of(handle: &mut Handle) -> usize {
    std::iter::from_fn(|| handle.ready()).map(Result::unwrap).filter(|piece| piece.token.is_some()).count()
}

/// While a prompt of 300 tokens is read, those that generate get a token in every tick.
#[test]
fn a_long_prompt_stalls_no_one() {
    for options in [Some(on_cpu()), on_gpu()].into_iter().flatten() {
        let engine = endless(options);
        let options = Options { running: 4, waiting: 4, budget: 8 };
        let (mut scheduler, queue) = Scheduler::new(&engine, options).unwrap();
        let other = engine.session();
        let submit = |prompt, max| queue.submit(ask(prompt, max).request(&engine, &other)).unwrap();
        let mut talkers = [submit(1, 200), submit(2, 200)];
        (0..3).for_each(|_| assert!(scheduler.tick().unwrap().is_some(), "busy"));
        let before = talkers.each_mut().map(tokens_of);
        let mut reader = submit(300, 1);
        let mut ticks = 0;
        while tokens_of(&mut reader) == 0 {
            let pass = scheduler.tick().unwrap().unwrap();
            ticks += 1;
            // Where tokens come late, the reader is one more of them then.
            assert_eq!(pass.generating - usize::from(pass.read == 0), 2, "both go on");
        }
        assert_eq!(ticks, 300usize.div_ceil(6) + late(&engine), "all that is left of the budget");
        let after = talkers.each_mut().map(tokens_of);
        assert_eq!(after, [ticks; 2], "a token a tick; before there were {before:?}");
    }
}

/// A cancelled request has left before the next pass, from wherever it was.
#[test]
fn cancelling_frees_at_once() {
    for options in [Some(on_cpu()), on_gpu()].into_iter().flatten() {
        let engine = endless(options);
        let options = Options { running: 1, waiting: 2, budget: 8 };
        let (mut scheduler, queue) = Scheduler::new(&engine, options).unwrap();
        let other = engine.session();
        let submit = |prompt, max| queue.submit(ask(prompt, max).request(&engine, &other));
        let first = submit(100, 100).unwrap();
        scheduler.tick().unwrap();
        let (second, mut third) = (submit(5, 3).unwrap(), submit(6, 3).unwrap());
        assert!(matches!(submit(1, 1), Err(Error::Full { waiting: 2 })), "full");
        drop(second);
        assert_eq!(queue.waiting(), 1, "its place is free");
        let mut fourth = submit(1, 1).unwrap();
        drop(first);
        let pass = scheduler.tick().unwrap().unwrap();
        assert_eq!((scheduler.running(), pass.read, queue.waiting()), (1, 6, 1), "the third is in the pass");
        while scheduler.tick().unwrap().is_some() {}
        assert_eq!((tokens_of(&mut third), tokens_of(&mut fourth)), (3, 1), "the others are served");
    }
}

#[test]
fn what_cannot_be_run_is_refused() {
    for engine in engines() {
        let options = Options { running: 2, waiting: 2, budget: 8 };
        let (scheduler, queue) = Scheduler::new(engine, options).unwrap();
        let good = || ask(3, 3).request(engine, &engine.session());
        let refused = |request: Request| match queue.submit(request) {
            Err(Error::Request(error)) => error,
            other => panic!("{other:?}"),
        };
        use rwkv_model::Error as E;
        let outside = Request { prompt: vec![1, 260], ..good() };
        assert!(matches!(refused(outside), E::Token { token: 260, index: 1, vocab: 260 }), "outside");
        assert!(matches!(refused(Request { prompt: vec![], ..good() }), E::NoTokens), "nothing to read");
        let strange = endless(on_cpu());
        let foreign = Request { session: strange.session(), ..good() };
        assert!(matches!(refused(foreign), E::ForeignSession { .. }), "of another engine");
        let hot = Sampler { temperature: f32::NAN, ..Sampler::default() };
        let hot = Request { options: TextOptions { sampler: hot, ..TextOptions::default() }, ..good() };
        assert!(matches!(refused(hot), E::Sample(_)), "no temperature");
        let stop = |stop: &str| TextOptions { stop: vec![stop.to_owned()], ..TextOptions::default() };
        assert!(matches!(refused(Request { options: stop(""), ..good() }), E::Tokenizer(_)), "an empty stop");
        assert_eq!(queue.waiting(), 0, "none waits");
        drop(scheduler);
        assert!(matches!(queue.submit(good()), Err(Error::Gone)), "the scheduler is gone");

        for (running, waiting, budget) in [(0, 1, 8), (1, 0, 8), (9, 1, 8), (1, 1, 17)] {
            let options = Options { running, waiting, budget };
            let error = Scheduler::new(engine, options).unwrap_err();
            assert!(matches!(error, Error::Options { max_budget: 16, .. }), "{options:?}: {error}");
        }
    }
    let skips = Skipping::new(skip::Middle::default());
    let skipping = engines()[0].skipping(Some(skips)).unwrap();
    let error = Scheduler::new(&skipping, Options { running: 1, waiting: 1, budget: 1 }).unwrap_err();
    assert!(matches!(error, Error::Skips), "{error}");
    let bare = engine(safetensors(&random_model([1, 1, 64, 16, 50, 4], 7)), on_cpu());
    let (_scheduler, queue) = Scheduler::new(&bare, Options { running: 1, waiting: 1, budget: 1 }).unwrap();
    let stop = TextOptions { stop: vec!["a".to_owned()], ..TextOptions::default() };
    let request = Request { session: bare.session(), prompt: vec![1], options: stop };
    let refused = queue.submit(request);
    assert!(
        matches!(refused, Err(Error::Request(rwkv_model::Error::NoTokenizer { vocab: 50 }))),
        "{refused:?}"
    );
}

/// A thread ticks, others ask: all are served, and the thread ends with the last queue.
#[test]
fn on_a_thread() {
    for engine in engines() {
        let options = Options { running: 3, waiting: 64, budget: 16 };
        let (scheduler, queue) = Scheduler::new(engine, options).unwrap();
        let thread = std::thread::spawn(move || scheduler.run());
        let serve = |queue: Queue, seed| {
            let other = engine.session();
            let request = Ask { seed, sampler: 1, ..ask(9, 8) }.request(engine, &other);
            let want = by_itself(&request);
            let mut handle = queue.submit(request).unwrap();
            let text: String = handle.by_ref().map(|piece| piece.unwrap().text).collect();
            assert_eq!((text, handle.finish_reason()), (want.text, Some(want.reason)), "as alone");
        };
        std::thread::scope(|scope| {
            (0..6).for_each(|seed| {
                let queue = queue.clone();
                scope.spawn(move || serve(queue, seed));
            });
        });
        assert!(!thread.is_finished(), "it waits for more");
        drop(queue);
        thread.join().unwrap().unwrap();
    }
}

/// Whoever waits for a scheduler that is dropped is told.
#[test]
fn a_scheduler_that_is_dropped() {
    let engine = &engines()[0];
    let (mut scheduler, queue) =
        Scheduler::new(engine, Options { running: 1, waiting: 4, budget: 4 }).unwrap();
    let submit = || queue.submit(ask(9, 9).request(engine, &engine.session())).unwrap();
    let (mut runs, mut waits) = (submit(), submit());
    scheduler.tick().unwrap();
    drop(scheduler);
    for handle in [&mut runs, &mut waits] {
        let all: Vec<_> = handle.by_ref().collect();
        assert!(matches!(all[..], [Err(Error::Gone)]), "{all:?}");
        assert_eq!(handle.finish_reason(), Some(FinishReason::Error), "over");
    }
}

/// The engine alone, one sequence to a pass, as a device without fusion has.
#[test]
fn one_to_a_pass() {
    if on_gpu().is_none() {
        return;
    }
    let engine = endless(EngineOptions { device: Device::Gpu(None), fused: false, ..on_cpu() });
    let error = Scheduler::new(&engine, Options { running: 2, waiting: 1, budget: 8 }).unwrap_err();
    assert!(matches!(error, Error::Options { max_running: 1, .. }), "{error}");
    let options = Options { running: 1, waiting: 3, budget: 8 };
    let (mut scheduler, queue) = Scheduler::new(&engine, options).unwrap();
    let submit = |prompt, max| queue.submit(ask(prompt, max).request(&engine, &engine.session())).unwrap();
    let mut all = [submit(9, 3), submit(1, 5), submit(20, 0)];
    while scheduler.tick().unwrap().is_some() {}
    assert_eq!(all.each_mut().map(tokens_of), [3, 5, 0], "one after the other");
    let positions = all.map(|handle| handle.into_session().unwrap().position());
    assert_eq!(positions, [12, 6, 20], "each token was read");
}
