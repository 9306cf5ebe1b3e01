//! `add.wgsl` against [`rwkv_core::ops::add`] in `f64`.

use proptest::prelude::*;
use rwkv_core::ops::add as twin;
use rwkv_core::rng::SplitMix64;

use super::{Dims, Error, Params, VARIANTS, lower};
use crate::gpu::variants_for_tests;
use crate::kernels::testing::{U, bits, compare, config, grids, values, wide, widths};

/// One rounding: off by `u` of the sum.
#[test]
fn agrees_with_its_twin() {
    let variants = variants_for_tests(VARIANTS, &[]);
    proptest!(config(file!()), |(rows in 1..=9usize, width in widths(), log_scale in -8..=16i32, seed: u64)| {
        let mut rng = SplitMix64::new(seed);
        let x = values(&mut rng, width, 1.0);
        let y = values(&mut rng, rows * width, (log_scale as f32).exp2());
        let mut want = wide(&y);
        twin::add(&wide(&x), &mut want);
        let (params, groups) = lower(Dims { rows, width }).unwrap();
        for ((device, kernel), groups) in variants.iter().flat_map(|v| grids(groups).map(|groups| (v, groups))) {
            let buffers = [x.clone(), y.clone()];
            let after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
            prop_assert_eq!(bits(&after[0]), bits(&x), "x is untouched");
            compare("y", &after[1], &want, |i| U * want[i].abs())?;
        }
    });
}

#[test]
fn refuses_what_it_cannot_run() {
    let lowered = |rows, width| lower(Dims { rows, width });
    assert_eq!(lowered(3, 512), Ok((Params { len: 384, period: 128 }, [6, 1, 1])), "plain");
    assert_eq!(lowered(0, 512), Ok((Params { len: 0, period: 128 }, [0, 1, 1])), "no rows");
    assert_eq!(lowered(3, 0), Ok((Params { len: 0, period: 0 }, [0, 1, 1])), "no channels");
    assert_eq!(lowered(3, 510), Err(Error::Vectors { kernel: "add", width: 510 }), "vectors of 4");
    assert_eq!(lowered(1 << 20, 1024).map(|(_, groups)| groups), Ok([65_535, 1, 1]), "the rest by a loop");
    let far = usize::MAX / 8 * 4;
    assert_eq!(lowered(8, far), Err(Error::Len { kernel: "add", rows: 8, width: far }), "no overflow");
    assert!(lowered(4, (1 << 32) - (65_535 << 10) - 4).is_ok(), "as far as the loop does not wrap");
    let far = (1 << 32) - (65_535 << 10);
    assert_eq!(lowered(4, far), Err(Error::Len { kernel: "add", rows: 4, width: far }), "and no further");
}
