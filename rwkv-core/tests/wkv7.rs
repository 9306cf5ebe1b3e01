//! The state update in all its forms: against golden vectors, against each other, and against its own laws.

mod operands;

use operands::{Golden, Operands};
use proptest::prelude::*;
use rwkv_core::compare::{magnitude, max_abs};
use rwkv_core::fast;
use rwkv_core::fast::linear::Packed;
use rwkv_core::model::{Compute, Wkv, WkvSegment};
use rwkv_core::ops::linear::Matrix;
use rwkv_core::ops::wkv7::{Dims, Inputs, wkv7};
use rwkv_core::ops::wkv7_chunked::wkv7_chunked;
use rwkv_core::rng::SplitMix64;
use rwkv_core::{Real, ops::decay::DECAY_SCALE};

const CHUNKS: [usize; 6] = [1, 7, 16, 32, 64, 65];

impl<R: Real> Operands<R> {
    /// The tokens `range` alone, from `state`.
    fn part(&self, range: std::ops::Range<usize>, state: Vec<R>) -> Self {
        let row = self.dims.heads * self.dims.head_size;
        let cut = |v: &[R]| v[range.start * row..range.end * row].to_vec();
        let Self { r, lw, k, v, a, b, .. } = self;
        let dims = Dims { tokens: range.len(), ..self.dims };
        Self { dims, r: cut(r), lw: cut(lw), k: cut(k), v: cut(v), a: cut(a), b: cut(b), state }
    }
}

fn fast_wkv7(dims: Dims, inputs: Inputs<'_, f32>, state: &mut [f32], y: &mut [f32]) {
    fast::wkv7::wkv7(&mut [WkvSegment { dims, inputs, state, y }]);
}

/// Draws from the operation's own domain: decays from fastest to none, unit kappa, learning rates in [0, 1].
fn draw(dims: Dims, seed: u64) -> Operands<f32> {
    let mut rng = SplitMix64::new(seed);
    let len = dims.vector_len();
    let mut normal = |scale: f32| (0..len).map(|_| rng.normal() * scale).collect::<Vec<f32>>();
    let (r, k, v, mut kappa) = (normal(1.0), normal(1.0), normal(2.0), normal(1.0));
    for head in kappa.chunks_mut(dims.head_size) {
        let norm = head.iter().map(|x| x * x).sum::<f32>().sqrt();
        head.iter_mut().for_each(|x| *x /= norm);
    }
    let slowest = 10f32.powf(rng.uniform(-7.0, 0.0));
    #[expect(clippy::cast_possible_truncation, reason = "a bound for drawing")]
    let lw = (0..len).map(|_| -rng.uniform(0.0, 1.0).powi(3).max(slowest) * DECAY_SCALE as f32).collect();
    let b = kappa.iter().map(|x| x * rng.uniform(0.0, 1.0)).collect();
    let a = kappa.iter().map(|x| -x).collect();
    let state = (0..dims.state_len()).map(|_| rng.normal()).collect();
    Operands { dims, r, lw, k, v, a, b, state }
}

fn dims() -> impl Strategy<Value = Dims> {
    (1usize..70, 1usize..4, prop_oneof![Just(64usize), Just(128), Just(2), Just(12)])
        .prop_map(|(tokens, heads, head_size)| Dims { tokens, heads, head_size })
}

/// How far an f32 run of `T` tokens may be from the exact one, relative to the largest value. Each token rounds the
/// state a handful of times and its readout `N / 2` times at worst; the removal contracts, so that the errors of
/// different tokens add up as a random walk.
fn f32_limit(dims: Dims, scale: f64) -> f64 {
    let (t, n) = (dims.tokens as f64, dims.head_size as f64);
    f64::from(f32::EPSILON) * scale * (n / 2.0 + 4.0 * t.sqrt() + 4.0)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Bit for bit: the same operations in the same order.
    #[test]
    fn the_fast_form_is_the_definition(dims in dims(), seed: u64) {
        let x = draw(dims, seed);
        prop_assert_eq!(x.after(fast_wkv7), x.after(wkv7), "state and output");
    }

    #[test]
    fn chunks_agree_with_the_definition(dims in dims(), seed: u64) {
        let x = draw(dims, seed).wide();
        let want = x.after(wkv7);
        for chunk in CHUNKS {
            let got = x.after(|d, i, s, y| wkv7_chunked(d, chunk, i, s, y));
            for (name, got, want) in [("state", &got.0, &want.0), ("y", &got.1, &want.1)] {
                // exact but for rounding: 1e-13 of the largest value leaves 450 roundings
                let limit = 1e-13 * magnitude(want).max(1.0) * (dims.head_size as f64);
                let found = max_abs(got, want, limit);
                prop_assert!(found.is_ok(), "chunk {chunk}, {name}: {found:?}");
            }
        }
    }

    #[test]
    fn single_precision_stays_near_double(dims in dims(), seed: u64) {
        let x = draw(dims, seed);
        let want = x.wide().after(wkv7);
        let runs = [("sequential", x.after(wkv7)), ("by 16", x.after(|d, i, s, y| wkv7_chunked(d, 16, i, s, y)))];
        for (name, got) in runs {
            let state = max_abs(&got.0, &want.0, f32_limit(dims, magnitude(&want.0)));
            let y = max_abs(&got.1, &want.1, f32_limit(dims, magnitude(&want.1).max(magnitude(&want.0))));
            prop_assert!(state.is_ok() && y.is_ok(), "{name}: {state:?} {y:?}");
        }
    }

    /// Running T1 tokens, then T2, is running T1 + T2.
    #[test]
    fn states_compose(dims in dims(), cut in 0usize..70, seed: u64) {
        let x = draw(dims, seed);
        let cut = cut.min(dims.tokens);
        let (state, y) = x.after(wkv7);
        let first = x.part(0..cut, x.state.clone()).after(wkv7);
        let second = x.part(cut..dims.tokens, first.0).after(wkv7);
        prop_assert_eq!(second.0, state, "state");
        prop_assert_eq!([first.1, second.1].concat(), y, "output");
    }

    /// The update is linear in (state, v) together: both twice as large give a result twice as large, exactly.
    #[test]
    fn linear_in_state_and_value(dims in dims(), seed: u64) {
        let x = draw(dims, seed);
        let twice = |v: &[f32]| v.iter().map(|x| x * 2.0).collect::<Vec<_>>();
        let doubled = Operands { v: twice(&x.v), state: twice(&x.state), ..x.clone() };
        let (state, y) = x.after(wkv7);
        prop_assert_eq!(doubled.after(wkv7), (twice(&state), twice(&y)), "doubled");
    }
}

/// Several segments in one call are as many calls.
#[test]
fn segments_do_not_see_each_other() {
    let cases: Vec<Operands<f32>> = [(3, 2), (1, 2), (40, 2)]
        .iter()
        .zip(1..)
        .map(|(&(tokens, heads), seed)| draw(Dims { tokens, heads, head_size: 64 }, seed))
        .collect();
    let mut states: Vec<Vec<f32>> = cases.iter().map(|c| c.state.clone()).collect();
    let mut ys: Vec<Vec<f32>> = cases.iter().map(|c| vec![f32::NAN; c.dims.vector_len()]).collect();
    let mut segments: Vec<WkvSegment<'_, f32>> = cases
        .iter()
        .zip(&mut states)
        .zip(&mut ys)
        .map(|((c, state), y)| WkvSegment { dims: c.dims, inputs: c.inputs(), state: &mut state[..], y })
        .collect();
    fast::wkv7::wkv7(&mut segments);
    for ((case, state), y) in cases.iter().zip(states).zip(ys) {
        assert_eq!((state, y), case.after(wkv7), "as alone");
    }
}

#[test]
fn golden_vectors() {
    for golden in Golden::all() {
        let (x, limit) = (&golden.operands, f32_limit(golden.operands.dims, magnitude(&golden.y)));
        for chunk in CHUNKS {
            let run = x.after(|d, i, s, y| wkv7_chunked(d, chunk, i, s, y));
            golden.check(&format!("chunks of {chunk}"), &run, limit);
        }
        golden.check("fast", &x.after(fast_wkv7), limit);
    }
}

/// The form asked for is the form that runs, in chunks of the length asked for: their bits differ.
#[test]
fn the_form_asked_for_runs() {
    let x = draw(Dims { tokens: 60, heads: 2, head_size: 64 }, 3);
    let sequential = x.after(wkv7);
    for chunk in [7, 16, 32] {
        let want = x.after(|d, i, s, y| wkv7_chunked(d, chunk, i, s, y));
        assert_ne!(want, sequential, "rounded otherwise");
        let through = |run: fn(Wkv, &mut [WkvSegment<'_, f32>])| {
            x.after(|dims, inputs, state, y| {
                run(Wkv::Chunked(chunk), &mut [WkvSegment { dims, inputs, state, y }]);
            })
        };
        assert_eq!(through(<Matrix<f32> as Compute<f32>>::wkv7), want, "reference, chunks of {chunk}");
        assert_eq!(through(<Packed as Compute<f32>>::wkv7), want, "executor, chunks of {chunk}");
    }
}

/// What `expm1` is for: a decay below the spacing of `f32` near 1 still decays.
#[test]
fn the_slowest_decays_are_not_rounded_away() {
    for head_size in [2, 64] {
        let dims = Dims { tokens: 1, heads: 1, head_size };
        let zero = vec![0.0f32; head_size];
        let x = Operands {
            dims,
            r: zero.clone(),
            lw: vec![-1e-7; head_size],
            k: zero.clone(),
            v: zero.clone(),
            a: zero.clone(),
            b: zero,
            state: vec![1.5; head_size * head_size],
        };
        let want = vec![1.5f32 - 1.5e-7; head_size * head_size];
        assert_eq!(x.after(wkv7).0, want, "the definition");
        assert_eq!(x.after(fast_wkv7).0, want, "the fast form");
    }
}

fn refused(run: impl Fn(Dims, Inputs<'_, f32>, &mut [f32], &mut [f32])) {
    let mut x = draw(Dims { tokens: 2, heads: 2, head_size: 64 }, 1);
    x.state.extend_from_within(..64 * 64); // a head too many
    x.after(run);
}

#[test]
#[should_panic(expected = "state is not [H, N, N]")]
fn a_state_of_another_length_is_refused() {
    refused(wkv7);
}

#[test]
#[should_panic(expected = "state is not [H, N, N]")]
fn a_state_of_another_length_is_refused_by_the_fast_form() {
    refused(fast_wkv7);
}
