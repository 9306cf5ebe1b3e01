//! `wkv7_scan.wgsl` and its variants against [`rwkv_core::ops::wkv7`] in `f64`, and its numerics contract.

use proptest::prelude::*;
use rwkv_core::compare::nmse;
use rwkv_core::ops::wkv7;
use rwkv_core::rng::SplitMix64;

use super::{Dims, Error, HEAD_SIZE as N, OPERANDS, Segment, VARIANTS, lower};
use crate::gpu::{Device, variants_for_tests};
use crate::kernels::MAX_GROUPS;
use crate::kernels::intervals::{below, floats};
use crate::kernels::testing::bits;
use crate::kernels::wkv7::tests::{Case, limits, swapped};
use crate::pipeline::Pipeline;

/// Segments beside each other, each with operands of its own.
struct Call {
    cases: Vec<Case>,
    segments: Vec<Segment>,
    dims: Dims,
    /// `[T, H, 6, N]`, NaN in rows of no segment.
    operands: Vec<f32>,
    /// NaN but for the heads that are read.
    state: Vec<f32>,
}

impl Call {
    /// Rows of no segment come between, and a record has more than the heads.
    fn draw(heads: usize, lengths: &[usize], seed: u64) -> Self {
        let mut rng = SplitMix64::new(seed);
        let width = heads * N;
        let offset = below(&mut rng, 40) as usize;
        let stride = offset + width * N + below(&mut rng, 40) as usize;
        let (mut cases, mut segments, mut rows) = (Vec::new(), Vec::new(), 0);
        for (s, &tokens) in lengths.iter().enumerate() {
            rows += below(&mut rng, 2) as usize;
            // Of the records s and s + S one is read, and either is written.
            let mut record = || s + lengths.len() * below(&mut rng, 2) as usize;
            let [first, len, from, to] =
                [rows, tokens, record(), record()].map(|n| u32::try_from(n).unwrap());
            segments.push(Segment { first, rows: len, from, to });
            cases.push(Case::draw(wkv7::Dims { tokens, heads, head_size: N }, rng.next_u64()));
            rows += tokens;
        }
        rows += 1;
        let y_stride = width + below(&mut rng, 9) as usize;
        let dims = Dims { rows, segments: lengths.len(), heads, stride, offset, y_stride };
        let mut operands = vec![f32::NAN; rows * OPERANDS * width];
        let mut state = vec![f32::NAN; 2 * lengths.len() * stride];
        for (case, of) in cases.iter().zip(&segments) {
            let [r, lw, k, v, a, b] = &case.operands;
            let decay: Vec<f32> = lw.iter().map(|lw| lw.exp_m1()).collect();
            let kappa: Vec<f32> = a.iter().map(|a| -a).collect();
            for (n, x) in [&decay, k, &kappa, b, r, v].into_iter().enumerate() {
                for (at, x) in x.chunks(N).enumerate() {
                    let head = of.first as usize * heads + at;
                    operands[(head * OPERANDS + n) * N..][..N].copy_from_slice(x);
                }
            }
            let start = of.from as usize * stride + offset;
            state[start..][..width * N].copy_from_slice(&swapped(case.dims, &case.state));
        }
        Self { cases, segments, dims, operands, state }
    }

    /// States and outputs after some of the segments; `state` is what is there before.
    fn run(
        &self,
        (device, kernel): &(&Device, Pipeline),
        segments: &[Segment],
        state: &[f32],
    ) -> [Vec<f32>; 2] {
        let dims = Dims { segments: segments.len(), ..self.dims };
        let (params, groups) = lower(kernel.kernel(), dims).unwrap();
        let y = vec![f32::NAN; self.dims.rows * self.dims.y_stride];
        let segments = bytemuck::cast_slice(segments).to_vec();
        let buffers = [segments, bits(&self.operands), bits(state), bits(&y)];
        let after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
        assert!(after[..2] == buffers[..2], "what is only read is as it was");
        [floats(&after[2]), floats(&after[3])]
    }

    /// A state in the reference's order, and the output of a segment.
    fn of(&self, s: usize, [state, y]: &[Vec<f32>; 2]) -> [Vec<f32>; 2] {
        let (of, Dims { heads, stride, offset, y_stride, .. }) = (self.segments[s], self.dims);
        let record = &state[of.to as usize * stride + offset..][..heads * N * N];
        let rows = (of.first..of.first + of.rows).map(|row| &y[row as usize * y_stride..][..heads * N]);
        [swapped(self.cases[s].dims, record), rows.flatten().copied().collect()]
    }
}

fn lengths() -> impl Strategy<Value = Vec<usize>> {
    let length = prop_oneof![1 => Just(0usize), 2 => Just(8), 2 => Just(9), 5 => 1..=40usize];
    proptest::collection::vec(length, 1..=4)
}

fn config() -> ProptestConfig {
    ProptestConfig { cases: 16, ..ProptestConfig::with_source_file(file!()) }
}

#[test]
fn agrees_with_its_twin() {
    let variants = variants_for_tests(VARIANTS, &[]);
    proptest!(config(), |(heads in 1..=5usize, lengths in lengths(), seed: u64)| {
        let call = Call::draw(heads, &lengths, seed);
        for of in &variants {
            let (label, after) = (of.1.kernel().label(), call.run(of, &call.segments, &call.state));
            for (s, case) in call.cases.iter().enumerate() {
                let [state, y] = call.of(s, &after);
                let tokens = case.dims.tokens;
                if tokens == 0 {
                    prop_assert!(bits(&state) == bits(&case.state), "a state passed on");
                    continue;
                }
                let (want, limits) = (case.twin(), limits(tokens));
                let within = |got: &[f32], want: &[f64], limit, what| {
                    nmse(got, want, limit).map_err(|e| TestCaseError::fail(format!("{label}.{what}: {e}")))
                };
                within(&state, &want.0, limits.0, "state")?;
                within(&y, &want.1, limits.1, "y")?;
            }
            // Nothing else is written.
            let [mut state, mut y] = after;
            for of in &call.segments {
                let start = of.to as usize * call.dims.stride + call.dims.offset;
                state[start..][..heads * N * N].copy_from_slice(&call.state[start..][..heads * N * N]);
                for row in of.first..of.first + of.rows {
                    y[row as usize * call.dims.y_stride..][..heads * N].fill(f32::NAN);
                }
            }
            prop_assert!(bits(&state) == bits(&call.state), "{label}: other records are as they were");
            prop_assert!(y.iter().all(|y| y.is_nan()), "{label}: other rows are as they were");
        }
    });
}

/// A segment has its bits whatever is beside it, and in two calls those of one.
#[test]
fn a_segment_has_its_bits_alone_and_in_parts() {
    let variants = variants_for_tests(VARIANTS, &[]);
    proptest!(config(), |(heads in 1..=3usize, lengths in lengths(), part in 0..40u32, seed: u64)| {
        let call = Call::draw(heads, &lengths, seed);
        for of in &variants {
            let all = call.run(of, &call.segments, &call.state);
            for (s, &segment) in call.segments.iter().enumerate() {
                let first = part.min(segment.rows);
                let begin = Segment { rows: first, ..segment };
                let rest = Segment {
                    first: segment.first + first,
                    rows: segment.rows - first,
                    from: segment.to,
                    ..segment
                };
                let [state, mut y] = call.run(of, &[begin], &call.state);
                let [state, rest] = call.run(of, &[rest], &state);
                for (y, rest) in y.iter_mut().zip(rest).filter(|(y, _)| y.is_nan()) {
                    *y = rest;
                }
                let (got, want) = (call.of(s, &[state, y]), call.of(s, &all));
                prop_assert!(bits(&got[0]) == bits(&want[0]), "state of {s}");
                prop_assert!(bits(&got[1]) == bits(&want[1]), "y of {s}");
            }
        }
    });
}

#[test]
fn refuses_what_it_cannot_run() {
    let (kernel, name) = (&VARIANTS[0], "wkv7_scan");
    let state = 3 * N * N;
    let plain = Dims { rows: 9, segments: 2, heads: 3, stride: state + 10, offset: 10, y_stride: 192 };
    let lowered = |dims| lower(kernel, dims).map(|(of, groups)| (of.heads, of.stride, of.offset, groups));
    assert_eq!(lowered(plain), Ok((3, 12_298, 10, [3, 2, 1])), "plain");
    if let Some(shared) = VARIANTS.get(1) {
        assert_eq!(lower(shared, plain).map(|(_, groups)| groups), Ok([12, 2, 1]), "four to a head");
    }
    let stride = |width, offset, stride| Err(Error::Stride { kernel: name, width, offset, stride });
    assert_eq!(lowered(Dims { offset: 11, ..plain }), stride(state, 11, state + 10), "record");
    assert_eq!(lowered(Dims { y_stride: 191, ..plain }), stride(192, 0, 191), "y");
    let groups = |got| Err(Error::Groups { kernel: name, got });
    assert_eq!(lowered(Dims { segments: 65_536, ..plain }), groups([3, 65_536]), "segments");
    assert!(lowered(Dims { segments: MAX_GROUPS as usize, ..plain }).is_ok(), "the most");
    for dims in [
        Dims { rows: usize::MAX, ..plain },
        Dims { heads: usize::MAX, ..plain },
        Dims { offset: usize::MAX, stride: usize::MAX, ..plain },
        Dims { rows: 1 << 22, ..plain },
    ] {
        assert!(lowered(dims).is_err(), "{dims:?}");
    }
}
