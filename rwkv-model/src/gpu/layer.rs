//! The dispatches of a layer, fused, in forms that compute the same; another is [`Unfused`](super::unfused).
//!
//! | form | for | dispatches |
//! |---|---|---|
//! | [`Layers::step`] | one token of one sequence | `mix_in`, `time_mix`, `linear`, `mix_in`, `channel_mix_value` |
//! | [`Layers::batch`] | any rows | `mix_rows`, `matmul`, `matmul`, `time_mix_batch`, `matmul`, `mix_rows`, `matmul`, `matmul` |
//! | both | the norm apart | with `readout_packed` after `time_mix` or `time_mix_batch` |
//! | the same, long | prompts | with `time_mix_operands`, `wkv7_fours` or `wkv7_scan`, `readout_packed` for `time_mix_batch` |
//! | the same, of few rows | cooperative matrices | with planes of products, which the next `mix_rows` sums, the last `add_planes` |
//! | the same, by chunks | prompts, if asked for | with `wkv7_chunked_factors`, `wkv7_chunked` for `wkv7_scan` |

use rwkv_core::ModelConfig;
use rwkv_core::model::SkipShifts;
use rwkv_core::ops::activation::Activation;
use rwkv_core::ops::wkv7_lazy::ENTRY;
use rwkv_core::quant;
use rwkv_kernels::gpu::Device;
use rwkv_kernels::kernels::{
    carry, channel_mix_value, embedding, linear, mix_in, mix_rows, readout_packed, time_mix, time_mix_batch,
    time_mix_resident,
};
use rwkv_kernels::pipeline::Pipeline;
use rwkv_state::layout::DeviceLayout;

use super::pipelines::{Held, Kernels, LANES_OF_RUNS, PROCESSORS, RUNS_ON_CPU};
use super::plan::{Bound, Grid, Mixes, Plan, Planner, Step};
use super::records::Records;
use super::scratch::{Scratch, Seat, Seated};
use super::step::StepKernels;
use super::weights::{Layer, Weights};
use super::{Error, count};
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

/// Adapters of the time mix, and planes that inputs of products are divided among, which lie where the adapters' products were.
pub(super) const ADAPTERS: usize = 4;

/// The part of a layer in which the heads' states move on.
pub(super) const HEADS: &str = "heads";

/// What plans are laid down from.
pub(super) struct Layers<'a> {
    pub(super) device: &'a Device,
    pub(super) planner: Planner<'a>,
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
pub(super) struct Heads<'a> {
    pub(super) pipeline: &'a Pipeline,
    /// What is left to do of its answers, and wanted.
    pub(super) readout: Option<&'a Pipeline>,
    /// Lanes, if the adapters' second factors are multiplied in it.
    pub(super) lora_up: Option<u32>,
    pub(super) rows: usize,
    pub(super) segments: Bound<'a>,
    /// Projections and low ranks.
    pub(super) inputs: &'a wgpu::Buffer,
    /// The adapters' products, if not.
    pub(super) up: &'a wgpu::Buffer,
    pub(super) grid: Grid,
    pub(super) bytes: u64,
}

/// Where the residual stream is, as dispatches are laid down.
pub(super) struct Stream<'a> {
    pub(super) x: &'a wgpu::Buffer,
    /// Where it goes when planes are added to it, since rows are read by their neighbours too.
    pub(super) next: &'a wgpu::Buffer,
    /// Whether those of `up` are yet to be added.
    pub(super) planes: bool,
}

impl Layers<'_> {
    /// The form for one token of one sequence.
    pub(super) fn step(&self, seat: Seat) -> Result<Plan, Error> {
        let Some(kernels) = &self.kernels.step else { return Ok(Plan::default()) };
        let seated = self.scratch.seat(seat);
        let body = vec![self.embed(seat, Grid::Fixed([1; 3]))?];
        let layers =
            self.each_layer(|weights, records| self.step_layer(kernels, &seated, weights, records))?;
        let (s, width) = (self.scratch, self.config.width);
        let stack = [mix_in::Stacked {
            outputs: self.config.vocab,
            mix: None,
            activation: Activation::Identity,
            format: self.head_format,
        }];
        let dims = mix_in::Dims { width, stride: width, offset: 0 };
        let (params, tiles, groups) =
            mix_in::lower(dims, &stack, kernels.stack_tile(&stack)).map_err(refused("head"))?;
        let tiles = self.planner.table(&tiles);
        let (ln_out, head) = (&self.weights.ln_out, &self.weights.head);
        // The head has no shift: of the state it touches nothing.
        let [tiles, none, x, vectors, matrix, state] =
            [&tiles, &s.no_cursor, &s.x, ln_out, head, &s.normed].map(Bound::Whole);
        let buffers = [tiles, none, x, vectors, matrix, state, seated.logits];
        let head =
            self.planner.step("head", &kernels.mix_in, params, &buffers, Grid::Fixed(groups), head.size())?;
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
    pub(super) fn passed_by(&self, seat: Seat, shifts: SkipShifts) -> Result<Vec<Mixes>, Error> {
        let one = seat != Seat::Rows;
        let (s, planner, width) = (self.scratch, &self.planner, self.config.width);
        // Segments without rows have their states copied. Where there are rows, since each may be pending, all operands are zero,
        // and the adapters' products so negative that every decay is one and the value residual is off: states stay as they are
        // in every form, and pending tokens are folded as ever.
        let rows = if one || s.resident.is_plain() { 1 } else { s.rows };
        const NEVER: f32 = -1e30;
        let inputs = planner.large_table(&vec![0.0f32; s.len.inputs / s.rows * rows]);
        let up = planner.large_table(&vec![NEVER; ADAPTERS * width * rows]);
        let Seated { cursors, segments, .. } = s.seat(seat);
        let carried = if one { cursors } else { Bound::Whole(&s.carried) };
        let grid = if one { Grid::Fixed([1; 3]) } else { Grid::Rows };
        self.each_layer(|weights, records| {
            let shift = |part, offset, vectors| match shifts {
                SkipShifts::Refreshed => {
                    self.mix(part, offset, 1, vectors, records, (cursors, grid), &mut self.stream())
                }
                SkipShifts::Frozen => self.carry(part, offset, records, (carried, grid)),
            };
            let heads = Heads {
                pipeline: &self.kernels.time_mix,
                readout: None,
                lora_up: None,
                rows,
                segments: if one { segments } else { Bound::Whole(s.passed_by()) },
                inputs: &inputs,
                up: &up,
                grid: match one {
                    true => Grid::Fixed([count(self.config.n_heads), 1, 1]),
                    false => Grid::Segments(count(self.config.n_heads)),
                },
                bytes: self.state_bytes(),
            };
            let DeviceLayout { att_shift, ffn_shift, .. } = self.records.layout;
            let mut time_mix = vec![shift("ln1", att_shift, &weights.att)?];
            time_mix.extend(self.heads(heads, weights, records)?);
            Ok(Mixes { time_mix, channel_mix: vec![shift("ln2", ffn_shift, &weights.ffn)?] })
        })
    }

    /// Where a pass begins.
    pub(super) const fn stream(&self) -> Stream<'_> {
        Stream { x: &self.scratch.x, next: &self.scratch.x_summed, planes: false }
    }

    /// Norms rows, with their planes if they have any, and shifts them by mixes.
    #[expect(
        clippy::too_many_arguments,
        reason = "what differs between the norms of a layer and of what is left out"
    )]
    pub(super) fn mix<'a>(
        &'a self,
        part: &'static str,
        offset: usize,
        mixes: usize,
        vectors: &wgpu::Buffer,
        records: &wgpu::Buffer,
        (cursors, mut grid): (Bound<'_>, Grid),
        stream: &mut Stream<'a>,
    ) -> Result<Step, Error> {
        let s = self.scratch;
        let (form, pipeline) = match &self.kernels.divided {
            Some(of) if stream.planes => &of.mix_rows,
            _ => &self.kernels.mix_rows,
        };
        let dims = mix_rows::Dims {
            rows: s.rows,
            width: self.config.width,
            mixes,
            records: self.records.slots(),
            stride: self.records.layout.slot_words,
            offset,
            form: *form,
            run: if let Grid::Runs(rows) = grid { rows } else { 1 },
        };
        let (params, _) = mix_rows::lower(dims).map_err(refused(part))?;
        if let Grid::Runs(rows) = &mut grid {
            *rows = params.run; // of one where planes are added
        }
        let slots = self.records.slots_of(records);
        let mut buffers = [stream.x, &s.up, &s.up, vectors, &s.up, stream.next, &s.mixed].map(Bound::Whole);
        (buffers[2], buffers[4]) = (cursors, slots);
        if stream.planes {
            *stream = Stream { x: stream.next, next: stream.x, planes: false };
        }
        self.planner.step(part, pipeline, params, &buffers, grid, 0)
    }

    /// Rows to a workgroup of `mix_rows` in a pass of a class of so many: as many as leave work for every processor where three in
    /// four of them are there.
    pub(super) fn run(&self, class: u32) -> u32 {
        let (form, _) = &self.kernels.mix_rows;
        let gpu = PROCESSORS * LANES_OF_RUNS / form.lanes();
        (class - class / 4).div_ceil(if self.device.is_gpu() { gpu } else { RUNS_ON_CPU })
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
        self.planner.step(part, &self.kernels.carry, params, &buffers, grid, 0)
    }

    fn step_layer(
        &self,
        kernels: &StepKernels,
        seated: &Seated<'_>,
        weights: &Layer,
        records: &wgpu::Buffer,
    ) -> Result<Mixes, Error> {
        let (s, planner, layout) = (self.scratch, &self.planner, self.records.layout);
        let ModelConfig { width, hidden, .. } = *self.config;
        let mix = |part, offset, stack: &[mix_in::Stacked], vectors, matrix: &wgpu::Buffer, y| {
            let dims = mix_in::Dims { width, stride: layout.slot_words, offset };
            let tile = kernels.stack_tile(stack);
            let (params, tiles, groups) = mix_in::lower(dims, stack, tile).map_err(refused(part))?;
            let tiles = planner.table(&tiles);
            let [tiles, x, vectors, whole, y] = [&tiles, &s.x, vectors, matrix, y].map(Bound::Whole);
            let buffers = [tiles, seated.cursors, x, vectors, whole, self.records.slots_of(records), y];
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
            readout: kernels.readout.as_ref(),
            lora_up: Some(kernels.heads_lanes),
            rows: 1,
            segments: seated.segments,
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
        let time_mix = std::iter::once(projections).chain(heads).chain([output]).collect();
        Ok(Mixes { time_mix, channel_mix: vec![key, value] })
    }

    /// Group norm, bonus and gate of what the heads answer, by themselves.
    pub(super) fn readout(&self, pipeline: &Pipeline, weights: &Layer) -> Result<Step, Error> {
        let (s, heads) = (self.scratch, self.config.n_heads);
        let dims = readout_packed::Dims { rows: s.rows, heads };
        let (params, _) = readout_packed::lower(dims).map_err(refused("readout"))?;
        let buffers = [&s.mixed, &s.up, &weights.heads, &s.readout].map(Bound::Whole);
        self.planner.step("readout", pipeline, params, &buffers, Grid::EachRow(count(heads)), 0)
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

    pub(super) fn embed(&self, seat: Seat, grid: Grid) -> Result<Step, Error> {
        let (s, ModelConfig { vocab, width, .. }) = (self.scratch, *self.config);
        let dims = embedding::Dims { rows: s.rows, vocab, width };
        let (params, _) = embedding::lower(dims).map_err(refused("embedding"))?;
        let [gain, bias] = self.norm("embedding", &self.weights.ln0)?;
        let Seated { tokens, .. } = s.seat(seat);
        let buffers = [tokens, Bound::Whole(&self.weights.embedding), gain, bias, Bound::Whole(&s.x)];
        let pipeline = &self.kernels.embedding;
        self.planner.step("embedding", pipeline, params, &buffers, grid, 2 * width as u64)
    }

    pub(super) fn heads(
        &self,
        of: Heads<'_>,
        weights: &Layer,
        records: &wgpu::Buffer,
    ) -> Result<Vec<Step>, Error> {
        let (s, layout, planner) = (self.scratch, self.records.layout, &self.planner);
        let ModelConfig { n_heads: heads, head_size, width, .. } = *self.config;
        let (rows, ranks, inputs, offset) = (of.rows, weights.ranks, weights.inputs(width), 0);
        // What is left to be normed takes the place of the rows that were mixed, which were read.
        let out = if self.kernels.readout.is_some() { &s.mixed } else { &s.readout };
        let mut buffers =
            [of.inputs, of.inputs, &weights.up, of.up, &weights.heads, records, &s.v_first, out]
                .map(Bound::Whole);
        buffers[0] = of.segments;
        let update = match self.kernels.held {
            Held::Plain => {
                let stride = layout.base_words;
                let dims =
                    time_mix::Dims { rows, segments: 1, heads, head_size, ranks, inputs, stride, offset };
                if of.lora_up.is_none() {
                    let (params, _) = time_mix_batch::lower(dims).map_err(refused(HEADS))?;
                    planner.step(HEADS, of.pipeline, params, &buffers, of.grid, of.bytes)
                } else {
                    let (params, _) = time_mix::lower(dims, of.lora_up).map_err(refused(HEADS))?;
                    planner.step(HEADS, of.pipeline, params, &buffers, of.grid, of.bytes)
                }
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
        }?;
        let readout = of.readout.map(|pipeline| self.readout(pipeline, weights)).transpose()?;
        Ok([update].into_iter().chain(readout).collect())
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

/// The matrices that read the shifted token, as they are stacked.
pub(super) fn stack(weights: &Layer, width: usize) -> Vec<mix_in::Stacked> {
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
