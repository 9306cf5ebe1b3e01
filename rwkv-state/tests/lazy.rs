//! Lazy states against the eager one: any history of steps, folds, forks, rollbacks and checkpoints leaves the same state.

use std::sync::Arc;

use proptest::prelude::*;
use rwkv_core::ModelConfig;
use rwkv_core::compare::{magnitude, max_abs};
use rwkv_core::config::Ranks;
use rwkv_core::ops::decay::DECAY_SCALE;
use rwkv_core::ops::wkv7::{Dims, Inputs, wkv7};
use rwkv_core::rng::SplitMix64;
use rwkv_state::format::{Rounding, SparseRule, StateFormat, float16, int8};
use rwkv_state::lazy::{
    Additive, Bytes, Checkpoint, Delta, DeltaFormat, Error, Extents, LazyLayers, LazyState,
};
use rwkv_state::{Resident, ResidentRounding, StateLayout};

const EXTENTS: Extents = Extents { n_heads: 2, head_size: 6 };

const fn folding(capacity: usize) -> Resident {
    Resident::lazy(capacity)
}

/// What is rounded, in every way that it can be.
fn residents() -> Vec<Resident> {
    use ResidentRounding::{DecayDither, Dither, Nearest, Stochastic};
    let halves = |capacity, rounding| Resident { rounding, ..Resident::f16(capacity) };
    let all = [0, 1, 7].into_iter().flat_map(|capacity| {
        [Nearest, Stochastic { seed: 3 }, Dither].map(|rounding| halves(capacity, rounding))
    });
    all.chain([halves(0, DecayDither), Resident::int8(16), Resident::int8(20)]).collect()
}

/// What is hard about the operands.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// Nothing: decays from fastest to none.
    Spread,
    /// Every channel decays as fast as can be.
    Fastest,
    /// No channel decays.
    Sticky,
    /// Channels decay as fast as can be and not at all, by turns.
    Alternating,
    /// One key is removed and written by every token.
    Repeated,
}

fn kinds() -> impl Strategy<Value = Kind> {
    prop::sample::select(vec![Kind::Spread, Kind::Fastest, Kind::Sticky, Kind::Alternating, Kind::Repeated])
}

/// Operands, each `[T, H, N]`.
#[derive(Clone, Debug)]
struct Operands {
    dims: Dims,
    r: Vec<f32>,
    lw: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
}

impl Operands {
    /// Draws from the operation's own domain: unit kappa, learning rates in [0, 1].
    fn draw(kind: Kind, extents: Extents, tokens: usize, seed: u64) -> Self {
        let dims = Dims { tokens, heads: extents.n_heads, head_size: extents.head_size };
        let (len, width, mut rng) = (dims.vector_len(), dims.heads * dims.head_size, SplitMix64::new(seed));
        let mut normal = |scale: f32| (0..len).map(|_| rng.normal() * scale).collect::<Vec<f32>>();
        let (r, mut k, v, mut kappa) = (normal(1.0), normal(1.0), normal(2.0), normal(1.0));
        for head in kappa.chunks_mut(dims.head_size) {
            let norm = head.iter().map(|x| x * x).sum::<f32>().sqrt();
            head.iter_mut().for_each(|x| *x /= norm);
        }
        if matches!(kind, Kind::Repeated) {
            for at in width..len {
                kappa[at] = kappa[at - width];
            }
            k.clone_from(&kappa);
        }
        #[expect(clippy::cast_possible_truncation, reason = "a bound for drawing")]
        let fastest = -DECAY_SCALE as f32;
        let lw = (0..len)
            .map(|at| match kind {
                Kind::Spread => rng.uniform(0.0, 1.0).powi(3) * fastest,
                Kind::Fastest => fastest,
                Kind::Sticky => 0.0,
                Kind::Alternating => [fastest, 0.0][at % 2],
                Kind::Repeated => -1e-6,
            })
            .collect();
        let all = matches!(kind, Kind::Repeated);
        let b = kappa.iter().map(|x| if all { *x } else { x * rng.uniform(0.0, 1.0) }).collect();
        let a = kappa.iter().map(|x| -x).collect();
        Self { dims, r, lw, k, v, a, b }
    }

    fn inputs(&self) -> Inputs<'_, f32> {
        Inputs { r: &self.r, lw: &self.lw, k: &self.k, v: &self.v, a: &self.a, b: &self.b }
    }

    /// Runs the definition in f64 from `state`: the states after each token, and the output.
    fn eager(&self, state: &[f64]) -> (Vec<Vec<f64>>, Vec<f64>) {
        let [r, lw, k, v, a, b] = [&self.r, &self.lw, &self.k, &self.v, &self.a, &self.b].map(|x| wide(x));
        let inputs = Inputs { r: &r, lw: &lw, k: &k, v: &v, a: &a, b: &b };
        let (mut state, mut states, mut y) = (state.to_vec(), Vec::new(), vec![f64::NAN; r.len()]);
        let width = self.dims.heads * self.dims.head_size;
        for (t, y) in y.chunks_exact_mut(width).enumerate() {
            wkv7(Dims { tokens: 1, ..self.dims }, inputs.part(t * width..(t + 1) * width), &mut state, y);
            states.push(state.clone());
        }
        (states, y)
    }

    /// The output of `step` over the tokens before `cut`, then over the others.
    fn run(&self, cut: usize, mut step: impl FnMut(usize, Inputs<'_, f32>, &mut [f32])) -> Vec<f32> {
        let (mut y, width) = (self.blank(), self.dims.heads * self.dims.head_size);
        for tokens in [0..cut, cut..self.dims.tokens] {
            let at = tokens.start * width..tokens.end * width;
            step(tokens.len(), self.inputs().part(at.clone()), &mut y[at]);
        }
        y
    }

    /// An output to be written.
    fn blank(&self) -> Vec<f32> {
        vec![f32::NAN; self.r.len()]
    }
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

fn normals(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = SplitMix64::new(seed);
    (0..len).map(|_| rng.normal()).collect()
}

fn state_len(extents: Extents) -> usize {
    extents.n_heads * extents.head_size * extents.head_size
}

fn stepped(state: &mut LazyState, x: &Operands) -> Vec<f32> {
    let mut y = x.blank();
    state.step(x.dims.tokens, x.inputs(), &mut y).expect("operands fit");
    y
}

/// `S x`, without and with the state written out.
fn readout(state: &LazyState) -> Vec<f32> {
    let extents = state.extents();
    let x = normals(extents.n_heads * extents.head_size, 99);
    let mut y = vec![f32::NAN; x.len()];
    state.read(&x, &mut y).expect("a vector per head");
    [y, state.materialize()].concat()
}

/// How far an f32 run of `tokens` tokens may be from the exact one, relative to the largest value: each token rounds
/// what it writes a handful of times, errors that add up as a random walk since the removal contracts; its readout has
/// `N` terms of the base and two for each pending entry, and half as many roundings at worst.
fn f32_limit(extents: Extents, tokens: usize, capacity: usize, scale: f64) -> f64 {
    let (t, n) = (tokens as f64, (extents.head_size + 2 * capacity) as f64);
    f64::from(f32::EPSILON) * scale * (n / 2.0 + 4.0 * t.sqrt() + 4.0)
}

/// What can happen to a lazy state.
#[derive(Clone, Debug)]
enum Act {
    Step(Kind, usize, u64),
    Update(Kind, usize, u64),
    Fold,
    Rollback(usize),
    Fork,
    Switch(usize),
    Checkpoint,
    Restore(usize),
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        8 => (kinds(), 0usize..7, any::<u64>()).prop_map(|(kind, tokens, seed)| Act::Step(kind, tokens, seed)),
        1 => (kinds(), 0usize..7, any::<u64>()).prop_map(|(kind, tokens, seed)| Act::Update(kind, tokens, seed)),
        1 => Just(Act::Fold),
        4 => (0usize..7).prop_map(Act::Rollback),
        1 => Just(Act::Fork),
        2 => (0usize..8).prop_map(Act::Switch),
        1 => Just(Act::Checkpoint),
        1 => (0usize..8).prop_map(Act::Restore),
    ];
    prop::collection::vec(act, 1..60)
}

/// A lazy state and the model of it: the eager state after each token. Beside them what the lazy state was after each
/// act that led here.
#[derive(Clone)]
struct Pair {
    lazy: LazyState,
    eager: Vec<Vec<f64>>,
    past: Vec<LazyState>,
}

impl Pair {
    fn check(&self, capacity: usize) -> Result<(), TestCaseError> {
        let scale = self.eager.iter().map(|s| magnitude(s)).fold(0.0, f64::max);
        let limit = f32_limit(self.lazy.extents(), self.eager.len(), capacity, scale);
        let found = max_abs(&self.lazy.materialize(), self.eager.last().expect("the start"), limit);
        prop_assert!(found.is_ok(), "state: {found:?}");
        prop_assert_eq!(self.lazy.tokens(), self.eager.len() as u64 - 1, "tokens read");
        prop_assert!(self.lazy.pending() <= capacity, "{} pending", self.lazy.pending());
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_history_leaves_the_eager_state(capacity in 0usize..9, acts in acts(), seed: u64) {
        let start = normals(state_len(EXTENTS), seed);
        let lazy = LazyState::new(EXTENTS, &start[..], folding(capacity)).unwrap();
        let mut pairs = vec![Pair { past: vec![lazy.clone()], lazy, eager: vec![wide(&start)] }];
        let mut checkpoints: Vec<(Checkpoint<LazyState>, Pair)> = Vec::new();
        let mut current = 0;
        for act in acts {
            let others: Vec<Vec<f32>> = pairs.iter().map(|p| readout(&p.lazy)).collect();
            let acting = current;
            let pair = &mut pairs[current];
            match act {
                Act::Step(kind, tokens, seed) | Act::Update(kind, tokens, seed) => {
                    let x = Operands::draw(kind, EXTENTS, tokens, seed);
                    let (states, want) = x.eager(pair.eager.last().unwrap());
                    pair.eager.extend(states);
                    let mut y = x.blank();
                    if matches!(act, Act::Step(..)) {
                        pair.lazy.step(tokens, x.inputs(), &mut y).unwrap();
                    } else {
                        pair.lazy.update(tokens as u64, |state| wkv7(x.dims, x.inputs(), state, &mut y));
                        prop_assert_eq!(pair.lazy.pending(), 0, "an update folds");
                    }
                    let scale = pair.eager.iter().map(|s| magnitude(s)).fold(magnitude(&want), f64::max);
                    let found = max_abs(&y, &want, f32_limit(EXTENTS, pair.eager.len(), capacity, scale));
                    prop_assert!(found.is_ok(), "y: {found:?}");
                }
                Act::Fold => {
                    let before = pair.lazy.materialize();
                    pair.lazy.fold();
                    prop_assert_eq!(pair.lazy.pending(), 0, "a fold leaves nothing");
                    prop_assert_eq!(pair.lazy.materialize(), before, "a fold changes nothing");
                }
                Act::Rollback(tokens) => {
                    let (pending, before) = (pair.lazy.pending(), readout(&pair.lazy));
                    if tokens > pending {
                        let error = Error::Rollback { asked: tokens, pending };
                        prop_assert_eq!(pair.lazy.rollback(tokens), Err(error), "too far");
                        prop_assert_eq!(readout(&pair.lazy), before, "an error changes nothing");
                    } else {
                        pair.lazy.rollback(tokens).unwrap();
                        pair.eager.truncate(pair.eager.len() - tokens);
                        pair.past.retain(|past| past.tokens() <= pair.lazy.tokens());
                        let here = (pair.lazy.tokens(), pair.lazy.pending());
                        for past in pair.past.iter().filter(|p| (p.tokens(), p.pending()) == here) {
                            prop_assert_eq!(readout(&pair.lazy), readout(past), "as it was, bit for bit");
                        }
                    }
                }
                Act::Fork => {
                    let fork = pair.clone();
                    prop_assert!(fork.lazy.base().ptr_eq(pair.lazy.base()), "a fork shares the base");
                    pairs.push(fork);
                }
                Act::Switch(to) => current = to % pairs.len(),
                Act::Checkpoint => checkpoints.push((pair.lazy.checkpoint(), pair.clone())),
                Act::Restore(from) => {
                    if let Some((checkpoint, then)) = checkpoints.get(from) {
                        pair.lazy.restore(checkpoint).unwrap();
                        prop_assert_eq!(readout(&pair.lazy), readout(&then.lazy), "as it was, bit for bit");
                        let lazy = pair.lazy.clone();
                        *pair = Pair { lazy, ..then.clone() };
                    }
                }
            }
            let now = pairs[acting].lazy.clone();
            pairs[acting].past.push(now);
            for (index, pair) in pairs.iter().enumerate() {
                pair.check(capacity)?;
                if index != acting && index < others.len() {
                    prop_assert_eq!(&readout(&pair.lazy), &others[index], "forks do not see each other");
                }
            }
        }
    }

    /// How tokens are spread over calls does not matter, bit for bit.
    #[test]
    fn calls_compose(kind in kinds(), capacity in 0usize..9, tokens in 1usize..30, cut in 0usize..30, seed: u64) {
        let cut = cut.min(tokens);
        let x = Operands::draw(kind, EXTENTS, tokens, seed);
        let start = normals(state_len(EXTENTS), seed);
        let mut lazy = LazyState::new(EXTENTS, &start[..], folding(capacity)).unwrap();
        let mut cut_up = lazy.clone();
        let whole = x.run(tokens, |t, x, y| lazy.step(t, x, y).unwrap());
        let pieces = x.run(cut, |t, x, y| cut_up.step(t, x, y).unwrap());
        prop_assert_eq!((whole, readout(&lazy)), (pieces, readout(&cut_up)), "factored");
        for resident in residents() {
            let mut lazy = LazyState::new(EXTENTS, &start, resident).unwrap();
            let mut cut_up = lazy.clone();
            let whole = x.run(tokens, |t, x, y| lazy.step(t, x, y).unwrap());
            let pieces = x.run(cut, |t, x, y| cut_up.step(t, x, y).unwrap());
            prop_assert_eq!((whole, readout(&lazy)), (pieces, readout(&cut_up)), "{:?}", resident);
        }
        for format in [DeltaFormat::F32, DeltaFormat::F16] {
            let mut additive = Additive::new(EXTENTS, &start[..], format).unwrap();
            let mut cut_up = additive.clone();
            let whole = x.run(tokens, |t, x, y| additive.step(t, x, y).unwrap());
            let pieces = x.run(cut, |t, x, y| cut_up.step(t, x, y).unwrap());
            prop_assert_eq!((whole, additive.materialize()), (pieces, cut_up.materialize()), "{:?}", format);
        }
    }

    /// A state that is written out at every token is the definition, bit for bit.
    #[test]
    fn capacity_zero_is_the_definition(kind in kinds(), tokens in 0usize..20, seed: u64) {
        let x = Operands::draw(kind, EXTENTS, tokens, seed);
        let (mut state, mut want) = (normals(state_len(EXTENTS), seed), x.blank());
        let mut lazy = LazyState::new(EXTENTS, &state[..], folding(0)).unwrap();
        let y = stepped(&mut lazy, &x);
        wkv7(x.dims, x.inputs(), &mut state, &mut want);
        prop_assert_eq!((lazy.materialize(), y), (state, want), "state and output");
    }

    #[test]
    fn an_additive_state_is_the_eager_one(kind in kinds(), tokens in 0usize..60, seed: u64) {
        let x = Operands::draw(kind, EXTENTS, tokens, seed);
        let start = normals(state_len(EXTENTS), seed);
        let (states, want) = x.eager(&wide(&start));
        let end = states.last().cloned().unwrap_or_else(|| wide(&start));
        let scale = states.iter().map(|s| magnitude(s)).fold(magnitude(&want).max(magnitude(&start)), f64::max);
        for format in [DeltaFormat::F32, DeltaFormat::F16] {
            // Halves: at most one unit, 2^-10, of the largest value per token. The removal contracts, and no more than
            // `N` of these errors meet in a readout.
            let halves = 2f64.powi(-10) * scale * tokens as f64 * (EXTENTS.head_size as f64).sqrt();
            let limit = f32_limit(EXTENTS, tokens, 0, scale) + if format == DeltaFormat::F16 { halves } else { 0.0 };
            let (mut additive, mut y) = (Additive::new(EXTENTS, &start[..], format).unwrap(), x.blank());
            additive.step(tokens, x.inputs(), &mut y).unwrap();
            let (state, y) = (max_abs(&additive.materialize(), &end, limit), max_abs(&y, &want, limit));
            prop_assert!(state.is_ok() && y.is_ok(), "{format:?}: {state:?} {y:?}");
            let (asked, mut got) = (normals(EXTENTS.n_heads * EXTENTS.head_size, 1), [f32::NAN; 12]);
            additive.read(&asked, &mut got).unwrap();
            let want: Vec<f64> = (0..12)
                .map(|i| (0..6).map(|j| end[i * 6 + j] * f64::from(asked[i / 6 * 6 + j])).sum())
                .collect();
            let found = max_abs(&got, &want, limit * 6.0 * magnitude(&asked));
            prop_assert!(found.is_ok(), "{format:?}, read: {found:?}");
        }
    }

    /// One token in halves is one token in single precision, but for the stated rounding.
    #[test]
    fn halves_round_by_less_than_a_unit(kind in kinds(), tokens in 0usize..9, scale in -30i32..30, seed: u64) {
        let mut x = Operands::draw(kind, EXTENTS, tokens + 1, seed);
        x.v.iter_mut().for_each(|v| *v *= 2f32.powi(scale));
        let last = tokens * EXTENTS.n_heads * EXTENTS.head_size;
        let base = vec![0.0; state_len(EXTENTS)];
        let mut halves = Additive::new(EXTENTS, base, DeltaFormat::F16).unwrap();
        halves.step(tokens, x.inputs().part(0..last), &mut x.blank()[..last]).unwrap();
        let (token, dims) = (x.inputs().part(last..x.r.len()), Dims { tokens: 1, ..x.dims });
        // without a base the delta is the state
        let (mut want, mut y) = (halves.materialize(), [f32::NAN; 12]);
        wkv7(dims, token, &mut want, &mut y);
        halves.step(1, token, &mut y).unwrap();
        for (row, want) in halves.materialize().chunks_exact(6).zip(want.chunks_exact(6)) {
            let largest = magnitude(want);
            for (&got, &want) in row.iter().zip(want) {
                let (error, want) = (f64::from(got) - f64::from(want), f64::from(want));
                let rounded = f64::from(f32::EPSILON) * largest * 4.0;
                let limit = (2f64.powi(-10) * want.abs()).max(2f64.powi(-30) * largest) + rounded;
                prop_assert!(error.abs() <= limit, "{got} for {want} of {largest}");
            }
        }
    }
}

/// Entries are the fork's own from the start, the base from the first fold on.
#[test]
fn forks_share_the_base_until_they_fold() {
    for resident in [Resident::lazy(4), Resident::f16(4)] {
        let mut state = LazyState::new(EXTENTS, &normals(state_len(EXTENTS), 1), resident).unwrap();
        let (before, stored) = (state.clone(), state.materialize());
        stepped(&mut state, &Operands::draw(Kind::Spread, EXTENTS, 2, 2));
        let mut fork = state.clone();
        stepped(&mut fork, &Operands::draw(Kind::Spread, EXTENTS, 2, 3));
        let checkpoint = fork.checkpoint();
        assert!(before.base().ptr_eq(fork.base()), "four are pending and there is room for them");
        stepped(&mut fork, &Operands::draw(Kind::Spread, EXTENTS, 1, 4));
        assert!(!before.base().ptr_eq(fork.base()), "the fifth folds");
        assert!(before.base().ptr_eq(state.base()), "which is no one else's affair");
        fork.restore(&checkpoint).unwrap();
        assert!(before.base().ptr_eq(fork.base()), "a checkpoint holds its base");
        assert_eq!((fork.pending(), fork.tokens()), (4, 4), "and its entries");
        assert_eq!(before.materialize(), stored, "nobody wrote to it");
    }
    let mut own = LazyState::new(EXTENTS, &[0.0; 72], Resident::default()).unwrap();
    let at = own.update(0, |state| state.as_ptr());
    own.update(0, |state| assert_eq!(state.as_ptr(), at, "a base that is not shared is moved on in place"));
}

#[test]
fn an_eager_fork_copies_when_it_steps() {
    let mut state = LazyState::new(EXTENTS, &vec![0.0; state_len(EXTENTS)], folding(0)).unwrap();
    let fork = state.clone();
    assert!(state.base().ptr_eq(fork.base()), "shared");
    stepped(&mut state, &Operands::draw(Kind::Spread, EXTENTS, 1, 2));
    assert!(fork.materialize().iter().all(|&s| s == 0.0), "the fork stands still");
}

#[test]
fn bytes_are_what_is_held() {
    let (base, entry) = (4 * state_len(EXTENTS), 4 * 5 * EXTENTS.n_heads * EXTENTS.head_size);
    let mut state = LazyState::new(EXTENTS, &[0.0; 72], folding(8)).unwrap();
    let other = state.clone();
    assert_eq!(state.bytes(), Bytes { own: 0, shared: base }, "shared");
    drop(other);
    assert_eq!(state.bytes(), Bytes { own: base, shared: 0 }, "no longer");
    for (resident, bytes) in [(Resident::f16(8), base / 2 + 12), (Resident::int8(16), base / 4 + 2 * 12 + 12)]
    {
        let state = LazyState::new(EXTENTS, &[0.0; 72], resident).unwrap();
        assert_eq!(state.bytes(), Bytes { own: bytes, shared: 0 }, "{resident:?}: exponents, and scales");
    }
    stepped(&mut state, &Operands::draw(Kind::Spread, EXTENTS, 5, 2));
    let entries = state.bytes().own - base;
    assert!((5 * entry..=8 * entry).contains(&entries), "five entries, and room for a few: {entries}");

    let (mut fork, checkpoint) = (state.clone(), state.checkpoint());
    assert_eq!(fork.bytes(), Bytes { own: 5 * entry, shared: base }, "a fork has its entries");
    assert_eq!(checkpoint.bytes(), fork.bytes(), "so has a checkpoint");
    assert_eq!(state.bytes(), Bytes { own: entries, shared: base }, "the base is everyone's");
    fork.fold();
    assert_eq!(fork.bytes().shared, 0, "a fork that folds has its own");
    assert!(fork.bytes().own >= base, "base");

    let prefix: Arc<[f32]> = state.materialize().into();
    let mut additive = Additive::new(EXTENTS, prefix.clone(), DeltaFormat::F32).unwrap();
    assert_eq!(additive.bytes(), Bytes { own: 4 * 12 + base, shared: base }, "gamma and delta");
    additive = Additive::new(EXTENTS, prefix.clone(), DeltaFormat::F16).unwrap();
    assert_eq!(additive.bytes(), Bytes { own: 4 * 12 + base / 2 + 12, shared: base }, "and exponents");
}

/// A row as a format stores it: what it decodes to.
fn rounded(row: &[f32], format: StateFormat, rounding: Rounding, first: usize) -> Vec<f32> {
    let mut back = row.to_vec();
    if format == StateFormat::F16 {
        let mut stored = vec![half::f16::ZERO; row.len()];
        let exponent = float16::encode(row, Some(0), rounding, first as u64, &mut stored).expect("finite");
        float16::decode(&stored, exponent, &mut back);
    } else {
        let (mut stored, mut scales) = (vec![0; row.len()], vec![half::f16::ZERO; row.len().div_ceil(16)]);
        let exponent = int8::encode(row, rounding, first as u64, &mut stored, &mut scales).expect("finite");
        int8::decode(&stored, &scales, exponent, &mut back);
    }
    back
}

/// A fold rounds every row as its format does, with the count of tokens and the element's place; nothing else rounds.
#[test]
fn bases_are_rounded_at_folds_alone() {
    for resident in residents() {
        let capacity = resident.capacity;
        let mut state = LazyState::new(EXTENTS, &[0.0; 72], resident).unwrap();
        for tokens in 1..=2 * capacity.max(1) as u64 {
            let before = state.clone();
            let folds = before.pending() == capacity;
            let x = Operands::draw(Kind::Spread, EXTENTS, 1, tokens);
            stepped(&mut state, &x);
            assert_eq!(state.base().ptr_eq(before.base()), !folds, "{resident:?}: token {tokens}");
            if !folds || capacity == 0 {
                continue;
            }
            let rounding = match resident.rounding {
                ResidentRounding::Nearest | ResidentRounding::DecayDither => Rounding::Nearest,
                ResidentRounding::Stochastic { seed } => Rounding::Stochastic { seed: seed + tokens - 1 },
                ResidentRounding::Dither => Rounding::Dither { step: u32::try_from(tokens - 1).unwrap() },
            };
            let exact = before.materialize();
            let want: Vec<f32> = exact
                .chunks_exact(6)
                .zip((0..).step_by(6))
                .flat_map(|(row, first)| rounded(row, resident.format, rounding, first))
                .collect();
            assert_eq!(state.base().load()[..], want, "{resident:?}: folded by token {tokens}");
        }
    }
}

/// At every token, within a unit of the last place for each; and the two dithers do not freeze where nearest does.
#[test]
fn halves_at_every_token() {
    let extents = Extents { n_heads: 1, head_size: 64 };
    let none = vec![0.0; 64];
    let lw = [-(2f32.powi(-13)); 64];
    let idle = Inputs { r: &none, lw: &lw, k: &none, v: &none, a: &none, b: &none };
    let start: Vec<f32> = (0..4096).map(|i| 65.0 + (i % 61) as f32).collect();
    for (rounding, lost) in [
        (ResidentRounding::Nearest, false),
        (ResidentRounding::Stochastic { seed: 1 }, true),
        (ResidentRounding::Dither, true),
        (ResidentRounding::DecayDither, true),
    ] {
        let resident = Resident { rounding, ..Resident::f16(0) };
        let mut state = LazyState::new(extents, &start, resident).unwrap();
        for _ in 0..1024 {
            state.step(1, idle, &mut [0.0; 64]).unwrap();
        }
        let kept: f32 = state.materialize().iter().zip(&start).map(|(s, b)| s / b).sum::<f32>() / 4096.0;
        // In 1,024 tokens an eighth is lost; the dither of decays is biased by up to a third of that.
        let (want, limit) = if lost { ((-0.125f32).exp(), 0.04) } else { (1.0, 0.0) };
        assert!((kept - want).abs() <= limit, "{rounding:?}: kept {kept}, not {want}");
    }
}

/// Values beyond halves are no numbers afterwards, in their row alone.
#[test]
fn what_is_not_finite_stays_so() {
    for resident in [Resident::f16(16), Resident::int8(16)] {
        let mut start = normals(72, 1);
        start[8] = f32::INFINITY;
        let state = LazyState::new(EXTENTS, &start, resident).unwrap().materialize();
        assert!(state[6..12].iter().all(|x| !x.is_finite()), "{resident:?}: its row");
        assert!(state[..6].iter().chain(&state[12..]).all(|x| x.is_finite()), "{resident:?}: the others");
    }
}

#[test]
fn faults_are_told() {
    let new = |n_heads, head_size, len| {
        LazyState::new(Extents { n_heads, head_size }, &vec![0.0; len], folding(8)).map(|_| ())
    };
    for (n_heads, head_size) in [(0, 6), (2, 0), (usize::MAX, 2), (1 << 40, 1 << 40)] {
        let extents = Extents { n_heads, head_size };
        assert_eq!(new(n_heads, head_size, 0), Err(Error::Extents(extents)), "no such state");
        let additive = Additive::new(extents, vec![], DeltaFormat::F32).map(|_| ());
        assert_eq!(additive, Err(Error::Extents(extents)), "no such state");
    }
    let length = |what, found, expected| Err(Error::Length { what, found, expected });
    assert_eq!(new(2, 6, 71), length("base", 71, 72), "a short base");
    assert_eq!(new(2, 6, 71).unwrap_err().to_string(), "base of 71 elements, expected 72", "facts");

    let x = Operands::draw(Kind::Spread, EXTENTS, 2, 1);
    let mut state = LazyState::new(EXTENTS, &vec![0.0; 72], folding(4)).unwrap();
    let mut additive = Additive::new(EXTENTS, vec![0.0; 72], DeltaFormat::F16).unwrap();
    let short = &x.r[..23];
    let whole = x.inputs();
    let mut y = x.blank();
    for (what, x) in [
        ("r", Inputs { r: short, ..whole }),
        ("lw", Inputs { lw: short, ..whole }),
        ("k", Inputs { k: short, ..whole }),
        ("v", Inputs { v: short, ..whole }),
        ("a", Inputs { a: short, ..whole }),
        ("b", Inputs { b: short, ..whole }),
    ] {
        assert_eq!(state.step(2, x, &mut y), length(what, 23, 24), "{what}");
        assert_eq!(additive.step(2, x, &mut y), length(what, 23, 24), "{what}");
    }
    assert_eq!(state.step(2, whole, &mut y[..12]), length("y", 12, 24), "y");
    assert_eq!(state.step(usize::MAX, whole, &mut y), length("r", 24, usize::MAX), "tokens");
    assert_eq!(state.read(&x.r, &mut y), length("x", 24, 12), "x");
    assert_eq!(additive.read(&x.r[..12], &mut y), length("y", 24, 12), "y of a read");
    assert_eq!((state.pending(), state.tokens()), (0, 0), "nothing was read");

    let sparse = Resident { format: StateFormat::Sparse(SparseRule::default()), ..folding(4) };
    let refused = LazyState::new(EXTENTS, &[0.0; 72], sparse).map(|_| ());
    assert_eq!(refused, Err(Error::Resident(sparse.check().unwrap_err())), "for states at rest");
    assert_eq!(
        state.rollback(1).unwrap_err().to_string(),
        "cannot roll back 1 tokens: 0 are pending",
        "facts"
    );
    let found = Extents { n_heads: 1, head_size: 6 };
    let other = LazyState::new(found, &[0.0; 36], folding(4)).unwrap().checkpoint();
    let error = Error::Checkpoint { found, expected: EXTENTS };
    assert_eq!(state.restore(&other), Err(error), "another state's checkpoint");
    assert_eq!(error.to_string(), "a checkpoint of 1 heads of 6, expected 2 heads of 6", "facts");
}

/// What cannot be stored in halves is an error, and leaves the state as it was.
#[test]
fn halves_refuse_what_is_not_finite() {
    let mut state = Additive::new(EXTENTS, vec![0.0; 72], DeltaFormat::F16).unwrap();
    let mut x = Operands::draw(Kind::Spread, EXTENTS, 3, 1);
    state.step(3, x.inputs(), &mut x.blank()).unwrap();
    let before = (state.materialize(), state.log_gamma().to_vec());
    x.v[2 * 12 + 7] = f32::INFINITY;
    assert!(matches!(state.step(3, x.inputs(), &mut x.blank()), Err(Error::NotFinite(_))), "infinite");
    assert_eq!((state.materialize(), state.log_gamma().to_vec()), before, "as it was");
}

/// A decay of 2^-13 per token is a quarter of half a unit: rounded to nearest, nothing would ever change.
#[test]
fn slow_decays_do_not_freeze_in_halves() {
    let extents = Extents { n_heads: 1, head_size: 64 };
    let mut state = Additive::new(extents, vec![0.0; 4096], DeltaFormat::F16).unwrap();
    let mut x = Operands::draw(Kind::Sticky, extents, 1, 1);
    x.k.fill(1.0);
    state.step(1, x.inputs(), &mut x.blank()).unwrap();
    let before = state.materialize();
    let none = vec![0.0; 64];
    let lw = [-(2f32.powi(-13)); 64];
    let idle = Inputs { r: &none, lw: &lw, k: &none, v: &none, a: &none, b: &none };
    for _ in 0..4096 {
        state.step(1, idle, &mut [0.0; 64]).unwrap();
    }
    let kept: f32 = state.materialize().iter().zip(&before).map(|(s, b)| s / b).sum::<f32>() / 4096.0;
    assert!((kept - (-0.5f32).exp()).abs() < 0.01, "kept {kept}");
}

/// However long forks live, they share the prefix.
#[test]
fn additive_forks_share_the_base_for_good() {
    let mut prefix = LazyState::new(EXTENTS, &vec![0.0; 72], folding(8)).unwrap();
    stepped(&mut prefix, &Operands::draw(Kind::Spread, EXTENTS, 20, 1));
    prefix.fold();
    let base: Arc<[f32]> = prefix.materialize().into();
    let mut state = Additive::new(prefix.extents(), base.clone(), DeltaFormat::F32).unwrap();
    let mut fork = state.clone();
    let x = Operands::draw(Kind::Spread, EXTENTS, 50, 2);
    fork.step(50, x.inputs(), &mut x.blank()).unwrap();
    assert!(Arc::ptr_eq(&base, fork.base()), "shared");
    assert_eq!(state.materialize(), prefix.materialize(), "the fork's tokens are its own");
    assert!(matches!(fork.delta(), Delta::F32(delta) if delta.iter().any(|&d| d != 0.0)), "in its delta");
    state.step(50, x.inputs(), &mut x.blank()).unwrap();
    assert_eq!(state.materialize(), fork.materialize(), "the same tokens lead to the same state");
}

fn layout(n_layers: usize) -> StateLayout {
    layout_of(n_layers, EXTENTS)
}

fn layout_of(n_layers: usize, Extents { n_heads, head_size }: Extents) -> StateLayout {
    let ranks = Ranks { w: 1, a: 1, v: 1, g: 1 };
    let width = n_heads * head_size;
    StateLayout::new(&ModelConfig { n_layers, width, n_heads, head_size, hidden: 1, vocab: 1, ranks })
}

#[test]
fn layers_move_together() {
    let wkv = normals(3 * 72, 1);
    let mut layers = LazyLayers::new(&layout(3), &wkv, folding(8)).unwrap();
    assert_eq!(layers.materialize(), wkv, "canonical order");
    let pass = |layers: &mut LazyLayers, tokens, seed| {
        for (layer, seed) in layers.layers_mut().iter_mut().zip(seed..) {
            stepped(layer, &Operands::draw(Kind::Spread, EXTENTS, tokens, seed));
        }
    };
    pass(&mut layers, 3, 10);
    let (after_three, checkpoint) = (layers.materialize(), layers.checkpoint());
    pass(&mut layers, 4, 20);
    let mut fork = layers.clone();
    for (a, b) in layers.layers().iter().zip(fork.layers()) {
        assert!(a.base().ptr_eq(b.base()), "a fork shares every layer's base");
    }
    fork.rollback(4).unwrap();
    assert_eq!(fork.materialize(), after_three, "rolled back");
    assert_eq!(fork.rollback(4), Err(Error::Rollback { asked: 4, pending: 3 }), "too far");

    fork.layers_mut()[1].fold();
    assert_eq!(fork.rollback(1), Err(Error::Rollback { asked: 1, pending: 0 }), "one layer cannot");
    assert_eq!(fork.materialize(), after_three, "none was changed");
    stepped(&mut fork.layers_mut()[0], &Operands::draw(Kind::Spread, EXTENTS, 1, 5));
    let error = Error::OutOfStep { layer: 1, found: 3, expected: 4 };
    assert_eq!(fork.rollback(0), Err(error), "layer 0 is ahead");
    assert_eq!(error.to_string(), "layer 1 has read 3 tokens, layer 0 4", "facts");

    layers.fold();
    assert!(layers.layers().iter().all(|l| l.pending() == 0), "folded");
    layers.restore(&checkpoint).unwrap();
    assert_eq!(layers.materialize(), after_three, "at any distance");
    layers.rollback(3).unwrap();
    assert_eq!(layers.materialize(), wkv, "and from there on back");
}

#[test]
fn layers_of_other_extents_are_refused() {
    let mut layers = LazyLayers::new(&layout(3), &[0.0; 216], folding(8)).unwrap();
    let length = LazyLayers::new(&layout(3), &[0.0; 215], folding(8)).map(|_| ());
    assert_eq!(length, Err(Error::Length { what: "wkv", found: 215, expected: 216 }), "too short");
    let two = LazyLayers::new(&layout(2), &[0.0; 144], folding(8)).unwrap().checkpoint();
    assert_eq!(layers.restore(&two), Err(Error::Layers { found: 2, expected: 3 }), "two layers");
    let found = Extents { n_heads: 8, head_size: 3 };
    let other = LazyLayers::new(&layout_of(3, found), &[0.0; 216], folding(8)).unwrap().checkpoint();
    let error = Error::Checkpoint { found, expected: EXTENTS };
    assert_eq!(layers.restore(&other), Err(error), "as many elements, other heads");
    let base = 4 * 72;
    assert_eq!(layers.bytes(), Bytes { own: 3 * base, shared: 0 }, "three bases");
    let checkpoint = layers.checkpoint();
    assert_eq!(checkpoint.bytes(), Bytes { own: 0, shared: 3 * base }, "shared with the checkpoint");
}

/// Sessions move between threads.
#[test]
fn states_are_send_and_sync() {
    fn check<T: Send + Sync + 'static>() {}
    check::<LazyLayers>();
    check::<Checkpoint<LazyLayers>>();
    check::<Additive>();
}
