//! [`channel_mix_value`](rwkv_core::ops::channel_mix_value): the channel mix's value layer over a row or a few, added
//! to the residual. The matrix lies hidden-major, `[F, D]`, and only rows of hidden units that are not zero are read.

#[cfg(test)]
#[cfg(feature = "gpu")]
mod tests;

use rwkv_core::quant::Format;

use super::weights;
pub use crate::reflected::channel_mix_value::*;

/// The extents of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// T: each of them reads its own rows of the matrix.
    pub rows: usize,
    /// D.
    pub width: usize,
    /// F.
    pub hidden: usize,
    /// What the matrix is in; the pipeline's override `FORMATS` has it.
    pub format: Option<Format>,
}

/// Hidden units at most: their indices pass through `f32`.
pub const MAX_HIDDEN: usize = 1 << 24;

/// Why a call cannot be lowered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Extents that do not fill whole loads.
    #[error(
        "{0:?}: the width must be a multiple of 8, or of 32 in blocks, the hidden units of 4, and neither is none"
    )]
    Loads(Dims),
    /// More elements than the kernel can index, or no row.
    #[error("{0:?}: nothing to do, or too much for 32-bit indices")]
    Extents(Dims),
    /// More workgroups along a dimension than a dispatch has.
    #[error("{got:?} workgroups, at most {max} along a dimension")]
    Groups {
        /// As many as asked for.
        got: [usize; 2],
        /// As many as there can be.
        max: u32,
    },
}

/// The parameters and workgroups of a call, for a pipeline whose override `COLUMNS` is `columns`. Its overrides `WIDTH` and
/// `HIDDEN`, those that are not zero, must be those of `dims`.
///
/// # Errors
///
/// If the extents are not what the kernel can do.
pub fn lower(dims: Dims, columns: u32) -> Result<(Params, [u32; 3]), Error> {
    let Dims { rows, width, hidden, format } = dims;
    if width == 0 || hidden == 0 || !width.is_multiple_of(weights::unit(format)) || !hidden.is_multiple_of(4)
    {
        return Err(Error::Loads(dims));
    }
    let fits = |a: usize, b: usize| a.checked_mul(b).is_some_and(|n| n > 0 && u32::try_from(n).is_ok());
    if hidden > MAX_HIDDEN || !(fits(rows, width) && fits(rows, hidden) && fits(hidden, width / 8)) {
        return Err(Error::Extents(dims));
    }
    let (got, max) = ([width.div_ceil(columns.max(8) as usize), rows], super::MAX_GROUPS);
    match (got.map(u32::try_from), u32::try_from(width), u32::try_from(hidden)) {
        ([Ok(x), Ok(y)], Ok(width), Ok(hidden)) if x.max(y) <= max => {
            Ok((Params { width, hidden, format: weights::number(format) }, [x, y, 1]))
        }
        _ => Err(Error::Groups { got, max }),
    }
}
