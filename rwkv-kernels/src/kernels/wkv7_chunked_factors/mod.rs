//! The [`Factors`](rwkv_core::ops::wkv7_chunked::Factors) of chunks of tokens, all at once, over packed segments of many
//! tokens, as [`wkv7_chunked`](super::wkv7_chunked) reads them.
//!
//! It reads what [`time_mix_operands`](super::time_mix_operands) writes. Factors are `[T, H, 6, N]`: of each token `w`, `r'`,
//! and `b` and `k` decayed to the end of its block of 16 tokens, and `u`; the sixth is of the last token of a block what the
//! block keeps of the state, and of others not written. `y'` is written where the state update adds what it reads.
//!
//! Segments lie one after the other, in the order of their rows.

#[cfg(test)]
#[cfg(feature = "gpu")]
mod tests;

pub use super::extents::Error;
use super::extents::{elements, fits, groups};
use super::wkv7_scan::{HEAD_SIZE, OPERANDS};
pub use crate::reflected::wkv7_chunked_factors::{Params, VARIANTS};

/// The extents of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Rows of all segments together.
    pub rows: usize,
    /// Segments.
    pub segments: usize,
    /// H.
    pub heads: usize,
    /// Tokens of a chunk, one of [`CHUNKS`](super::wkv7_chunked::CHUNKS).
    pub chunk: usize,
    /// Elements from row to row of `y`, at least D.
    pub y_stride: usize,
}

/// Workgroup memory of the kernel for chunks of so many tokens.
#[must_use]
pub const fn workgroup_bytes(chunk: usize) -> usize {
    // Staged vectors, and four kinds of pair weights of a chunk with a block.
    4 * size_of::<f32>() * (16 * HEAD_SIZE / 2 + 16 * chunk)
}

/// The parameters and workgroups of a call.
///
/// # Errors
///
/// If the extents are not what the kernel can do.
pub fn lower(dims: Dims) -> Result<(Params, [u32; 3]), Error> {
    let (kernel, Dims { rows, segments, heads, chunk, y_stride }) = (&VARIANTS[0], dims);
    let width = heads.saturating_mul(HEAD_SIZE);
    let y_stride = fits(kernel, rows, [0, width, y_stride])?;
    elements(kernel, rows, width.saturating_mul(OPERANDS))?;
    // A segment's last chunk may be short.
    let grid = groups(kernel, [heads, (rows / chunk.max(1)).saturating_add(segments)])?;
    let of = |n| elements(kernel, 1, n);
    Ok((Params { heads: of(heads)?, segments: of(segments)?, y_stride }, grid))
}
