//! From a checked checkpoint to a model: every tensor read once, into its final place.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use bytemuck::Pod;
use half::{bf16, f16};
use rayon::prelude::*;
use rwkv_core::fast::linear::Packed;
use rwkv_core::model::{Adapter, Block, ChannelMix, Model, Norm, TimeMix};
use rwkv_core::ops::linear::Matrix;
use rwkv_core::quant::{self, Blocks, Part};
use rwkv_core::{ElementType, Elements, Real};

use super::directory::{Dtype, Entry};
use super::{Checkpoint, Error, Fault, LoraLayout, MIXES, SCALES};
use crate::recipe::{self, Recipe};

/// How far loading has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes read.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

/// Elements read at a time where a tensor is not read by rows.
const STRETCH: usize = 1 << 20;

/// Weights quantised at a time by one thread: few enough that all threads have some of a small matrix.
const PART: usize = 1 << 16;

/// A matrix that can be made from rows of stored weights.
pub trait LoadMatrix: Sized {
    /// Makes a matrix of `outputs` rows of `inputs` weights of type `kind`. `read` gives ranges of rows, several
    /// at a time if asked from several threads.
    ///
    /// # Errors
    ///
    /// The first error of `read`.
    fn load<E: Send>(
        inputs: usize,
        outputs: usize,
        kind: ElementType,
        read: impl Fn(Range<usize>) -> Result<Elements, E> + Sync,
    ) -> Result<Self, E>;

    /// Makes a matrix of blocks whose rows are the outputs. `read` gives ranges of rows, as for [`Self::load`].
    ///
    /// # Errors
    ///
    /// The first error of `read`.
    fn load_blocks<E: Send>(
        format: quant::Format,
        inputs: usize,
        outputs: usize,
        read: impl Fn(Range<usize>) -> Result<Blocks, E> + Sync,
    ) -> Result<Self, E>;

    /// Makes a matrix of blocks whose rows are the inputs.
    fn of_hidden_major(blocks: &Blocks) -> Self;
}

impl LoadMatrix for Packed {
    fn load<E: Send>(
        inputs: usize,
        outputs: usize,
        kind: ElementType,
        read: impl Fn(Range<usize>) -> Result<Elements, E> + Sync,
    ) -> Result<Self, E> {
        Self::pack(inputs, outputs, kind, read)
    }

    fn load_blocks<E: Send>(
        format: quant::Format,
        inputs: usize,
        outputs: usize,
        read: impl Fn(Range<usize>) -> Result<Blocks, E> + Sync,
    ) -> Result<Self, E> {
        Self::pack_blocks(format, inputs, outputs, read)
    }

    fn of_hidden_major(blocks: &Blocks) -> Self {
        Self::of_hidden_major(blocks)
    }
}

/// The reference keeps its weights widened, which is exact.
impl LoadMatrix for Matrix<f32> {
    fn load<E: Send>(
        inputs: usize,
        outputs: usize,
        _: ElementType,
        read: impl Fn(Range<usize>) -> Result<Elements, E> + Sync,
    ) -> Result<Self, E> {
        Ok(Self::new(inputs, read(0..outputs)?.widen()))
    }

    fn load_blocks<E: Send>(
        _: quant::Format,
        _: usize,
        outputs: usize,
        read: impl Fn(Range<usize>) -> Result<Blocks, E> + Sync,
    ) -> Result<Self, E> {
        Ok(read(0..outputs)?.decode())
    }

    fn of_hidden_major(blocks: &Blocks) -> Self {
        let [rows, width] = [blocks.rows(), blocks.columns()];
        Self::new(rows, columns(blocks.decode().weights(), width, 0..width))
    }
}

impl Checkpoint {
    /// Reads the weights into a model; `progress` is told of every stretch read, from several threads.
    ///
    /// # Errors
    ///
    /// If a tensor cannot be read or holds a value that is not finite.
    pub fn load<R: Real, M: LoadMatrix>(
        &self,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<Model<R, M>, Error> {
        self.load_with(&Recipe::default(), progress)
    }

    /// As [`Self::load`], and quantises the matrices that `recipe` names, unless the file has them quantised.
    ///
    /// # Errors
    ///
    /// As [`Self::load`], or if the recipe has a layer that the model has not, or a weight is beyond a block's reach.
    pub fn load_with<R: Real, M: LoadMatrix>(
        &self,
        recipe: &Recipe,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<Model<R, M>, Error> {
        self.check(recipe)?;
        self.reader(progress).model(recipe).map_err(|fault| self.error(fault))
    }

    /// The blocks of a matrix, if the file or else `recipe` has it quantised: the file's own, or made of its weights. The rows
    /// are the outputs, or the inputs of the channel mix's value.
    ///
    /// # Errors
    ///
    /// As [`Self::load_with`].
    pub fn blocks(
        &self,
        recipe: &Recipe,
        layer: usize,
        matrix: recipe::Matrix,
    ) -> Result<Option<Blocks>, Error> {
        self.check(recipe)?;
        let reader = self.reader(&|_| {});
        reader.blocks(recipe, layer, matrix).map_err(|fault| self.error(fault))
    }

    /// Checks that the model has the layers of a recipe.
    pub(crate) fn check(&self, recipe: &Recipe) -> Result<(), Error> {
        let layers = self.config.n_layers;
        let beyond = |layer| Err(self.error(Fault::RecipeLayer { layer, layers }));
        recipe.layer_beyond(layers).map_or(Ok(()), beyond)
    }

    /// Reads one of its [tensors](Self::tensors), for structures other than [`Model`].
    ///
    /// # Errors
    ///
    /// If there is no such tensor, it cannot be read, or holds a value that is not finite.
    pub fn tensor(&self, name: &str) -> Result<Elements, Error> {
        self.reader(&|_| {}).whole(name).map_err(|fault| self.error(fault))
    }

    /// Reads tensors in any order.
    pub(crate) fn reader<'a>(&'a self, progress: &'a (dyn Fn(Progress) + Sync)) -> Reader<'a> {
        Reader { checkpoint: self, progress, done: AtomicU64::new(0), total: self.bytes() }
    }
}

/// Reads tensors, by official names, and tells how far it has come.
pub(crate) struct Reader<'a> {
    checkpoint: &'a Checkpoint,
    progress: &'a (dyn Fn(Progress) + Sync),
    done: AtomicU64,
    total: u64,
}

impl Reader<'_> {
    fn model<R: Real, M: LoadMatrix>(&self, recipe: &Recipe) -> Result<Model<R, M>, Fault> {
        let config = self.checkpoint.config;
        Ok(Model {
            config,
            embedding: self.whole("emb.weight")?,
            ln0: self.norm("blocks.0.ln0")?,
            blocks: (0..config.n_layers).map(|layer| self.block(recipe, layer)).collect::<Result<_, _>>()?,
            ln_out: self.norm("ln_out")?,
            head: self.quantisable(recipe, 0, recipe::Matrix::Head)?,
        })
    }

    fn block<R: Real, M: LoadMatrix>(&self, recipe: &Recipe, layer: usize) -> Result<Block<R, M>, Fault> {
        let (block, ranks) = (format!("blocks.{layer}"), self.checkpoint.config.ranks);
        let att = |name: &str| format!("{block}.att.{name}");
        let matrix = |of| self.quantisable(recipe, layer, of);
        Ok(Block {
            ln1: self.norm(&format!("{block}.ln1"))?,
            time_mix: TimeMix {
                mixes: self.mixes(&att(""))?,
                receptance: matrix(recipe::Matrix::Receptance)?,
                key: matrix(recipe::Matrix::Key)?,
                value: matrix(recipe::Matrix::Value)?,
                output: matrix(recipe::Matrix::Output)?,
                w: self.adapter(&att("w"), ranks.w, true)?,
                a: self.adapter(&att("a"), ranks.a, true)?,
                v: (layer > 0).then(|| self.adapter(&att("v"), ranks.v, true)).transpose()?,
                g: self.adapter(&att("g"), ranks.g, false)?,
                k_k: self.vector(&att("k_k"))?,
                k_a: self.vector(&att("k_a"))?,
                r_k: self.vector(&att("r_k"))?,
                norm: self.norm(&att("ln_x"))?,
            },
            ln2: self.norm(&format!("{block}.ln2"))?,
            channel_mix: ChannelMix {
                mix: self.vector(&format!("{block}.ffn.x_k"))?,
                key: matrix(recipe::Matrix::FfnKey)?,
                value: matrix(recipe::Matrix::FfnValue)?,
            },
        })
    }

    fn norm<R: Real>(&self, name: &str) -> Result<Norm<R>, Fault> {
        Ok(Norm {
            gain: self.vector(&format!("{name}.weight"))?,
            bias: self.vector(&format!("{name}.bias"))?,
        })
    }

    /// The six mixes of a layer's time mix, in their order.
    pub(crate) fn mixes<R: Real>(&self, prefix: &str) -> Result<Vec<R>, Fault> {
        let stacked = format!("{prefix}x_x");
        if self.checkpoint.tensors.contains_key(&stacked) {
            return self.vector(&stacked);
        }
        let mixes: Vec<Vec<R>> =
            MIXES.iter().map(|mix| self.vector(&format!("{prefix}{mix}"))).collect::<Result<_, _>>()?;
        Ok(mixes.concat())
    }

    fn adapter<R: Real, M: LoadMatrix>(
        &self,
        name: &str,
        rank: usize,
        bias: bool,
    ) -> Result<Adapter<R, M>, Fault> {
        let width = self.checkpoint.config.width;
        Ok(Adapter {
            down: self.factor(&format!("{name}1"), rank, width)?,
            up: self.factor(&format!("{name}2"), width, rank)?,
            bias: if bias { self.vector(&format!("{name}0"))? } else { Vec::new() },
        })
    }

    /// A factor of an adapter as a matrix `[outputs, inputs]`. Official files hold it the other way round: it is read
    /// whole and turned (it is small).
    fn factor<M: LoadMatrix>(&self, name: &str, outputs: usize, inputs: usize) -> Result<M, Fault> {
        if self.factors_are_turned() {
            return self.matrix(name, outputs, inputs);
        }
        let stored = self.whole(name)?;
        M::load(inputs, outputs, stored.element_type(), |rows| {
            Ok(match &stored {
                Elements::F32(v) => Elements::F32(columns(v, outputs, rows)),
                Elements::F16(v) => Elements::F16(columns(v, outputs, rows)),
                Elements::BF16(v) => Elements::BF16(columns(v, outputs, rows)),
            })
        })
    }

    fn matrix<M: LoadMatrix>(&self, name: &str, outputs: usize, inputs: usize) -> Result<M, Fault> {
        let kind = self.elements(name, 0..0)?.element_type();
        M::load(inputs, outputs, kind, |rows| self.elements(name, rows.start * inputs..rows.end * inputs))
    }

    fn quantisable<M: LoadMatrix>(
        &self,
        recipe: &Recipe,
        layer: usize,
        matrix: recipe::Matrix,
    ) -> Result<M, Fault> {
        let (name, [outputs, inputs]) = (matrix.tensor(layer), self.checkpoint.extents(matrix));
        if matrix == recipe::Matrix::FfnValue {
            if let Some(blocks) = self.blocks(recipe, layer, matrix)? {
                return Ok(M::of_hidden_major(&blocks));
            }
        } else if let Some(format) = self.stored_format(layer, matrix) {
            let read = |rows| self.stored_blocks(&name, format, rows, inputs);
            return M::load_blocks(format, inputs, outputs, read);
        } else if let Some(format) = recipe.format(layer, matrix).blocks() {
            let read = |rows| self.quantised(&name, format, rows, inputs);
            return M::load_blocks(format, inputs, outputs, read);
        }
        self.matrix(&name, outputs, inputs)
    }

    /// What a matrix is in in the file, if it is in blocks there: whatever a recipe says, it stays that.
    pub(crate) fn stored_format(&self, layer: usize, matrix: recipe::Matrix) -> Option<quant::Format> {
        self.checkpoint.recipe.format(layer, matrix).blocks()
    }

    /// See [`Checkpoint::blocks`].
    pub(crate) fn blocks(
        &self,
        recipe: &Recipe,
        layer: usize,
        matrix: recipe::Matrix,
    ) -> Result<Option<Blocks>, Fault> {
        let (name, hidden_major) = (matrix.tensor(layer), matrix == recipe::Matrix::FfnValue);
        let [outputs, inputs] = self.checkpoint.extents(matrix);
        let [rows, columns] = if hidden_major { [inputs, outputs] } else { [outputs, inputs] };
        if let Some(format) = self.stored_format(layer, matrix) {
            return self.stored_blocks(&name, format, 0..rows, columns).map(Some);
        }
        let Some(format) = recipe.format(layer, matrix).blocks() else { return Ok(None) };
        let mut blocks = Blocks::zeros(format, rows, columns);
        let lines = (PART / columns).max(1);
        // Turned, a matrix is read whole: it lies in the file the other way round.
        let turned = if hidden_major { self.lines(&name, [columns, rows])? } else { Vec::new() };
        blocks.parts(lines).enumerate().try_for_each(|(i, part)| {
            let (first, last) = (i * lines, ((i + 1) * lines).min(rows));
            if !hidden_major {
                return self.quantise(&name, part, first * columns, last * columns);
            }
            let mut weights = vec![0.0; (last - first) * columns];
            let stored = turned.iter().flat_map(|lines| lines.chunks_exact(rows));
            for (column, line) in stored.enumerate() {
                let own = weights.iter_mut().skip(column).step_by(columns);
                own.zip(&line[first..last]).for_each(|(to, weight)| *to = *weight);
            }
            encode(&name, part, first * columns, &weights)
        })?;
        Ok(Some(blocks))
    }

    /// Some rows of a matrix that is not in blocks in the file.
    fn quantised(
        &self,
        name: &str,
        format: quant::Format,
        rows: Range<usize>,
        columns: usize,
    ) -> Result<Blocks, Fault> {
        let mut blocks = Blocks::zeros(format, rows.len(), columns);
        let whole = blocks.parts(rows.len());
        whole.try_for_each(|part| self.quantise(name, part, rows.start * columns, rows.end * columns))?;
        Ok(blocks)
    }

    /// Encodes the weights of a tensor from `first` to before `end`.
    fn quantise(&self, name: &str, part: Part<'_>, first: usize, end: usize) -> Result<(), Fault> {
        encode(name, part, first, &self.elements(name, first..end)?.into_f32())
    }

    /// The rows of a tensor, widened, several of them together.
    fn lines(&self, name: &str, [rows, columns]: [usize; 2]) -> Result<Vec<Vec<f32>>, Fault> {
        let lines = (PART / columns).max(1);
        let starts: Vec<_> = (0..rows).step_by(lines).collect();
        let read = |&first: &usize| {
            let last = (first + lines).min(rows);
            Ok(self.elements(name, first * columns..last * columns)?.into_f32())
        };
        starts.par_iter().map(read).collect()
    }

    /// Some rows of a matrix that is in blocks in the file.
    fn stored_blocks(
        &self,
        name: &str,
        format: quant::Format,
        rows: Range<usize>,
        columns: usize,
    ) -> Result<Blocks, Fault> {
        let (scales, row_blocks) = (format!("{name}{SCALES}"), columns.div_ceil(quant::BLOCK));
        let of = |each: usize| rows.start * row_blocks * each..rows.end * row_blocks * each;
        let weights = self.read(name, self.entry(name)?, of(format.block_bytes()), |_| true)?;
        let Elements::F16(of_blocks) = self.elements(&scales, of(1))? else {
            return Err(Fault::Scales { tensor: scales }); // their type was checked
        };
        let blocks = Blocks::from_parts(format, [rows.len(), columns], weights, of_blocks);
        blocks.ok_or(Fault::Scales { tensor: scales })
    }

    /// The first bytes of a tensor of bytes.
    pub(crate) fn bytes(&self, name: &str, len: usize) -> Result<Vec<u8>, Fault> {
        self.read(name, self.entry(name)?, 0..len, |_| true)
    }

    /// A tensor as a vector.
    pub(crate) fn vector<R: Real>(&self, name: &str) -> Result<Vec<R>, Fault> {
        Ok(self.whole(name)?.widen())
    }

    fn whole(&self, name: &str) -> Result<Elements, Fault> {
        self.elements(name, 0..self.entry(name)?.shape.iter().product())
    }

    fn entry(&self, name: &str) -> Result<&Entry, Fault> {
        super::require(&self.checkpoint.tensors, name, String::new)
    }

    /// Whether the adapters' factors are not as official files have them.
    pub(crate) fn factors_are_turned(&self) -> bool {
        self.checkpoint.lora == LoraLayout::Transposed
    }

    /// The elements `range` of a tensor.
    pub(crate) fn elements(&self, name: &str, range: Range<usize>) -> Result<Elements, Fault> {
        let entry = self.entry(name)?;
        Ok(match &entry.dtype {
            Dtype::F32 => Elements::F32(self.read(name, entry, range, f32::is_finite)?),
            Dtype::F16 => Elements::F16(self.read(name, entry, range, f16::is_finite)?),
            Dtype::BF16 => Elements::BF16(self.read(name, entry, range, bf16::is_finite)?),
            Dtype::Other(_) => {
                return Err(Fault::Dtype { tensor: name.to_owned(), found: entry.dtype.clone() });
            }
        })
    }

    /// Reads straight into the memory that is returned, a stretch at a time.
    fn read<T: Pod>(
        &self,
        name: &str,
        entry: &Entry,
        range: Range<usize>,
        is_finite: impl Fn(T) -> bool,
    ) -> Result<Vec<T>, Fault> {
        let mut elements = vec![T::zeroed(); range.len()];
        let mut index = range.start;
        for stretch in elements.chunks_mut(STRETCH) {
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(stretch);
            self.checkpoint
                .source
                .read_exact_at(bytes, entry.offset + (index * size_of::<T>()) as u64)
                .map_err(|error| Fault::Io { tensor: name.to_owned(), error })?;
            if cfg!(target_endian = "big") {
                bytes.chunks_exact_mut(size_of::<T>()).for_each(<[u8]>::reverse);
            }
            let read = bytes.len() as u64;
            // of all, since that vectorises
            let finite = stretch.iter().fold(true, |all, &value| all & is_finite(value));
            if !finite && let Some(at) = stretch.iter().position(|&value| !is_finite(value)) {
                return Err(Fault::NotFinite { tensor: name.to_owned(), index: index + at });
            }
            index += stretch.len();
            let done = self.done.fetch_add(read, Ordering::Relaxed) + read;
            (self.progress)(Progress { done, total: self.total });
        }
        Ok(elements)
    }
}

/// Encodes weights of a tensor, from the `first` on.
fn encode(name: &str, mut part: Part<'_>, first: usize, weights: &[f32]) -> Result<(), Fault> {
    let refused = |error| Fault::Quantising { tensor: name.to_owned(), first, error };
    part.encode(weights).map_err(refused)
}

/// The columns `range` of a row-major matrix of `width` columns, each as a row.
fn columns<T: Copy>(matrix: &[T], width: usize, range: Range<usize>) -> Vec<T> {
    range.flat_map(|column| matrix.iter().skip(column).step_by(width)).copied().collect()
}
