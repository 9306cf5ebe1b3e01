//! The state update of [`wkv7`](rwkv_core::ops::wkv7) over packed segments of many tokens, four tokens to a sum.
//!
//! It takes the place of [`wkv7_scan`](super::wkv7_scan) for states in single precision that are written at every call, and
//! has its operands, records, segments and answers. As there with `PAIRED`, a sequence's results depend, but for rounding, on how its
//! tokens are spread over calls: those of a segment are taken by fours from its first on.

#[cfg(test)]
#[cfg(feature = "gpu")]
mod tests;

pub use super::extents::Error;
pub use super::wkv7_chunked::Dims;
use super::wkv7_chunked::lowered;
use super::wkv7_scan::OPERANDS;
pub use super::wkv7_scan::{HEAD_SIZE, Segment};
pub use crate::reflected::wkv7_fours::{Params, VARIANTS};

/// Rows of a state to a workgroup: what `ROWS` is overridden with. The fewer, the more workgroups share a head.
pub const ROWS: [usize; 3] = [8, 16, 32];

/// Tokens that may be staged at a time: what `STAGE` is overridden with where a workgroup has the memory, the most first. What is
/// done for all of them at once is then done more seldom; of the fewest, a processor has room for two workgroups.
pub const STAGES: [usize; 2] = [32, 16];

const _: () = assert!(
    STAGES[0].is_multiple_of(16) && STAGES[1].is_multiple_of(16),
    "the kernel takes four groups of four tokens at a time"
);

/// Workgroup memory of the variant with subgroups.
#[must_use]
pub const fn workgroup_bytes(rows_each: usize, stage: usize) -> usize {
    // Five vectors of a token, its values, and its products with its group.
    size_of::<f32>() * stage * ((OPERANDS - 1) * HEAD_SIZE + rows_each + 4)
}

/// The parameters and workgroups of a call, with so many rows of a state to a workgroup.
///
/// # Errors
///
/// If the extents are not what the kernel can do.
pub fn lower(dims: Dims, rows_each: usize) -> Result<(Params, [u32; 3]), Error> {
    let sharing = HEAD_SIZE / rows_each.max(1);
    let ([heads, stride, offset, y_stride], grid) = lowered(&VARIANTS[0], dims, sharing)?;
    Ok((Params { heads, stride, offset, y_stride }, grid))
}
