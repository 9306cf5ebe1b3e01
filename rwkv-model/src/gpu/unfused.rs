//! The form with one dispatch for each operation, of one sequence: what fusion is measured against.
//!
//! | part of a layer | dispatches |
//! |---|---|
//! | time mix, in | `layer_norm`, `token_shift` |
//! | r, k, v | a product each |
//! | adapters w, a, v, g | two products each, `activation` of w and g, `add` of the biases of w, a, v |
//! | heads | `decay`, `kappa`, `learning_rate`, `value_residual`, `wkv7`, `readout` |
//! | time mix, out | a product, `add` |
//! | channel mix | `layer_norm`, `token_shift`, a product, `activation`, a product that adds to the residual |
//! | before a product of cooperative matrices | `to_halves` |
//!
//! Layer 0 has no adapter v. Products are by the fastest kernel for the number of rows: of one row, by `linear` and
//! `channel_mix_value`; of several, and of the adapters' second factors, by `matmul`, one job at a time.
//!
//! A plan is for so many rows, and for so many of logits: nothing but the places of the states changes between the
//! passes that run it.

use rwkv_core::ModelConfig;
use rwkv_core::config::Ranks;
use rwkv_core::ops::activation::Activation;
use rwkv_core::ops::layer_norm::LN_EPS;
use rwkv_core::ops::matmul::Rows;
use rwkv_core::ops::wkv7::Dims;
use rwkv_kernels::gpu::Device;
use rwkv_kernels::kernels::wkv7::Places;
use rwkv_kernels::kernels::{
    activation, add, channel_mix_value, decay, extents, kappa, layer_norm, learning_rate, linear, matmul,
    readout, to_halves, token_shift, value_residual, wkv7,
};
use rwkv_kernels::pipeline::{Pipeline, checked};
use rwkv_state::layout::DeviceLayout;

use super::layer::{Layers, MIX_A, MIX_G, MIX_K, MIX_R, MIX_V, MIX_W, MIXES, refused};
use super::pipelines::{HIDDEN_EXPONENT, Kernels, READOUT_EXPONENT, compile};
use super::plan::{Bound, Grid, Plan, Shape, Step};
use super::records::{Move, Record};
use super::scratch::Seat;
use super::step::{linear_of, value_of};
use super::weights::Layer;
use super::{Error, count};

/// Kernels and buffers of this form alone.
#[derive(Debug)]
pub(super) struct Unfused {
    kernels: OpKernels,
    scratch: OpScratch,
}

#[derive(Debug)]
struct OpKernels {
    to_halves: Pipeline,
    token_shift: Pipeline,
    activation: Pipeline,
    add: Pipeline,
    decay: Pipeline,
    kappa: Pipeline,
    learning_rate: Pipeline,
    value_residual: Pipeline,
    wkv7: Pipeline,
    readout: Pipeline,
    linear: Pipeline,
    /// Outputs to a workgroup.
    linear_tile: u32,
    value: Pipeline,
    /// Columns to a workgroup.
    columns: u32,
}

/// What lives no longer than a pass, of `T` rows at most.
#[derive(Debug)]
struct OpScratch {
    /// Parameters of `wkv7` in all layers, since a sequence's records lie alike in each.
    places: wgpu::Buffer,
    /// The row that each row is of: `0..T`.
    rows: wgpu::Buffer,
    /// Output of ln1 or ln2, `[T, D]`.
    normed: wgpu::Buffer,
    /// Receptance, `[T, D]`.
    r: wgpu::Buffer,
    /// Key, `[T, D]`.
    k: wgpu::Buffer,
    /// Value, but layer 0's, `[T, D]`.
    v: wgpu::Buffer,
    /// Products of the first factors of the adapters w, a, v, g, `[T, rank]`.
    down: [wgpu::Buffer; 4],
    /// Products of their second factors, `[T, D]`: in the end the decay, the removal direction, how far the value is
    /// drawn to the first layer's, the gate.
    up: [wgpu::Buffer; 4],
    /// Kappa, in the end the replacement direction, `[T, D]`.
    b: wgpu::Buffer,
    /// Product of the output layer, `[T, D]`.
    out: wgpu::Buffer,
    /// What a product reads as halves, `[T, F]` at most.
    halves: wgpu::Buffer,
}

impl Unfused {
    pub(super) fn new(
        device: &Device,
        config: &ModelConfig,
        rows: usize,
        skip_zeros: bool,
    ) -> Result<Self, Error> {
        let scratch = OpScratch::new(device, config, rows)?;
        let indices: Vec<u32> = (0..count(rows)).collect();
        device.queue().write_buffer(&scratch.rows, 0, bytemuck::cast_slice(&indices));
        Ok(Self { kernels: OpKernels::new(device, config, skip_zeros)?, scratch })
    }

    /// The variants that were chosen, with those of the kernels that every form has.
    pub(super) fn labels(&self, kernels: &Kernels) -> Vec<String> {
        let own = &self.kernels;
        kernels.labels_with([
            &own.to_halves,
            &own.token_shift,
            &own.activation,
            &own.add,
            &own.decay,
            &own.kappa,
            &own.learning_rate,
            &own.value_residual,
            &own.wkv7,
            &own.readout,
            &own.linear,
            &own.value,
        ])
    }

    /// Tells `wkv7` which state a pass reads and which it writes.
    pub(super) fn write(
        &self,
        queue: &wgpu::Queue,
        config: &ModelConfig,
        layout: DeviceLayout,
        of: &Move,
    ) -> Result<(), Error> {
        let place = |of: &Record| of.base().index() as usize * layout.base_words;
        let places = Places { before: place(&of.before), after: place(&of.after) };
        let (params, _) = wkv7::lower(dims(config, of.rows as usize), places).map_err(refused("wkv7"))?;
        queue.write_buffer(&self.scratch.places, 0, bytemuck::bytes_of(&params));
        Ok(())
    }

    /// A pass of just so many rows, and rows of logits.
    pub(super) fn plan(&self, of: &Layers<'_>, shape: Shape) -> Result<Plan, Error> {
        let (rows, logits) = (shape.rows as usize, shape.logits as usize);
        let mut body = Steps { own: self, of, rows, steps: vec![of.embed(Seat::Rows, Grid::Rows)?] };
        for (weights, records) in of.weights.layers.iter().zip(&of.records.layers) {
            body.layer(weights, records)?;
        }
        let mut head = Steps { own: self, of, rows: logits, steps: Vec::new() };
        head.head()?;
        Ok(Plan { body: body.steps, layers: Vec::new(), head: head.steps })
    }
}

impl OpKernels {
    fn new(device: &Device, config: &ModelConfig, skip_zeros: bool) -> Result<Self, Error> {
        let compile = |variants| compile(device, variants, &[]);
        let (linear, linear_tile) = linear_of(device)?;
        let (value, columns) = value_of(device, config, &[], skip_zeros)?;
        Ok(Self {
            to_halves: compile(to_halves::VARIANTS)?,
            token_shift: compile(token_shift::VARIANTS)?,
            activation: compile(activation::VARIANTS)?,
            add: compile(add::VARIANTS)?,
            decay: compile(decay::VARIANTS)?,
            kappa: compile(kappa::VARIANTS)?,
            learning_rate: compile(learning_rate::VARIANTS)?,
            value_residual: compile(value_residual::VARIANTS)?,
            wkv7: compile(wkv7::VARIANTS)?,
            readout: compile(readout::VARIANTS)?,
            linear,
            linear_tile,
            value,
            columns,
        })
    }
}

impl OpScratch {
    /// No buffer is larger than those that the fused forms have of as many rows.
    fn new(device: &Device, config: &ModelConfig, rows: usize) -> Result<Self, Error> {
        let ModelConfig { width, hidden, ranks, .. } = *config;
        let Ranks { w, a, v, g } = ranks;
        let longest = [width, hidden, w, a, v, g].into_iter().max().unwrap_or_default();
        let buffer = |label, bytes: usize, usage| {
            device.device().create_buffer(&wgpu::BufferDescriptor {
                label: Some(label),
                size: bytes.next_multiple_of(16) as u64,
                usage: usage | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        };
        let storage =
            |label, width| buffer(label, rows * width * size_of::<f32>(), wgpu::BufferUsages::STORAGE);
        checked(device.device(), || Self {
            places: buffer("params", size_of::<wkv7::Params>(), wgpu::BufferUsages::UNIFORM),
            rows: storage("rows", 1),
            normed: storage("normed", width),
            r: storage("r", width),
            k: storage("k", width),
            v: storage("v", width),
            down: [w, a, v, g].map(|rank| storage("down", rank)),
            up: std::array::from_fn(|_| storage("up", width)),
            b: storage("b", width),
            out: storage("out", width),
            halves: storage("halves", longest),
        })
    }
}

/// Extents of what the heads do.
const fn dims(config: &ModelConfig, tokens: usize) -> Dims {
    Dims { tokens, heads: config.n_heads, head_size: config.head_size }
}

/// Rows that lie one after the other.
const fn plain(width: usize) -> Rows {
    Rows { offset: 0, stride: width }
}

/// A product of rows with a matrix.
struct Product<'a> {
    part: &'static str,
    /// The matrix, from a weight of a buffer on.
    weights: (&'a wgpu::Buffer, usize),
    inputs: usize,
    outputs: usize,
    x: (&'a wgpu::Buffer, Rows),
    /// `[T, outputs]`.
    y: &'a wgpu::Buffer,
}

impl Product<'_> {
    const fn weights_len(&self) -> usize {
        self.inputs * self.outputs
    }

    const fn bytes(&self) -> u64 {
        (2 * self.weights_len()) as u64
    }
}

/// Steps of so many rows, as they are laid down.
struct Steps<'a> {
    own: &'a Unfused,
    of: &'a Layers<'a>,
    rows: usize,
    steps: Vec<Step>,
}

impl<'a> Steps<'a> {
    fn layer(&mut self, weights: &'a Layer, records: &'a wgpu::Buffer) -> Result<(), Error> {
        let (own, shared) = (&self.own.scratch, self.of.scratch);
        let (ModelConfig { width, hidden, .. }, layout) = (*self.of.config, self.of.records.layout);
        let mixed = |mix: u32| (&shared.mixed, Rows { offset: mix as usize * width, stride: MIXES * width });
        // Layer 0's values are what the others' are drawn to.
        let v = if weights.ranks.v == 0 { &shared.v_first } else { &own.v };
        let [lw, a, vl, gate] = &own.up;

        self.norm("ln1", &weights.att, &own.rows, &shared.x, &own.normed)?;
        self.shift("shift", &weights.att, MIXES, layout.att_shift, records)?;
        let stacked = [("receptance", MIX_R, &own.r), ("key", MIX_K, &own.k), ("value", MIX_V, v)];
        for (at, (part, mix, y)) in stacked.into_iter().enumerate() {
            let weights = (&weights.stack, at * width * width);
            self.linear(Product { part, weights, inputs: width, outputs: width, x: mixed(mix), y })?;
        }
        self.adapters(weights, mixed)?;
        self.heads(weights, records, [&own.r, lw, &own.k, v, a, vl, gate])?;

        let (x, y) = ((&shared.readout, plain(width)), &own.out);
        self.linear(Product {
            part: "output",
            weights: (&weights.output, 0),
            inputs: width,
            outputs: width,
            x,
            y,
        })?;
        let all = extents::Dims { rows: 1, width: self.rows * width };
        let buffers = [&own.out, &shared.x].map(Bound::Whole);
        self.push("residual", &self.own.kernels.add, add::lower(all), &buffers, 0)?;

        self.norm("ln2", &weights.ffn, &own.rows, &shared.x, &own.normed)?;
        self.shift("ffn shift", &weights.ffn, 1, layout.ffn_shift, records)?;
        let (x, y) = ((&shared.mixed, plain(width)), &shared.hidden);
        let key =
            Product { part: "ffn key", weights: (&weights.key, 0), inputs: width, outputs: hidden, x, y };
        self.linear(key)?;
        self.activate(hidden, Activation::SquaredRelu, &shared.hidden)?;
        let (x, y) = ((&shared.hidden, plain(hidden)), &shared.x);
        self.value(Product {
            part: "ffn value",
            weights: (&weights.value, 0),
            inputs: hidden,
            outputs: width,
            x,
            y,
        })
    }

    /// The adapters w, a, v, g of what each of them reads of the rows that were mixed.
    fn adapters(
        &mut self,
        weights: &'a Layer,
        mixed: impl Fn(u32) -> (&'a wgpu::Buffer, Rows),
    ) -> Result<(), Error> {
        let (own, width, ranks) = (&self.own.scratch, self.of.config.width, weights.ranks);
        // First and second factor and bias; after the first factor, an activation.
        let adapters = [
            (["w1", "w2", "w0"], ranks.w, MIX_W, Some(Activation::Tanh)),
            (["a1", "a2", "a0"], ranks.a, MIX_A, None),
            (["v1", "v2", "v0"], ranks.v, MIX_V, None),
            (["g1", "g2", "g0"], ranks.g, MIX_G, Some(Activation::Sigmoid)),
        ];
        let mut first = 0;
        for (at, ([down_part, up_part, bias_part], rank, mix, activation)) in adapters.into_iter().enumerate()
        {
            if rank == 0 {
                continue;
            }
            let (down, up) = (&own.down[at], &own.up[at]);
            self.linear(Product {
                part: down_part,
                weights: (&weights.stack, (3 * width + first) * width),
                inputs: width,
                outputs: rank,
                x: mixed(mix),
                y: down,
            })?;
            if let Some(activation) = activation {
                self.activate(rank, activation, down)?;
            }
            let product = Product {
                part: up_part,
                weights: (&weights.up, first * width),
                inputs: rank,
                outputs: width,
                x: (down, plain(rank)),
                y: up,
            };
            self.matmul(product, true, false)?;
            // The gate has no bias.
            if mix != MIX_G {
                let lowered = add::lower(extents::Dims { rows: self.rows, width });
                let bias = self.vectors(bias_part, &weights.heads, at, 1)?;
                self.push(bias_part, &self.own.kernels.add, lowered, &[bias, Bound::Whole(up)], 0)?;
            }
            first += rank;
        }
        Ok(())
    }

    /// From the products of the time mix to the gated readout. `planes` are r, lw, k, v, a, vl and the gate.
    fn heads(
        &mut self,
        weights: &'a Layer,
        records: &'a wgpu::Buffer,
        planes: [&'a wgpu::Buffer; 7],
    ) -> Result<(), Error> {
        let (kernels, own, shared) = (&self.own.kernels, &self.own.scratch, self.of.scratch);
        let [r, lw, k, v, a, vl, gate] = planes.map(Bound::Whole);
        let (b, v_first, y) =
            (Bound::Whole(&own.b), Bound::Whole(&shared.v_first), Bound::Whole(&shared.readout));
        let (each, heads) =
            (extents::Dims { rows: self.rows, width: self.of.config.width }, dims(self.of.config, self.rows));
        let [k_k, k_a, r_k, gain, bias] =
            [("kappa", 3), ("rate", 4), ("readout", 5), ("readout", 6), ("readout", 7)]
                .map(|(part, at)| self.vectors(part, &weights.heads, at, 1));
        self.push("decay", &kernels.decay, decay::lower(each), &[lw], 0)?;
        self.push("kappa", &kernels.kappa, kappa::lower(heads), &[k, k_k?, b], 0)?;
        self.push("rate", &kernels.learning_rate, learning_rate::lower(each), &[k_a?, k, a, b], 0)?;
        if weights.ranks.v > 0 {
            let lowered = value_residual::lower(each);
            self.push("residual value", &kernels.value_residual, lowered, &[v_first, vl, v], 0)?;
        }
        // What is told anew at every pass is where the states are.
        let (_, groups) = wkv7::lower(heads, Places::default()).map_err(refused("wkv7"))?;
        let buffers = [r, lw, k, v, a, b, Bound::Whole(records), y];
        let bytes = self.of.state_bytes();
        let grid = Grid::Fixed(groups);
        self.steps.push(self.of.planner.step_with(
            "wkv7",
            &kernels.wkv7,
            &own.places,
            &buffers,
            grid,
            bytes,
        )?);
        let buffers = [r, k, v, gate, gain?, bias?, r_k?, y];
        self.push("readout", &kernels.readout, readout::lower(heads), &buffers, 0)
    }

    /// From the residual stream to the logits; rows are those whose logits are wanted.
    fn head(&mut self) -> Result<(), Error> {
        let (s, weights, ModelConfig { width, vocab, .. }) =
            (self.of.scratch, self.of.weights, *self.of.config);
        self.norm("ln_out", &weights.ln_out, &s.wanted, &s.x, &s.normed)?;
        let (weights, x) = ((&weights.head, 0), (&s.normed, plain(width)));
        self.linear(Product { part: "head", weights, inputs: width, outputs: vocab, x, y: &s.logits })
    }

    /// The layer norm whose gain and bias are the first of `vectors`, of the rows of `x` that `rows` names.
    fn norm(
        &mut self,
        part: &'static str,
        vectors: &'a wgpu::Buffer,
        rows: &'a wgpu::Buffer,
        x: &'a wgpu::Buffer,
        y: &'a wgpu::Buffer,
    ) -> Result<(), Error> {
        let dims =
            layer_norm::Dims { of: self.of.scratch.rows, rows: self.rows, width: self.of.config.width };
        let [gain, bias] = self.of.norm(part, vectors)?;
        let buffers = [Bound::Whole(x), Bound::Whole(rows), gain, bias, Bound::Whole(y)];
        self.push(part, &self.of.kernels.layer_norm, layer_norm::lower(dims, LN_EPS), &buffers, 0)
    }

    /// The token shift of what was normed, by the mixes that follow gain and bias in `vectors`.
    fn shift(
        &mut self,
        part: &'static str,
        vectors: &'a wgpu::Buffer,
        planes: usize,
        offset: usize,
        records: &'a wgpu::Buffer,
    ) -> Result<(), Error> {
        let (width, stride) = (self.of.config.width, self.of.records.layout.slot_words);
        let dims = token_shift::Dims { tokens: self.rows, planes, width, stride, offset };
        let mixes = self.vectors(part, vectors, 2, planes)?;
        let [normed, cursors, mixed] =
            [&self.own.scratch.normed, &self.of.scratch.cursors, &self.of.scratch.mixed].map(Bound::Whole);
        let buffers = [normed, cursors, mixes, self.of.records.slots_of(records), mixed];
        self.push(part, &self.own.kernels.token_shift, token_shift::lower(dims), &buffers, 0)
    }

    fn activate(&mut self, width: usize, of: Activation, x: &'a wgpu::Buffer) -> Result<(), Error> {
        let part = match of {
            Activation::Identity => "identity",
            Activation::Tanh => "tanh",
            Activation::Sigmoid => "sigmoid",
            Activation::SquaredRelu => "relu^2",
        };
        let lowered = activation::lower(self.rows * width, of);
        self.push(part, &self.own.kernels.activation, lowered, &[Bound::Whole(x)], 0)
    }

    /// A product with a matrix `[outputs, inputs]`.
    fn linear(&mut self, of: Product<'a>) -> Result<(), Error> {
        if self.rows > 1 {
            return self.matmul(of, false, false);
        }
        let (part, kernels) = (of.part, &self.own.kernels);
        let dims =
            linear::Dims { rows: 1, inputs: of.inputs, outputs: of.outputs, accumulate: false, format: None };
        let (weights, start) = of.weights;
        let weights = Bound::section(part, weights, start..start + of.weights_len(), size_of::<u16>())?;
        let (x, Rows { offset, .. }) = of.x;
        let x = Bound::section(part, x, offset..offset + of.inputs, size_of::<f32>())?;
        let lowered = linear::lower(dims, kernels.linear_tile);
        self.push(part, &kernels.linear, lowered, &[weights, x, Bound::Whole(of.y)], of.bytes())
    }

    /// The product of the channel mix's hidden units with a matrix `[inputs, outputs]`, added to `y`.
    fn value(&mut self, of: Product<'a>) -> Result<(), Error> {
        if self.rows > 1 {
            return self.matmul(of, true, true);
        }
        let kernels = &self.own.kernels;
        let dims = channel_mix_value::Dims { rows: 1, width: of.outputs, hidden: of.inputs, format: None };
        let buffers = [of.weights.0, of.x.0, of.y].map(Bound::Whole);
        let lowered = channel_mix_value::lower(dims, kernels.columns);
        self.push(of.part, &kernels.value, lowered, &buffers, of.bytes())
    }

    /// A product with a matrix `[outputs, inputs]`, or `[inputs, outputs]` if it is transposed.
    fn matmul(&mut self, of: Product<'a>, transposed: bool, accumulate: bool) -> Result<(), Error> {
        let len =
            |buffer: &wgpu::Buffer, bytes: u64| usize::try_from(buffer.size() / bytes).unwrap_or(usize::MAX);
        // What is added is of the hidden units.
        let exponent = if accumulate { HIDDEN_EXPONENT } else { READOUT_EXPONENT };
        let ((weights, start), (x, x_rows)) = (of.weights, self.halved(&of, exponent)?);
        let job = matmul::Job {
            inputs: of.inputs,
            outputs: of.outputs,
            weights: start / 8,
            row: if transposed { of.outputs } else { of.inputs },
            format: None,
            scales: 0,
            x: x_rows,
            exponent,
            y: plain(of.outputs),
            activation: Activation::Identity,
            store: if accumulate { matmul::Store::Add } else { matmul::Store::Put },
        };
        let multiply = self.of.kernels.matmul.tile(count(self.rows), &[job], transposed);
        let (tile, pipeline) = (multiply.tile, self.of.kernels.matmul.get(self.of.device, multiply)?);
        let dims = matmul::Dims {
            rows: self.rows,
            tile,
            transposed,
            weights: len(weights, 16),
            x: len(x, 4),
            y: len(of.y, 4),
        };
        let (params, tiles, groups) = matmul::lower(dims, &[job]).map_err(refused(of.part))?;
        let tiles = self.of.planner.table(&tiles);
        let buffers = [&tiles, weights, x, of.y].map(Bound::Whole);
        let lowered = Ok::<_, matmul::Error>((params, groups));
        self.push(of.part, &pipeline, lowered, &buffers, of.bytes())
    }

    /// What a product reads: halves, if it is of cooperative matrices.
    fn halved(&mut self, of: &Product<'a>, exponent: u8) -> Result<(&'a wgpu::Buffer, Rows), Error> {
        if !self.of.kernels.coop {
            return Ok(of.x);
        }
        let (own, (x, rows)) = (self.own, of.x);
        let dims = extents::Dims { rows: self.rows, width: of.inputs };
        let buffers = [x, &own.scratch.halves].map(Bound::Whole);
        let lowered = to_halves::lower(dims, rows, exponent);
        self.push("to halves", &own.kernels.to_halves, lowered, &buffers, 0)?;
        Ok((&own.scratch.halves, plain(of.inputs)))
    }

    /// So many vectors `[D]` of a buffer, from the one at `at` on.
    fn vectors(
        &self,
        part: &'static str,
        buffer: &'a wgpu::Buffer,
        at: usize,
        n: usize,
    ) -> Result<Bound<'a>, Error> {
        let width = self.of.config.width;
        Bound::section(part, buffer, at * width..(at + n) * width, size_of::<f32>())
    }

    fn push<P: bytemuck::Pod, E: std::fmt::Display>(
        &mut self,
        part: &'static str,
        pipeline: &Pipeline,
        lowered: Result<(P, [u32; 3]), E>,
        buffers: &[Bound<'_>],
        bytes: u64,
    ) -> Result<(), Error> {
        let (params, groups) = lowered.map_err(refused(part))?;
        let grid = Grid::Fixed(groups);
        self.steps.push(self.of.planner.step(part, pipeline, params, buffers, grid, bytes)?);
        Ok(())
    }
}
