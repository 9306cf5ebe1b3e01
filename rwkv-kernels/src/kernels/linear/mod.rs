//! [`linear`](rwkv_core::ops::linear): a linear layer over a row or a few. With
//! `accumulate` the product is added to `y`, as the output layer adds to the residual.

#[cfg(test)]
#[cfg(feature = "gpu")]
mod tests;

use rwkv_core::quant::Format;

use super::weights;
pub use crate::reflected::linear::*;

/// The extents of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// T: each of them reads the matrix anew.
    pub rows: usize,
    /// Columns of the matrix.
    pub inputs: usize,
    /// Rows of the matrix.
    pub outputs: usize,
    /// Whether the product is added to what is there.
    pub accumulate: bool,
    /// What the matrix is in; the pipeline's override `FORMATS` has it.
    pub format: Option<Format>,
}

/// Why a call cannot be lowered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Rows do not fill whole loads.
    #[error("{inputs} inputs are not a multiple of {unit}, or none")]
    Inputs {
        /// Columns of the matrix.
        inputs: usize,
        /// What they must be a multiple of.
        unit: usize,
    },
    /// More elements than the kernel can index, or none.
    #[error("{0:?}: nothing to do, or too much for 31-bit indices")]
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

/// The parameters and workgroups of a call, `tile` outputs to a workgroup. The pipeline must have the overrides of
/// [`Teams`](super::own_columns::Teams). Its overrides `INPUTS`, `OUTPUTS` and `TILE`,
/// those that are not zero, must be the inputs, the outputs and `tile`.
///
/// # Errors
///
/// If the extents are not what the kernel can do.
pub fn lower(dims: Dims, tile: u32) -> Result<(Params, [u32; 3]), Error> {
    let Dims { rows, inputs, outputs, accumulate, format } = dims;
    let unit = weights::unit(format);
    if inputs == 0 || !inputs.is_multiple_of(unit) {
        return Err(Error::Inputs { inputs, unit });
    }
    // A workgroup steps over the last output by its tile or the rows of its teams, and must not wrap to the first.
    let fits = |a: usize, b: usize| a.checked_mul(b).is_some_and(|n| n > 0 && i32::try_from(n).is_ok());
    if !(fits(rows, inputs) && fits(rows, outputs) && fits(outputs, inputs / 8)) {
        return Err(Error::Extents(dims));
    }
    let tile = tile.max(1);
    let (got, max) = ([outputs.div_ceil(tile as usize), rows], super::MAX_GROUPS);
    match (got.map(u32::try_from), u32::try_from(inputs), u32::try_from(outputs)) {
        ([Ok(x), Ok(y)], Ok(inputs), Ok(outputs)) if x.max(y) <= max => Ok((
            Params { inputs, outputs, tile, accumulate: accumulate.into(), format: weights::number(format) },
            [x, y, 1],
        )),
        _ => Err(Error::Groups { got, max }),
    }
}
