//! The kernels of a model, compiled in the best variants that a device has, and how work is divided among their workgroups.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::resume_unwind;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use rwkv_core::ModelConfig;
use rwkv_core::config::Ranks;
use rwkv_core::model::Wkv;
use rwkv_core::quant;
use rwkv_kernels::gpu::Device;
use rwkv_kernels::kernels::time_mix_resident::{Format, Rounding};
use rwkv_kernels::kernels::weights as stored;
use rwkv_kernels::kernels::{
    add_planes, carry, channel_mix_value, embedding, layer_norm, linear, matmul, mix_in, mix_rows, packed,
    readout_packed, sample, time_mix, time_mix_batch, time_mix_operands, time_mix_resident, wkv7_chunked,
    wkv7_chunked_factors, wkv7_fours, wkv7_scan,
};
use rwkv_kernels::pipeline::Pipeline;
use rwkv_kernels::{Capabilities, Kernel, choose};
use rwkv_state::{Resident, ResidentRounding, StateFormat};

use super::layer::{ADAPTERS, refused};
use super::plan::Shape;
use super::{Error, Setup, count};
use crate::recipe::Matrix;

/// The matrices that lie with their outputs as rows, and are multiplied by the kernels for those.
const STRAIGHT: [Matrix; 6] =
    [Matrix::Receptance, Matrix::Key, Matrix::Value, Matrix::Output, Matrix::FfnKey, Matrix::Head];

/// Which kernels the heads have.
#[derive(Clone, Copy, Debug)]
pub(super) enum Held {
    /// [`time_mix`] and [`time_mix_batch`]: states in single precision that are written at every token.
    Plain,
    /// [`time_mix_resident`]: all others.
    Resident { format: Format, rounding: Rounding, lazy: bool },
}

impl Held {
    /// The kernel for states that are held so.
    pub(super) const fn new(resident: Resident, fused: bool) -> Result<Self, Error> {
        if resident.is_plain() {
            return Ok(Self::Plain);
        }
        if !fused {
            return Err(Error::Resident(
                resident,
                "without fusion they are single precision, written at every token",
            ));
        }
        let format = match resident.format {
            StateFormat::F32 => Format::F32,
            StateFormat::F16 => Format::F16,
            StateFormat::Int8Scaled => Format::Int8,
            StateFormat::Sparse(_) => return Err(Error::Resident(resident, "sparse states are at rest")),
        };
        let rounding = match resident.rounding {
            ResidentRounding::Nearest => Rounding::Nearest,
            ResidentRounding::Dither => Rounding::Dither,
            ResidentRounding::DecayDither => Rounding::DecayDither,
            ResidentRounding::Stochastic { .. } => {
                return Err(Error::Resident(
                    resident,
                    "there is no stochastic rounding on the GPU, a dither is",
                ));
            }
        };
        Ok(Self::Resident { format, rounding, lazy: resident.capacity > 0 })
    }

    /// Lanes of a workgroup where many sequences are side by side. One for each value row needs no sums over others;
    /// rounding at every token is divided among two. Measured on an H100, 1.5B, 512 sequences: 226 us against 233 of 128
    /// lanes and 295 of 256; with dithered halves 346, 284 and 316.
    pub(super) const fn batch_lanes(self) -> u32 {
        match self {
            Self::Plain | Self::Resident { lazy: true, .. } => 64,
            Self::Resident { lazy: false, .. } => 128,
        }
    }

    /// The kernel, compiled for workgroups of so many lanes; what it writes may be halves, of what two to such a power
    /// divides. Without the norm it is single precision.
    pub(super) fn compile(
        self,
        device: &Device,
        lanes: u32,
        lora_up: bool,
        norm: bool,
        written: Option<u8>,
    ) -> Result<Pipeline, Error> {
        let written = [packed::halves(written.filter(|_| norm)), readout_packed::norm(norm)];
        match self {
            Self::Plain => {
                let of = if lora_up { time_mix::VARIANTS } else { time_mix_batch::VARIANTS };
                compile(device, of, &[&[("LANES", f64::from(lanes))], &written[..]].concat())
            }
            Self::Resident { format, rounding, lazy } => {
                let overrides = time_mix_resident::overrides(format, rounding, lazy, lanes, lora_up);
                compile(device, time_mix_resident::VARIANTS, &[&overrides[..], &written].concat())
            }
        }
    }

    /// What bases are stored in, how they are rounded, and whether tokens are pending.
    pub(super) const fn parts(self) -> (Format, Rounding, bool) {
        match self {
            Self::Plain => (Format::F32, Rounding::Nearest, false),
            Self::Resident { format, rounding, lazy } => (format, rounding, lazy),
        }
    }
}

/// The kernels of a model, compiled.
#[derive(Debug)]
pub(super) struct Kernels {
    pub(super) held: Held,
    pub(super) embedding: Pipeline,
    pub(super) layer_norm: Pipeline,
    pub(super) mix_rows: (mix_rows::Form, Pipeline),
    pub(super) carry: Pipeline,
    pub(super) sample: Pipeline,
    matmul: Multiplies,
    /// Whether products are of cooperative matrices, so that what they read is written as halves.
    pub(super) coop: bool,
    /// For products whose inputs are divided, if they may be.
    pub(super) divided: Option<DividedKernels>,
    /// With the adapters' products given; of few sequences, more lanes to each.
    pub(super) time_mix: Pipeline,
    time_mix_few: Option<Pipeline>,
    /// The group norm, the bonus and the gate, where they are not in those.
    pub(super) readout: Option<Pipeline>,
    /// For prompts, if there may be such a form.
    pub(super) scan: Option<ScanKernels>,
    /// For one token, if the device has the memory for them.
    pub(super) step: Option<StepKernels>,
}

/// What adds up products whose inputs are divided among [`ADAPTERS`] planes.
#[derive(Debug)]
pub(super) struct DividedKernels {
    /// `mix_rows` of rows to which their planes are yet to be added.
    pub(super) mix_rows: (mix_rows::Form, Pipeline),
    /// Where no other norm follows.
    pub(super) add_planes: Pipeline,
}

/// `matmul`, compiled for the tiles, and for what becomes of the products, that plans ask for: a driver takes a second for
/// some, and no engine asks for all.
#[derive(Debug)]
struct Multiplies {
    /// The best variant that the device has.
    kernel: Kernel,
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
    fn get(&self, device: &Device, of: Multiply) -> Result<Pipeline, Error> {
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
    fn prepare(&self, device: &Device, wanted: impl IntoIterator<Item = Multiply>) -> Result<(), Error> {
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

/// The forms for several rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Form {
    /// A few tokens of each sequence.
    Few,
    /// Prompts, one token after the other.
    Scan,
    /// Prompts, four tokens to a sum.
    Fours {
        /// Rows of a state to a workgroup.
        rows_each: usize,
    },
    /// Prompts, by chunks.
    Chunked,
}

/// What is in the place of `time_mix` for prompts.
#[derive(Debug)]
pub(super) struct ScanKernels {
    pub(super) operands: Pipeline,
    pub(super) scan: Pipeline,
    /// In the place of `scan`, by the rows of a state to a workgroup: where nothing else is asked for, and the device has the
    /// subgroups.
    pub(super) fours: Vec<(usize, Pipeline)>,
    /// In the place of `scan` where chunks are asked for.
    pub(super) chunked: Option<ChunkKernels>,
    pub(super) readout: Pipeline,
}

impl ScanKernels {
    /// `paired` is for where results may depend, but for rounding, on how tokens are spread over passes.
    pub(super) fn new(
        device: &Device,
        setup: &Setup,
        held: Held,
        written: Option<u8>,
    ) -> Result<Self, Error> {
        let (format, rounding, lazy) = held.parts();
        let of_scan = wkv7_scan::overrides(format, rounding, lazy, !setup.batch_invariant);
        Ok(Self {
            operands: compile(device, time_mix_operands::VARIANTS, &[])?,
            scan: compile(device, wkv7_scan::VARIANTS, &of_scan)?,
            fours: fours(device, setup)?,
            chunked: ChunkKernels::new(device, setup)?,
            readout: compile(device, readout_packed::VARIANTS, &[packed::halves(written)])?,
        })
    }
}

/// `wkv7_fours`, where it may take the place of `wkv7_scan`. Measured on an H100 against that, 2,048 tokens: 261 us for 420 with 16
/// heads, 263 for 422 with 32, 385 for 541 with 64; 512 tokens: 72 for 111, 73 for 112, 106 for 144; 256 tokens and 256 heads of
/// all sequences together, 211 for 264.
fn fours(device: &Device, setup: &Setup) -> Result<Vec<(usize, Pipeline)>, Error> {
    let (subgroup, has) = (device.info().subgroup_min_size, device.capabilities());
    if setup.wkv.is_some() || setup.batch_invariant || !setup.state.is_plain() || !has.features.subgroup {
        return Ok(Vec::new());
    }
    let kernels = wkv7_fours::variants(subgroup)
        .filter(|kernel| kernel.features.subgroup && has.cover(&kernel.needs()));
    let compiled = |rows_each| {
        let fits =
            |&stage: &usize| wkv7_fours::workgroup_bytes(rows_each, stage) <= has.workgroup_bytes as usize;
        let stage = wkv7_fours::STAGES.into_iter().find(fits)?;
        kernels.clone().next()?;
        let overrides = [("ROWS", f64::from(count(rows_each))), ("STAGE", f64::from(count(stage)))];
        Some(compile(device, kernels.clone(), &overrides).map(|pipeline| (rows_each, pipeline)))
    };
    wkv7_fours::ROWS.into_iter().filter_map(compiled).collect()
}

/// What is in the place of `wkv7_scan` by chunks.
#[derive(Debug)]
pub(super) struct ChunkKernels {
    pub(super) factors: Pipeline,
    pub(super) update: Pipeline,
    /// Tokens of a chunk.
    pub(super) chunk: usize,
}

impl ChunkKernels {
    /// The kernels, if they are asked for.
    pub(super) fn new(device: &Device, setup: &Setup) -> Result<Option<Self>, Error> {
        let Some(Wkv::Chunked(chunk)) = setup.wkv else { return Ok(None) };
        if wkv7_chunked_factors::workgroup_bytes(chunk) > device.capabilities().workgroup_bytes as usize {
            return Err(Error::Chunks(chunk, "the device has too little memory for a workgroup"));
        }
        let overrides = [("CHUNK", f64::from(count(chunk)))];
        Ok(Some(Self {
            factors: compile(device, wkv7_chunked_factors::VARIANTS, &overrides)?,
            update: compile(device, wkv7_chunked::VARIANTS, &overrides)?,
            chunk,
        }))
    }
}

/// That the state update can be what was asked for.
pub(super) fn check_chunks(setup: &Setup) -> Result<(), Error> {
    let Some(Wkv::Chunked(chunk)) = setup.wkv else { return Ok(()) };
    let refuse = |why| Err(Error::Chunks(chunk, why));
    match chunk {
        _ if !setup.fused => refuse("without fusion there is one token after the other"),
        _ if setup.batch_invariant => refuse("they would depend on how tokens are split over passes"),
        _ if !wkv7_chunked::CHUNKS.contains(&chunk) => refuse("there are those of 16, 32 and 64"),
        _ => Ok(()),
    }
}

/// So many times the rows of other stacks go to a workgroup of the head, which has many: the norm is repeated less.
pub(super) const HEAD_TILES: u32 = 8;

/// The kernels of the form for one token, and how its work is divided.
#[derive(Debug)]
pub(super) struct StepKernels {
    pub(super) mix_in: Pipeline,
    /// With the adapters' second factors multiplied in it.
    pub(super) time_mix: Pipeline,
    /// As [`Kernels::readout`].
    pub(super) readout: Option<Pipeline>,
    pub(super) linear: Pipeline,
    pub(super) value: Pipeline,
    /// Rows of a stack to a workgroup of `mix_in`, at most: two or one to each of its teams.
    pub(super) mix_tile: u32,
    /// Of which tiles are multiples.
    pub(super) team_rows: u32,
    /// Lanes of a workgroup of `time_mix`.
    pub(super) heads_lanes: u32,
    /// Outputs to a workgroup.
    pub(super) linear_tile: u32,
    /// Columns to a workgroup.
    pub(super) columns: u32,
}

/// Processors of the GPUs that tiles were measured on, an H100 and an H200.
const PROCESSORS: u32 = 132;

/// Invocations that keep such a GPU busy, or workgroups, one for nearly every processor. With fewer in a dispatch, a smaller tile is
/// faster. On an H100, 64 rows of 2,048 inputs and 8,192 outputs: 26 us in 128 workgroups of 64 x 64, 31 in 512 of 32 x 32.
const FILL: u32 = PROCESSORS * 174;
const MOST_PROCESSORS: u32 = PROCESSORS * 15 / 16;

/// Rows up to which a head has more lanes than [`Held::batch_lanes`], and how many. On an H100, a step of 1.5B and 32 sequences
/// takes 2.91 ms with 128, 2.95 with 64 and 3.05 with 256.
const FEW_SEQUENCES: u32 = 32;
const FEW_LANES: u32 = 128;

/// Rows up to which products that are added to the residual stream have too few tiles of outputs to keep an H100 busy, so that their
/// inputs are divided. Of 1.5B the output takes 19 us for 20 at 32 rows and 22 for 27 at 128, the value 29 for 40 and 40 for 66.
pub(super) const FEW: u32 = 256;

/// Lanes of a workgroup that mixes a row. On an H100, a step of 1.5B and 32 sequences takes 2.91 ms, and 3.00 with half as many.
const MIX_LANES: u32 = 512;

/// What the hidden units of the channel mix are divided by before they are rounded to halves, as a power of two: they are
/// squares. books-10m has some beyond 1e5; up to 1.6e7 they are off by no more than half a unit, or 7.6e-6.
pub(super) const HIDDEN_EXPONENT: u8 = 8;

/// The same for the gated readout, which has no bound either: up to 1e6, or 4.8e-7.
pub(super) const READOUT_EXPONENT: u8 = 4;

/// Whether a device multiplies a model's rows by cooperative matrices, which read halves by eights and write logits by fours.
fn coop(device: &Device, config: &ModelConfig) -> bool {
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

/// The best variant of a kernel that a device has.
fn best<'a>(
    device: &Device,
    variants: impl IntoIterator<Item = &'a Kernel> + Clone,
) -> Result<&'a Kernel, Error> {
    let has = device.capabilities();
    choose(variants.clone(), &has).ok_or_else(|| {
        let name = variants.into_iter().next().map(Kernel::label).unwrap_or_default();
        let needs = Capabilities::WEBGPU;
        rwkv_kernels::pipeline::Error::Capabilities { name, needs, has }.into()
    })
}

/// Compiles a kernel in the best variant that a device has.
///
/// Indices are not checked on the device: see the comment on safety.
pub(super) fn compile<'a>(
    device: &Device,
    variants: impl IntoIterator<Item = &'a Kernel> + Clone,
    overrides: &[(&str, f64)],
) -> Result<Pipeline, Error> {
    let kernel = best(device, variants)?;
    // SAFETY: the kernels are of rwkv-kernels. The plans, in `layer` and in `unfused`, bind buffers of the executor's making,
    // whose extents and whose parameters come from the same `ModelConfig` by way of `lower`, which refuses what does not fit. The
    // tables of a pass (tokens, cursors, segments, wanted rows) are written by the executor alone: tokens are checked
    // against the vocabulary, or are the sampler's, which the embedding holds to it; records are those that `Records`
    // gave out; rows are counted from the tokens, of which there are no more than the scratch has rows.
    #[expect(unsafe_code, reason = "a plan's buffers hold what its parameters say")]
    let pipeline = unsafe { Pipeline::new_unchecked(device.device(), kernel, overrides, device.cache()) };
    Ok(pipeline?)
}

/// Lanes of a workgroup, as far as the device has them. Where lanes are not wide, on the CPU, they only cost.
fn lanes(device: &Device) -> impl Fn(u32) -> u32 {
    let most = if device.is_gpu() { 1 << device.capabilities().invocations.ilog2() } else { 64 };
    move |wanted| wanted.min(most)
}

impl Kernels {
    pub(super) fn new(device: &Device, config: &ModelConfig, setup: &Setup) -> Result<Self, Error> {
        let lanes = lanes(device);
        let norm = [("LANES", f64::from(lanes(256)))];
        let coop = coop(device, config);
        let tiles = tiles(coop, setup.batch_invariant);
        let matmul =
            Multiplies { kernel: *best(device, tiles[0].variants())?, tiles, made: Mutex::default() };
        let held = Held::new(setup.state, setup.fused)?;
        // What the products read: rows are normed, or gated. Without fusion each operation has single precision.
        let written = |exponent| (coop && setup.fused).then_some(exponent);
        let normed = [norm[0], packed::halves(written(0))];
        let mix_rows = |planes| {
            let form = mix_rows::Form::new(config.width, lanes(MIX_LANES), planes).map_err(refused("mix"))?;
            Ok::<_, Error>((
                form,
                compile(device, mix_rows::VARIANTS, &[&form.overrides()[..], &[normed[1]]].concat())?,
            ))
        };
        let readout = written(READOUT_EXPONENT);
        let of_heads = |wanted| held.compile(device, lanes(wanted), false, !setup.norm_apart(), readout);
        // It rounds a state once in a pass: where it must not show how tokens were spread over passes, it is for those
        // that are not rounded and of which nothing is pending.
        let scans = setup.fused && (setup.state.is_plain() || !setup.batch_invariant);
        let of_scan = || ScanKernels::new(device, setup, held, readout);
        let of_step = || StepKernels::new(device, config, setup, held);
        // Side by side, since a driver takes half a second for some.
        let ((time_mix, time_mix_few), (scan, step)) = rayon::join(
            || {
                let few = || (!setup.batch_invariant).then(|| of_heads(FEW_LANES)).transpose();
                rayon::join(|| of_heads(held.batch_lanes()), few)
            },
            || {
                let step = || if setup.fused { of_step() } else { Ok(None) };
                rayon::join(|| scans.then(of_scan).transpose(), step)
            },
        );
        Ok(Self {
            held,
            embedding: compile(device, embedding::VARIANTS, &norm)?,
            layer_norm: compile(device, layer_norm::VARIANTS, &normed)?,
            mix_rows: mix_rows(0)?,
            carry: compile(device, carry::VARIANTS, &[])?,
            sample: compile(device, sample::VARIANTS, &[("LANES", f64::from(lanes(1024)))])?,
            matmul,
            coop,
            divided: if coop && !setup.batch_invariant {
                let add_planes = compile(device, add_planes::VARIANTS, &[])?;
                Some(DividedKernels { mix_rows: mix_rows(count(ADAPTERS))?, add_planes })
            } else {
                None
            },
            time_mix: time_mix?,
            time_mix_few: time_mix_few?,
            readout: readout_of_heads(device, setup, readout)?,
            scan: scan?,
            step: step?,
        })
    }

    /// The heads of so many rows, with the adapters' products given.
    pub(super) fn heads(&self, rows: u32) -> &Pipeline {
        self.time_mix_few.as_ref().filter(|_| rows <= FEW_SEQUENCES).unwrap_or(&self.time_mix)
    }

    pub(super) const fn sample(&self) -> &Pipeline {
        &self.sample
    }

    pub(super) const fn has_step(&self) -> bool {
        self.step.is_some()
    }

    /// The form for a pass of several rows.
    pub(super) fn form(&self, config: &ModelConfig, setup: &Setup, shape: Shape) -> Form {
        let Some(of) = &self.scan else { return Form::Few };
        // Their sums have different orders: where that must not show, one form is for all.
        if setup.batch_invariant {
            return Form::Scan;
        }
        if !shape.is_long() {
            return Form::Few;
        }
        if of.chunked.is_some() {
            return Form::Chunked;
        }
        // The fewest rows of which all workgroups are at work at once, of which a processor holds one.
        let heads = shape.segments.saturating_mul(count(config.n_heads));
        let groups = |rows_each: usize| heads.saturating_mul(count(wkv7_fours::HEAD_SIZE / rows_each));
        let fits = of.fours.iter().find(|(rows_each, _)| groups(*rows_each) <= PROCESSORS);
        match fits.or(of.fours.last()) {
            Some(&(rows_each, _)) => Form::Fours { rows_each },
            None => Form::Scan,
        }
    }

    /// Whether passes may go by chunks.
    pub(super) fn has_chunks(&self) -> bool {
        self.scan.as_ref().is_some_and(|of| of.chunked.is_some())
    }

    /// The rows that a pass of so many is laid down for: with more, up to those, it would have the same tiles.
    pub(super) fn class(rows: u32) -> u32 {
        rows.next_power_of_two().clamp(16, 2048)
    }

    /// The tile for products of so many rows, and for what becomes of them.
    ///
    /// Of cooperative matrices, the largest that leaves no processor idle and is not mostly without rows, or else the
    /// smallest.
    pub(super) fn tile(&self, rows: u32, jobs: &[matmul::Job], transposed: bool) -> Multiply {
        let rows = Self::class(rows);
        let fits = |tile: &matmul::Tile| match tile.coop {
            None => true,
            Some(_) => {
                let cols: u32 = jobs.iter().map(|job| count(job.outputs).div_ceil(tile.cols)).sum();
                let groups = cols.saturating_mul(rows.div_ceil(tile.rows));
                groups >= MOST_PROCESSORS || groups.saturating_mul(tile.lanes()) >= FILL
            }
        };
        let mut of_rows = self.matmul.tiles.iter().filter(|tile| tile.rows <= rows);
        let tile = *of_rows.rfind(|tile| fits(tile)).unwrap_or(&self.matmul.tiles[0]);
        let formats = stored::set(jobs.iter().map(|job| job.format));
        Multiply { tile, transposed, kinds: tile.coop.map(|_| matmul::Kinds::of(jobs)), formats }
    }

    /// The pipeline for products. It is compiled when it is first asked for.
    pub(super) fn matmul(&self, device: &Device, of: Multiply) -> Result<Pipeline, Error> {
        self.matmul.get(device, of)
    }

    /// Compiles those that a plan is about to ask for, as far as they are not.
    pub(super) fn prepare(
        &self,
        device: &Device,
        wanted: impl IntoIterator<Item = Multiply>,
    ) -> Result<(), Error> {
        self.matmul.prepare(device, wanted)
    }

    /// What was chosen, of those that every form has and of others.
    pub(super) fn labels_with<'a>(&'a self, others: impl IntoIterator<Item = &'a Pipeline>) -> Vec<String> {
        let own = [&self.embedding, &self.layer_norm, &self.sample].into_iter();
        let kernels = own.chain(others).map(Pipeline::kernel).chain([&self.matmul.kernel]);
        let mut labels: Vec<_> = kernels.map(Kernel::label).collect();
        labels.sort();
        labels.dedup();
        labels
    }

    /// What was chosen.
    pub(super) fn labels(&self) -> Vec<String> {
        let mut all = vec![&self.mix_rows.1, &self.time_mix];
        all.extend(&self.readout);
        all.extend(self.divided.iter().map(|of| &of.add_planes));
        if let Some(of) = &self.scan {
            all.extend([&of.operands, &of.scan, &of.readout]);
            all.extend(of.fours.iter().map(|(_, fours)| fours));
            all.extend(of.chunked.iter().flat_map(|of| [&of.factors, &of.update]));
        }
        if let Some(step) = &self.step {
            all.extend([&step.mix_in, &step.time_mix, &step.linear, &step.value]);
            all.extend(&step.readout);
        }
        self.labels_with(all)
    }
}

impl StepKernels {
    /// The kernels, or none where a row does not fit into the memory of a workgroup.
    pub(super) fn new(
        device: &Device,
        config: &ModelConfig,
        setup: &Setup,
        held: Held,
    ) -> Result<Option<Self>, Error> {
        let capabilities = device.capabilities();
        let lanes = lanes(device);
        let width = count(config.width);
        // Large workgroups, since each norms the row anew; long rows are multiplied two at a time. Measured on an H200.
        let (mix_lanes, team_rows) = if width < 2048 { (lanes(512), 1) } else { (lanes(1024), 2) };
        if 4 * (width + mix_lanes) > capabilities.workgroup_bytes || width > 16 * mix_lanes {
            return Ok(None);
        }
        // At least 256: four adapters at once.
        let heads_lanes = match held {
            Held::Plain => half(device).max(256),
            Held::Resident { .. } => {
                let fits = time_mix_resident::workgroup_bytes(512) <= capabilities.workgroup_bytes;
                lanes(if fits { 512 } else { 256 }).max(256)
            }
        };
        let blocks = |of: &[Matrix]| setup.weights.blocks(config.n_layers, of).collect::<Vec<_>>();
        let (linear, linear_tile) = linear_of(device, Some(config.width), &blocks(&[Matrix::Output]))?;
        let (value, columns) = value_of(device, config, &blocks(&[Matrix::FfnValue]), setup.skip_zeros)?;
        let formats = stored::formats(blocks(&STRAIGHT).into_iter().chain([None]));
        let f = f64::from;
        Ok(Some(Self {
            mix_in: compile(
                device,
                mix_in::VARIANTS,
                &[("LANES", f(mix_lanes)), ("TEAM_ROWS", f(team_rows)), ("WIDTH", f(width)), formats],
            )?,
            time_mix: held.compile(device, heads_lanes, true, !setup.norm_apart(), None)?,
            readout: readout_of_heads(device, setup, None)?,
            linear,
            value,
            mix_tile: tile(mix_lanes, team_rows),
            team_rows,
            heads_lanes,
            linear_tile,
            columns,
        }))
    }
}

impl StepKernels {
    /// Rows of a stack to a workgroup: the fewest with which each of the workgroups has a processor of its own, so that none has
    /// more to do than it must, or else as many as its teams take at once.
    pub(super) fn stack_tile(&self, stack: &[mix_in::Stacked]) -> u32 {
        let groups = |&tile: &u32| stack.iter().map(|of| count(of.outputs).div_ceil(tile)).sum::<u32>();
        let mut tiles = (1..=self.mix_tile / self.team_rows).map(|teams| teams * self.team_rows);
        tiles.find(|tile| groups(tile) <= PROCESSORS).unwrap_or(self.mix_tile)
    }
}

/// What is left to do of what the heads' kernels answer, where the norm is not in them.
fn readout_of_heads(device: &Device, setup: &Setup, written: Option<u8>) -> Result<Option<Pipeline>, Error> {
    let overrides = [packed::halves(written), readout_packed::of_heads()];
    let compiled = || compile(device, readout_packed::VARIANTS, &overrides);
    setup.norm_apart().then(compiled).transpose()
}

/// Rows of a matrix to a workgroup, so many to a team. Teams are subgroups of 32 on most devices; others go through a
/// tile more or fewer times.
fn tile(lanes: u32, rows: u32) -> u32 {
    (lanes / 32).max(1) * rows
}

/// Lanes of kernels that need 32 to 64 bytes of workgroup memory for each, as `time_mix` and `channel_mix_value` do.
fn half(device: &Device) -> u32 {
    lanes(device)(if device.capabilities().workgroup_bytes >= 32 << 10 { 512 } else { 256 })
}

/// `linear`, and outputs to a workgroup of it. Of a matrix of `known` rows and columns alone, it has them compiled in.
pub(super) fn linear_of(
    device: &Device,
    known: Option<usize>,
    formats: &[Option<quant::Format>],
) -> Result<(Pipeline, u32), Error> {
    // Small workgroups begin sooner, but each has to hold the row. Measured on an H100.
    let lanes = lanes(device)(if known.is_some_and(|width| width <= 2048) { 128 } else { 256 });
    let known = known.map_or(0, count);
    let fits = 4 * (known + lanes + 32) <= device.capabilities().workgroup_bytes;
    let (known, tile) = if fits && known > 0 { (known, tile(lanes, 1)) } else { (0, 0) };
    let overrides = [
        ("LANES", lanes.into()),
        ("TEAM_ROWS", 1.0),
        ("AHEAD", 4.0),
        ("HELD", known.into()),
        ("OUTPUTS", known.into()),
        ("TILE", tile.into()),
        stored::formats(formats.iter().copied()),
    ];
    Ok((compile(device, linear::VARIANTS, &overrides)?, self::tile(lanes, 1)))
}

/// `channel_mix_value`, and columns to a workgroup of it.
pub(super) fn value_of(
    device: &Device,
    config: &ModelConfig,
    formats: &[Option<quant::Format>],
    skip_zeros: bool,
) -> Result<(Pipeline, u32), Error> {
    let (lanes, columns) = (half(device), if config.width <= 1024 { 16 } else { 32 });
    // As few as suffice for all hidden units at once, if eight do.
    let parts = (count(config.hidden) / 4).div_ceil(lanes).clamp(1, 8);
    let overrides = [
        ("LANES", lanes.into()),
        ("COLUMNS", columns.into()),
        ("PARTS", parts.into()),
        ("ALL", f64::from(u8::from(!skip_zeros))),
        ("WIDTH", count(config.width).into()),
        ("HIDDEN", count(config.hidden).into()),
        stored::formats(formats.iter().copied()),
    ];
    Ok((compile(device, channel_mix_value::VARIANTS, &overrides)?, columns))
}

#[cfg(test)]
mod tests {
    use rwkv_core::compare::nmse;
    use rwkv_core::model::{Logits, Skip};
    use rwkv_core::ops::activation::Activation;
    use rwkv_kernels::gpu::device_for_tests;
    use rwkv_kernels::kernels::matmul;

    use super::{Error, Multiply};
    use crate::checkpoint::Checkpoint;
    use crate::gpu::layer::job;
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
            let tile = executor.kernels.tile(count(rows), &some, false).tile;
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

    #[test]
    fn what_cannot_be_compiled_is_said_and_leaves_the_rest() {
        let Some(executor) = executor() else { return };
        let (device, matmul) = (executor.device(), &executor.kernels.matmul);
        let before = matmul.made().len();
        // More invocations than a workgroup has.
        let vast = matmul::Tile { rows: 1 << 16, ..matmul.tiles[0] };
        let some = [job(8, 8, 0, (0, 8), (0, 8), Activation::Identity)];
        let good = executor.kernels.tile(200, &some, true);
        let vast = Multiply { tile: vast, ..good };
        let refused = |of: Result<(), Error>| matches!(of, Err(Error::Pipeline(_)));
        assert!(refused(matmul.prepare(device, [good, vast])), "the error is told");
        assert!(refused(matmul.get(device, vast).map(drop)), "again");
        assert!(matmul.made().len() <= before + 1, "it is not kept");
        assert!(matmul.get(device, good).is_ok(), "others are compiled");
        assert_eq!(logits(&executor, &[1, 2, 3]).len(), 3 * executor.config().vocab, "passes go on");
    }
}
