//! `mix_in.wgsl` and its variants against [`rwkv_core::ops::mix_in`] in `f64`.

use proptest::prelude::*;
use rwkv_core::Real as _;
use rwkv_core::ops::activation::Activation;
use rwkv_core::ops::layer_norm::LN_EPS;
use rwkv_core::ops::linear::Matrix;
use rwkv_core::ops::mix_in as twin;
use rwkv_core::rng::SplitMix64;

use super::{Dims, Error, NONE, Stacked, Tile, VARIANTS, lower};
use crate::gpu::{Device, variants_for_tests};
use crate::kernels::MAX_GROUPS;
use crate::kernels::intervals::{
    FORMATS, Interval, Weights, below, exact, floats, held, of_lanes, row_moments,
};
use crate::kernels::testing::{bits as words, wide};
use crate::kernels::weights::formats;
use crate::pipeline::Pipeline;

const ACTIVATIONS: [Activation; 4] =
    [Activation::Identity, Activation::Tanh, Activation::Sigmoid, Activation::SquaredRelu];

/// Operands of one call.
struct Case {
    dims: Dims,
    stack: Vec<Stacked>,
    tile: u32,
    /// Record read and record written.
    cursor: [u32; 2],
    x: Vec<f32>,
    /// Gain, bias and mixes.
    vectors: Vec<f32>,
    /// By [`Self::stack`].
    weights: Vec<Weights>,
    /// NaN but for the shift that is read.
    state: Vec<f32>,
}

impl Case {
    /// A stack of any form, on a token as the residual stream of a trained model has them: of any scale, far from
    /// zero (by so much that a mean of squares would keep nothing of the variance), constant, or with a channel that
    /// outweighs the others. A `head` has one matrix, no mix and no record.
    fn draw(width: usize, head: bool, seed: u64) -> Self {
        let mut rng = SplitMix64::new(seed);
        let mut below = |n| below(&mut rng, n);
        let mixes = if head { 0 } else { 1 + below(6) };
        let matrices = if head { 1 } else { 1 + below(7) };
        let mut stacked = || Stacked {
            outputs: if below(4) == 0 { 1 + below(150) } else { 1 + below(24) } as usize,
            mix: if mixes == 0 || below(5) == 0 { None } else { Some(below(mixes)) },
            activation: ACTIVATIONS[below(4) as usize],
            format: if width.is_multiple_of(32) { FORMATS[below(3) as usize] } else { None },
        };
        let stack: Vec<_> = (0..matrices).map(|_| stacked()).collect();
        let (tile, records) = (1 + below(60), 3);
        let cursor = match (head, below(records)) {
            (true, _) => [NONE; 2],
            (false, read) => {
                let written = (read + 1 + below(records - 1)) % records;
                [if below(4) == 0 { NONE } else { read }, if below(4) == 0 { NONE } else { written }]
            }
        };
        let offset = 4 * below(20) as usize;
        let stride = offset + width + 4 * below(20) as usize;

        let weights =
            stack.iter().map(|of| Weights::draw(&mut rng, of.format, [of.outputs, width])).collect();
        let scale = rng.uniform(-6.0, 8.0).exp2();
        let mut x: Vec<f32> = (0..width).map(|_| scale * rng.normal()).collect();
        match rng.next_u64() % 5 {
            0 => x.iter_mut().for_each(|x| *x += 3000.0 * scale),
            1 => x.fill(1000.0),
            2 => x[width / 2] *= 300.0,
            _ => {}
        }
        let mut uniform = |n: usize, lo, hi| (0..n).map(|_| rng.uniform(lo, hi)).collect::<Vec<_>>();
        let mut vectors = uniform(width, -2.0, 2.0);
        vectors.extend(uniform(width, -1.0, 1.0));
        vectors.extend(uniform(mixes as usize * width, -1.0, 9.0));
        let mut state = vec![f32::NAN; records as usize * stride];
        if cursor[0] != NONE {
            let shift = uniform(width, -3.0, 3.0);
            state[cursor[0] as usize * stride + offset..][..width].copy_from_slice(&shift);
        }
        Self { dims: Dims { width, stride, offset }, stack, tile, cursor, x, vectors, weights, state }
    }

    /// The token before.
    fn shift(&self) -> Vec<f32> {
        let Dims { width, stride, offset } = self.dims;
        match self.cursor[0] {
            NONE => vec![0.0; width],
            record => self.state[record as usize * stride + offset..][..width].to_vec(),
        }
    }

    /// The state that should be, with `shift` written.
    fn moved(&self, shift: &[f32]) -> Vec<f32> {
        let mut state = self.state.clone();
        if self.cursor[1] != NONE {
            let at = self.cursor[1] as usize * self.dims.stride + self.dims.offset;
            state[at..][..self.dims.width].copy_from_slice(shift);
        }
        state
    }

    /// Shift and outputs.
    fn twin(&self) -> [Vec<f64>; 2] {
        let width = self.dims.width;
        let matrices: Vec<_> = self.weights.iter().map(|of| Matrix::new(width, of.values())).collect();
        let stack = matrices.iter().zip(&self.stack).map(|(matrix, of)| twin::Stacked {
            matrix,
            mix: of.mix.map(|mix| mix as usize),
            activation: of.activation,
        });
        let stack: Vec<_> = stack.collect();
        let vectors = wide(&self.vectors);
        let (norm, mixes) = vectors.split_at(2 * width);
        let (mut shift, mut y) =
            (wide(&self.shift()), vec![f64::NAN; self.stack.iter().map(|of| of.outputs).sum()]);
        twin::mix_in(&wide(&self.x), norm.split_at(width), mixes, &mut shift, &stack, &mut y);
        [shift, y]
    }

    /// Shift and outputs, by [`row_moments`] and [`Weights::product`].
    fn bounds(&self) -> [Vec<Interval>; 2] {
        let width = self.dims.width;
        let (x, vectors, shift) = (exact(&self.x), exact(&self.vectors), exact(&self.shift()));
        let [mean, variance] = row_moments(&self.x);
        let scale = (variance + Interval::constant(LN_EPS)).inverse_sqrt();
        let channel = |j: usize| (x[j] - mean) * scale * vectors[j] + vectors[width + j];
        let normed: Vec<_> = (0..width).map(channel).collect();

        let mut y = Vec::new();
        for (of, weights) in self.stack.iter().zip(&self.weights) {
            let mixed = |(j, &normed): (usize, &Interval)| {
                let mix = |m| normed + (shift[j] - normed) * vectors[(2 + m as usize) * width + j];
                of.mix.map_or(normed, mix)
            };
            let z: Vec<_> = normed.iter().enumerate().map(mixed).collect();
            for row in exact(&weights.values()).chunks(width) {
                y.push(weights.product(row, &z).activated(of.activation));
            }
        }
        [normed, y]
    }

    /// State and outputs.
    fn run(&self, device: &Device, kernel: &Pipeline) -> [Vec<f32>; 2] {
        let (params, tiles, groups) = lower(self.dims, &self.stack, self.tile).unwrap();
        let y = vec![f32::NAN; self.stack.iter().map(|of| of.outputs).sum()];
        let buffers = [
            bytemuck::cast_slice(&tiles).to_vec(),
            self.cursor.to_vec(),
            words(&self.x),
            words(&self.vectors),
            self.weights.iter().flat_map(Weights::words).collect(),
            words(&self.state),
            words(&y),
        ];
        let after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
        assert_eq!(after[..5], buffers[..5], "the operands are untouched");
        [floats(&after[5]), floats(&after[6])]
    }
}

fn agrees(case: &Case, variants: &[(&Device, Pipeline)], sizes: &str) -> Result<(), TestCaseError> {
    let ([shift_bounds, y_bounds], [shift, y]) = (case.bounds(), case.twin());
    held("twin: shift", &shift, &shift_bounds)?;
    held("twin: y", &y, &y_bounds)?;
    for (device, kernel) in variants {
        let label = format!("{} {sizes}", kernel.kernel().label());
        let [state, y] = case.run(device, kernel);
        held(&format!("{label}: y"), &y, &y_bounds)?;
        let mut shift = shift_bounds.iter().map(|_| 0.0).collect::<Vec<_>>();
        if case.cursor[1] != NONE {
            let at = case.cursor[1] as usize * case.dims.stride + case.dims.offset;
            shift.copy_from_slice(&state[at..][..case.dims.width]);
            held(&format!("{label}: shift"), &shift, &shift_bounds)?;
        }
        prop_assert!(words(&state) == words(&case.moved(&shift)), "{}: all else is as it was", label);
        let again = case.run(device, kernel).map(|x| words(&x));
        prop_assert!([words(&state), words(&y)] == again, "{}: again", label);
    }
    Ok(())
}

#[test]
fn agrees_with_its_twin() {
    // Lanes for a row: as many as it has blocks or more, and some that divide neither the workgroup nor a subgroup.
    let sizes = [
        (64u16, 64u32, 8u32),
        (64, 256, 16),
        (192, 64, 8),
        (192, 256, 24),
        (192, 512, 32),
        (256, 128, 8),
        (320, 64, 16),
        (320, 128, 40),
        (320, 512, 96),
        (1056, 128, 64),
        (1056, 128, 40),
    ];
    for (width, lanes, row_lanes) in sizes {
        let overrides = [
            ("LANES", lanes.into()),
            ("ROW_LANES", row_lanes.into()),
            ("WIDTH", width.into()),
            formats(FORMATS),
        ];
        let variants = variants_for_tests(&of_lanes(VARIANTS, lanes), &overrides);
        let config = ProptestConfig { cases: 24, ..ProptestConfig::with_source_file(file!()) };
        proptest!(config, |(head in prop::bool::weighted(0.2), seed: u64)| {
            let case = Case::draw(usize::from(width), head, seed);
            agrees(&case, &variants, &format!("{width} {lanes} {row_lanes}"))?;
        });
    }
}

/// An output has its bits whatever the tiles, and whatever is stacked beside it.
#[test]
fn tiles_and_neighbours_do_not_matter() {
    let variants = variants_for_tests(VARIANTS, &[("WIDTH", 192.0), formats(FORMATS)]);
    for seed in 0..8 {
        let mut case = Case::draw(192, false, seed);
        for (device, kernel) in &variants {
            let [_, all] = case.run(device, kernel);
            let tile = case.tile;
            case.tile = 33;
            assert_eq!(words(&case.run(device, kernel)[1]), words(&all), "seed {seed}, another tile");
            case.tile = tile;
            let mut alone = Case::draw(192, false, seed);
            alone.stack.truncate(1);
            alone.weights.truncate(1);
            let own = alone.stack[0].outputs;
            assert_eq!(words(&alone.run(device, kernel)[1]), words(&all[..own]), "seed {seed}, alone");
        }
    }
}

#[test]
fn lowers_to_tiles() {
    let dims = Dims { width: 64, stride: 128, offset: 64 };
    let of = |outputs, mix, activation| Stacked { outputs, mix, activation, format: None };
    let stack = [
        of(5, Some(2), Activation::Identity),
        of(0, None, Activation::Sigmoid),
        of(4, None, Activation::SquaredRelu),
        of(1, Some(0), Activation::Tanh),
    ];
    let (params, tiles, groups) = lower(dims, &stack, 4).unwrap();
    assert_eq!((params.eps, params.stride, params.offset), (f32::of(LN_EPS), 128, 64), "parameters");
    let want = [
        [0, 4, 2, 0, 0, 0, 0, 0],
        [4, 5, 2, 0, 0, 32, 0, 0],
        [5, 9, NONE, 3, 0, 40, 0, 0],
        [9, 10, 0, 1, 0, 72, 0, 0],
    ];
    assert_eq!(bytemuck::cast_slice::<Tile, [u32; 8]>(&tiles), want, "no tile has rows of two matrices");
    assert_eq!(groups, [4, 1, 1], "a workgroup to a tile");
    let blocks = stack.map(|of| Stacked { format: FORMATS[1], ..of });
    let (_, tiles, _) = lower(dims, &blocks, 2).unwrap(); // rows of halves, as large as twice as many
    let places: Vec<[u32; 3]> = tiles.iter().map(|of| [of.format, of.elements, of.scales]).collect();
    // 5 rows of 4 elements and 10 scales, so 22 elements; then 4 rows of 4 and one of scales, at 22
    assert_eq!(places, [[1, 0, 160], [1, 16, 168], [1, 22, 304], [1, 39, 344]], "weights, then scales");
    let whole = lower(dims, &stack, u32::MAX).unwrap().1;
    assert_eq!(whole.len(), 3, "a tile may be larger than a matrix");
    assert_eq!(lower(dims, &stack, 0).unwrap().1.len(), 10, "a tile has a row");
}

#[test]
fn refuses_what_it_cannot_run() {
    let dims = |width, stride, offset| Dims { width, stride, offset };
    let stack = |rows: &[usize]| {
        let of =
            |&outputs: &usize| Stacked { outputs, mix: None, activation: Activation::Identity, format: None };
        rows.iter().map(of).collect::<Vec<_>>()
    };
    let error = |dims, rows: &[usize], tile| lower(dims, &stack(rows), tile).map(|_| ()).unwrap_err();
    for width in [0, 12] {
        assert_eq!(error(dims(width, 64, 0), &[1], 1), Error::Width { width }, "{width} channels");
    }
    for (stride, offset) in
        [(60, 0), (64, 4), (66, 0), (128, 2), (usize::MAX - 3, usize::MAX - 7), (1 << 32, 0)]
    {
        let want = Error::Record { width: 64, stride, offset };
        assert_eq!(error(dims(64, stride, offset), &[1], 1), want, "{offset} of {stride}");
    }
    let plain = dims(64, 64, 0);
    let rows = |rows: &[usize], sum| {
        assert_eq!(error(plain, rows, 1 << 20), Error::Rows { rows: sum, width: 64 }, "{rows:?}");
    };
    rows(&[], 0);
    rows(&[0, 0], 0);
    rows(&[1 << 27, 1 << 27], 1 << 28);
    rows(&[usize::MAX, 2], usize::MAX);
    assert!(
        lower(plain, &stack(&[1 << 27, (1 << 27) - 1]), 1 << 20).is_ok(),
        "2^31 - 8 elements of eight weights"
    );
    let want = Error::Groups { got: 65_536, max: MAX_GROUPS };
    assert_eq!(error(plain, &[65_535 * 8, 1], 8), want, "groups");
}
