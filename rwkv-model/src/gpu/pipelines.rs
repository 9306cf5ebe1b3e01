//! The kernels of a model, compiled in the best variants that a device has, and how work is divided among their workgroups.

use std::collections::BTreeSet;

use rayon::prelude::*;
use rwkv_core::ModelConfig;
use rwkv_core::config::Ranks;
use rwkv_core::model::Wkv;
use rwkv_core::ops::activation::Activation;
use rwkv_core::quant;
use rwkv_kernels::gpu::Device;
use rwkv_kernels::kernels::time_mix_resident::{Format, Rounding};
use rwkv_kernels::kernels::weights as stored;
use rwkv_kernels::kernels::{
    add_planes, carry, channel_mix_value, embedding, layer_norm, linear, matmul, mix_in, mix_rows, packed,
    readout_packed, sample, time_mix, time_mix_operands, time_mix_resident, wkv7_chunked,
    wkv7_chunked_factors, wkv7_fours, wkv7_scan,
};
use rwkv_kernels::pipeline::Pipeline;
use rwkv_kernels::{Capabilities, Kernel, choose};
use rwkv_state::{Resident, ResidentRounding, StateFormat};

use super::layer::{job, refused};
use super::plan::Shape;
use super::{Error, Setup, count};
use crate::recipe::Matrix;

/// The matrices that lie with their outputs as rows, and are multiplied by the kernels for those.
const STRAIGHT: [Matrix; 6] =
    [Matrix::Receptance, Matrix::Key, Matrix::Value, Matrix::Output, Matrix::FfnKey, Matrix::Head];

/// Which kernel the heads have.
#[derive(Clone, Copy, Debug)]
pub(super) enum Held {
    /// [`time_mix`]: states in single precision that are written at every token.
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
                let overrides = [("LANES", f64::from(lanes)), ("LORA_UP", f64::from(u8::from(lora_up)))];
                compile(device, time_mix::VARIANTS, &[overrides, written].concat())
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
    pub(super) mix_rows: Pipeline,
    pub(super) carry: Pipeline,
    pub(super) sample: Pipeline,
    /// From the smallest tile on, for what products become, plain and transposed.
    matmul: Vec<(matmul::Tile, Vec<Multiply>)>,
    /// Whether products are of cooperative matrices, so that what they read is written as halves.
    pub(super) coop: bool,
    /// Adds up products whose inputs are divided, if they may be.
    pub(super) add_planes: Option<Pipeline>,
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

/// `matmul` for some products.
#[derive(Debug)]
struct Multiply {
    transposed: bool,
    /// What becomes of them, if the tile asks.
    kinds: Option<matmul::Kinds>,
    /// What the matrices are in, as a [`stored::set`].
    formats: u32,
    pipeline: Pipeline,
}

impl Multiply {
    /// What becomes of the products of a layer and of the head, with cooperative matrices, and what they are with, beside
    /// adapters if so said.
    fn kinds() -> [(bool, matmul::Kinds, &'static [Matrix], bool); 7] {
        let of = |of: &[(matmul::Store, Activation)]| {
            let job =
                |&(store, activation)| matmul::Job { store, ..job(8, 8, 0, (0, 8), (0, 8), activation) };
            matmul::Kinds::of(&of.iter().map(job).collect::<Vec<_>>())
        };
        let (put, add, halves) = (matmul::Store::Put, matmul::Store::Add, matmul::Store::Halves(0));
        let (identity, tanh, sigmoid) = (Activation::Identity, Activation::Tanh, Activation::Sigmoid);
        let (put, added) = (of(&[(put, identity)]), of(&[(add, identity)]));
        // The adapters' first factors are beside the projections.
        let stack = of(&[(matmul::Store::Put, identity), (halves, tanh), (halves, sigmoid)]);
        let squared = of(&[(halves, Activation::SquaredRelu)]);
        [
            (false, put, &[Matrix::Head], false),
            (false, added, &[Matrix::Output], false),
            (false, squared, &[Matrix::FfnKey], false),
            (false, stack, &[Matrix::Receptance, Matrix::Key, Matrix::Value], true),
            (true, put, &[], true),
            (true, put, &[Matrix::FfnValue], false), // divided
            (true, added, &[Matrix::FfnValue], false),
        ]
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

/// Invocations that keep such a GPU busy. With fewer in a dispatch, a smaller tile is faster.
const FILL: u32 = PROCESSORS * 174;

/// Rows up to which a head has more lanes than [`Held::batch_lanes`], and how many. On an H100, 1.5B, 32 sequences: 22 us for 25.
const FEW_SEQUENCES: u32 = 32;
const FEW_LANES: u32 = 256;

/// Rows up to which a product of so many inputs has too few tiles of outputs to keep an H100 busy, so that its inputs are
/// divided. Measured there, with the sum: of 1.5B's 8,192 hidden units 29 us for 40 at 32 rows and 40 for 66 at 128, of
/// 7.2B's 16,384 127 for 256 at 128; of 4,096 inputs nothing.
pub(super) const FEW: u32 = 256;
pub(super) const MANY_INPUTS: usize = 8192;

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

/// Compiles a kernel in the best variant that a device has.
///
/// Indices are not checked on the device: see the comment on safety.
pub(super) fn compile<'a>(
    device: &Device,
    variants: impl IntoIterator<Item = &'a Kernel> + Clone,
    overrides: &[(&str, f64)],
) -> Result<Pipeline, Error> {
    let capabilities = device.capabilities();
    let Some(kernel) = choose(variants.clone(), &capabilities) else {
        let name = variants.into_iter().next().map(Kernel::label).unwrap_or_default();
        let needs = Capabilities::WEBGPU;
        return Err(rwkv_kernels::pipeline::Error::Capabilities { name, needs, has: capabilities }.into());
    };
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
        // What matrices are in, and adapters, which are halves, if they are among them.
        let set = |of: &[Matrix], adapters: bool| {
            stored::set(setup.weights.blocks(config.n_layers, of).chain(adapters.then_some(None)))
        };
        let products: BTreeSet<_> = if coop {
            let of =
                |(transposed, kinds, matrices, adapters)| (transposed, Some(kinds), set(matrices, adapters));
            Multiply::kinds().map(of).into()
        } else {
            [(false, None, set(&STRAIGHT, true)), (true, None, set(&[Matrix::FfnValue], true))].into()
        };
        // Side by side, since a driver takes half a second for some.
        let of_matmul = |&tile: &matmul::Tile| {
            let of = |&(transposed, kinds, formats): &(bool, Option<matmul::Kinds>, u32)| {
                let mut overrides = tile.overrides(transposed, formats);
                overrides.extend(kinds.into_iter().flat_map(matmul::Kinds::overrides));
                let pipeline = compile(device, tile.variants(), &overrides)?;
                Ok::<_, Error>(Multiply { transposed, kinds, formats, pipeline })
            };
            Ok::<_, Error>((tile, products.par_iter().map(of).collect::<Result<_, _>>()?))
        };
        let of_matmul =
            tiles(coop, setup.batch_invariant).par_iter().map(of_matmul).collect::<Result<_, _>>()?;
        let held = Held::new(setup.state, setup.fused)?;
        // What the products read: rows are normed, or gated. Without fusion each operation has single precision.
        let written = |exponent| (coop && setup.fused).then_some(exponent);
        let normed = [norm[0], packed::halves(written(0))];
        let readout = written(READOUT_EXPONENT);
        let of_heads = |wanted| held.compile(device, lanes(wanted), false, !setup.norm_apart(), readout);
        Ok(Self {
            held,
            embedding: compile(device, embedding::VARIANTS, &norm)?,
            layer_norm: compile(device, layer_norm::VARIANTS, &normed)?,
            mix_rows: compile(device, mix_rows::VARIANTS, &normed)?,
            carry: compile(device, carry::VARIANTS, &[])?,
            sample: compile(device, sample::VARIANTS, &[("LANES", f64::from(lanes(1024)))])?,
            matmul: of_matmul,
            coop,
            add_planes: if coop && !setup.batch_invariant {
                Some(compile(device, add_planes::VARIANTS, &[])?)
            } else {
                None
            },
            time_mix: of_heads(held.batch_lanes())?,
            time_mix_few: if setup.batch_invariant { None } else { Some(of_heads(FEW_LANES)?) },
            readout: readout_of_heads(device, setup, readout)?,
            // It rounds a state once in a pass: where it must not show how tokens were spread over passes, it is for those
            // that are not rounded and of which nothing is pending.
            scan: if setup.fused && (setup.state.is_plain() || !setup.batch_invariant) {
                Some(ScanKernels::new(device, setup, held, readout)?)
            } else {
                None
            },
            step: if setup.fused { StepKernels::new(device, config, setup, held)? } else { None },
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

    /// The tile for products of so many rows, and its pipeline.
    ///
    /// Of cooperative matrices, the largest that leaves no processor idle and is not mostly without rows, or else the
    /// smallest.
    pub(super) fn matmul(
        &self,
        part: &'static str,
        rows: u32,
        jobs: &[matmul::Job],
        transposed: bool,
    ) -> Result<(matmul::Tile, &Pipeline), Error> {
        let (rows, kinds) = (Self::class(rows), matmul::Kinds::of(jobs));
        let fits = |tile: &matmul::Tile| match tile.coop {
            None => true,
            Some(_) => {
                let cols: u32 = jobs.iter().map(|job| count(job.outputs).div_ceil(tile.cols)).sum();
                let groups = cols.saturating_mul(rows.div_ceil(tile.rows));
                groups.saturating_mul(tile.lanes()) >= FILL
            }
        };
        let mut of_rows = self.matmul.iter().filter(|(tile, _)| tile.rows <= rows);
        let (tile, pipelines) = of_rows.rfind(|(tile, _)| fits(tile)).unwrap_or(&self.matmul[0]);
        let formats = stored::set(jobs.iter().map(|job| job.format));
        let suits = |of: &&Multiply| {
            of.transposed == transposed
                && of.formats & formats == formats
                && of.kinds.is_none_or(|own| own.contains(kinds))
        };
        let none = || refused(part)("no kernel does with its products what is asked");
        let best = pipelines.iter().filter(suits).min_by_key(|of| of.formats.count_ones());
        Ok((*tile, &best.ok_or_else(none)?.pipeline))
    }

    /// What was chosen, of those that every form has and of others.
    pub(super) fn labels_with<'a>(&'a self, others: impl IntoIterator<Item = &'a Pipeline>) -> Vec<String> {
        let own = [&self.embedding, &self.layer_norm, &self.sample].into_iter();
        let all = own.chain(self.matmul.iter().flat_map(|(_, of)| of).map(|of| &of.pipeline)).chain(others);
        let mut labels: Vec<_> = all.map(|pipeline| pipeline.kernel().label()).collect();
        labels.sort();
        labels.dedup();
        labels
    }

    /// What was chosen.
    pub(super) fn labels(&self) -> Vec<String> {
        let mut all = vec![&self.mix_rows, &self.time_mix];
        all.extend(&self.readout);
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
