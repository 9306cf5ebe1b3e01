//! `matmul` for the products of a pass: which tile is for how many rows, and pipelines that are compiled when a plan first
//! asks for them.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::resume_unwind;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use rwkv_core::ModelConfig;
use rwkv_core::config::Ranks;
use rwkv_kernels::Kernel;
use rwkv_kernels::gpu::Device;
use rwkv_kernels::kernels::matmul;
use rwkv_kernels::kernels::weights as stored;
use rwkv_kernels::pipeline::Pipeline;

use super::pipelines::{PROCESSORS, best, compile};
use super::{Error, count};

/// Invocations that keep such a GPU busy: with so many in a dispatch, any tile is taken.
const FILL: u32 = PROCESSORS * 174;

/// Workgroups that are enough in tiles whose parts are of one subgroup: one for nearly every processor. On an H100, 64 rows of 2,048 inputs
/// and 8,192 outputs: 26 us in 128 workgroups of 64 x 64, 31 in 512 of 32 x 32.
const MOST_PROCESSORS: u32 = PROCESSORS * 15 / 16;

/// Workgroups that are enough in narrow tiles whose parts several subgroups share. In a smaller tile such a product would take as long by
/// itself, but have another pipeline than the layer's other products.
const ENOUGH: u32 = PROCESSORS * 3 / 4;

/// Subgroups that share a part in the wide tiles for few rows, of which a processor needs more than one. On an H200, 32 rows of 4,096
/// inputs and 16,384 outputs: 46 us in 256 workgroups of 32 x 64, 49 in 512 of 32 x 32; of 2,048 inputs and 8,192 outputs 18.4 and 14.7.
const WIDE_SPLIT: u32 = 2;

/// `matmul`, compiled for the tiles, and for what becomes of the products, that plans ask for: a driver takes a second for
/// some, and no engine asks for all.
#[derive(Debug)]
pub(super) struct Multiplies {
    /// The best variant that the device has.
    pub(super) kernel: Kernel,
    /// From the smallest on.
    tiles: &'static [matmul::Tile],
    made: Mutex<BTreeMap<Multiply, Pipeline>>,
}

/// What a pipeline of `matmul` is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Multiply {
    pub(super) tile: matmul::Tile,
    transposed: bool,
    /// What becomes of the products, if the tile asks.
    kinds: Option<matmul::Kinds>,
    /// What the matrices are in, as a [`stored::set`].
    formats: u32,
}

impl Multiplies {
    /// None is compiled yet.
    pub(super) fn new(device: &Device, coop: bool, batch_invariant: bool) -> Result<Self, Error> {
        let tiles = tiles(coop, batch_invariant);
        Ok(Self { kernel: *best(device, tiles[0].variants())?, tiles, made: Mutex::default() })
    }

    /// The rows that a pass of so many is laid down for: with more, up to those, it would have the same tiles.
    pub(super) fn class(rows: u32) -> u32 {
        rows.next_power_of_two().clamp(16, 2048)
    }

    /// The classes of passes of up to so many rows.
    pub(super) fn classes(rows: u32) -> impl Iterator<Item = u32> {
        let last = Self::class(rows);
        std::iter::successors(Some(Self::class(1)), |rows| rows.checked_mul(2))
            .take_while(move |&of| of <= last)
    }

    /// The tile for products of so many rows, and for what becomes of them.
    pub(super) fn tile(&self, rows: u32, jobs: &[matmul::Job], transposed: bool) -> Multiply {
        let tile = tile_of(self.tiles, Self::class(rows), jobs);
        let formats = stored::set(jobs.iter().map(|job| job.format));
        Multiply { tile, transposed, kinds: tile.kinds(jobs), formats }
    }

    /// The pipeline for products. It is compiled when it is first asked for.
    pub(super) fn get(&self, device: &Device, of: Multiply) -> Result<Pipeline, Error> {
        let found = self.made().get(&of).cloned();
        if let Some(pipeline) = found {
            return Ok(pipeline);
        }
        let mut overrides = of.tile.overrides(of.transposed, of.formats);
        overrides.extend(of.kinds.into_iter().flat_map(matmul::Kinds::overrides));
        let pipeline = compile(device, [&self.kernel], &overrides)?;
        Ok(self.made().entry(of).or_insert(pipeline).clone())
    }

    /// Compiles those that are not compiled yet, side by side. After an error they may be asked for again.
    pub(super) fn prepare(
        &self,
        device: &Device,
        wanted: impl IntoIterator<Item = Multiply>,
    ) -> Result<(), Error> {
        let mut missing: BTreeSet<Multiply> = wanted.into_iter().collect();
        missing.retain(|of| !self.made().contains_key(of));
        // Not by a pool, of which a thread that waits may take up another pass, which waits for this one.
        thread::scope(|scope| {
            let compile = |&of| scope.spawn(move || self.get(device, of));
            let threads: Vec<_> = missing.iter().map(compile).collect();
            threads
                .into_iter()
                .try_for_each(|of| of.join().unwrap_or_else(|panic| resume_unwind(panic)).map(drop))
        })?;
        if missing.is_empty() { Ok(()) } else { Ok(device.save_cache()?) }
    }

    fn made(&self) -> MutexGuard<'_, BTreeMap<Multiply, Pipeline>> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The tile for products of a class of rows.
///
/// Of cooperative matrices, the largest of which there are enough (see [`ENOUGH`], [`MOST_PROCESSORS`], [`FILL`]) and that is not mostly
/// without rows, or else the smallest.
fn tile_of(tiles: &[matmul::Tile], rows: u32, jobs: &[matmul::Job]) -> matmul::Tile {
    let fits = |tile: &matmul::Tile| match tile.coop {
        None => true,
        Some(of) => {
            let cols: u32 = jobs.iter().map(|job| count(job.outputs).div_ceil(tile.cols)).sum();
            let groups = cols.saturating_mul(rows.div_ceil(tile.rows));
            let enough = match of.split {
                1 => groups >= MOST_PROCESSORS,
                WIDE_SPLIT => false,
                _ => groups >= ENOUGH,
            };
            enough || groups.saturating_mul(tile.lanes()) >= FILL
        }
    };
    let mut of_rows = tiles.iter().filter(|tile| tile.rows <= rows);
    *of_rows.rfind(|tile| fits(tile)).unwrap_or(&tiles[0])
}

/// Whether a device multiplies a model's rows by cooperative matrices, which read halves by eights and write logits by fours.
pub(super) fn coop(device: &Device, config: &ModelConfig) -> bool {
    let Ranks { w, a, v, g } = config.ranks;
    let by_eights = [config.width, config.hidden, w, a, v, g].iter().all(|n| n.is_multiple_of(8));
    device.capabilities().features.coop && by_eights && config.vocab.is_multiple_of(4)
}

/// The tiles of the best variant of `matmul`. Where a sequence must not depend on those beside it, all give the same results.
const fn tiles(coop: bool, batch_invariant: bool) -> &'static [matmul::Tile] {
    match (coop, batch_invariant) {
        (false, _) => &matmul::TILES,
        (true, false) => &matmul::COOP_TILES,
        (true, true) => &matmul::COOP_TILES_UNSPLIT,
    }
}

#[cfg(test)]
mod tests {
    use rwkv_core::compare::nmse;
    use rwkv_core::model::{Logits, Skip};
    use rwkv_core::ops::activation::Activation;
    use rwkv_kernels::gpu::device_for_tests;
    use rwkv_kernels::kernels::matmul;

    use super::{Error, Multiplies, Multiply, tile_of};
    use crate::checkpoint::Checkpoint;
    use crate::gpu::batch::job;
    use crate::gpu::{Executor, Job, Setup, count};

    fn executor() -> Option<Executor> {
        device_for_tests()?;
        let bundled = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/books-10m/model.safetensors");
        let setup = Setup { fused: true, sessions: 1, pass_tokens: 256, ..Setup::default() };
        Some(Executor::open(&Checkpoint::open(bundled).unwrap(), setup, &|_| ()).unwrap())
    }

    fn logits(executor: &Executor, tokens: &[u32]) -> Vec<f32> {
        let mut record = executor.empty();
        let jobs = &mut [Job { tokens, record: &mut record, logits: Logits::All }];
        executor.pass(jobs, Skip::default()).unwrap()
    }

    #[test]
    fn tiles_leave_few_processors_idle() {
        let of = |outputs: &[usize], rows: u32| {
            let product = |&outputs: &usize| job(64, outputs, 0, (0, 64), (0, outputs), Activation::Identity);
            let jobs: Vec<_> = outputs.iter().map(product).collect();
            let tile = tile_of(&matmul::COOP_TILES, Multiplies::class(rows), &jobs);
            [tile.rows, tile.cols]
        };
        let rows = [1, 16, 32, 64, 128, 2048];
        // Keys of 0.4B, 1.5B and 7.2B.
        let key = |outputs| rows.map(|rows| of(&[outputs], rows));
        assert_eq!(key(4096), [[16, 32], [16, 32], [32, 32], [32, 32], [64, 64], [128, 128]]);
        assert_eq!(key(8192), [[16, 32], [16, 32], [32, 32], [64, 64], [64, 64], [128, 128]]);
        assert_eq!(key(16384), [[16, 64], [16, 64], [32, 64], [64, 64], [128, 128], [128, 128]]);
        assert_eq!(of(&[1024; 3], 32), [16, 32], "96 workgroups of 32 x 32");
        assert_eq!(of(&[1024, 1024, 1024, 64, 64, 32, 128], 32), [32, 32], "with nine of the adapters");
        assert_eq!(of(&[64], 16), [16, 16], "nothing is enough");
    }

    #[test]
    fn products_are_compiled_when_they_are_first_asked_for() {
        let Some(executor) = executor() else { return };
        let matmul = &executor.kernels.matmul;
        let tokens: Vec<u32> = (0..130).map(|i| i * 7 % 256).collect();
        let some = [job(8, 8, 0, (0, 8), (0, 8), Activation::Identity)];
        // Every product whose tile has so many rows.
        let compiled = |rows: u32| matmul.made().keys().filter(|of| of.tile.rows == rows).count();
        let vocab = executor.config().vocab;
        let mut short = logits(&executor, &tokens[..2]);
        for rows in [20, 40, 130] {
            let tile = executor.kernels.matmul.tile(count(rows), &some, false).tile;
            let before = compiled(tile.rows);
            let first = logits(&executor, &tokens[..rows]);
            let after = compiled(tile.rows);
            assert!(after >= before && after > 0, "{rows} rows");
            let all = matmul.made().len();
            let again = logits(&executor, &tokens[..rows]);
            assert_eq!(matmul.made().len(), all, "{rows} rows once more: nothing is compiled");
            assert_eq!(first, again, "{rows} rows");
            assert_eq!(first.len(), rows * vocab, "{rows} rows");
            // But for the order of sums, and what cooperative matrices round.
            let error = nmse(&first[..short.len()], &short, 1e-5);
            assert!(error.is_ok(), "{rows} rows begin as fewer do: {error:?}");
            short = first;
        }
        let tiles = matmul.made().keys().map(|of| of.tile).collect::<std::collections::BTreeSet<_>>().len();
        assert!(tiles > 1, "not all that was asked for was compiled at first");
    }

    /// Where products are portable, a product of logits is compiled for what others are too.
    #[test]
    fn nothing_is_compiled_after_it_is_prepared() {
        let Some(executor) = executor() else { return };
        executor.prepare(false).unwrap();
        let matmul = &executor.kernels.matmul;
        let all = matmul.made().len();
        let tokens: Vec<u32> = (0..256).map(|i| i * 7 % 256).collect();
        for rows in [1, 2, 15, 33, 64, 130, 256] {
            logits(&executor, &tokens[..rows]);
            let mut records: Vec<_> = (0..rows).map(|_| executor.empty()).collect();
            let side_by_side = records.iter_mut().zip(tokens.chunks(1));
            let mut jobs: Vec<_> =
                side_by_side.map(|(record, tokens)| Job { tokens, record, logits: Logits::Last }).collect();
            executor.pass(&mut jobs, Skip::default()).unwrap();
            assert_eq!(matmul.made().len(), all, "{rows} rows");
        }
    }

    #[test]
    fn what_cannot_be_compiled_is_said_and_leaves_the_rest() {
        let Some(executor) = executor() else { return };
        let (device, matmul) = (executor.device(), &executor.kernels.matmul);
        let before = matmul.made().len();
        // More invocations than a workgroup has.
        let vast = matmul::Tile { rows: 1 << 16, ..matmul.tiles[0] };
        let some = [job(8, 8, 0, (0, 8), (0, 8), Activation::Identity)];
        let good = executor.kernels.matmul.tile(200, &some, true);
        let vast = Multiply { tile: vast, ..good };
        let refused = |of: Result<(), Error>| matches!(of, Err(Error::Pipeline(_)));
        assert!(refused(matmul.prepare(device, [good, vast])), "the error is told");
        assert!(refused(matmul.get(device, vast).map(drop)), "again");
        assert!(matmul.made().len() <= before + 1, "it is not kept");
        assert!(matmul.get(device, good).is_ok(), "others are compiled");
        assert_eq!(logits(&executor, &[1, 2, 3]).len(), 3 * executor.config().vocab, "passes go on");
    }
}
