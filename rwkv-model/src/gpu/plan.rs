//! What a pass does, laid down once: pipelines, bind groups and parameters for every dispatch.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::ops::Range;

use rwkv_core::model::Skip;
use rwkv_kernels::gpu::Device;
use rwkv_kernels::pipeline::Pipeline;
use wgpu::util::DeviceExt as _;

use super::Error;

/// The extents of one pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) rows: u32,
    pub(super) segments: u32,
    /// Rows whose logits are wanted.
    pub(super) logits: u32,
}

/// The workgroups of a dispatch.
#[derive(Clone, Copy, Debug)]
pub(super) enum Grid {
    /// The same at every pass.
    Fixed([u32; 3]),
    /// One for each row.
    Rows,
    /// So many for each row.
    EachRow(u32),
    /// One for every so many rows.
    Runs(u32),
    /// So many for each segment.
    Segments(u32),
    /// So many for every `rows` rows, those for the same columns after each other.
    Tiles { cols: u32, rows: u32 },
    /// So many for every chunk of so many rows, of which every segment may have a short one.
    Chunks { x: u32, rows: u32 },
    /// One for each row of logits.
    LogitRows,
    /// So many for every `rows` rows of logits.
    LogitTiles { cols: u32, rows: u32 },
}

impl Shape {
    /// Tokens of one sequence that a pass has at least, from which on it is in the form for prompts: what precedes and
    /// follows the state update is then done for all tokens at once.
    const LONG: u32 = 8;

    /// Whether a sequence may have many tokens.
    pub(super) const fn is_long(self) -> bool {
        self.rows - self.segments >= Self::LONG
    }
}

impl Grid {
    const fn groups(self, shape: Shape) -> [u32; 3] {
        match self {
            Self::Fixed(groups) => groups,
            Self::Rows => [shape.rows, 1, 1],
            Self::EachRow(x) => [x, shape.rows, 1],
            Self::Runs(rows) => [shape.rows.div_ceil(rows), 1, 1],
            Self::Segments(x) => [x, shape.segments, 1],
            Self::Tiles { cols, rows } => [shape.rows.div_ceil(rows), cols, 1],
            Self::Chunks { x, rows } => [x, shape.rows / rows + shape.segments, 1],
            Self::LogitRows => [shape.logits, 1, 1],
            Self::LogitTiles { cols, rows } => [shape.logits.div_ceil(rows), cols, 1],
        }
    }
}

/// One dispatch.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) pipeline: Pipeline,
    pub(super) group: wgpu::BindGroup,
    pub(super) grid: Grid,
    /// What it does, for people.
    pub(super) part: &'static str,
    /// Bytes of weights and states that a pass of one row reads and writes.
    pub(super) bytes: u64,
}

impl Step {
    pub(super) fn encode(&self, pass: &mut wgpu::ComputePass<'_>, shape: Shape) {
        self.pipeline.encode(pass, &self.group, self.grid.groups(shape));
    }
}

/// The dispatches of a layer.
#[derive(Debug)]
pub(super) struct Mixes {
    pub(super) time_mix: Vec<Step>,
    pub(super) channel_mix: Vec<Step>,
}

/// All dispatches of a pass, in order.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// From the tokens to the residual stream; without fusion, the layers too.
    pub(super) body: Vec<Step>,
    /// On the residual stream.
    pub(super) layers: Vec<Mixes>,
    /// From the residual stream to the logits.
    pub(super) head: Vec<Step>,
}

impl Plan {
    /// The dispatches up to the head. Of a mix that is left out, those of `passed_by`, which is there if any is.
    pub(super) fn until_head<'a>(
        &'a self,
        skip: Skip<'_>,
        passed_by: Option<&'a [Mixes]>,
    ) -> impl Iterator<Item = &'a Step> {
        let layers = self.layers.iter().enumerate().flat_map(move |(layer, own)| {
            let by = passed_by.and_then(|all| all.get(layer)).unwrap_or(own);
            let pick = |out: bool| if out { by } else { own };
            let (time, channel) = (pick(skip.time_mix(layer)), pick(skip.channel_mix(layer)));
            time.time_mix.iter().chain(&channel.channel_mix)
        });
        self.body.iter().chain(layers)
    }
}

/// What a step binds.
#[derive(Clone, Copy, Debug)]
pub(super) enum Bound<'a> {
    /// A buffer.
    Whole(&'a wgpu::Buffer),
    /// So many bytes from an offset on, a multiple of [`PART_BYTES`].
    Part { buffer: &'a wgpu::Buffer, offset: u64, bytes: u64 },
}

impl<'a> Bound<'a> {
    /// Elements of a buffer, of `element_bytes` each. `part` is for people.
    pub(super) fn section(
        part: &'static str,
        buffer: &'a wgpu::Buffer,
        elements: Range<usize>,
        element_bytes: usize,
    ) -> Result<Self, Error> {
        let (offset, bytes) = (elements.start * element_bytes, elements.len() * element_bytes);
        if !(offset as u64).is_multiple_of(PART_BYTES) {
            let why = format!("begins at byte {offset} of a buffer, bound are multiples of {PART_BYTES}");
            return Err(Error::Extents { part, why });
        }
        Ok(Self::Part { buffer, offset: offset as u64, bytes: bytes as u64 })
    }

    fn binding(self) -> wgpu::BufferBinding<'a> {
        match self {
            Self::Whole(buffer) => buffer.as_entire_buffer_binding(),
            Self::Part { buffer, offset, bytes } => {
                wgpu::BufferBinding { buffer, offset, size: NonZeroU64::new(bytes) }
            }
        }
    }
}

/// Where a part of a buffer begins, where any device binds it: a multiple of so many bytes.
pub(super) const PART_BYTES: u64 = (PART_WORDS * size_of::<u32>()) as u64;

/// Words of that.
pub(super) const PART_WORDS: usize = 64;

/// Lays steps down.
pub(super) struct Planner<'a> {
    device: &'a Device,
    uniforms: Constants,
    tables: Constants,
}

/// Buffers that nothing writes, by what they hold.
type Constants = RefCell<BTreeMap<Vec<u8>, wgpu::Buffer>>;

impl<'a> Planner<'a> {
    pub(super) fn new(device: &'a Device) -> Self {
        Self { device, uniforms: Constants::default(), tables: Constants::default() }
    }

    /// A step whose parameters never change.
    pub(super) fn step<P: bytemuck::Pod>(
        &self,
        part: &'static str,
        pipeline: &Pipeline,
        params: P,
        buffers: &[Bound<'_>],
        grid: Grid,
        bytes: u64,
    ) -> Result<Step, Error> {
        let params = self.shared(&self.uniforms, bytemuck::bytes_of(&params), wgpu::BufferUsages::UNIFORM);
        self.step_with(part, pipeline, &params, buffers, grid, bytes)
    }

    /// A step with a uniform that may be written.
    pub(super) fn step_with(
        &self,
        part: &'static str,
        pipeline: &Pipeline,
        params: &wgpu::Buffer,
        buffers: &[Bound<'_>],
        grid: Grid,
        bytes: u64,
    ) -> Result<Step, Error> {
        let all = [Bound::Whole(params)].into_iter().chain(buffers.iter().copied());
        let group = pipeline.bind(self.device.device(), all.map(Bound::binding))?;
        Ok(Step { pipeline: pipeline.clone(), group, grid, part, bytes })
    }

    /// A table that nothing writes.
    pub(super) fn table<T: bytemuck::Pod>(&self, elements: &[T]) -> wgpu::Buffer {
        self.shared(&self.tables, bytemuck::cast_slice(elements), wgpu::BufferUsages::STORAGE)
    }

    /// The same, where it is too large to be looked for among others.
    pub(super) fn large_table<T: bytemuck::Pod>(&self, elements: &[T]) -> wgpu::Buffer {
        self.constant(bytemuck::cast_slice(elements), wgpu::BufferUsages::STORAGE)
    }

    /// Layers share what they have in common. A dispatch waits for it before all else; what the layer before has read may still be
    /// in a cache, while one of its own would have been driven out by a token's weights.
    fn shared(&self, among: &Constants, contents: &[u8], usage: wgpu::BufferUsages) -> wgpu::Buffer {
        if let Some(found) = among.borrow().get(contents) {
            return found.clone();
        }
        let made = self.constant(contents, usage);
        among.borrow_mut().insert(contents.to_vec(), made.clone());
        made
    }

    fn constant(&self, contents: &[u8], usage: wgpu::BufferUsages) -> wgpu::Buffer {
        let descriptor = wgpu::util::BufferInitDescriptor { label: Some("constant"), contents, usage };
        self.device.device().create_buffer_init(&descriptor)
    }
}
