//! The state update of [`wkv7_chunked`](rwkv_core::ops::wkv7_chunked) over packed segments of many tokens: what of it waits for
//! the state.
//!
//! It takes the place of [`wkv7_scan`](super::wkv7_scan), of whose operands
//! [`wkv7_chunked_factors`](super::wkv7_chunked_factors) first computes what does not wait, for all chunks at once. Of a chunk
//! then three products are left, which take less time than its tokens one after the other; with the factors, no less than
//! [`wkv7_fours`](super::wkv7_fours) on an H100. It is there to be measured.
//!
//! Records and segments are those of [`wkv7_scan`](super::wkv7_scan) in single precision that is written at every call; `y` is
//! read before it is written.

#[cfg(test)]
#[cfg(feature = "gpu")]
pub(super) mod tests;

pub use super::extents::Error;
use super::extents::{elements, fits, groups};
use super::wkv7_scan::OPERANDS;
pub use super::wkv7_scan::{HEAD_SIZE, Segment};
use crate::Kernel;
pub use crate::reflected::wkv7_chunked::{Params, VARIANTS};

/// The extents of a call, in elements where they are lengths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Rows of all segments together.
    pub rows: usize,
    /// Segments.
    pub segments: usize,
    /// H.
    pub heads: usize,
    /// From record to record of the state.
    pub stride: usize,
    /// Of the heads in a record.
    pub offset: usize,
    /// From row to row of `y`, at least D.
    pub y_stride: usize,
}

/// Tokens of a chunk: what `CHUNK` is overridden with, here as in [`wkv7_chunked_factors`](super::wkv7_chunked_factors).
pub const CHUNKS: [usize; 3] = [16, 32, 64];

/// Workgroups that share a head.
const SHARING: usize = 4;

/// The parameters and workgroups of a call.
///
/// # Errors
///
/// If the extents are not what the kernel can do.
pub fn lower(dims: Dims) -> Result<(Params, [u32; 3]), Error> {
    let ([heads, stride, offset, y_stride], grid) = lowered(&VARIANTS[0], dims, SHARING)?;
    Ok((Params { heads, stride, offset, y_stride }, grid))
}

/// Heads, stride, offset and stride of y, in the parameters' order, and the workgroups, of which so many share a head.
pub(super) fn lowered(kernel: &Kernel, dims: Dims, sharing: usize) -> Result<([u32; 4], [u32; 3]), Error> {
    let Dims { rows, segments, heads, stride, offset, y_stride } = dims;
    let width = heads.saturating_mul(HEAD_SIZE);
    let y_stride = fits(kernel, rows, [0, width, y_stride])?;
    let stride = fits(kernel, 1, [offset, width.saturating_mul(HEAD_SIZE), stride])?;
    elements(kernel, rows, width.saturating_mul(OPERANDS))?;
    let grid = groups(kernel, [heads.saturating_mul(sharing), segments])?;
    let of = |n| elements(kernel, 1, n);
    Ok(([of(heads)?, stride, of(offset)?, y_stride], grid))
}
