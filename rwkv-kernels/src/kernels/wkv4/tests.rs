//! `wkv4.wgsl` against [`rwkv_core::ops::wkv4`] in `f64`, over shapes and seeds.

use std::ops::Range;

use proptest::prelude::*;
use rwkv_core::ops::wkv4::{self as twin, State};
use rwkv_core::rng::SplitMix64;

use super::{Dims, EMPTY, Error, VARIANTS, lower};
use crate::gpu::{Device, variants_for_tests};
use crate::kernels::testing::{TINY, U, bits, compare, config, grids, wide};
use crate::pipeline::Pipeline;

/// Operands `w u` `[C]`, `k v` `[T, C]`, and a state `[3, C]`.
#[derive(Clone)]
struct Case {
    dims: Dims,
    operands: [Vec<f32>; 4],
    state: Vec<f32>,
}

/// What the twin has, and by how much the kernel may differ from it.
struct Want {
    y: Vec<f64>,
    of_y: Vec<f64>,
    state: Vec<f64>,
    of_state: Vec<f64>,
}

impl Case {
    /// From nothing, or from the middle of a text: with every size of decay and keys of trained models, now and then
    /// one that outweighs all others, or none of them.
    fn draw(dims: Dims, fresh: bool, seed: u64) -> Self {
        let Dims { tokens, channels } = dims;
        let mut rng = SplitMix64::new(seed);
        let mut draw = |len, of: &dyn Fn(&mut SplitMix64) -> f32| -> Vec<f32> {
            (0..len).map(|_| of(&mut rng)).collect()
        };
        let w = draw(channels, &|rng| rng.uniform(-10.0, 3.0).exp());
        let u = draw(channels, &|rng| rng.uniform(-4.0, 4.0));
        let k = draw(tokens * channels, &|rng| match rng.next_u64() % 16 {
            0 => rng.uniform(-200.0, 60.0),
            _ => 4.0 * rng.normal(),
        });
        let v = draw(tokens * channels, &|rng| 3.0 * rng.normal());
        let state = if fresh {
            [vec![0.0; 2 * channels], vec![EMPTY; channels]].concat()
        } else {
            let denominator = draw(channels, &|rng| rng.uniform(1.0, 9.0));
            let numerator: Vec<f32> = denominator.iter().map(|d| d * rng.uniform(-3.0, 3.0)).collect();
            let max = (0..channels).map(|_| rng.uniform(-60.0, 30.0)).collect();
            [numerator, denominator, max].concat()
        };
        Self { dims, operands: [w, u, k, v], state }
    }

    /// The twin, token by token, with a running bound of the error.
    ///
    /// Errors of the sums are measured against the exact ones relative to the max that the kernel has, and the max by
    /// itself. With `d` the distance of two exponents: the smaller weight `exp(-d)` is off by `u d` for the
    /// difference and `(3 + 2 d) u` for exp, and is flushed or held at 88 below 2^-126; the larger weight is 1.
    /// Products and the sum of two round, `2 u` of the sizes of both terms. Besides,
    ///
    /// - for `y`, `u + k` rounds, which moves one weight against the other by `u |u + k|`; the quotient adds 2.5 ulp;
    /// - for the state, `max - w` rounds, which moves the past by `u |max - w|`, and the max itself where it remains
    ///   that; what the max is off by, the sums show when they are compared with those relative to the exact max.
    fn twin(&self) -> Want {
        let Dims { tokens, channels } = self.dims;
        let [w, u, k, v] = self.operands.each_ref().map(|x| wide(x));
        let at = wide(&self.state);
        let mut state = State {
            numerator: at[..channels].to_vec(),
            denominator: at[channels..2 * channels].to_vec(),
            max: at[2 * channels..].to_vec(),
        };
        let mut error = vec![[0.0f64; 3]; channels];
        let (mut y, mut of_y) = (vec![f64::NAN; tokens * channels], Vec::new());
        for t in 0..tokens {
            let row = t * channels..(t + 1) * channels;
            let before = state.clone();
            twin::wkv4(&w, &u, &k[row.clone()], &v[row.clone()], &mut state, &mut y[row.clone()]);
            for c in 0..channels {
                let (key, value) = (k[row.start + c], v[row.start + c]);
                let (num, den, max) = (before.numerator[c], before.denominator[c], before.max[c]);
                let [of_num, of_den, of_max] = error[c];
                // The sum of a weighed past and present, and its error, when `moved` is how far the past is moved.
                let summed = |(past, now): (f64, f64), moved: f64, sum: f64, of_sum: f64, new: f64| {
                    let d = (past - now).abs();
                    let (of_past, of_now) = if past > now { (1.0, (-d).exp()) } else { ((-d).exp(), 1.0) };
                    let less = if past > now { of_now * new.abs() } else { of_past * sum.abs() };
                    let flushed = TINY * (sum.abs() + new.abs());
                    let sizes = of_past * sum.abs() + of_now * new.abs();
                    let moved = moved * of_past * sum.abs() + (3.0 + 3.0 * d) * U * less + flushed;
                    (of_past * sum + of_now * new, of_past * of_sum + moved + 2.0 * U * sizes)
                };
                let now = u[c] + key;
                let (top, of_top) = summed((max, now), U * now.abs(), num, of_num, value);
                let (bottom, of_bottom) = summed((max, now), U * now.abs(), den, of_den, 1.0);
                let want = top / bottom;
                of_y.push((of_top + want.abs() * of_bottom) / bottom + 2.5 * U * want.abs());

                let (past, rounded) = (max - w[c], U * (max - w[c]).abs());
                let of_max = if key - past > of_max + rounded { 0.0 } else { of_max + rounded };
                let (_, of_num) = summed((past, key), rounded, num, of_num, value);
                let (_, of_den) = summed((past, key), rounded, den, of_den, 1.0);
                error[c] = [of_num, of_den, of_max];
            }
        }
        let sums = [&state.numerator, &state.denominator];
        let of_sums = (0..2).flat_map(|i| error.iter().zip(sums[i]).map(move |(e, x)| e[i] + e[2] * x.abs()));
        let of_state = of_sums.chain(error.iter().map(|e| e[2])).collect();
        let state = [state.numerator, state.denominator, state.max].concat();
        Want { y, of_y, state, of_state }
    }

    /// State and output as the kernel has them.
    fn run(&self, device: &Device, kernel: &Pipeline, alone: bool) -> (Vec<f32>, Vec<f32>) {
        let (params, groups) = lower(self.dims).unwrap();
        let poison = vec![f32::NAN; self.dims.tokens * self.dims.channels];
        let buffers = [&self.operands[..], &[self.state.clone(), poison]].concat();
        let groups = grids(groups)[usize::from(alone)];
        let mut after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
        let (y, state) = (after.pop().unwrap(), after.pop().unwrap());
        assert_eq!(after, self.operands, "the operands are untouched");
        (state, y)
    }

    /// The same for some of the tokens, starting from `state`.
    fn tokens(&self, tokens: Range<usize>, state: Vec<f32>) -> Self {
        let part = tokens.start * self.dims.channels..tokens.end * self.dims.channels;
        let [w, u, k, v] = self.operands.clone();
        let operands = [w, u, k[part.clone()].to_vec(), v[part].to_vec()];
        Self { dims: Dims { tokens: tokens.len(), ..self.dims }, operands, state }
    }
}

fn channels() -> impl Strategy<Value = usize> {
    prop_oneof![Just(1usize), Just(64), Just(65), 1..=200usize]
}

#[test]
fn agrees_with_its_twin() {
    let variants = variants_for_tests(VARIANTS, &[]);
    proptest!(config(file!()), |(tokens in 1..=40usize, channels in channels(), fresh: bool, seed: u64)| {
        let case = Case::draw(Dims { tokens, channels }, fresh, seed);
        let want = case.twin();
        for (device, kernel) in &variants {
            for alone in [false, true] {
                let (state, y) = case.run(device, kernel, alone);
                compare("y", &y, &want.y, |i| want.of_y[i])?;
                compare("state", &state, &want.state, |i| want.of_state[i])?;
            }
        }
    });
}

/// [`EMPTY`] is to the kernel what [`State::new`] is to the twin.
#[test]
fn an_empty_state_is_none() {
    let case = Case::draw(Dims { tokens: 20, channels: 50 }, true, 3);
    let [w, u, k, v] = case.operands.each_ref().map(|x| wide(x));
    let mut y = vec![f64::NAN; k.len()];
    twin::wkv4(&w, &u, &k, &v, &mut State::new(50), &mut y);
    assert_eq!(case.twin().y, y, "the twin from either");
}

/// The state is all that passes from token to token: two calls give the bits of one.
#[test]
fn continues_where_it_stopped() {
    let variants = variants_for_tests(VARIANTS, &[]);
    proptest!(config(file!()), |(first in 1..=20usize, rest in 1..=20usize, channels in channels(), seed: u64)| {
        let tokens = first + rest;
        let case = Case::draw(Dims { tokens, channels }, true, seed);
        for (device, kernel) in &variants {
            let whole = case.run(device, kernel, false);
            let (state, mut y) = case.tokens(0..first, case.state.clone()).run(device, kernel, false);
            let (state, rest) = case.tokens(first..tokens, state).run(device, kernel, false);
            y.extend(rest);
            prop_assert!(bits(&y) == bits(&whole.1), "y");
            prop_assert!(bits(&state) == bits(&whole.0), "state");
        }
    });
}

#[test]
fn refuses_what_it_cannot_run() {
    let lowered = |tokens, channels| {
        lower(Dims { tokens, channels }).map(|(of, groups)| (of.tokens, of.channels, groups))
    };
    assert_eq!(lowered(3, 768), Ok((3, 768, [12, 1, 1])), "plain");
    assert_eq!(lowered(0, 65), Ok((0, 65, [2, 1, 1])), "no tokens");
    assert_eq!(lowered(3, 0), Ok((3, 0, [0, 1, 1])), "no channels");
    let len = |rows, width| Err(Error::Len { kernel: "wkv4", rows, width });
    assert_eq!(lowered(1 << 22, 1 << 10), len(1 << 22, 1 << 10), "2^32 elements");
    assert_eq!(lowered(1, 3 << 29), len(3, 3 << 29), "the state is longer than the operands");
    assert_eq!(lowered(usize::MAX, 2), len(usize::MAX, 2), "no overflow");
}
