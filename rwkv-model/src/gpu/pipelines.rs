//! The kernels of a model, compiled in the best variants that a device has, and how work is divided among their workgroups.

use rwkv_core::ModelConfig;
use rwkv_core::model::Wkv;
use rwkv_kernels::gpu::Device;
use rwkv_kernels::kernels::time_mix_resident::{Format, Rounding};
use rwkv_kernels::kernels::{
    add_planes, carry, embedding, layer_norm, mix_rows, packed, readout_packed, sample, time_mix,
    time_mix_batch, time_mix_operands, time_mix_resident, wkv7_chunked, wkv7_chunked_factors, wkv7_fours,
    wkv7_scan,
};
use rwkv_kernels::pipeline::Pipeline;
use rwkv_kernels::{Capabilities, Kernel, choose};
use rwkv_state::{Resident, ResidentRounding, StateFormat};

use super::layer::{ADAPTERS, refused};
use super::plan::Shape;
use super::products::{Multiplies, coop};
use super::step::StepKernels;
use super::{Error, Setup, count};
use crate::recipe::Matrix;

/// The matrices that lie with their outputs as rows, and are multiplied by the kernels for those.
pub(super) const STRAIGHT: [Matrix; 6] =
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
    pub(super) matmul: Multiplies,
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

/// The forms for several rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Form {
    /// A few tokens of each sequence.
    Few,
    /// Prompts, one token after the other.
    Scan,
    /// Prompts, four tokens to a sum.
    Fours(Fours),
    /// Prompts, by chunks.
    Chunked,
}

/// What `wkv7_fours` is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Fours {
    /// Rows of a state to a workgroup.
    pub(super) rows_each: usize,
    /// Tokens that are staged at a time.
    stage: usize,
}

impl Fours {
    /// What there is where a workgroup has so much memory: from the fewest rows to the most, with as many tokens staged as there
    /// can be, and then the most rows with fewer tokens, of which a processor holds two.
    fn all(workgroup_bytes: usize) -> Vec<Self> {
        let staged = |rows_each| {
            let fits = move |of: &Self| wkv7_fours::workgroup_bytes(rows_each, of.stage) <= workgroup_bytes;
            wkv7_fours::STAGES.map(|stage| Self { rows_each, stage }).into_iter().filter(fits)
        };
        let mut all: Vec<_> =
            wkv7_fours::ROWS.into_iter().filter_map(|rows_each| staged(rows_each).next()).collect();
        all.extend(wkv7_fours::ROWS.last().and_then(|&most| staged(most).nth(1)));
        all
    }

    /// Of those, the first whose workgroups for so many heads of all sequences are at work at once, where a processor holds one; or
    /// else the last.
    fn best(all: impl Iterator<Item = Self> + Clone, heads: u32) -> Option<Self> {
        let groups = |of: &Self| heads.saturating_mul(count(wkv7_fours::HEAD_SIZE / of.rows_each));
        all.clone().find(|of| groups(of) <= PROCESSORS).or_else(|| all.last())
    }
}

/// What is in the place of `time_mix` for prompts.
#[derive(Debug)]
pub(super) struct ScanKernels {
    pub(super) operands: Pipeline,
    pub(super) scan: Pipeline,
    /// In the place of `scan`, from the fewest rows of a state to a workgroup to the most, and then those of which a processor holds
    /// two: where nothing else is asked for, and the device has the subgroups.
    pub(super) fours: Vec<(Fours, Pipeline)>,
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

/// `wkv7_fours`, where it may take the place of `wkv7_scan`. Measured on an H100 against that, 2,048 tokens: 218 us for 420 with 16
/// heads, 244 for 422 with 32, 361 for 541 with 64; 512 tokens: 57 for 111 with 16. Of prompts side by side, with as few tokens staged
/// as there can be: 8 of 512 tokens and 32 heads 362 for 370 with more, 32 of 64 tokens 201 for 222.
fn fours(device: &Device, setup: &Setup) -> Result<Vec<(Fours, Pipeline)>, Error> {
    let kernel = best(device, wkv7_fours::VARIANTS)?;
    if setup.wkv.is_some() || setup.batch_invariant || !setup.state.is_plain() || !kernel.features.subgroup {
        return Ok(Vec::new());
    }
    let compiled = |of: Fours| {
        let overrides = [("ROWS", f64::from(count(of.rows_each))), ("STAGE", f64::from(count(of.stage)))];
        Ok((of, compile(device, [kernel], &overrides)?))
    };
    Fours::all(device.capabilities().workgroup_bytes as usize).into_iter().map(compiled).collect()
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

/// Processors of the GPUs that tiles were measured on, an H100 and an H200.
pub(super) const PROCESSORS: u32 = 132;

/// Invocations of runs of rows that keep each of them busy: 2,048 rows of 1.5B are mixed in 23.5 us with so many, in 25.1 with
/// twice as many and in 40 with half (H200).
pub(super) const LANES_OF_RUNS: u32 = 1024;

/// Runs of rows that keep a CPU busy: a few for each of its threads.
pub(super) const RUNS_ON_CPU: u32 = 16;

/// Rows up to which a head has more lanes than [`Held::batch_lanes`], and how many. On an H100, a step of 1.5B and 32 sequences
/// takes 2.91 ms with 128, 2.95 with 64 and 3.05 with 256.
const FEW_SEQUENCES: u32 = 32;
const FEW_LANES: u32 = 128;

/// Rows up to which products that are added to the residual stream have too few tiles of outputs to keep an H100 busy, so that their
/// inputs are divided. Of 1.5B the output takes 19 us for 20 at 32 rows and 22 for 27 at 128, the value 29 for 40 and 40 for 66.
pub(super) const FEW: u32 = 256;

/// Lanes of a workgroup that mixes rows. On an H100, a step of 1.5B and 32 sequences takes 2.91 ms, and 3.00 with half as many.
const MIX_LANES: u32 = 512;

/// What the hidden units of the channel mix are divided by before they are rounded to halves, as a power of two: they are
/// squares. books-10m has some beyond 1e5; up to 1.6e7 they are off by no more than half a unit, or 7.6e-6.
pub(super) const HIDDEN_EXPONENT: u8 = 8;

/// The same for the gated readout, which has no bound either: up to 1e6, or 4.8e-7.
pub(super) const READOUT_EXPONENT: u8 = 4;

/// The best variant of a kernel that a device has.
pub(super) fn best<'a>(
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
    // gave out; rows are counted from the tokens, of which there are no more than the scratch has rows. The cursors of a pass end with
    // a mark, so that runs of rows end there, and a dispatch has as many rows to a run as its parameters say.
    #[expect(unsafe_code, reason = "a plan's buffers hold what its parameters say")]
    let pipeline = unsafe { Pipeline::new_unchecked(device.device(), kernel, overrides, device.cache()) };
    Ok(pipeline?)
}

/// Lanes of a workgroup, as far as the device has them. Where lanes are not wide, on the CPU, they only cost.
pub(super) fn lanes(device: &Device) -> impl Fn(u32) -> u32 {
    let most = if device.is_gpu() { 1 << device.capabilities().invocations.ilog2() } else { 64 };
    move |wanted| wanted.min(most)
}

impl Kernels {
    pub(super) fn new(device: &Device, config: &ModelConfig, setup: &Setup) -> Result<Self, Error> {
        let lanes = lanes(device);
        let norm = [("LANES", f64::from(lanes(256)))];
        let coop = coop(device, config);
        let matmul = Multiplies::new(device, coop, setup.batch_invariant)?;
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
        let heads = shape.segments.saturating_mul(count(config.n_heads));
        Fours::best(of.fours.iter().map(|&(fours, _)| fours), heads).map_or(Form::Scan, Form::Fours)
    }

    /// Whether passes may go by chunks.
    pub(super) fn has_chunks(&self) -> bool {
        self.scan.as_ref().is_some_and(|of| of.chunked.is_some())
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

/// What is left to do of what the heads' kernels answer, where the norm is not in them.
pub(super) fn readout_of_heads(
    device: &Device,
    setup: &Setup,
    written: Option<u8>,
) -> Result<Option<Pipeline>, Error> {
    let overrides = [packed::halves(written), readout_packed::of_heads()];
    let compiled = || compile(device, readout_packed::VARIANTS, &overrides);
    setup.norm_apart().then(compiled).transpose()
}

#[cfg(test)]
mod tests {
    use super::Fours;

    #[test]
    fn workgroups_of_a_state_update_are_no_more_than_processors_if_they_can() {
        let all = Fours::all(48 << 10);
        let of = |rows_each, stage| Fours { rows_each, stage };
        assert_eq!(all, [of(8, 32), of(16, 32), of(32, 32), of(32, 16)]);
        // 132 processors
        for (heads, want) in [(1, 0), (16, 0), (17, 1), (33, 1), (34, 2), (66, 2), (67, 3), (u32::MAX, 3)] {
            assert_eq!(Fours::best(all.iter().copied(), heads), Some(all[want]), "{heads} heads");
        }
        let all = Fours::all(32 << 10);
        assert_eq!(all, [of(8, 16), of(16, 16), of(32, 16)], "with less memory");
        assert_eq!(Fours::best(all.iter().copied(), 1000), Some(of(32, 16)));
        assert_eq!(
            (Fours::all(16 << 10), Fours::best([].into_iter(), 1)),
            (Vec::new(), None),
            "with too little"
        );
    }
}
