//! From a checked checkpoint to a model: every tensor read once, into its final place.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use bytemuck::Pod;
use half::{bf16, f16};
use rwkv_core::fast::linear::Packed;
use rwkv_core::model::{Adapter, Block, ChannelMix, Model, Norm, TimeMix};
use rwkv_core::ops::linear::Matrix;
use rwkv_core::{ElementType, Elements, Real};

use super::directory::{Dtype, Entry};
use super::{Checkpoint, Error, Fault, LoraLayout, MIXES};

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
        self.reader(progress).model().map_err(|fault| self.error(fault))
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
    fn model<R: Real, M: LoadMatrix>(&self) -> Result<Model<R, M>, Fault> {
        let config = self.checkpoint.config;
        Ok(Model {
            config,
            embedding: self.whole("emb.weight")?,
            ln0: self.norm("blocks.0.ln0")?,
            blocks: (0..config.n_layers).map(|layer| self.block(layer)).collect::<Result<_, _>>()?,
            ln_out: self.norm("ln_out")?,
            head: self.matrix("head.weight", config.vocab, config.width)?,
        })
    }

    fn block<R: Real, M: LoadMatrix>(&self, layer: usize) -> Result<Block<R, M>, Fault> {
        let (block, d, f) =
            (format!("blocks.{layer}"), self.checkpoint.config.width, self.checkpoint.config.hidden);
        let ranks = self.checkpoint.config.ranks;
        let att = |name: &str| format!("{block}.att.{name}");
        let projection = |name: &str| self.matrix(&att(name), d, d);
        Ok(Block {
            ln1: self.norm(&format!("{block}.ln1"))?,
            time_mix: TimeMix {
                mixes: self.mixes(&att(""))?,
                receptance: projection("receptance.weight")?,
                key: projection("key.weight")?,
                value: projection("value.weight")?,
                output: projection("output.weight")?,
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
                key: self.matrix(&format!("{block}.ffn.key.weight"), f, d)?,
                value: self.matrix(&format!("{block}.ffn.value.weight"), d, f)?,
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
            if let Some(at) = stretch.iter().position(|&value| !is_finite(value)) {
                return Err(Fault::NotFinite { tensor: name.to_owned(), index: index + at });
            }
            index += stretch.len();
            let done = self.done.fetch_add(read, Ordering::Relaxed) + read;
            (self.progress)(Progress { done, total: self.total });
        }
        Ok(elements)
    }
}

/// The columns `range` of a row-major matrix of `width` columns, each as a row.
fn columns<T: Copy>(matrix: &[T], width: usize, range: Range<usize>) -> Vec<T> {
    range.flat_map(|column| matrix.iter().skip(column).step_by(width)).copied().collect()
}
