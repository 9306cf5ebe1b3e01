//! `value_residual.wgsl` against [`rwkv_core::ops::value_residual`] in `f64`.

use proptest::prelude::*;
use rwkv_core::ops::value_residual as twin;
use rwkv_core::rng::SplitMix64;

use super::{Dims, Error, VARIANTS, lower};
use crate::gpu::variants_for_tests;
use crate::kernels::testing::{
    TINY, U, bits, compare, config, grids, logits, sigmoid_error, values, wide, widths,
};

/// With `d = v_first - v`, `s` the sigmoid and `e` its error: the product passes on `e` and the rounding of `d`, and
/// rounds, `|d| (e + 2 u s)`; the sum rounds, `u |v|`.
#[test]
fn agrees_with_its_twin() {
    let variants = variants_for_tests(VARIANTS, &[]);
    proptest!(config(file!()), |(rows in 1..=9usize, width in widths(), seed: u64)| {
        let mut rng = SplitMix64::new(seed);
        let len = rows * width;
        let (v_first, v) = (values(&mut rng, len, 3.0), values(&mut rng, len, 3.0));
        let vl = logits(&mut rng, len);
        let mut want = wide(&v);
        twin::value_residual(&wide(&v_first), &wide(&vl), &mut want);

        let (params, groups) = lower(Dims { rows, width }).unwrap();
        for ((device, kernel), groups) in variants.iter().flat_map(|v| grids(groups).map(|groups| (v, groups))) {
            let buffers = [v_first.clone(), vl.clone(), v.clone()];
            let after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
            for i in 0..2 {
                prop_assert_eq!(bits(&after[i]), bits(&buffers[i]), "operand {} is untouched", i);
            }
            compare("v", &after[2], &want, |i| {
                let d = (f64::from(v_first[i]) - f64::from(v[i])).abs();
                let s = rwkv_core::real::sigmoid(f64::from(vl[i]));
                d * (sigmoid_error(vl[i].into()) + 2.0 * U * s) + U * want[i].abs() + TINY
            })?;
        }
    });
}

#[test]
fn refuses_what_it_cannot_run() {
    let lowered = |rows, width| lower(Dims { rows, width }).map(|(params, groups)| (params.len, groups));
    assert_eq!(lowered(3, 512), Ok((384, [6, 1, 1])), "plain");
    assert_eq!(lowered(0, 512), Ok((0, [0, 1, 1])), "no rows");
    assert_eq!(lowered(3, 510), Err(Error::Vectors { kernel: "value_residual", width: 510 }), "vectors of 4");
    let far = 1 << 33;
    assert_eq!(
        lowered(2, far),
        Err(Error::Len { kernel: "value_residual", rows: 2, width: far }),
        "too long"
    );
}
