//! `wkv7.wgsl` against [`rwkv_core::ops::wkv7`] in `f64`, over shapes and seeds.

use std::ops::Range;

use proptest::prelude::*;
use rwkv_core::compare::nmse;
use rwkv_core::ops::wkv7::{self as twin, Dims, Inputs};
use rwkv_core::rng::SplitMix64;

use super::{Error, MAX_GROUPS, Places, VARIANTS, lower};
use crate::gpu::{Device, device_for_tests, variants_for_tests};
use crate::pipeline::Pipeline;
use crate::{Access, Binding, Element, Kernel, Scalar};

const N: usize = 64;

/// Operands `r lw k v a b`, each `[T, H, N]`, and a state `[H, N, N]`.
pub(in crate::kernels) struct Case {
    pub(in crate::kernels) dims: Dims,
    pub(in crate::kernels) operands: [Vec<f32>; 6],
    pub(in crate::kernels) state: Vec<f32>,
}

impl Case {
    /// Draws from the operation's own domain, not from a box around zero.
    pub(in crate::kernels) fn draw(dims: Dims, seed: u64) -> Self {
        let mut rng = SplitMix64::new(seed);
        let (mut k, mut a, mut b) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..dims.tokens * dims.heads {
            // One key in eight is zero, and then so is kappa.
            let size = if rng.uniform(0.0, 8.0) < 1.0 { 0.0 } else { 1.0 };
            let key: Vec<f32> = (0..N).map(|_| size * rng.uniform(-1.0, 1.0)).collect();
            let norm = key.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12);
            a.extend(key.iter().map(|x| -x / norm));
            b.extend(key.iter().map(|x| x / norm * rng.uniform(0.0, 1.0)));
            k.extend(key);
        }
        // Decays of every size: none, slower than an f32 near 1 can tell, slow, the fastest, any.
        let lw = (0..k.len())
            .map(|_| match rng.next_u64() % 8 {
                0 => 0.0,
                1 => -1e-9,
                2 => -1e-6,
                3 => -0.6065,
                _ => rng.uniform(-0.6065, 0.0),
            })
            .collect();
        let mut signed = |len| (0..len).map(|_| rng.uniform(-1.0, 1.0)).collect::<Vec<f32>>();
        let operands = [signed(dims.vector_len()), lw, k, signed(dims.vector_len()), a, b];
        Self { dims, operands, state: signed(dims.state_len()) }
    }

    /// State and output as the twin has them in `f64`.
    pub(in crate::kernels) fn twin(&self) -> (Vec<f64>, Vec<f64>) {
        let wide = |x: &Vec<f32>| x.iter().copied().map(f64::from).collect::<Vec<_>>();
        let [r, lw, k, v, a, b] = &self.operands.each_ref().map(wide);
        let (mut state, mut y) = (wide(&self.state), vec![0.0; self.dims.vector_len()]);
        twin::wkv7(self.dims, Inputs { r, lw, k, v, a, b }, &mut state, &mut y);
        (state, y)
    }

    /// State and output as the kernel has them, the state changed in place.
    fn run(&self, device: &Device, kernel: &Pipeline) -> (Vec<f32>, Vec<f32>) {
        self.run_at(Places::default(), device, kernel)
    }

    /// The same, with the states anywhere in a buffer that is otherwise left as it is.
    fn run_at(&self, places: Places, device: &Device, kernel: &Pipeline) -> (Vec<f32>, Vec<f32>) {
        let (params, groups) = lower(self.dims, places).unwrap();
        let (len, state) = (self.dims.state_len(), swapped(self.dims, &self.state));
        let [from, to] = [places.before, places.after].map(|at| at..at + len);
        let mut held = vec![f32::NAN; from.end.max(to.end) + 1];
        held[from.clone()].copy_from_slice(&state);
        let mut buffers = self.operands.to_vec();
        buffers.push(held);
        buffers.push(vec![f32::NAN; self.dims.vector_len()]);
        let mut after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
        let (y, held) = (after.pop().unwrap(), after.pop().unwrap());
        assert_eq!(after, self.operands, "the operands are untouched");
        let others = (0..held.len()).filter(|at| !from.contains(at) && !to.contains(at));
        assert!(others.into_iter().all(|at| held[at].is_nan()), "what is around the states is untouched");
        assert!(from == to || held[from] == state, "the state that was read is untouched");
        (swapped(self.dims, &held[to]), y)
    }

    /// The same for some of the tokens, starting from `state`.
    pub(in crate::kernels) fn tokens(&self, tokens: Range<usize>, state: Vec<f32>) -> Self {
        let width = self.dims.heads * N;
        let part = tokens.start * width..tokens.end * width;
        let operands = self.operands.each_ref().map(|x| x[part.clone()].to_vec());
        Self { dims: Dims { tokens: tokens.len(), ..self.dims }, operands, state }
    }
}

/// A state between `[head, value, key]` and `[head, key, value]`, either way.
pub(in crate::kernels) fn swapped(dims: Dims, state: &[f32]) -> Vec<f32> {
    let at = |h, x, y| (h * N + x) * N + y;
    (0..dims.heads)
        .flat_map(|h| (0..N).flat_map(move |x| (0..N).map(move |y| at(h, y, x))))
        .map(|from| state[from])
        .collect()
}

/// The largest nmse of state and output that rounding explains.
///
/// Take each rounding as an independent error of variance `u^2 / 3`, relative to what is rounded, `u = 2^-24`.
/// One token adds to a row `s` of the state, in units of `u^2 |s|^2 / 3`: 1 for the last addition, 1/2 for `q`
/// (its partial sums grow evenly, and `|b| <= 1`), and for the terms of the increment and their sums, smaller
/// than `s`, about 1 together. So about `u^2 |s|^2`. What a token added is then decayed and partly removed,
/// never grown on average, and the state keeps its size: `nmse(state) <= T u^2`.
///
/// An output is a sum of `N` products of random sign, hence `sqrt(N)` times one of them, and so is its error:
/// that of the state is passed on at the same ratio. Its own additions, over partial sums that grow evenly, add
/// `N / 2` units: `nmse(y) <= (T + N / 6) u^2`.
///
/// The limits are 16 times as much, 4 times in error: 2 for devices that do not round to nearest, 2 for errors
/// that are not independent.
#[expect(clippy::cast_precision_loss, reason = "small counts")]
pub(in crate::kernels) fn limits(tokens: usize) -> (f64, f64) {
    let u = f64::from(f32::EPSILON) / 2.0;
    let of = |units: f64| 16.0 * units * u * u;
    (of(tokens as f64), of(tokens as f64 + N as f64 / 6.0))
}

/// Few cases: on a software driver each costs milliseconds for each token.
fn config() -> ProptestConfig {
    ProptestConfig { cases: 16, ..ProptestConfig::with_source_file(file!()) }
}

#[test]
fn agrees_with_its_twin() {
    let variants = variants_for_tests(VARIANTS, &[]);
    proptest!(config(), |(heads in 1..=5usize, tokens in 1..=40usize, seed: u64)| {
        let case = Case::draw(Dims { tokens, heads, head_size: N }, seed);
        let want = case.twin();
        let limits = limits(tokens);
        for (device, kernel) in &variants {
            let (got, label) = (case.run(device, kernel), kernel.kernel().label());
            let within = |got: &[f32], want: &[f64], limit, what| {
                nmse(got, want, limit).map_err(|e| TestCaseError::fail(format!("{label}.{what}: {e}")))
            };
            within(&got.0, &want.0, limits.0, "state")?;
            within(&got.1, &want.1, limits.1, "y")?;
        }
    });
}

/// The state is all that passes from token to token: two calls give the bits of one.
#[test]
fn continues_where_it_stopped() {
    let variants = variants_for_tests(VARIANTS, &[]);
    proptest!(config(), |(heads in 1..=5usize, first in 1..=20usize, rest in 1..=20usize, seed: u64)| {
        let tokens = first + rest;
        let case = Case::draw(Dims { tokens, heads, head_size: N }, seed);
        for (device, kernel) in &variants {
            let whole = case.run(device, kernel);
            let (state, mut y) = case.tokens(0..first, case.state.clone()).run(device, kernel);
            let (state, rest) = case.tokens(first..tokens, state).run(device, kernel);
            y.extend(rest);
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            prop_assert!(bits(&y) == bits(&whole.1), "y");
            prop_assert!(bits(&state) == bits(&whole.0), "state");
        }
    });
}

/// Wherever the states are, the bits are those of one changed in place.
#[test]
fn reads_one_state_and_writes_another() {
    let variants = variants_for_tests(VARIANTS, &[]);
    proptest!(config(), |(heads in 1..=5usize, tokens in 1..=3usize, gap in 0..200usize, up: bool, seed: u64)| {
        let case = Case::draw(Dims { tokens, heads, head_size: N }, seed);
        let (low, high) = (gap / 2, gap + case.dims.state_len());
        let (before, after) = if up { (low, high) } else { (high, low) };
        let places = Places { before, after };
        for (device, kernel) in &variants {
            let (state, y) = case.run_at(places, device, kernel);
            let in_place = case.run(device, kernel);
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            prop_assert!(bits(&y) == bits(&in_place.1), "y");
            prop_assert!(bits(&state) == bits(&in_place.0), "state");
        }
    });
}

/// The bound that `expm1.wgsl` states, over the whole range and far into small decays.
#[test]
fn expm1_keeps_its_bound() {
    let Some(device) = device_for_tests() else { return };
    let source = format!(
        "@group(0) @binding(0) var<storage, read_write> x: array<f32>;\n{}\
         @compute @workgroup_size(64)\n\
         fn sweep(@builtin(global_invocation_id) id: vec3<u32>) {{ x[id.x] = expm1(x[id.x]); }}",
        include_str!("../../wgsl/expm1.wgsl"),
    );
    const ELEMENT: Option<Element> = Some(Element { scalar: Scalar::F32, lanes: 1 });
    let bindings = &[Binding { name: "x", access: Access::ReadWrite, element: ELEMENT }];
    let sweep = Kernel { name: "sweep", source: source.leak(), bindings, params_bytes: 0, ..VARIANTS[0] };
    let kernel = device.pipeline(&sweep, &[]).unwrap();

    let mut rng = SplitMix64::new(7);
    let mut xs: Vec<f32> = (0..1 << 15).map(|_| rng.uniform(-0.6066, 0.0)).collect();
    xs.extend((0..1 << 15).map(|_| rng.uniform(-0.6066, 0.0) * rng.uniform(-60.0, 0.0).exp2()));
    xs[..4].copy_from_slice(&[0.0, -0.6066, -1e-6, -1e-9]);
    let groups = u32::try_from(xs.len() / N).unwrap();
    let got = device.run(&kernel, &[], &[xs.clone()], [groups, 1, 1]).unwrap().remove(0);
    for (x, got) in xs.into_iter().zip(got) {
        let want = f64::from(x).exp_m1();
        let error = (f64::from(got) - want).abs();
        assert!(error <= 2.8e-7 * want.abs(), "expm1({x:e}) = {got:e}, not {want:e}");
    }
}

#[test]
fn refuses_what_it_cannot_run() {
    let dims = |tokens, heads, head_size| Dims { tokens, heads, head_size };
    let lower_one = |dims| lower(dims, Places::default());
    let lowered = |dims| lower_one(dims).map(|(params, groups)| (params.heads, params.tokens, groups));
    assert_eq!(lowered(dims(3, 5, 64)), Ok((5, 3, [5, 1, 1])), "plain");
    assert_eq!(lowered(dims(1, 1, 32)), Err(Error::HeadSize { got: 32, want: 64 }), "head size");
    assert_eq!(lowered(dims(1, 65_536, 64)), Err(Error::Heads { got: 65_536, max: MAX_GROUPS }), "heads");
    assert!(lower_one(dims((1 << 26) - 1, 1, 64)).is_ok(), "2^32 - 64 elements");
    assert_eq!(
        lowered(dims(1 << 26, 1, 64)),
        Err(Error::Tokens { tokens: 1 << 26, heads: 1 }),
        "2^32 elements"
    );
    assert_eq!(
        lowered(dims(usize::MAX, 2, 64)),
        Err(Error::Tokens { tokens: usize::MAX, heads: 2 }),
        "no overflow on the way"
    );
    let (heads, state) = (2, 2 * N * N);
    let placed = |before, after| {
        lower(dims(1, 2, 64), Places { before, after }).map(|(params, _)| [params.before, params.after])
    };
    assert_eq!(placed(8, 8 + state), Ok([8, 8 + 2 * 64 * 64]), "side by side");
    assert_eq!(placed(7, 7), Ok([7, 7]), "in place");
    for (before, after) in [(8, 7 + state), (7 + state, 8)] {
        assert_eq!(
            placed(before, after),
            Err(Error::Overlap { before, after, heads }),
            "one element of both"
        );
    }
    let last = u32::MAX as usize - state;
    assert!(placed(0, last).is_ok(), "2^32 - 1 elements");
    assert_eq!(placed(0, last + 1), Err(Error::State { at: last + 1, heads }), "2^32 elements");
    assert_eq!(placed(usize::MAX, 0), Err(Error::State { at: usize::MAX, heads }), "no overflow on the way");
}
