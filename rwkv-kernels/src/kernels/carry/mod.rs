//! Bindings and lowering of `carry.wgsl`. The operation is defined in [`rwkv_core::ops::carry`].

use super::{MAX_GROUPS, indexable};
pub use crate::reflected::carry::{Params, VARIANTS};

#[cfg(test)]
#[cfg(feature = "gpu")]
mod tests;

/// In a pair, in place of the record that is written: there is nothing to carry.
pub const NONE: u32 = u32::MAX;

/// Extents of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Pairs, `T`, those that carry nothing included.
    pub pairs: usize,
    /// Elements that are carried of a record.
    pub width: usize,
    /// Records there are.
    pub records: usize,
    /// Elements of a record.
    pub stride: usize,
    /// Where in a record they begin.
    pub offset: usize,
}

/// Why a call cannot be encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The kernel copies four elements at a time, within a record.
    #[error("carry: {width} elements at {offset} of {stride}: not within, or not by fours")]
    Record {
        /// Elements that are carried.
        width: usize,
        /// Where they begin.
        offset: usize,
        /// Elements of a record.
        stride: usize,
    },
    /// More pairs than one dispatch has workgroups, or records than 32 bits index.
    #[error("carry: {0:?}: more than a dispatch holds, or beyond 32-bit indices")]
    Extents(Dims),
}

/// Lowers the extents of one call to the uniform block and the workgroup count. The caller's pairs name records that there
/// are, and none that is written is read or written by another.
///
/// # Errors
///
/// If the kernel cannot run the call, whatever the device: see [`Error`].
pub fn lower(dims: Dims) -> Result<(Params, [u32; 3]), Error> {
    let Dims { pairs, width, records, stride, offset } = dims;
    let by_fours = [width, stride, offset].iter().all(|n| n.is_multiple_of(4));
    if !by_fours || offset.checked_add(width).is_none_or(|end| end > stride) {
        return Err(Error::Record { width, offset, stride });
    }
    let far = Error::Extents(dims);
    let groups = u32::try_from(pairs).ok().filter(|&n| n <= MAX_GROUPS).ok_or(far)?;
    let stride = indexable(records.max(1), stride).ok_or(far)?;
    let [width, offset] = [width, offset].map(u32::try_from);
    Ok((Params { width: width.map_err(|_| far)?, stride, offset: offset.map_err(|_| far)? }, [groups, 1, 1]))
}
