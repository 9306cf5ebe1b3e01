//! `add_planes.wgsl` against [`rwkv_core::ops::add_planes`] in `f64`.

use proptest::prelude::*;
use rwkv_core::ops::add_planes::add_planes;
use rwkv_core::rng::SplitMix64;

use super::{Dims, Error, Params, VARIANTS, lower};
use crate::gpu::variants_for_tests;
use crate::kernels::testing::{U, bits, compare, config, values, wide, widths};

/// A plane passes as many additions as there are from it on, the last to `y`: off by `P u` times the sum of sizes at most.
#[test]
fn agrees_with_its_twin() {
    let variants = variants_for_tests(VARIANTS, &[]);
    let scale = -8..=8i32;
    proptest!(config(file!()), |(rows in 1..=9usize, planes in 0..=5usize, width in widths(), scale in scale, seed: u64)| {
        let mut rng = SplitMix64::new(seed);
        let x = values(&mut rng, rows * planes * width, 1.0);
        let y = values(&mut rng, rows * width, (scale as f32).exp2());
        let mut want = wide(&y);
        add_planes(width, planes, &wide(&x), &mut want);
        let absolute = |x: &[f32]| x.iter().map(|x| f64::from(x.abs())).collect::<Vec<_>>();
        let mut sizes = absolute(&y);
        add_planes(width, planes, &absolute(&x), &mut sizes);
        let (params, groups) = lower(Dims { rows, width }, planes).unwrap();
        // A buffer is bound, though nothing is read of it.
        let x = if planes == 0 { vec![f32::NAN; 4] } else { x };
        for (device, kernel) in &variants {
            let buffers = [x.clone(), y.clone()];
            let after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
            prop_assert_eq!(bits(&after[0]), bits(&x), "x is untouched");
            compare("y", &after[1], &want, |i| planes as f64 * U * sizes[i])?;
        }
    });
}

#[test]
fn refuses_what_it_cannot_run() {
    let kernel = "add_planes";
    let lowered = |rows, width, planes| lower(Dims { rows, width }, planes);
    assert_eq!(lowered(3, 512, 4), Ok((Params { width: 128, planes: 4 }, [2, 3, 1])), "plain");
    assert_eq!(lowered(0, 512, 4).map(|(_, groups)| groups), Ok([2, 0, 1]), "no rows");
    assert_eq!(lowered(3, 510, 4), Err(Error::Vectors { kernel, width: 510 }), "vectors of 4");
    let far = usize::MAX / 8 * 4;
    assert_eq!(lowered(8, far, 1), Err(Error::Len { kernel, rows: 8, width: far }), "no overflow");
    let error = Error::Len { kernel, rows: 1 << 23, width: 1 << 10 };
    assert_eq!(lowered(1 << 10, 1 << 10, 1 << 13), Err(error), "planes beyond 32-bit indices");
    assert!(lowered(1, 4, usize::MAX).is_err(), "nor so many");
    assert_eq!(lowered(65_536, 4, 4), Err(Error::Groups { kernel, got: [1, 65_536] }), "rows");
}
