//! The GPU executor: a model's weights on a device, sequences in records, passes that are laid down once.
//!
//! | part | what it holds |
//! |---|---|
//! | `weights` | the model, as the kernels read it |
//! | `records` | what sequences leave behind: states as they were written, and what tokens did since |
//! | `pipelines` | the kernels, in the best variants that the device has |
//! | `step` | those for one token of one sequence, and how their work is divided |
//! | `products` | `matmul`: tiles by rows, and pipelines that are compiled when they are first asked for |
//! | `scratch` | the buffers between dispatches, and the tables that tell kernels of a pass |
//! | `layer` | the dispatches of a layer, fused: five for one token, and what other forms share with it |
//! | `batch` | those over several rows: eight side by side, ten or more of prompts |
//! | `unfused` | the dispatches of a layer, one for each operation: what fusion is measured against |
//! | `plan` | a pass, laid down once |
//! | `ahead` | tokens generated ahead of the host |
//! | `chosen` | the same of many sequences side by side |
//! | `profile` | how long each dispatch took |
//!
//! Passes are encoded and submitted under a lock, in order, and the host does not wait for them: only for logits or
//! tokens that it asks for. Whatever goes wrong on the device in between shows at the next call.

mod ahead;
mod batch;
mod chosen;
mod layer;
mod pipelines;
mod plan;
mod products;
mod profile;
mod records;
mod scratch;
mod step;
mod unfused;
mod weights;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rwkv_core::ModelConfig;
use rwkv_core::model::{Logits, Skip, SkipShifts, Wkv};
use rwkv_core::ops::mix_rows;
use rwkv_core::ops::wkv7_lazy::ENTRY;
use rwkv_kernels::gpu::{self as device, Device};
use rwkv_kernels::kernels::time_mix::HEAD_SIZE;
use rwkv_kernels::pipeline::checked;
use rwkv_kernels::{kernels, pipeline};
use rwkv_state::layout::{DeviceLayout, DeviceState};
use rwkv_state::{Resident, ResidentRounding};

pub(crate) use self::ahead::Ahead;
pub(crate) use self::chosen::{Chooser, Chosen, Input, Part};
use self::pipelines::{Form, Kernels};
use self::plan::{Mixes, Plan, Shape};
use self::products::Multiplies;
pub use self::profile::{Dispatch, Profile};
pub(crate) use self::records::Record;
use self::records::{Move, Place, Records};
use self::scratch::{Scratch, Seat};
use self::unfused::Unfused;
use self::weights::Weights;
use crate::checkpoint::{self, Checkpoint, Progress};
use crate::recipe::{Matrix, Recipe};

/// Why the GPU executor cannot do something.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no device, or it did not do as asked.
    #[error(transparent)]
    Device(#[from] device::Error),
    /// A kernel could not be compiled or bound.
    #[error(transparent)]
    Pipeline(#[from] pipeline::Error),
    /// The device refused a buffer, for want of memory for instance.
    #[error("the device refused: {0}")]
    Refused(#[from] wgpu::Error),
    /// The device stopped working.
    #[error("the device failed: {0}")]
    Lost(String),
    /// The device did not finish.
    #[error("the device did not finish: {0}")]
    Poll(#[from] wgpu::PollError),
    /// A buffer could not be mapped.
    #[error("a buffer could not be mapped: {0}")]
    Map(#[from] wgpu::MapRangeError),
    /// The checkpoint.
    #[error(transparent)]
    Checkpoint(checkpoint::Error),
    /// A model that the kernels are not made for.
    #[error("heads of {got} channels: the kernels are made for {want}")]
    HeadSize {
        /// Of the model.
        got: usize,
        /// Of the kernels.
        want: usize,
    },
    /// Weights in blocks, without fusion.
    #[error("weights cannot be {0}: without fusion they are halves")]
    Weights(Recipe),
    /// Extents that a kernel cannot do.
    #[error("{part}: {why}")]
    Extents {
        /// What of a pass.
        part: &'static str,
        /// What the kernel says.
        why: String,
    },
    /// A buffer larger than the device binds.
    #[error("{what}: {bytes} bytes, the device binds {max}")]
    TooLarge {
        /// What it holds.
        what: String,
        /// What it takes.
        bytes: u64,
        /// What there can be.
        max: u64,
    },
    /// More states than the device holds.
    #[error(
        "{bases} states and {slots} tokens after them take {bytes} bytes a layer, the device binds {max}"
    )]
    States {
        /// States as they were written.
        bases: u64,
        /// Tokens that are pending, or the last before those.
        slots: u64,
        /// What they take.
        bytes: u64,
        /// What there can be.
        max: u64,
    },
    /// More rows of logits than the device holds.
    #[error("the logits of {wanted} tokens, the device holds {max}")]
    Logits {
        /// As many as would be there.
        wanted: u64,
        /// As many as there can be.
        max: u64,
    },
    /// States that the kernels have no form for.
    #[error("states held as {0:?}: {1}")]
    Resident(Resident, &'static str),
    /// A form of the state update that there is not.
    #[error("the state update by chunks of {0} tokens: {1}")]
    Chunks(usize, &'static str),
    /// Layers cannot be left out.
    #[error("layers are not left out where {0}")]
    Skip(&'static str),
    /// Several sequences in a pass that runs one operation after the other.
    #[error("{got} sequences in a pass: without fusion there is one")]
    Unfused {
        /// As many as there were.
        got: usize,
    },
}

/// Rows of a pass at most: as many workgroups as a dispatch holds along an axis.
const MAX_ROWS: usize = 65_535;

/// The same for drivers that run on the CPU. Mesa's counts the iterations of all loops of an invocation, and after 65,535
/// it leaves every loop at once, without a word. The heads take up to 135 for each token of a sequence.
const MAX_SOFTWARE_ROWS: usize = 256;

/// Dispatches of a pass that are submitted first; then twice as many, and so on, so that the device never waits for the host
/// nor is often interrupted.
const FIRST_STEPS: usize = 16;

/// Whether there is a real GPU, and kernels for the model.
pub(crate) fn suits(config: &ModelConfig) -> bool {
    let real = || device::adapters().first().is_some_and(|of| of.device_type != wgpu::DeviceType::Cpu);
    config.head_size == HEAD_SIZE && real()
}

/// How the executor is set up.
#[derive(Clone, Debug, Default)]
pub(crate) struct Setup {
    pub(crate) adapter: Option<String>,
    pub(crate) weights: Recipe,
    pub(crate) state: Resident,
    pub(crate) wkv: Option<Wkv>,
    pub(crate) sessions: usize,
    pub(crate) pass_tokens: usize,
    pub(crate) skip_zeros: bool,
    pub(crate) batch_invariant: bool,
    pub(crate) fused: bool,
    pub(crate) fused_norm: bool,
    pub(crate) portable: bool,
    pub(crate) timestamps: bool,
    pub(crate) pipeline_cache: Option<PathBuf>,
}

impl Setup {
    /// Whether the heads' norm is by itself though operations are fused.
    const fn norm_apart(&self) -> bool {
        self.fused && !self.fused_norm
    }

    /// Whether some matrices are in blocks.
    fn has_blocks(&self, config: &ModelConfig) -> bool {
        self.weights.blocks(config.n_layers, &Matrix::ALL).any(|of| of.is_some())
    }
}

/// A sequence's share of a pass.
/// It has at least one token.
#[derive(Debug)]
pub(crate) struct Job<'a> {
    pub(crate) tokens: &'a [u32],
    /// Where the sequence stands; moved on by the pass.
    pub(crate) record: &'a mut Record,
    pub(crate) logits: Logits,
}

/// A model on a device.
#[derive(Debug)]
pub(crate) struct Executor {
    device: Device,
    config: ModelConfig,
    setup: Setup,
    kernels: Kernels,
    weights: Weights,
    scratch: Scratch,
    unfused: Option<Unfused>,
    work: Mutex<Work>,
}

/// What changes from pass to pass.
#[derive(Debug)]
struct Work {
    records: Records,
    /// For one token of one sequence, if the device has the memory for it, by where it is told what to do.
    steps: BTreeMap<Seat, Plan>,
    /// For any number, by the rows that they are laid down for, rows of logits, form, and whether mixes may be left out.
    batch: BTreeMap<([u32; 2], Form, bool), Plan>,
    /// One dispatch for each operation, by rows and rows of logits: of one token, and of the last other pass.
    unfused: BTreeMap<[u32; 2], Plan>,
    /// In place of mixes that are left out, with their shifts frozen or not.
    passed_by: BTreeMap<(Seat, bool), Vec<Mixes>>,
    /// The logits that are a row of the scratch, by number, and which row.
    holds: Option<(u32, usize)>,
    /// What kernels were last told of the extents of a pass.
    told: Option<Shape>,
    profile: Option<profile::Recorder>,
}

/// A plan among those of [`Work`].
#[derive(Clone, Copy, Debug)]
enum Laid {
    Step(Seat),
    Batch(([u32; 2], Form, bool)),
    Unfused([u32; 2]),
}

/// A pass that is to be encoded.
struct Pass<'a> {
    seat: Seat,
    skip: Skip<'a>,
    /// Dispatches to go before it and after it.
    first: Option<&'a plan::Step>,
    last: Option<&'a plan::Step>,
}

impl Pass<'_> {
    /// Where in [`Work::passed_by`] what goes on in place of mixes that are left out is.
    fn replaced(&self) -> (Seat, bool) {
        (self.seat, self.skip.shifts == SkipShifts::Frozen)
    }
}

impl Work {
    /// A plan that was laid down.
    fn plan(&self, laid: Laid) -> &Plan {
        match laid {
            Laid::Step(seat) => &self.steps[&seat],
            Laid::Batch(key) => &self.batch[&key],
            Laid::Unfused(key) => &self.unfused[&key],
        }
    }

    /// Forgets plans that are bound to buffers which are no longer used.
    fn laid_anew(&mut self, grown: bool) {
        if grown {
            self.steps.clear();
            self.batch.clear();
            self.unfused.clear();
            self.passed_by.clear();
        }
    }
}

impl Executor {
    /// Opens a device and uploads the model; `progress` is told how loading goes, from several threads.
    pub(crate) fn open(
        checkpoint: &Checkpoint,
        mut setup: Setup,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<Self, Error> {
        let config = *checkpoint.config();
        if config.head_size != HEAD_SIZE {
            return Err(Error::HeadSize { got: config.head_size, want: HEAD_SIZE });
        }
        checkpoint.check(&setup.weights).map_err(Error::Checkpoint)?;
        setup.weights = setup.weights.over(checkpoint.recipe(), config.n_layers);
        if !setup.fused && setup.has_blocks(&config) {
            return Err(Error::Weights(setup.weights));
        }
        pipelines::check_chunks(&setup)?;
        let all = !setup.portable;
        let features = rwkv_kernels::Features { f16: all, subgroup: all, coop: all };
        let request = device::Request {
            adapter: setup.adapter.clone(),
            features,
            timestamps: setup.timestamps,
            cache: setup.pipeline_cache.clone(),
        };
        let device = Device::open_with(&request)?;
        let (kernels, weights) = rayon::join(
            || Kernels::new(&device, &config, &setup),
            || Weights::upload(&device, checkpoint, &setup.weights, progress),
        );
        let (kernels, weights) = (kernels?, weights?);
        let rows = setup.pass_tokens.min(if device.is_gpu() { MAX_ROWS } else { MAX_SOFTWARE_ROWS });
        let scratch = Scratch::new(&device, &config, setup.state, rows, kernels.has_chunks())?;
        let unfused = || Unfused::new(&device, &config, scratch.rows, setup.skip_zeros);
        let unfused = (!setup.fused).then(unfused).transpose()?;
        device.save_cache()?;
        let records = Records::new(&device, &config, setup.state, setup.sessions)?;
        let profile = setup.timestamps.then(|| profile::Recorder::new(&device)).flatten();
        let work = Work {
            records,
            steps: BTreeMap::new(),
            batch: BTreeMap::new(),
            unfused: BTreeMap::new(),
            passed_by: BTreeMap::new(),
            holds: None,
            told: None,
            profile,
        };
        let executor =
            Self { device, config, setup, kernels, weights, scratch, unfused, work: Mutex::new(work) };
        // What would be refused later is refused now.
        let mut work = executor.lock();
        for (rows, seat) in [(1, Seat::One), (1, Seat::Ahead(0)), (2, Seat::Rows)] {
            executor.lay(&mut work, Shape { rows, segments: 1, logits: 1 }, seat, false)?;
        }
        drop(work);
        Ok(executor)
    }

    /// Compiles what passes of any number of tokens need, of one sequence and of many side by side; with `skips`, of those that
    /// mixes may be left out of too. Without fusion, which is for measuring, nothing.
    pub(crate) fn prepare(&self, skips: bool) -> Result<(), Error> {
        self.sound()?;
        if self.unfused.is_some() {
            return Ok(());
        }
        let mut work = self.lock();
        let most = count(self.rows());
        for rows in Multiplies::classes(most).map(|class| class.min(most)) {
            for segments in [1, rows.min(count(self.segments()))] {
                for skips in [false, skips] {
                    let shape = Shape { rows, segments, logits: segments };
                    self.lay(&mut work, shape, self.seat(shape), skips)?;
                }
            }
        }
        Ok(())
    }

    pub(crate) const fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub(crate) const fn device(&self) -> &Device {
        &self.device
    }

    /// The variants of kernels that were chosen, by label.
    pub(crate) fn variants(&self) -> Vec<String> {
        match &self.unfused {
            None => self.kernels.labels(),
            Some(unfused) => unfused.labels(&self.kernels),
        }
    }

    /// Whether some matrices are in blocks.
    pub(crate) fn blocks(&self) -> bool {
        self.setup.has_blocks(&self.config)
    }

    /// Rows of a pass, at most.
    pub(crate) const fn rows(&self) -> usize {
        self.scratch.rows
    }

    /// Sequences of a pass, at most.
    pub(crate) const fn segments(&self) -> usize {
        if self.setup.fused { self.scratch.logit_rows } else { 1 }
    }

    /// Rows of logits of a pass, at most.
    pub(crate) const fn logit_rows(&self) -> usize {
        self.scratch.logit_rows
    }

    /// What states are held in.
    pub(crate) const fn resident(&self) -> Resident {
        self.setup.state
    }

    /// The state before the first token.
    pub(crate) fn empty(&self) -> Record {
        self.lock().records.empty()
    }

    /// Dispatches in the layers, of a pass over one token and of one over several.
    pub(crate) fn dispatches(&self) -> Result<[usize; 2], Error> {
        let mut work = self.lock();
        let mut count = |rows| {
            let shape = Shape { rows, segments: 1, logits: 1 };
            let laid = self.lay(&mut work, shape, self.seat(shape), false)?;
            Ok::<_, Error>(work.plan(laid).until_head(Skip::default(), None).count() - 1) // less the embedding
        };
        Ok([count(1)?, count(2)?])
    }

    /// That layers can be left out.
    pub(crate) fn can_skip(&self) -> Result<(), Error> {
        if !self.setup.fused {
            return Err(Error::Skip("operations are not fused"));
        }
        if self.setup.state.rounding == ResidentRounding::DecayDither {
            return Err(Error::Skip("decays are dithered: they would not stand still"));
        }
        Ok(())
    }

    /// Runs the sequences side by side. Returns the logits `[rows, V]` of those that asked for all; the others' are
    /// kept in their records.
    pub(crate) fn pass(&self, jobs: &mut [Job<'_>], skip: Skip<'_>) -> Result<Vec<f32>, Error> {
        self.sound()?;
        let mut work = self.lock();
        if !self.setup.fused && jobs.len() > 1 {
            return Err(Error::Unfused { got: jobs.len() });
        }
        let sequences: Vec<_> =
            jobs.iter().map(|job| (&*job.record, job.tokens.len(), job.logits != Logits::None)).collect();
        let moves = self.take(&mut work, &sequences)?;
        let tokens: Vec<u32> = jobs.iter().flat_map(|job| job.tokens).copied().collect();
        let (mut end, mut wanted) = (0, Vec::new());
        for job in &*jobs {
            end += count(job.tokens.len());
            wanted.extend(end - count(job.logits.rows(job.tokens.len()))..end);
        }
        let shape =
            Shape { rows: count(tokens.len()), segments: count(jobs.len()), logits: count(wanted.len()) };

        let queue = self.device.queue();
        queue.write_buffer(&self.scratch.tokens, 0, bytemuck::cast_slice(&tokens));
        let seat = self.seat(shape);
        self.tell(&work, seat, &moves, &wanted, skip)?;
        let mut encoder = self.encoder();
        self.encode(&mut work, &mut encoder, shape, &[Pass { seat, skip, first: None, last: None }])?;
        // The rows of logits, in the order of jobs: kept in the records, or read.
        let row = (self.config.vocab * size_of::<f32>()) as u64;
        let (mut at, mut all, mut kept) = (0, Vec::new(), Vec::new());
        if shape.logits > 0 {
            work.holds = None;
        }
        for (job, of) in jobs.iter().zip(&moves) {
            let rows = job.logits.rows(job.tokens.len()) as u64;
            if let Some(to) = of.after.logits() {
                let (from, into) = ((at + rows - 1) * row, work.records.logits_offset(to));
                // Neighbours that stay neighbours are copied at once.
                match kept.last_mut() {
                    Some((first, start, bytes)) if (*first + *bytes, *start + *bytes) == (from, into) => {
                        *bytes += row;
                    }
                    _ => kept.push((from, into, row)),
                }
                if at + rows == 1 {
                    work.holds = Some((to.index(), 0));
                }
            }
            if job.logits == Logits::All {
                let bytes = at * row..(at + rows) * row;
                all.push(self.read_later(&mut encoder, &self.scratch.logits, bytes)?);
            }
            at += rows;
        }
        for (from, into, bytes) in kept {
            encoder.copy_buffer_to_buffer(&self.scratch.logits, from, &work.records.logits, into, bytes);
        }
        queue.submit([encoder.finish()]);
        drop(work);
        let read: Vec<Vec<f32>> = all.iter().map(|buffer| self.read(buffer)).collect::<Result<_, _>>()?;
        self.sound()?;
        for (job, of) in jobs.iter_mut().zip(moves) {
            *job.record = of.after;
        }
        Ok(read.concat())
    }

    /// The logits `[V]` after the last token of a record that has some.
    pub(crate) fn logits(&self, record: &Record) -> Result<Vec<f32>, Error> {
        let Some(logits) = record.logits() else { return Ok(Vec::new()) };
        let work = self.lock();
        let start = work.records.logits_offset(logits);
        let end = start + (self.config.vocab * size_of::<f32>()) as u64;
        let mut encoder = self.encoder();
        let buffer = self.read_later(&mut encoder, &work.records.logits, start..end)?;
        self.device.queue().submit([encoder.finish()]);
        drop(work);
        self.read(&buffer)
    }

    /// A record's state, layer by layer.
    pub(crate) fn state(&self, record: &Record) -> Result<Vec<DeviceState>, Error> {
        let work = self.lock();
        let (records, slots) = (&work.records, record.pending_places());
        let DeviceLayout { width, base_words, att_shift, entry, .. } = records.layout;
        let [base, shifts, entries] =
            [base_words, 2 * width, ENTRY * width].map(|words| words * size_of::<u32>());
        let layer_bytes = (base + shifts + slots.len() * entries) as u64;
        let buffer = self.staging(layer_bytes * self.config.n_layers as u64)?;
        let mut encoder = self.encoder();
        for (from, start) in
            records.layers.iter().zip((0usize..).step_by(base + shifts + slots.len() * entries))
        {
            let mut at = start as u64;
            let mut copy = |offset: u64, bytes: usize| {
                encoder.copy_buffer_to_buffer(from, offset, &buffer, at, bytes as u64);
                at += bytes as u64;
            };
            let in_slot =
                |slot: &Place, words: usize| records.slot_offset(slot) + (words * size_of::<u32>()) as u64;
            copy(records.base_offset(record.base()), base);
            copy(in_slot(record.slot(), att_shift), shifts);
            slots.iter().for_each(|slot| copy(in_slot(slot, entry), entries));
        }
        self.device.queue().submit([encoder.finish()]);
        drop(work);
        let words: Vec<u32> = read(&self.device, &buffer)?;
        let layers = words.chunks_exact(words.len() / self.config.n_layers).map(|layer| DeviceState {
            base: layer[..base_words].to_vec(),
            shifts: layer[base_words..][..2 * width].to_vec(),
            entries: layer[base_words + 2 * width..].to_vec(),
        });
        Ok(layers.collect())
    }

    /// A record that holds a state, given layer by layer.
    pub(crate) fn start_from(&self, layers: &[DeviceState]) -> Result<Record, Error> {
        self.sound()?;
        let mut work = self.lock();
        let (record, grown) = work.records.take_state(&self.device)?;
        work.laid_anew(grown);
        let records = &work.records;
        let (base, slot) = (records.base_offset(record.base()), records.slot_offset(record.slot()));
        for (buffer, DeviceState { base: words, shifts, .. }) in records.layers.iter().zip(layers) {
            let queue = self.device.queue();
            queue.write_buffer(buffer, base, bytemuck::cast_slice(words));
            let shift = (records.layout.att_shift * size_of::<u32>()) as u64;
            queue.write_buffer(buffer, slot + shift, bytemuck::cast_slice(shifts));
        }
        Ok(record)
    }

    /// A record with what was pending folded into its base.
    pub(crate) fn fold(&self, record: &Record) -> Result<Record, Error> {
        if record.pending() == 0 {
            return Ok(record.clone());
        }
        self.sound()?;
        let mut work = self.lock();
        let (after, grown) = work.records.take_base(&self.device, record)?;
        work.laid_anew(grown);
        let of = Move { rows: 0, before: record.clone(), after, slots: Vec::new(), kept: 0 };
        self.scratch.write_segments(self.device.queue(), &[&of]);
        let shape = Shape { rows: 2, segments: 1, logits: 0 };
        let mut encoder = self.encoder();
        {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            let laid = self.lay_batch(&mut work, shape, false)?;
            let steps = work.plan(laid).until_head(Skip::default(), None);
            let heads = steps.filter(|step| step.part == layer::HEADS);
            heads.for_each(|step| step.encode(&mut pass, shape));
        }
        self.device.queue().submit([encoder.finish()]);
        Ok(of.after)
    }

    /// Bytes of the matrices.
    pub(crate) fn weight_bytes(&self) -> u64 {
        self.weights.bytes()
    }

    /// How long the dispatches of all passes since the last call took; empty without timestamps.
    pub(crate) fn profile(&self) -> Result<Profile, Error> {
        let mut work = self.lock();
        work.profile.as_mut().map_or(Ok(Profile::default()), |of| of.take(&self.device))
    }

    /// Waits until all is done.
    pub(crate) fn wait(&self) -> Result<(), Error> {
        self.device.device().poll(wgpu::PollType::wait_indefinitely())?;
        self.sound()
    }

    /// An error if the device failed since.
    fn sound(&self) -> Result<(), Error> {
        sound(&self.device)
    }

    fn lock(&self) -> MutexGuard<'_, Work> {
        // What a panic leaves half done is not shown to anyone: records that were taken are free again.
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what a pass writes; plans that are bound to buffers which had to grow are laid down anew.
    fn take(&self, work: &mut Work, sequences: &[(&Record, usize, bool)]) -> Result<Vec<Move>, Error> {
        let (moves, grown) = work.records.take(&self.device, sequences)?;
        let taken = |(held, _): &(u32, usize)| {
            moves.iter().all(|of| of.after.logits().map(Place::index) != Some(*held))
        };
        work.holds = work.holds.filter(taken);
        work.laid_anew(grown);
        Ok(moves)
    }

    /// Writes the tables of a pass that is submitted by itself.
    fn tell(
        &self,
        work: &Work,
        seat: Seat,
        moves: &[Move],
        wanted: &[u32],
        skip: Skip<'_>,
    ) -> Result<(), Error> {
        let queue = self.device.queue();
        if let (Seat::One, [of]) = (seat, moves) {
            self.scratch.write_one(queue, &self.scratch.table_of_one(of, None));
            return Ok(());
        }
        if !skip.layers.is_empty() {
            self.scratch.write_still(queue, moves);
            if skip.shifts == SkipShifts::Frozen {
                self.scratch.write_carried(queue, moves);
            }
        }
        let shared = |of: &Move| mix_rows::Segment {
            rows: of.rows as usize,
            from: of.before.slot().index() as usize,
            to: of.slots[of.slots.len() - of.kept..].iter().map(|&slot| slot as usize).collect(),
        };
        let all: Vec<_> = moves.iter().map(shared).collect();
        let cursors = kernels::mix_rows::cursors(&all, work.records.slots())
            .map_err(|why| Error::Extents { part: "cursors", why: why.to_string() })?;
        self.scratch.write(queue, &cursors, &moves.iter().collect::<Vec<_>>(), wanted);
        match (&self.unfused, moves) {
            (Some(unfused), [of]) => unfused.write(queue, &self.config, work.records.layout, of),
            _ => Ok(()),
        }
    }

    /// Whether a pass over one token has a form of its own.
    const fn in_one_step(&self) -> bool {
        self.setup.fused && !self.setup.batch_invariant && self.kernels.has_step()
    }

    /// Where a pass is told what to do that is submitted by itself.
    const fn seat(&self, shape: Shape) -> Seat {
        if shape.rows == 1 && self.in_one_step() { Seat::One } else { Seat::Rows }
    }

    /// Passes over one token that are submitted together, at most.
    pub(crate) const fn together(&self) -> usize {
        if self.in_one_step() { self.scratch.together } else { 1 }
    }

    /// Lays down the plan for a pass. Its seat matters where one token has a form of its own.
    fn lay(&self, work: &mut Work, shape: Shape, seat: Seat, skips: bool) -> Result<Laid, Error> {
        let layers = self.layers(&work.records);
        if let Some(unfused) = &self.unfused {
            let key = [shape.rows, shape.logits.max(1)];
            if !work.unfused.contains_key(&key) {
                work.unfused.retain(|[rows, _], _| *rows == 1);
                work.unfused.insert(key, unfused.plan(&layers, Shape { logits: key[1], ..shape })?);
            }
            return Ok(Laid::Unfused(key));
        }
        if shape.rows == 1 && self.in_one_step() {
            // All at once, so that they share what is theirs alike.
            let (seat, all) = match seat {
                Seat::Ahead(_) => (seat, (0..self.together()).map(Seat::Ahead).collect()),
                Seat::Rows | Seat::One => (Seat::One, vec![Seat::One]),
            };
            if all.iter().any(|seat| !work.steps.contains_key(seat)) {
                for seat in all {
                    work.steps.insert(seat, layers.step(seat)?);
                }
            }
            return Ok(Laid::Step(seat));
        }
        self.lay_batch(work, shape, skips)
    }

    /// Lays down the plan for a pass, in the form for several rows; with `skips` mixes may be left out of it.
    fn lay_batch(&self, work: &mut Work, shape: Shape, skips: bool) -> Result<Laid, Error> {
        let layers = self.layers(&work.records);
        let class = [shape.rows, shape.logits].map(Multiplies::class);
        let key = (class, self.kernels.form(&self.config, &self.setup, shape), skips);
        if let Entry::Vacant(room) = work.batch.entry(key) {
            room.insert(layers.batch(key.0, key.1, skips)?);
        }
        Ok(Laid::Batch(key))
    }

    fn layers<'a>(&'a self, records: &'a Records) -> layer::Layers<'a> {
        layer::Layers {
            device: &self.device,
            planner: plan::Planner::new(&self.device),
            config: &self.config,
            kernels: &self.kernels,
            weights: &self.weights,
            head_format: self.setup.weights.format(0, Matrix::Head).blocks(),
            scratch: &self.scratch,
            records,
        }
    }

    /// Encodes passes of one shape, one after the other.
    fn encode(
        &self,
        work: &mut Work,
        encoder: &mut wgpu::CommandEncoder,
        shape: Shape,
        passes: &[Pass<'_>],
    ) -> Result<(), Error> {
        if work.told.replace(shape) != Some(shape) {
            self.scratch.write_shape(self.device.queue(), &self.config, shape);
        }
        let mut laid = Vec::new();
        for pass in passes {
            let skips = !pass.skip.layers.is_empty();
            if let (true, Entry::Vacant(room)) = (skips, work.passed_by.entry(pass.replaced())) {
                room.insert(self.layers(&work.records).passed_by(pass.seat, pass.skip.shifts)?);
            }
            laid.push(self.lay(work, shape, pass.seat, skips)?);
        }
        let mut profile = work.profile.take();
        let mut steps = Vec::new();
        for (pass, laid) in passes.iter().zip(laid) {
            let plan = work.plan(laid);
            let passed_by = work.passed_by.get(&pass.replaced());
            steps.extend(pass.first);
            steps.extend(plan.until_head(pass.skip, passed_by.map(Vec::as_slice)));
            steps.extend(if shape.logits > 0 { &plan.head[..] } else { &[] });
            steps.extend(pass.last);
        }
        if let Some(profile) = &mut profile {
            profile.encode(
                &mut encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default()),
                &steps,
                shape,
            );
        } else {
            let mut left = &steps[..];
            // Of a few tokens at once the device begins while the host encodes the rest, which takes a millisecond.
            let mut some = if shape.rows > 1 { FIRST_STEPS } else { left.len() };
            while !left.is_empty() {
                let (now, later) = left.split_at(some.min(left.len()));
                {
                    let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
                    now.iter().for_each(|step| step.encode(&mut pass, shape));
                }
                if !later.is_empty() {
                    let begun = std::mem::replace(encoder, self.encoder());
                    self.device.queue().submit([begun.finish()]);
                }
                (left, some) = (later, 2 * some);
            }
        }
        work.profile = profile;
        Ok(())
    }

    fn encoder(&self) -> wgpu::CommandEncoder {
        self.device.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default())
    }

    /// A buffer that the host can read.
    fn staging(&self, bytes: u64) -> Result<wgpu::Buffer, Error> {
        staging(&self.device, bytes)
    }

    /// Copies bytes of a buffer where [`Self::read`] finds them.
    fn read_later(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        from: &wgpu::Buffer,
        bytes: Range<u64>,
    ) -> Result<wgpu::Buffer, Error> {
        let len = bytes.end - bytes.start;
        let to = self.staging(len)?;
        encoder.copy_buffer_to_buffer(from, bytes.start, &to, 0, len);
        Ok(to)
    }

    /// Waits for what was submitted and reads a buffer.
    fn read(&self, buffer: &wgpu::Buffer) -> Result<Vec<f32>, Error> {
        read(&self.device, buffer)
    }
}

/// A buffer that the host can read.
fn staging(device: &Device, bytes: u64) -> Result<wgpu::Buffer, Error> {
    checked(device.device(), || {
        device.device().create_buffer(&wgpu::BufferDescriptor {
            label: Some("staging"),
            size: bytes,
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        })
    })
}

/// Waits for what was submitted and reads a buffer.
fn read<T: bytemuck::Pod>(device: &Device, buffer: &wgpu::Buffer) -> Result<Vec<T>, Error> {
    // A failure shows when the range is asked for below.
    buffer.slice(..).map_async(wgpu::MapMode::Read, |_| ());
    device.device().poll(wgpu::PollType::wait_indefinitely())?;
    sound(device)?;
    let bytes = buffer.slice(..).get_mapped_range()?;
    Ok(bytemuck::pod_collect_to_vec(&bytes))
}

/// An error if the device failed since.
fn sound(device: &Device) -> Result<(), Error> {
    device.fault().map_or(Ok(()), |what| Err(Error::Lost(what.to_owned())))
}

/// A number of tokens, which are in memory several times over and of which a pass has few.
fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
