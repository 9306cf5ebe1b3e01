//! Bindings and lowering of `embedding.wgsl`. The operation is defined in [`rwkv_core::ops::embedding`].
//!
//! The table is of halves. A token outside the vocabulary, which the operation refuses, reads the last row: a kernel that
//! draws tokens marks a failure by such a token, and what becomes of it is thrown away.

use rwkv_core::Real as _;
use rwkv_core::ops::layer_norm::LN_EPS;

use super::{MAX_GROUPS, indexable};
pub use crate::reflected::embedding::{Params, VARIANTS};

#[cfg(test)]
#[cfg(feature = "gpu")]
mod tests;

/// Extents of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Tokens, `T`.
    pub rows: usize,
    /// Rows of the table, `V`.
    pub vocab: usize,
    /// Channels of a row, `D`.
    pub width: usize,
}

/// Why a call cannot be encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There is no last row for a token outside the vocabulary.
    #[error("embedding: a table of no rows")]
    Vocab,
    /// The kernel reads four channels at a time.
    #[error("embedding: a width of {got} is no multiple of 4")]
    Width {
        /// The channels asked for.
        got: usize,
    },
    /// One dispatch holds one workgroup per row, and not so many workgroups.
    #[error("embedding: {got} rows are more than {max}")]
    Rows {
        /// The rows asked for.
        got: usize,
        /// The most that one dispatch can hold.
        max: u32,
    },
    /// An operand `[rows, width]` is longer than a `u32` can index.
    #[error("embedding: {rows} rows of {width} channels are beyond 32-bit indices")]
    Index {
        /// The rows, of the table or of `x`.
        rows: usize,
        /// The channels asked for.
        width: usize,
    },
}

/// Lowers the extents of one call to the uniform block and the workgroup count.
///
/// # Errors
///
/// If the kernel cannot run the call, whatever the device: see [`Error`].
pub fn lower(dims: Dims) -> Result<(Params, [u32; 3]), Error> {
    let Dims { rows, vocab, width } = dims;
    if vocab == 0 {
        return Err(Error::Vocab);
    }
    if width == 0 || !width.is_multiple_of(4) {
        return Err(Error::Width { got: width });
    }
    let groups = super::groups(rows).ok_or(Error::Rows { got: rows, max: MAX_GROUPS })?;
    let most = vocab.max(rows);
    let beyond = Error::Index { rows: most, width };
    let width = indexable(most, width).ok_or(beyond)?;
    let vocab = u32::try_from(vocab).map_err(|_| beyond)?;
    Ok((Params { vocab, width, eps: f32::of(LN_EPS) }, [groups, 1, 1]))
}
