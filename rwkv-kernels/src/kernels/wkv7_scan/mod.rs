//! The state update of [`wkv7`](rwkv_core::ops::wkv7) over packed segments of many tokens, as a prompt has.
//!
//! It reads what [`time_mix_operands`](super::time_mix_operands) writes, and [`readout_packed`](super::readout_packed)
//! reads what it answers: all that does not wait for the token before is done for all tokens at once. For a token of
//! each of many sequences [`time_mix`](super::time_mix) is faster, which does all in one.
//!
//! A segment's state is read from one record and written to another, which may be the same, but no other segment's. Records
//! hold the heads at `offset` as `[H, key N, value N]`.

#[cfg(test)]
#[cfg(feature = "gpu")]
mod tests;

pub use super::extents::Error;
use super::extents::{elements, fits, groups};
pub use super::time_mix::{HEAD_SIZE, Segment};
use crate::Kernel;
pub use crate::reflected::wkv7_scan::{Params, VARIANTS};

/// Vectors that the state update reads of a token in a head, [`HEAD_SIZE`] elements each: `w - 1`, `k`, `kappa`, `b`, `r`
/// and `v`.
pub const OPERANDS: usize = 6;

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

/// Workgroups that share a head: in the variant with subgroups four invocations share a row of the state.
#[must_use]
pub const fn sharing(kernel: &Kernel) -> usize {
    if kernel.features.subgroup { 4 } else { 1 }
}

/// The parameters and workgroups of a call in a variant.
///
/// # Errors
///
/// If the extents are not what the kernel can do.
pub fn lower(kernel: &Kernel, dims: Dims) -> Result<(Params, [u32; 3]), Error> {
    let Dims { rows, segments, heads, stride, offset, y_stride } = dims;
    let width = heads.saturating_mul(HEAD_SIZE);
    let y_stride = fits(kernel, rows, [0, width, y_stride])?;
    let stride = fits(kernel, 1, [offset, width.saturating_mul(HEAD_SIZE), stride])?;
    elements(kernel, rows, width.saturating_mul(OPERANDS))?;
    let grid = groups(kernel, [heads.saturating_mul(sharing(kernel)), segments])?;
    let of = |n| elements(kernel, 1, n);
    Ok((Params { heads: of(heads)?, stride, offset: of(offset)?, y_stride }, grid))
}
