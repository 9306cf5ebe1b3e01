//! The dispatches of a layer, fused, in forms that compute the same; another is [`Unfused`](super::unfused).
//!
//! | form | for | dispatches |
//! |---|---|---|
//! | [`Layers::step`] | one token of one sequence | `mix_in`, `time_mix`, `linear`, `mix_in`, `channel_mix_value` |
//! | [`Layers::batch`] | any rows | `mix_rows`, `matmul`, `matmul`, `time_mix`, `matmul`, `mix_rows`, `matmul`, `matmul` |
//! | the same, long | prompts | with `time_mix_operands`, `wkv7_scan`, `readout_packed` for `time_mix` |
//! | the same, of few rows | cooperative matrices | with `matmul`, `add_planes` for the last `matmul` |
//! | the same, by chunks | prompts | with `wkv7_chunked_factors`, `wkv7_chunked` for `wkv7_scan` |

use rayon::prelude::*;
use rwkv_core::ModelConfig;
use rwkv_core::config::Ranks;
use rwkv_core::model::{SkipShifts, Wkv};
use rwkv_core::ops::activation::Activation;
use rwkv_core::ops::matmul::Rows;
use rwkv_core::ops::wkv7_lazy::ENTRY;
use rwkv_core::quant;
use rwkv_kernels::gpu::Device;
use rwkv_kernels::kernels::sample::SamplerRow;
use rwkv_kernels::kernels::time_mix_resident::{Format, Rounding};
use rwkv_kernels::kernels::weights as stored;
use rwkv_kernels::kernels::{
    add_planes, carry, channel_mix_value, embedding, extents, layer_norm, linear, matmul, mix_in, mix_rows,
    packed, readout_packed, sample, time_mix, time_mix_operands, time_mix_resident, wkv7_chunked,
    wkv7_chunked_factors, wkv7_scan,
};
use rwkv_kernels::pipeline::{Pipeline, checked};
use rwkv_kernels::{Capabilities, Kernel, choose};
use rwkv_state::layout::DeviceLayout;
use rwkv_state::resident::MAX_CAPACITY;
use rwkv_state::{Resident, ResidentRounding, StateFormat};

use super::ahead::TOGETHER;
use super::plan::{Bound, Grid, Mixes, PART_BYTES, Plan, Planner, Shape, Step};
use super::records::{Move, Records};
use super::weights::{Layer, Weights};
use super::{Error, Setup, count};
use crate::recipe::Matrix;

/// Where the mixes of the time mix are among them.
pub(super) const MIX_R: u32 = 0;
pub(super) const MIX_W: u32 = 1;
pub(super) const MIX_K: u32 = 2;
pub(super) const MIX_V: u32 = 3;
pub(super) const MIX_A: u32 = 4;
pub(super) const MIX_G: u32 = 5;

/// Mixes of the time mix.
pub(super) const MIXES: usize = 6;

/// Adapters of the time mix.
const ADAPTERS: usize = 4;

/// The matrices that lie with their outputs as rows, and are multiplied by the kernels for those.
const STRAIGHT: [Matrix; 6] =
    [Matrix::Receptance, Matrix::Key, Matrix::Value, Matrix::Output, Matrix::FfnKey, Matrix::Head];

/// The part of a layer in which the heads' states move on.
pub(super) const HEADS: &str = "heads";

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
    const fn batch_lanes(self) -> u32 {
        match self {
            Self::Plain | Self::Resident { lazy: true, .. } => 64,
            Self::Resident { lazy: false, .. } => 128,
        }
    }

    /// The kernel, compiled for workgroups of so many lanes; what it writes may be halves, of what two to such a power
    /// divides.
    fn compile(
        self,
        device: &Device,
        lanes: u32,
        lora_up: bool,
        written: Option<u8>,
    ) -> Result<Pipeline, Error> {
        let written = packed::halves(written);
        match self {
            Self::Plain => {
                let overrides =
                    [("LANES", f64::from(lanes)), ("LORA_UP", f64::from(u8::from(lora_up))), written];
                compile(device, time_mix::VARIANTS, &overrides)
            }
            Self::Resident { format, rounding, lazy } => {
                let overrides = time_mix_resident::overrides(format, rounding, lazy, lanes, lora_up);
                compile(device, time_mix_resident::VARIANTS, &[&overrides[..], &[written]].concat())
            }
        }
    }

    /// What bases are stored in, how they are rounded, and whether tokens are pending.
    const fn parts(self) -> (Format, Rounding, bool) {
        match self {
            Self::Plain => (Format::F32, Rounding::Nearest, false),
            Self::Resident { format, rounding, lazy } => (format, rounding, lazy),
        }
    }
}

/// The kernels of a model, compiled.
#[derive(Debug)]
pub(super) struct Kernels {
    held: Held,
    embedding: Pipeline,
    pub(super) layer_norm: Pipeline,
    mix_rows: Pipeline,
    carry: Pipeline,
    sample: Pipeline,
    /// From the smallest tile on, for what products become, plain and transposed.
    matmul: Vec<(matmul::Tile, Vec<Multiply>)>,
    /// Whether products are of cooperative matrices, so that what they read is written as halves.
    pub(super) coop: bool,
    /// Adds up products whose inputs are divided, if they may be.
    add_planes: Option<Pipeline>,
    /// With the adapters' products given; of few sequences, more lanes to each.
    time_mix: Pipeline,
    time_mix_few: Pipeline,
    /// For prompts, if there may be such a form.
    scan: Option<ScanKernels>,
    /// For one token, if the device has the memory for them.
    step: Option<StepKernels>,
}

/// `matmul` for some products.
#[derive(Debug)]
struct Multiply {
    transposed: bool,
    /// What becomes of them, if the tile asks.
    kinds: Option<matmul::Kinds>,
    pipeline: Pipeline,
}

impl Multiply {
    /// What becomes of the products of a layer and of the head, with cooperative matrices.
    fn kinds() -> Vec<(bool, Option<matmul::Kinds>)> {
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
        let all =
            [(false, put), (false, added), (false, squared), (false, stack), (true, put), (true, added)];
        all.map(|(transposed, kinds)| (transposed, Some(kinds))).to_vec()
    }
}

/// The forms for several rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Form {
    /// A few tokens of each sequence.
    Few,
    /// Prompts, one token after the other.
    Scan,
    /// Prompts, by chunks.
    Chunked,
}

/// What is in the place of `time_mix` for prompts.
#[derive(Debug)]
struct ScanKernels {
    operands: Pipeline,
    scan: Pipeline,
    /// In the place of `scan` where chunks are asked for, or may be faster.
    chunked: Option<ChunkKernels>,
    readout: Pipeline,
}

impl ScanKernels {
    /// `paired` is for where results may depend, but for rounding, on how tokens are spread over passes.
    fn new(
        device: &Device,
        config: &ModelConfig,
        setup: &Setup,
        held: Held,
        written: Option<u8>,
    ) -> Result<Self, Error> {
        let (format, rounding, lazy) = held.parts();
        let of_scan = wkv7_scan::overrides(format, rounding, lazy, !setup.batch_invariant);
        Ok(Self {
            operands: compile(device, time_mix_operands::VARIANTS, &[])?,
            scan: compile(device, wkv7_scan::VARIANTS, &of_scan)?,
            chunked: ChunkKernels::new(device, config, setup)?,
            readout: compile(device, readout_packed::VARIANTS, &[packed::halves(written)])?,
        })
    }
}

/// What is in the place of `wkv7_scan` by chunks.
#[derive(Debug)]
struct ChunkKernels {
    factors: Pipeline,
    update: Pipeline,
    /// Tokens of a chunk.
    chunk: usize,
    /// Heads of all sequences together, up to which a pass over prompts takes this form.
    most_heads: u32,
}

/// Tokens of the chunks that a pass takes by itself. More wait for each other no less, and their pair weights are more work.
const CHUNK: usize = 16;

/// Heads of all sequences together, up to which they are faster than one token after the other: chunks are more arithmetic for a
/// shorter wait of tokens for those before, and many heads leave nothing to wait. On an H100, 16 heads and 2,048 tokens: 396 us
/// for 409; 32 heads: 496 for 422.
const CHUNKED_HEADS: u32 = 16;

impl ChunkKernels {
    /// The kernels, if they are asked for, or may be faster for the model.
    fn new(device: &Device, config: &ModelConfig, setup: &Setup) -> Result<Option<Self>, Error> {
        let by_itself =
            !setup.batch_invariant && setup.state.is_plain() && count(config.n_heads) <= CHUNKED_HEADS;
        let (chunk, most_heads) = match (setup.wkv, by_itself) {
            (Some(Wkv::Chunked(chunk)), _) => (chunk, u32::MAX),
            (None, true) => (CHUNK, CHUNKED_HEADS),
            _ => return Ok(None),
        };
        if wkv7_chunked_factors::workgroup_bytes(chunk) > device.capabilities().workgroup_bytes as usize {
            return Err(Error::Chunks(chunk, "the device has too little memory for a workgroup"));
        }
        let overrides = [("CHUNK", f64::from(count(chunk)))];
        Ok(Some(Self {
            factors: compile(device, wkv7_chunked_factors::VARIANTS, &overrides)?,
            update: compile(device, wkv7_chunked::VARIANTS, &overrides)?,
            chunk,
            most_heads,
        }))
    }
}

/// That the state update can be what was asked for.
pub(super) fn check_chunks(setup: &Setup) -> Result<(), Error> {
    let Some(Wkv::Chunked(chunk)) = setup.wkv else { return Ok(()) };
    let refuse = |why| Err(Error::Chunks(chunk, why));
    match chunk {
        _ if !setup.fused => refuse("without fusion there is one token after the other"),
        _ if !setup.state.is_plain() => refuse("states are not single precision, written at every token"),
        _ if setup.batch_invariant => refuse("they would depend on how tokens are split over passes"),
        _ if !wkv7_chunked::CHUNKS.contains(&chunk) => refuse("there are those of 16, 32 and 64"),
        _ => Ok(()),
    }
}

/// So many times the rows of other stacks go to a workgroup of the head, which has many: the norm is repeated less.
const HEAD_TILES: u32 = 8;

/// The kernels of the form for one token, and how its work is divided.
#[derive(Debug)]
struct StepKernels {
    mix_in: Pipeline,
    /// With the adapters' second factors multiplied in it.
    time_mix: Pipeline,
    linear: Pipeline,
    value: Pipeline,
    /// Rows of a stack to a workgroup of `mix_in`, at most: two or one to each of its teams.
    mix_tile: u32,
    /// Of which tiles are multiples.
    team_rows: u32,
    /// Lanes of a workgroup of `time_mix`.
    heads_lanes: u32,
    /// Outputs to a workgroup.
    linear_tile: u32,
    /// Columns to a workgroup.
    columns: u32,
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
const FEW: u32 = 256;
const MANY_INPUTS: usize = 8192;

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
    // SAFETY: the kernels are of rwkv-kernels. The plans, below and in `unfused`, bind buffers of the executor's making,
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
        // Side by side, since a driver takes half a second for some.
        // Adapters are halves.
        let formats =
            |of: &[Matrix]| stored::formats(setup.weights.blocks(config.n_layers, of).chain([None]));
        let coop = coop(device, config);
        let of_matmul = |&tile: &matmul::Tile| {
            let of = |transposed, kinds: Option<matmul::Kinds>| {
                let matrices: &[Matrix] = if transposed { &[Matrix::FfnValue] } else { &STRAIGHT };
                let mut overrides = tile.overrides(transposed);
                overrides.push(formats(matrices));
                overrides.extend(kinds.into_iter().flat_map(matmul::Kinds::overrides));
                let pipeline = compile(device, tile.variants(), &overrides)?;
                Ok::<_, Error>(Multiply { transposed, kinds, pipeline })
            };
            let kinds = if coop { Multiply::kinds() } else { vec![(false, None), (true, None)] };
            let all = kinds.into_par_iter().map(|(transposed, kinds)| of(transposed, kinds));
            Ok::<_, Error>((tile, all.collect::<Result<_, _>>()?))
        };
        let of_matmul =
            tiles(coop, setup.batch_invariant).par_iter().map(of_matmul).collect::<Result<_, _>>()?;
        let held = Held::new(setup.state, setup.fused)?;
        // What the products read: rows are normed, or gated. Without fusion each operation has single precision.
        let written = |exponent| (coop && setup.fused).then_some(exponent);
        let normed = [norm[0], packed::halves(written(0))];
        let of_heads = |wanted| held.compile(device, lanes(wanted), false, written(READOUT_EXPONENT));
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
            time_mix_few: of_heads(if setup.batch_invariant { held.batch_lanes() } else { FEW_LANES })?,
            // It rounds a state once in a pass: where it must not show how tokens were spread over passes, it is for those
            // that are not rounded and of which nothing is pending.
            scan: if setup.fused && (setup.state.is_plain() || !setup.batch_invariant) {
                Some(ScanKernels::new(device, config, setup, held, written(READOUT_EXPONENT))?)
            } else {
                None
            },
            step: if setup.fused { StepKernels::new(device, config, setup, held)? } else { None },
        })
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
        let long = shape.is_long();
        match &of.chunked {
            // Their sums have different orders: where that must not show, one form is for all.
            _ if setup.batch_invariant => Form::Scan,
            _ if !long => Form::Few,
            // What was asked for is for all prompts.
            Some(of) if setup.wkv.is_some() || shape.is_chunked(count(config.n_heads), of.most_heads) => {
                Form::Chunked
            }
            _ => Form::Scan,
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
        let suits =
            |of: &&Multiply| of.transposed == transposed && of.kinds.is_none_or(|own| own.contains(kinds));
        let none = || refused(part)("no kernel does with its products what is asked");
        Ok((*tile, &pipelines.iter().find(suits).ok_or_else(none)?.pipeline))
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
        if let Some(of) = &self.scan {
            all.extend([&of.operands, &of.scan, &of.readout]);
            all.extend(of.chunked.iter().flat_map(|of| [&of.factors, &of.update]));
        }
        if let Some(step) = &self.step {
            all.extend([&step.mix_in, &step.time_mix, &step.linear, &step.value]);
        }
        self.labels_with(all)
    }
}

impl StepKernels {
    /// The kernels, or none where a row does not fit into the memory of a workgroup.
    fn new(device: &Device, config: &ModelConfig, setup: &Setup, held: Held) -> Result<Option<Self>, Error> {
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
            time_mix: held.compile(device, heads_lanes, true, None)?,
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
    fn stack_tile(&self, stack: &[mix_in::Stacked]) -> u32 {
        let groups = |&tile: &u32| stack.iter().map(|of| count(of.outputs).div_ceil(tile)).sum::<u32>();
        let mut tiles = (1..=self.mix_tile / self.team_rows).map(|teams| teams * self.team_rows);
        tiles.find(|tile| groups(tile) <= PROCESSORS).unwrap_or(self.mix_tile)
    }
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

/// What lives no longer than a pass. Rows are those of a pass, `T` at most.
#[derive(Debug)]
pub(super) struct Scratch {
    pub(super) logit_rows: usize,
    /// `[T]`.
    pub(super) tokens: wgpu::Buffer,
    /// The tables of a pass over one token, in parts, so that the host writes them at once: [`One`].
    one: wgpu::Buffer,
    /// Those of the steps that are submitted together.
    ahead: wgpu::Buffer,
    /// Record read and record written, where there are: `[T]`.
    pub(super) cursors: wgpu::Buffer,
    /// Where the shifts of mixes that are left out stay what they were: slot read and slot written, where there is one.
    carried: wgpu::Buffer,
    /// Of up to T segments.
    segments: wgpu::Buffer,
    /// What states are held in.
    resident: Resident,
    /// Rows whose logits are wanted, `[R]`.
    pub(super) wanted: wgpu::Buffer,
    /// No record read and none written: for the head.
    no_cursor: wgpu::Buffer,
    /// Residual stream, `[T, D]`.
    pub(super) x: wgpu::Buffer,
    /// Normed and shifted, `[T, 6, D]`.
    pub(super) mixed: wgpu::Buffer,
    /// What the heads read, `[T, P]`.
    inputs: wgpu::Buffer,
    /// Products of the adapters, `[T, 4, D]`.
    up: wgpu::Buffer,
    /// What chunks of the heads do whatever state they meet, `[T, 6, D]`, where passes may go by chunks.
    factors: Option<wgpu::Buffer>,
    /// Parameters of the kernel that computes them.
    of_chunks: wgpu::Buffer,
    /// Layer 0's values, `[T, D]`.
    pub(super) v_first: wgpu::Buffer,
    /// Gated readout, `[T, D]`.
    pub(super) readout: wgpu::Buffer,
    /// `[T, F]`.
    pub(super) hidden: wgpu::Buffer,
    /// Normed rows whose logits are wanted, `[R, D]`.
    pub(super) normed: wgpu::Buffer,
    /// `[R, V]`.
    pub(super) logits: wgpu::Buffer,
    /// Parameters of `matmul` over the rows of a pass, by the number of jobs, and over the rows of logits.
    of_rows: [wgpu::Buffer; MAX_JOBS],
    of_logits: wgpu::Buffer,
    /// T.
    pub(super) rows: usize,
    /// Elements of the buffers that `matmul` reads and writes.
    len: Lengths,
}

/// The tables of a pass over one token, each where it can be bound.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct One {
    cursor: [u32; 64],
    segment: [u32; 64],
    sampler: [u32; 64],
}

const _: () = assert!(size_of::<One>() as u64 == 3 * PART_BYTES, "parts");
const _: () = assert!(time_mix_resident::table_len(1, 1, MAX_CAPACITY) <= 64, "a segment fits");

/// Rows of logits of a pass, at most: 268 MB with a vocabulary of 65,536.
const MAX_LOGIT_ROWS: usize = 1024;

/// Products of one dispatch of `matmul`, at most: three projections and four adapters.
const MAX_JOBS: usize = 7;

#[derive(Clone, Copy, Debug)]
struct Lengths {
    mixed: usize,
    inputs: usize,
    up: usize,
    x: usize,
    hidden: usize,
    normed: usize,
    logits: usize,
}

impl Scratch {
    pub(super) fn new(
        device: &Device,
        config: &ModelConfig,
        resident: Resident,
        rows: usize,
        chunks: bool,
    ) -> Result<Self, Error> {
        let ModelConfig { width, hidden, vocab, ranks, .. } = *config;
        let limits = device.device().limits();
        let max = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size);
        let room = usize::try_from(max / size_of::<f32>() as u64).unwrap_or(usize::MAX);
        let inputs = 3 * width + ranks.w + ranks.a + ranks.v + ranks.g;
        let longest = (MIXES * width).max(inputs).max(hidden);
        // As many as the device binds.
        let rows = rows.min(room / longest);
        let logit_rows = rows.min(MAX_LOGIT_ROWS).min(room / vocab);
        if logit_rows == 0 {
            let bytes = (longest.max(vocab) * size_of::<f32>()) as u64;
            return Err(Error::TooLarge { what: "a row of a pass".to_owned(), bytes, max });
        }
        let len = Lengths {
            mixed: rows * MIXES * width,
            inputs: rows * inputs,
            up: rows * ADAPTERS * width,
            x: rows * width,
            hidden: rows * hidden,
            normed: logit_rows * width,
            logits: logit_rows * vocab,
        };
        let made = checked::<_, Error>(device.device(), || {
            let buffer = |label, words: usize, usage| {
                device.device().create_buffer(&wgpu::BufferDescriptor {
                    label: Some(label),
                    size: (words * size_of::<f32>()).next_multiple_of(16) as u64,
                    usage: usage | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC,
                    mapped_at_creation: false,
                })
            };
            let storage = |label, words| buffer(label, words, wgpu::BufferUsages::STORAGE);
            let uniform = || buffer("params", 4, wgpu::BufferUsages::UNIFORM);
            Self {
                logit_rows,
                tokens: storage("tokens", rows),
                one: storage("one", size_of::<One>() / size_of::<u32>()),
                ahead: storage("ahead", TOGETHER * size_of::<One>() / size_of::<u32>()),
                cursors: storage("cursors", 2 * rows),
                carried: storage("carried", 2 * rows),
                segments: storage("segments", time_mix_resident::table_len(rows, rows, resident.capacity)),
                resident,
                wanted: storage("wanted rows", logit_rows),
                no_cursor: storage("no cursor", 2),
                x: storage("x", len.x),
                mixed: storage("mixed", len.mixed),
                inputs: storage("inputs", len.inputs),
                up: storage("up", len.up),
                factors: chunks.then(|| storage("factors", len.mixed)),
                of_chunks: uniform(),
                v_first: storage("v_first", len.x),
                readout: storage("readout", len.x),
                hidden: storage("hidden", len.hidden),
                normed: storage("normed", len.normed),
                logits: storage("logits", len.logits),
                of_rows: std::array::from_fn(|_| uniform()),
                of_logits: uniform(),
                rows,
                len,
            }
        })?;
        device.queue().write_buffer(&made.no_cursor, 0, bytemuck::bytes_of(&[mix_in::NONE; 2]));
        Ok(made)
    }

    /// Writes the tables of a pass.
    pub(super) fn write(&self, queue: &wgpu::Queue, cursors: &[[u32; 2]], moves: &[&Move], wanted: &[u32]) {
        queue.write_buffer(&self.wanted, 0, bytemuck::cast_slice(wanted));
        queue.write_buffer(&self.cursors, 0, bytemuck::cast_slice(cursors));
        self.write_segments(queue, moves);
    }

    /// Writes where shifts are carried that stay what they were.
    pub(super) fn write_carried(&self, queue: &wgpu::Queue, moves: &[Move]) {
        let mut pairs: Vec<[u32; 2]> = Vec::new();
        for of in moves {
            let from = of.before.slot().index();
            pairs.extend(of.slots[of.slots.len() - of.kept..].iter().map(|&to| [from, to]));
        }
        let rows: u32 = moves.iter().map(|of| of.rows).sum();
        pairs.resize(rows as usize, [carry::NONE; 2]);
        queue.write_buffer(&self.carried, 0, bytemuck::cast_slice(&pairs));
    }

    /// Writes what the heads read of a pass.
    pub(super) fn write_segments(&self, queue: &wgpu::Queue, moves: &[&Move]) {
        queue.write_buffer(&self.segments, 0, bytemuck::cast_slice(&self.segments_of(moves)));
    }

    /// The segments of a pass, as the heads' kernel reads them.
    fn segments_of(&self, moves: &[&Move]) -> Vec<u32> {
        let firsts = moves.iter().scan(0, |end, of| {
            let first = *end;
            *end += of.rows;
            Some(first)
        });
        let all = firsts.zip(moves);
        if self.resident.is_plain() {
            let plain = |(first, of): (u32, &&Move)| {
                [first, of.rows, of.before.base().index(), of.after.base().index()]
            };
            return all.flat_map(plain).collect();
        }
        let pending: Vec<_> = moves.iter().map(|of| of.before.slots()).collect();
        let segments: Vec<_> = all
            .zip(&pending)
            .map(|((first, of), pending)| time_mix_resident::Segment {
                first,
                rows: of.rows,
                from: of.before.base().index(),
                to: of.written(),
                pending,
                slots: if self.resident.capacity == 0 { &[] } else { &of.slots },
                step: of.before.step(),
            })
            .collect();
        time_mix_resident::table(&segments)
    }

    /// The tables of a pass over one token of one sequence, and how it is chosen.
    pub(super) fn table_of_one(&self, of: &Move, sampler: Option<SamplerRow>) -> One {
        let mut one = One { cursor: [0; 64], segment: [0; 64], sampler: [0; 64] };
        one.cursor[..2].copy_from_slice(&[of.before.slot().index(), of.after.slot().index()]);
        let segment = self.segments_of(&[of]);
        one.segment[..segment.len()].copy_from_slice(&segment);
        if let Some(sampler) = &sampler {
            let words: &[u32] = bytemuck::cast_slice(bytemuck::bytes_of(sampler));
            one.sampler[..words.len()].copy_from_slice(words);
        }
        one
    }

    /// Writes the tables of a pass over one token of one sequence.
    pub(super) fn write_one(&self, queue: &wgpu::Queue, of: &Move) {
        queue.write_buffer(&self.one, 0, bytemuck::bytes_of(&self.table_of_one(of, None)));
    }

    /// Writes the tables of passes that are submitted together, each over one token of one sequence.
    pub(super) fn write_ahead(&self, queue: &wgpu::Queue, tables: &[One]) {
        queue.write_buffer(&self.ahead, 0, bytemuck::cast_slice(tables));
    }

    /// Lets the next pass have the tables of one of those.
    pub(super) fn use_ahead(&self, encoder: &mut wgpu::CommandEncoder, at: usize) {
        let bytes = size_of::<One>() as u64;
        encoder.copy_buffer_to_buffer(&self.ahead, at as u64 * bytes, &self.one, 0, bytes);
    }

    /// Where the kernels find what [`Self::write_one`] or [`Self::use_ahead`] wrote: cursor, segment, sampler.
    pub(super) fn parts_of_one(&self) -> [Bound<'_>; 3] {
        let part = |n| Bound::Part { buffer: &self.one, offset: n * PART_BYTES, bytes: PART_BYTES };
        [part(0), part(1), part(2)]
    }

    /// Tells kernels how many rows a pass has.
    pub(super) fn write_shape(&self, queue: &wgpu::Queue, config: &ModelConfig, shape: Shape) {
        for (jobs, buffer) in (1..).zip(&self.of_rows) {
            let params = matmul::Params { rows: shape.rows, jobs };
            queue.write_buffer(buffer, 0, bytemuck::bytes_of(&params));
        }
        let params = matmul::Params { rows: shape.logits, jobs: 1 };
        queue.write_buffer(&self.of_logits, 0, bytemuck::bytes_of(&params));
        let (heads, y_stride) = (count(config.n_heads), count(ADAPTERS * config.width));
        let params = wkv7_chunked_factors::Params { heads, segments: shape.segments, y_stride };
        queue.write_buffer(&self.of_chunks, 0, bytemuck::bytes_of(&params));
    }
}

/// What plans are laid down from.
pub(super) struct Layers<'a> {
    pub(super) device: &'a Device,
    pub(super) config: &'a ModelConfig,
    pub(super) kernels: &'a Kernels,
    pub(super) weights: &'a Weights,
    /// What the head is in.
    pub(super) head_format: Option<quant::Format>,
    pub(super) scratch: &'a Scratch,
    pub(super) records: &'a Records,
}

/// What a kernel says of extents that it cannot do.
pub(super) fn refused<E: std::fmt::Display>(part: &'static str) -> impl Fn(E) -> Error {
    move |why| Error::Extents { part, why: why.to_string() }
}

/// What differs between the forms in the dispatch of the heads.
struct Heads<'a> {
    pipeline: &'a Pipeline,
    /// Lanes, if the adapters' second factors are multiplied in it.
    lora_up: Option<u32>,
    rows: usize,
    segments: Bound<'a>,
    /// Projections and low ranks.
    inputs: &'a wgpu::Buffer,
    /// The adapters' products, if not.
    up: &'a wgpu::Buffer,
    grid: Grid,
    bytes: u64,
}

/// What is multiplied by `matmul` in one dispatch.
struct Product<'a> {
    part: &'static str,
    weights: &'a wgpu::Buffer,
    transposed: bool,
    x: (&'a wgpu::Buffer, usize),
    y: (&'a wgpu::Buffer, usize),
    jobs: Vec<matmul::Job>,
    /// Whether its rows are those of the logits.
    of_logits: bool,
}

impl Layers<'_> {
    pub(super) const fn planner(&self) -> Planner<'_> {
        Planner { device: self.device }
    }

    /// The form for one token of one sequence.
    pub(super) fn step(&self) -> Result<Plan, Error> {
        let Some(kernels) = &self.kernels.step else { return Ok(Plan::default()) };
        let body = vec![self.embed(Grid::Fixed([1; 3]))?];
        let layers = self.each_layer(|weights, records| self.step_layer(kernels, weights, records))?;
        let (s, width) = (self.scratch, self.config.width);
        let stack = [mix_in::Stacked {
            outputs: self.config.vocab,
            mix: None,
            activation: Activation::Identity,
            format: self.head_format,
        }];
        let dims = mix_in::Dims { width, stride: width, offset: 0 };
        let (params, tiles, groups) =
            mix_in::lower(dims, &stack, HEAD_TILES * kernels.mix_tile).map_err(refused("head"))?;
        let tiles = self.planner().table(&tiles);
        let (ln_out, head) = (&self.weights.ln_out, &self.weights.head);
        // The head has no shift: of the state it touches nothing.
        let buffers = [&tiles, &s.no_cursor, &s.x, ln_out, head, &s.normed, &s.logits].map(Bound::Whole);
        let head = self.planner().step(
            "head",
            &kernels.mix_in,
            params,
            &buffers,
            Grid::Fixed(groups),
            head.size(),
        )?;
        Ok(Plan { body, layers, head: vec![head] })
    }

    /// The dispatches of every layer.
    fn each_layer(
        &self,
        of: impl Fn(&Layer, &wgpu::Buffer) -> Result<Mixes, Error>,
    ) -> Result<Vec<Mixes>, Error> {
        self.weights.layers.iter().zip(&self.records.layers).map(|(own, records)| of(own, records)).collect()
    }

    /// What is left of the mixes of a layer that are left out, of one token or of any rows: states go from the records read
    /// to those written.
    pub(super) fn passed_by(&self, one: bool, shifts: SkipShifts) -> Result<Vec<Mixes>, Error> {
        let (s, planner, width) = (self.scratch, self.planner(), self.config.width);
        let rows = if one { 1 } else { s.rows };
        // Nothing is received, written or removed, and by such products of their adapters decays are one and values no
        // layer's but their own: the heads keep what they are, in whatever form, and pending tokens are folded as ever.
        const NEVER: f32 = -1e30;
        let inputs = planner.table(&vec![0.0f32; s.len.inputs / s.rows * rows]);
        let up = planner.table(&vec![NEVER; ADAPTERS * width * rows]);
        let [cursor, segment, _] = s.parts_of_one();
        let cursors = if one { cursor } else { Bound::Whole(&s.cursors) };
        let carried = if one { cursor } else { Bound::Whole(&s.carried) };
        let grid = if one { Grid::Fixed([1; 3]) } else { Grid::Rows };
        self.each_layer(|weights, records| {
            let shift = |part, offset, vectors| match shifts {
                SkipShifts::Refreshed => self.mix(part, offset, 1, vectors, records, (cursors, grid)),
                SkipShifts::Frozen => self.carry(part, offset, records, (carried, grid)),
            };
            let heads = Heads {
                pipeline: &self.kernels.time_mix,
                lora_up: None,
                rows,
                segments: if one { segment } else { Bound::Whole(&s.segments) },
                inputs: &inputs,
                up: &up,
                grid: match one {
                    true => Grid::Fixed([count(self.config.n_heads), 1, 1]),
                    false => Grid::Segments(count(self.config.n_heads)),
                },
                bytes: self.state_bytes(),
            };
            let DeviceLayout { att_shift, ffn_shift, .. } = self.records.layout;
            Ok(Mixes {
                time_mix: vec![shift("ln1", att_shift, &weights.att)?, self.heads(heads, weights, records)?],
                channel_mix: vec![shift("ln2", ffn_shift, &weights.ffn)?],
            })
        })
    }

    /// Norms rows, and shifts them by mixes.
    fn mix(
        &self,
        part: &'static str,
        offset: usize,
        mixes: usize,
        vectors: &wgpu::Buffer,
        records: &wgpu::Buffer,
        (cursors, grid): (Bound<'_>, Grid),
    ) -> Result<Step, Error> {
        let s = self.scratch;
        let dims = mix_rows::Dims {
            rows: s.rows,
            width: self.config.width,
            mixes,
            records: self.records.slots(),
            stride: self.records.layout.slot_words,
            offset,
        };
        let (params, _) = mix_rows::lower(dims).map_err(refused(part))?;
        let slots = self.records.slots_of(records);
        let buffers = [Bound::Whole(&s.x), cursors, Bound::Whole(vectors), slots, Bound::Whole(&s.mixed)];
        self.planner().step(part, &self.kernels.mix_rows, params, &buffers, grid, 0)
    }

    /// Carries a shift from the slots read to those written.
    fn carry(
        &self,
        part: &'static str,
        offset: usize,
        records: &wgpu::Buffer,
        (pairs, grid): (Bound<'_>, Grid),
    ) -> Result<Step, Error> {
        let dims = carry::Dims {
            pairs: self.scratch.rows,
            width: self.config.width,
            records: self.records.slots(),
            stride: self.records.layout.slot_words,
            offset,
        };
        let (params, _) = carry::lower(dims).map_err(refused(part))?;
        let buffers = [pairs, self.records.slots_of(records)];
        self.planner().step(part, &self.kernels.carry, params, &buffers, grid, 0)
    }

    fn step_layer(
        &self,
        kernels: &StepKernels,
        weights: &Layer,
        records: &wgpu::Buffer,
    ) -> Result<Mixes, Error> {
        let (s, planner, layout) = (self.scratch, self.planner(), self.records.layout);
        let ModelConfig { width, hidden, .. } = *self.config;
        let [cursor, segment, _] = s.parts_of_one();
        let mix = |part, offset, stack: &[mix_in::Stacked], vectors, matrix: &wgpu::Buffer, y| {
            let dims = mix_in::Dims { width, stride: layout.slot_words, offset };
            let tile = kernels.stack_tile(stack);
            let (params, tiles, groups) = mix_in::lower(dims, stack, tile).map_err(refused(part))?;
            let tiles = planner.table(&tiles);
            let mut buffers = [&tiles, &s.one, &s.x, vectors, matrix, records, y].map(Bound::Whole);
            buffers[1] = cursor;
            buffers[5] = self.records.slots_of(records);
            planner.step(part, &kernels.mix_in, params, &buffers, Grid::Fixed(groups), matrix.size())
        };
        let key = [mix_in::Stacked {
            outputs: hidden,
            mix: Some(0),
            activation: Activation::SquaredRelu,
            format: weights.format(Matrix::FfnKey),
        }];

        let heads = Heads {
            pipeline: &kernels.time_mix,
            lora_up: Some(kernels.heads_lanes),
            rows: 1,
            segments: segment,
            inputs: &s.inputs,
            // Any other buffer that is only read stands in for it.
            up: &s.inputs,
            grid: Grid::Fixed([count(self.config.n_heads), 1, 1]),
            bytes: weights.up.size() + self.state_bytes(),
        };
        let heads = self.heads(heads, weights, records)?;

        let dims = linear::Dims {
            rows: 1,
            inputs: width,
            outputs: width,
            accumulate: true,
            format: weights.format(Matrix::Output),
        };
        let (params, groups) = linear::lower(dims, kernels.linear_tile).map_err(refused("output"))?;
        let (buffers, bytes) = ([&weights.output, &s.readout, &s.x].map(Bound::Whole), weights.output.size());
        let output = planner.step("output", &kernels.linear, params, &buffers, Grid::Fixed(groups), bytes)?;

        let dims =
            channel_mix_value::Dims { rows: 1, width, hidden, format: weights.format(Matrix::FfnValue) };
        let (params, groups) = channel_mix_value::lower(dims, kernels.columns).map_err(refused("value"))?;
        let (buffers, bytes) = ([&weights.value, &s.hidden, &s.x].map(Bound::Whole), weights.value.size());
        let value = planner.step("value", &kernels.value, params, &buffers, Grid::Fixed(groups), bytes)?;
        let projections = mix(
            "projections",
            layout.att_shift,
            &stack(weights, width),
            &weights.att,
            &weights.stack,
            &s.inputs,
        )?;
        let key = mix("key", layout.ffn_shift, &key, &weights.ffn, &weights.key, &s.hidden)?;
        Ok(Mixes { time_mix: vec![projections, heads, output], channel_mix: vec![key, value] })
    }

    /// A form for several rows, in the tiles for so many of them, and of logits.
    pub(super) fn batch(&self, [rows, logits]: [u32; 2], form: Form) -> Result<Plan, Error> {
        let body = vec![self.embed(Grid::Rows)?];
        let layers = self.each_layer(|weights, records| self.batch_layer(rows, form, weights, records))?;
        let (s, width, vocab) = (self.scratch, self.config.width, self.config.vocab);
        let dims = layer_norm::Dims { of: s.rows, rows: s.logit_rows, width };
        let (params, _) =
            layer_norm::lower(dims, rwkv_core::ops::layer_norm::LN_EPS).map_err(refused("ln_out"))?;
        let [gain, bias] = self.norm("ln_out", &self.weights.ln_out)?;
        let buffers = [Bound::Whole(&s.x), Bound::Whole(&s.wanted), gain, bias, Bound::Whole(&s.normed)];
        let norm =
            self.planner().step("ln_out", &self.kernels.layer_norm, params, &buffers, Grid::LogitRows, 0)?;
        let head = self.product(
            logits,
            Product {
                part: "head",
                weights: &self.weights.head,
                transposed: false,
                x: (&s.normed, s.len.normed),
                y: (&s.logits, s.len.logits),
                jobs: vec![matmul::Job {
                    format: self.head_format,
                    ..job(width, vocab, 0, (0, width), (0, vocab), Activation::Identity)
                }],
                of_logits: true,
            },
        )?;
        Ok(Plan { body, layers, head: vec![norm, head] })
    }

    fn batch_layer(
        &self,
        rows: u32,
        form: Form,
        weights: &Layer,
        records: &wgpu::Buffer,
    ) -> Result<Mixes, Error> {
        let (s, layout) = (self.scratch, self.records.layout);
        let ModelConfig { width, hidden, .. } = *self.config;
        let rows_of = (Bound::Whole(&s.cursors), Grid::Rows);
        let mix = |part, offset, mixes, vectors| self.mix(part, offset, mixes, vectors, records, rows_of);

        let per_row = weights.inputs(width);
        let (mut projections, mut start, mut element) = (Vec::new(), 0, 0);
        for of in stack(weights, width) {
            let mix = of.mix.unwrap_or_default() as usize;
            let (x, y) = ((mix * width, MIXES * width), (start, per_row));
            let job = job(width, of.outputs, element, x, y, of.activation);
            // The heads read the projections, the adapters' second factors what their first make.
            let store = if start < 3 * width { matmul::Store::Put } else { self.read_by_products(0) };
            projections.push(matmul::Job { format: of.format, store, ..job });
            (start, element) = (start + of.outputs, element + stored::len(of.format, of.outputs * width));
        }
        let r = weights.ranks;
        let (mut adapters, mut rank) = (Vec::new(), 0);
        for (i, own) in [r.w, r.a, r.v, r.g].into_iter().enumerate().filter(|(_, own)| *own > 0) {
            let (x, y) = ((3 * width + rank, per_row), (i * width, ADAPTERS * width));
            let job = job(own, width, rank * width / 8, x, y, Activation::Identity);
            adapters.push(matmul::Job { row: width, ..job });
            rank += own;
        }
        let product = |product| self.product(rows, product);
        let all = |part, weights, x, y, jobs| Product {
            part,
            weights,
            transposed: false,
            x,
            y,
            jobs,
            of_logits: false,
        };
        let (x, inputs) = ((&s.x, s.len.x), (&s.inputs, s.len.inputs));
        let (mixed, hidden_rows) = ((&s.mixed, s.len.mixed), (&s.hidden, s.len.hidden));
        let identity = Activation::Identity;
        let output = matmul::Job {
            exponent: READOUT_EXPONENT,
            store: matmul::Store::Add,
            format: weights.format(Matrix::Output),
            ..job(width, width, 0, (0, width), (0, width), identity)
        };
        let key = matmul::Job {
            format: weights.format(Matrix::FfnKey),
            store: self.read_by_products(HIDDEN_EXPONENT),
            ..job(width, hidden, 0, (0, width), (0, hidden), Activation::SquaredRelu)
        };
        let value = matmul::Job {
            row: width,
            exponent: HIDDEN_EXPONENT,
            store: matmul::Store::Add,
            format: weights.format(Matrix::FfnValue),
            ..job(hidden, width, 0, (0, hidden), (0, width), identity)
        };

        let mut time_mix = vec![
            mix("ln1", layout.att_shift, MIXES, &weights.att)?,
            product(all("projections", &weights.stack, mixed, inputs, projections))?,
            product(Product {
                transposed: true,
                ..all("adapters", &weights.up, inputs, (&s.up, s.len.up), adapters)
            })?,
        ];
        match &self.kernels.scan {
            Some(kernels) if form != Form::Few => {
                time_mix.extend(self.scan(kernels, form, weights, records)?);
            }
            _ => time_mix.push(self.heads(
                Heads {
                    pipeline: if rows <= FEW_SEQUENCES {
                        &self.kernels.time_mix_few
                    } else {
                        &self.kernels.time_mix
                    },
                    lora_up: None,
                    rows: s.rows,
                    segments: Bound::Whole(&s.segments),
                    inputs: &s.inputs,
                    up: &s.up,
                    grid: Grid::Segments(count(self.config.n_heads)),
                    bytes: self.state_bytes(),
                },
                weights,
                records,
            )?),
        }
        let readout_to_x = all("output", &weights.output, (&s.readout, s.len.x), x, vec![output]);
        time_mix.extend(self.added(rows, readout_to_x)?);
        let mut channel_mix = vec![
            mix("ln2", layout.ffn_shift, 1, &weights.ffn)?,
            product(all("key", &weights.key, mixed, hidden_rows, vec![key]))?,
        ];
        let hidden_to_x =
            Product { transposed: true, ..all("value", &weights.value, hidden_rows, x, vec![value]) };
        channel_mix.extend(self.added(rows, hidden_to_x)?);
        Ok(Mixes { time_mix, channel_mix })
    }

    /// A product that is added to the residual stream, its inputs divided where that is faster.
    fn added(&self, rows: u32, of: Product<'_>) -> Result<Vec<Step>, Error> {
        let (s, job, width) = (self.scratch, of.jobs[0], self.config.width);
        let long = job.inputs >= MANY_INPUTS && job.inputs.is_multiple_of(8 * ADAPTERS);
        match &self.kernels.add_planes {
            Some(pipeline) if rows <= FEW && long && job.format.is_none() => {
                // The adapters' products were read.
                let (part, jobs) = (of.part, divided(job, of.transposed));
                let planes = self.product(rows, Product { y: (&s.up, s.len.up), jobs, ..of })?;
                let dims = extents::Dims { rows: s.rows, width };
                let (params, [each, ..]) = add_planes::lower(dims, ADAPTERS).map_err(refused(part))?;
                let (buffers, grid) = ([&s.up, &s.x].map(Bound::Whole), Grid::EachRow(each));
                Ok(vec![planes, self.planner().step("sum", pipeline, params, &buffers, grid, 0)?])
            }
            _ => Ok(vec![self.product(rows, of)?]),
        }
    }

    /// How products are stored that other products read, divided by two to such a power if they are halves.
    const fn read_by_products(&self, exponent: u8) -> matmul::Store {
        if self.kernels.coop { matmul::Store::Halves(exponent) } else { matmul::Store::Put }
    }

    /// What is in the place of `time_mix` for prompts. The operands take the place of the rows that were mixed, which were
    /// read, and the state's answers that of the decay adapter's products.
    fn scan(
        &self,
        kernels: &ScanKernels,
        form: Form,
        weights: &Layer,
        records: &wgpu::Buffer,
    ) -> Result<Vec<Step>, Error> {
        const { assert!(wkv7_scan::OPERANDS == MIXES, "`mixed` holds the operands") };
        let (s, layout, planner) = (self.scratch, self.records.layout, self.planner());
        let ModelConfig { n_heads: heads, width, .. } = *self.config;
        let (rows, each) = (s.rows, Grid::EachRow(count(heads)));
        let (format, _, lazy) = self.kernels.held.parts();

        let first_layer = weights.ranks.v == 0;
        let dims = time_mix_operands::Dims { rows, heads, inputs: weights.inputs(width), first_layer };
        let (params, _) = time_mix_operands::lower(dims).map_err(refused("operands"))?;
        let buffers = [&s.inputs, &s.up, &weights.heads, &s.v_first, &s.mixed].map(Bound::Whole);
        let operands = planner.step("operands", &kernels.operands, params, &buffers, each, 0)?;

        let (stride, y_stride) = (layout.base_words, ADAPTERS * width);
        let mut steps = vec![operands];
        match (&kernels.chunked, &s.factors) {
            (Some(of), Some(factors)) if form == Form::Chunked => {
                let dims = wkv7_chunked::Dims { rows, segments: 1, heads, stride, offset: 0, y_stride };
                steps.extend(self.chunked(of, dims, factors, records)?);
            }
            _ => {
                let pending = lazy.then(|| wkv7_scan::Pending {
                    capacity: self.records.resident.capacity,
                    slots: self.records.slots(),
                    start: self.records.slot_start(),
                    stride: layout.slot_words,
                    entry: layout.entry,
                });
                let dims = wkv7_scan::Dims {
                    rows,
                    segments: 1,
                    heads,
                    format,
                    stride,
                    offset: 0,
                    y_stride,
                    pending,
                };
                let kernel = kernels.scan.kernel();
                let (params, [groups, ..]) = wkv7_scan::lower(kernel, dims).map_err(refused(HEADS))?;
                let buffers = [&s.segments, &s.mixed, records, &s.up].map(Bound::Whole);
                let grid = Grid::Segments(groups);
                steps.push(planner.step(HEADS, &kernels.scan, params, &buffers, grid, self.state_bytes())?);
            }
        }

        let dims = readout_packed::Dims { rows, heads };
        let (params, _) = readout_packed::lower(dims).map_err(refused("readout"))?;
        let buffers = [&s.mixed, &s.up, &weights.heads, &s.readout].map(Bound::Whole);
        steps.push(planner.step("readout", &kernels.readout, params, &buffers, each, 0)?);
        Ok(steps)
    }

    /// What is in the place of `wkv7_scan` by chunks.
    fn chunked(
        &self,
        kernels: &ChunkKernels,
        dims: wkv7_chunked::Dims,
        factors: &wgpu::Buffer,
        records: &wgpu::Buffer,
    ) -> Result<[Step; 2], Error> {
        let (s, planner, chunk) = (self.scratch, self.planner(), kernels.chunk);
        let wkv7_chunked::Dims { rows, heads, y_stride, .. } = dims;
        let of = wkv7_chunked_factors::Dims { rows, segments: s.logit_rows, heads, chunk, y_stride };
        wkv7_chunked_factors::lower(of).map_err(refused("factors"))?;
        let buffers = [&s.segments, &s.mixed, factors, &s.up].map(Bound::Whole);
        let (params, grid) = (&s.of_chunks, Grid::Chunks { x: count(heads), rows: count(chunk) });
        let of_factors = planner.step_with("factors", &kernels.factors, params, &buffers, grid, 0)?;

        let (params, [groups, ..]) = wkv7_chunked::lower(dims).map_err(refused(HEADS))?;
        let buffers = [&s.segments, &s.mixed, factors, records, &s.up].map(Bound::Whole);
        let grid = Grid::Segments(groups);
        let update = planner.step(HEADS, &kernels.update, params, &buffers, grid, self.state_bytes())?;
        Ok([of_factors, update])
    }

    /// Gain and bias of a norm, of which `vectors` begin with them.
    pub(super) fn norm<'b>(
        &self,
        part: &'static str,
        vectors: &'b wgpu::Buffer,
    ) -> Result<[Bound<'b>; 2], Error> {
        let width = self.config.width;
        let section = |rows: std::ops::Range<usize>| Bound::section(part, vectors, rows, size_of::<f32>());
        Ok([section(0..width)?, section(width..2 * width)?])
    }

    pub(super) fn embed(&self, grid: Grid) -> Result<Step, Error> {
        let (s, ModelConfig { vocab, width, .. }) = (self.scratch, *self.config);
        let dims = embedding::Dims { rows: s.rows, vocab, width };
        let (params, _) = embedding::lower(dims).map_err(refused("embedding"))?;
        let [gain, bias] = self.norm("embedding", &self.weights.ln0)?;
        let (tokens, table) = (Bound::Whole(&s.tokens), Bound::Whole(&self.weights.embedding));
        let buffers = [tokens, table, gain, bias, Bound::Whole(&s.x)];
        let pipeline = &self.kernels.embedding;
        self.planner().step("embedding", pipeline, params, &buffers, grid, 2 * width as u64)
    }

    /// A product of so many rows.
    fn product(&self, rows: u32, of: Product<'_>) -> Result<Step, Error> {
        let s = self.scratch;
        let (tile, pipeline) = self.kernels.matmul(of.part, rows, &of.jobs, of.transposed)?;
        let dims = matmul::Dims {
            rows: if of.of_logits { s.logit_rows } else { s.rows },
            tile,
            transposed: of.transposed,
            weights: usize::try_from(of.weights.size()).unwrap_or(usize::MAX) / 16,
            x: of.x.1,
            y: of.y.1,
        };
        let (_, records, [x, ..]) = matmul::lower(dims, &of.jobs).map_err(refused(of.part))?;
        let (params, grid) = if of.of_logits {
            (&s.of_logits, Grid::LogitTiles { x, rows: tile.rows })
        } else {
            (&s.of_rows[of.jobs.len() - 1], Grid::Tiles { x, rows: tile.rows })
        };
        let jobs = self.planner().table(&records);
        let buffers = [&jobs, of.weights, of.x.0, of.y.0].map(Bound::Whole);
        self.planner().step_with(of.part, pipeline, params, &buffers, grid, of.weights.size())
    }

    fn heads(&self, of: Heads<'_>, weights: &Layer, records: &wgpu::Buffer) -> Result<Step, Error> {
        let (s, layout, planner) = (self.scratch, self.records.layout, self.planner());
        let ModelConfig { n_heads: heads, head_size, width, .. } = *self.config;
        let (rows, ranks, inputs, offset) = (of.rows, weights.ranks, weights.inputs(width), 0);
        let mut buffers =
            [of.inputs, of.inputs, &weights.up, of.up, &weights.heads, records, &s.v_first, &s.readout]
                .map(Bound::Whole);
        buffers[0] = of.segments;
        match self.kernels.held {
            Held::Plain => {
                let stride = layout.base_words;
                let dims =
                    time_mix::Dims { rows, segments: 1, heads, head_size, ranks, inputs, stride, offset };
                let (params, _) = time_mix::lower(dims, of.lora_up).map_err(refused(HEADS))?;
                planner.step(HEADS, of.pipeline, params, &buffers, of.grid, of.bytes)
            }
            Held::Resident { format, .. } => {
                let dims = time_mix_resident::Dims {
                    rows,
                    segments: 1,
                    heads,
                    head_size,
                    ranks,
                    inputs,
                    format,
                    capacity: self.records.resident.capacity,
                    base_stride: layout.base_words,
                    slots: self.records.slot_start(),
                    slot_stride: layout.slot_words,
                    entry: layout.entry,
                    state: usize::try_from(records.size()).unwrap_or(usize::MAX) / size_of::<u32>(),
                };
                let (params, _) = time_mix_resident::lower(dims, of.lora_up).map_err(refused(HEADS))?;
                planner.step(HEADS, of.pipeline, params, &buffers, of.grid, of.bytes)
            }
        }
    }

    /// What the heads read and write of one sequence's state in a layer, on average over the tokens of a period.
    pub(super) const fn state_bytes(&self) -> u64 {
        let (layout, capacity) = (self.records.layout, self.records.resident.capacity);
        let (base, entry) = (layout.base_words as u64 * 4, (ENTRY * layout.width) as u64 * 4);
        match capacity as u64 {
            0 => 2 * base,
            // After a fold none is read, then one, and so on: of each four vectors, and the fifth of the last.
            c => base + base / c + entry * (c - 1) / 2 + entry,
        }
    }
}

/// A product whose inputs, halves, are divided among as many jobs as `up` has planes, each of which takes one.
fn divided(of: matmul::Job, transposed: bool) -> Vec<matmul::Job> {
    let (inputs, width) = (of.inputs / ADAPTERS, of.outputs);
    let part = |p| {
        // Halves are two to a word, weights eight to an element.
        let x = Rows { offset: of.x.offset + p * inputs / 2, ..of.x };
        let y = Rows { offset: p * width, stride: ADAPTERS * width };
        let weights = of.weights + p * inputs * if transposed { width } else { 1 } / 8;
        matmul::Job { inputs, weights, x, y, store: matmul::Store::Put, ..of }
    };
    (0..ADAPTERS).map(part).collect()
}

/// The matrices that read the shifted token, as they are stacked.
fn stack(weights: &Layer, width: usize) -> Vec<mix_in::Stacked> {
    let r = weights.ranks;
    let all = [
        (width, MIX_R, Activation::Identity, weights.format(Matrix::Receptance)),
        (width, MIX_K, Activation::Identity, weights.format(Matrix::Key)),
        (width, MIX_V, Activation::Identity, weights.format(Matrix::Value)),
        (r.w, MIX_W, Activation::Tanh, None),
        (r.a, MIX_A, Activation::Identity, None),
        (r.v, MIX_V, Activation::Identity, None),
        (r.g, MIX_G, Activation::Sigmoid, None),
    ];
    let stacked =
        |(outputs, mix, activation, format)| mix_in::Stacked { outputs, mix: Some(mix), activation, format };
    all.into_iter().filter(|(outputs, ..)| *outputs > 0).map(stacked).collect()
}

/// A job of `matmul`, not transposed, of inputs that halves hold as they are; rows by offset and stride.
fn job(
    inputs: usize,
    outputs: usize,
    weights: usize,
    x: (usize, usize),
    y: (usize, usize),
    activation: Activation,
) -> matmul::Job {
    let rows = |(offset, stride)| Rows { offset, stride };
    let (x, y) = (rows(x), rows(y));
    let store = matmul::Store::Put;
    let row = inputs;
    matmul::Job { inputs, outputs, weights, row, format: None, x, exponent: 0, y, activation, store }
}
