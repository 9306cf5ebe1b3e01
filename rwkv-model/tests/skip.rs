//! Layers that are left out: against the reference in f64, on the CPU and on the GPU where there is one, and what must be
//! the same bits.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::sync::OnceLock;

use rwkv_core::Real;
use rwkv_core::compare::nmse;
use rwkv_core::model::{Compute, Logits, Model, Options, Segment, Skip, State};
use rwkv_core::ops::linear::Matrix;
use rwkv_model::engine::Device;
use rwkv_model::quality::SideBySide;
use rwkv_model::skip::{self, Listed, Middle, SkipPolicy, Skipping};
use rwkv_model::{
    Engine, EngineOptions, Error, Resident, ResidentRounding, Sampler, Session, SkipPart, SkipShifts, Wkv,
    gpu,
};
use support::{BUNDLED, engine, on_cpu, on_gpu, random_model, safetensors, shown, together, try_engine};

const LAYERS: usize = 6;

/// In halves, which both devices hold exactly.
fn model() -> &'static [u8] {
    static MODEL: OnceLock<Vec<u8>> = OnceLock::new();
    MODEL.get_or_init(|| {
        let tensors = random_model([LAYERS, 2, 64, 96, 64, 6], 11);
        safetensors(&tensors.iter().map(|of| of.to("F16")).collect::<Vec<_>>())
    })
}

/// With products that are exact but for rounding; a sequence's bits are its own.
fn devices() -> Vec<EngineOptions> {
    let gpu = on_gpu().map(|options| EngineOptions { portable: true, batch_invariant: true, ..options });
    std::iter::once(on_cpu()).chain(gpu).collect()
}

/// All parts and shifts of a policy.
fn ways(policy: impl SkipPolicy + Clone + 'static) -> Vec<Skipping> {
    let parts = [SkipPart::ChannelMix, SkipPart::Layer];
    let shifts = [SkipShifts::Refreshed, SkipShifts::Frozen];
    let of = |(part, shifts)| Skipping { part, shifts, ..Skipping::new(policy.clone()) };
    parts.into_iter().flat_map(|part| shifts.map(|shifts| (part, shifts))).map(of).collect()
}

/// At the tokens 6 to 10 of a sequence, layer 3; before and after that, layers 2 and 4 and the outermost, which stay.
#[derive(Clone, Debug)]
struct Changing;

impl SkipPolicy for Changing {
    fn skips(&self, layer: usize, _: usize, token: u64) -> bool {
        if (6..=10).contains(&token) { layer == 3 } else { [0, 2, 4, 5].contains(&layer) }
    }
}

/// Which layers that leaves out.
fn layers_out(token: usize) -> [bool; LAYERS] {
    std::array::from_fn(|layer| {
        layer > 0 && layer + 1 < LAYERS && Changing.skips(layer, LAYERS, token as u64)
    })
}

/// Reads tokens, the first so many of which leave nothing out, in plain loops: logits after each, and the state.
fn reference<R: Real>(tokens: &[u32], prompt: usize, of: &Skipping) -> [Vec<R>; 2]
where
    Matrix<f32>: Compute<R>,
{
    let checkpoint = support::open(model().to_vec(), None).unwrap();
    let model: Model<R, Matrix<f32>> = checkpoint.load(&|_| {}).unwrap();
    let (mut state, mut logits) = (State::new(&model.config), Vec::new());
    for (at, token) in tokens.iter().enumerate() {
        let layers = layers_out(at);
        let layers = if at < prompt { &[][..] } else { &layers };
        let skip = Skip { layers, part: of.part, shifts: of.shifts };
        let tokens = std::slice::from_ref(token);
        let segment = Segment { tokens, state: &mut state, logits: Logits::All };
        logits.extend(model.forward(&mut [segment], Options { skip, ..Options::default() }));
    }
    [logits, [state.att_shift, state.wkv, state.ffn_shift].concat()]
}

fn tokens(n: usize, seed: usize) -> Vec<u32> {
    (0..n).map(|at| u32::try_from((at * 31 + seed * 17 + at * at) % 50).unwrap()).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// A session's tokens one by one: the logits after each.
fn steps(session: &mut Session, tokens: &[u32]) -> Vec<f32> {
    tokens.iter().flat_map(|&token| session.step(token).unwrap().to_vec()).collect()
}

/// Prompts leave nothing out unless they are asked to, and the tokens after them do: what comes of it is what the reference
/// in f64 says, as near as the reference in f32 comes, and a few times over.
#[test]
fn follows_the_reference() {
    let (tokens, prompt) = (tokens(14, 1), 5);
    for way in ways(Changing) {
        for prefill in [false, true] {
            let asked = if prefill { 0 } else { prompt };
            let [logits, state] = reference::<f64>(&tokens, asked, &way);
            let [plain_logits, plain_state] = reference::<f32>(&tokens, asked, &way);
            let limit = |plain: &[f32], exact: &[f64]| 36.0 * nmse(plain, exact, f64::INFINITY).unwrap();
            let limits = [limit(&plain_logits, &logits), limit(&plain_state, &state)];
            for options in devices() {
                let skip = Some(Skipping { prefill, ..way.clone() });
                for batch_invariant in [true, false] {
                    let options = EngineOptions { skip: skip.clone(), batch_invariant, ..options.clone() };
                    let mut session = engine(model().to_vec(), options).session();
                    let mut got = session.logits_of(&tokens[..prompt]).unwrap();
                    got.extend(steps(&mut session, &tokens[prompt..]));
                    nmse(&got, &logits, limits[0])
                        .unwrap_or_else(|e| panic!("{way:?}, {prefill}: logits: {e}"));
                    let got = session.state().unwrap();
                    nmse(&got, &state, limits[1])
                        .unwrap_or_else(|e| panic!("{way:?}, {prefill}: state: {e}"));
                }
            }
        }
    }
}

/// Whoever is beside it and wherever they stand, a sequence is what it is alone, bit for bit; and a prompt that leaves
/// layers out is its tokens one by one.
#[test]
fn every_sequence_has_its_own() {
    for options in devices() {
        for way in ways(Changing) {
            let skip = Some(Skipping { prefill: true, ..way });
            let engine = engine(model().to_vec(), EngineOptions { skip, pass_tokens: 16, ..options.clone() });
            let prompts: Vec<Vec<u32>> = [13, 1, 7, 10, 4].into_iter().map(|n| tokens(n, n)).collect();
            let alone = |n: usize, more: u32| {
                let mut session = engine.session();
                steps(&mut session, &prompts[n]);
                session.step(more).unwrap();
                shown(&session)
            };
            let mut sessions = together(&engine, &prompts);
            let mut batch: Vec<_> = sessions.iter_mut().map(|session| (session, &[9][..])).collect();
            engine.step(&mut batch).unwrap();
            for (n, session) in sessions.iter().enumerate() {
                let (got, want) = (shown(session), alone(n, 9));
                assert_eq!(bits(&got.1), bits(&want.1), "{n}: logits");
                assert_eq!(bits(&got.0), bits(&want.0), "{n}: state");
            }

            // Scores too, of windows that are cut where layers change.
            let mut sessions: Vec<Session> = prompts.iter().map(|_| engine.session()).collect();
            let mut batch: Vec<_> = sessions.iter_mut().zip(prompts.iter().map(Vec::as_slice)).collect();
            let scores = engine.score(&mut batch).unwrap();
            for (prompt, score) in prompts.iter().zip(scores) {
                assert_eq!(engine.session().score(prompt).unwrap(), score, "{} tokens", prompt.len());
            }
        }
    }
}

/// What tokens left out can be undone, saved and gone on from as ever, however states are held.
#[test]
fn undone_and_gone_on() {
    for options in devices() {
        for way in ways(Changing) {
            for state in [Resident::lazy(4), Resident::f16(3), Resident::int8(16)] {
                let skip = Some(way.clone());
                let options = EngineOptions { state, skip, ..options.clone() };
                let engine = engine(model().to_vec(), options);
                let mut session = engine.session();
                session.prefill(&tokens(5, 3)).unwrap();
                steps(&mut session, &tokens(3, 4));
                session.fold().unwrap();
                let (snapshot, mut fork, before) = (session.snapshot(), session.fork(), shown(&session).0);
                let first = steps(&mut session, &tokens(3, 5));
                let after = shown(&session);
                session.rollback(3).unwrap();
                assert_eq!(bits(&shown(&session).0), bits(&before), "undone: {state:?} {way:?}");
                assert_eq!(
                    bits(&steps(&mut session, &tokens(3, 5))),
                    bits(&first),
                    "again: {state:?} {way:?}"
                );
                session.restore(&snapshot).unwrap();
                for session in [&mut session, &mut fork] {
                    assert_eq!(
                        bits(&steps(session, &tokens(3, 5))),
                        bits(&first),
                        "from there: {state:?} {way:?}"
                    );
                    assert_eq!(shown(session), after, "the same: {state:?} {way:?}");
                }
            }
        }
    }
}

/// A layer that is left out keeps its matrices and, if frozen, its shifts, exactly, through folds as well.
#[test]
fn what_is_left_out_stands_still() {
    for options in devices() {
        for state in [Resident::default(), Resident::lazy(2)] {
            let skip = Skipping { shifts: SkipShifts::Frozen, ..Skipping::new(Listed(vec![2])) };
            let engine =
                engine(model().to_vec(), EngineOptions { state, skip: Some(skip), ..options.clone() });
            let mut session = engine.session();
            session.prefill(&tokens(7, 2)).unwrap();
            session.fold().unwrap();
            let layout = engine.state_layout();
            let of_layer = |session: &Session, layer: usize| -> Vec<f32> {
                let state = session.state().unwrap();
                let (d, wkv) = (128, 2 * 64 * 64);
                let [att, wkv_at, ffn] =
                    [layer * d, LAYERS * d + layer * wkv, LAYERS * (d + wkv) + layer * d];
                assert_eq!(state.len(), layout.len(), "[L, D], [L, H, N, N], [L, D]");
                [&state[att..att + d], &state[wkv_at..wkv_at + wkv], &state[ffn..ffn + d]].concat()
            };
            let before = [1, 2].map(|layer| of_layer(&session, layer));
            steps(&mut session, &tokens(9, 6));
            assert_eq!(bits(&of_layer(&session, 2)), bits(&before[1]), "{state:?}: left out");
            assert_ne!(of_layer(&session, 1), before[0], "{state:?}: not left out");
        }
    }
}

/// Steps that run ahead of the host leave out what steps under its eyes do.
#[test]
fn generates_what_it_steps() {
    for options in devices() {
        let ways = ways(Middle { first_tokens: Some(20) });
        for (batch_invariant, skip) in
            [true, false].into_iter().flat_map(|of| ways.iter().map(move |way| (of, way)))
        {
            let options = EngineOptions { skip: Some(skip.clone()), batch_invariant, ..options.clone() };
            let engine = engine(model().to_vec(), options);
            let mut session = engine.session();
            session.prefill(&tokens(8, 8)).unwrap();
            let mut steps = session.fork();
            let generated: Vec<u32> =
                session.generate(Sampler::greedy()).take(24).collect::<Result<_, _>>().unwrap();
            for &token in &generated {
                assert_eq!(steps.sample(&Sampler::greedy()).unwrap(), token, "the same choice");
                steps.step(token).unwrap();
            }
            assert_eq!(shown(&steps), shown(&session), "the same state");
        }
    }
}

/// Layers that are left out make a difference, and an engine that shares the weights leaves nothing out.
#[test]
fn engines_share_weights() {
    for options in devices() {
        let whole = engine(model().to_vec(), options);
        let part = whole.skipping(Some(Skipping::new(Middle::default()))).unwrap();
        let logits = |engine: &Engine| engine.session().step(3).unwrap().to_vec();
        assert_ne!(logits(&part), logits(&whole), "layers matter");
        assert_eq!(logits(&part.skipping(None).unwrap()), logits(&whole), "all of them again");
        let (mut of_whole, mut of_part) = (whole.session(), part.session());
        let foreign = whole.step(&mut [(&mut of_whole, &[1]), (&mut of_part, &[1])]);
        assert!(matches!(foreign, Err(Error::ForeignSession { index: 1 })), "{foreign:?}");
    }
}

#[test]
fn what_cannot_be_is_told() {
    let empty = try_engine(model().to_vec(), EngineOptions { wkv: Some(Wkv::Chunked(0)), ..on_cpu() });
    assert!(matches!(empty, Err(Error::EmptyChunks)), "{empty:?}");
    let state = Resident::f16(16);
    let deferred = EngineOptions { wkv: Some(Wkv::Chunked(16)), state, ..on_cpu() };
    let deferred = try_engine(model().to_vec(), deferred);
    assert!(matches!(deferred, Err(Error::ChunkedState(of)) if of == state), "{deferred:?}");
    let Some(options) = on_gpu() else { return };
    let chunked = |chunk| EngineOptions { wkv: Some(Wkv::Chunked(chunk)), ..options.clone() };
    for (chunk, options) in [
        (8, chunked(8)),
        (16, EngineOptions { fused: false, ..chunked(16) }),
        (16, EngineOptions { batch_invariant: true, ..chunked(16) }),
    ] {
        let refused = try_engine(model().to_vec(), options);
        assert!(
            matches!(&refused, Err(Error::Gpu(gpu::Error::Chunks(of, _))) if *of == chunk),
            "{refused:?}"
        );
    }
    let options = EngineOptions { skip: Some(Skipping::new(Middle::default())), ..options };
    let unfused = try_engine(model().to_vec(), EngineOptions { fused: false, ..options.clone() });
    assert!(matches!(unfused, Err(Error::Gpu(gpu::Error::Skip(_)))), "{unfused:?}");
    let state = Resident { rounding: ResidentRounding::DecayDither, ..Resident::f16(0) };
    let dithered = try_engine(model().to_vec(), EngineOptions { state, ..options });
    assert!(matches!(dithered, Err(Error::Gpu(gpu::Error::Skip(_)))), "{dithered:?}");
}

/// Every layer of the trained model contributes, the second more than the middle ones.
#[test]
fn contributions_are_measured() {
    let text = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/books-10m/valid.txt")).unwrap();
    let options = EngineOptions { device: Device::Cpu, ..EngineOptions::default() };
    let engine = Engine::open_with(BUNDLED, options, &|_| {}).unwrap();
    let (windows, mut seen) = (SideBySide { window: 512, sessions: 4, rest: None }, 0);
    let costs =
        skip::contributions(&engine, &text[..2048], SkipPart::Layer, windows, |done| seen = done).unwrap();
    assert_eq!((costs.len(), seen), (10, 10), "of twelve, neither the first nor the last");
    let cost = |layer: usize| costs.iter().find(|of| of.layer == layer).unwrap().bits_per_byte;
    assert!(costs.iter().all(|of| of.bits_per_byte.is_finite()), "{costs:?}");
    assert!(cost(1) > cost(5) && cost(1) > 0.01, "{costs:?}");
}
