//! The dispatches of a layer over several rows, of sequences side by side and of prompts: [`Layers::batch`].

use rwkv_core::ModelConfig;
use rwkv_core::ops::activation::Activation;
use rwkv_core::ops::matmul::Rows;
use rwkv_core::quant::BLOCK;
use rwkv_kernels::kernels::weights::{self as stored, ELEMENT};
use rwkv_kernels::kernels::{
    add_planes, extents, layer_norm, matmul, time_mix_operands, wkv7_chunked, wkv7_chunked_factors,
    wkv7_fours, wkv7_scan,
};

use super::layer::{ADAPTERS, HEADS, Heads, Layers, MIXES, Stream, refused, stack};
use super::pipelines::{
    ChunkKernels, DividedKernels, FEW, Form, HIDDEN_EXPONENT, READOUT_EXPONENT, ScanKernels,
};
use super::plan::{Bound, Grid, Mixes, Plan, Step};
use super::products::Multiply;
use super::scratch::Seat;
use super::weights::Layer;
use super::{Error, count};
use crate::recipe::Matrix;

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

/// The products of a layer over several rows. The last ones are added to the residual stream.
struct Products<'a> {
    projections: Product<'a>,
    adapters: Product<'a>,
    output: Product<'a>,
    key: Product<'a>,
    value: Product<'a>,
    /// Whether the inputs of those that are added are divided among the planes of `up`, which are yet to be added then.
    divided: bool,
}

impl Layers<'_> {
    /// A form for several rows, in the tiles for so many of them, and of logits. With `skips` mixes may be left out of it.
    pub(super) fn batch(&self, [rows, logits]: [u32; 2], form: Form, skips: bool) -> Result<Plan, Error> {
        let body = vec![self.embed(Seat::Rows, Grid::Rows)?];
        let (s, width, vocab) = (self.scratch, self.config.width, self.config.vocab);
        let head = Product {
            part: "head",
            weights: &self.weights.head,
            transposed: false,
            x: (&s.normed, s.len.normed),
            y: (&s.logits, s.len.logits),
            jobs: vec![
                job(width, vocab, 0, (0, width), (0, vocab), Activation::Identity).stored(self.head_format),
            ],
            of_logits: true,
        };
        let products: Vec<_> =
            self.weights.layers.iter().map(|weights| self.products(rows, skips, weights)).collect();
        let all =
            products.iter().flat_map(|of| [&of.projections, &of.adapters, &of.output, &of.key, &of.value]);
        let tiles = all.map(|of| self.tile(rows, of)).chain([self.tile(logits, &head)]);
        self.kernels.matmul.prepare(self.device, tiles)?;

        let mut stream = self.stream();
        let own = self.weights.layers.iter().zip(&self.records.layers).zip(products);
        let layers = own.map(|((weights, records), products)| {
            self.batch_layer(rows, form, weights, records, products, &mut stream)
        });
        let mut layers = layers.collect::<Result<Vec<_>, Error>>()?;
        if let (true, Some(kernels), Some(last)) = (stream.planes, &self.kernels.divided, layers.last_mut()) {
            last.channel_mix.push(self.sum(kernels, &stream)?);
        }
        let dims = layer_norm::Dims { of: s.rows, rows: s.logit_rows, width };
        let (params, _) =
            layer_norm::lower(dims, rwkv_core::ops::layer_norm::LN_EPS).map_err(refused("ln_out"))?;
        let [gain, bias] = self.norm("ln_out", &self.weights.ln_out)?;
        let buffers = [Bound::Whole(stream.x), Bound::Whole(&s.wanted), gain, bias, Bound::Whole(&s.normed)];
        let norm =
            self.planner.step("ln_out", &self.kernels.layer_norm, params, &buffers, Grid::LogitRows, 0)?;
        Ok(Plan { body, layers, head: vec![norm, self.product(logits, head)?] })
    }

    /// The products of a layer over so many rows.
    fn products<'a>(&'a self, rows: u32, skips: bool, weights: &'a Layer) -> Products<'a> {
        let s = self.scratch;
        let ModelConfig { width, hidden, .. } = *self.config;
        let per_row = weights.inputs(width);
        let (mut projections, mut start, mut element) = (Vec::new(), 0, 0);
        for of in stack(weights, width) {
            let mix = of.mix.unwrap_or_default() as usize;
            let (x, y) = ((mix * width, MIXES * width), (start, per_row));
            let job = job(width, of.outputs, element, x, y, of.activation);
            // The heads read the projections, the adapters' second factors what their first make.
            let store = if start < 3 * width { matmul::Store::Put } else { self.read_by_products(0) };
            projections.push(matmul::Job { store, ..job }.stored(of.format));
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
        let identity = Activation::Identity;
        let output = matmul::Job {
            exponent: READOUT_EXPONENT,
            store: matmul::Store::Add,
            ..job(width, width, 0, (0, width), (0, width), identity)
        };
        let key = matmul::Job {
            store: self.read_by_products(HIDDEN_EXPONENT),
            ..job(width, hidden, 0, (0, width), (0, hidden), Activation::SquaredRelu)
        };
        let value = matmul::Job {
            row: width,
            exponent: HIDDEN_EXPONENT,
            store: matmul::Store::Add,
            ..job(hidden, width, 0, (0, hidden), (0, width), identity)
        };
        let [output, key, value] =
            [(output, Matrix::Output), (key, Matrix::FfnKey), (value, Matrix::FfnValue)]
                .map(|(job, of)| job.stored(weights.format(of)));

        // Left out, a product's planes would be what was there before. Halves are read by eights, and blocks lie along a row of
        // the matrix.
        let is_divided = self.kernels.divided.is_some()
            && rows <= FEW
            && !skips
            && output.inputs.is_multiple_of(stored::unit(output.format) * ADAPTERS)
            && value.inputs.is_multiple_of(8 * ADAPTERS);
        let added = |job, transposed| if is_divided { divided(job, transposed) } else { vec![job] };
        let product = |part, transposed, weights, x, y, jobs| Product {
            part,
            weights,
            transposed,
            x,
            y,
            jobs,
            of_logits: false,
        };
        let (inputs, up, readout) = ((&s.inputs, s.len.inputs), (&s.up, s.len.up), (&s.readout, s.len.x));
        let (mixed, hidden) = ((&s.mixed, s.len.mixed), (&s.hidden, s.len.hidden));
        Products {
            projections: product("projections", false, &weights.stack, mixed, inputs, projections),
            adapters: product("adapters", true, &weights.up, inputs, up, adapters),
            output: product("output", false, &weights.output, readout, up, added(output, false)),
            key: product("key", false, &weights.key, mixed, hidden, vec![key]),
            value: product("value", true, &weights.value, hidden, up, added(value, true)),
            divided: is_divided,
        }
    }

    fn batch_layer<'a>(
        &'a self,
        rows: u32,
        form: Form,
        weights: &Layer,
        records: &wgpu::Buffer,
        products: Products<'a>,
        stream: &mut Stream<'a>,
    ) -> Result<Mixes, Error> {
        let (s, layout) = (self.scratch, self.records.layout);
        let rows_of = (Bound::Whole(&s.cursors), Grid::Runs(self.run(rows)));
        let added = |of: Product<'a>, stream: &mut Stream<'a>| {
            stream.planes = products.divided;
            let y = if products.divided { of.y } else { (stream.x, s.len.x) };
            self.product(rows, Product { y, ..of })
        };
        let mut time_mix = vec![
            self.mix("ln1", layout.att_shift, MIXES, &weights.att, records, rows_of, stream)?,
            self.product(rows, products.projections)?,
            self.product(rows, products.adapters)?,
        ];
        match &self.kernels.scan {
            Some(kernels) if form != Form::Few => {
                time_mix.extend(self.scan(kernels, form, weights, records)?);
            }
            _ => time_mix.extend(self.heads(
                Heads {
                    pipeline: self.kernels.heads(rows),
                    readout: self.kernels.readout.as_ref(),
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
        time_mix.push(added(products.output, stream)?);
        let channel_mix = vec![
            self.mix("ln2", layout.ffn_shift, 1, &weights.ffn, records, rows_of, stream)?,
            self.product(rows, products.key)?,
            added(products.value, stream)?,
        ];
        Ok(Mixes { time_mix, channel_mix })
    }

    /// Adds the planes to the residual stream where it is.
    fn sum(&self, kernels: &DividedKernels, stream: &Stream<'_>) -> Result<Step, Error> {
        let dims = extents::Dims { rows: self.scratch.rows, width: self.config.width };
        let (params, [each, ..]) = add_planes::lower(dims, ADAPTERS).map_err(refused("sum"))?;
        let buffers = [&self.scratch.up, stream.x].map(Bound::Whole);
        self.planner.step("sum", &kernels.add_planes, params, &buffers, Grid::EachRow(each), 0)
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
        let (s, layout, planner) = (self.scratch, self.records.layout, &self.planner);
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
        let dims = wkv7_chunked::Dims { rows, segments: 1, heads, stride, offset: 0, y_stride };
        let fours = |wanted| kernels.fours.iter().find(move |(of, _)| *of == wanted);
        match (form, &kernels.chunked, &s.factors) {
            (Form::Chunked, Some(of), Some(factors)) => {
                steps.extend(self.chunked(of, dims, factors, records)?);
            }
            (Form::Fours(wanted), ..) if let Some((_, of)) = fours(wanted) => {
                let (params, [groups, ..]) =
                    wkv7_fours::lower(dims, wanted.rows_each).map_err(refused(HEADS))?;
                let buffers = [&s.segments, &s.mixed, records, &s.up].map(Bound::Whole);
                steps.push(planner.step(
                    HEADS,
                    of,
                    params,
                    &buffers,
                    Grid::Segments(groups),
                    self.state_bytes(),
                )?);
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

        steps.push(self.readout(&kernels.readout, weights)?);
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
        let (s, planner, chunk) = (self.scratch, &self.planner, kernels.chunk);
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

    /// A product of so many rows.
    fn product(&self, rows: u32, of: Product<'_>) -> Result<Step, Error> {
        let s = self.scratch;
        let multiply = self.tile(rows, &of);
        let (tile, pipeline) = (multiply.tile, self.kernels.matmul.get(self.device, multiply)?);
        let dims = matmul::Dims {
            rows: if of.of_logits { s.logit_rows } else { s.rows },
            tile,
            transposed: of.transposed,
            weights: usize::try_from(of.weights.size()).unwrap_or(usize::MAX) / ELEMENT,
            x: of.x.1,
            y: of.y.1,
        };
        let (_, tiles, [_, cols, _]) = matmul::lower(dims, &of.jobs).map_err(refused(of.part))?;
        let (params, grid) = if of.of_logits {
            (&s.of_logits, Grid::LogitTiles { cols, rows: tile.rows })
        } else {
            (&s.of_rows, Grid::Tiles { cols, rows: tile.rows })
        };
        let tiles = self.planner.table(&tiles);
        let buffers = [&tiles, of.weights, of.x.0, of.y.0].map(Bound::Whole);
        self.planner.step_with(of.part, &pipeline, params, &buffers, grid, of.weights.size())
    }

    /// How a product of so many rows is computed.
    fn tile(&self, rows: u32, of: &Product<'_>) -> Multiply {
        self.kernels.matmul.tile(rows, &of.jobs, of.transposed)
    }
}

/// A product whose inputs, halves, are divided among as many jobs as `up` has planes, each of which takes one.
fn divided(of: matmul::Job, transposed: bool) -> Vec<matmul::Job> {
    let (inputs, width) = (of.inputs / ADAPTERS, of.outputs);
    let part = |p| {
        // Halves are two to a word, weights eight to an element.
        let x = Rows { offset: of.x.offset + p * inputs / 2, ..of.x };
        let y = Rows { offset: p * width, stride: ADAPTERS * width };
        let before = p * inputs * if transposed { width } else { 1 };
        let weights = of.weights + stored::elements(of.format, before);
        let scales = of.scales + before / BLOCK;
        matmul::Job { inputs, weights, scales, x, y, store: matmul::Store::Put, ..of }
    };
    (0..ADAPTERS).map(part).collect()
}

/// A job of `matmul`, not transposed, of inputs that halves hold as they are; rows by offset and stride.
pub(super) fn job(
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
    let (row, format, scales) = (inputs, None, 0);
    matmul::Job { inputs, outputs, weights, row, format, scales, x, exponent: 0, y, activation, store }
}
