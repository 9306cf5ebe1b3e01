//! Bindings and lowering of `matmul.wgsl`. The operation is defined in [`rwkv_core::ops::matmul`].
//!
//! All jobs of a call share one buffer of weights, and how their matrices lie in it: the override `TRANSPOSED`. A buffer
//! holds weights by eights, as `weights.wgsl` reads them; offsets and lengths of weights count eights.
//!
//! The caller sees to it that no element of `y` is of two jobs: they run side by side.

use rwkv_core::ops::activation::Activation;
use rwkv_core::ops::matmul::Rows;

use super::{MAX_GROUPS, indexable};
pub use crate::reflected::matmul::{Params, VARIANTS};

#[cfg(test)]
#[cfg(feature = "gpu")]
mod tests;

/// What the override `ROWS` may be: rows that one workgroup computes. A result does not depend on it. The smallest is
/// for calls of so few rows, since a workgroup multiplies all of its own, there or not.
pub const TILE_ROWS: [u32; 3] = [32, 64, 128];

/// Outputs that one workgroup computes.
const TILE_COLS: usize = 64;

/// Weights of an element.
const OCTET: usize = 8;

/// What all jobs of a call share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Rows, `T`.
    pub rows: usize,
    /// The pipeline's override `ROWS`, one of [`TILE_ROWS`].
    pub tile_rows: u32,
    /// The pipeline's override `TRANSPOSED`: whether matrices are `[K, O]`, not `[O, K]`.
    pub transposed: bool,
    /// Length of the weights, in eights.
    pub weights: usize,
    /// Length of `x`.
    pub x: usize,
    /// Length of `y`.
    pub y: usize,
}

/// One product: see [`rwkv_core::ops::matmul::Job`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// Columns of the matrix, `K`: a multiple of 8 unless it is transposed.
    pub inputs: usize,
    /// Rows of the matrix, `O`: a multiple of 8 if it is transposed.
    pub outputs: usize,
    /// Where the matrix starts, in eights of weights.
    pub weights: usize,
    /// Input rows in `x`.
    pub x: Rows,
    /// Output rows in `y`.
    pub y: Rows,
    /// What the products pass through.
    pub activation: Activation,
    /// Whether they are added to what is there.
    pub accumulate: bool,
}

/// A job as the kernel reads it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Record {
    first_tile: u32,
    inputs: u32,
    outputs: u32,
    weights: u32,
    x: u32,
    x_stride: u32,
    y: u32,
    y_stride: u32,
    activation: u32,
    accumulate: u32,
    unused: [u32; 2],
}

const _: () = assert!(size_of::<Record>() == 3 * 16, "three `vec4<u32>`");

/// Why a call cannot be encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Lanes and memory are laid out for some tiles.
    #[error("matmul: tiles of {got} rows are not among {TILE_ROWS:?}")]
    Tile {
        /// The rows of a tile asked for.
        got: u32,
    },
    /// A product without inputs or outputs is none.
    #[error("matmul: job {job} has {inputs} inputs and {outputs} outputs")]
    Empty {
        /// Which job.
        job: usize,
        /// Its inputs.
        inputs: usize,
        /// Its outputs.
        outputs: usize,
    },
    /// Weights are read by eights, along a row of the matrix.
    #[error("matmul: rows of {got} weights, in job {job}, are not whole eights")]
    Octets {
        /// Which job.
        job: usize,
        /// Its inputs or, transposed, outputs.
        got: usize,
    },
    /// The rows of `y` run into each other.
    #[error("matmul: job {job} has {outputs} outputs every {stride}")]
    Overlap {
        /// Which job.
        job: usize,
        /// Its outputs.
        outputs: usize,
        /// From row to row.
        stride: usize,
    },
    /// A job does not end within a buffer, or not where a `u32` can index.
    #[error("matmul: job {job} is not within the {len} elements of {operand}, or beyond 32-bit indices")]
    Outside {
        /// Which job.
        job: usize,
        /// Which buffer.
        operand: &'static str,
        /// Its length.
        len: usize,
    },
    /// One dispatch holds one workgroup per tile, and not so many along the outputs of all jobs.
    #[error("matmul: {got} tiles of outputs are more than {max}")]
    Tiles {
        /// The tiles, up to the job that is too much.
        got: usize,
        /// The most that one dispatch can hold.
        max: u32,
    },
    /// One dispatch holds one workgroup per tile, and not so many along the rows.
    #[error("matmul: {got} rows are more than {max}")]
    Rows {
        /// The rows asked for.
        got: usize,
        /// The most that one dispatch can hold.
        max: u32,
    },
}

/// Lowers one call to the uniform block, the contents of `jobs` and the workgroup count.
///
/// # Errors
///
/// If the kernel cannot run the call, whatever the device: see [`Error`].
pub fn lower(dims: Dims, jobs: &[Job]) -> Result<(Params, Vec<Record>, [u32; 3]), Error> {
    if !TILE_ROWS.contains(&dims.tile_rows) {
        return Err(Error::Tile { got: dims.tile_rows });
    }
    let max = dims.tile_rows * MAX_GROUPS;
    let rows = u32::try_from(dims.rows)
        .ok()
        .filter(|&rows| rows <= max)
        .ok_or(Error::Rows { got: dims.rows, max })?;
    let (mut params, mut records, mut tiles) = (Params { rows, jobs: 0 }, Vec::new(), 0);
    for (at, job) in jobs.iter().enumerate() {
        records.push(record(dims, at, job, tiles)?);
        params.jobs += 1; // no more than there are tiles
        let got = tiles as usize + job.outputs.div_ceil(TILE_COLS);
        tiles = u32::try_from(got)
            .ok()
            .filter(|&tiles| tiles <= MAX_GROUPS)
            .ok_or(Error::Tiles { got, max: MAX_GROUPS })?;
    }
    Ok((params, records, [tiles, rows.div_ceil(dims.tile_rows), 1]))
}

/// Lowers one job, whose tiles start with `first_tile`.
fn record(dims: Dims, at: usize, of: &Job, first_tile: u32) -> Result<Record, Error> {
    let Job { inputs, outputs, weights, x, y, activation, accumulate } = *of;
    if inputs == 0 || outputs == 0 {
        return Err(Error::Empty { job: at, inputs, outputs });
    }
    let along = if dims.transposed { outputs } else { inputs };
    if !along.is_multiple_of(OCTET) {
        return Err(Error::Octets { job: at, got: along });
    }
    if dims.rows > 1 && y.stride < outputs {
        return Err(Error::Overlap { job: at, outputs, stride: y.stride });
    }
    let outside = |operand, len| Error::Outside { job: at, operand, len };
    let within = |operand, len, end: Option<usize>| {
        end.filter(|&end| end <= len && indexable(1, end).is_some()).ok_or(outside(operand, len))
    };
    let end = |of: Rows, width: usize| match dims.rows.checked_sub(1) {
        None => Some(0),
        Some(last) => last.checked_mul(of.stride)?.checked_add(of.offset)?.checked_add(width),
    };
    let matrix = inputs.checked_mul(outputs).and_then(|n| weights.checked_add(n / OCTET));
    within("weights", dims.weights, matrix)?;
    within("x", dims.x, end(x, inputs))?;
    within("y", dims.y, end(y, outputs))?;
    // Of one row the stride, and of none the rest, may still be beyond.
    let word = |operand, len, value: usize| u32::try_from(value).map_err(|_| outside(operand, len));
    Ok(Record {
        first_tile,
        inputs: word("x", dims.x, inputs)?,
        outputs: word("y", dims.y, outputs)?,
        weights: word("weights", dims.weights, weights)?,
        x: word("x", dims.x, x.offset)?,
        x_stride: word("x", dims.x, x.stride)?,
        y: word("y", dims.y, y.offset)?,
        y_stride: word("y", dims.y, y.stride)?,
        activation: activation as u32,
        accumulate: accumulate.into(),
        unused: [0; 2],
    })
}
