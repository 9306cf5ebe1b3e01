//! `kappa.wgsl` and its variants against [`rwkv_core::ops::kappa`] in `f64`.

use proptest::prelude::*;
use rwkv_core::ops::kappa::{self as twin, KAPPA_EPS};
use rwkv_core::ops::wkv7::Dims;
use rwkv_core::rng::SplitMix64;

use super::{Error, VARIANTS, lower};
use crate::gpu::{Device, variants_for_tests};
use crate::kernels::testing::{TINY, U, bits, compare, config, grids, values, wide};
use crate::pipeline::Pipeline;

/// Keys `[T, H, N]` of every size, down to zero and to where eps tells, and their scale `[H, N]`.
fn draw(dims: Dims, seed: u64) -> [Vec<f32>; 2] {
    let mut rng = SplitMix64::new(seed);
    let mut k0 = Vec::new();
    for _ in 0..dims.tokens * dims.heads {
        let size = match rng.next_u64() % 8 {
            0 => 0.0,
            1 => 1e-25,
            2 => rng.uniform(0.1, 10.0) * 1e-12,
            _ => rng.uniform(-30.0, 12.0).exp2(),
        };
        k0.extend(values(&mut rng, dims.head_size, size));
    }
    [k0, (0..dims.heads * dims.head_size).map(|_| rng.uniform(-2.0, 2.0)).collect()]
}

fn run(device: &Device, kernel: &Pipeline, dims: Dims, operands: &[Vec<f32>; 2], alone: bool) -> Vec<f32> {
    let (params, groups) = lower(dims).unwrap();
    let [k0, k_k] = operands.clone();
    let buffers = [k0, k_k, vec![f32::NAN; dims.vector_len()]];
    let groups = grids(groups)[usize::from(alone)];
    let mut after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
    let out = after.pop().unwrap();
    assert_eq!(after, operands, "the operands are untouched");
    out
}

fn shapes() -> impl Strategy<Value = Dims> {
    let head_sizes = prop_oneof![Just(64usize), Just(1), Just(65), 1..=200usize];
    (1..=5usize, 1..=4usize, head_sizes).prop_map(|(tokens, heads, head_size)| Dims {
        tokens,
        heads,
        head_size,
    })
}

/// A term of the sum of squares passes `m <= N / lanes + lanes` additions: those of its lane, and at worst one for
/// each other lane. `u_j` rounds once, its square is off by `3 u`, their sum by `(m + 3) u`, and `inverseSqrt` by
/// half of that and 2 ulp of its own; `u_j` and the product add `2 u`: `(m / 2 + 5.5) u`. Where eps is larger, it is
/// off by less. What is flushed of a `u_j` is multiplied by `1 / eps` at most.
#[test]
fn agrees_with_its_twin() {
    for lanes in [1u16, 32, 64] {
        let variants = variants_for_tests(VARIANTS, &[("LANES", lanes.into())]);
        proptest!(config(file!()), |(dims in shapes(), seed: u64)| {
            let operands = draw(dims, seed);
            let [k0, k_k] = operands.each_ref().map(|x| wide(x));
            let mut want = vec![f64::NAN; dims.vector_len()];
            twin::kappa(dims.head_size, &k0, &k_k, &mut want);
            let m = dims.head_size.div_ceil(lanes.into()) + dims.head_size.min(lanes.into());
            for (device, kernel) in &variants {
                let got = run(device, kernel, dims, &operands, false);
                compare(&kernel.kernel().label(), &got, &want, |i| {
                    (m as f64 / 2.0 + 5.5) * U * want[i].abs() + TINY / KAPPA_EPS
                })?;
            }
        });
    }
}

/// The numerics contract: a row's bits depend neither on what is beside it nor on how many workgroups there are.
#[test]
fn a_row_has_its_bits_whatever_is_beside_it() {
    let variants = variants_for_tests(VARIANTS, &[]);
    proptest!(config(file!()), |(dims in shapes(), seed: u64)| {
        let [k0, k_k] = draw(dims, seed);
        let last = k0.len() - dims.heads * dims.head_size;
        let one = [k0[last..].to_vec(), k_k.clone()];
        for (device, kernel) in &variants {
            let all = run(device, kernel, dims, &[k0.clone(), k_k.clone()], false);
            let alone = run(device, kernel, Dims { tokens: 1, ..dims }, &one, false);
            prop_assert_eq!(bits(&all[last..]), bits(&alone), "beside others");
            let walked = run(device, kernel, dims, &[k0.clone(), k_k.clone()], true);
            prop_assert_eq!(bits(&all), bits(&walked), "by one workgroup");
        }
    });
}

#[test]
fn refuses_what_it_cannot_run() {
    let lowered = |tokens, heads, head_size| {
        lower(Dims { tokens, heads, head_size }).map(|(of, groups)| (of.rows, of.heads, of.head_size, groups))
    };
    assert_eq!(lowered(3, 5, 64), Ok((15, 5, 64, [15, 1, 1])), "plain");
    assert_eq!(lowered(0, 5, 64), Ok((0, 5, 64, [0, 1, 1])), "no tokens");
    assert_eq!(lowered(3, 5, 0), Ok((15, 5, 0, [0, 1, 1])), "no channels");
    assert_eq!(lowered(4096, 64, 64), Ok((1 << 18, 64, 64, [65_535, 1, 1])), "the rest by a loop");
    let len = |rows, width| Err(Error::Len { kernel: "kappa", rows, width });
    assert_eq!(lowered(1 << 20, 64, 64), len(1 << 26, 64), "2^32 elements");
    assert_eq!(lowered(usize::MAX, 2, 64), len(usize::MAX, 64), "no overflow");
    assert_eq!(lowered(1, 1, usize::MAX), len(1, usize::MAX), "head size");
}
