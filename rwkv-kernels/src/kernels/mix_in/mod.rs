//! [`mix_in`](rwkv_core::ops::mix_in), fused: norm, token shift and every matrix that reads the shifted token, in one
//! dispatch, for one token.
//!
//! The matrices are stacked in one buffer, one after the other, each in its own format, and so are their outputs in `y`. A matrix without a mix
//! reads the normed token: such a stack of one is the [head](rwkv_core::ops::head).
//!
//! The shift is kept in records (see [`lower`]): the one that `cursor` names first is read, the other is written.
//! They must differ. A sequence that starts has none to read: the token before its first is zero.

#[cfg(test)]
#[cfg(feature = "gpu")]
mod tests;

use rwkv_core::ops::activation::Activation;
use rwkv_core::ops::layer_norm::LN_EPS;
use rwkv_core::quant::{BLOCK, Format};

use super::weights;
pub use crate::reflected::mix_in::*;

/// Says that there is no record to read or write, or no mix.
pub const NONE: u32 = u32::MAX;

/// Where the shift lies, in `f32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// D.
    pub width: usize,
    /// Of a record of the state.
    pub stride: usize,
    /// Of the shift in a record.
    pub offset: usize,
}

/// One of the stacked matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stacked {
    /// Its rows.
    pub outputs: usize,
    /// Which mix it reads, if any.
    pub mix: Option<u32>,
    /// What is done to its products.
    pub activation: Activation,
    /// What the matrix is in; the pipeline's override `FORMATS` has it.
    pub format: Option<Format>,
}

/// What one workgroup computes: an element of `tiles`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Tile {
    first: u32,
    end: u32,
    mix: u32,
    activation: u32,
    format: u32,
    elements: u32,
    scales: u32,
    unused: u32,
}

/// Why a call cannot be lowered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The width does not fill whole loads.
    #[error("width {width} is not a multiple of 8, or of 32 for blocks, or none")]
    Width {
        /// D.
        width: usize,
    },
    /// The shift does not lie on whole loads, or not within its record.
    #[error(
        "a shift of {width} at {offset} in records of {stride}: not within them, or not at a multiple of 4"
    )]
    Record {
        /// D.
        width: usize,
        /// Of a record.
        stride: usize,
        /// Of the shift.
        offset: usize,
    },
    /// The stack has no rows, or more than the kernel can index.
    #[error("{rows} rows of {width} weights: none, or too many for 31-bit indices")]
    Rows {
        /// In all.
        rows: usize,
        /// D.
        width: usize,
    },
    /// More workgroups than a dispatch has.
    #[error("{got} workgroups for the stack, at most {max}")]
    Groups {
        /// As many as asked for.
        got: usize,
        /// As many as there can be.
        max: u32,
    },
}

/// Rows of a matrix to a workgroup, where those of [halves](weights) have `tile`: as many as have as many bytes, but for scales, so
/// that none takes longer.
#[must_use]
pub fn rows_of_tile(format: Option<Format>, tile: u32) -> usize {
    let row = |format| weights::elements(format, BLOCK);
    (tile as usize * row(None) / row(format)).max(1)
}

/// The parameters, tiles and workgroups for a stack of matrices, `tile` [rows in halves](rows_of_tile) to a workgroup.
///
/// The pipeline must have the overrides of [`Teams`](super::own_columns::Teams) for the width, of 64 lanes at least and no less than a
/// sixteenth of it, and `WIDTH`, the width. Records are addressed in 32 bits: the caller keeps the buffer within what a binding can be.
///
/// # Errors
///
/// If the extents are not what the kernel can do.
pub fn lower(dims: Dims, stack: &[Stacked], tile: u32) -> Result<(Params, Vec<Tile>, [u32; 3]), Error> {
    let Dims { width, stride, offset } = dims;
    if width == 0 || stack.iter().any(|of| !width.is_multiple_of(weights::unit(of.format))) {
        return Err(Error::Width { width });
    }
    let of_record = Error::Record { width, stride, offset };
    let end = offset.checked_add(width).ok_or(of_record)?;
    if end > stride || !stride.is_multiple_of(4) || !offset.is_multiple_of(4) {
        return Err(of_record);
    }
    let (Ok(stride), Ok(offset)) = (u32::try_from(stride), u32::try_from(offset)) else {
        return Err(of_record);
    };

    let rows = stack.iter().fold(0usize, |rows, of| rows.saturating_add(of.outputs));
    // A team steps over its tile's end, and must not wrap to the first row.
    let indexed = rows.checked_mul(width / 8).is_some_and(|n| i32::try_from(n).is_ok());
    let len = stack.iter().map(|of| weights::len(of.format, of.outputs.saturating_mul(width)));
    let end = len.fold(0usize, usize::saturating_add);
    let indexed = indexed && (stack.iter().all(|of| of.format.is_none()) || weights::indexable(end));
    let Some(rows) = u32::try_from(rows).ok().filter(|&rows| rows > 0 && indexed) else {
        return Err(Error::Rows { rows, width });
    };
    let groups = |of: &Stacked| of.outputs.div_ceil(rows_of_tile(of.format, tile));
    let (got, max) = (stack.iter().map(groups).sum(), super::MAX_GROUPS);
    let Some(groups) = u32::try_from(got).ok().filter(|&n| n <= max) else {
        return Err(Error::Groups { got, max });
    };

    let (mut tiles, mut first, mut start) = (Vec::with_capacity(got), 0, 0);
    for of in stack {
        // within `rows`, which is of 32 bits
        let end = first + u32::try_from(of.outputs).unwrap_or(rows);
        let scales = 8 * (start + weights::elements(of.format, of.outputs * width));
        let tile = rows_of_tile(of.format, tile);
        for tile_first in (first..end).step_by(tile) {
            let before = (tile_first - first) as usize * width;
            let index = |n: usize| u32::try_from(n).unwrap_or(NONE); // halves have no scales, and others were checked
            tiles.push(Tile {
                first: tile_first,
                end: end.min(tile_first.saturating_add(u32::try_from(tile).unwrap_or(rows))),
                mix: of.mix.unwrap_or(NONE),
                activation: of.activation as u32,
                format: weights::number(of.format),
                elements: index(start + weights::elements(of.format, before)),
                scales: if of.format.is_some() { index(scales + before / BLOCK) } else { 0 },
                unused: 0,
            });
        }
        (first, start) = (end, start + weights::len(of.format, of.outputs * width));
    }
    #[expect(clippy::cast_possible_truncation, reason = "a constant that an f32 holds well enough")]
    let eps = LN_EPS as f32;
    Ok((Params { eps, stride, offset }, tiles, [groups, 1, 1]))
}
