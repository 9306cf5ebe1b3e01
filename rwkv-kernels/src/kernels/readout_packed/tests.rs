//! `readout_packed.wgsl` and its variants against [`rwkv_core::ops::readout`] in `f64`.

use half::f16;
use proptest::prelude::*;
use rwkv_core::Real as _;
use rwkv_core::ops::wkv7;

use super::{Dims, Error, HEAD_SIZE as N, VARIANTS, lower, of_heads};
use crate::gpu::variants_for_tests;
use crate::kernels::MAX_GROUPS;
use crate::kernels::packed::{self, tests::EXPONENTS};
use crate::kernels::readout::tests::Case;
use crate::kernels::testing::{bits, compare, config};

/// Operands of `readout`, as this kernel has them: what it does not read is NaN.
fn operands(case: &Case) -> [Vec<f32>; 3] {
    let [r, k, v, gate, gain, bias, r_k, y] = &case.operands;
    let width = gain.len();
    let nan = vec![f32::NAN; width];
    let head = |at: usize| [&nan[..N], &k[at..][..N], &nan[..N], &nan[..N], &r[at..][..N], &v[at..][..N]];
    let operands = (0..y.len()).step_by(N).flat_map(head).flatten().copied().collect();
    let row = |at: usize| [&y[at..][..width], &nan, &nan, &gate[at..][..width]];
    let up = (0..y.len()).step_by(width).flat_map(row).flatten().copied().collect();
    let vectors = [&nan, &nan, &nan, &nan, &nan, r_k, gain, bias].into_iter().flatten().copied().collect();
    [operands, up, vectors]
}

/// The same as kernels with heads leave it, the product of the bonus and the values rounded once.
fn of_heads_operands(case: &Case) -> [Vec<f32>; 3] {
    let [r, k, v, gate, _, _, r_k, y] = &case.operands;
    let [_, up, vectors] = operands(case);
    let width = r_k.len();
    let bonus = |at: usize| {
        let head = at / N * N;
        let term = |j: usize| [r[head + j], k[head + j], r_k[head % width + j]].map(f64::from);
        let sum: f64 = (0..N).map(|j| term(j).iter().product::<f64>()).sum();
        f32::of(sum * f64::from(v[at]))
    };
    let row = |at: usize| {
        let bonus = (at..at + width).map(bonus).collect();
        [y[at..][..width].to_vec(), bonus, gate[at..][..width].to_vec()]
    };
    let left = (0..y.len()).step_by(width).flat_map(row).flatten().collect();
    [left, vec![f32::NAN; up.len()], vectors]
}

/// In single precision within the limits of `readout`, whose sums pass no fewer additions; as halves within their rounding
/// besides.
#[test]
fn agrees_with_its_twin() {
    for (halves, heads_left) in EXPONENTS.into_iter().flat_map(|halves| [(halves, false), (halves, true)]) {
        let overrides = [packed::halves(halves), of_heads()];
        let variants = variants_for_tests(VARIANTS, &overrides[..1 + usize::from(heads_left)]);
        let operands = if heads_left { of_heads_operands } else { operands };
        proptest!(config(file!()), |(tokens in 1..=5usize, heads in 1..=4usize, seed: u64)| {
            let case = Case::draw(wkv7::Dims { tokens, heads, head_size: N }, seed);
            let (mut want, mut limits) = (case.twin(), case.limits(N / 2));
            for (want, limit) in want.iter_mut().zip(&mut limits) {
                (*want, *limit) = packed::tests::rounded(*want, *limit, halves);
            }
            let (params, groups) = lower(Dims { rows: tokens, heads }).unwrap();
            let operands = operands(&case).map(|x| bits(&x));
            let buffers = [&operands[..], &[vec![u32::MAX; want.len()]]].concat();
            for (device, kernel) in &variants {
                let after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
                prop_assert!(after[..3] == operands, "what is only read is as it was");
                let got = packed::tests::floats(&after[3], heads * N, halves);
                compare(&kernel.kernel().label(), &got, &want, |i| limits[i])?;
            }
        });
    }
}

/// What is no number, or infinite, is not hidden.
#[test]
fn halves_hide_nothing() {
    for (device, kernel) in &variants_for_tests(VARIANTS, &[packed::halves(Some(4))]) {
        for no_number in [f32::NAN, f32::INFINITY] {
            let mut case = Case::draw(wkv7::Dims { tokens: 1, heads: 1, head_size: N }, 1);
            case.operands[3][5] = no_number;
            let (params, groups) = lower(Dims { rows: 1, heads: 1 }).unwrap();
            let operands = operands(&case).map(|x| bits(&x));
            let buffers = [&operands[..], &[vec![0; N]]].concat();
            let after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
            let got = f16::from_bits((after[3][2] >> 16) as u16);
            assert!(!got.is_finite(), "{no_number} is {got}");
            assert!(f16::from_bits((after[3][2] & 0xFFFF) as u16).is_finite(), "beside it");
        }
    }
}

#[test]
fn refuses_what_it_cannot_run() {
    let kernel = "readout_packed";
    let lowered = |rows, heads| lower(Dims { rows, heads }).map(|(of, groups)| (of.width, groups));
    assert_eq!(lowered(9, 3), Ok((192, [3, 9, 1])), "plain");
    assert_eq!(lowered(65_536, 1), Err(Error::Groups { kernel, got: [1, 65_536] }), "rows");
    assert!(lowered(MAX_GROUPS as usize, 1).is_ok(), "the most");
    assert!(lowered(usize::MAX, 3).is_err() && lowered(3, usize::MAX).is_err(), "no overflow");
    assert!(lowered(1 << 14, 1 << 10).is_err(), "beyond 32-bit indices");
}
