//! Bindings and lowering of `softmax.wgsl`. The operation is defined in [`rwkv_core::ops::softmax`].
//!
//! Logits are finite or negative infinity, and those of a row not all infinite. Logits of negative infinity get
//! probability 0.

use super::MAX_GROUPS;
pub use crate::reflected::softmax::{Params, VARIANTS};

#[cfg(test)]
#[cfg(feature = "gpu")]
mod tests;

/// Extents of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Rows, `T`.
    pub rows: usize,
    /// Logits of a row, `V`.
    pub vocab: usize,
}

/// Why a call cannot be encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There is no distribution over nothing.
    #[error("softmax: rows of no logits")]
    Empty,
    /// One dispatch holds one workgroup per row, and not so many workgroups.
    #[error("softmax: {got} rows are more than {max}")]
    Rows {
        /// The rows asked for.
        got: usize,
        /// The most that one dispatch can hold.
        max: u32,
    },
    /// An operand `[rows, V]` is longer than a `u32` can index.
    #[error("softmax: {rows} rows of {vocab} logits are beyond 32-bit indices")]
    Vocab {
        /// The rows asked for.
        rows: u32,
        /// The logits asked for.
        vocab: usize,
    },
}

/// Lowers one call to the uniform block and the workgroup count.
///
/// # Errors
///
/// If the kernel cannot run the call, whatever the device: see [`Error`].
pub fn lower(dims: Dims) -> Result<(Params, [u32; 3]), Error> {
    let rows = super::groups(dims.rows).ok_or(Error::Rows { got: dims.rows, max: MAX_GROUPS })?;
    if dims.vocab == 0 {
        return Err(Error::Empty);
    }
    // A workgroup steps over a row's end by less than four times its own size, and must not wrap to its start.
    let vocab = u32::try_from(dims.vocab)
        .ok()
        .filter(|vocab| vocab.checked_mul(rows.max(1)).is_some_and(|end| end <= u32::MAX - 4095))
        .ok_or(Error::Vocab { rows, vocab: dims.vocab })?;
    Ok((Params { vocab }, [rows, 1, 1]))
}
