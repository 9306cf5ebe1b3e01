//! A model's weights on the device: uploaded from the checkpoint in one stream, laid out as the kernels read them.
//!
//! | buffer | layout |
//! |---|---|
//! | `stack` | rows of `D`: receptance, key, value, then the first factors of the adapters w, a, v, g |
//! | `up` | rows of `D`: the second factors of the adapters w, a, v, g |
//! | `output`, `key`, `head` | as in the file, `[outputs, inputs]` |
//! | `value` | hidden-major, `[F, D]`, so that a hidden unit which is zero leaves a row unread |
//! | `embedding` | as in the file, `[V, D]` |
//!
//! Matrices are halves, or by the recipe in blocks, and their scales after them ([`stored`]). Weights of other types are
//! converted, and refused if one is beyond what a half holds, or decodes to that from its block.
//! Vectors are `f32`. The host holds what is staged of two layers at most, and a matrix.

use std::cell::RefCell;
use std::ops::Range;

use half::f16;
use rayon::prelude::*;
use rwkv_core::config::Ranks;
use rwkv_core::quant::{Blocks, Format};
use rwkv_core::{Elements, ModelConfig};
use rwkv_kernels::gpu::Device;
use rwkv_kernels::kernels::weights as stored;
use rwkv_kernels::pipeline::checked;
use wgpu::WriteOnly;

use super::{Error, sound};
use crate::checkpoint::{Checkpoint, Fault, Progress, Reader};
use crate::recipe::{Matrix, Recipe};

/// Weights read at a time by one thread.
const BLOCK: usize = 1 << 18;

/// A model on the device.
#[derive(Debug)]
pub(super) struct Weights {
    pub(super) embedding: wgpu::Buffer,
    /// ln0, gain and bias, `[2, D]`.
    pub(super) ln0: wgpu::Buffer,
    pub(super) layers: Vec<Layer>,
    /// `ln_out`, gain and bias, `[2, D]`.
    pub(super) ln_out: wgpu::Buffer,
    pub(super) head: wgpu::Buffer,
}

/// A layer on the device.
#[derive(Debug)]
pub(super) struct Layer {
    /// Of the adapters; `v` is 0 in layer 0.
    pub(super) ranks: Ranks,
    /// What its matrices are in, by [`Matrix`].
    formats: [Option<Format>; Matrix::ALL.len()],
    pub(super) stack: wgpu::Buffer,
    pub(super) up: wgpu::Buffer,
    pub(super) output: wgpu::Buffer,
    pub(super) key: wgpu::Buffer,
    pub(super) value: wgpu::Buffer,
    /// ln1's gain and bias, then the mixes r w k v a g; `[8, D]`.
    pub(super) att: wgpu::Buffer,
    /// `w0`, `a0`, `v0`, `k_k`, `k_a`, `r_k`, gain and bias of the group norm; `[8, D]`.
    pub(super) heads: wgpu::Buffer,
    /// ln2's gain and bias, then the mix; `[3, D]`.
    pub(super) ffn: wgpu::Buffer,
}

impl Layer {
    /// What a matrix is in, `None` for halves.
    pub(super) const fn format(&self, of: Matrix) -> Option<Format> {
        self.formats[of as usize]
    }

    /// Outputs of the stack: what the heads read of a token.
    pub(super) const fn inputs(&self, width: usize) -> usize {
        3 * width + self.ranks.w + self.ranks.a + self.ranks.v + self.ranks.g
    }
}

impl Weights {
    /// Bytes of the matrices, but for the embedding.
    pub(super) fn bytes(&self) -> u64 {
        let of_layer =
            |of: &Layer| [&of.stack, &of.up, &of.output, &of.key, &of.value].map(wgpu::Buffer::size);
        self.layers.iter().flat_map(of_layer).sum::<u64>() + self.head.size()
    }

    /// Uploads the weights; `progress` is told of every stretch read, from several threads.
    pub(super) fn upload(
        device: &Device,
        checkpoint: &Checkpoint,
        recipe: &Recipe,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<Self, Error> {
        let upload = Upload {
            device,
            recipe,
            reader: checkpoint.reader(progress),
            config: *checkpoint.config(),
            staging: RefCell::default(),
        };
        upload.model().map_err(|error| match error {
            Failed::Fault(fault) => Error::Checkpoint(checkpoint.error(fault)),
            Failed::Device(error) => error,
        })
    }
}

/// What stopped an upload.
enum Failed {
    /// The checkpoint.
    Fault(Fault),
    /// The device.
    Device(Error),
}

impl From<Fault> for Failed {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self::Device(error)
    }
}

struct Upload<'a> {
    device: &'a Device,
    recipe: &'a Recipe,
    reader: Reader<'a>,
    config: ModelConfig,
    staging: RefCell<Staging>,
}

/// Memory that both the host and the device reach, through which weights go. Layers are alike: what one went through takes the
/// next, since a driver needs longer to give such memory than a copy takes (0.2 s/GB beside an H100).
#[derive(Default)]
struct Staging {
    /// Mapped.
    free: Vec<wgpu::Buffer>,
    /// Those that copies were asked of.
    used: Vec<wgpu::Buffer>,
}

impl Staging {
    /// One of just so many bytes, mapped.
    fn take(&mut self, size: u64) -> Option<wgpu::Buffer> {
        let at = self.free.iter().position(|of| of.size() == size)?;
        Some(self.free.swap_remove(at))
    }
}

/// Rows of a matrix on their way into a buffer.
struct Piece {
    /// The tensor.
    name: String,
    rows: usize,
    columns: usize,
    /// Whether the file has it the other way round.
    turned: bool,
    /// Which matrix it is, if that may be in blocks.
    matrix: Option<(usize, Matrix)>,
}

impl Upload<'_> {
    fn model(&self) -> Result<Weights, Failed> {
        let ModelConfig { width, vocab, n_layers, .. } = self.config;
        let plain = |name: &str, rows, matrix| Piece {
            name: name.to_owned(),
            rows,
            columns: width,
            turned: false,
            matrix,
        };
        let mut layers = Vec::with_capacity(n_layers);
        for layer in 0..n_layers {
            layers.push(self.layer(layer)?);
            self.settle()?;
        }
        let norm = |name: &str| {
            let [gain, bias] =
                ["weight", "bias"].map(|of| self.reader.vector::<f32>(&format!("{name}.{of}")));
            self.floats("vectors", &[gain?, bias?].concat())
        };
        let embedding = self.matrix("embedding", &[plain("emb.weight", vocab, None)])?;
        self.settle()?; // for the head, which is as large
        let all = Weights {
            embedding,
            ln0: norm("blocks.0.ln0")?,
            layers,
            ln_out: norm("ln_out")?,
            head: self.matrix("head", &[plain("head.weight", vocab, Some((0, Matrix::Head)))])?,
        };
        self.settle()?;
        Ok(all)
    }

    fn layer(&self, layer: usize) -> Result<Layer, Failed> {
        let ModelConfig { width, hidden, ranks, .. } = self.config;
        let name = |of: &str| format!("blocks.{layer}.{of}");
        let matrix = |of: Matrix, rows| Piece {
            name: of.tensor(layer),
            rows,
            columns: width,
            turned: of == Matrix::FfnValue,
            matrix: Some((layer, of)),
        };
        // The factors are `[D, rank]` and `[rank, D]` in official files, and the other way round in others.
        let turned = self.reader.factors_are_turned();
        let factor = |of: &str, rank, turned| Piece {
            name: name(of),
            rows: rank,
            columns: width,
            turned,
            matrix: None,
        };
        let ranks = Ranks { v: if layer == 0 { 0 } else { ranks.v }, ..ranks };
        let adapters = [("w", ranks.w), ("a", ranks.a), ("v", ranks.v), ("g", ranks.g)];
        let factors = |end: char, turned| {
            let of =
                move |&(adapter, rank): &(&str, usize)| factor(&format!("att.{adapter}{end}"), rank, turned);
            adapters.iter().filter(|(_, rank)| *rank > 0).map(of).collect::<Vec<_>>()
        };
        let projections = [Matrix::Receptance, Matrix::Key, Matrix::Value];
        let mut stack = Vec::from(projections.map(|of| matrix(of, width)));
        stack.extend(factors('1', !turned));

        let norm = |of: &str| [name(&format!("{of}.weight")), name(&format!("{of}.bias"))];
        let att = |of: &str| name(&format!("att.{of}"));
        let vectors = |parts: &[Vec<f32>]| self.floats("vectors", &parts.concat());
        let vector = |of: &str| self.reader.vector::<f32>(of);
        let [ln1, ln2, ln_x] = ["ln1", "ln2", "att.ln_x"].map(norm);
        let v0 = if layer == 0 { vec![0.0; width] } else { vector(&att("v0"))? };
        Ok(Layer {
            ranks,
            formats: Matrix::ALL.map(|of| self.recipe.format(layer, of).blocks()),
            stack: self.matrix("stack", &stack)?,
            up: self.matrix("up", &factors('2', turned))?,
            output: self.matrix("output", &[matrix(Matrix::Output, width)])?,
            key: self.matrix("key", &[matrix(Matrix::FfnKey, hidden)])?,
            value: self.matrix("value", &[matrix(Matrix::FfnValue, hidden)])?,
            att: vectors(&[vector(&ln1[0])?, vector(&ln1[1])?, self.reader.mixes(&att(""))?])?,
            heads: vectors(&[
                vector(&att("w0"))?,
                vector(&att("a0"))?,
                v0,
                vector(&att("k_k"))?,
                vector(&att("k_a"))?,
                vector(&att("r_k"))?,
                vector(&ln_x[0])?,
                vector(&ln_x[1])?,
            ])?,
            ffn: vectors(&[vector(&ln2[0])?, vector(&ln2[1])?, vector(&name("ffn.x_k"))?])?,
        })
    }

    fn floats(&self, label: &str, values: &[f32]) -> Result<wgpu::Buffer, Failed> {
        self.buffer(label, size_of_val(values), |mut to| {
            to.copy_from_slice(bytemuck::cast_slice(values));
            Ok(())
        })
    }

    /// Matrices, one after the other.
    fn matrix(&self, label: &str, pieces: &[Piece]) -> Result<wgpu::Buffer, Failed> {
        let bytes = |piece: &Piece| {
            let format = piece.matrix.and_then(|(layer, of)| self.recipe.format(layer, of).blocks());
            stored::ELEMENT * stored::len(format, piece.rows * piece.columns)
        };
        self.buffer(label, pieces.iter().map(bytes).sum(), |mut to| {
            for piece in pieces {
                let mut part = to.split_off(..bytes(piece)).unwrap_or_default();
                let blocks = piece.matrix.map(|(layer, of)| self.reader.blocks(self.recipe, layer, of));
                if let Some(blocks) = blocks.transpose()?.flatten() {
                    self.within_halves(piece, &blocks)?;
                    // A block's weights are whole elements, so that the scales follow at once.
                    let weights = part.split_off(..blocks.weights().len()).unwrap_or_default();
                    write_blocks(weights, &blocks);
                    part.copy_from_slice(&stored::scales(&blocks));
                } else if piece.turned {
                    self.turned(piece, part)?;
                } else {
                    self.straight(piece, part)?;
                }
            }
            Ok(())
        })
    }

    /// That every weight of blocks decodes to what a half holds: products of cooperative matrices decode them to halves, and
    /// whether a model opens is not the device's to decide.
    fn within_halves(&self, piece: &Piece, blocks: &Blocks) -> Result<(), Fault> {
        let Piece { name, rows, columns, turned, matrix } = piece;
        let stored = matrix.is_some_and(|(layer, of)| self.reader.stored_format(layer, of).is_some());
        let mut weights = vec![0.0f32; *columns];
        // A row all of whose scales are less than a 127th of the largest half has no weight beyond it, and is not decoded. Bits of halves
        // ascend as their magnitudes do.
        let least = f16::from_f32(f16::MAX.to_f32() / f32::from(i8::MAX)).to_bits();
        for (row, scales) in blocks.scales().chunks_exact(blocks.row_blocks()).enumerate() {
            if scales.iter().all(|scale| scale.to_bits() & 0x7fff < least) {
                continue;
            }
            blocks.decode_row(row, &mut weights);
            let beyond = |&(_, &value): &(usize, &f32)| !f16::from_f32(value).is_finite();
            if let Some((column, &value)) = weights.iter().enumerate().find(beyond) {
                // Where it is in the file.
                let index = if *turned && !stored { column * rows + row } else { row * columns + column };
                return Err(Fault::Beyond { tensor: name.clone(), index, value });
            }
        }
        Ok(())
    }

    /// A matrix as it lies in the file.
    fn straight(&self, piece: &Piece, to: WriteOnly<'_, [u8]>) -> Result<(), Fault> {
        let (name, reader) = (&piece.name, &self.reader);
        write(to, |part| halves(name, part.start, reader.elements(name, part)?))
    }

    /// A matrix that lies in the file the other way round, `[columns, rows]`.
    fn turned(&self, piece: &Piece, to: WriteOnly<'_, [u8]>) -> Result<(), Fault> {
        let (Piece { name, rows, columns, .. }, reader) = (piece, &self.reader);
        let lines = (BLOCK / rows).max(1) * rows;
        let starts: Vec<_> = (0..rows * columns).step_by(lines).collect();
        let read = |&start: &usize| {
            let end = (start + lines).min(rows * columns);
            halves(name, start, reader.elements(name, start..end)?)
        };
        let stored: Vec<Vec<f16>> = starts.par_iter().map(read).collect::<Result<_, _>>()?;
        write(to, |part| {
            let mut block = vec![f16::ZERO; part.len()];
            // Line by line, so that each is read where it lies: the parts that a line has in the block are `columns` apart.
            for (column, line) in stored.iter().flat_map(|lines| lines.chunks_exact(*rows)).enumerate() {
                let first = part.start.saturating_sub(column).div_ceil(*columns);
                let own = block.iter_mut().skip(first * columns + column - part.start).step_by(*columns);
                own.zip(&line[first..]).for_each(|(to, &value)| *to = value);
            }
            Ok(block)
        })
    }

    /// A buffer that `fill` writes.
    fn buffer(
        &self,
        label: &str,
        bytes: usize,
        fill: impl FnOnce(WriteOnly<'_, [u8]>) -> Result<(), Fault>,
    ) -> Result<wgpu::Buffer, Failed> {
        let limits = self.device.device().limits();
        let max = limits.max_buffer_size.min(limits.max_storage_buffer_binding_size);
        if bytes as u64 > max {
            return Err(Error::TooLarge { what: label.to_owned(), bytes: bytes as u64, max }.into());
        }
        let size = bytes.next_multiple_of(16) as u64;
        let create = |usage, mapped_at_creation| {
            let of = wgpu::BufferDescriptor { label: Some(label), size, usage, mapped_at_creation };
            checked::<_, Error>(self.device.device(), || self.device.device().create_buffer(&of))
        };
        let buffer = create(wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST, false)?;
        let free = self.staging.borrow_mut().take(size);
        let staged = match free {
            Some(staged) => staged,
            None => create(wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC, true)?,
        };
        {
            let mut view = staged.get_mapped_range_mut(..).map_err(Error::from)?;
            fill(view.slice(..bytes))?;
        }
        staged.unmap();
        let mut encoder =
            self.device.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        encoder.copy_buffer_to_buffer(&staged, 0, &buffer, 0, size);
        self.device.queue().submit([encoder.finish()]);
        self.staging.borrow_mut().used.push(staged);
        Ok(buffer)
    }

    /// Waits for the copies, and takes back what they were from. What nothing has used since is given up, so that the host never holds
    /// much of the model.
    fn settle(&self) -> Result<(), Failed> {
        let Staging { free, used } = &mut *self.staging.borrow_mut();
        free.clear();
        for staged in &*used {
            // A failure shows when the range is asked for.
            staged.map_async(wgpu::MapMode::Write, .., |_| ());
        }
        self.device.device().poll(wgpu::PollType::wait_indefinitely()).map_err(Error::from)?;
        sound(self.device)?;
        free.append(used);
        Ok(())
    }
}

/// Bytes that one thread writes at a time: at any width of a model, enough rows of a turned matrix that a line of a
/// cache, read for one of them, serves others.
const CHUNK: usize = 1 << 18;

/// Writes halves that `make` gives for ranges of them, several at a time.
fn write(
    to: WriteOnly<'_, [u8]>,
    make: impl Fn(Range<usize>) -> Result<Vec<f16>, Fault> + Sync,
) -> Result<(), Fault> {
    const HALF: usize = size_of::<f16>();
    let (chunks, mut rest) = to.into_chunks::<CHUNK>();
    let written = chunks.len() * CHUNK / HALF;
    // A chunk of known length may pass to another thread.
    let chunks: Vec<_> = chunks.into_iter().enumerate().collect();
    chunks.into_par_iter().try_for_each(|(i, chunk)| {
        let first = i * CHUNK / HALF;
        let values = make(first..first + CHUNK / HALF)?;
        WriteOnly::<[u8]>::from(chunk).copy_from_slice(bytemuck::cast_slice(&values));
        Ok::<_, Fault>(())
    })?;
    rest.copy_from_slice(bytemuck::cast_slice(&make(written..written + rest.len() / HALF)?));
    Ok(())
}

/// Writes the weights of blocks, several stretches at a time.
fn write_blocks(to: WriteOnly<'_, [u8]>, blocks: &Blocks) {
    let (chunks, mut rest) = to.into_chunks::<CHUNK>();
    let (from, last) = blocks.weights().as_chunks::<CHUNK>();
    let chunks: Vec<_> = chunks.into_iter().collect();
    chunks.into_par_iter().zip(from).for_each(|(to, from)| {
        WriteOnly::<[u8]>::from(to).copy_from_slice(&stored::laid(blocks.format(), from));
    });
    rest.copy_from_slice(&stored::laid(blocks.format(), last));
}

/// Weights as halves, or the first that is beyond them. `first` is the index of the first in its tensor.
fn halves(tensor: &str, first: usize, elements: Elements) -> Result<Vec<f16>, Fault> {
    let narrow = |(i, value): (usize, f32)| {
        let half = f16::from_f32(value);
        let beyond = || Fault::Beyond { tensor: tensor.to_owned(), index: first + i, value };
        half.is_finite().then_some(half).ok_or_else(beyond)
    };
    match elements {
        Elements::F16(values) => Ok(values),
        Elements::BF16(values) => values.into_iter().map(f32::from).enumerate().map(narrow).collect(),
        Elements::F32(values) => values.into_iter().enumerate().map(narrow).collect(),
    }
}
