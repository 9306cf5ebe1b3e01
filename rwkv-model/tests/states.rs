//! States that are held in less, or written seldom: against states in single precision, and against their own histories.
//!
//! Every test runs on the CPU, and on the GPU where there is one.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::sync::OnceLock;

use proptest::prelude::*;
use rwkv_core::Real;
use rwkv_core::compare::nmse;
use rwkv_core::model::{Compute, Logits, Model, Options, Segment, State};
use rwkv_core::ops::linear::Matrix;
use rwkv_core::rng::SplitMix64;
use rwkv_model::sample::Sampler;
use rwkv_model::{Engine, EngineOptions, Error, Resident, ResidentRounding, Session, StateFormat};
use rwkv_state::format::SparseRule;
use rwkv_state::resident::{Advance, Error as Refused};
use support::{engine, on_cpu, on_gpu, random_model, safetensors, shown, try_engine};

const VOCAB: usize = 64;

/// In halves, which both devices hold exactly.
fn model() -> Vec<u8> {
    let tensors: Vec<_> = random_model([2, 2, 64, 104, VOCAB, 6], 7).iter().map(|of| of.to("F16")).collect();
    safetensors(&tensors)
}

/// With products that are exact but for rounding: cooperative matrices take halves.
fn devices() -> Vec<EngineOptions> {
    [Some(on_cpu()), gpu()].into_iter().flatten().collect()
}

fn gpu() -> Option<EngineOptions> {
    on_gpu().map(|options| EngineOptions { portable: true, ..options })
}

/// An engine that holds states so, on every device; the same sequence is the same bits whatever is beside it.
fn engines(state: Resident) -> Vec<Engine> {
    let of =
        |options| engine(model(), EngineOptions { state, batch_invariant: true, pass_tokens: 16, ..options });
    devices().into_iter().map(of).collect()
}

/// States in single precision, written at every token, on the CPU.
fn plain() -> &'static Engine {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    ENGINE.get_or_init(|| engine(model(), on_cpu()))
}

/// What comes of tokens: logits and state, and how far single precision in plain loops is off, as mean squares. What
/// rounding does to this model on these tokens, another order of summation may do as well, and a few times over.
struct Exact {
    logits: Vec<f64>,
    state: Vec<f64>,
    off: [f64; 2],
}

/// So many times the error of plain loops.
const FACTOR: f64 = 6.0;

fn exact(tokens: &[u32]) -> Exact {
    fn run<R: Real>(model: &Model<R, Matrix<f32>>, tokens: &[u32]) -> [Vec<R>; 2]
    where
        Matrix<f32>: Compute<R>,
    {
        let mut state = State::new(&model.config);
        let mut segment = [Segment { tokens, state: &mut state, logits: Logits::Last }];
        let logits =
            if tokens.is_empty() { Vec::new() } else { model.forward(&mut segment, Options::default()) };
        [logits, [state.att_shift, state.wkv, state.ffn_shift].concat()]
    }
    static EXACT: OnceLock<Model<f64, Matrix<f32>>> = OnceLock::new();
    static PLAIN: OnceLock<Model<f32, Matrix<f32>>> = OnceLock::new();
    let checkpoint = || support::open(model(), None).unwrap();
    let exact = EXACT.get_or_init(|| checkpoint().load(&|_| {}).unwrap());
    let plain = PLAIN.get_or_init(|| checkpoint().load(&|_| {}).unwrap());
    let ([logits, state], off) = (run(exact, tokens), run(plain, tokens));
    let error = |got: &[f32], want: &[f64]| FACTOR.powi(2) * nmse(got, want, f64::INFINITY).unwrap_or(0.0);
    let off = [error(&off[0], &logits), error(&off[1], &state)];
    Exact { logits, state, off }
}

/// Ways to hold states, and how far logits may be from the exact ones beyond rounding, as mean squares: rounding a state
/// to halves moves it by `2^-12` of itself, to bytes by `1/500` of its block, and the random model amplifies that a little.
fn ways() -> &'static [(Resident, f64, Vec<Engine>)] {
    static ENGINES: OnceLock<Vec<(Resident, f64, Vec<Engine>)>> = OnceLock::new();
    let all = [
        (Resident::lazy(4), 1e-12),
        (Resident::lazy(1), 1e-12),
        (Resident::f16(3), 1e-4),
        (Resident::f16_dithered(), 1e-4),
        (Resident::int8(16), 1e-2),
    ];
    ENGINES.get_or_init(|| all.map(|(state, limit)| (state, limit, engines(state))).into())
}

/// On the GPU without batch invariance, where single tokens and prompts have kernels of their own, and a prompt's passes
/// round less often.
fn by_default(index: usize) -> Option<&'static Engine> {
    static ENGINES: OnceLock<Vec<Engine>> = OnceLock::new();
    let of = |options: EngineOptions| {
        let states = ways().iter().map(|(state, ..)| *state);
        states
            .map(|state| engine(model(), EngineOptions { state, pass_tokens: 32, ..options.clone() }))
            .collect()
    };
    ENGINES.get_or_init(|| gpu().map(of).unwrap_or_default()).get(index)
}

fn draw(n: usize, rng: &mut SplitMix64) -> Vec<u32> {
    (0..n).map(|_| u32::try_from(rng.next_u64() % VOCAB as u64).unwrap()).collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().copied().map(f64::from).collect()
}

/// What happens to a session.
#[derive(Clone, Debug)]
enum Act {
    Prefill(usize),
    Accept,
    Generate(usize),
    Fold,
    Rollback(usize),
    Fork,
    Switch(usize),
    Snapshot,
    Restore(usize),
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        4 => (1usize..40).prop_map(Act::Prefill),
        3 => Just(Act::Accept),
        2 => (1usize..6).prop_map(Act::Generate),
        1 => Just(Act::Fold),
        4 => (0usize..6).prop_map(Act::Rollback),
        1 => Just(Act::Fork),
        2 => (0usize..4).prop_map(Act::Switch),
        1 => Just(Act::Snapshot),
        1 => (0usize..4).prop_map(Act::Restore),
    ];
    prop::collection::vec(act, 1..20)
}

/// A session, what it read, and which of that it generated; and what it showed after the tokens that can be undone.
#[derive(Clone)]
struct Told {
    session: Session,
    tokens: Vec<(u32, bool)>,
    pending: usize,
    /// Whether there are logits, and whether there are again once all that is pending is undone.
    logits: bool,
    floor: bool,
    past: Vec<(Vec<f32>, Vec<f32>, u64)>,
}

impl Told {
    fn read(&mut self, resident: Resident, tokens: &[u32], generated: bool) {
        let Advance { pending, folds } = resident.advance(self.pending, tokens.len());
        if folds || self.pending == 0 {
            self.floor = self.logits && pending == tokens.len();
        }
        (self.pending, self.logits) = (pending, true);
        self.tokens.extend(tokens.iter().map(|&token| (token, generated)));
    }

    /// That it is where exact arithmetic is, within `limit` and what rounding does, and remembers what it should.
    fn check(&self, limit: f64) -> Result<(), TestCaseError> {
        let tokens: Vec<u32> = self.tokens.iter().map(|(token, _)| *token).collect();
        prop_assert_eq!(self.session.position(), tokens.len() as u64, "position");
        prop_assert_eq!(self.session.pending(), self.pending, "pending");
        let want = exact(&tokens);
        prop_assert_eq!(self.session.logits().is_ok(), self.logits, "logits");
        if let Ok(got) = self.session.logits() {
            let near = nmse(got, &want.logits, limit + want.off[0]);
            prop_assert!(near.is_ok(), "logits after {} tokens: {near:?}", tokens.len());
        }
        let near = nmse(&self.session.state().unwrap(), &want.state, limit + want.off[1]);
        prop_assert!(tokens.is_empty() || near.is_ok(), "state after {} tokens: {near:?}", tokens.len());
        Ok(())
    }
}

fn histories(index: usize) {
    let (resident, limit, engines) = &ways()[index];
    let config = ProptestConfig { cases: 6, failure_persistence: None, ..ProptestConfig::default() };
    // By default logits that are computed anew come from another form, and are as `Told::check` wants them.
    let all =
        engines.iter().map(|engine| (engine, true)).chain(by_default(index).map(|engine| (engine, false)));
    for (engine, same_bits) in all {
        proptest!(config.clone(), |(acts in acts(), seed: u64)| {
            let mut rng = SplitMix64::new(seed);
            let (session, tokens, past) = (engine.session(), Vec::new(), Vec::new());
            let start = Told { session, tokens, pending: 0, logits: false, floor: false, past };
            let (mut all, mut snapshots, mut current) = (vec![start], Vec::new(), 0);
            for act in acts {
                let others: Vec<_> = all.iter().map(|told| told.session.state().unwrap()).collect();
                let told = &mut all[current];
                match act {
                    Act::Prefill(n) => {
                        let tokens = draw(n, &mut rng);
                        told.session.prefill(&tokens).unwrap();
                        told.read(*resident, &tokens, false);
                    }
                    Act::Accept => {
                        let tokens = draw(1, &mut rng);
                        told.session.accept(tokens[0]).unwrap();
                        told.read(*resident, &tokens, true);
                    }
                    Act::Generate(n) => {
                        if told.session.logits().is_err() {
                            let tokens = draw(1, &mut rng);
                            told.session.prefill(&tokens).unwrap();
                            told.read(*resident, &tokens, false);
                        }
                        let tokens: Vec<u32> =
                            told.session.generate(Sampler::greedy()).take(n).map(Result::unwrap).collect();
                        tokens.iter().for_each(|&token| told.read(*resident, &[token], true));
                    }
                    Act::Fold => {
                        told.session.fold().unwrap();
                        told.pending = 0;
                    }
                    Act::Rollback(n) if n > told.pending => {
                        let before = shown(&told.session);
                        let refused = told.session.rollback(n);
                        prop_assert!(
                            matches!(refused, Err(Error::Rollback { asked, pending }) if (asked, pending) == (n, told.pending)),
                            "{refused:?}"
                        );
                        prop_assert!(shown(&told.session) == before, "an error changes nothing");
                    }
                    Act::Rollback(n) => {
                        told.session.rollback(n).unwrap();
                        told.tokens.truncate(told.tokens.len() - n);
                        told.pending -= n;
                        if n > 0 {
                            told.logits = told.pending > 0 || told.floor;
                        }
                        // As it was, bit for bit, at that position since the last fold.
                        let now = shown(&told.session);
                        told.past.retain(|past| past.2 <= now.2);
                        for past in told.past.iter().filter(|past| n > 0 && past.2 == now.2) {
                            // A fold has rounded what nothing is pending after.
                            prop_assert!(past.0 == now.0 || told.pending == 0, "rolled back to {}", now.2);
                            prop_assert!(past.1 == now.1 || !same_bits || !told.logits || past.1.is_empty(), "logits at {}", now.2);
                        }
                    }
                    Act::Fork => {
                        let fork = Told { session: told.session.fork(), ..told.clone() };
                        all.push(fork);
                    }
                    Act::Switch(to) => current = to % all.len(),
                    Act::Snapshot => snapshots.push((told.session.snapshot(), told.clone())),
                    Act::Restore(from) => {
                        if let Some((snapshot, then)) = snapshots.get(from) {
                            told.session.restore(snapshot).unwrap();
                            prop_assert!(shown(&told.session) == shown(&then.session), "restored");
                            *told = Told { session: told.session.clone(), ..then.clone() };
                        }
                    }
                }
                for (index, (told, before)) in all.iter().zip(&others).enumerate() {
                    prop_assert!(index == current || told.session.state().unwrap() == *before, "{} stands still", index);
                }
                let told = &mut all[current.min(others.len() - 1)];
                told.check(*limit)?;
                told.past.retain(|past| past.2 + told.pending as u64 >= told.session.position());
                told.past.push(shown(&told.session));
            }
            // What is remembered of generated tokens is what was generated and not undone.
            for told in &all {
                let path = tempfile::NamedTempFile::new().unwrap();
                told.session.save(path.path(), StateFormat::F32).unwrap();
                let counts = rwkv_state::Snapshot::load(path.path()).unwrap().counts;
                let mut want = std::collections::BTreeMap::new();
                told.tokens.iter().filter(|of| of.1).for_each(|of| *want.entry(of.0).or_insert(0u32) += 1);
                prop_assert_eq!(counts, want, "counts");
            }
        });
    }
}

#[test]
fn histories_of_lazy_states() {
    histories(0);
    histories(1);
}

#[test]
fn histories_of_halves() {
    histories(2);
    histories(3);
}

#[test]
fn histories_of_bytes() {
    histories(4);
}

/// A sequence is the same bits whatever is beside it, and however its tokens are spread over calls.
#[test]
fn splits_and_company_do_not_matter() {
    for (resident, _, engines) in ways() {
        for engine in engines {
            let mut rng = SplitMix64::new(3);
            let texts = [37, 1, 20, 5].map(|n| draw(n, &mut rng));
            let alone = texts.each_ref().map(|text| {
                let mut session = engine.session();
                session.prefill(text).unwrap();
                session
            });
            let mut together = [(); 4].map(|()| engine.session());
            let mut rest = texts.each_ref().map(Vec::as_slice);
            while rest.iter().any(|rest| !rest.is_empty()) {
                let mut batch = Vec::new();
                for (session, rest) in together.iter_mut().zip(&mut rest) {
                    let (now, later) = rest.split_at(rest.len().min(1 + (rng.next_u64() % 7) as usize));
                    *rest = later;
                    if !now.is_empty() {
                        batch.push((session, now));
                    }
                }
                engine.step(&mut batch).unwrap();
            }
            for (alone, together) in alone.iter().zip(&together) {
                assert!(
                    shown(alone) == shown(together),
                    "{resident:?} on {}",
                    engine.report().unwrap().device
                );
                assert_eq!(alone.pending(), together.pending(), "{resident:?}");
            }
        }
    }
}

/// Without batch invariance a single token has a kernel form of its own, and a prompt another: they agree, and undo what the
/// others did.
#[test]
fn forms_agree() {
    for (index, (state, limit, invariant)) in ways().iter().enumerate() {
        let Some(engine) = by_default(index) else { return };
        let mut rng = SplitMix64::new(5);
        let text = draw(50, &mut rng);
        let mut session = engine.session();
        session.prefill(&text[..9]).unwrap();
        text[9..30].iter().for_each(|&token| session.prefill(&[token]).unwrap());
        session.prefill(&text[30..]).unwrap();
        let want = exact(&text);
        nmse(session.logits().unwrap(), &want.logits, *limit + want.off[0]).unwrap();
        let mut other = invariant[1].session();
        other.prefill(&text).unwrap();
        assert_eq!(session.pending(), other.pending(), "{state:?}");
        let undo = session.pending();
        session.rollback(undo).unwrap();
        let want = exact(&text[..50 - undo]);
        nmse(&session.state().unwrap(), &want.state, *limit + want.off[1]).unwrap();
        let has_scan =
            |of: &Engine| of.report().unwrap().kernels.iter().any(|of| of.starts_with("wkv7_scan"));
        assert_eq!([has_scan(engine), has_scan(&invariant[1])], [true, false], "{state:?}");
    }
}

/// Prompts and single tokens side by side, in the form for prompts.
#[test]
fn prompts_beside_tokens() {
    for (index, (state, limit, _)) in ways().iter().enumerate() {
        let Some(engine) = by_default(index) else { return };
        let mut rng = SplitMix64::new(11);
        let mut sessions = [(); 4].map(|()| engine.session());
        let mut texts = [(); 4].map(|()| Vec::new());
        let mut pending = [0; 4];
        for lengths in [[12, 1, 5, 2], [1, 9, 1, 4], [3, 1, 20, 1]] {
            let parts = lengths.map(|n| draw(n, &mut rng));
            let mut batch: Vec<_> =
                sessions.iter_mut().zip(&parts).map(|(of, part)| (of, &part[..])).collect();
            engine.step(&mut batch).unwrap();
            for (((session, text), pending), part) in
                sessions.iter().zip(&mut texts).zip(&mut pending).zip(parts)
            {
                *pending = state.advance(*pending, part.len()).pending;
                text.extend(part);
                let want = exact(text);
                nmse(session.logits().unwrap(), &want.logits, *limit + want.off[0]).unwrap();
                nmse(&session.state().unwrap(), &want.state, *limit + want.off[1]).unwrap();
                assert_eq!(session.pending(), *pending, "{state:?}");
            }
        }
        for (session, text) in sessions.iter_mut().zip(&texts) {
            let undo = session.pending();
            session.rollback(undo).unwrap();
            let want = exact(&text[..text.len() - undo]);
            nmse(&session.state().unwrap(), &want.state, *limit + want.off[1]).unwrap();
        }
    }
}

/// Saved on one device in any format, gone on with on the other, held in another way.
#[test]
fn states_move_between_devices() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    for (_, limit, engines) in ways() {
        for from in engines {
            for format in [StateFormat::F32, StateFormat::F16] {
                let mut session = from.session();
                session.prefill(&[3, 1, 4, 1, 5, 9, 2, 6, 5]).unwrap();
                session.save(&path, format).unwrap();
                for to in [&ways()[0].2, &ways()[2].2].into_iter().flatten().chain([plain()]) {
                    let mut there = to.load_session(&path).unwrap();
                    let mut here = session.clone();
                    let want = wide(here.step(7).unwrap());
                    nmse(there.step(7).unwrap(), &want, limit.max(1e-4)).unwrap();
                }
            }
        }
    }
}

/// A slow decay does not freeze in halves that are dithered, on either device.
#[test]
fn halves_do_not_freeze() {
    for (resident, limit, engines) in &ways()[3..4] {
        for engine in engines {
            let mut rng = SplitMix64::new(9);
            let text = draw(1500, &mut rng);
            let (mut got, mut want) = (engine.session(), plain().session());
            got.prefill(&text).unwrap();
            want.prefill(&text).unwrap();
            let near = nmse(&got.state().unwrap(), &wide(&want.state().unwrap()), *limit);
            assert!(near.is_ok(), "{resident:?}: {near:?}");
        }
    }
}

#[test]
fn what_cannot_be_held_is_refused() {
    let refused =
        |options: EngineOptions, state| try_engine(model(), EngineOptions { state, ..options }).map(drop);
    let sparse = StateFormat::Sparse(SparseRule::default());
    for options in devices() {
        for (state, why) in [
            (Resident { format: sparse, ..Resident::lazy(4) }, Refused::Format(sparse)),
            (Resident::int8(8), Refused::Int8 { got: 8 }),
            (Resident::lazy(33), Refused::Capacity { got: 33 }),
        ] {
            let refused = refused(options.clone(), state);
            assert!(matches!(refused, Err(Error::Resident(got)) if got == why), "{state:?}: {refused:?}");
        }
    }
    let Some(gpu) = gpu() else { return };
    let stochastic = Resident { rounding: ResidentRounding::Stochastic { seed: 1 }, ..Resident::f16(4) };
    let unfused = EngineOptions { fused: false, ..gpu.clone() };
    for (options, state) in [(gpu, stochastic), (unfused, Resident::f16(4))] {
        let refused = refused(options, state);
        assert!(
            matches!(refused, Err(Error::Gpu(rwkv_model::gpu::Error::Resident(..)))),
            "{state:?}: {refused:?}"
        );
    }
}
