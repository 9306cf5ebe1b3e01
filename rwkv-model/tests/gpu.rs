//! The GPU executor against the reference, and the traps that engines fall into.
//!
//! How near it has to come is not a number that fits: the reference, in plain loops, is run in f64 and in f32, and the
//! distance of the two is what rounding does to this model on these tokens. Other orders of summation may do as much
//! again, and so may a device's `exp` and division, which are a few units off where the reference's are half a unit: a
//! limit is [`FACTOR`] times that distance. Where the device multiplies by cooperative matrices, which round what they read
//! to halves, the reference in f32 does so too. What must be the same bits is compared as such.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::OnceLock;
use std::time::Instant;

use half::f16;
use rwkv_core::compare::{magnitude, max_abs};
use rwkv_core::model::{Compute, Logits, Model, Options, Segment, State, Wkv, WkvSegment};
use rwkv_core::ops::linear::{Linear, Matrix};
use rwkv_core::quant::{Blocks, Format};
use rwkv_core::rng::SplitMix64;
use rwkv_core::{ElementType, Elements, ModelConfig, Real};
use rwkv_model::checkpoint::LoadMatrix;
use rwkv_model::engine::Device;
use rwkv_model::skip::{Listed, Skipping};
use rwkv_model::tokenizer::World;
use rwkv_model::{
    Checkpoint, Engine, EngineOptions, Error, FinishReason, Recipe, Resident, Sampler, Session, TextOptions,
    Tokenizer, gpu, quality,
};
use support::{
    BUNDLED, Tensor, alone, engine, get, on_cpu, on_gpu, random_model, read, safetensors, shown, together,
    tokens, try_engine,
};

const FACTOR: f64 = 6.0;

/// Rows of so many logits begin where they can be bound, so that steps are submitted together.
const VOCAB: usize = 64;
/// The least that is no token of it.
const NO_TOKEN: u32 = 64;

// ---- Engines ----

/// The bundled model on the CPU.
fn bundled_cpu() -> &'static Engine {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    ENGINE.get_or_init(|| Engine::open_with(BUNDLED, on_cpu(), &|_| {}).unwrap())
}

/// The bundled model on the GPU.
fn bundled() -> Option<&'static Engine> {
    static ENGINE: OnceLock<Option<Engine>> = OnceLock::new();
    let open = || Some(Engine::open_with(BUNDLED, on_gpu()?, &|_| {}).unwrap());
    ENGINE.get_or_init(open).as_ref()
}

/// A small model of half-precision weights, which every executor has as they are.
fn small_model() -> Vec<Tensor> {
    exact(random_model([2, 2, 64, 96, VOCAB, 8], 7))
}

/// The weights rounded such that all three types of checkpoints have them exactly.
fn exact(model: Vec<Tensor>) -> Vec<Tensor> {
    model.iter().map(|tensor| tensor.to("BF16").to("F16")).collect()
}

/// The small model on the GPU: by default, and batch-invariant.
fn smalls() -> &'static [Engine] {
    static ENGINES: OnceLock<Vec<Engine>> = OnceLock::new();
    ENGINES.get_or_init(|| modes(512).into_iter().map(|o| engine(safetensors(&small_model()), o)).collect())
}

/// The modes of the GPU: by default, and batch-invariant.
fn modes(pass_tokens: usize) -> Vec<EngineOptions> {
    let modes = |options: EngineOptions| {
        [false, true].map(|batch_invariant| EngineOptions { pass_tokens, batch_invariant, ..options.clone() })
    };
    on_gpu().into_iter().flat_map(modes).collect()
}

// ---- What is right, and how near to it is near enough ----

/// A model in plain loops, in both precisions.
struct Reference {
    exact: Model<f64, Matrix<f32>>,
    plain: Model<f32, Matrix<f32>>,
    halved: Model<f32, Halved>,
}

/// A matrix as cooperative matrices multiply it: by inputs that are rounded to halves, of some power of two.
struct Halved(Matrix<f32>);

/// That of the channel mix's hidden units, the largest.
const UNIT: f32 = 256.0;

impl Linear<f32> for Halved {
    fn inputs(&self) -> usize {
        Linear::<f32>::inputs(&self.0)
    }

    fn outputs(&self) -> usize {
        Linear::<f32>::outputs(&self.0)
    }

    fn apply(&self, x: &[f32], y: &mut [f32]) {
        let halves: Vec<f32> = x.iter().map(|x| UNIT * f16::from_f32(x / UNIT).to_f32()).collect();
        self.0.apply(&halves, y);
    }
}

impl Compute<f32> for Halved {
    fn wkv7(form: Wkv, segments: &mut [WkvSegment<'_, f32>]) {
        Matrix::<f32>::wkv7(form, segments);
    }
}

impl LoadMatrix for Halved {
    fn load<E: Send>(
        inputs: usize,
        outputs: usize,
        kind: ElementType,
        read: impl Fn(Range<usize>) -> Result<Elements, E> + Sync,
    ) -> Result<Self, E> {
        Matrix::load(inputs, outputs, kind, read).map(Self)
    }

    fn load_blocks<E: Send>(
        format: Format,
        inputs: usize,
        outputs: usize,
        read: impl Fn(Range<usize>) -> Result<Blocks, E> + Sync,
    ) -> Result<Self, E> {
        Matrix::load_blocks(format, inputs, outputs, read).map(Self)
    }

    fn of_hidden_major(blocks: &Blocks) -> Self {
        Self(Matrix::of_hidden_major(blocks))
    }
}

/// Whether the device multiplies by cooperative matrices, as far as it is asked by default.
fn rounds_to_halves() -> bool {
    static ROUNDS: OnceLock<bool> = OnceLock::new();
    let of = |engine: &Engine| engine.report().unwrap().kernels.iter().any(|label| label.contains("coop"));
    *ROUNDS.get_or_init(|| smalls().first().is_some_and(of))
}

/// What comes of tokens.
struct Want {
    /// `[T, V]`.
    logits: Vec<f64>,
    /// In canonical order, in its three parts.
    state: [Vec<f64>; 3],
    /// How far the logits may be off, and the parts of the state.
    limits: [f64; 4],
}

impl Reference {
    fn new(checkpoint: &Checkpoint) -> Self {
        let read = &|_| {};
        Self {
            exact: checkpoint.load(read).unwrap(),
            plain: checkpoint.load(read).unwrap(),
            halved: checkpoint.load(read).unwrap(),
        }
    }

    /// Of the small model.
    fn small() -> &'static Self {
        static REFERENCE: OnceLock<Reference> = OnceLock::new();
        REFERENCE.get_or_init(|| Self::new(&support::open(safetensors(&small_model()), None).unwrap()))
    }

    fn read(&self, tokens: &[u32], logits: Logits) -> Want {
        fn run<R: Real, M: Compute<R>>(model: &Model<R, M>, tokens: &[u32], wanted: Logits) -> [Vec<R>; 4] {
            let mut state = State::new(&model.config);
            let segment = Segment { tokens, state: &mut state, logits: wanted };
            let logits = model.forward(&mut [segment], Options::default());
            [logits, state.att_shift, state.wkv, state.ffn_shift]
        }
        let exact = run(&self.exact, tokens, logits);
        let plain = if rounds_to_halves() {
            run(&self.halved, tokens, logits)
        } else {
            run(&self.plain, tokens, logits)
        };
        let limits = std::array::from_fn(|part| {
            let (exact, plain) = (&exact[part], &plain[part]);
            // A few tokens may happen to come out right: the unit of what was summed is the least.
            let unit = f64::from(f32::EPSILON) * magnitude(exact);
            FACTOR * max_abs(plain, exact, f64::INFINITY).unwrap().max(unit)
        });
        let [logits, state @ ..] = exact;
        Want { logits, state, limits }
    }
}

impl Want {
    /// That a session stands here.
    fn holds(&self, session: &Session, what: &str) {
        let got = session.logits().unwrap();
        self.logits_hold(got, what);
        let state = session.state().unwrap();
        let mut rest = state.as_slice();
        for ((want, name), limit) in
            self.state.iter().zip(["att_shift", "wkv", "ffn_shift"]).zip(&self.limits[1..])
        {
            let own = rest.split_off(..want.len()).unwrap();
            max_abs(own, want, *limit).unwrap_or_else(|e| panic!("{what}: {name}: {e}"));
        }
        assert!(rest.is_empty(), "{what}: a longer state");
    }

    /// That logits are the last.
    fn logits_hold(&self, got: &[f32], what: &str) {
        let want = &self.logits[self.logits.len() - got.len()..];
        max_abs(got, want, self.limits[0]).unwrap_or_else(|e| panic!("{what}: logits: {e}"));
    }
}

fn prompts(lengths: &[usize], vocab: usize, seed: u64) -> Vec<Vec<u32>> {
    let mut rng = SplitMix64::new(seed);
    let token = |rng: &mut SplitMix64| u32::try_from(rng.next_u64() % vocab as u64).unwrap();
    lengths.iter().map(|&n| (0..n).map(|_| token(&mut rng)).collect()).collect()
}

fn prompt(length: usize, seed: u64) -> Vec<u32> {
    prompts(&[length], VOCAB, seed).remove(0)
}

fn generate(session: &mut Session, sampler: Sampler, n: usize) -> Vec<u32> {
    session.generate(sampler).take(n).map(Result::unwrap).collect()
}

/// The default sampler, one that only takes the best, and one with all there is.
fn samplers() -> [Sampler; 3] {
    let all = Sampler {
        temperature: 1.3,
        top_k: 20,
        top_p: 0.9,
        presence_penalty: 3.0,
        frequency_penalty: 2.0,
        seed: 11,
    };
    [Sampler::default(), Sampler::greedy(), all]
}

/// With penalties, so that what was counted shows.
fn penalised() -> Sampler {
    samplers()[2]
}

// ---- The bundled model ----

fn valid() -> Vec<u8> {
    std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/books-10m/valid.txt")).unwrap()
}

fn bytes(text: &[u8]) -> Vec<u32> {
    text.iter().map(|&byte| byte.into()).collect()
}

/// A prompt of 300 bytes, and what is right after each.
fn passage() -> &'static (Vec<u32>, Want) {
    static PASSAGE: OnceLock<(Vec<u32>, Want)> = OnceLock::new();
    PASSAGE.get_or_init(|| {
        let tokens = bytes(&valid()[..300]);
        let want = Reference::new(&Checkpoint::open(BUNDLED).unwrap()).read(&tokens, Logits::All);
        (tokens, want)
    })
}

/// Every position's logits, and the state in the end, however the tokens are split over passes.
#[test]
fn the_bundled_model_is_right() {
    let Some(engine) = bundled() else { return };
    let (tokens, want) = passage();
    let most = if rounds_to_halves() { 0.5 } else { 1e-3 };
    assert!(want.limits[0] < most, "logits differ by several: {:?}", want.limits);
    let vocab = engine.config().vocab;
    for lengths in [&[300][..], &[1, 2, 1, 31, 32, 33, 64, 65, 71], &[7, 129, 1, 1, 1, 161]] {
        let (mut session, mut rest, mut all) = (engine.session(), tokens.as_slice(), Vec::new());
        for &length in lengths {
            all.extend(session.logits_of(rest.split_off(..length).unwrap()).unwrap());
        }
        assert_eq!((rest.len(), all.len()), (0, 300 * vocab), "all were read");
        want.logits_hold(&all, &format!("calls of {lengths:?}"));
        want.holds(&session, &format!("calls of {lengths:?}"));
    }
    // steps of the form for one token
    let mut session = alone(engine, &tokens[..220]);
    for (i, &token) in tokens.iter().enumerate().skip(220) {
        let got = session.step(token).unwrap();
        max_abs(got, &want.logits[i * vocab..][..vocab], want.limits[0])
            .unwrap_or_else(|e| panic!("step {i}: {e}"));
    }
    want.holds(&session, "steps");
}

#[test]
fn golden_logits() {
    let Some(engine) = bundled() else { return };
    let golden = read(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/books-10m/golden.safetensors"));
    let (tokens, want) = (tokens(&golden), get(&golden, "logits"));
    // The golden values come from an f32 run, 1.8e-5 from f64 in the logits (assets/books-10m/README.md).
    let limit = if rounds_to_halves() { passage().1.limits[0] } else { FACTOR * 2e-5 };
    let mut session = engine.session();
    max_abs(&session.logits_of(&tokens).unwrap(), &want, limit).unwrap_or_else(|e| panic!("one pass: {e}"));
    let mut session = engine.session();
    let steps: Vec<f32> = tokens.iter().flat_map(|&token| session.step(token).unwrap().to_vec()).collect();
    max_abs(&steps, &want, limit).unwrap_or_else(|e| panic!("steps: {e}"));
}

/// The texts are the same as the CPU's, to the first place where rounding decides: there, the logits of both agree as
/// nearly as ever, and each chose what the rule says of its own.
#[test]
fn the_bundled_model_writes_what_the_cpu_writes() {
    let Some(engine) = bundled() else { return };
    let (_, want) = passage();
    for (sampler, n) in samplers().into_iter().zip([200, 200, 200]) {
        let [cpu, gpu] =
            [bundled_cpu(), engine].map(|engine| alone(engine, &bytes(b"It was a dark night, and ")));
        let texts = [&cpu, &gpu].map(|session| generate(&mut session.fork(), sampler, n));
        let Some(first) = (0..n).find(|&i| texts[0][i] != texts[1][i]) else { continue };
        let [cpu, gpu] = [cpu, gpu].map(|mut session| {
            texts[0][..first].iter().for_each(|&token| session.accept(token).map(|_| ()).unwrap());
            session
        });
        max_abs(gpu.logits().unwrap(), cpu.logits().unwrap(), 2.0 * want.limits[0])
            .unwrap_or_else(|e| panic!("{sampler:?}: token {first} is no tie: {e}"));
        assert_eq!(
            gpu.sample(&sampler).unwrap(),
            texts[1][first],
            "{sampler:?}: token {first}, by the same rule"
        );
    }
}

/// Bits per byte of the first 4,096 bytes of the held-out text: 1.43256 on the CPU, and by web-rwkv with f32 activations.
#[test]
fn bundled_bits_per_byte() {
    let Some(engine) = bundled() else { return };
    let score = quality::windows(engine, &valid()[..4096], 8192, |_| {}).unwrap();
    assert_eq!((score.tokens, score.bytes), (4095, 4095), "the first byte follows nothing");
    let bits = score.bits_per_byte();
    assert!((bits - 1.43256).abs() < 0.0005, "{bits} bits per byte");
}

// ---- Lengths, batches, extents ----

/// A count in a byte ends at 255: one sequence of more in a pass.
#[test]
fn long_sequences_in_a_pass() {
    for options in modes(1024) {
        let engine = engine(safetensors(&small_model()), options);
        for length in [255, 256, 257, 1000] {
            let prompt = prompt(length, 3);
            let want = Reference::small().read(&prompt, Logits::Last);
            want.holds(&alone(&engine, &prompt), &format!("{length} tokens"));
        }
    }
}

/// A count in 16 bits ends at 65,535, and so do the workgroups of a dispatch: what is more goes into another pass. Some
/// software drivers leave loops after so many iterations.
#[test]
fn a_very_long_sequence() {
    let model = safetensors(&exact(random_model([1, 1, 64, 64, VOCAB, 8], 7)));
    let prompt = prompt(70_000, 3);
    let want = Reference::new(&support::open(model.clone(), None).unwrap()).read(&prompt, Logits::Last);
    for options in modes(100_000) {
        want.holds(&alone(&engine(model.clone(), options), &prompt), "70,000 tokens");
    }
}

/// In the default mode, too, where kernels are chosen by the length of a pass.
#[test]
fn lengths_of_calls_do_not_matter() {
    let prompt = prompt(600, 4);
    let want = Reference::small().read(&prompt, Logits::Last);
    for engine in smalls() {
        for length in [1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 512, 600] {
            let mut session = engine.session();
            prompt.chunks(length).for_each(|tokens| session.prefill(tokens).unwrap());
            want.holds(&session, &format!("calls of {length}"));
        }
    }
}

/// Every sequence of a batch is as it is alone, and does not change with its place: not by a bit, where all are
/// in one pass, or nothing depends on the passes.
#[test]
fn batches_of_any_size() {
    let lengths: Vec<usize> = (0..300).map(|i| 1 + i % 3).collect();
    let prompts = prompts(&lengths, VOCAB, 5);
    let wants: Vec<Want> =
        prompts.iter().map(|prompt| Reference::small().read(prompt, Logits::Last)).collect();
    for (engine, invariant) in smalls().iter().zip([false, true]) {
        let singles: Vec<_> = prompts.iter().map(|prompt| shown(&alone(engine, prompt))).collect();
        for n in [1, 31, 32, 33, 63, 64, 65, 300] {
            let sessions = together(engine, &prompts[..n]);
            for (i, session) in sessions.iter().enumerate() {
                wants[i].holds(session, &format!("{i} of {n}"));
                if invariant {
                    assert_eq!(shown(session), singles[i], "{i} of {n}: bits");
                }
            }
            let mut turned = prompts[..n].to_vec();
            turned.rotate_left(n / 3);
            let mut turned = together(engine, &turned);
            turned.rotate_right(n / 3);
            for (i, (turned, session)) in turned.iter().zip(&sessions).enumerate() {
                wants[i].holds(turned, &format!("{i} of {n}, in another order"));
                if invariant || n < 300 {
                    assert_eq!(shown(turned), shown(session), "{i} of {n}, in another order: bits");
                }
            }
        }
    }
}

/// A vocabulary that is not round has no tokens beyond its end.
#[test]
fn a_vocabulary_that_is_not_round() {
    const WIDE: usize = 50_277;
    let model = safetensors(&exact(random_model([1, 1, 64, 64, WIDE, 8], 7)));
    let prompt = [vec![50_276, 0], prompts(&[7], WIDE, 6).remove(0)].concat();
    let want = Reference::new(&support::open(model.clone(), None).unwrap()).read(&prompt, Logits::All);
    let cpu = alone(&engine(model.clone(), on_cpu()), &prompt);
    for options in modes(16) {
        let engine = engine(model.clone(), options);
        let mut session = engine.session();
        want.logits_hold(&session.logits_of(&prompt).unwrap(), "all");
        want.holds(&session, "in the end");
        for sampler in samplers() {
            let of = |session: &Session| generate(&mut session.fork(), sampler, 8);
            // Logits deviate by 4: among 50,277 no two of the best are as near as rounding.
            assert_eq!(of(&session), of(&cpu), "{sampler:?}");
        }
        assert!(matches!(session.step(50_277), Err(Error::Token { token: 50_277, .. })), "none beyond");
        assert_eq!(
            engine.report().unwrap().together,
            1,
            "rows of so many logits do not begin where they can be bound"
        );
    }
}

/// Heads of other sizes are for the CPU.
#[test]
fn head_size_128() {
    let Some(options) = on_gpu() else { return };
    let model = safetensors(&random_model([2, 1, 128, 64, VOCAB, 8], 7));
    let error = try_engine(model.clone(), options).unwrap_err();
    assert!(matches!(error, Error::Gpu(gpu::Error::HeadSize { got: 128, want: 64 })), "{error}");
    // Whoever names an adapter wants no other.
    if std::env::var_os(rwkv_kernels::gpu::ADAPTER).is_none() {
        let engine = engine(model, EngineOptions { device: Device::Auto, ..on_cpu() });
        assert_eq!(engine.report().unwrap().device, "CPU", "whatever the machine has");
        assert!(alone(&engine, &[1, 2]).logits().unwrap().iter().all(|l| l.is_finite()), "runs");
    }
}

/// An adapter that is not there is said, with those that are.
#[test]
fn no_such_adapter() {
    let Some(options) = on_gpu() else { return };
    let of = |name: &str| EngineOptions { device: Device::Gpu(Some(name.to_owned())), ..options.clone() };
    for name in ["no such adapter", "4711"] {
        let error = try_engine(safetensors(&small_model()), of(name)).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
    assert!(try_engine(safetensors(&small_model()), of("0")).is_ok(), "by number");
}

// ---- Mistakes ----

#[test]
fn a_token_that_is_none_harms_nothing() {
    for engine in smalls() {
        let prompt = prompt(9, 6);
        let mut session = alone(engine, &prompt);
        let before = shown(&session);
        for bad in [NO_TOKEN, 65_535, u32::MAX] {
            assert!(matches!(session.step(bad), Err(Error::Token { token, .. }) if token == bad), "{bad}");
            let long = [vec![1; 700], vec![bad]].concat();
            assert!(
                matches!(session.prefill(&long), Err(Error::Token { index: 700, .. })),
                "{bad} in a later pass"
            );
        }
        assert_eq!(shown(&session), before, "as it was");
        session.step(4).unwrap();
        let mut want = alone(engine, &prompt);
        want.step(4).unwrap();
        assert_eq!(shown(&session), shown(&want), "and works on");
    }
}

/// Weights that a half cannot hold are refused by name, the largest that it can are not.
#[test]
fn weights_beyond_half_precision() {
    let Some(options) = on_gpu() else { return };
    let names = [
        "emb.weight",
        "head.weight",
        "blocks.1.att.key.weight",
        "blocks.1.att.output.weight",
        "blocks.0.att.w1",
        "blocks.1.att.v2",
        "blocks.0.ffn.key.weight",
        "blocks.1.ffn.value.weight",
    ];
    for (name, dtype) in names.iter().flat_map(|&name| ["F32", "BF16"].map(|dtype| (name, dtype))) {
        let with = |value: f32| {
            let mut model = random_model([2, 1, 64, 128, VOCAB, 8], 7);
            let tensor = model.iter_mut().find(|t| t.name == name).unwrap();
            let mut values = tensor.values();
            values[200] = value;
            *tensor = Tensor::new(name, &tensor.shape, &values).to(dtype);
            safetensors(&model)
        };
        let error = try_engine(with(-65_536.0), options.clone()).unwrap_err();
        assert!(matches!(error, Error::Gpu(gpu::Error::Checkpoint(_))), "{name} {dtype}: {error:?}");
        for part in [name, "-6.5536e4", "element 200,"] {
            assert!(error.to_string().contains(part), "{name} {dtype}: {error}");
        }
        assert!(try_engine(with(-65_536.0), on_cpu()).is_ok(), "{name} {dtype}: the CPU has it");
        for weights in ["int8", "int4"].map(|of| of.parse::<Recipe>().unwrap()) {
            let [on_gpu, on_cpu] = [options.clone(), on_cpu()]
                .map(|options| EngineOptions { weights: weights.clone(), ..options });
            assert!(try_engine(with(-60_000.0), on_gpu.clone()).is_ok(), "{name} {dtype} in {weights}");
            let error = try_engine(with(-65_536.0), on_gpu).unwrap_err();
            let of_checkpoint = matches!(error, Error::Gpu(gpu::Error::Checkpoint(_)));
            assert!(of_checkpoint, "{name} {dtype} in {weights}: {error:?}");
            let error = error.to_string();
            for part in [name, "element 200,", "-6.55"] {
                assert!(error.contains(part), "{name} {dtype} in {weights}: {error}");
            }
            assert!(
                try_engine(with(-65_536.0), on_cpu).is_ok(),
                "{name} {dtype} in {weights}: the CPU has it"
            );
        }
        let largest = if dtype == "F32" { 65_504.0 } else { 65_280.0 };
        assert!(
            name != "head.weight" || try_engine(with(largest), options.clone()).is_ok(),
            "{dtype}: {largest}"
        );
    }
}

/// The same weights, whatever the file has them in: the same bits.
#[test]
fn types_of_checkpoints() {
    let Some(options) = on_gpu() else { return };
    let prompt = prompt(40, 8);
    let want = shown(&alone(&smalls()[0], &prompt));
    for dtype in ["F16", "BF16", "F32"] {
        let model: Vec<_> = small_model().iter().map(|tensor| tensor.to(dtype)).collect();
        let engine = engine(safetensors(&model), options.clone());
        assert_eq!(shown(&alone(&engine, &prompt)), want, "{dtype}");
    }
}

// ---- Sequences on the device ----

/// That two sessions stand at the same place: by what they show, and by what they say next.
fn the_same(got: &Session, want: &Session, what: &str) {
    assert_eq!(shown(got), shown(want), "{what}");
    for sampler in samplers() {
        let next = |session: &Session| generate(&mut session.fork(), sampler, 6);
        assert_eq!(next(got), next(want), "{what}: {sampler:?}");
    }
}

/// A session that read a prompt and was given these tokens as generated.
fn retold(engine: &Engine, prompt: &[u32], generated: &[u32]) -> Session {
    let mut session = alone(engine, prompt);
    generated.iter().for_each(|&token| session.accept(token).map(|_| ()).unwrap());
    session
}

#[test]
fn forks_and_snapshots_go_on_bit_equal() {
    for engine in smalls() {
        let mut session = alone(engine, &prompt(40, 1));
        generate(&mut session, penalised(), 5);
        let (snapshot, mut fork) = (session.snapshot(), session.fork());
        let first = generate(&mut session, penalised(), 20);
        let end = shown(&session);
        assert_eq!(
            (generate(&mut fork, penalised(), 20), shown(&fork)),
            (first.clone(), end.clone()),
            "fork"
        );
        // Others come and go in between, and write to whatever is free.
        (0..20).for_each(|seed| drop(alone(engine, &prompt(5, seed))));
        session.restore(&snapshot).unwrap();
        assert_eq!(
            (generate(&mut session, penalised(), 20), shown(&session)),
            (first.clone(), end),
            "restored"
        );
        // The state alone has the same future, but for what was counted.
        session.restore(&snapshot).unwrap();
        let mut state = engine.session();
        state.start_from(&session.state().unwrap()).unwrap();
        assert_eq!(state.step(first[0]).unwrap(), session.step(first[0]).unwrap(), "from the state");
        assert_eq!(state.state().unwrap(), session.state().unwrap(), "from the state");
    }
}

/// Records that others have left: a new session is empty all the same.
#[test]
fn new_sessions_are_empty() {
    for options in modes(64) {
        let engine = engine(safetensors(&small_model()), options);
        let fresh = shown(&alone(&engine, &prompt(11, 2)));
        assert!(engine.session().state().unwrap().iter().all(|&x| x.to_bits() == 0), "before any");
        for seed in 0..5 {
            let mut sessions = together(&engine, &prompts(&[9; 30], VOCAB, seed));
            sessions.iter_mut().for_each(|session| drop(generate(session, penalised(), 2)));
        }
        assert!(engine.session().state().unwrap().iter().all(|&x| x.to_bits() == 0), "after many");
        assert_eq!(shown(&alone(&engine, &prompt(11, 2))), fresh, "after many");
        let mut used = alone(&engine, &prompt(30, 3));
        used.start_from(&engine.session().state().unwrap()).unwrap();
        used.prefill(&prompt(11, 2)).unwrap();
        assert_eq!(shown(&used), fresh, "from a state of nothing");
    }
}

/// Steps run ahead of the host; those that nobody took have not been.
#[test]
fn a_generator_dropped_leaves_no_trace() {
    for engine in smalls() {
        let prompt = prompt(12, 4);
        for sampler in samplers() {
            for n in [0, 1, 2, 3, 4, 9] {
                let mut session = alone(engine, &prompt);
                let first = generate(&mut session, sampler, n);
                assert_eq!((first.len(), session.position()), (n, 12 + n as u64), "taken");
                the_same(&session, &retold(engine, &prompt, &first), &format!("{n} tokens of {sampler:?}"));
                // In two parts as in one.
                let rest = generate(&mut session, sampler, 15 - n);
                let whole = generate(&mut alone(engine, &prompt), sampler, 15);
                assert_eq!([first, rest].concat(), whole, "{n} and then {}", 15 - n);
            }
        }
    }
}

/// However few rows a pass has, and so few of logits, steps are submitted together.
#[test]
fn steps_of_few_rows_go_together() {
    let Some(options) = on_gpu() else { return };
    let want = generate(&mut alone(&smalls()[0], &prompt(8, 2)), penalised(), 15);
    for (pass_tokens, together) in [(1, 1), (2, 2), (3, 3), (4, 3)] {
        let engine = engine(safetensors(&small_model()), EngineOptions { pass_tokens, ..options.clone() });
        assert_eq!(engine.report().unwrap().together, together, "passes of {pass_tokens}");
        let mut session = alone(&engine, &prompt(8, 2));
        assert_eq!(generate(&mut session, penalised(), 15), want, "passes of {pass_tokens}");
        the_same(&session, &retold(&engine, &prompt(8, 2), &want), "in the end");
    }
}

/// The device samples as the host does, of the same logits.
#[test]
fn what_is_sampled_is_what_the_host_samples() {
    for engine in smalls() {
        for sampler in samplers() {
            let mut session = alone(engine, &prompt(8, 2));
            let tokens = generate(&mut session.fork(), sampler, 40);
            for (i, &token) in tokens.iter().enumerate() {
                assert_eq!(session.sample(&sampler).unwrap(), token, "token {i} of {sampler:?}");
                session.accept(token).unwrap();
            }
        }
    }
}

/// A stop sequence, the end of the tokens: the session has read what was generated, and nothing else.
#[test]
fn text_leaves_the_session_where_it_ends() {
    let Some(engine) = bundled() else { return };
    let prompt = bytes(b"It was");
    let options = |max_tokens, stop: &[&str]| TextOptions {
        sampler: Sampler { frequency_penalty: 0.05, ..Sampler::greedy() },
        max_tokens,
        stop: stop.iter().map(|&s| s.to_owned()).collect(),
    };
    let text = |options| {
        let mut session = alone(engine, &prompt);
        let mut text = session.text(options).unwrap();
        let whole: String = text.by_ref().map(Result::unwrap).collect();
        let (reason, tokens) = (text.finish_reason().unwrap(), text.tokens());
        (session, whole, reason, tokens)
    };
    let (session, whole, reason, tokens) = text(options(60, &[]));
    assert_eq!((reason, tokens, whole.len()), (FinishReason::Length, 60, 60), "{whole:?}");
    the_same(&session, &retold(engine, &prompt, &bytes(whole.as_bytes())), "in the end");
    let stop = &whole[20..25];
    let (session, before, reason, tokens) = text(options(60, &[stop]));
    assert_eq!(reason, FinishReason::Stop(0), "{before:?}");
    let read = &whole[..tokens];
    assert_eq!((before.as_str(), read.ends_with(stop)), (&whole[..tokens - 5], true), "{read:?}");
    the_same(&session, &retold(engine, &prompt, &bytes(read.as_bytes())), "at the stop");
    // Dropped in the middle: each token that was taken was read.
    let mut session = alone(engine, &prompt);
    let mut text = session.text(options(60, &[])).unwrap();
    let taken: String = text.by_ref().take(7).map(Result::unwrap).collect();
    the_same(&session, &retold(engine, &prompt, &bytes(taken.as_bytes())), "dropped");
}

/// A model that says `b`, and after some the end of text: that is not read.
#[test]
fn an_end_of_text_is_not_read() {
    let lines: String = (0..256).map(|b| format!("{} b'\\x{b:02x}' 1\n", b + 1)).collect();
    let world = Tokenizer::World(World::parse(&lines).unwrap());
    let (token, mut model) = (99, random_model([1, 1, 64, 64, 260, 8], 1));
    let mut head = vec![0.0; 260 * 64];
    head[token * 64..][..64].fill(1.0 / 8.0); // a logit of 8, and of 5 for the end of text
    head[..64].fill(5.0 / 64.0);
    for (name, shape, values) in [
        ("ln_out.weight", vec![64], vec![0.0; 64]),
        ("ln_out.bias", vec![64], vec![1.0; 64]),
        ("head.weight", vec![260, 64], head),
    ] {
        *model.iter_mut().find(|t| t.name == name).unwrap() = Tensor::new(name, &shape, &values);
    }
    for options in modes(16) {
        let engine = engine(safetensors(&model), EngineOptions { tokenizer: Some(world.clone()), ..options });
        let sampler = Sampler { frequency_penalty: 1.0, ..Sampler::greedy() };
        let mut session = alone(&engine, &[5, 6]);
        let mut text = session.text(TextOptions { sampler, max_tokens: 9, stop: Vec::new() }).unwrap();
        let whole: String = text.by_ref().map(Result::unwrap).collect();
        let ended = (text.finish_reason(), text.tokens());
        // 8, 7, 6, 5: of equals the lower token.
        assert_eq!((whole.as_str(), ended), ("bbb", (Some(FinishReason::EndOfText), 3)), "ends");
        the_same(&session, &retold(&engine, &[5, 6], &[99, 99, 99]), "the end is not read");
    }
}

/// Two generators take turns, while a third session is read and others come and go: each gives what it gives alone.
#[test]
fn generators_take_turns() {
    for engine in smalls() {
        let [one, other] = [alone(engine, &prompt(9, 1)), alone(engine, &prompt(14, 2))];
        let [default, _, all] = samplers();
        let want = [generate(&mut one.fork(), default, 40), generate(&mut other.fork(), all, 20)];
        let (mut a, mut b, mut third) = (one.fork(), other.fork(), engine.session());
        let mut got = [Vec::new(), Vec::new()];
        let [mut first, mut second] =
            [Box::new(a.generate(default)) as Box<dyn Iterator<Item = _>>, Box::new(b.generate(all))];
        for i in 0..20 {
            got[0].push(first.next().unwrap().unwrap());
            match i % 4 {
                0 => drop(third.logits_of(&[i, 2, 3]).unwrap()),
                1 => drop(third.step(i).unwrap().to_vec()),
                2 => drop(together(engine, &prompts(&[3, 1, 2], VOCAB, i.into()))),
                _ => {}
            }
            got[0].push(first.next().unwrap().unwrap());
            got[1].push(second.next().unwrap().unwrap());
        }
        drop((first, second));
        assert_eq!(got, want, "tokens");
        the_same(&a, &retold(engine, &prompt(9, 1), &want[0]), "the one");
        the_same(&b, &retold(engine, &prompt(14, 2), &want[1]), "the other");
    }
}

/// Sessions of several threads on one engine.
#[test]
fn threads_share_an_engine() {
    for engine in smalls() {
        let own = |seed: u64| {
            let mut session = alone(engine, &prompt(3 + usize::try_from(seed).unwrap(), seed));
            let sampler = Sampler { seed, ..penalised() };
            let tokens = generate(&mut session, sampler, 20);
            (tokens, shown(&session))
        };
        let want: Vec<_> = (0..4).map(own).collect();
        let got: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|seed| scope.spawn(move || own(seed))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(got, want, "as one after the other");
    }
}

/// There is room for a few sequences at first. It grows, and what was there stays, also under a generator's feet.
#[test]
fn room_grows() {
    for options in modes(64) {
        let engine = engine(safetensors(&small_model()), options);
        let mut session = alone(&engine, &prompt(9, 1));
        let mut generator = session.generate(penalised());
        let mut tokens: Vec<u32> = generator.by_ref().take(3).map(Result::unwrap).collect();
        let mut kept = Vec::new();
        for seed in 0..6 {
            kept.extend((0..10).map(|i| (seed, i)).zip(together(&engine, &prompts(&[2; 10], VOCAB, seed))));
            tokens.extend(generator.by_ref().take(3).map(Result::unwrap));
        }
        drop(generator);
        the_same(&session, &retold(&engine, &prompt(9, 1), &tokens), "under way");
        assert_eq!(tokens, generate(&mut alone(&engine, &prompt(9, 1)), penalised(), 21), "all the while");
        for ((seed, i), session) in &kept {
            let prompt = &prompts(&[2; 10], VOCAB, *seed)[*i];
            let want = Reference::small().read(prompt, Logits::Last);
            want.holds(session, &format!("session {i} of {seed}"));
        }
    }
}

// ---- Forms of a step, and what is told of them ----

/// One dispatch for each operation, and kernels that keep to what every device has.
#[test]
fn fused_or_not_and_portable() {
    let Some(options) = on_gpu() else { return };
    let options = EngineOptions { pass_tokens: 64, ..options };
    let portable = EngineOptions { portable: true, ..options.clone() };
    for (form, options) in [("un-fused", EngineOptions { fused: false, ..options }), ("portable", portable)] {
        let engine = engine(safetensors(&small_model()), options);
        let kernels = engine.report().unwrap().kernels;
        assert!(
            form != "portable" || kernels.iter().all(|of| !of.contains("subgroup") && !of.contains("coop")),
            "{kernels:?}"
        );
        let prompt = prompt(100, 9);
        for length in [1, 2, 33, 64, 100] {
            let mut session = engine.session();
            prompt.chunks(length).for_each(|tokens| session.prefill(tokens).unwrap());
            let want = Reference::small().read(&prompt, Logits::Last);
            want.holds(&session, &format!("{form}: calls of {length}"));
        }
        let mut session = engine.session();
        let all = session.logits_of(&prompt).unwrap();
        Reference::small().read(&prompt, Logits::All).logits_hold(&all, form);
        let tokens = generate(&mut session, Sampler::greedy(), 20);
        the_same(&session, &retold(&engine, &prompt, &tokens), form);
    }
}

/// A form of the state update over prompts of the small model, whatever their lengths, alone and side by side, with single tokens
/// before and after.
fn agrees_over_prompts(engine: &Engine, form: &str) {
    let prompt = prompt(200, 9);
    let want = Reference::small().read(&prompt, Logits::Last);
    for length in [9, 16, 33, 100, 200] {
        let mut session = engine.session();
        prompt.chunks(length).for_each(|tokens| session.prefill(tokens).unwrap());
        want.holds(&session, &format!("{form}, calls of {length}"));
    }
    let prompts = prompts(&[70, 1, 16, 2, 100, 17], VOCAB, 5);
    for (prompt, session) in prompts.iter().zip(together(engine, &prompts)) {
        let what = format!("{form}, {} tokens beside others", prompt.len());
        Reference::small().read(prompt, Logits::Last).holds(&session, &what);
    }
}

/// That a form is another than one token after the other.
fn is_another_form(options: &EngineOptions, wkv: Option<Wkv>) -> bool {
    let prompt = prompt(200, 9);
    let shown = [Some(Wkv::Sequential), wkv].map(|wkv| {
        let options = EngineOptions { wkv, ..options.clone() };
        shown(&alone(&engine(safetensors(&small_model()), options), &prompt))
    });
    shown[0] != shown[1]
}

#[test]
fn chunks_agree_with_the_reference() {
    let Some(options) = on_gpu() else { return };
    for chunk in [16, 32, 64] {
        let wkv = Some(Wkv::Chunked(chunk));
        let options = EngineOptions { wkv, pass_tokens: 256, ..options.clone() };
        let by_chunks = engine(safetensors(&small_model()), options.clone());
        let kernels = by_chunks.report().unwrap().kernels;
        assert!(kernels.iter().any(|of| of == "wkv7_chunked"), "{kernels:?}");
        agrees_over_prompts(&by_chunks, &format!("chunks of {chunk}"));
        assert!(is_another_form(&options, wkv), "another form");
        if chunk == 64 {
            let bundled = Engine::open_with(BUNDLED, options, &|_| {}).unwrap();
            let (tokens, want) = passage();
            let mut session = bundled.session();
            want.logits_hold(&session.logits_of(tokens).unwrap(), "the bundled model, by chunks");
            want.holds(&session, "the bundled model, by chunks");
        }
    }
}

/// The group norm, the bonus and the gate in a dispatch of their own, of single tokens and several sequences, whatever their
/// states are held in; of prompts they always are.
#[test]
fn the_norm_apart() {
    let Some(options) = on_gpu() else { return };
    let options = EngineOptions { pass_tokens: 64, ..options };
    let prompt = prompt(40, 9);
    for state in [Resident::default(), Resident::lazy(3)] {
        let options = EngineOptions { state, ..options.clone() };
        let [apart, fused] = [false, true].map(|fused_norm| {
            engine(safetensors(&small_model()), EngineOptions { fused_norm, ..options.clone() })
        });
        let ([apart_of, fused_of], layers) = ([&apart, &fused].map(|of| of.report().unwrap()), 2);
        assert_eq!(apart_of.step_dispatches, fused_of.step_dispatches + layers, "one token: {apart_of:?}");
        assert_eq!(apart_of.batch_dispatches, fused_of.batch_dispatches + layers, "several: {apart_of:?}");
        for length in [1, 2, 7, 33] {
            let mut session = apart.session();
            prompt.chunks(length).for_each(|tokens| session.prefill(tokens).unwrap());
            let want = Reference::small().read(&prompt, Logits::Last);
            want.holds(&session, &format!("{state:?}: calls of {length}"));
        }
        let prompts = prompts(&[3, 1, 2, 1, 5], VOCAB, 5);
        for (prompt, session) in prompts.iter().zip(together(&apart, &prompts)) {
            let what = format!("{state:?}: {} tokens beside others", prompt.len());
            Reference::small().read(prompt, Logits::Last).holds(&session, &what);
        }
        let mut session = alone(&apart, &prompt);
        let tokens = generate(&mut session, Sampler::greedy(), 9);
        the_same(&session, &retold(&apart, &prompt, &tokens), "generated");
    }
    // Of layers that are left out nothing is wanted but their states.
    let model = exact(random_model([3, 2, 64, 96, VOCAB, 8], 7));
    let skip = |fused_norm| {
        let skip = Some(Skipping::new(Listed(vec![1])));
        let options = EngineOptions { fused_norm, skip, ..options.clone() };
        let engine = engine(safetensors(&model), options);
        let mut session = alone(&engine, &prompt[..20]);
        for &token in &prompt[20..] {
            session.step(token).unwrap();
        }
        session.logits().unwrap().to_vec()
    };
    let [got, want] = [false, true].map(skip);
    let reference = Reference::new(&support::open(safetensors(&model), None).unwrap());
    let limit = reference.read(&prompt, Logits::Last).limits[0];
    max_abs(&got, &want.iter().copied().map(f64::from).collect::<Vec<_>>(), limit).unwrap();
}

/// One sum for four tokens is the default where subgroups are large enough, with more rows of a state to a workgroup where there
/// are many heads; elsewhere there is one for each.
#[test]
fn fours_agree_with_the_reference() {
    let Some(options) = on_gpu() else { return };
    let options = EngineOptions { pass_tokens: 256, ..options };
    let by_fours = engine(safetensors(&small_model()), options.clone());
    agrees_over_prompts(&by_fours, "by fours");
    let kernels = by_fours.report().unwrap().kernels;
    let has_fours = kernels.iter().any(|of| of == "wkv7_fours_subgroup");
    assert_eq!(is_another_form(&options, None), has_fours, "{kernels:?}");
    let prompts = prompts(&[12; 20], VOCAB, 3);
    for (at, (prompt, session)) in prompts.iter().zip(together(&by_fours, &prompts)).enumerate() {
        let what = format!("by fours, prompt {at} of {}", prompts.len());
        Reference::small().read(prompt, Logits::Last).holds(&session, &what);
    }
}

#[test]
fn few_dispatches() {
    for engine in [bundled(), smalls().first()].into_iter().flatten() {
        let report = engine.report().unwrap();
        let ModelConfig { n_layers, .. } = *engine.config();
        assert!(report.step_dispatches <= 5 * n_layers, "one token: {report:?}");
        assert!(report.batch_dispatches <= 9 * n_layers, "many: {report:?}");
        assert!(report.step_dispatches.min(report.batch_dispatches) > 0, "some: {report:?}");
        assert!(report.together > 1, "steps of a submission: {report:?}");
        assert!(!report.device.is_empty() && report.device != "CPU", "{report:?}");
        let distinct: BTreeSet<_> = report.kernels.iter().collect();
        assert!(distinct.len() == report.kernels.len() && !distinct.is_empty(), "each once: {report:?}");
    }
    let report = bundled_cpu().report().unwrap();
    assert_eq!(
        (report.device.as_str(), report.step_dispatches, report.kernels.len()),
        ("CPU", 0, 0),
        "on the CPU"
    );
}

/// Every dispatch is named and timed, and what is timed gives the same bits.
#[test]
fn profiles_name_every_dispatch() {
    let Some(options) = on_gpu() else { return };
    let engine =
        engine(safetensors(&small_model()), EngineOptions { timestamps: true, pass_tokens: 512, ..options });
    assert!(engine.profile().unwrap().dispatches.is_empty(), "nothing yet");
    let begin = Instant::now();
    let mut session = alone(&engine, &prompt(40, 1));
    engine.wait().unwrap();
    let batch = engine.profile().unwrap().dispatches;
    alone(&engine, &prompt(3, 1));
    let few = engine.profile().unwrap().dispatches;
    session.step(3).unwrap();
    let step = engine.profile().unwrap().dispatches;
    generate(&mut session, Sampler::default(), 1);
    let generated = engine.profile().unwrap().dispatches;
    let elapsed = begin.elapsed().as_nanos() as f64;
    assert!(engine.profile().unwrap().dispatches.is_empty(), "each once");
    if batch.is_empty() {
        return; // the device has no timestamps
    }
    let layers =
        |layer: &[&'static str], head: &[&'static str]| [&["embedding"], layer, layer, head].concat();
    let of_step = layers(&["projections", "heads", "output", "key", "value"], &["head"]);
    let before = ["ln1", "projections", "adapters"];
    let after = ["output", "ln2", "key", "value"];
    // With cooperative matrices the value of few rows is in planes, of which the last layer's are summed before the norm.
    let kernels = engine.report().unwrap().kernels;
    let sum: &[&str] = if kernels.iter().any(|label| label == "add_planes") { &["sum"] } else { &[] };
    let end = [sum, &["ln_out", "head"]].concat();
    let batch_of = |heads: &[&'static str]| layers(&[&before, heads, &after].concat(), &end);
    let parts = |of: &[gpu::Dispatch]| of.iter().map(|dispatch| dispatch.part).collect::<Vec<_>>();
    assert_eq!(parts(&few), batch_of(&["heads"]), "few tokens");
    assert_eq!(parts(&batch), batch_of(&["operands", "heads", "readout"]), "many tokens");
    assert_eq!(parts(&step), of_step, "one token");
    assert_eq!(parts(&generated), [vec!["sample"], of_step].concat(), "generated");
    for dispatches in [&batch, &few, &step, &generated] {
        let mut end = 0.0;
        for dispatch in dispatches {
            assert!(kernels.contains(&dispatch.kernel), "{dispatch:?} of {kernels:?}");
            assert!((0.0..elapsed).contains(&dispatch.ns), "{dispatch:?} within {elapsed} ns");
            assert!(dispatch.start_ns >= end - 1.0, "{dispatch:?} before {end}");
            end = dispatch.start_ns + dispatch.ns;
        }
        assert!(dispatches.iter().map(|of| of.ns).sum::<f64>() > 0.0, "no time at all");
    }
    // More than there is room for: those that are not timed are run all the same.
    let want = generate(&mut alone(&smalls()[0], &prompt(40, 1)), penalised(), 400);
    assert_eq!(generate(&mut alone(&engine, &prompt(40, 1)), penalised(), 400), want, "timed or not");
    let many = engine.profile().unwrap().dispatches.len();
    assert!((1000..=4096).contains(&many), "{many} of 5,200");
    assert_eq!(engine.session().step(1).map(<[f32]>::len).unwrap(), VOCAB, "and works on");
    assert_eq!(engine.profile().unwrap().dispatches.len(), step.len(), "from the beginning");
}
