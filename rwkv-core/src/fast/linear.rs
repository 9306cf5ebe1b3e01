//! The CPU executor's linear layer. Twin: [`ops::linear`](crate::ops::linear).
//!
//! The weights are kept as they are stored (half the bytes of `f32` are half the time of a decode step, which does
//! little but read them), in panels of 64 outputs: `[panel, input, 64]`. A panel is widened a block of
//! 128 inputs at a time into a buffer that stays in the first-level cache, and every row of the call is
//! multiplied by it there. A lane is an output, so that no sum crosses lanes:
//!
//! ```text
//! y[o] = sum over blocks ( sum over the block's inputs, in order, fused multiply-add, from zero )
//! ```
//!
//! This order is the same for one row and for many, on every instruction set that has a fused multiply-add. Weights in
//! [blocks](crate::quant) are decoded as they are read, and so give the bits that their decoded values give.

use std::borrow::Cow;
use std::ops::Range;

use half::{bf16, f16};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::vectorised;
use crate::model::{Compute, Wkv, WkvSegment};
use crate::ops::linear::{Job, Linear, rows};
use crate::ops::wkv7_chunked;
use crate::quant::{self, Blocks, Format};
use crate::real::{ElementType, Elements};

/// Outputs in a panel.
const PANEL: usize = 64;

/// Inputs summed before the sum is added to the total: 32 KiB of widened weights.
const BLOCK: usize = 128;

/// Rows multiplied at a time. Six rows of four 16-lane vectors leave room in 32 registers for the weights.
const TILE: usize = 6;

/// Up to this many rows the inputs that are zero in all of them are worth looking for.
const SPARSE_ROWS: usize = 4;
const _: () = assert!(SPARSE_ROWS <= TILE, "sparse rows are interleaved as one tile");

/// At most one input in so many may be left for the rest to be worth skipping: scattered weights wait for the memory,
/// where a stream of all of them is fetched ahead. Of a 0.4B model's decode step, skipping costs what it saves when 15 %
/// of the hidden units are left, and saves a fifth when 5 % are.
const SPARSE_SHARE: usize = 8;

/// A matrix in panels. Holds the weights once, in their stored type.
#[derive(Clone, Debug)]
pub struct Packed {
    inputs: usize,
    outputs: usize,
    panels: Panels,
}

/// Weights, `[panels, inputs, PANEL]`; outputs beyond the last are zero.
#[derive(Clone, Debug)]
enum Panels {
    Plain(Elements),
    /// A row is PANEL bytes.
    Int8(Vec<i8>, Scales),
    /// A row is PANEL / 2 bytes: the first half of the outputs in the low halves of the bytes.
    Int4(Vec<i8>, Scales),
}

/// The scales of blocks.
#[derive(Clone, Debug)]
enum Scales {
    /// Blocks lie along the inputs: `[panels, inputs / BLOCK, PANEL]`.
    OfOutputs(Vec<f16>),
    /// Along the outputs, as the matrix lies hidden-major: `[panels, inputs, PANEL / BLOCK]`.
    OfInputs(Vec<f16>),
}

/// Outputs of a panel that share a scale, where blocks lie along the outputs.
const SHARED: usize = PANEL / quant::BLOCK;
const _: () =
    assert!(PANEL.is_multiple_of(quant::BLOCK) && BLOCK.is_multiple_of(quant::BLOCK), "whole blocks");

impl Packed {
    /// Packs a matrix of `outputs` rows of `inputs` weights. `read` is asked for ranges of rows, several at a time
    /// from several threads, and gives their weights in row-major order, always of the same type.
    ///
    /// # Errors
    ///
    /// The first error of `read`.
    ///
    /// # Panics
    ///
    /// If there are no inputs or outputs, or `read` gives another number or type of weights.
    pub fn pack<E: Send>(
        inputs: usize,
        outputs: usize,
        kind: ElementType,
        read: impl Fn(Range<usize>) -> Result<Elements, E> + Sync,
    ) -> Result<Self, E> {
        assert!(inputs > 0 && outputs > 0, "a matrix of no weights");
        let len = outputs.div_ceil(PANEL) * inputs * PANEL;
        let read = |panel: usize| {
            let rows = panel * PANEL..((panel + 1) * PANEL).min(outputs);
            let weights = read(rows.clone())?;
            assert_eq!(weights.len(), rows.len() * inputs, "read gives another number of weights");
            Ok(weights)
        };
        let panels = match kind {
            ElementType::F32 => Elements::F32(transpose(inputs, len, read, |e| match e {
                Elements::F32(v) => v,
                other => panic!("read gives {other:?}"),
            })?),
            ElementType::F16 => Elements::F16(transpose(inputs, len, read, |e| match e {
                Elements::F16(v) => v,
                other => panic!("read gives {other:?}"),
            })?),
            ElementType::BF16 => Elements::BF16(transpose(inputs, len, read, |e| match e {
                Elements::BF16(v) => v,
                other => panic!("read gives {other:?}"),
            })?),
        };
        Ok(Self { inputs, outputs, panels: Panels::Plain(panels) })
    }

    /// Packs a matrix in blocks whose rows are the outputs. `read` is asked for ranges of rows, several at a time from several
    /// threads: of them all, no more is held than is asked for at once.
    ///
    /// # Errors
    ///
    /// The first error of `read`.
    ///
    /// # Panics
    ///
    /// If there are no inputs or outputs, or `read` gives others than it was asked for.
    pub fn pack_blocks<E: Send>(
        format: Format,
        inputs: usize,
        outputs: usize,
        read: impl Fn(Range<usize>) -> Result<Blocks, E> + Sync,
    ) -> Result<Self, E> {
        let (panels, row_blocks) = (outputs.div_ceil(PANEL), inputs.div_ceil(quant::BLOCK));
        let mut weights = units(format, inputs, outputs);
        let mut scales = vec![f16::ZERO; panels * row_blocks * PANEL];
        let of_panels = weights
            .par_chunks_exact_mut(inputs * row_bytes(format))
            .zip(scales.par_chunks_exact_mut(row_blocks * PANEL));
        of_panels.enumerate().try_for_each(|(panel, (weights, scales))| {
            let rows = panel * PANEL..((panel + 1) * PANEL).min(outputs);
            let blocks = read(rows.clone())?;
            let got = (blocks.format(), blocks.rows(), blocks.columns());
            assert_eq!(got, (format, rows.len(), inputs), "read gives other blocks");
            fill(format, inputs, weights, |lane, input| match lane < blocks.rows() {
                true => blocks.unit(lane, input),
                false => 0,
            });
            for (lane, row) in blocks.scales().chunks_exact(row_blocks).enumerate() {
                scales.iter_mut().skip(lane).step_by(PANEL).zip(row).for_each(|(to, &scale)| *to = scale);
            }
            Ok(())
        })?;
        Ok(Self::of_panels(format, inputs, outputs, weights, Scales::OfOutputs(scales)))
    }

    /// Packs a matrix in blocks whose rows are the inputs.
    ///
    /// # Panics
    ///
    /// If there are no inputs or outputs.
    #[must_use]
    pub fn of_hidden_major(blocks: &Blocks) -> Self {
        let (format, inputs, outputs) = (blocks.format(), blocks.rows(), blocks.columns());
        let mut weights = units(format, inputs, outputs);
        let of_panels = weights.par_chunks_exact_mut(inputs * row_bytes(format)).enumerate();
        of_panels.for_each(|(panel, weights)| {
            fill(format, inputs, weights, |lane, input| match panel * PANEL + lane {
                output if output < outputs => blocks.unit(input, output),
                _ => 0,
            });
        });
        let mut scales = vec![f16::ZERO; outputs.div_ceil(PANEL) * inputs * SHARED];
        for (input, row) in blocks.scales().chunks_exact(blocks.row_blocks()).enumerate() {
            for (panel, own) in row.chunks(SHARED).enumerate() {
                scales[(panel * inputs + input) * SHARED..][..own.len()].copy_from_slice(own);
            }
        }
        Self::of_panels(format, inputs, outputs, weights, Scales::OfInputs(scales))
    }

    const fn of_panels(
        format: Format,
        inputs: usize,
        outputs: usize,
        weights: Vec<i8>,
        scales: Scales,
    ) -> Self {
        let panels = match format {
            Format::Int8 => Panels::Int8(weights, scales),
            Format::Int4 => Panels::Int4(weights, scales),
        };
        Self { inputs, outputs, panels }
    }

    /// Holds the weights in single precision from now on, unless they are in blocks. Products are what they were.
    pub fn widen(&mut self) {
        if let Panels::Plain(weights) = &mut self.panels {
            *weights = Elements::F32(std::mem::replace(weights, Elements::F32(Vec::new())).widen());
        }
    }

    /// Bytes of the weights.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        match &self.panels {
            Panels::Plain(weights) => weights.bytes(),
            Panels::Int8(weights, scales) | Panels::Int4(weights, scales) => {
                let (Scales::OfOutputs(scales) | Scales::OfInputs(scales)) = scales;
                weights.len() + scales.len() * size_of::<f16>()
            }
        }
    }

    /// Multiplies `x` by one panel. `active` lists the inputs to sum over, or is `None` for all of them; `x` then holds
    /// just those. `y` are the panel's outputs of each row.
    fn panel(&self, panel: usize, x: &[f32], active: Option<&[Vec<usize>]>, y: &mut [&mut [f32]]) {
        let at = panel * self.inputs * PANEL..(panel + 1) * self.inputs * PANEL;
        match &self.panels {
            Panels::Plain(Elements::F32(v)) => panel_of(v[at].as_chunks().0, x, active, y),
            Panels::Plain(Elements::F16(v)) => panel_of(v[at].as_chunks().0, x, active, y),
            Panels::Plain(Elements::BF16(v)) => panel_of(v[at].as_chunks().0, x, active, y),
            Panels::Int8(v, scales) => {
                let v = v[at].as_chunks::<PANEL>().0;
                self.panel_of_blocks(panel, v, scales, x, active, y);
            }
            Panels::Int4(v, scales) => {
                let v = v[at.start / 2..at.end / 2].as_chunks::<{ PANEL / 2 }>().0;
                self.panel_of_blocks(panel, v, scales, x, active, y);
            }
        }
    }

    fn panel_of_blocks<W: Units>(
        &self,
        panel: usize,
        units: &[W],
        scales: &Scales,
        x: &[f32],
        active: Option<&[Vec<usize>]>,
        y: &mut [&mut [f32]],
    ) {
        match scales {
            Scales::OfInputs(scales) => {
                let scales = &scales[panel * self.inputs * SHARED..][..self.inputs * SHARED];
                panel_of(ByInput { units, scales: scales.as_chunks().0 }, x, active, y);
            }
            Scales::OfOutputs(scales) => {
                let blocks = self.inputs.div_ceil(quant::BLOCK);
                let scales = &scales[panel * blocks * PANEL..][..blocks * PANEL];
                panel_of(ByOutput { units, scales: scales.as_chunks().0 }, x, active, y);
            }
        }
    }
}

/// Bytes of a row of a panel of blocks.
const fn row_bytes(format: Format) -> usize {
    match format {
        Format::Int8 => PANEL,
        Format::Int4 => PANEL / 2,
    }
}

/// The panels of a matrix in blocks, of zeros.
fn units(format: Format, inputs: usize, outputs: usize) -> Vec<i8> {
    assert!(inputs > 0 && outputs > 0, "a matrix of no weights");
    vec![0; outputs.div_ceil(PANEL) * inputs * row_bytes(format)]
}

/// Fills a panel of blocks with the units of its lanes, `unit(lane, input)`.
fn fill(format: Format, inputs: usize, panel: &mut [i8], unit: impl Fn(usize, usize) -> i8) {
    let row_bytes = row_bytes(format);
    // sixteen inputs at a time, so that what is written stays in the cache between lanes
    for first in (0..inputs).step_by(16) {
        for lane in 0..row_bytes {
            for input in first..(first + 16).min(inputs) {
                panel[input * row_bytes + lane] = match format {
                    Format::Int8 => unit(lane, input),
                    Format::Int4 => unit(lane, input) & 15 | unit(lane + PANEL / 2, input) << 4,
                };
            }
        }
    }
}

fn transpose<W: Copy + Default + Send, E: Send>(
    inputs: usize,
    len: usize,
    read: impl Fn(usize) -> Result<Elements, E> + Sync,
    unwrap: impl Fn(Elements) -> Vec<W> + Sync,
) -> Result<Vec<W>, E> {
    let mut panels = vec![W::default(); len];
    panels.par_chunks_exact_mut(inputs * PANEL).enumerate().try_for_each(|(panel, out)| {
        let rows = unwrap(read(panel)?);
        // sixteen inputs at a time, so that what is written stays in the cache between rows
        for first in (0..inputs).step_by(16) {
            for (lane, row) in rows.chunks_exact(inputs).enumerate() {
                for (i, &w) in row[first..(first + 16).min(inputs)].iter().enumerate() {
                    out[(first + i) * PANEL + lane] = w;
                }
            }
        }
        Ok(())
    })?;
    Ok(panels)
}

/// A stored weight and how to widen it in code that vectorises.
trait Stored: Copy + Send + Sync {
    /// Whether there is nothing to widen.
    const WIDE: bool = false;

    fn widen(self) -> f32;

    /// A row, widened into `buffer` unless it is wide already.
    #[inline(always)]
    fn widen_row<'a>(row: &'a [Self; PANEL], buffer: &'a mut [f32; PANEL]) -> &'a [f32; PANEL] {
        for (out, w) in buffer.iter_mut().zip(row) {
            *out = w.widen();
        }
        buffer
    }
}

impl Stored for f32 {
    const WIDE: bool = true;

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn widen_row<'a>(row: &'a [Self; PANEL], _: &'a mut [f32; PANEL]) -> &'a [f32; PANEL] {
        row
    }
}

impl Stored for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

impl Stored for f16 {
    /// The five bits of the exponent move into place and are re-biased from 15 to 127. A subnormal (or zero) is its
    /// mantissa times 2^-24, which a float subtraction makes of it.
    #[inline(always)]
    fn widen(self) -> f32 {
        const REBIAS: u32 = (127 - 15) << 23;
        const SMALLEST_NORMAL: f32 = f32::from_bits((127 - 14) << 23);
        let bits = u32::from(self.to_bits());
        let normal = ((bits & 0x7fff) << 13) + REBIAS;
        let subnormal = (f32::from_bits(normal + (1 << 23)) - SMALLEST_NORMAL).to_bits();
        let magnitude = if bits & 0x7c00 == 0 { subnormal } else { normal };
        f32::from_bits(magnitude | ((bits & 0x8000) << 16))
    }
}

/// A row of a panel, and how to decode it in code that vectorises.
trait Row: Copy {
    /// Whether there is nothing to decode.
    const WIDE: bool = false;

    /// The row, decoded into `buffer` unless it is wide already.
    fn widen<'b>(self, buffer: &'b mut [f32; PANEL]) -> &'b [f32; PANEL]
    where
        Self: 'b;
}

impl<W: Stored> Row for &[W; PANEL] {
    const WIDE: bool = W::WIDE;

    #[inline(always)]
    fn widen<'b>(self, buffer: &'b mut [f32; PANEL]) -> &'b [f32; PANEL]
    where
        Self: 'b,
    {
        W::widen_row(self, buffer)
    }
}

/// A row of weights in steps of their scales.
trait Units: Copy + Send + Sync {
    /// How many times too large the units are as they are read: by as much the scales are divided, which is exact.
    const UNIT: f32;

    /// Every weight, from scales that were divided.
    fn times(&self, scales: impl Fn(usize) -> f32, out: &mut [f32; PANEL]);
}

impl Units for [i8; PANEL] {
    const UNIT: f32 = 1.0;

    #[inline(always)]
    fn times(&self, scales: impl Fn(usize) -> f32, out: &mut [f32; PANEL]) {
        for i in 0..PANEL {
            out[i] = f32::from(self[i]) * scales(i);
        }
    }
}

/// A half byte stays where it is, which makes it sixteen times as large.
impl Units for [i8; PANEL / 2] {
    const UNIT: f32 = 16.0;

    #[inline(always)]
    fn times(&self, scales: impl Fn(usize) -> f32, out: &mut [f32; PANEL]) {
        for i in 0..PANEL / 2 {
            out[i] = f32::from(self[i] << 4) * scales(i);
            out[i + PANEL / 2] = f32::from(self[i] & -16) * scales(i + PANEL / 2);
        }
    }
}

/// A row whose blocks lie along the inputs, with the scale of each output.
#[derive(Clone, Copy)]
struct OutputRow<'a, W>(&'a W, &'a [f32; PANEL]);

impl<W: Units> Row for OutputRow<'_, W> {
    #[inline(always)]
    fn widen<'b>(self, buffer: &'b mut [f32; PANEL]) -> &'b [f32; PANEL]
    where
        Self: 'b,
    {
        self.0.times(
            #[inline(always)]
            |i| self.1[i],
            buffer,
        );
        buffer
    }
}

/// A row whose blocks lie along the outputs, with their scales.
#[derive(Clone, Copy)]
struct InputRow<'a, W>(&'a W, [f32; SHARED]);

impl<W: Units> Row for InputRow<'_, W> {
    #[inline(always)]
    fn widen<'b>(self, buffer: &'b mut [f32; PANEL]) -> &'b [f32; PANEL]
    where
        Self: 'b,
    {
        self.0.times(
            #[inline(always)]
            |i| self.1[i / quant::BLOCK],
            buffer,
        );
        buffer
    }
}

/// A panel, by [`BLOCK`]s of inputs.
trait Panel: Copy {
    /// A row.
    type Row<'a>: Row
    where
        Self: 'a;

    /// What a block needs beside its rows.
    type Prepared;

    /// Its inputs.
    fn inputs(self) -> usize;

    /// Prepares for a block.
    fn prepare(self, block: usize) -> Self::Prepared;

    /// The row of an input of the block that was prepared for.
    fn row<'a>(self, prepared: &'a Self::Prepared, input: usize) -> Self::Row<'a>
    where
        Self: 'a;

    /// The rows of some.
    fn rows<'a>(
        self,
        prepared: &'a Self::Prepared,
        inputs: Range<usize>,
    ) -> impl Iterator<Item = Self::Row<'a>> + Clone
    where
        Self: 'a;
}

impl<W: Stored> Panel for &[[W; PANEL]] {
    type Row<'a>
        = &'a [W; PANEL]
    where
        Self: 'a;
    type Prepared = ();

    fn inputs(self) -> usize {
        self.len()
    }

    fn prepare(self, _: usize) {}

    #[inline(always)]
    fn row<'a>(self, (): &'a (), input: usize) -> &'a [W; PANEL]
    where
        Self: 'a,
    {
        &self[input]
    }

    #[inline(always)]
    fn rows<'a>(self, (): &'a (), inputs: Range<usize>) -> impl Iterator<Item = &'a [W; PANEL]> + Clone
    where
        Self: 'a,
    {
        self[inputs].iter()
    }
}

/// Widens as many scales as there are on both sides, for units as they are read.
fn widen_scales<W: Units>(stored: &[f16], scales: &mut [f32]) {
    vectorised(
        #[inline(always)]
        || {
            for (scale, stored) in scales.iter_mut().zip(stored) {
                *scale = stored.widen() / W::UNIT;
            }
        },
    );
}

/// Blocks along the outputs.
#[derive(Clone, Copy)]
struct ByInput<'p, W> {
    units: &'p [W],
    scales: &'p [[f16; SHARED]],
}

impl<W: Units> Panel for ByInput<'_, W> {
    type Row<'a>
        = InputRow<'a, W>
    where
        Self: 'a;
    type Prepared = [[f32; SHARED]; BLOCK];

    fn inputs(self) -> usize {
        self.units.len()
    }

    fn prepare(self, block: usize) -> Self::Prepared {
        let mut scales = [[0.0; SHARED]; BLOCK];
        let stored = &self.scales[block * BLOCK..];
        widen_scales::<W>(stored.as_flattened(), scales.as_flattened_mut());
        scales
    }

    #[inline(always)]
    fn row<'a>(self, prepared: &'a Self::Prepared, input: usize) -> InputRow<'a, W>
    where
        Self: 'a,
    {
        InputRow(&self.units[input], prepared[input % BLOCK])
    }

    #[inline(always)]
    fn rows<'a>(
        self,
        prepared: &'a Self::Prepared,
        inputs: Range<usize>,
    ) -> impl Iterator<Item = InputRow<'a, W>> + Clone
    where
        Self: 'a,
    {
        inputs.map(move |input| self.row(prepared, input))
    }
}

/// Blocks along the inputs, whose scales are widened once.
#[derive(Clone, Copy)]
struct ByOutput<'p, W> {
    units: &'p [W],
    scales: &'p [[f16; PANEL]],
}

impl<W: Units> Panel for ByOutput<'_, W> {
    type Row<'a>
        = OutputRow<'a, W>
    where
        Self: 'a;
    type Prepared = [[f32; PANEL]; BLOCK / quant::BLOCK];

    fn inputs(self) -> usize {
        self.units.len()
    }

    fn prepare(self, block: usize) -> Self::Prepared {
        let mut scales = [[0.0; PANEL]; BLOCK / quant::BLOCK];
        let stored = &self.scales[block * (BLOCK / quant::BLOCK)..];
        widen_scales::<W>(stored.as_flattened(), scales.as_flattened_mut());
        scales
    }

    #[inline(always)]
    fn row<'a>(self, prepared: &'a Self::Prepared, input: usize) -> OutputRow<'a, W>
    where
        Self: 'a,
    {
        OutputRow(&self.units[input], &prepared[input % BLOCK / quant::BLOCK])
    }

    #[inline(always)]
    fn rows<'a>(
        self,
        prepared: &'a Self::Prepared,
        inputs: Range<usize>,
    ) -> impl Iterator<Item = OutputRow<'a, W>> + Clone
    where
        Self: 'a,
    {
        inputs.map(move |input| self.row(prepared, input))
    }
}

fn panel_of<P: Panel>(panel: P, x: &[f32], active: Option<&[Vec<usize>]>, y: &mut [&mut [f32]]) {
    let mut buffer = Vec::new(); // only many rows need it
    let mut done = 0;
    for (i, first) in (0..panel.inputs()).step_by(BLOCK).enumerate() {
        let all = first..(first + BLOCK).min(panel.inputs());
        let inputs = done..done + active.map_or(all.len(), |active| active[i].len());
        done = inputs.end;
        let prepared = panel.prepare(i);
        match active {
            // few rows: widened in registers, so that reading the weights never pauses
            None if P::Row::WIDE || y.len() <= TILE => multiply(panel.rows(&prepared, all), x, inputs, y),
            None => {
                buffer.resize(BLOCK, [0.0; PANEL]);
                let block = &mut buffer[..all.len()];
                widen(panel.rows(&prepared, all), block);
                multiply(block.iter(), x, inputs, y);
            }
            Some(active) => {
                let rows = active[i].iter().map(|&input| panel.row(&prepared, input));
                multiply(rows, x, inputs, y);
            }
        }
    }
}

fn widen<R: Row>(rows: impl Iterator<Item = R>, block: &mut [[f32; PANEL]]) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for (row, out) in rows.zip(block) {
                row.widen(out);
            }
        },
    );
}

/// Adds the product of a block of weights and the `inputs` of the packed rows `x` to the rows of `y`; the first block
/// sets them.
fn multiply<R: Row>(
    weights: impl Iterator<Item = R> + Clone,
    x: &[f32],
    inputs: Range<usize>,
    y: &mut [&mut [f32]],
) {
    let stride = x.len() / y.len();
    for (rows, x) in y.chunks_mut(TILE).zip(x.chunks(TILE * stride)) {
        let x = &x[inputs.start * rows.len()..inputs.end * rows.len()];
        let mut sums = [[0.0; PANEL]; TILE];
        let weights = weights.clone();
        match rows.len() {
            1 => tile::<_, _, 1>(weights, x, &mut sums),
            2 => tile::<_, _, 2>(weights, x, &mut sums),
            3 => tile::<_, _, 3>(weights, x, &mut sums),
            4 => tile::<_, _, 4>(weights, x, &mut sums),
            5 => tile::<_, _, 5>(weights, x, &mut sums),
            _ => tile::<_, _, 6>(weights, x, &mut sums),
        }
        for (y, sums) in rows.iter_mut().zip(&sums) {
            for (y, &sum) in y.iter_mut().zip(sums) {
                *y = if inputs.start == 0 { sum } else { *y + sum };
            }
        }
    }
}

/// `sums[m][o] = sum_i x[i][m] * weights[i][o]` for `M` rows.
fn tile<R: Row, I: Iterator<Item = R> + Clone, const M: usize>(
    weights: I,
    x: &[f32],
    sums: &mut [[f32; PANEL]; TILE],
) {
    struct Tile<'a, I, const M: usize> {
        weights: I,
        x: &'a [[f32; M]],
        sums: &'a mut [[f32; PANEL]; TILE],
    }

    impl<R: Row, I: Iterator<Item = R> + Clone, const M: usize> WithSimd for Tile<'_, I, M> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            // as many vectors side by side as the registers hold beside the rows' sums
            match (S::REGISTER_COUNT, M) {
                (32.., _) => vectors::<S, R, I, M, 4>(simd, self),
                (_, 1) => vectors::<S, R, I, M, 8>(simd, self),
                (_, 2 | 3) => vectors::<S, R, I, M, 4>(simd, self),
                _ => vectors::<S, R, I, M, 2>(simd, self),
            }
        }
    }

    #[inline(always)]
    fn vectors<S: Simd, R: Row, I: Iterator<Item = R> + Clone, const M: usize, const V: usize>(
        simd: S,
        tile: Tile<'_, I, M>,
    ) {
        for first in (0..PANEL / S::F32_LANES).step_by(V) {
            let mut sum = [[simd.splat_f32s(0.0); V]; M];
            for (w, x) in tile.weights.clone().zip(tile.x) {
                let mut buffer = [0.0; PANEL];
                let w = &S::as_simd_f32s(w.widen(&mut buffer)).0[first..first + V];
                for m in 0..M {
                    let x = simd.splat_f32s(x[m]);
                    for v in 0..V {
                        sum[m][v] = simd.mul_add_e_f32s(x, w[v], sum[m][v]);
                    }
                }
            }
            for m in 0..M {
                S::as_mut_simd_f32s(&mut tile.sums[m]).0[first..first + V].copy_from_slice(&sum[m]);
            }
        }
    }

    Arch::new().dispatch(Tile { weights, x: x.as_chunks::<M>().0, sums });
}

/// Rows `x` `[T, inputs]` as the tiles want them: `[inputs, TILE]` for every [`TILE`] rows, and `[inputs, rest]`.
fn interleave(inputs: usize, x: &[f32]) -> Cow<'_, [f32]> {
    if x.len() == inputs {
        return Cow::Borrowed(x);
    }
    let mut out = vec![0.0; x.len()];
    out.par_chunks_mut(TILE * inputs).zip(x.par_chunks(TILE * inputs)).for_each(|(out, x)| {
        let rows = x.len() / inputs;
        for (m, row) in x.chunks_exact(inputs).enumerate() {
            for (out, &x) in out.chunks_exact_mut(rows).zip(row) {
                out[m] = x;
            }
        }
    });
    Cow::Owned(out)
}

/// One panel of one layer, with the part of each row's output that it computes.
struct Task<'a> {
    layer: &'a Packed,
    panel: usize,
    /// Interleaved.
    x: &'a [f32],
    y: Vec<&'a mut [f32]>,
}

fn tasks<'a>(layer: &'a Packed, x: &'a [f32], y: &'a mut [f32]) -> Vec<Task<'a>> {
    let rows = y.len() / layer.outputs;
    let mut tasks: Vec<_> = (0..layer.outputs.div_ceil(PANEL))
        .map(|panel| Task { layer, panel, x, y: Vec::with_capacity(rows) })
        .collect();
    for row in y.chunks_exact_mut(layer.outputs) {
        for (task, y) in tasks.iter_mut().zip(row.chunks_mut(PANEL)) {
            task.y.push(y);
        }
    }
    tasks
}

fn run(tasks: Vec<Task<'_>>, active: Option<&[Vec<usize>]>) {
    tasks.into_par_iter().for_each(|mut task| {
        if !task.y.is_empty() {
            task.layer.panel(task.panel, task.x, active, &mut task.y);
        }
    });
}

impl Linear<f32> for Packed {
    fn inputs(&self) -> usize {
        self.inputs
    }

    fn outputs(&self) -> usize {
        self.outputs
    }

    fn apply(&self, x: &[f32], y: &mut [f32]) {
        Self::apply_all(&mut [Job { layer: self, x, y }]);
    }

    fn apply_sparse(&self, x: &[f32], y: &mut [f32]) {
        let rows = rows(self, x, y);
        if rows == 0 || rows > SPARSE_ROWS {
            return self.apply(x, y);
        }
        let nonzero = |&i: &usize| (0..rows).any(|row| x[row * self.inputs + i] != 0.0);
        let active: Vec<Vec<usize>> = (0..self.inputs)
            .step_by(BLOCK)
            .map(|first| (first..(first + BLOCK).min(self.inputs)).filter(nonzero).collect())
            .collect();
        if active.iter().map(Vec::len).sum::<usize>() > self.inputs / SPARSE_SHARE {
            return self.apply(x, y);
        }
        let column = |&input: &usize| (0..rows).map(move |row| x[row * self.inputs + input]);
        let interleaved: Vec<f32> = active.iter().flatten().flat_map(column).collect();
        if interleaved.is_empty() {
            return y.fill(0.0);
        }
        run(tasks(self, &interleaved, y), Some(&active));
    }

    fn apply_all(jobs: &mut [Job<'_, Self, f32>]) {
        for job in &*jobs {
            rows(job.layer, job.x, job.y);
        }
        let x: Vec<_> = jobs.iter().map(|job| interleave(job.layer.inputs, job.x)).collect();
        run(jobs.iter_mut().zip(&x).flat_map(|(job, x)| tasks(job.layer, x, job.y)).collect(), None);
    }
}

impl Compute<f32> for Packed {
    fn wkv7(form: Wkv, segments: &mut [WkvSegment<'_, f32>]) {
        match form {
            Wkv::Sequential => super::wkv7::wkv7(segments),
            Wkv::Chunked(chunk) => segments.par_iter_mut().for_each(|s| {
                // A token alone is no chunk: it is decoded as fast as without them.
                if s.dims.tokens == 1 {
                    super::wkv7::wkv7(std::slice::from_mut(s));
                } else {
                    wkv7_chunked::wkv7_chunked(s.dims, chunk, s.inputs, s.state, s.y);
                }
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use proptest::prelude::*;

    use super::{BLOCK, PANEL, Packed, Stored};
    use crate::compare::{magnitude, max_abs};
    use crate::ops::linear::{Job, Linear, Matrix};
    use crate::quant::{Blocks, Format};
    use crate::rng::SplitMix64;
    use crate::{ElementType, Elements};

    #[test]
    fn widening_is_exact() {
        for bits in 0..=u16::MAX {
            let (half, brain) = (f16::from_bits(bits), bf16::from_bits(bits));
            if half.is_finite() {
                assert_eq!(Stored::widen(half).to_bits(), half.to_f32().to_bits(), "f16 {bits:#x}");
            }
            if !brain.is_nan() {
                assert_eq!(Stored::widen(brain).to_bits(), brain.to_f32().to_bits(), "bf16 {bits:#x}");
            }
        }
    }

    fn draw(kind: u8, inputs: usize, outputs: usize, rng: &mut SplitMix64) -> (Elements, Packed) {
        let values: Vec<f32> = (0..inputs * outputs).map(|_| rng.normal()).collect();
        let weights = match kind {
            0 => Elements::F32(values),
            1 => Elements::F16(values.into_iter().map(f16::from_f32).collect()),
            _ => Elements::BF16(values.into_iter().map(bf16::from_f32).collect()),
        };
        let read = |rows: std::ops::Range<usize>| {
            let at = rows.start * inputs..rows.end * inputs;
            Ok::<_, ()>(match &weights {
                Elements::F32(v) => Elements::F32(v[at].to_vec()),
                Elements::F16(v) => Elements::F16(v[at].to_vec()),
                Elements::BF16(v) => Elements::BF16(v[at].to_vec()),
            })
        };
        let packed = Packed::pack(inputs, outputs, weights.element_type(), read).unwrap();
        (weights, packed)
    }

    fn run(packed: &Packed, x: &[f32], sparse: bool) -> Vec<f32> {
        let mut y = vec![f32::NAN; x.len() / packed.inputs() * packed.outputs()];
        if sparse {
            packed.apply_sparse(x, &mut y);
        } else {
            packed.apply(x, &mut y);
        }
        y
    }

    fn shape() -> impl Strategy<Value = (u8, usize, usize, usize, u64)> {
        (0u8..3, 1usize..300, 1usize..(2 * PANEL + 3), 1usize..15, any::<u64>())
    }

    proptest! {
        /// Against the definition in f64. A sum of n products in f32, each rounded once, is off by at most
        /// n eps sum |w x|, half of it per rounding; blocks and fused products only lower that.
        #[test]
        fn agrees_with_the_definition((kind, inputs, outputs, rows, seed) in shape()) {
            let mut rng = SplitMix64::new(seed);
            let (weights, packed) = draw(kind, inputs, outputs, &mut rng);
            let x: Vec<f32> = (0..rows * inputs).map(|_| rng.normal()).collect();
            let wide: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
            let matrix = Matrix::new(inputs, weights.widen::<f64>());
            let mut want = vec![f64::NAN; rows * outputs];
            matrix.apply(&wide, &mut want);
            let largest = magnitude(matrix.weights()) * magnitude(&wide) * inputs as f64;
            let limit = inputs as f64 * f64::from(f32::EPSILON) / 2.0 * largest;
            let got = run(&packed, &x, false);
            prop_assert!(max_abs(&got, &want, limit).is_ok(), "{:?}", max_abs(&got, &want, limit));
        }

        #[test]
        fn a_row_is_the_same_alone_and_in_a_batch((kind, inputs, outputs, rows, seed) in shape()) {
            let mut rng = SplitMix64::new(seed);
            let (_, packed) = draw(kind, inputs, outputs, &mut rng);
            let x: Vec<f32> = (0..rows * inputs).map(|_| rng.normal()).collect();
            let alone: Vec<f32> = x.chunks_exact(inputs).flat_map(|row| run(&packed, row, false)).collect();
            prop_assert_eq!(run(&packed, &x, false), alone, "bits");
        }

        #[test]
        fn leaving_out_zeros_changes_nothing((kind, inputs, outputs, rows, seed) in shape(), zeros in 0.0f32..1.0) {
            let mut rng = SplitMix64::new(seed);
            let (_, packed) = draw(kind, inputs, outputs, &mut rng);
            let mut unit = || if rng.uniform(0.0, 1.0) < zeros { 0.0 } else { rng.normal() };
            let x: Vec<f32> = (0..rows * inputs).map(|_| unit()).collect();
            prop_assert_eq!(run(&packed, &x, true), run(&packed, &x, false), "values");
        }
    }

    /// A matrix in blocks, and its decoded values, either way round.
    fn draw_blocks(
        format: Format,
        hidden_major: bool,
        inputs: usize,
        outputs: usize,
        rng: &mut SplitMix64,
    ) -> [Packed; 2] {
        let values: Vec<f32> = (0..inputs * outputs).map(|_| rng.normal()).collect();
        let columns = if hidden_major { outputs } else { inputs };
        let blocks = Blocks::encode(format, columns, &values).unwrap();
        let decoded = blocks.decode();
        let read = |rows: std::ops::Range<usize>| {
            let of = |output: usize, input: usize| match hidden_major {
                false => decoded.weights()[output * inputs + input],
                true => decoded.weights()[input * outputs + output],
            };
            let all = rows.flat_map(|output| (0..inputs).map(move |input| of(output, input)));
            Ok::<_, ()>(Elements::F32(all.collect()))
        };
        let plain = Packed::pack(inputs, outputs, ElementType::F32, read).unwrap();
        let of_rows = |rows: std::ops::Range<usize>| {
            let (bytes, blocks_of) = (blocks.weights().len() / blocks.rows(), blocks.row_blocks());
            let weights = blocks.weights()[rows.start * bytes..rows.end * bytes].to_vec();
            let scales = blocks.scales()[rows.start * blocks_of..rows.end * blocks_of].to_vec();
            Blocks::from_parts(format, [rows.len(), inputs], weights, scales).ok_or(())
        };
        let packed = match hidden_major {
            true => Packed::of_hidden_major(&blocks),
            false => Packed::pack_blocks(format, inputs, outputs, of_rows).unwrap(),
        };
        [packed, plain]
    }

    proptest! {
        /// Bit for bit what their decoded values give, in whatever number of rows, with zeros multiplied and skipped.
        #[test]
        fn blocks_are_their_decoded_values(
            (_, inputs, outputs, rows, seed) in shape(),
            bytes: bool,
            hidden_major: bool,
            zeros in 0.0f32..1.2,
        ) {
            let format = if bytes { Format::Int8 } else { Format::Int4 };
            let mut rng = SplitMix64::new(seed);
            let [blocks, plain] = draw_blocks(format, hidden_major, inputs, outputs, &mut rng);
            let mut unit = || if rng.uniform(0.0, 1.0) < zeros { 0.0 } else { rng.normal() };
            let x: Vec<f32> = (0..rows * inputs).map(|_| unit()).collect();
            for sparse in [false, true] {
                let bits = |y: Vec<f32>| y.into_iter().map(f32::to_bits).collect::<Vec<_>>();
                let (got, want) = (bits(run(&blocks, &x, sparse)), bits(run(&plain, &x, sparse)));
                prop_assert_eq!(got, want, "{:?}, sparse {}", format, sparse);
            }
        }
    }

    #[test]
    fn blocks_take_their_bytes() {
        for (format, bytes) in [(Format::Int8, 34), (Format::Int4, 18)] {
            for hidden_major in [false, true] {
                let [blocks, _] = draw_blocks(format, hidden_major, 128, 64, &mut SplitMix64::new(1));
                assert_eq!(blocks.bytes(), 128 * 64 / 32 * bytes, "{format:?}");
            }
        }
    }

    #[test]
    fn several_layers_side_by_side() {
        let mut rng = SplitMix64::new(5);
        let layers: Vec<Packed> = [(70, 130), (3, 1), (200, 64)]
            .map(|(inputs, outputs)| draw(1, inputs, outputs, &mut rng).1)
            .into();
        let x: Vec<Vec<f32>> =
            layers.iter().map(|l| (0..3 * l.inputs()).map(|_| rng.normal()).collect()).collect();
        let mut y: Vec<Vec<f32>> = layers.iter().map(|l| vec![f32::NAN; 3 * l.outputs()]).collect();
        let mut jobs: Vec<_> =
            layers.iter().zip(&x).zip(&mut y).map(|((layer, x), y)| Job { layer, x, y }).collect();
        Packed::apply_all(&mut jobs);
        for ((layer, x), y) in layers.iter().zip(&x).zip(&y) {
            assert_eq!(*y, run(layer, x, false), "as alone");
        }
    }

    #[test]
    fn an_error_while_packing_is_returned() {
        let read = |rows: std::ops::Range<usize>| {
            if rows.start == 0 { Ok(Elements::F32(vec![1.0; rows.len()])) } else { Err("cut short") }
        };
        let packed = Packed::pack(1, PANEL + 1, ElementType::F32, read);
        assert_eq!(packed.map(|p| p.outputs()), Err("cut short"), "the reader's error");
    }

    #[test]
    fn rows_of_zeros_give_zeros() {
        let (_, packed) = draw(0, 20, 3, &mut SplitMix64::new(1));
        assert_eq!(run(&packed, &[0.0; 40], true), [0.0; 6], "every output is written");
    }

    /// Bit for bit: the order that the module states.
    #[test]
    fn sums_in_the_order_stated() {
        #[cfg(target_arch = "x86_64")]
        if !std::is_x86_feature_detected!("fma") {
            return;
        }
        let mut rng = SplitMix64::new(7);
        let (weights, packed) = draw(0, 300, 5, &mut rng);
        let x: Vec<f32> = (0..300).map(|_| rng.normal()).collect();
        let block = |(w, x): (&[f32], &[f32])| w.iter().zip(x).fold(0.0, |sum, (&w, &x)| x.mul_add(w, sum));
        let row = |w: &[f32]| w.chunks(BLOCK).zip(x.chunks(BLOCK)).map(block).fold(0.0, |y, sum| y + sum);
        let want: Vec<f32> = weights.widen().chunks_exact(300).map(row).collect();
        assert_eq!(run(&packed, &x, false), want, "blocks of {BLOCK}, fused");
    }

    #[test]
    #[should_panic(expected = "y is not [T, outputs]")]
    fn an_output_of_another_length_is_refused() {
        draw(0, 2, 3, &mut SplitMix64::new(1)).1.apply(&[1.0; 4], &mut [0.0; 5]);
    }

    #[test]
    #[should_panic(expected = "read gives another number of weights")]
    fn too_few_weights_are_refused() {
        let read = |_| Ok::<_, ()>(Elements::F32(vec![1.0; 6]));
        let _ = Packed::pack(2, 4, ElementType::F32, read);
    }
}
