//! `token_shift.wgsl` against [`rwkv_core::ops::token_shift`] in `f64`, segment by segment.

use proptest::prelude::*;
use rwkv_core::ops::token_shift as twin;
use rwkv_core::rng::SplitMix64;

use super::{Dims, Error, NONE, Params, VARIANTS, lower};
use crate::gpu::variants_for_tests;
use crate::kernels::testing::{U, bits, compare, config, grids, values, wide, widths};

/// Packed segments, with their records scattered over a state of more.
struct Case {
    dims: Dims,
    x: Vec<f32>,
    mixes: Vec<f32>,
    cursors: Vec<u32>,
    state: Vec<f32>,
    /// Each with its rows, the record it starts from and the one it is kept in.
    segments: Vec<(usize, usize, usize)>,
}

impl Case {
    fn draw(lens: &[usize], planes: usize, width: usize, (before, after): (usize, usize), seed: u64) -> Self {
        let mut rng = SplitMix64::new(seed);
        let tokens = lens.iter().sum();
        let dims = Dims { tokens, planes, width, stride: before + width + after, offset: before };
        let mut records: Vec<usize> = (0..2 * lens.len() + 1).collect();
        let below = |rng: &mut SplitMix64, n: usize| usize::try_from(rng.next_u64() % n as u64).unwrap();
        (1..records.len()).for_each(|i| records.swap(i, below(&mut rng, i + 1)));
        let (mut cursors, mut segments) = (Vec::new(), Vec::new());
        for (len, records) in lens.iter().zip(records.chunks_exact(2)) {
            let own = cursors.len();
            cursors.extend(vec![NONE; 2 * len]);
            cursors[own] = u32::try_from(records[0]).unwrap();
            *cursors.last_mut().unwrap() = u32::try_from(records[1]).unwrap();
            segments.push((*len, records[0], records[1]));
        }
        // Mixes are not confined to [0, 1].
        let (x, mixes) = (values(&mut rng, tokens * width, 2.0), values(&mut rng, planes * width, 1.0));
        let state = values(&mut rng, records.len() * dims.stride, 2.0);
        Self { dims, x, mixes, cursors, state, segments }
    }

    fn record(&self, record: usize) -> std::ops::Range<usize> {
        let start = record * self.dims.stride + self.dims.offset;
        start..start + self.dims.width
    }

    /// The output `[T, M, D]`, its limits, and the state.
    ///
    /// With `d = before - x`: `d` and the product round, `2 u |d mix|`, and the sum, `u |out|`.
    fn twin(&self) -> (Vec<f64>, Vec<f64>, Vec<f32>) {
        let Dims { planes, width, .. } = self.dims;
        let (mut out, mut limits, mut state, mut start) = (Vec::new(), Vec::new(), self.state.clone(), 0);
        for &(len, from, to) in &self.segments {
            let x = &self.x[start * width..][..len * width];
            let previous = &self.state[self.record(from)];
            let mut by_plane = vec![f64::NAN; planes * len * width];
            twin::token_shift(&wide(x), &wide(previous), &wide(&self.mixes), &mut by_plane);
            for (t, m, j) in
                (0..len * planes * width).map(|i| (i / width / planes, i / width % planes, i % width))
            {
                let want = by_plane[(m * len + t) * width + j];
                let now = f64::from(x[t * width + j]);
                out.push(want);
                limits.push(2.0 * U * (want - now).abs() + U * want.abs());
            }
            state[self.record(to)].copy_from_slice(&x[(len - 1) * width..]);
            start += len;
        }
        (out, limits, state)
    }
}

#[test]
fn agrees_with_its_twin() {
    let variants = variants_for_tests(VARIANTS, &[]);
    let lens = proptest::collection::vec(prop_oneof![Just(1usize), 1..=7usize], 1..=5);
    let planes = prop_oneof![Just(1usize), Just(6), 1..=7usize];
    let around = (0..9usize, 0..9usize);
    proptest!(config(file!()), |(lens in lens, planes in planes, width in widths(), around in around, seed: u64)| {
        let case = Case::draw(&lens, planes, width, around, seed);
        let (want, limits, state) = case.twin();
        let (params, groups) = lower(case.dims).unwrap();
        for ((device, kernel), groups) in variants.iter().flat_map(|v| grids(groups).map(|groups| (v, groups))) {
            // All as words: a cursor must not pass through a float.
            let poison = vec![f32::NAN.to_bits(); want.len()];
            let buffers =
                [bits(&case.x), case.cursors.clone(), bits(&case.mixes), bits(&case.state), poison];
            let after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
            prop_assert_eq!(&after[..3], &buffers[..3], "operands are untouched");
            prop_assert!(after[3] == bits(&state), "state");
            let out: Vec<f32> = after[4].iter().copied().map(f32::from_bits).collect();
            compare("out", &out, &want, |i| limits[i])?;
        }
    });
}

/// Segments are kept where they are told to be, or nowhere.
#[test]
fn a_segment_need_not_be_kept() {
    let variants = variants_for_tests(VARIANTS, &[]);
    let mut case = Case::draw(&[3, 1], 1, 8, (0, 0), 1);
    case.cursors[5] = NONE;
    case.cursors[7] = NONE;
    let (params, groups) = lower(case.dims).unwrap();
    for (device, kernel) in &variants {
        let poison = vec![f32::NAN.to_bits(); case.x.len()];
        let buffers = [bits(&case.x), case.cursors.clone(), bits(&case.mixes), bits(&case.state), poison];
        let after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
        assert_eq!(after[3], buffers[3], "state");
    }
}

#[test]
fn refuses_what_it_cannot_run() {
    let dims = Dims { tokens: 3, planes: 6, width: 512, stride: 2000, offset: 1000 };
    let params = Params { len: 384, width: 128, planes: 6, stride: 2000, offset: 1000 };
    assert_eq!(lower(dims), Ok((params, [6, 1, 1])), "plain");
    assert_eq!(lower(Dims { tokens: 0, ..dims }), Ok((Params { len: 0, ..params }, [0, 1, 1])), "no rows");
    assert_eq!(lower(Dims { offset: 1488, ..dims }).map(|(params, _)| params.offset), Ok(1488), "at its end");

    use crate::kernels::extents::Error::{Len, Vectors};
    let kernel = "token_shift";
    let refused = |dims| lower(dims).unwrap_err();
    let vectors = Error::Extents(Vectors { kernel, width: 510 });
    assert_eq!(refused(Dims { width: 510, ..dims }), vectors, "vectors of 4");
    let rows = (1 << 24) * 6;
    let len = Error::Extents(Len { kernel, rows, width: 512 });
    assert_eq!(refused(Dims { tokens: 1 << 24, ..dims }), len, "the output is beyond, though x is not");
    let len = Error::Extents(Len { kernel, rows: usize::MAX, width: 512 });
    assert_eq!(refused(Dims { planes: usize::MAX, ..dims }), len, "no overflow");
    let record = |offset, stride| Error::Record { width: 512, offset, stride };
    assert_eq!(refused(Dims { offset: 1489, ..dims }), record(1489, 2000), "over the record's end");
    assert_eq!(refused(Dims { offset: usize::MAX, ..dims }), record(usize::MAX, 2000), "no overflow");
    assert_eq!(refused(Dims { stride: 1 << 32, ..dims }), record(1000, 1 << 32), "record");
}
