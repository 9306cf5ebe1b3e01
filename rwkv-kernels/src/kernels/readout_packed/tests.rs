//! `readout_packed.wgsl` and its variants against [`rwkv_core::ops::readout`] in `f64`.

use half::f16;
use proptest::prelude::*;
use rwkv_core::ops::wkv7;

use super::{Dims, Error, HEAD_SIZE as N, VARIANTS, lower};
use crate::gpu::variants_for_tests;
use crate::kernels::MAX_GROUPS;
use crate::kernels::readout::tests::Case;
use crate::kernels::testing::{bits, compare, config};

/// Operands of `readout`, as this kernel has them: what it does not read is NaN.
fn packed(case: &Case) -> [Vec<f32>; 3] {
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

/// In single precision within the limits of `readout`, whose sums pass no fewer additions; as halves within their rounding
/// besides, half a unit in the last place of eleven bits, or of the least half.
#[test]
fn agrees_with_its_twin() {
    for halves in [false, true] {
        let variants = variants_for_tests(VARIANTS, &[("HALVES", u8::from(halves).into())]);
        proptest!(config(file!()), |(tokens in 1..=5usize, heads in 1..=4usize, exponent in 0..=8u8, seed: u64)| {
            let case = Case::draw(wkv7::Dims { tokens, heads, head_size: N }, seed);
            let (want, limits) = (case.twin(), case.limits(N / 2));
            let (params, groups) = lower(Dims { rows: tokens, heads, exponent }).unwrap();
            let words = want.len() / if halves { 2 } else { 1 };
            let operands = packed(&case).map(|x| bits(&x));
            let buffers = [&operands[..], &[vec![u32::MAX; words]]].concat();
            for (device, kernel) in &variants {
                let after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
                prop_assert!(after[..3] == operands, "what is only read is as it was");
                if !halves {
                    let got: Vec<f32> = after[3].iter().map(|&x| f32::from_bits(x)).collect();
                    compare(&kernel.kernel().label(), &got, &want, |i| limits[i])?;
                    continue;
                }
                let two = |x: &u32| [*x, x >> 16].map(|x| f16::from_bits((x & 0xFFFF) as u16).to_f32());
                let got: Vec<f32> = after[3].iter().flat_map(two).collect();
                let scale = f64::from(params.scale);
                let largest = f64::from(f16::MAX);
                let want: Vec<f64> = want.iter().map(|x| (scale * x).clamp(-largest, largest)).collect();
                let limit = |i: usize| {
                    scale * limits[i] + (want[i].abs() + scale * limits[i]) * 2f64.powi(-11) + 2f64.powi(-25)
                };
                compare(&kernel.kernel().label(), &got, &want, limit)?;
            }
        });
    }
}

/// What is no number, or infinite, is not hidden.
#[test]
fn halves_hide_nothing() {
    for (device, kernel) in &variants_for_tests(VARIANTS, &[("HALVES", 1.0)]) {
        for no_number in [f32::NAN, f32::INFINITY] {
            let mut case = Case::draw(wkv7::Dims { tokens: 1, heads: 1, head_size: N }, 1);
            case.operands[3][5] = no_number;
            let (params, groups) = lower(Dims { rows: 1, heads: 1, exponent: 4 }).unwrap();
            let operands = packed(&case).map(|x| bits(&x));
            let buffers = [&operands[..], &[vec![0; N / 2]]].concat();
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
    let lowered = |rows, heads| {
        lower(Dims { rows, heads, exponent: 4 }).map(|(of, groups)| (of.width, of.scale, groups))
    };
    assert_eq!(lowered(9, 3), Ok((192, 0.0625, [3, 9, 1])), "plain");
    assert_eq!(lowered(65_536, 1), Err(Error::Groups { kernel, got: [1, 65_536] }), "rows");
    assert!(lowered(MAX_GROUPS as usize, 1).is_ok(), "the most");
    assert!(lowered(usize::MAX, 3).is_err() && lowered(3, usize::MAX).is_err(), "no overflow");
    assert!(lowered(1 << 14, 1 << 10).is_err(), "beyond 32-bit indices");
}
