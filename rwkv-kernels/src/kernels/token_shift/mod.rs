//! Bindings and lowering of `token_shift.wgsl`. The operation is defined in [`rwkv_core::ops::token_shift`].
//!
//! The rows of a call are those of any number of segments, packed one after the other. `cursors[t]` are two words of
//! row `t`: the record of `state` that holds the row before it, for the first of a segment, and the record that is to
//! hold the row itself, for the last of a segment; otherwise [`NONE`]. A segment of one row has both.
//!
//! `out` is `[T, M, D]`: the mixes of a row side by side, where the twin has `[M, T, D]`.
//!
//! Invariant, the caller's: no record that a segment of the call is kept in is one that a segment of it starts from,
//! since rows are read and kept in no order. Records are whole numbers of `stride` elements in a binding, hence
//! within 32-bit indices.

use super::extents::{self, elements, grid};
pub use crate::reflected::token_shift::{Params, VARIANTS};

#[cfg(test)]
#[cfg(feature = "gpu")]
mod tests;

/// The word of `cursors` that names no record.
pub const NONE: u32 = u32::MAX;

/// Extents of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Rows of all segments, `T`.
    pub tokens: usize,
    /// Mixes, `M`: six of a time mix, one of a channel mix.
    pub planes: usize,
    /// Channels of a row, `D`.
    pub width: usize,
    /// Elements of a record of the state.
    pub stride: usize,
    /// Elements of a record that precede the row kept by this shift.
    pub offset: usize,
}

/// Why a call cannot be encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The rows do not suit the kernel.
    #[error(transparent)]
    Extents(#[from] extents::Error),
    /// A record of the state does not hold the row, or is longer than a `u32` can index.
    #[error("token_shift: no {width} channels at {offset} in a record of {stride} elements")]
    Record {
        /// Channels of a row.
        width: usize,
        /// Where they start in the record.
        offset: usize,
        /// Elements of a record.
        stride: usize,
    },
}

/// Lowers one call to the uniform block and the workgroup count.
///
/// # Errors
///
/// If the kernel cannot run the call, whatever the device: see [`Error`].
pub fn lower(dims: Dims) -> Result<(Params, [u32; 3]), Error> {
    let Dims { tokens, planes, width, stride, offset } = dims;
    let kernel = &VARIANTS[0];
    let (row, len) = extents::Dims { rows: tokens, width }.vectors(kernel)?;
    // What is indexed furthest: the output, or the mixes where there is none.
    extents::Dims { rows: planes.saturating_mul(tokens.max(1)), width }.vectors(kernel)?;
    let planes = elements(kernel, planes, 1)?;
    let record = Error::Record { width, offset, stride };
    if offset.checked_add(width).is_none_or(|end| end > stride) {
        return Err(record);
    }
    let of_record = |n| u32::try_from(n).map_err(|_| record);
    let params = Params { len, width: row, planes, stride: of_record(stride)?, offset: of_record(offset)? };
    Ok((params, grid(kernel, len)))
}
