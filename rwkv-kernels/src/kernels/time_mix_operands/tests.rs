//! `time_mix_operands.wgsl` and its variants against [`rwkv_core::ops::time_mix::operands`] in `f64`.

use proptest::prelude::*;
use rwkv_core::config::Ranks;
use rwkv_core::ops::time_mix as twin;
use rwkv_core::rng::SplitMix64;

use super::{Dims, Error, HEAD_SIZE as N, OPERANDS, VARIANTS, lower};
use crate::gpu::variants_for_tests;
use crate::kernels::MAX_GROUPS;
use crate::kernels::heads::Heads;
use crate::kernels::intervals::{Interval, floats, held};
use crate::kernels::testing::{bits, wide};

/// Every vector is within what rounding can do to its formula, and so is the twin's.
#[test]
fn agrees_with_its_twin() {
    let variants = variants_for_tests(VARIANTS, &[]);
    let config = ProptestConfig { cases: 24, ..ProptestConfig::with_source_file(file!()) };
    let rank_v = prop_oneof![Just(0usize), Just(5)];
    proptest!(config, |(rows in 1..=7usize, heads in 1..=5usize, v in rank_v, seed: u64)| {
        let ranks = Ranks { w: 8, a: 3, v, g: 5 };
        let of = Heads::draw(&mut SplitMix64::new(seed), rows, heads, ranks, 5);
        let (width, first_layer) = (of.width(), v == 0);
        let (params, groups) = lower(Dims { rows, heads, inputs: of.stride, first_layer }).unwrap();
        let poison = vec![f32::NAN; rows * OPERANDS * width];
        let buffers =
            [bits(&of.inputs), of.up(), bits(&of.vectors), bits(&of.v_first), bits(&poison)];
        for (device, kernel) in &variants {
            let after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
            prop_assert!(after[..3] == buffers[..3], "what is only read is as it was");
            let [v_first, got] = [3, 4].map(|i| floats(&after[i]));
            for row in 0..rows {
                let mut exact = None;
                let [_, want_first] = of.twin(row, |weights, x, v_first, out| {
                    out.fill(0.0);
                    exact = Some((twin::operands(N, &weights, x, v_first), x.r.to_vec()));
                });
                let (exact, r) = exact.unwrap();
                prop_assert_eq!(wide(&v_first[row * width..][..width]), want_first, "v_first");
                for head in 0..heads {
                    let x = of.operands(row, head);
                    let kappa: Vec<Interval> = x.removal.iter().map(|&u| u * x.unit).collect();
                    let b: Vec<_> = kappa.iter().zip(&x.eta).map(|(&kappa, &eta)| kappa * eta).collect();
                    let bounds = [&x.decay, &x.key, &kappa, &b, &x.r, &x.value];
                    let decay: Vec<f64> = exact.lw.iter().map(|lw| lw.exp_m1()).collect();
                    let minus_a: Vec<f64> = exact.a.iter().map(|a| -a).collect();
                    let exact = [&decay, &exact.k, &minus_a, &exact.b, &r, &exact.v];
                    let names = ["w - 1", "k", "kappa", "b", "r", "v"];
                    for (n, ((bounds, exact), name)) in bounds.into_iter().zip(exact).zip(names).enumerate() {
                        held(&format!("twin: {name}"), &exact[head * N..][..N], bounds)?;
                        let at = ((row * heads + head) * OPERANDS + n) * N;
                        let label = kernel.kernel().label();
                        held(&format!("{label}: {name} of row {row}, head {head}"), &got[at..][..N], bounds)?;
                    }
                }
            }
        }
    });
}

#[test]
fn refuses_what_it_cannot_run() {
    let kernel = "time_mix_operands";
    let plain = Dims { rows: 9, heads: 3, inputs: 3 * 192, first_layer: true };
    let lowered = |dims| lower(dims).map(|(params, groups)| (params.width, params.inputs, groups));
    assert_eq!(lowered(plain), Ok((192, 576, [3, 9, 1])), "plain");
    let stride = Error::Stride { kernel, width: 576, offset: 0, stride: 575 };
    assert_eq!(lowered(Dims { inputs: 575, ..plain }), Err(stride), "inputs");
    let groups = |got| Err(Error::Groups { kernel, got });
    assert_eq!(lowered(Dims { rows: 65_536, heads: 1, ..plain }), groups([1, 65_536]), "rows");
    assert!(lowered(Dims { rows: MAX_GROUPS as usize, heads: 1, ..plain }).is_ok(), "the most");
    for dims in [
        Dims { rows: usize::MAX, ..plain },
        Dims { heads: usize::MAX, ..plain },
        Dims { inputs: usize::MAX, ..plain },
        Dims { rows: 1 << 22, inputs: 1 << 10, ..plain },
    ] {
        assert!(lowered(dims).is_err(), "{dims:?}");
    }
}
