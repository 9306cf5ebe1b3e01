//! `to_halves.wgsl` against [`rwkv_core::ops::to_halves`].

use half::f16;
use proptest::prelude::*;
use rwkv_core::ops::matmul::Rows;
use rwkv_core::ops::to_halves::to_half;
use rwkv_core::rng::SplitMix64;

use super::{Dims, Error, Params, VARIANTS, lower};
use crate::gpu::variants_for_tests;
use crate::kernels::packed::tests::{floats, rounded};
use crate::kernels::testing::{bits, compare, config, grids, values, wide, widths};

/// Off by the rounding that the twin states, since WGSL lets a device choose between the two halves beside a value: hence
/// by twice that from the value itself.
#[test]
fn agrees_with_its_twin() {
    let variants = variants_for_tests(VARIANTS, &[]);
    let log_scale = -30..=20i32;
    let gaps = (0..=3usize, 0..=3usize);
    proptest!(config(file!()), |(
        rows in 1..=9usize, width in widths(), gaps in gaps, exponent in 0..=8u8, log in log_scale, seed: u64
    )| {
        let x = values(&mut SplitMix64::new(seed), rows * width, (log as f32).exp2());
        // What is before a row and after it is NaN, so that reading it shows.
        let [before, after] = [gaps.0, gaps.1].map(|quads| vec![f32::NAN; 4 * quads]);
        let among = Rows { offset: before.len(), stride: before.len() + width + after.len() };
        let lying: Vec<f32> =
            x.chunks(width).flat_map(|row| [&before[..], row, &after]).flatten().copied().collect();
        let halves = Some(exponent);
        let limits: Vec<_> = wide(&x).iter().map(|&x| rounded(x, 0.0, halves)).collect();
        for (x, (want, limit)) in x.iter().zip(&limits) {
            let twin = f64::from(to_half(*x, exponent).to_f32()) * f64::from(exponent).exp2();
            prop_assert!((twin - want).abs() <= *limit, "twin: {x:e} is {twin:e}");
        }
        let (params, groups) = lower(Dims { rows, width }, among, exponent).unwrap();
        for ((device, kernel), groups) in variants.iter().flat_map(|v| grids(groups).map(|groups| (v, groups))) {
            let buffers = [bits(&lying), vec![f32::NAN.to_bits(); rows * width]];
            let after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
            prop_assert_eq!(&after[0], &buffers[0], "x is untouched");
            let want: Vec<f64> = limits.iter().map(|(want, _)| *want).collect();
            compare("y", &floats(&after[1], width, halves), &want, |i| 2.0 * limits[i].1)?;
        }
    });
}

/// What is no number, or infinite, is not hidden; what is large is not infinite.
#[test]
fn hides_nothing() {
    for (device, kernel) in &variants_for_tests(VARIANTS, &[]) {
        let x = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e9];
        let (params, groups) = lower(Dims { rows: 1, width: 4 }, Rows { offset: 0, stride: 4 }, 8).unwrap();
        let buffers = [bits(&x), vec![0; 4]];
        let after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
        let got: Vec<f16> = after[1][..2]
            .iter()
            .flat_map(|&x| [x, x >> 16])
            .map(|x| f16::from_bits((x & 0xFFFF) as u16))
            .collect();
        assert!(got[0].is_nan(), "{got:?}");
        assert_eq!(got[1..], [f16::INFINITY, f16::NEG_INFINITY, f16::MAX], "{got:?}");
    }
}

#[test]
fn refuses_what_it_cannot_run() {
    let kernel = "to_halves";
    let lowered = |rows, width, offset, stride| lower(Dims { rows, width }, Rows { offset, stride }, 4);
    let plain = Params { len: 384, width: 128, offset: 2, stride: 130, scale: 0.0625 };
    assert_eq!(lowered(3, 512, 8, 520), Ok((plain, [6, 1, 1])), "plain");
    assert_eq!(lowered(0, 512, 0, 512).map(|(of, groups)| (of.len, groups)), Ok((0, [0, 1, 1])), "no rows");
    for (width, offset, stride, got) in [(510, 0, 512, 510), (512, 2, 516, 2), (512, 4, 518, 518)] {
        let vectors = Err(Error::Vectors { kernel, width: got });
        assert_eq!(lowered(3, width, offset, stride), vectors, "vectors of 4");
    }
    let short = Error::Stride { kernel, width: 512, offset: 4, stride: 512 };
    assert_eq!(lowered(3, 512, 4, 512), Err(short), "a row that is not in one");
    let far = usize::MAX / 8 * 4;
    assert_eq!(lowered(8, far, 0, far), Err(Error::Len { kernel, rows: 8, width: far }), "no overflow");
    assert!(lowered(1 << 12, 512, 0, 1 << 20).is_err(), "rows beyond 32-bit indices");
}
