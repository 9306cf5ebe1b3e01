//! Bindings and lowering of `layer_norm.wgsl`. The operation is defined in [`rwkv_core::ops::layer_norm`].
//!
//! The kernel norms the rows of `x` that `rows` names, in its order: the head needs few of a pass. The caller sees to it
//! that each is a row of `x`.

use rwkv_core::Real as _;

use super::{MAX_GROUPS, indexable};
pub use crate::reflected::layer_norm::{Params, VARIANTS};

#[cfg(test)]
#[cfg(feature = "gpu")]
pub(super) mod tests;

/// Extents of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Rows of `x`, `S`.
    pub of: usize,
    /// Rows of `y`, `T`.
    pub rows: usize,
    /// Channels of a row, `D`.
    pub width: usize,
}

/// Why a call cannot be encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The mean of nothing is not defined.
    #[error("layer_norm: rows of no channels")]
    Empty,
    /// One dispatch holds one workgroup per row, and not so many workgroups.
    #[error("layer_norm: {got} rows are more than {max}")]
    Rows {
        /// The rows asked for.
        got: usize,
        /// The most that one dispatch can hold.
        max: u32,
    },
    /// An operand `[rows, width]` is longer than a `u32` can index.
    #[error("layer_norm: {rows} rows of {width} channels are beyond 32-bit indices")]
    Width {
        /// The rows, of `x` or `y`.
        rows: usize,
        /// The channels asked for.
        width: usize,
    },
}

/// Lowers one call to the uniform block and the workgroup count. `eps`, which is added to the variance, is
/// rounded to `f32`.
///
/// # Errors
///
/// If the kernel cannot run the call, whatever the device: see [`Error`].
pub fn lower(dims: Dims, eps: f64) -> Result<(Params, [u32; 3]), Error> {
    let rows = super::groups(dims.rows).ok_or(Error::Rows { got: dims.rows, max: MAX_GROUPS })?;
    if dims.width == 0 {
        return Err(Error::Empty);
    }
    let most = dims.of.max(dims.rows);
    let width = indexable(most.max(1), dims.width).ok_or(Error::Width { rows: most, width: dims.width })?;
    Ok((Params { width, eps: f32::of(eps) }, [rows, 1, 1]))
}
