//! `decay.wgsl` against [`rwkv_core::ops::decay`] in `f64`, and the sigmoid that it shares.

use proptest::prelude::*;
use rwkv_core::ops::decay as twin;
use rwkv_core::real::sigmoid;
use rwkv_core::rng::SplitMix64;

use super::{Dims, Error, VARIANTS, lower};
use crate::gpu::{device_for_tests, variants_for_tests};
use crate::kernels::testing::{TINY, U, compare, config, grids, logits, sigmoid_error, wide, widths};
use crate::{Access, Binding, Element, Kernel, Scalar};

/// The error of the sigmoid, a half ulp of the scale, and the rounding of the product.
#[test]
fn agrees_with_its_twin() {
    let variants = variants_for_tests(VARIANTS, &[]);
    proptest!(config(file!()), |(rows in 1..=9usize, width in widths(), seed: u64)| {
        let wl = logits(&mut SplitMix64::new(seed), rows * width);
        let mut want = wide(&wl);
        twin::log_decay(&mut want);
        let (params, groups) = lower(Dims { rows, width }).unwrap();
        for ((device, kernel), groups) in variants.iter().flat_map(|v| grids(groups).map(|groups| (v, groups))) {
            let after = device.run(kernel, bytemuck::bytes_of(&params), std::slice::from_ref(&wl), groups).unwrap();
            compare("lw", &after[0], &want, |i| {
                twin::DECAY_SCALE * sigmoid_error(wl[i].into()) + 1.5 * U * want[i].abs() + TINY
            })?;
        }
    });
}

/// The bound that `sigmoid.wgsl` states, over the whole range, the tail down to where it is flushed, and beyond.
#[test]
fn sigmoid_keeps_its_bound() {
    let Some(device) = device_for_tests() else { return };
    let source = format!(
        "@group(0) @binding(0) var<storage, read_write> x: array<f32>;\n\
         @group(0) @binding(1) var<storage, read_write> x4: array<vec4<f32>>;\n{}\
         @compute @workgroup_size(64)\n\
         fn sweep(@builtin(global_invocation_id) id: vec3<u32>) {{\n\
             for (var i = 4u * id.x; i < 4u * id.x + 4u; i++) {{ x[i] = sigmoid(x[i]); }}\n\
             x4[id.x] = sigmoid4(x4[id.x]);\n\
         }}",
        include_str!("../../wgsl/sigmoid.wgsl"),
    );
    let binding = |name, lanes| Binding {
        name,
        access: Access::ReadWrite,
        element: Some(Element { scalar: Scalar::F32, lanes }),
    };
    let bindings = [binding("x", 1), binding("x4", 4)];
    let sweep = Kernel {
        name: "sweep",
        source: source.leak(),
        bindings: Box::leak(Box::new(bindings)),
        params_bytes: 0,
        ..VARIANTS[0]
    };
    let kernel = device.pipeline(&sweep, &[]).unwrap();

    let mut rng = SplitMix64::new(7);
    let mut xs: Vec<f32> = (0..1 << 15).map(|_| rng.uniform(-100.0, 100.0)).collect();
    xs.extend((0..1 << 15).map(|_| rng.uniform(-12.0, 12.0) * rng.uniform(-30.0, 0.0).exp2()));
    xs[..8].copy_from_slice(&[0.0, -0.0, 88.0, -88.0, 1e38, -1e38, f32::MAX, f32::MIN]);
    let groups = u32::try_from(xs.len() / 4 / 64).unwrap();
    for got in device.run(&kernel, &[], &[xs.clone(), xs.clone()], [groups, 1, 1]).unwrap() {
        for (&x, got) in xs.iter().zip(got) {
            let (x, got) = (f64::from(x), f64::from(got));
            let (want, limit) = (sigmoid(x), sigmoid_error(x));
            assert!((got - want).abs() <= limit, "sigmoid({x:e}) = {got:e}, not {want:e} within {limit:e}");
        }
    }
}

#[test]
fn refuses_what_it_cannot_run() {
    let lowered = |rows, width| lower(Dims { rows, width }).map(|(params, groups)| (params.len, groups));
    let scale = lower(Dims { rows: 1, width: 4 }).map(|(params, _)| params.scale);
    assert_eq!(scale, Ok(0.606_530_66), "not the published 0.606531, which hides in the limits");
    assert_eq!(lowered(3, 512), Ok((384, [6, 1, 1])), "plain");
    assert_eq!(lowered(0, 512), Ok((0, [0, 1, 1])), "no rows");
    assert_eq!(lowered(3, 510), Err(Error::Vectors { kernel: "decay", width: 510 }), "vectors of 4");
    let far = 1 << 33;
    assert_eq!(lowered(2, far), Err(Error::Len { kernel: "decay", rows: 2, width: far }), "2^34 elements");
}
