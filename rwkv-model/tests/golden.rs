//! Against golden values, computed in f64 by an independent implementation (`tests/reference`): the reference in f64
//! reproduces them to half an f32 unit of the largest value of each, and what runs in f32 stays as near as f32 allows.
//!
//! How near that is comes from the f64 run: the reference, in the same plain loops, is run in f32, and its distance
//! from f64 is what rounding does to this model on this text. Another order of summation may do as much again; a limit
//! is [`FACTOR`] times that distance.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::num::NonZeroUsize;

use rwkv_core::compare::{magnitude, max_abs};
use rwkv_core::fast::linear::Packed;
use rwkv_core::model::{
    Compute, Logits, Model, Observer, Options, Segment, Skip, SkipPart, SkipShifts, State, Wkv,
};
use rwkv_core::ops::linear::Matrix;
use rwkv_core::{ModelConfig, Real};
use rwkv_model::checkpoint::{Checkpoint, LoadMatrix};
use rwkv_model::quality::{Rest, SideBySide};
use rwkv_model::skip::{Listed, Skipping};
use rwkv_model::{Engine, EngineOptions, StateFormat, quality};
use rwkv_state::format::SparseRule;
use support::{BUNDLED, Tensor, get, on_cpu, open, read, safetensors, tokens, vectors};

const FACTOR: f64 = 4.0;

/// What is stored was rounded to f32: half a unit of the largest value.
fn stored(want: &[f32]) -> f64 {
    magnitude(want) * f64::from(f32::EPSILON) / 2.0 + 1e-12
}

fn load<R: Real, M: LoadMatrix>(path: &str) -> Model<R, M> {
    Checkpoint::open(path).unwrap().load(&|_| {}).unwrap()
}

struct Run<R> {
    logits: Vec<R>,
    state: State<R>,
}

impl<R: Real> Run<R> {
    fn state(&self) -> [(&'static str, &[R]); 3] {
        [("att_shift", &self.state.att_shift), ("wkv", &self.state.wkv), ("ffn_shift", &self.state.ffn_shift)]
    }
}

/// Runs tokens in calls of `length` tokens each, the state update in the given form.
fn run<R: Real, M: Compute<R> + LoadMatrix>(
    model: &Model<R, M>,
    tokens: &[u32],
    length: usize,
    wkv: Wkv,
) -> Run<R> {
    let mut state = State::new(&model.config);
    let options = Options { wkv, ..Options::default() };
    let mut logits = Vec::new();
    for tokens in tokens.chunks(length) {
        let segment = Segment { tokens, state: &mut state, logits: Logits::All };
        logits.extend(model.forward(&mut [segment], options));
    }
    Run { logits, state }
}

/// The ways to run a text: token by token, whole, in calls of other lengths, by chunks.
fn ways(tokens: usize) -> Vec<(usize, Wkv)> {
    let chunks = [1, 7, 16, 32, 64, 65];
    let calls = chunks.map(|length| (length, Wkv::Sequential));
    let chunked = chunks.map(|chunk| (tokens, Wkv::Chunked(chunk)));
    [(tokens, Wkv::Sequential)].into_iter().chain(calls).chain(chunked).collect()
}

/// The expected logits and final state of a model of the golden vectors.
fn agrees(model: &str, expected: &str) {
    let expected = read(&vectors(expected));
    let (path, tokens) = (vectors(model), tokens(&expected));
    let exact_model = load::<f64, Matrix<f32>>(&path);
    let want = get(&expected, "logits");

    let exact = run(&exact_model, &tokens, tokens.len(), Wkv::Sequential);
    max_abs(&exact.logits, &want, stored(&want)).unwrap_or_else(|e| panic!("{model}: f64 logits: {e}"));
    for (name, got) in exact.state() {
        let want = get(&expected, &format!("final.{name}"));
        max_abs(got, &want, stored(&want)).unwrap_or_else(|e| panic!("{model}: f64 {name}: {e}"));
    }

    let plain = run(&load::<f32, Matrix<f32>>(&path), &tokens, tokens.len(), Wkv::Sequential);
    let rounding = |got: &[f32], want: &[f64]| FACTOR * max_abs(got, want, f64::INFINITY).unwrap();
    let limit = rounding(&plain.logits, &exact.logits);
    assert!(limit < 2e-5 * FACTOR, "{model}: f32 strays {limit} from f64"); // logits deviate by 1.5
    let (exact_model, fast_model) = (exact_model, load::<f32, Packed>(&path));
    for (length, wkv) in ways(tokens.len()) {
        let way = format!("{model}: calls of {length}, {wkv:?}");
        let wide = run(&exact_model, &tokens, length, wkv);
        max_abs(&wide.logits, &exact.logits, 1e-11).unwrap_or_else(|e| panic!("{way}: f64 logits: {e}"));
        let fast = run(&fast_model, &tokens, length, wkv);
        max_abs(&fast.logits, &exact.logits, limit).unwrap_or_else(|e| panic!("{way}: f32 logits: {e}"));
        for (((name, fast), (_, exact)), (_, plain)) in
            fast.state().into_iter().zip(exact.state()).zip(plain.state())
        {
            let limit = rounding(plain, exact);
            max_abs(fast, exact, limit).unwrap_or_else(|e| panic!("{way}: f32 {name}: {e}"));
        }
    }
}

#[test]
fn golden_f32() {
    agrees("model_f32", "expected_f32");
}

#[test]
fn golden_f16_weights() {
    agrees("model_f16", "expected_f16_weights");
}

/// A layer that is left out at every token, whole, with its shifts frozen, as the golden file has it: in the reference, and
/// by the engine in prompts and token by token.
#[test]
fn golden_skipped_layer() {
    let expected = read(&vectors("expected_skip_layer1"));
    let (tokens, want) = (tokens(&expected), get(&expected, "logits"));
    let layers = [false, true, false];
    let skip = Skip { layers: &layers, part: SkipPart::Layer, shifts: SkipShifts::Frozen };
    let model = load::<f64, Matrix<f32>>(&vectors("model_f32"));
    let mut state = State::new(&model.config);
    let segment = Segment { tokens: &tokens, state: &mut state, logits: Logits::All };
    let exact = model.forward(&mut [segment], Options { skip, ..Options::default() });
    max_abs(&exact, &want, stored(&want)).unwrap_or_else(|e| panic!("f64 logits: {e}"));
    let state = [&state.att_shift, &state.wkv, &state.ffn_shift];
    for (name, got) in ["att_shift", "wkv", "ffn_shift"].into_iter().zip(state) {
        let want = get(&expected, &format!("final.{name}"));
        max_abs(got, &want, stored(&want)).unwrap_or_else(|e| panic!("f64 {name}: {e}"));
    }

    // As far as f32 is off without, in `golden_f32`.
    const LIMIT: f64 = 2e-5 * FACTOR;
    let mut skipping = Skipping { shifts: SkipShifts::Frozen, ..Skipping::new(Listed(vec![1])) };
    for prefill in [true, false] {
        skipping.prefill = prefill;
        let options = EngineOptions { skip: Some(skipping.clone()), ..on_cpu() };
        let mut session = Engine::open_with(vectors("model_f32"), options, &|_| {}).unwrap().session();
        let got = if prefill {
            session.logits_of(&tokens).unwrap()
        } else {
            tokens.iter().flat_map(|&token| session.step(token).unwrap().to_vec()).collect()
        };
        max_abs(&got, &want, LIMIT).unwrap_or_else(|e| panic!("prompt {prefill}: {e}"));
    }
}

/// The state after 37 tokens is the golden one, and the rest follows from it.
#[test]
fn resumes_from_a_golden_state() {
    let expected = read(&vectors("expected_f32"));
    let (tokens, want) = (tokens(&expected), get(&expected, "logits"));
    let model = load::<f64, Matrix<f32>>(&vectors("model_f32"));
    let vocab = model.config.vocab;
    let wide = |name: &str| {
        get(&expected, &format!("after37.{name}")).iter().map(|v| v.wide()).collect::<Vec<f64>>()
    };

    let first = run(&model, &tokens[..37], 37, Wkv::Sequential);
    for (name, got) in first.state() {
        let want = get(&expected, &format!("after37.{name}"));
        max_abs(got, &want, stored(&want)).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    let mut state = State { att_shift: wide("att_shift"), wkv: wide("wkv"), ffn_shift: wide("ffn_shift") };
    let segment = Segment { tokens: &tokens[37..], state: &mut state, logits: Logits::All };
    let rest = model.forward(&mut [segment], Options::default());
    // the golden state was rounded to f32, and what follows moves as little
    max_abs(&rest, &want[37 * vocab..], 1e-5).unwrap_or_else(|e| panic!("{e}"));
}

/// Keeps every value seen.
#[derive(Default)]
struct Trace<R>(Vec<(String, Vec<R>)>);

impl<R: Real> Observer<R> for Trace<R> {
    fn see(&mut self, layer: usize, name: &'static str, values: &[R]) {
        let (name, values) = match name {
            "lw" => ("w", values.iter().map(|v| v.exp()).collect()),
            _ => (name, values.to_vec()),
        };
        let name = if name.starts_with("x_embed") { name.to_owned() } else { format!("layer{layer}.{name}") };
        self.0.push((name, values));
    }
}

fn trace<R: Real, M: Compute<R> + LoadMatrix>(path: &str, tokens: &[u32]) -> Trace<R> {
    let model = load::<R, M>(path);
    let (mut state, mut trace) = (State::new(&model.config), Trace(Vec::new()));
    let segment = Segment { tokens, state: &mut state, logits: Logits::None };
    assert!(model.forward_observed(&mut [segment], Options::default(), &mut trace).is_empty(), "no logits");
    trace
}

/// Every operation's output on the first eight tokens.
#[test]
fn golden_trace() {
    let golden = read(&vectors("trace_first8"));
    let (path, tokens) = (vectors("model_f32"), tokens(&read(&vectors("expected_f32"))));
    let exact = trace::<f64, Matrix<f32>>(&path, &tokens[..8]);
    let plain = trace::<f32, Matrix<f32>>(&path, &tokens[..8]);
    let fast = trace::<f32, Packed>(&path, &tokens[..8]);
    assert_eq!(exact.0.len(), golden.len(), "as many values as the golden trace");
    for (((name, exact), (_, plain)), (_, fast)) in exact.0.iter().zip(&plain.0).zip(&fast.0) {
        let want = get(&golden, name);
        max_abs(exact, &want, stored(&want)).unwrap_or_else(|e| panic!("{name}: f64: {e}"));
        let limit = FACTOR * max_abs(plain, exact, f64::INFINITY).unwrap() + stored(&want);
        max_abs(fast, exact, limit).unwrap_or_else(|e| panic!("{name}: f32: {e}"));
    }
}

/// The bundled model: logits and final state of 256 golden tokens.
#[test]
fn bundled_golden() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/books-10m/golden.safetensors");
    let golden = read(path);
    let tokens = tokens(&golden);
    let exact = run(&load::<f64, Matrix<f32>>(BUNDLED), &tokens, tokens.len(), Wkv::Sequential);
    let plain = run(&load::<f32, Matrix<f32>>(BUNDLED), &tokens, tokens.len(), Wkv::Sequential);
    let fast_model = load::<f32, Packed>(BUNDLED);
    // the golden values come from an f32 run, 1.8e-5 from f64 in the logits (assets/books-10m/README.md)
    let golden_error = 2e-5;
    max_abs(&exact.logits, &get(&golden, "logits"), golden_error)
        .unwrap_or_else(|e| panic!("f64 logits: {e}"));
    let golden_state = |name: &str| get(&golden, if name == "wkv" { "wkv_state" } else { name });
    for (name, got) in exact.state() {
        let want = golden_state(name);
        max_abs(got, &want, 2e-6 * magnitude(&want)).unwrap_or_else(|e| panic!("f64 {name}: {e}"));
    }
    for (length, wkv) in
        [(tokens.len(), Wkv::Sequential), (1, Wkv::Sequential), (tokens.len(), Wkv::Chunked(16))]
    {
        let fast = run(&fast_model, &tokens, length, wkv);
        let limit = FACTOR * max_abs(&plain.logits, &exact.logits, f64::INFINITY).unwrap();
        max_abs(&fast.logits, &exact.logits, limit)
            .unwrap_or_else(|e| panic!("calls of {length}, {wkv:?}: {e}"));
    }
}

/// Bits per byte of the first 4,096 bytes of the held-out text: 1.43256, also by web-rwkv with f32 activations.
#[test]
fn bundled_bits_per_byte() {
    let text = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/books-10m/valid.txt")).unwrap();
    let engine = Engine::open_with(BUNDLED, on_cpu(), &|_| {}).unwrap();
    let score = quality::windows(&engine, &text[..4096], 8192, |_| {}).unwrap();
    assert_eq!((score.tokens, score.bytes), (4095, 4095), "the first byte follows nothing");
    let bits = score.bits_per_byte();
    assert!((bits - 1.43256).abs() < 0.0005, "{bits} bits per byte");
}

/// Layer 0's value residual adapter is absent from some files and meaningless in others.
#[test]
fn layer_0_adapter_is_ignored() {
    let model = read(&vectors("model_f32"));
    let junk = |name: &str, shape: &[usize]| {
        let values: Vec<f32> =
            (0u16..).map(|i| f32::from(i % 97) - 48.0).take(shape.iter().product()).collect();
        Tensor::new(name, shape, &values)
    };
    let mut with = model.clone();
    with.push(junk("blocks.0.att.v0", &[1, 1, 128]));
    with.push(junk("blocks.0.att.v1", &[128, 8]));
    with.push(junk("blocks.0.att.v2", &[8, 128]));
    let (without, with) = (open(safetensors(&model), None).unwrap(), open(safetensors(&with), None).unwrap());
    assert_eq!(with.ignored(), ["blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"], "listed");
    assert_eq!(without.config(), with.config(), "extents");
    let logits = |checkpoint: &Checkpoint| {
        let model: Model<f32, Packed> = checkpoint.load(&|_| {}).unwrap();
        run(&model, &[1, 2, 3], 3, Wkv::Sequential).logits
    };
    assert_eq!(logits(&without), logits(&with), "bit for bit");
    let config: &ModelConfig = without.config();
    assert_eq!((config.n_layers, config.width, config.hidden, config.vocab), (3, 128, 512, 97), "extents");
}

/// Windows predict every token but the first once, whatever their length.
#[test]
fn windows_cover_the_text() {
    let engine = Engine::open_with(BUNDLED, on_cpu(), &|_| {}).unwrap();
    for (len, window) in [(0, 4), (1, 4), (2, 4), (9, 4), (10, 4), (10, 0), (10, usize::MAX)] {
        let mut seen = 0;
        let score = quality::windows(&engine, &vec![65; len], window, |score| seen = score.tokens).unwrap();
        let want = len.saturating_sub(1);
        assert_eq!((score.tokens, score.bytes, seen), (want, want, want), "{len} bytes, windows of {window}");
    }
}

/// Windows side by side are those one after the other, bit for bit: whatever their length, however many at a time, and with
/// states that rest in single precision on the way.
#[test]
fn windows_side_by_side() {
    let text = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/books-10m/valid.txt")).unwrap();
    let engine = Engine::open_with(BUNDLED, EngineOptions { pass_tokens: 48, ..on_cpu() }, &|_| {}).unwrap();
    for (len, window, sessions, every) in [
        (0, 4, 3, 1),
        (1, 4, 3, 1),
        (2, 4, 3, 1),
        (200, 7, 60, 3),
        (300, 64, 4, 64),
        (300, 120, 5, 17),
        (100, 1000, 0, 0),
    ] {
        let text = &text[..len];
        let (mut sum, mut each) = (quality::Score::default(), Vec::new());
        quality::windows(&engine, text, window, |score| {
            let tokens =
                &text[sum.tokens..=score.tokens].iter().map(|&byte| byte.into()).collect::<Vec<u32>>();
            each.push(-engine.session().score(tokens).unwrap().iter().sum::<f64>());
            sum = *score;
        })
        .unwrap();
        let at_rest = Rest { format: StateFormat::F32, every };
        for rest in [None, Some(at_rest)] {
            let options = SideBySide { window, sessions, rest };
            let scores = quality::side_by_side(&engine, text, options, |_| {}).unwrap();
            assert_eq!(scores.iter().map(|of| of.nats).collect::<Vec<_>>(), each, "{len} bytes, {options:?}");
            let got: quality::Score = scores.into_iter().sum();
            assert_eq!((got.tokens, got.bytes), (sum.tokens, sum.bytes), "{len} bytes, {options:?}");
        }
    }
}

/// Whatever states rest in, however many windows there are and threads for them: each is scored as alone, where its state
/// rests after every so many tokens.
#[test]
fn states_rest_on_every_thread() {
    let text = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/books-10m/valid.txt")).unwrap();
    let (text, window, every) = (&text[..100], 9, 2);
    let tokens: Vec<u32> = text.iter().map(|&byte| byte.into()).collect();
    let rules = [SparseRule::default(), SparseRule::TopK { k: 16 }].map(StateFormat::Sparse);
    let options = EngineOptions { threads: NonZeroUsize::new(3), ..on_cpu() };
    let engine = Engine::open_with(BUNDLED, options, &|_| {}).unwrap();
    for format in [StateFormat::F16, StateFormat::Int8Scaled].into_iter().chain(rules) {
        let alone = (0..tokens.len() - 1).step_by(window).map(|start| {
            let (mut session, mut nats) = (engine.session(), 0.0);
            for (at, tokens) in tokens[start..tokens.len().min(start + window + 1)].chunks(every).enumerate()
            {
                if at > 0 {
                    quality::put_to_rest(&mut session, format).unwrap();
                }
                nats -= session.score(tokens).unwrap().iter().sum::<f64>();
            }
            nats
        });
        let rest = Some(Rest { format, every });
        let scores = quality::side_by_side(&engine, text, SideBySide { window, sessions: 7, rest }, |_| {});
        let together: Vec<f64> = scores.unwrap().iter().map(|of| of.nats).collect();
        for (got, want) in together.iter().zip(alone.collect::<Vec<_>>()) {
            assert!((got - want).abs() <= 1e-12 * want, "{format:?}, {got}, {want} alone");
        }
        assert_eq!(together.len(), 11, "{format:?}: windows");
    }
}
