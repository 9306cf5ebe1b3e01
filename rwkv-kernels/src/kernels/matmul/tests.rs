//! `matmul.wgsl` and `matmul_coop.wgsl` against [`rwkv_core::ops::matmul`] in `f64`, and their numerics contract.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::thread;

use half::f16;
use proptest::prelude::*;
use rwkv_core::ops::activation::Activation;
use rwkv_core::ops::linear::Matrix;
use rwkv_core::ops::matmul::{self as twin, Rows};
use rwkv_core::ops::to_halves::to_half;
use rwkv_core::quant::{BLOCK, Blocks, Format};
use rwkv_core::rng::SplitMix64;

use super::{
    COOP_TILES, COOP_TILES_UNSPLIT, Dims, Error, Job, Kinds, MAX_EXPONENT, MAX_GROUPS, QUAD, Store, TILES,
    Tile, lower,
};
use crate::gpu::{Device, variants_for_tests};
use crate::kernels::activation::tests::{ALL, limit};
use crate::kernels::intervals::{FORMATS, Weights};
use crate::kernels::layer_norm::tests::{bits, compare, floats};
use crate::kernels::packed;
use crate::kernels::weights::{elements, set};
use crate::pipeline::Pipeline;

/// One call: the jobs, their matrices as the kernel has them, and the operands.
struct Case {
    dims: Dims,
    jobs: Vec<Job>,
    /// The buffer.
    weights: Vec<u32>,
    /// The matrices, by [`Self::jobs`], as they lie in it.
    matrices: Vec<Weights>,
    x: Vec<f32>,
    y: Vec<f32>,
}

/// What a job is drawn from.
#[derive(Clone, Copy, Debug)]
struct Shape {
    inputs: usize,
    outputs: usize,
    exponent: u8,
    activation: Activation,
    store: Store,
    format: Option<Format>,
}

/// A call for [`Case::draw`].
#[derive(Clone, Copy, Debug)]
struct Call {
    rows: usize,
    transposed: bool,
    /// Whether the operands are such as cooperative matrices read and write.
    coop: bool,
}

impl Case {
    /// Jobs whose rows and matrices lie side by side with gaps between, in `x`, `y` and the weights. Gaps of `x` and of
    /// the weights are NaN, so that reading one shows; gaps of `y`, and all of it that is not added to, too.
    ///
    /// Inputs are of the size `size`, a tenth of them a hundred times as large. That is also the spread of the channel
    /// mix's hidden values, of which most are zero: so are these in every other job.
    fn draw(call: Call, shapes: &[Shape], size: f32, seed: u64) -> Self {
        let Call { rows, transposed, coop } = call;
        let [unit, eights] = if coop { [QUAD, 2 * QUAD] } else { [1, 1] };
        let mut rng = SplitMix64::new(seed);
        let gap = |rng: &mut SplitMix64| (rng.next_u64() % 4) as usize;
        let (mut weights, mut matrices, mut jobs) = (Vec::<u32>::new(), Vec::new(), Vec::new());
        let (mut x_width, mut y_width) = (0, 0);
        for &Shape { inputs, outputs, exponent, activation, store, format } in shapes {
            let inputs = inputs.next_multiple_of(if format.is_some() && !transposed { 32 } else { eights });
            let store = if coop || store == Store::Add { store } else { Store::Put };
            let outputs = outputs.next_multiple_of(if format.is_some() && transposed { 32 } else { eights });
            weights.resize(weights.len() + 4 * gap(&mut rng), u32::MAX);
            let [x, y] = [x_width, y_width].map(|width| width + unit * gap(&mut rng));
            (x_width, y_width) = (x + inputs, y + outputs);
            let rows_of = |offset| Rows { offset, stride: 0 };
            let at = weights.len() / 4;
            let extents = if transposed { [inputs, outputs] } else { [outputs, inputs] };
            let job = Job {
                inputs,
                outputs,
                weights: at,
                row: extents[1],
                format: None,
                scales: 0,
                x: rows_of(x),
                exponent,
                y: rows_of(y),
                activation,
                store,
            };
            jobs.push(job.stored(format));
            let matrix = Weights::draw(&mut rng, format, extents);
            weights.extend(matrix.words());
            matrices.push(matrix);
        }
        weights.resize(weights.len() + 4 * gap(&mut rng), u32::MAX);
        let [x_width, y_width] = [x_width, y_width].map(|width| width + unit * gap(&mut rng));
        let (mut x, mut y) = (vec![f32::NAN; rows * x_width], vec![f32::NAN; rows * y_width]);
        for (i, job) in jobs.iter_mut().enumerate() {
            (job.x.stride, job.y.stride) = (x_width, y_width);
            for t in 0..rows {
                for x in &mut x[job.x.offset + t * x_width..][..job.inputs] {
                    let zero = i % 2 == 1 && rng.uniform(0.0, 1.0) < 0.9;
                    let outlier = if rng.uniform(0.0, 1.0) < 0.1 { 100.0 } else { 1.0 };
                    *x = if zero { 0.0 } else { outlier * size * rng.normal() };
                }
                if job.store == Store::Add {
                    y[job.y.offset + t * y_width..][..job.outputs].fill_with(|| size * rng.normal());
                }
            }
        }
        let dims =
            Dims { rows, tile: TILES[0], transposed, weights: weights.len() / 4, x: x.len(), y: y.len() };
        Self { dims, jobs, weights, matrices, x, y }
    }

    /// The matrix of a job, `[outputs, inputs]`.
    fn matrix(&self, index: usize) -> Matrix<f32> {
        let (job, own) = (&self.jobs[index], self.matrices[index].values());
        let at =
            |o: usize, k: usize| if self.dims.transposed { k * job.outputs + o } else { o * job.inputs + k };
        let each = (0..job.outputs).flat_map(|o| (0..job.inputs).map(move |k| at(o, k)));
        Matrix::new(job.inputs, each.map(|at| own[at]).collect())
    }

    /// What is wanted of `y`, and how far off it may be; NaN where nothing is written.
    ///
    /// A sum of `K` products rounds once for each multiply-add, or twice if a device does not fuse it; a product passes
    /// all additions after its own. With `u = 2^-23`, since WGSL lets each round either way, it is off by `(K + 1) u`
    /// times the sum of absolute products at most. That passes through the activation as [`limit`] says; a sum with
    /// what is there rounds once more.
    ///
    /// Cooperative matrices add up 16 products at a time, each of which may lose what is less than a unit of the largest
    /// sum, and those of up to [`Coop::split`](super::Coop::split) subgroups. Their `x` are halves, and the weights of blocks
    /// are rounded to some: where one is off by `d`, products are by `|x| d`. What is stored as halves rounds again.
    fn twin(&self, tile: Tile) -> (Vec<f64>, Vec<f64>) {
        let u = f64::from(f32::EPSILON);
        let wide = |x: &[f32]| x.iter().copied().map(f64::from).collect::<Vec<_>>();
        let before = wide(&self.y);
        let (mut want, mut limits) = (before.clone(), vec![f64::NAN; self.y.len()]);
        for (index, job) in self.jobs.iter().enumerate() {
            let matrix = self.matrix(index);
            let run = |layer: &Matrix<f32>, activation, accumulate, x: &[f64], y: &mut [f64]| {
                let job = twin::Job { layer, x: job.x, y: job.y, activation, accumulate };
                twin::matmul(self.dims.rows, &[job], x, y);
            };
            let absolute = Matrix::new(job.inputs, matrix.weights().iter().map(|w| w.abs()).collect());
            let (x, split) = match tile.coop {
                None => (wide(&self.x), 0),
                Some(coop) => (wide(&self.halved(job)), coop.split),
            };
            let accumulate = job.store == Store::Add;
            let [mut sums, mut sizes, mut reach] = [(); 3].map(|()| before.clone());
            run(&matrix, Activation::Identity, false, &x, &mut sums);
            let sizes_of = |of: &dyn Fn(f64) -> f64| x.iter().map(|x| of(x.abs())).collect::<Vec<_>>();
            run(&absolute, Activation::Identity, false, &sizes_of(&|x| x), &mut sizes);
            // What the weights of blocks are rounded by is times the sum of the inputs' sizes.
            let ones = Matrix::new(job.inputs, vec![1.0f32; job.inputs * job.outputs]);
            run(&ones, Activation::Identity, false, &sizes_of(&|x| x), &mut reach);
            run(&matrix, job.activation, accumulate, &x, &mut want);
            for t in 0..self.dims.rows {
                for at in (job.y.offset + t * job.y.stride..).take(job.outputs) {
                    let mut e = (job.inputs as f64 + f64::from(split) + 1.0) * u * sizes[at];
                    if tile.coop.is_some() && job.format.is_some() {
                        e += (-11f64).exp2() * sizes[at] + (-25f64).exp2() * reach[at];
                    }
                    let added = if accumulate { u * want[at].abs() } else { 0.0 };
                    limits[at] = limit(job.activation, sums[at], e) + 1.1 * added;
                    if let Store::Halves(exponent) = job.store {
                        (want[at], limits[at]) = packed::tests::rounded(want[at], limits[at], Some(exponent));
                    }
                }
            }
        }
        (want, limits)
    }

    /// Whether the tile is for such operands.
    fn suits(&self, tile: Tile) -> bool {
        match lower(Dims { tile, ..self.dims }, &self.jobs) {
            Err(Error::Quads { .. } | Error::Halves { .. }) => false,
            lowered => lowered.is_ok(),
        }
    }

    fn run(&self, device: &Device, kernel: &Pipeline, tile: Tile) -> Vec<f32> {
        let (params, jobs, groups) = lower(Dims { tile, ..self.dims }, &self.jobs).unwrap();
        let jobs = bytemuck::cast_slice(&jobs).to_vec();
        let x = if tile.coop.is_some() { self.x_words() } else { bits(&self.x) };
        let buffers = [jobs, self.weights.clone(), x, bits(&self.y)];
        let mut after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
        let y = after.pop().unwrap();
        assert_eq!(after, buffers[..3], "the operands are untouched");
        self.y_floats(y)
    }

    /// Where the rows of a job are, of so many elements or words.
    fn rows_of(&self, of: Rows, width: usize) -> impl Iterator<Item = Range<usize>> {
        (0..self.dims.rows).map(move |t| of.offset + t * of.stride).map(move |at| at..at + width)
    }

    /// What cooperative matrices read in place of `x`, as far as a job does.
    fn halved(&self, job: &Job) -> Vec<f32> {
        let (mut x, unit) = (self.x.clone(), f32::from(job.exponent).exp2());
        for row in self.rows_of(job.x, job.inputs) {
            x[row].iter_mut().for_each(|x| *x = unit * to_half(*x, job.exponent).to_f32());
        }
        x
    }

    /// `x` as they read it.
    fn x_words(&self) -> Vec<u32> {
        let mut words = vec![f32::NAN.to_bits(); self.x.len()];
        for job in &self.jobs {
            for row in self.rows_of(job.x, job.inputs) {
                let halves = packed::tests::words(&self.x[row.clone()], job.inputs, Some(job.exponent));
                words[row].copy_from_slice(&halves);
            }
        }
        words
    }

    /// What was left in `y`.
    fn y_floats(&self, words: Vec<u32>) -> Vec<f32> {
        let mut y = floats(words.clone());
        for job in &self.jobs {
            let Store::Halves(exponent) = job.store else { continue };
            for row in self.rows_of(job.y, job.outputs) {
                let halves = packed::tests::floats(&words[row.clone()], job.outputs, Some(exponent));
                y[row].copy_from_slice(&halves);
            }
        }
        y
    }

    /// Row `t` alone.
    fn row(&self, t: usize) -> Self {
        let row =
            |of: &[f32]| of[t * of.len() / self.dims.rows..(t + 1) * of.len() / self.dims.rows].to_vec();
        let (x, y) = (row(&self.x), row(&self.y));
        let dims = Dims { rows: 1, x: x.len(), y: y.len(), ..self.dims };
        Self {
            dims,
            jobs: self.jobs.clone(),
            weights: self.weights.clone(),
            matrices: self.matrices.clone(),
            x,
            y,
        }
    }
}

/// Every tile, compiled for one orientation; where there are no cooperative matrices, that is said once.
fn tiles(transposed: bool) -> Vec<(Tile, &'static Device, Pipeline)> {
    tiles_for(transposed, &FORMATS, &[])
}

/// For matrices of some formats; those that have overrides compiled with such, too.
fn tiles_for(
    transposed: bool,
    read: &[Option<Format>],
    of_coop: &[(&str, f64)],
) -> Vec<(Tile, &'static Device, Pipeline)> {
    let of = &|tile: &Tile| {
        let variants: Vec<_> = tile.variants().copied().collect();
        let mut overrides = tile.overrides(transposed, set(read.iter().copied()));
        overrides.extend(of_coop.iter().filter(|_| tile.coop.is_some()));
        let compiled = variants_for_tests(&variants, &overrides);
        let tile = *tile;
        compiled.into_iter().map(move |(device, kernel)| (tile, device, kernel)).collect::<Vec<_>>()
    };
    // The others of those that are not split are among both. A device that has one of them has all.
    let mut coop = [COOP_TILES_UNSPLIT[0]].into_iter().chain(COOP_TILES);
    let mut first = coop.by_ref().take(1).flat_map(|tile| of(&tile)).collect::<Vec<_>>();
    let has_coop = !first.is_empty();
    let rest = coop.filter(|_| has_coop);
    // A driver takes a second for some.
    thread::scope(|scope| {
        let compile = |tile: Tile| scope.spawn(move || of(&tile));
        let threads: Vec<_> = TILES.into_iter().chain(rest).map(compile).collect();
        first.extend(threads.into_iter().flat_map(|of| of.join().unwrap()));
    });
    first
}

/// Widths and ranks of small models; of outputs, of a vocabulary too: no multiple of anything. Some inputs are more than any tile
/// loads ahead.
fn shape(transposed: bool) -> impl Strategy<Value = Shape> {
    let of_8 =
        || prop_oneof![Just(64usize), Just(192), Just(96), Just(24), (1..=40usize).prop_map(|n| 8 * n)];
    let some = || prop_oneof![Just(1usize), Just(5), Just(24), Just(96), Just(257), 1..=300usize];
    let (inputs, outputs) = if transposed {
        (prop_oneof![4 => some(), 1 => 513..=1300usize].boxed(), of_8().boxed())
    } else {
        (prop_oneof![4 => of_8(), 1 => (65..=160usize).prop_map(|n| 8 * n)].boxed(), some().boxed())
    };
    let format = prop::sample::select(&FORMATS);
    let store = prop_oneof![Just(Store::Put), Just(Store::Add), (0..=8u8).prop_map(Store::Halves)];
    (inputs, outputs, 0..=8u8, 0..ALL.len(), store, format).prop_map(
        |(inputs, outputs, exponent, activation, store, format)| Shape {
            inputs,
            outputs,
            exponent,
            activation: ALL[activation].1,
            store,
            format,
        },
    )
}

fn rows() -> impl Strategy<Value = usize> {
    prop_oneof![1..=4usize, Just(31), Just(32), Just(33), 1..=130usize]
}

fn config() -> ProptestConfig {
    ProptestConfig { cases: 24, ..ProptestConfig::with_source_file(file!()) }
}

/// What is written agrees, and nothing else is written.
fn check(got: &[f32], want: &[f64], limits: &[f64]) -> Result<(), String> {
    let own: Vec<usize> = (0..got.len()).filter(|&i| !limits[i].is_nan()).collect();
    let of = |x: &[f64]| own.iter().map(|&i| x[i]).collect::<Vec<_>>();
    compare(&own.iter().map(|&i| got[i]).collect::<Vec<_>>(), &of(want), &of(limits))?;
    match (0..got.len()).find(|&i| limits[i].is_nan() && !got[i].is_nan()) {
        Some(i) => Err(format!("[{i}]: {:e}, where nothing is to be written", got[i])),
        None => Ok(()),
    }
}

#[test]
fn agrees_with_its_twin() {
    for transposed in [false, true] {
        let tiles = tiles(transposed);
        let jobs = proptest::collection::vec(shape(transposed), 1..=5);
        // The largest inputs are those of a trained model's channel mix, 1e5 and more: of the cases, some hold them.
        let config = ProptestConfig { cases: 32, ..config() };
        proptest!(config, |(rows in rows(), coop: bool, jobs in jobs, size in -4f32..10.0, seed: u64)| {
            let case = Case::draw(Call { rows, transposed, coop }, &jobs, size.exp2(), seed);
            for (tile, device, kernel) in tiles.iter().filter(|(tile, ..)| case.suits(*tile)) {
                let (want, limits) = case.twin(*tile);
                let got = case.run(device, kernel, *tile);
                check(&got, &want, &limits)
                    .map_err(|e| TestCaseError::fail(format!("{}, {tile:?}{e}", kernel.kernel().label())))?;
            }
        });
    }
}

/// The numerics contract: a row has its bits beside any others and in any tile, of cooperative matrices in any that is
/// split alike.
#[test]
fn a_row_has_its_bits_whatever_is_beside_it() {
    for transposed in [false, true] {
        let tiles = tiles(transposed);
        let jobs = proptest::collection::vec(shape(transposed), 1..=3);
        proptest!(config(), |(rows in rows(), coop: bool, picked: usize, jobs in jobs, seed: u64)| {
            let case = Case::draw(Call { rows, transposed, coop }, &jobs, 1.0, seed);
            let t = picked % rows;
            let mut first: BTreeMap<Option<u32>, Vec<u32>> = BTreeMap::new();
            for (tile, device, kernel) in tiles.iter().filter(|(tile, ..)| case.suits(*tile)) {
                let all = bits(&case.run(device, kernel, *tile));
                let alone = bits(&case.row(t).run(device, kernel, *tile));
                let width = alone.len();
                prop_assert!(all[t * width..(t + 1) * width] == alone, "row {} alone, {:?}", t, tile);
                let first = first.entry(tile.coop.map(|of| of.split)).or_insert_with(|| all.clone());
                prop_assert!(*first == all, "{:?}", tile);
            }
        });
    }
}

/// Pipelines for what some jobs do alone do that as well as those for all.
#[test]
fn what_is_not_compiled_is_not_missed() {
    let (squared, identity) = (Activation::SquaredRelu, Activation::Identity);
    let kinds = [
        (Store::Put, identity),
        (Store::Add, identity),
        (Store::Halves(8), squared),
        (Store::Halves(0), Activation::Tanh),
    ];
    for (transposed, (store, activation)) in
        [(false, kinds[0]), (true, kinds[1]), (false, kinds[2]), (true, kinds[3])]
    {
        let shape =
            |(inputs, outputs, format)| Shape { inputs, outputs, exponent: 4, activation, store, format };
        // Of two formats, and of each alone.
        for formats in
            [[None, Some(Format::Int8)], [None; 2], [Some(Format::Int8); 2], [Some(Format::Int4); 2]]
        {
            let shapes = [(1184, 72, formats[0]), (64, 160, formats[1])].map(shape);
            let case = Case::draw(Call { rows: 70, transposed, coop: true }, &shapes, 4.0, 5);
            let kinds = Kinds::of(&case.jobs);
            assert!(kinds.contains(Kinds::of(&case.jobs[..1])), "{kinds:?}");
            let all = BTreeSet::from([kinds, Kinds::shared(&case.jobs)]);
            let compiled = |kinds: Kinds| tiles_for(transposed, &formats, &kinds.overrides());
            for (tile, device, kernel) in all.into_iter().flat_map(compiled) {
                if case.suits(tile) {
                    let (want, limits) = case.twin(tile);
                    check(&case.run(device, &kernel, tile), &want, &limits)
                        .unwrap_or_else(|e| panic!("{tile:?}, {formats:?}{e}"));
                }
            }
        }
    }
    let jobs_of = |store, activation| {
        let shape = Shape { inputs: 8, outputs: 8, exponent: 0, activation, store, format: None };
        Case::draw(Call { rows: 1, transposed: false, coop: true }, &[shape], 1.0, 1).jobs
    };
    let of = |store, activation| Kinds::of(&jobs_of(store, activation));
    let kernel = COOP_TILES[0].variants().next().unwrap();
    let is_default = |(name, bits)| kernel.overrides.iter().any(|of| (of.name, of.default) == (name, bits));
    assert!(
        Kinds::ALL.overrides().into_iter().all(is_default),
        "all is what the WGSL says: {:?}",
        Kinds::ALL
    );
    let shared = Kinds::shared(&jobs_of(Store::Put, identity));
    assert!(
        kinds
            .iter()
            .all(|&(store, activation)| { store == Store::Add || shared.contains(of(store, activation)) }),
        "shared by all that do not add: {shared:?}"
    );
    assert!(!shared.contains(of(Store::Add, identity)), "{shared:?}");
    assert_eq!(
        Kinds::shared(&jobs_of(Store::Add, identity)),
        of(Store::Add, identity),
        "those are by themselves"
    );
    let halves = of(Store::Halves(3), squared);
    assert_eq!(halves, of(Store::Halves(0), squared), "whatever divides them");
    assert!(
        !halves.contains(of(Store::Put, squared)) && !halves.contains(of(Store::Halves(3), identity)),
        "others"
    );
}

/// Jobs that divide the inputs of one add up to it, in exact products of small numbers.
#[test]
fn inputs_may_be_divided() {
    let (rows, inputs, outputs, parts) = (33, 192, 64, 3);
    let mut rng = SplitMix64::new(3);
    let most = |of| if of == Format::Int8 { 127.0 } else { 7.0 };
    for (transposed, format) in [false, true].into_iter().flat_map(|of| FORMATS.map(|format| (of, format))) {
        let extents = if transposed { [inputs, outputs] } else { [outputs, inputs] };
        let mut whole = |n: usize| (0..n).map(|_| (rng.next_u64() % 9) as f32 - 4.0).collect::<Vec<f32>>();
        let (mut matrix, x) = (whole(inputs * outputs), whole(rows * inputs));
        let words = match format {
            None => bytemuck::pod_collect_to_vec(
                &matrix.iter().map(|&w| f16::from_f32(w).to_bits()).collect::<Vec<_>>(),
            ),
            Some(format) => {
                // Scales of a half, one and two, which the largest weights ask for.
                for (at, block) in matrix.chunks_mut(BLOCK).enumerate() {
                    block[0] = most(format);
                    block.iter_mut().for_each(|w| *w *= [0.5, 1.0, 2.0][at % 3]);
                }
                let blocks = Blocks::encode(format, extents[1], &matrix).unwrap();
                assert_eq!(blocks.decode().weights(), matrix, "exact");
                Weights::Blocks(blocks).words()
            }
        };
        for (tile, device, kernel) in tiles(transposed) {
            let of_x = if tile.coop.is_some() { 2 } else { 1 };
            let own = inputs / parts;
            let job = |p: usize| Job {
                inputs: own,
                outputs,
                weights: elements(format, p * own * if transposed { outputs } else { 1 }),
                row: extents[1],
                format,
                scales: 8 * elements(format, inputs * outputs)
                    + p * own * if transposed { outputs } else { 1 } / BLOCK,
                x: Rows { offset: p * own / of_x, stride: inputs },
                exponent: 0,
                y: Rows { offset: p * outputs, stride: parts * outputs },
                activation: Activation::Identity,
                store: Store::Put,
            };
            let jobs: Vec<_> = (0..parts).map(job).collect();
            let dims = Dims {
                rows,
                tile,
                transposed,
                weights: words.len() / 4,
                x: x.len(),
                y: rows * parts * outputs,
            };
            let (params, records, groups) = lower(dims, &jobs).unwrap();
            let lying = packed::tests::words(&x, inputs, tile.coop.map(|_| 0));
            let poison = vec![f32::NAN.to_bits(); dims.y];
            let buffers = [bytemuck::cast_slice(&records).to_vec(), words.clone(), lying, poison];
            let after = device.run(&kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
            let got = floats(after[3].clone());
            for (t, o) in (0..rows).flat_map(|t| (0..outputs).map(move |o| (t, o))) {
                let at = |k: usize| if transposed { k * outputs + o } else { o * inputs + k };
                let want: f32 = (0..inputs).map(|k| x[t * inputs + k] * matrix[at(k)]).sum();
                let sum: f32 = (0..parts).map(|p| got[(t * parts + p) * outputs + o]).sum();
                assert_eq!(sum, want, "{tile:?}, row {t}, output {o}");
            }
        }
    }
}

/// The products of a layer as an engine asks for them, from what `mix_rows` leaves to the residual stream.
#[test]
fn the_jobs_of_a_layer() {
    let (rows, width, ranks) = (33, 64, [24, 16, 8, 40]);
    let identity = Activation::Identity;
    let mut rng = SplitMix64::new(1);
    let mut draw = |n: usize| (0..n).map(|_| rng.uniform(-1.0, 1.0)).collect::<Vec<f32>>();
    // r, k and v of planes 0, 2 and 3 of [T, 6, D]; down of w, a, v and g of planes 1, 4, 3 and 5: a row of [T, P].
    let planes =
        [(0, width), (2, width), (3, width), (1, ranks[0]), (4, ranks[1]), (3, ranks[2]), (5, ranks[3])];
    let p = 3 * width + ranks.iter().sum::<usize>();
    // The adapters are halves.
    let matrices = |extents: &[(Option<Format>, [usize; 2])]| {
        let mut rng = SplitMix64::new(2);
        let of = |&(format, extents)| Weights::draw(&mut rng, format, extents);
        extents.iter().map(of).collect::<Vec<_>>()
    };
    let formats = [Some(Format::Int8), None, Some(Format::Int4), None, None, None, None];
    let extents: Vec<_> =
        formats.into_iter().zip(planes).map(|(of, (_, outputs))| (of, [outputs, width])).collect();
    let of_down = matrices(&extents);
    let (mut jobs, mut y, mut weights) = (Vec::new(), 0, 0);
    for ((plane, outputs), (format, matrix)) in planes.into_iter().zip(formats.into_iter().zip(&of_down)) {
        let x = Rows { offset: plane * width, stride: 6 * width };
        let activation = match plane {
            1 => Activation::Tanh,
            5 => Activation::Sigmoid,
            _ => identity,
        };
        let y_rows = Rows { offset: y, stride: p };
        let job = Job {
            inputs: width,
            outputs,
            weights,
            row: width,
            format: None,
            scales: 0,
            x,
            exponent: 0,
            y: y_rows,
            activation,
            store: Store::Put,
        };
        jobs.push(job.stored(format));
        (y, weights) = (y + outputs, weights + matrix.words().len() / 4);
    }
    let dims = |transposed, weights, x, y| Dims { rows, tile: TILES[0], transposed, weights, x, y };
    let mut down = Case {
        dims: dims(false, weights, rows * 6 * width, rows * p),
        jobs,
        weights: of_down.iter().flat_map(Weights::words).collect(),
        matrices: of_down,
        x: draw(rows * 6 * width),
        y: vec![f32::NAN; rows * p],
    };
    let of_up = matrices(&ranks.map(|rank| (None, [rank, width])));
    // Up, from columns of [T, P] to the planes of [T, 4, D].
    let (mut jobs, mut from, mut weights) = (Vec::new(), 3 * width, 0);
    for (plane, inputs) in ranks.into_iter().enumerate() {
        let (x, y) = (Rows { offset: from, stride: p }, Rows { offset: plane * width, stride: 4 * width });
        jobs.push(Job {
            inputs,
            outputs: width,
            weights,
            row: width,
            format: None,
            scales: 0,
            x,
            exponent: 4,
            y,
            activation: identity,
            store: Store::Put,
        });
        (from, weights) = (from + inputs, weights + inputs * width / 8);
    }
    let mut up = Case {
        dims: dims(true, weights, rows * p, rows * 4 * width),
        jobs,
        weights: of_up.iter().flat_map(Weights::words).collect(),
        matrices: of_up,
        x: Vec::new(),
        y: vec![f32::NAN; rows * 4 * width],
    };
    // In the pipelines that several products share.
    let of_up = tiles_for(true, &[None], &Kinds::shared(&up.jobs).overrides());
    let of_down = tiles_for(false, &FORMATS, &Kinds::shared(&down.jobs).overrides());
    for (of_down, of_up) in of_down.iter().zip(&of_up) {
        let (tile, device, kernel) = of_down;
        // What cooperative matrices read of it are halves, divided alike.
        let store = if tile.coop.is_some() { Store::Halves(4) } else { Store::Put };
        down.jobs[3..].iter_mut().for_each(|job| job.store = store);
        let (want, limits) = down.twin(*tile);
        let got = down.run(device, kernel, *tile);
        assert!(limits.iter().all(|limit| !limit.is_nan()), "every element of [T, P] is written");
        check(&got, &want, &limits).unwrap();
        up.x = got;
        let (tile, device, kernel) = of_up;
        let (want, limits) = up.twin(*tile);
        assert!(limits.iter().all(|limit| !limit.is_nan()), "every element of [T, 4, D] is written");
        check(&up.run(device, kernel, *tile), &want, &limits).unwrap();
    }
}

#[test]
fn refuses_what_it_cannot_run() {
    let rows = |offset, stride| Rows { offset, stride };
    let job = Job {
        inputs: 16,
        outputs: 65,
        weights: 3,
        row: 16,
        format: None,
        scales: 0,
        x: rows(2, 20),
        exponent: 3,
        y: rows(1, 70),
        activation: Activation::Tanh,
        store: Store::Add,
    };
    // As short as they can be.
    let dims = Dims { rows: 33, tile: TILES[0], transposed: false, weights: 133, x: 658, y: 2306 };
    let (params, records, groups) = lower(dims, &[job, job]).unwrap();
    assert_eq!((params.rows, groups), (33, [2, 4, 1]), "plain");
    let words: &[u32] = bytemuck::cast_slice(&records);
    let first = [0, 16, 65, 3, 2, 20, 1, 70, 0, 1, 16, 1 << 16 | 3 << 8];
    let last = [&[64], &first[1..]].concat();
    assert_eq!(words, [&first[..], &last].concat().repeat(2), "two tiles of each");
    let lowered = |dims, job| lower(dims, &[job]).map(|(.., groups)| groups);
    assert_eq!(lowered(Dims { tile: TILES[1], ..dims }, job), Ok([1, 2, 1]), "other tiles");
    assert_eq!(lowered(Dims { rows: 0, ..dims }, job), Ok([0, 2, 1]), "no rows");
    assert_eq!(lower(dims, &[]).map(|(.., groups)| groups), Ok([2, 0, 1]), "no jobs");

    let got = Tile { rows: 48, ..TILES[0] };
    assert_eq!(lowered(Dims { tile: got, ..dims }, job), Err(Error::Tile { got }), "tile");
    let coop = Dims { tile: COOP_TILES[1], ..dims };
    let quads = |operand, words, offset, stride| Err(Error::Quads { job: 0, operand, words, offset, stride });
    let fours = Job { outputs: 68, weights: 0, x: rows(0, 20), y: rows(4, 72), ..job };
    // 16 rows by 32 outputs
    let coop = Dims { y: 4 + 32 * 72 + 68, weights: 136, ..coop };
    assert_eq!(lowered(coop, fours), Ok([3, 3, 1]), "by fours");
    let x = |offset, stride| lowered(coop, Job { x: rows(offset, stride), ..fours });
    assert_eq!((x(2, 20), x(0, 18)), (quads("x", 8, 2, 20), quads("x", 8, 0, 18)), "rows of x");
    let y = |offset, stride| lowered(coop, Job { y: rows(offset, stride), ..fours });
    assert_eq!((y(2, 72), y(4, 70)), (quads("y", 68, 2, 72), quads("y", 68, 4, 70)), "rows of y");
    assert_eq!(lowered(coop, Job { outputs: 66, ..fours }), quads("y", 66, 4, 72), "outputs");
    let transposed = Dims { transposed: true, tile: COOP_TILES[1], ..coop };
    for inputs in [4, 5] {
        let few = Job { inputs, outputs: 64, row: 64, ..fours };
        assert_eq!(lowered(transposed, few), quads("x", inputs.div_ceil(2), 0, 20), "inputs");
    }
    // Two are a word.
    let halves = Job { outputs: 72, store: Store::Halves(3), ..fours };
    let least = Dims { x: 32 * 20 + 8, y: 4 + 32 * 72 + 36, weights: 144, ..coop };
    assert_eq!(lowered(least, halves), Ok([3, 3, 1]), "as halves");
    let short = Dims { y: least.y - 1, ..least };
    assert_eq!(
        lowered(short, halves),
        Err(Error::Outside { job: 0, operand: "y", len: short.y }),
        "half of a row's words"
    );
    assert_eq!(lowered(coop, Job { outputs: 68, ..halves }), quads("y", 34, 4, 72), "halves by eights");
    assert_eq!(
        lowered(Dims { tile: TILES[0], ..least }, halves),
        Err(Error::Halves { job: 0 }),
        "in a portable tile"
    );
    let got = MAX_EXPONENT + 1;
    assert_eq!(
        lowered(coop, Job { store: Store::Halves(got), ..halves }),
        Err(Error::Exponent { job: 0, got }),
        "a power of what is stored"
    );
    let exponent = |exponent| lowered(dims, Job { exponent, ..job });
    assert!(exponent(MAX_EXPONENT).is_ok(), "the most");
    assert_eq!(exponent(got), Err(Error::Exponent { job: 0, got }), "one more");
    for (inputs, outputs) in [(0, 65), (16, 0)] {
        let empty = Error::Empty { job: 0, inputs, outputs };
        assert_eq!(lowered(dims, Job { inputs, outputs, ..job }), Err(empty), "empty");
    }
    assert_eq!(
        lowered(dims, Job { inputs: 12, ..job }),
        Err(Error::Row { job: 0, got: 12, row: 16 }),
        "inputs"
    );
    let transposed = Dims { transposed: true, ..dims };
    assert_eq!(lowered(transposed, job), Err(Error::Row { job: 0, got: 65, row: 16 }), "outputs");
    assert_eq!(
        lowered(transposed, Job { inputs: 5, outputs: 64, row: 64, ..job }),
        Ok([2, 1, 1]),
        "a rank of 5"
    );
    let blocks = Job { format: Some(Format::Int4), ..job };
    assert_eq!(lowered(dims, blocks), Err(Error::Row { job: 0, got: 16, row: 16 }), "half a block");
    // 65 rows of an element, and 9 of scales
    let blocks = Job { inputs: 32, row: 32, x: rows(0, 32), ..blocks }.stored(blocks.format);
    assert_eq!(blocks.scales, 8 * (3 + 65), "scales after the weights");
    let part = |row, weights| lowered(Dims { weights, ..dims }, Job { row, ..job });
    // 64 rows of 24, and 16 of the last
    assert_eq!(part(24, 3 + 64 * 3 + 2), Ok([2, 2, 1]), "a part of its rows");
    assert_eq!(
        part(24, 3 + 64 * 3 + 1),
        Err(Error::Outside { job: 0, operand: "weights", len: 196 }),
        "without the last of it"
    );
    for row in [8, 20] {
        assert_eq!(
            part(row, 4096),
            Err(Error::Row { job: 0, got: 16, row }),
            "less than a row, or no eights"
        );
    }
    let of_blocks = |row| lowered(Dims { weights: 4096, x: 4096, ..dims }, Job { row, ..blocks });
    assert_eq!(of_blocks(64), Ok([2, 2, 1]), "a part of blocks");
    assert_eq!(of_blocks(48), Err(Error::Row { job: 0, got: 32, row: 48 }), "half of one");
    let room = |weights| lowered(Dims { weights, x: 4096, ..dims }, blocks);
    assert_eq!(room(3 + 65 + 9), Ok([2, 2, 1]), "blocks and their scales");
    assert_eq!(
        room(3 + 65 + 8),
        Err(Error::Outside { job: 0, operand: "weights", len: 76 }),
        "without the last"
    );
    let scales = |scales| lowered(Dims { weights: 80, x: 4096, ..dims }, Job { scales, ..blocks });
    assert_eq!(scales(8 * 80 - 65), Ok([2, 2, 1]), "scales elsewhere");
    for far in [8 * 80 - 64, usize::MAX] {
        assert_eq!(scales(far), Err(Error::Outside { job: 0, operand: "weights", len: 80 }), "beyond");
    }
    let overlap = Error::Overlap { job: 0, outputs: 65, stride: 64 };
    assert_eq!(lowered(dims, Job { y: rows(1, 64), ..job }), Err(overlap), "rows of y");
    assert_eq!(lowered(Dims { rows: 1, ..dims }, Job { y: rows(1, 64), ..job }), Ok([1, 2, 1]), "one row");

    let outside = |operand, len| Err(Error::Outside { job: 0, operand, len });
    assert_eq!(lowered(Dims { weights: 132, ..dims }, job), outside("weights", 132), "weights");
    assert_eq!(lowered(Dims { x: 657, ..dims }, job), outside("x", 657), "x");
    assert_eq!(lowered(Dims { y: 2305, ..dims }, job), outside("y", 2305), "y");
    let endless = Dims { weights: usize::MAX, x: usize::MAX, y: usize::MAX, ..dims };
    for far in [1 << 32, usize::MAX] {
        let at = |job| lowered(endless, job);
        assert_eq!(at(Job { weights: far, ..job }), outside("weights", usize::MAX), "weights");
        for x in [rows(far, 20), rows(2, far)] {
            assert_eq!(at(Job { x, ..job }), outside("x", usize::MAX), "x");
        }
        for y in [rows(far, 70), rows(1, far)] {
            assert_eq!(at(Job { y, ..job }), outside("y", usize::MAX), "y");
        }
    }
    let far = Job { x: rows(0, 1 << 32), ..job };
    assert_eq!(
        lowered(Dims { rows: 1, ..endless }, far),
        outside("x", usize::MAX),
        "a stride that is not used"
    );
    let wide = Job { inputs: 8, row: 8, outputs: 64 * 65_536, y: rows(0, 64 * 65_536), ..job };
    let tiles = Error::Tiles { got: 65_536, max: MAX_GROUPS };
    assert_eq!(lowered(endless, wide), Err(tiles), "outputs");
    let most = Job { outputs: 64 * 65_535, ..wide };
    assert_eq!(
        lower(endless, &[most, job]).map(drop),
        Err(Error::Tiles { got: 65_537, max: MAX_GROUPS }),
        "of all"
    );
    let max = 32 * MAX_GROUPS;
    assert_eq!(lowered(Dims { rows: max as usize, ..endless }, job), Ok([MAX_GROUPS, 2, 1]), "the most rows");
    for got in [max as usize + 1, usize::MAX] {
        assert_eq!(lowered(Dims { rows: got, ..endless }, job), Err(Error::Rows { got, max }), "rows");
    }
}
