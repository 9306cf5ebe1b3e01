//! `time_mix_batch.wgsl` against [`rwkv_core::ops::time_mix`] in `f64`, as `time_mix.wgsl` is.

use rwkv_core::config::Ranks;

use super::{Dims, Error, lower};
use crate::kernels::time_mix::tests::agrees;

#[test]
fn agrees_with_its_twin() {
    agrees(false);
}

#[test]
fn refuses_what_it_cannot_run() {
    let ranks = Ranks { w: 5, a: 6, v: 7, g: 8 };
    let (inputs, stride, offset) = (9 * 64 + 26, 3 * 64 * 64 + 12, 12);
    let plain = Dims { rows: 9, segments: 2, heads: 3, head_size: 64, ranks, inputs, stride, offset };
    let (params, groups) = lower(plain).unwrap();
    assert_eq!((groups, params.width, params.first_layer), ([3, 2, 1], 192, 0), "plain");
    assert_eq!((params.inputs as usize, params.stride as usize, params.offset), (602, 12_300, 12), "layout");
    for (stride, offset) in [(stride + 2, 12), (stride, 10)] {
        let got = lower(Dims { stride, offset, ..plain });
        assert_eq!(got, Err(Error::Vectors { stride, offset }), "by fours");
    }
    let of = Dims { rows: 0, ..plain };
    assert_eq!(lower(of), Err(Error::Extents(of)), "as `time_mix` does");
}
