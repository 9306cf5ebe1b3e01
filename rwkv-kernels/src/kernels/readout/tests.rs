//! `readout.wgsl` and its variants against [`rwkv_core::ops::readout`] in `f64`.

use proptest::prelude::*;
use rwkv_core::ops::readout::{self as twin, GN_EPS, Inputs};
use rwkv_core::ops::wkv7::Dims;
use rwkv_core::rng::SplitMix64;

use super::{Error, VARIANTS, lower};
use crate::gpu::{Device, variants_for_tests};
use crate::kernels::testing::{U, bits, compare, config, grids, values, wide};
use crate::pipeline::Pipeline;

/// Operands in the order of the bindings: `r k v gate` `[T, H, N]`, `gain bias r_k` `[H, N]`, `y` `[T, H, N]`.
pub(in crate::kernels) struct Case {
    pub(in crate::kernels) dims: Dims,
    pub(in crate::kernels) operands: [Vec<f32>; 8],
}

impl Case {
    /// Operands as large as those of trained models, and heads of `y` of every scale, some far from zero, some
    /// constant, some with the largest value that a trained model was seen to have.
    pub(in crate::kernels) fn draw(dims: Dims, seed: u64) -> Self {
        let mut rng = SplitMix64::new(seed);
        let (n, width) = (dims.vector_len(), dims.heads * dims.head_size);
        let mut y = Vec::new();
        for _ in 0..dims.tokens * dims.heads {
            let kind = rng.next_u64() % 4;
            let scale = if kind == 2 { 0.0 } else { rng.uniform(-10.0, 12.0).exp2() };
            let offset = if kind == 0 { 0.0 } else { rng.uniform(-8.0, 8.0) * scale.max(1.0) };
            let start = y.len();
            y.extend((0..dims.head_size).map(|_| offset + scale * rng.normal()));
            if kind == 3 {
                y[start + dims.head_size / 2] = 81_599.0;
            }
        }
        let mut values = |len, scale| values(&mut rng, len, scale);
        let operands = [
            values(n, 2.0),
            values(n, 2.0),
            values(n, 2.0),
            values(n, 1.0),
            values(width, 1.0),
            values(width, 0.5),
            values(width, 0.2),
            y,
        ];
        Self { dims, operands }
    }

    pub(in crate::kernels) fn twin(&self) -> Vec<f64> {
        let [r, k, v, gate, gain, bias, r_k, y] = &self.operands.each_ref().map(|x| wide(x));
        let mut out = vec![f64::NAN; y.len()];
        twin::readout(self.dims.head_size, Inputs { y, r, k, v, gate, gain, bias, r_k }, &mut out);
        out
    }

    fn run(&self, device: &Device, kernel: &Pipeline, alone: bool) -> Vec<f32> {
        let (params, groups) = lower(self.dims).unwrap();
        let groups = grids(groups)[usize::from(alone)];
        let mut after = device.run(kernel, bytemuck::bytes_of(&params), &self.operands, groups).unwrap();
        let out = after.pop().unwrap();
        assert_eq!(after, self.operands[..7], "the operands are untouched");
        out
    }

    /// The error that each element may have when `lanes` invocations share a head.
    ///
    /// A term of a sum passes `m <= N / lanes + lanes` additions: those of its lane, and at worst one for each other
    /// lane. A quotient is off by 2.5 u, `inverseSqrt` by 2 u. With `d = y - mean` and `s = 1 / sqrt(var + eps)`:
    ///
    /// - the mean is off by `e <= (m + 2.5) u mean|y|`, and so is each `d`, and by `u |d|` of its own;
    /// - the variance about a mean that is off by `e` is larger by `e^2`; computed from `d`, squared, summed and
    ///   divided, it is off by `(2 + 1 + m + 2.5) u` of itself, and by `2 u` when eps, itself rounded, is added; so
    ///   is `s` by half of all that, `e^2 s^2 / 2 + (m + 7.5) u / 2`, and by 2 u of its own;
    /// - `d s gain` passes on the rounding of `d` and rounds twice: `|gain| (e s + |d| s (that of s + 3 u))`;
    /// - the bonus is off by `(m + 2) u` of the sum of the terms' sizes, and `bonus v` rounds once;
    /// - the two sums and the product with the gate round once each.
    ///
    /// A tenth more for the products of errors, since `e s` is not small where `y` is far from zero and hardly
    /// varies.
    pub(in crate::kernels) fn limits(&self, lanes: usize) -> Vec<f64> {
        let Dims { heads, head_size, .. } = self.dims;
        let [r, k, v, gate, gain, bias, r_k, y] = self.operands.each_ref().map(|x| wide(x));
        let n = head_size as f64;
        let m = (head_size.div_ceil(lanes) + lanes.min(head_size)) as f64;
        let mut limits = Vec::new();
        for start in (0..y.len()).step_by(head_size) {
            let head = start % (heads * head_size);
            let row = &y[start..start + head_size];
            let mean = row.iter().sum::<f64>() / n;
            let size = row.iter().map(|y| y.abs()).sum::<f64>() / n;
            let s = 1.0 / (row.iter().map(|y| (y - mean).powi(2)).sum::<f64>() / n + GN_EPS).sqrt();
            let e = (m + 2.5) * U * size;
            let of_s = (e * s).powi(2) / 2.0 + (m + 7.5) * U / 2.0 + 2.0 * U;
            let term = |j| r[start + j] * k[start + j] * r_k[head + j];
            let bonus = (0..head_size).map(term).sum::<f64>();
            let of_bonus = (m + 2.0) * U * (0..head_size).map(|j| term(j).abs()).sum::<f64>();
            for j in 0..head_size {
                let (d, gain, v) = (row[j] - mean, gain[head + j], v[start + j]);
                let of_norm = gain.abs() * (e * s + d.abs() * s * (of_s + 3.0 * U));
                let of_added = v.abs() * (of_bonus + U * bonus.abs());
                let norm = d * s * gain + bias[head + j];
                let sum = norm + bonus * v;
                let before = of_norm + of_added + U * norm.abs() + 2.0 * U * sum.abs();
                limits.push(1.1 * gate[start + j].abs() * before);
            }
        }
        limits
    }
}

fn shapes() -> impl Strategy<Value = Dims> {
    let head_sizes = prop_oneof![Just(64usize), Just(1), Just(65), 1..=200usize];
    (1..=5usize, 1..=4usize, head_sizes).prop_map(|(tokens, heads, head_size)| Dims {
        tokens,
        heads,
        head_size,
    })
}

#[test]
fn agrees_with_its_twin() {
    for lanes in [1u16, 32, 64] {
        let variants = variants_for_tests(VARIANTS, &[("LANES", lanes.into())]);
        proptest!(config(file!()), |(dims in shapes(), seed: u64)| {
            let case = Case::draw(dims, seed);
            let (want, limits) = (case.twin(), case.limits(lanes.into()));
            for (device, kernel) in &variants {
                let got = case.run(device, kernel, false);
                compare(&kernel.kernel().label(), &got, &want, |i| limits[i])?;
            }
        });
    }
}

/// The numerics contract: a row's bits depend neither on what is beside it nor on how many workgroups there are.
#[test]
fn a_row_has_its_bits_whatever_is_beside_it() {
    let variants = variants_for_tests(VARIANTS, &[]);
    proptest!(config(file!()), |(dims in shapes(), seed: u64)| {
        let case = Case::draw(dims, seed);
        let last = case.operands[0].len() - dims.heads * dims.head_size;
        let mut operands = case.operands.clone();
        for i in [0, 1, 2, 3, 7] {
            operands[i].drain(..last);
        }
        let one = Case { dims: Dims { tokens: 1, ..dims }, operands };
        for (device, kernel) in &variants {
            let all = bits(&case.run(device, kernel, false));
            prop_assert_eq!(&all[last..], bits(&one.run(device, kernel, false)), "beside others");
            prop_assert_eq!(&all, &bits(&case.run(device, kernel, true)), "by one workgroup");
        }
    });
}

#[test]
fn refuses_what_it_cannot_run() {
    let lowered = |tokens, heads, head_size| {
        lower(Dims { tokens, heads, head_size }).map(|(of, groups)| (of.rows, of.heads, of.head_size, groups))
    };
    assert_eq!(lowered(3, 5, 64), Ok((15, 5, 64, [15, 1, 1])), "plain");
    assert_eq!(lowered(3, 5, 0), Ok((15, 5, 0, [0, 1, 1])), "no channels");
    assert_eq!(lowered(4096, 64, 64), Ok((1 << 18, 64, 64, [65_535, 1, 1])), "the rest by a loop");
    let len = |rows, width| Err(Error::Len { kernel: "readout", rows, width });
    assert_eq!(lowered(1 << 20, 64, 64), len(1 << 26, 64), "2^32 elements");
    assert_eq!(lowered(usize::MAX, 2, 64), len(usize::MAX, 64), "no overflow");
}
