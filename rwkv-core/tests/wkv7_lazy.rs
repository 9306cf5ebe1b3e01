//! The lazy forms of the state update: against the definition, against golden vectors, and against their own laws.

mod operands;

use operands::{Golden, Operands};
use proptest::prelude::*;
use rwkv_core::Real;
use rwkv_core::compare::{magnitude, max_abs};
use rwkv_core::ops::decay::DECAY_SCALE;
use rwkv_core::ops::wkv7::{Dims, Inputs, wkv7};
use rwkv_core::ops::wkv7_lazy::{Pending, Undecayed, materialize_delta, read_delta, step_delta, wkv7_lazy};
use rwkv_core::rng::SplitMix64;

const CAPACITIES: [usize; 5] = [1, 4, 8, 16, 64];

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
    /// Eight tokens of fastest decay, eight of nearly none.
    Bursts,
    /// One key is removed and written by every token.
    Repeated,
}

fn kinds() -> impl Strategy<Value = Kind> {
    use Kind::{Alternating, Bursts, Fastest, Repeated, Spread, Sticky};
    prop::sample::select(vec![Spread, Fastest, Sticky, Alternating, Bursts, Repeated])
}

fn dims(tokens: std::ops::Range<usize>) -> impl Strategy<Value = Dims> {
    (tokens, 1usize..4, prop_oneof![Just(64usize), Just(2), Just(12)])
        .prop_map(|(tokens, heads, head_size)| Dims { tokens, heads, head_size })
}

impl<R: Real> Operands<R> {
    /// State and output of the factored log, folded every `capacity` tokens.
    fn lazily(&self, capacity: usize) -> (Vec<R>, Vec<R>) {
        self.after(|dims, x, state, y| wkv7_lazy(dims, capacity, x, state, y))
    }

    /// State and output of the log without decay, in calls of `call` tokens, folded after 32.
    fn undecayed(&self, call: usize) -> (Vec<R>, Vec<R>) {
        let Dims { tokens, heads, head_size } = self.dims;
        let (mut base, mut y, width) =
            (self.state.clone(), vec![R::nan(); self.dims.vector_len()], heads * head_size);
        for from in (0..tokens).step_by(32) {
            let (mut log, end) = (Undecayed::new(heads, head_size), tokens.min(from + 32));
            for start in (from..end).step_by(call) {
                let tokens = call.min(end - start);
                let at = start * width..(start + tokens) * width;
                log.step(Dims { tokens, ..self.dims }, self.inputs().part(at.clone()), &base, &mut y[at]);
            }
            base = log.materialize(&base);
        }
        (base, y)
    }

    /// State and output of the dense delta.
    fn by_delta(&self) -> (Vec<R>, Vec<R>) {
        let mut log_gamma = vec![R::zero(); self.dims.heads * self.dims.head_size];
        let mut delta = vec![R::zero(); self.dims.state_len()];
        let mut y = vec![R::nan(); self.dims.vector_len()];
        step_delta(self.dims, self.inputs(), &self.state, &mut log_gamma, &mut delta, &mut y);
        (materialize_delta(&self.state, &log_gamma, &delta), y)
    }
}

/// Draws from the operation's own domain: unit kappa, learning rates in [0, 1].
fn draw(kind: Kind, dims: Dims, seed: u64) -> Operands<f32> {
    let mut rng = SplitMix64::new(seed);
    let (len, width) = (dims.vector_len(), dims.heads * dims.head_size);
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
    let slowest = 10f32.powf(rng.uniform(-7.0, 0.0));
    #[expect(clippy::cast_possible_truncation, reason = "a bound for drawing")]
    let fastest = -DECAY_SCALE as f32;
    let lw = (0..len)
        .map(|at| match kind {
            Kind::Spread => rng.uniform(0.0, 1.0).powi(3).max(slowest) * fastest,
            Kind::Fastest => fastest,
            Kind::Sticky => 0.0,
            Kind::Alternating => [fastest, 0.0][at % 2],
            Kind::Bursts => [fastest, -1e-5][at / width / 8 % 2],
            Kind::Repeated => -1e-6,
        })
        .collect();
    let eta = |rng: &mut SplitMix64| if matches!(kind, Kind::Repeated) { 1.0 } else { rng.uniform(0.0, 1.0) };
    let b = kappa.iter().map(|x| x * eta(&mut rng)).collect();
    let a = kappa.iter().map(|x| -x).collect();
    let state = (0..dims.state_len()).map(|_| rng.normal()).collect();
    Operands { dims, r, lw, k, v, a, b, state }
}

/// The largest value of a run.
fn scale(x: &Operands<f64>, (state, y): &(Vec<f64>, Vec<f64>)) -> f64 {
    magnitude(&x.state).max(magnitude(state)).max(magnitude(y))
}

/// How far an f32 run of `T` tokens may be from the exact one, relative to the largest value. As for the definition,
/// each token rounds what it writes a handful of times, errors that add up as a random walk since the removal
/// contracts; its readout has `N` terms of the base and two for each pending entry, and half as many roundings at worst.
fn f32_limit(dims: Dims, capacity: usize, scale: f64) -> f64 {
    let (t, n) = (dims.tokens as f64, (dims.head_size + 2 * capacity.min(dims.tokens)) as f64);
    f64::from(f32::EPSILON) * scale * (n / 2.0 + 4.0 * t.sqrt() + 4.0)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Exact but for rounding.
    #[test]
    fn agrees_with_the_definition(kind in kinds(), dims in dims(1..100), capacity in 1usize..70, seed: u64) {
        let x = draw(kind, dims, seed).wide();
        let want = x.after(wkv7);
        let limit = 1e-12 * scale(&x, &want);
        for (form, got) in
            [("log", x.lazily(capacity)), ("undecayed", x.undecayed(capacity)), ("delta", x.by_delta())]
        {
            let (state, y) = (max_abs(&got.0, &want.0, limit), max_abs(&got.1, &want.1, limit));
            prop_assert!(state.is_ok() && y.is_ok(), "{form}: {state:?} {y:?}");
        }
    }

    #[test]
    fn single_precision_stays_near_double(kind in kinds(), dims in dims(1..100), seed: u64) {
        let x = draw(kind, dims, seed);
        let want = x.wide().after(wkv7);
        let scale = scale(&x.wide(), &want);
        let log = CAPACITIES.map(|capacity| (capacity, x.lazily(capacity)));
        for (capacity, got) in log.into_iter().chain([(0, x.by_delta()), (32, x.undecayed(7))]) {
            let limit = f32_limit(dims, capacity, scale);
            let (state, y) = (max_abs(&got.0, &want.0, limit), max_abs(&got.1, &want.1, limit));
            prop_assert!(state.is_ok() && y.is_ok(), "capacity {capacity}: {state:?} {y:?}");
        }
    }

    /// A fold of one entry does what the definition does, in the same order.
    #[test]
    fn folding_every_token_gives_the_definitions_bits(kind in kinds(), dims in dims(1..20), seed: u64) {
        let x = draw(kind, dims, seed);
        prop_assert_eq!(x.lazily(1).0, x.after(wkv7).0, "state");
    }

    /// Nothing but the entries and the base decides; entries are as documented.
    #[test]
    fn calls_compose(kind in kinds(), dims in dims(2..20), cut in 0usize..20, seed: u64) {
        let x = draw(kind, dims, seed);
        let (cut, width) = (cut.min(dims.tokens), dims.heads * dims.head_size);
        let mut whole = (Pending::new(dims.heads, dims.head_size), vec![f32::NAN; dims.vector_len()]);
        whole.0.step(dims, x.inputs(), &x.state, &mut whole.1);
        let mut parts = (Pending::new(dims.heads, dims.head_size), vec![f32::NAN; dims.vector_len()]);
        for tokens in [0..cut, cut..dims.tokens] {
            let (at, dims) = (tokens.start * width..tokens.end * width, Dims { tokens: tokens.len(), ..dims });
            parts.0.step(dims, x.inputs().part(at.clone()), &x.state, &mut parts.1[at]);
        }
        prop_assert_eq!(&parts, &whole, "in two calls");
        prop_assert_eq!(x.undecayed(cut.max(1)), x.undecayed(dims.tokens), "undecayed");
        prop_assert_eq!(&whole.0.columns()[1..], [&x.v[..], &x.b, &x.k, &x.lw], "v, b, k, lw");
        prop_assert_eq!(whole.0.columns()[0].len(), dims.vector_len(), "q");
        prop_assert_eq!(whole.0.len(), dims.tokens, "one entry a token");
    }

    /// Dropping entries undoes their tokens, bit for bit.
    #[test]
    fn truncation_undoes(kind in kinds(), dims in dims(1..20), keep in 0usize..20, seed: u64) {
        let x = draw(kind, dims, seed);
        let (keep, width) = (keep.min(dims.tokens), dims.heads * dims.head_size);
        let mut pending = Pending::new(dims.heads, dims.head_size);
        let mut y = vec![f32::NAN; dims.vector_len()];
        let kept = keep * width;
        let first = Dims { tokens: keep, ..dims };
        pending.step(first, x.inputs().part(0..kept), &x.state, &mut y[..kept]);
        let before = pending.clone();
        let rest = Dims { tokens: dims.tokens - keep, ..dims };
        pending.step(rest, x.inputs().part(kept..y.len()), &x.state, &mut y[kept..]);
        pending.truncate(keep);
        prop_assert_eq!(&pending, &before, "entries");
        prop_assert_eq!(pending.materialize(&x.state), before.materialize(&x.state), "state");
    }
}

/// What can happen to a lazy state.
#[derive(Clone, Debug)]
enum Act {
    Step(Kind, usize, u64),
    Fold,
    Undo(usize),
    Fork,
    Switch(usize),
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        4 => (kinds(), 0usize..6, any::<u64>()).prop_map(|(kind, tokens, seed)| Act::Step(kind, tokens, seed)),
        1 => Just(Act::Fold),
        2 => (0usize..8).prop_map(Act::Undo),
        1 => Just(Act::Fork),
        1 => (0usize..8).prop_map(Act::Switch),
    ];
    prop::collection::vec(act, 1..40)
}

/// The largest value of all states.
fn largest(states: &[Vec<f64>]) -> f64 {
    states.iter().map(|state| magnitude(state)).fold(0.0, f64::max)
}

/// A lazy state beside the eager state after each of its tokens.
#[derive(Clone)]
struct Pair {
    base: Vec<f64>,
    pending: Pending<f64>,
    eager: Vec<Vec<f64>>,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Steps, folds, forks and rollbacks in any order leave the eager state.
    #[test]
    fn any_history_leaves_the_eager_state(heads in 1usize..3, n in 1usize..10, acts in acts(), seed: u64) {
        let start = draw(Kind::Spread, Dims { tokens: 0, heads, head_size: n }, seed).wide().state;
        let first = Pair { base: start.clone(), pending: Pending::new(heads, n), eager: vec![start] };
        let (mut pairs, mut current) = (vec![first], 0);
        for act in acts {
            let pair = &mut pairs[current];
            match act {
                Act::Step(kind, tokens, seed) => {
                    let dims = Dims { tokens, heads, head_size: n };
                    let x = draw(kind, dims, seed).wide();
                    let mut y = vec![f64::NAN; dims.vector_len()];
                    pair.pending.step(dims, x.inputs(), &pair.base, &mut y);
                    for (t, y) in y.chunks_exact(heads * n).enumerate() {
                        let token = x.inputs().part(t * heads * n..(t + 1) * heads * n);
                        let mut state = pair.eager.last().unwrap().clone();
                        let mut want = vec![f64::NAN; y.len()];
                        wkv7(Dims { tokens: 1, ..dims }, token, &mut state, &mut want);
                        pair.eager.push(state);
                        // What was removed from the state is still summed, and taken away again.
                        let limit = 1e-12 * magnitude(&want).max(largest(&pair.eager));
                        let found = max_abs(y, &want, limit);
                        prop_assert!(found.is_ok(), "y: {found:?}");
                    }
                }
                Act::Fold => pair.pending.fold(&mut pair.base),
                Act::Undo(tokens) => {
                    let undone = tokens.min(pair.pending.len());
                    pair.pending.truncate(pair.pending.len() - undone);
                    pair.eager.truncate(pair.eager.len() - undone);
                }
                Act::Fork => {
                    let fork = pair.clone();
                    pairs.push(fork);
                }
                Act::Switch(to) => current = to % pairs.len(),
            }
            for Pair { base, pending, eager } in &pairs {
                let want = eager.last().unwrap();
                let found = max_abs(&pending.materialize(base), want, 1e-12 * largest(eager));
                prop_assert!(found.is_ok(), "state: {found:?}");
            }
        }
    }
}

/// A read is the state's product with a vector, of either form, and leaves the state alone.
#[test]
fn reads_see_the_state() {
    let dims = Dims { tokens: 11, heads: 3, head_size: 12 };
    let x = draw(Kind::Spread, dims, 7).wide();
    let width = dims.heads * dims.head_size;
    let mut pending = Pending::new(dims.heads, dims.head_size);
    let (mut log_gamma, mut delta) = (vec![0.0; width], vec![0.0; dims.state_len()]);
    let mut y = vec![f64::NAN; dims.vector_len()];
    pending.step(dims, x.inputs(), &x.state, &mut y);
    step_delta(dims, x.inputs(), &x.state, &mut log_gamma, &mut delta, &mut y);
    let (state, asked) = (x.after(wkv7).0, &x.k[..width]);
    let want: Vec<f64> = (0..width)
        .map(|row| {
            let head = row / dims.head_size * dims.head_size;
            (0..dims.head_size).map(|j| state[row * dims.head_size + j] * asked[head + j]).sum()
        })
        .collect();
    let mut got = [vec![f64::NAN; width], vec![f64::NAN; width]];
    pending.read(&x.state, asked, &mut got[0]);
    read_delta(&x.state, &log_gamma, &delta, asked, &mut got[1]);
    for got in got {
        max_abs(&got, &want, 1e-12 * magnitude(&want)).unwrap_or_else(|e| panic!("{e}"));
    }
}

/// Over so many tokens the decay of the base underflows, and nothing else does.
#[test]
fn a_base_may_decay_to_nothing() {
    let dims = Dims { tokens: 1500, heads: 1, head_size: 4 };
    for kind in [Kind::Fastest, Kind::Alternating] {
        let x = draw(kind, dims, 3);
        let want = x.wide().after(wkv7);
        let limit = f32_limit(dims, 1500, scale(&x.wide(), &want));
        for got in [x.lazily(1500), x.by_delta()] {
            max_abs(&got.0, &want.0, limit).unwrap_or_else(|e| panic!("{kind:?}, state: {e}"));
            max_abs(&got.1, &want.1, limit).unwrap_or_else(|e| panic!("{kind:?}, y: {e}"));
        }
    }
}

/// A base that was large and is lost leaves no rounding error behind: what was written since is exact to its own size.
#[test]
fn a_lost_base_leaves_nothing_behind() {
    let dims = Dims { tokens: 64, heads: 1, head_size: 12 };
    let mut x = draw(Kind::Fastest, dims, 13);
    x.state.iter_mut().for_each(|s| *s *= 1e6);
    x.b.fill(0.0);
    let want = x.wide().after(wkv7).0;
    let limit = f32_limit(dims, 64, magnitude(&want));
    max_abs(&x.lazily(64).0, &want, limit).unwrap_or_else(|e| panic!("{e}"));
}

/// A decay halfway between two of those that `exp` can express in f32 would drift all entries alike, one way, by five
/// percent of the decay at every fold.
#[test]
fn folds_do_not_drift_a_slow_decay() {
    let dims = Dims { tokens: 64 * 64, heads: 1, head_size: 64 };
    let none = vec![0.0f32; dims.vector_len()];
    let lw = vec![-10.5 * 2f32.powi(-24) / 64.0; dims.vector_len()];
    let x = Inputs { r: &none, lw: &lw, k: &none, v: &none, a: &none, b: &none };
    let mut rng = SplitMix64::new(5);
    let start: Vec<f32> = (0..dims.state_len()).map(|_| rng.uniform(1.0, 2.0)).collect();
    let (mut state, mut y) = (start.clone(), vec![0.0; dims.vector_len()]);
    wkv7_lazy(dims, 64, x, &mut state, &mut y);
    let kept = (64.0 * -10.5 * 2f64.powi(-24)).exp();
    let mean = state.iter().zip(&start).map(|(s, s0)| f64::from(*s) / f64::from(*s0)).sum::<f64>() / 4096.0;
    assert!((mean - kept).abs() < 0.01 * (1.0 - kept), "kept {mean}, not {kept}");
}

/// A slow decay after a fast one keeps its digits: the decay of an entry is not the difference of two large sums.
#[test]
fn a_fast_decay_does_not_blur_later_ones() {
    let dims = Dims { tokens: 256, heads: 1, head_size: 64 };
    let mut x = draw(Kind::Fastest, dims, 11);
    x.lw[248 * 64..].fill(-1e-3);
    x.b.fill(0.0);
    let want = x.wide().after(wkv7).0;
    // the oldest entry that matters is 30 tokens old: 30 roundings of a sum, and its exponential
    let limit = f64::from(f32::EPSILON) * 8.0 * magnitude(&want);
    max_abs(&x.lazily(256).0, &want, limit).unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn golden_vectors() {
    for golden in Golden::all() {
        let (x, scale) = (&golden.operands, magnitude(&golden.y));
        for capacity in CAPACITIES {
            let limit = f32_limit(x.dims, capacity, scale);
            golden.check(&format!("capacity {capacity}"), &x.lazily(capacity), limit);
        }
        golden.check("delta", &x.by_delta(), f32_limit(x.dims, 0, scale));
    }
}
