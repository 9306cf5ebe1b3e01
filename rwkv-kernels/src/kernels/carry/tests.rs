//! `carry.wgsl` against [`rwkv_core::ops::carry`], bit for bit.

use proptest::prelude::*;
use rwkv_core::ops::carry as twin;
use rwkv_core::rng::SplitMix64;

use super::{Dims, Error, NONE, Params, VARIANTS, lower};
use crate::gpu::variants_for_tests;
use crate::kernels::testing::{bits, config, widths};

#[test]
#[expect(clippy::cast_possible_truncation, reason = "any record does")]
fn agrees_with_its_twin() {
    let variants = variants_for_tests(VARIANTS, &[]);
    proptest!(config(file!()), |(pairs in 1..=9usize, width in widths(), [before, behind] in [0..3usize, 0..3], seed: u64)| {
        let mut rng = SplitMix64::new(seed);
        let (records, offset) = (2 * pairs + 1, 4 * before);
        let stride = offset + width + 4 * behind;
        // A record is poison where it is written, and one that is read may be read by several.
        let state: Vec<f32> = (0..records * stride)
            .map(|at| if at / stride < pairs { rng.normal() } else { f32::NAN })
            .collect();
        let all: Vec<[usize; 2]> =
            (0..pairs).map(|i| [rng.next_u64() as usize % pairs, pairs + i]).collect();
        let idle = rng.next_u64().is_multiple_of(3);
        let carried: Vec<[usize; 2]> = if idle { all[1..].to_vec() } else { all.clone() };
        let mut want = state.clone();
        twin::carry(&carried, (width, stride, offset), &mut want);

        let word = |n: usize| u32::try_from(n).unwrap();
        let mut words: Vec<[u32; 2]> = all.iter().map(|pair| pair.map(word)).collect();
        if idle {
            words[0][1] = NONE;
        }
        let table: Vec<f32> = words.iter().flatten().map(|&word| f32::from_bits(word)).collect();
        let (params, groups) = lower(Dims { pairs, width, records, stride, offset }).unwrap();
        for (device, kernel) in &variants {
            let buffers = [table.clone(), state.clone()];
            let after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
            prop_assert_eq!(bits(&after[1]), bits(&want), "{} pairs of {}", pairs, width);
        }
    });
}

#[test]
fn refuses_what_it_cannot_run() {
    let dims = Dims { pairs: 3, width: 8, records: 7, stride: 16, offset: 8 };
    assert_eq!(lower(dims), Ok((Params { width: 8, stride: 16, offset: 8 }, [3, 1, 1])), "plain");
    let outside = Dims { offset: 12, ..dims };
    assert_eq!(lower(outside), Err(Error::Record { width: 8, offset: 12, stride: 16 }), "outside");
    let odd = Dims { width: 6, ..dims };
    assert_eq!(lower(odd), Err(Error::Record { width: 6, offset: 8, stride: 16 }), "by fours");
    for far in [Dims { pairs: 65_536, ..dims }, Dims { records: 1 << 28, ..dims }] {
        assert_eq!(lower(far), Err(Error::Extents(far)), "far");
    }
}
