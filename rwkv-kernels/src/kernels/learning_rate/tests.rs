//! `learning_rate.wgsl` against the functions of [`rwkv_core::ops::learning_rate`] in `f64`.

use proptest::prelude::*;
use rwkv_core::ops::learning_rate as twin;
use rwkv_core::rng::SplitMix64;

use super::{Dims, Error, Params, VARIANTS, lower};
use crate::gpu::variants_for_tests;
use crate::kernels::testing::{
    TINY, U, bits, compare, config, grids, logits, sigmoid_error, values, wide, widths,
};

/// With `e` the error of eta, and `f = 1 + (eta - 1) k_a`:
///
/// - `a` is exact;
/// - `b` passes on `e` and rounds once: `|kappa| e + u |b|`;
/// - `f` passes on `e` and rounds eta - 1, the product and the sum: `|k_a| (e + 2 u |eta - 1|) + u |f|`; `k` is off
///   by `|k0|` times that, and rounds once more.
#[test]
fn agrees_with_its_twin() {
    let variants = variants_for_tests(VARIANTS, &[]);
    proptest!(config(file!()), |(rows in 1..=9usize, width in widths(), seed: u64)| {
        let mut rng = SplitMix64::new(seed);
        let len = rows * width;
        let (k_a, k0) = (values(&mut rng, width, 1.0), values(&mut rng, len, 3.0));
        let al = logits(&mut rng, len);
        // One head in eight of kappa is zero; no value is larger than 1.
        let sizes = (0..len).map(|i| if (i / 64).is_multiple_of(8) { 0.0 } else { 1.0 });
        let kappa: Vec<f32> = sizes.map(|size| size * rng.uniform(-1.0, 1.0)).collect();

        let mut eta = wide(&al);
        twin::learning_rate(&mut eta);
        let (mut k, mut a, mut b) = (wide(&k0), eta.clone(), wide(&kappa));
        twin::modulate_key(&eta, &wide(&k_a), &mut k);
        twin::directions(&mut a, &mut b);

        let (params, groups) = lower(Dims { rows, width }).unwrap();
        for ((device, kernel), groups) in variants.iter().flat_map(|v| grids(groups).map(|groups| (v, groups))) {
            let buffers = [k_a.clone(), k0.clone(), al.clone(), kappa.clone()];
            let after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
            prop_assert_eq!(bits(&after[0]), bits(&k_a), "k_a is untouched");
            let e = |i: usize| sigmoid_error(al[i].into());
            compare("k", &after[1], &k, |i| {
                let (k0, k_a) = (f64::from(k0[i]).abs(), f64::from(k_a[i % width]).abs());
                k0 * k_a * (e(i) + 2.0 * U * (eta[i] - 1.0).abs()) + 2.0 * U * k[i].abs()
            })?;
            compare("a", &after[2], &a, |_| 0.0)?;
            compare("b", &after[3], &b, |i| f64::from(kappa[i]).abs() * e(i) + U * b[i].abs() + TINY)?;
        }
    });
}

#[test]
fn refuses_what_it_cannot_run() {
    let lowered = |rows, width| lower(Dims { rows, width });
    assert_eq!(lowered(3, 512), Ok((Params { len: 384, width: 128 }, [6, 1, 1])), "plain");
    assert_eq!(lowered(0, 512), Ok((Params { len: 0, width: 128 }, [0, 1, 1])), "no rows");
    assert_eq!(lowered(3, 510), Err(Error::Vectors { kernel: "learning_rate", width: 510 }), "vectors of 4");
    let far = 1 << 33;
    assert_eq!(lowered(2, far), Err(Error::Len { kernel: "learning_rate", rows: 2, width: far }), "too long");
}
