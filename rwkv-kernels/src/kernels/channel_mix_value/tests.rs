//! `channel_mix_value.wgsl` and its variants against [`rwkv_core::ops::channel_mix_value`] in `f64`.

use proptest::prelude::*;
use rwkv_core::ops::channel_mix_value as twin;
use rwkv_core::ops::linear::Matrix;
use rwkv_core::rng::SplitMix64;

use super::{Dims, Error, MAX_HIDDEN, VARIANTS, lower};
use crate::gpu::{Device, variants_for_tests};
use crate::kernels::MAX_GROUPS;
use crate::kernels::intervals::{FORMATS, Interval, Sum, Weights, below, exact, floats, held, of_lanes};
use crate::kernels::testing::{bits as words, wide};
use crate::kernels::weights::formats;
use crate::pipeline::Pipeline;

/// Operands of one call.
struct Case {
    dims: Dims,
    /// `[F, D]`.
    weights: Weights,
    hidden: Vec<f32>,
    x: Vec<f32>,
}

impl Case {
    /// Hidden units as the squared relu leaves them: `percent` of them not zero, of sizes up to 1e10.
    fn draw(dims: Dims, percent: u32, seed: u64) -> Self {
        let mut rng = SplitMix64::new(seed);
        let weights = Weights::draw(&mut rng, dims.format, [dims.hidden, dims.width]);
        let largest = rng.uniform(0.0, 16.6).exp2();
        let mut unit = || match below(&mut rng, 100) {
            of if of < percent => rng.uniform(0.0, largest).powi(2),
            _ => 0.0,
        };
        let hidden = (0..dims.rows * dims.hidden).map(|_| unit()).collect();
        let x = (0..dims.rows * dims.width).map(|_| 100.0 * rng.normal()).collect();
        Self { dims, weights, hidden, x }
    }

    fn twin(&self) -> Vec<f64> {
        let (values, Dims { width, hidden, .. }) = (self.weights.values(), self.dims);
        let output = |o| (0..hidden).map(move |f| f * width + o);
        let rows_of_outputs = (0..width).flat_map(output).map(|at| values[at]).collect();
        let mut x = wide(&self.x);
        twin::channel_mix_value(&Matrix::new(hidden, rows_of_outputs), &wide(&self.hidden), &mut x);
        x
    }

    /// The products' sums, in no order yet.
    fn sums(&self) -> Vec<Sum> {
        let (weights, width) = (exact(&self.weights.values()), self.dims.width);
        let mut sums = Vec::new();
        for hidden in self.hidden.chunks(self.dims.hidden) {
            let units: Vec<_> = (0..).zip(hidden).filter(|(_, unit)| **unit != 0.0).collect();
            let product = |o, (f, &unit): (usize, &f32)| weights[f * width + o] * Interval::exact(unit);
            sums.extend((0..width).map(|o| units.iter().map(|&unit| product(o, unit)).collect::<Sum>()));
        }
        sums
    }

    /// A workgroup shares out what it lists between `8 lanes / columns` of its lanes, from `8 lanes` units at a
    /// time, of which a lane has one more at most. A product passes as many additions as a lane has units, then 8
    /// of its column and as many as there are lanes to a column.
    fn bounds(&self, sums: &[Sum], lanes: u32, columns: u32, all: bool) -> Vec<Interval> {
        let (lanes, columns) = (lanes as usize, columns as usize);
        let Dims { width, hidden, .. } = self.dims;
        let units =
            |row: usize| self.hidden[row * hidden..][..hidden].iter().filter(|&&x| all || x != 0.0).count();
        let additions =
            |row| units(row) / (8 * lanes / columns) + hidden.div_ceil(8 * lanes) + 8 + lanes / columns;
        let sum = |(i, (&x, sum)): (usize, (&f32, &Sum))| Interval::exact(x) + sum.by(additions(i / width));
        self.x.iter().zip(sums).enumerate().map(sum).collect()
    }

    /// On weights that are NaN where no row has a unit: they are not even read.
    fn run(&self, device: &Device, kernel: &Pipeline, columns: u32) -> Vec<f32> {
        let Dims { hidden, .. } = self.dims;
        let silent = |f: &usize| self.hidden.iter().skip(*f).step_by(hidden).all(|&unit| unit == 0.0);
        self.run_on(self.weights.poisoned((0..hidden).filter(silent)), device, kernel, columns)
    }

    fn run_on(&self, weights: Vec<u32>, device: &Device, kernel: &Pipeline, columns: u32) -> Vec<f32> {
        let (params, groups) = lower(self.dims, columns).unwrap();
        let buffers = [weights, words(&self.hidden), words(&self.x)];
        let after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
        assert_eq!(after[..2], buffers[..2], "the operands are untouched");
        floats(&after[2])
    }
}

/// Hidden units, by fours: few, not even a part for each lane, and so many that some are listed later.
fn hidden() -> impl Strategy<Value = usize> {
    prop_oneof![1..=20usize, 100..=300usize, 500..=700usize].prop_map(|fours| 4 * fours)
}

#[test]
fn agrees_with_its_twin() {
    let sizes = [
        (64, 8, 8),
        (64, 64, 1),
        (128, 16, 3),
        (256, 8, 8),
        (256, 32, 2),
        (256, 64, 1),
        (512, 32, 8),
        (1024, 64, 1),
    ];
    for (lanes, columns, parts) in sizes {
        let overrides = [
            ("LANES", lanes.into()),
            ("COLUMNS", columns.into()),
            ("PARTS", f64::from(parts)),
            formats(FORMATS),
        ];
        let variants = variants_for_tests(&of_lanes(VARIANTS, lanes), &overrides);
        let config = ProptestConfig { cases: 16, ..ProptestConfig::with_source_file(file!()) };
        let widths = prop::sample::select(vec![8usize, 64, 72, 192]);
        let densities = prop::sample::select(vec![0u32, 5, 50, 100]);
        let format = prop::sample::select(&FORMATS);
        proptest!(config, |(rows in 1..=3usize, width in widths, format in format, hidden in hidden(), percent in densities, seed: u64)| {
            let width = if format.is_some() { width.next_multiple_of(32) } else { width };
            let case = Case::draw(Dims { rows, width, hidden, format }, percent, seed);
            let bounds = case.bounds(&case.sums(), lanes, columns, false);
            held("twin", &case.twin(), &bounds)?;
            for (device, kernel) in &variants {
                let got = case.run(device, kernel, columns);
                held(&format!("{} {lanes} {columns}: x", kernel.kernel().label()), &got, &bounds)?;
                prop_assert_eq!(words(&got), words(&case.run(device, kernel, columns)), "again");
            }
        });
    }
}

/// Where units that are zero are read too, what is added is the same, and their weights are seen.
#[test]
fn all_units_can_be_read() {
    for (percent, format) in [0, 5, 50, 100].into_iter().zip(FORMATS.into_iter().cycle()) {
        let case = Case::draw(Dims { rows: 2, width: 192, hidden: 2100, format }, percent, 11);
        let bounds = case.bounds(&case.sums(), 256, 32, true);
        for (device, kernel) in &variants_for_tests(VARIANTS, &[("ALL", 1.0), formats(FORMATS)]) {
            let what = format!("{}: x, {percent} % of {format:?}", kernel.kernel().label());
            held(&what, &case.run_on(case.weights.poisoned(std::iter::empty()), device, kernel, 32), &bounds)
                .unwrap();
            let seen = case.run(device, kernel, 32).iter().any(|x| x.is_nan());
            assert_eq!(seen, percent < 100, "{what}");
        }
    }
}

/// With its extents and one format compiled, it has the same bounds.
#[test]
fn with_extents_compiled_it_agrees_with_its_twin() {
    for format in FORMATS {
        let dims = Dims { rows: 2, width: 192, hidden: 2100, format };
        let case = Case::draw(dims, 20, 13);
        let bounds = case.bounds(&case.sums(), 256, 32, false);
        let overrides = [("WIDTH", 192.0), ("HIDDEN", 2100.0), formats([format])];
        for (device, kernel) in &variants_for_tests(VARIANTS, &overrides) {
            let what = format!("{}, {format:?}", kernel.kernel().label());
            held(&what, &case.run(device, kernel, 32), &bounds).unwrap();
        }
    }
}

/// A silent layer adds nothing at all.
#[test]
fn nothing_is_added_where_nothing_is() {
    let case = Case::draw(Dims { rows: 2, width: 72, hidden: 2100, format: None }, 0, 5);
    for (device, kernel) in &variants_for_tests(VARIANTS, &[]) {
        assert_eq!(words(&case.run(device, kernel, 32)), words(&case.x), "{}", kernel.kernel().label());
    }
}

/// The numerics contract: a row has its bits whatever is beside it.
#[test]
fn rows_do_not_matter() {
    let case = Case::draw(Dims { rows: 3, width: 192, hidden: 2100, format: None }, 50, 7);
    for (device, kernel) in &variants_for_tests(VARIANTS, &[]) {
        let all = case.run(device, kernel, 32);
        for row in 0..3 {
            let (hidden, x) =
                (case.hidden[row * 2100..][..2100].to_vec(), case.x[row * 192..][..192].to_vec());
            let dims = Dims { rows: 1, ..case.dims };
            let alone = Case { dims, weights: case.weights.clone(), hidden, x };
            assert_eq!(words(&alone.run(device, kernel, 32)), words(&all[row * 192..][..192]), "row {row}");
        }
    }
}

#[test]
fn refuses_what_it_cannot_run() {
    let dims = |rows, width, hidden| Dims { rows, width, hidden, format: None };
    let lowered =
        |dims, columns| lower(dims, columns).map(|(params, groups)| (params.width, params.hidden, groups));
    assert_eq!(lowered(dims(3, 72, 4), 32), Ok((72, 4, [3, 3, 1])), "a part of the last columns");
    let blocks = Dims { format: FORMATS[2], ..dims(1, 72, 4) };
    for of in [dims(1, 0, 4), dims(1, 12, 4), dims(1, 8, 0), dims(1, 8, 6), blocks] {
        assert_eq!(lowered(of, 32), Err(Error::Loads(of)), "{of:?}");
    }
    let most = MAX_HIDDEN;
    for of in [
        dims(0, 8, 4),
        dims(1, 8, most + 4),
        dims(1 << 10, 8, 1 << 22),
        dims(1 << 16, 1 << 16, 4),
        dims(1, 1 << 11, most),
        dims(usize::MAX, 8, 4),
    ] {
        assert_eq!(lowered(of, 32), Err(Error::Extents(of)), "{of:?}");
    }
    assert!(lower(dims(1, 2040, most), 32).is_ok(), "as many units as an f32 can name, 2^32 - 2^24 elements");
    for (of, got) in [(dims(1, 65_536 * 8, 4), [65_536, 1]), (dims(65_536, 8, 4), [1, 65_536])] {
        assert_eq!(lowered(of, 8), Err(Error::Groups { got, max: MAX_GROUPS }), "{of:?}");
    }
}
