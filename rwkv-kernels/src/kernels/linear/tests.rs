//! `linear.wgsl` and its variants against [`rwkv_core::ops::linear`] in `f64`.

use proptest::prelude::*;
use rwkv_core::ops::linear::{Linear as _, Matrix};
use rwkv_core::rng::SplitMix64;

use super::{Dims, Error, VARIANTS, lower};
use crate::gpu::{Device, variants_for_tests};
use crate::kernels::MAX_GROUPS;
use crate::kernels::intervals::{FORMATS, Interval, Weights, exact, floats, held, of_lanes};
use crate::kernels::own_columns::Teams;
use crate::kernels::testing::{bits as words, wide};
use crate::kernels::weights::formats;
use crate::pipeline::Pipeline;

/// Operands of one call.
struct Case {
    dims: Dims,
    weights: Weights,
    x: Vec<f32>,
    y: Vec<f32>,
}

impl Case {
    /// Rows of any scale, some of the smallest and largest, added to what is a thousand times larger or smaller than most, or to nothing.
    fn draw(dims: Dims, seed: u64) -> Self {
        let Dims { rows, inputs, outputs, accumulate, format } = dims;
        let mut rng = SplitMix64::new(seed);
        let weights = Weights::draw(&mut rng, format, [outputs, inputs]);
        let mut scaled = |len| {
            let scale = rng.uniform(-10.0, 10.0).exp2();
            (0..len).map(|_| scale * rng.normal()).collect::<Vec<_>>()
        };
        let (mut x, y) = (scaled(rows * inputs), scaled(rows * outputs));
        if rng.next_u64().is_multiple_of(4) {
            let extreme =
                [0.0, 1e-45, 1e-39, 2f32.powi(-112), 2f32.powi(-104), 2f32.powi(-98), 2f32.powi(100)];
            let scale = extreme[(rng.next_u64() % 7) as usize];
            x.iter_mut().for_each(|x| *x = scale * rng.normal());
            // The largest of a block, of both signs.
            x.chunks_mut(32).for_each(|block| block[..2].copy_from_slice(&[6.0 * scale, -6.0 * scale]));
        }
        Self { dims, weights, x, y: if accumulate { y } else { vec![f32::NAN; rows * outputs] } }
    }

    fn twin(&self) -> Vec<f64> {
        let mut y = vec![f64::NAN; self.y.len()];
        Matrix::new(self.dims.inputs, self.weights.values()).apply(&wide(&self.x), &mut y);
        if self.dims.accumulate {
            y.iter_mut().zip(&self.y).for_each(|(y, &before)| *y += f64::from(before));
        }
        y
    }

    /// [`Weights::product`], and the addition to `y`.
    fn bounds(&self) -> Vec<Interval> {
        let (weights, inputs) = (exact(&self.weights.values()), self.dims.inputs);
        let mut y = Vec::new();
        for (x, before) in exact(&self.x).chunks(inputs).zip(self.y.chunks(self.dims.outputs)) {
            for (weights, &before) in weights.chunks(inputs).zip(before) {
                let product = self.weights.product(weights, x);
                let sum = || Interval::exact(before) + product;
                y.push(if self.dims.accumulate { sum() } else { product });
            }
        }
        y
    }

    fn run(&self, device: &Device, kernel: &Pipeline, tile: u32) -> Vec<f32> {
        let (params, groups) = lower(self.dims, tile).unwrap();
        let buffers = [self.weights.words(), words(&self.x), words(&self.y)];
        let after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
        assert_eq!(after[..2], buffers[..2], "the operands are untouched");
        floats(&after[2])
    }
}

#[test]
fn agrees_with_its_twin() {
    for (lanes, row_lanes) in
        [(64u32, 8u32), (64, 64), (128, 32), (256, 8), (256, 24), (512, 32), (512, 128), (1024, 64)]
    {
        let overrides = [("LANES", lanes.into()), ("ROW_LANES", row_lanes.into()), formats(FORMATS)];
        let variants = variants_for_tests(&of_lanes(VARIANTS, lanes), &overrides);
        let config = ProptestConfig { cases: 24, ..ProptestConfig::with_source_file(file!()) };
        let extents = (1..=3usize, 1..=70usize, 1..=150usize, any::<bool>());
        let format = prop::sample::select(&FORMATS);
        proptest!(config, |((rows, inputs, outputs, accumulate) in extents, format in format, tile in 1..=80u32, seed: u64)| {
            let inputs = inputs * if format.is_some() { 32 } else { 8 };
            let case = Case::draw(Dims { rows, inputs, outputs, accumulate, format }, seed);
            let bounds = case.bounds();
            held("twin", &case.twin(), &bounds)?;
            for (device, kernel) in &variants {
                let got = case.run(device, kernel, tile);
                held(&format!("{} {lanes} {row_lanes}: y", kernel.kernel().label()), &got, &bounds)?;
                prop_assert_eq!(words(&got), words(&case.run(device, kernel, tile)), "again");
            }
        });
    }
}

/// With extents and one format compiled: within the same bounds. Not the same bits, since a compiler may fuse other
/// products with sums.
#[test]
fn with_known_extents_it_agrees_with_its_twin() {
    for format in FORMATS {
        for inputs in [32u16, 320, 1056, 2080] {
            let dims = Dims { rows: 2, inputs: inputs.into(), outputs: 37, accumulate: true, format };
            let case = Case::draw(dims, 11);
            let bounds = case.bounds();
            let known = [formats([format]), ("INPUTS", inputs.into()), ("OUTPUTS", 37.0), ("TILE", 17.0)];
            let teams = Teams::new(256, Some(inputs.into())).overrides();
            for (device, kernel) in variants_for_tests(VARIANTS, &[&teams[..], &known].concat()) {
                let got = case.run(device, &kernel, 17);
                let what = format!("{}, {format:?}, {inputs} inputs", kernel.kernel().label());
                held(&what, &got, &bounds).unwrap();
                assert_eq!(words(&got), words(&case.run(device, &kernel, 17)), "again");
            }
        }
    }
}

/// What is no number, or infinite, gives no number rather than a wrong one, whatever the weights are.
#[test]
fn no_number_gives_no_number() {
    let variants = variants_for_tests(VARIANTS, &[formats(FORMATS)]);
    for format in FORMATS {
        let case = Case::draw(Dims { rows: 4, inputs: 320, outputs: 9, accumulate: true, format }, 5);
        for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut of = Case { weights: case.weights.clone(), x: case.x.clone(), y: case.y.clone(), ..case };
            of.x[2 * 320 + 77] = wrong;
            for (device, kernel) in &variants {
                let (got, sound) = (of.run(device, kernel, 4), case.run(device, kernel, 4));
                let what = format!("{}, {format:?}, {wrong}", kernel.kernel().label());
                assert!(got[2 * 9..3 * 9].iter().all(|y| !y.is_finite()), "{what}: {:?}", &got[2 * 9..3 * 9]);
                assert_eq!(words(&got[..2 * 9]), words(&sound[..2 * 9]), "{what}: rows before it");
                assert_eq!(words(&got[3 * 9..]), words(&sound[3 * 9..]), "{what}: the row after it");
            }
        }
    }
}

/// The numerics contract: a row has its bits whatever is beside it, and an output whatever the tile.
#[test]
fn rows_and_tiles_do_not_matter() {
    let variants = variants_for_tests(VARIANTS, &[]);
    let case = Case::draw(Dims { rows: 3, inputs: 328, outputs: 61, accumulate: true, format: None }, 3);
    for (device, kernel) in &variants {
        let all = words(&case.run(device, kernel, 17));
        assert_eq!(words(&case.run(device, kernel, 64)), all, "another tile");
        for (row, want) in all.chunks(61).enumerate() {
            let dims = Dims { rows: 1, ..case.dims };
            let (x, y) = (case.x[row * 328..][..328].to_vec(), case.y[row * 61..][..61].to_vec());
            let alone = Case { dims, weights: case.weights.clone(), x, y };
            assert_eq!(words(&alone.run(device, kernel, 17)), want, "row {row} alone");
        }
    }
}

#[test]
fn refuses_what_it_cannot_run() {
    let dims = |rows, inputs, outputs| Dims { rows, inputs, outputs, accumulate: true, format: None };
    let lowered = |dims, tile| {
        lower(dims, tile).map(|(params, groups)| {
            assert_eq!((params.inputs as usize, params.accumulate), (dims.inputs, 1), "passed on");
            (params.outputs, params.tile, groups)
        })
    };
    assert_eq!(lowered(dims(2, 24, 65), 32), Ok((65, 32, [3, 2, 1])), "a part of a tile");
    assert_eq!(lowered(dims(2, 24, 65), 0), Ok((65, 1, [65, 2, 1])), "a tile has a row");
    for inputs in [0, 12] {
        assert_eq!(lowered(dims(1, inputs, 1), 1), Err(Error::Inputs { inputs, unit: 8 }), "{inputs} inputs");
    }
    let blocks = Dims { format: FORMATS[1], ..dims(1, 40, 1) };
    assert_eq!(lowered(blocks, 1), Err(Error::Inputs { inputs: 40, unit: 32 }), "not whole blocks");
    let extents = |rows, inputs, outputs| {
        let of = dims(rows, inputs, outputs);
        assert_eq!(lowered(of, 64), Err(Error::Extents(of)), "{of:?}");
    };
    extents(0, 8, 1);
    extents(1, 8, 0);
    extents(1, 8, 1 << 31);
    extents(1, 1 << 18, 1 << 16);
    extents(1 << 20, 1 << 11, 1);
    extents(1 << 20, 8, 1 << 11);
    extents(usize::MAX, 8, 2);
    assert!(lower(dims(1, 1 << 18, (1 << 16) - 1), 1).is_ok(), "2^31 - 2^15 elements of eight weights");
    for (of, got) in [(dims(1, 8, 65_536), [65_536, 1]), (dims(65_536, 8, 1), [1, 65_536])] {
        assert_eq!(lowered(of, 1), Err(Error::Groups { got, max: MAX_GROUPS }), "{of:?}");
    }
}
