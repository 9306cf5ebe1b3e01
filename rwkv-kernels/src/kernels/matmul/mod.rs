//! Bindings and lowering of `matmul.wgsl` and `matmul_coop.wgsl`. The operation is defined in
//! [`rwkv_core::ops::matmul`].
//!
//! All jobs of a call share one buffer of weights, and how their matrices lie in it: the override `TRANSPOSED`. Each has its own
//! format, of those in the override `FORMATS`; offsets and lengths of weights count [elements](super::weights::ELEMENT).
//!
//! The caller sees to it that no element of `y` is of two jobs: they run side by side.
//!
//! # With cooperative matrices
//!
//! They multiply halves, and sum in `f32`. The weights are halves as they are, or
//! those of blocks rounded to the nearest, off by `2^-11 |w| + 2^-25` at most, in every tile anew: to decode a matrix once for all
//! rows, in a dispatch before, was measured to take more than it saves. Whoever writes `x` has divided it by `2^e`, `e`
//! the job's [`exponent`](Job::exponent), and rounded it, as [`rwkv_core::ops::to_halves`] says; it lies as
//! [`packed`](super::packed) says. The products are exact. What they come to may be written so too: [`Store::Halves`].
//!
//! A power of two per job, and not one per row from its largest element, because nothing that comes before knows the
//! largest: a pass over the rows for its sake costs a dispatch, and what it would save is less than the rounding of an
//! element of size `2^(e - 14)`.

use rwkv_core::ops::activation::Activation;
use rwkv_core::ops::matmul::Rows;
use rwkv_core::quant::{BLOCK, Format};

use super::weights::{self as stored, ELEMENT, HALF};
use super::{MAX_GROUPS, indexable};
use crate::Kernel;
pub use crate::reflected::matmul::{Params, VARIANTS};

#[cfg(test)]
#[cfg(feature = "gpu")]
mod tests;

/// What one workgroup computes, and how: one of [`TILES`], of [`COOP_TILES`] or of [`COOP_TILES_UNSPLIT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tile {
    /// Rows, the override `ROWS`. A workgroup multiplies all of them, there or not.
    pub rows: u32,
    /// Outputs.
    pub cols: u32,
    /// How cooperative matrices divide it; without, it is of the portable variant.
    pub coop: Option<Coop>,
}

/// How the subgroups of a workgroup divide a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Coop {
    /// Rows of a part, the override `SUB_ROWS`.
    pub sub_rows: u32,
    /// Outputs of a part, the override `SUB_COLS`.
    pub sub_cols: u32,
    /// Subgroups that share a part, each with inputs of its own, the override `SPLIT`. Results depend on it, and on
    /// nothing else of a tile.
    pub split: u32,
    /// Inputs at a time, the override `STEP`.
    pub step: u32,
    /// Steps that are loaded ahead, the override `AHEAD`, 1, 2 or 4: where all weights are halves, and where some are blocks.
    pub ahead: [u32; 2],
}

/// The tiles of the portable variant. A result does not depend on them.
pub const TILES: [Tile; 3] = [portable(32), portable(64), portable(128)];

/// Those of the variant with cooperative matrices. In the small ones, for so few rows that reading the weights is what takes
/// the time, several subgroups share a part, so that enough of them read. The wide ones, of two such, read rows half as often: for matrices of
/// which there are two for each processor.
pub const COOP_TILES: [Tile; 7] = [
    coop([16, 16], [16, 16], 8, 256, [2, 1]),
    coop([16, 32], [16, 32], 4, 128, [4, 1]),
    coop([16, 64], [16, 32], 2, 64, [4, 4]),
    coop([32, 32], [32, 32], 4, 128, [4, 1]),
    coop([32, 64], [32, 32], 2, 64, [4, 4]),
    COOP_TILES_UNSPLIT[1],
    COOP_TILES_UNSPLIT[2],
];

/// Those of which each part is of one subgroup. A result does not depend on which of these it is.
pub const COOP_TILES_UNSPLIT: [Tile; 3] = [
    coop([16, 64], [16, 16], 1, 128, [2, 2]),
    coop([64, 64], [32, 32], 1, 64, [2, 1]),
    coop([128, 128], [64, 32], 1, 64, [1, 2]),
];

const fn portable(rows: u32) -> Tile {
    Tile { rows, cols: 64, coop: None }
}

const fn coop(
    [rows, cols]: [u32; 2],
    [sub_rows, sub_cols]: [u32; 2],
    split: u32,
    step: u32,
    ahead: [u32; 2],
) -> Tile {
    Tile { rows, cols, coop: Some(Coop { sub_rows, sub_cols, split, step, ahead }) }
}

impl Tile {
    /// Invocations of its workgroup.
    #[must_use]
    pub const fn lanes(self) -> u32 {
        match self.coop {
            None => 2 * self.rows,
            Some(of) => 32 * (self.rows / of.sub_rows) * (self.cols / of.sub_cols) * of.split,
        }
    }

    /// The variants that compute it.
    pub fn variants(self) -> impl Iterator<Item = &'static Kernel> + Clone {
        VARIANTS.iter().filter(move |kernel| kernel.features.coop == self.coop.is_some())
    }

    /// What a pipeline for it is compiled for where it multiplies these jobs, if it asks.
    #[must_use]
    pub fn kinds(self, jobs: &[Job]) -> Option<Kinds> {
        let kinds = if self.rows < LONG { Kinds::shared(jobs) } else { Kinds::of(jobs) };
        self.coop.map(|_| kinds)
    }

    /// The overrides of a pipeline for it, [`transposed`](Dims::transposed) or not, and for matrices in a
    /// [set](stored::set) of formats.
    #[must_use]
    pub fn overrides(self, transposed: bool, formats: u32) -> Vec<(&'static str, f64)> {
        let mut all = vec![
            ("ROWS", self.rows.into()),
            ("TRANSPOSED", u8::from(transposed).into()),
            ("FORMATS", formats.into()),
        ];
        if let Some(Coop { sub_rows, sub_cols, split, step, ahead }) = self.coop {
            let ahead = ahead[usize::from(formats != stored::set([None]))];
            let own = [("SUB_ROWS", sub_rows), ("SUB_COLS", sub_cols), ("SPLIT", split), ("STEP", step)];
            all.extend(
                own.into_iter()
                    .chain([("COLS", self.cols), ("AHEAD", ahead)])
                    .map(|(name, n)| (name, n.into())),
            );
        }
        all
    }
}

/// Rows of a tile whose products take so long that what pipelines of their own gain is more than what it takes to fetch their code.
const LONG: u32 = 128;

/// Words that cooperative matrices read and write at a time.
const QUAD: usize = 4;

/// The largest exponent: what is beyond `65504 * 2^64` is no activation.
const MAX_EXPONENT: u8 = 64;

/// What all jobs of a call share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Rows, `T`.
    pub rows: usize,
    /// What a workgroup computes: the pipeline's [overrides](Tile::overrides).
    pub tile: Tile,
    /// The pipeline's override `TRANSPOSED`: whether matrices are `[K, O]`, not `[O, K]`.
    pub transposed: bool,
    /// Length of the weights, in elements.
    pub weights: usize,
    /// Length of `x`, in words.
    pub x: usize,
    /// Length of `y`, in words.
    pub y: usize,
}

/// One product: see [`rwkv_core::ops::matmul::Job`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// Columns of the matrix, `K`: a multiple of 8, or of 32 in blocks, unless it is transposed, and then of 8 for cooperative matrices.
    pub inputs: usize,
    /// Rows of the matrix, `O`: a multiple of 8, or of 32 in blocks, if it is transposed.
    pub outputs: usize,
    /// Where the matrix starts, in elements.
    pub weights: usize,
    /// Weights from one of its rows to the next: as many as it has in a row, or more if it is a part of one whose inputs
    /// others take.
    pub row: usize,
    /// What it is in.
    pub format: Option<Format>,
    /// In blocks, where its scales start, in halves: see [`Self::stored`].
    pub scales: usize,
    /// Input rows in `x`, by words. For cooperative matrices they are halves, and start at multiples of 4.
    pub x: Rows,
    /// The power of two that `x` was divided by where it is halves: see [above](self).
    pub exponent: u8,
    /// Output rows in `y`, by words. For cooperative matrices they start at multiples of 4, and have so many words.
    pub y: Rows,
    /// What the products pass through.
    pub activation: Activation,
    /// What becomes of them.
    pub store: Store,
}

impl Job {
    /// With a whole matrix in a format, its scales after the weights.
    #[must_use]
    pub const fn stored(self, format: Option<Format>) -> Self {
        let end =
            self.weights.saturating_add(stored::elements(format, self.inputs.saturating_mul(self.outputs)));
        Self { format, scales: end.saturating_mul(ELEMENT / HALF), ..self }
    }
}

/// What becomes of products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// They take the place of what is there.
    Put,
    /// They are added to what is there.
    Add,
    /// They are divided by two to this power and rounded to halves, which lie as [`packed`](super::packed) says: for
    /// cooperative matrices alone, as are those that read them.
    Halves(u8),
}

/// What jobs do with their products, a bit for each way. A pipeline of cooperative matrices that is compiled for no other has
/// more registers for the products themselves: of 1.5B on an H100, a prompt's channel mix takes a fifth less.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Kinds {
    stores: u32,
    activations: u32,
}

impl Kinds {
    /// As the overrides' defaults.
    const ALL: Self = Self { stores: 7, activations: 15 };

    /// Those of jobs.
    #[must_use]
    pub fn of(jobs: &[Job]) -> Self {
        jobs.iter().fold(Self { stores: 0, activations: 0 }, |all, job| Self {
            stores: all.stores | 1 << job.store.number().min(Store::Halves(0).number()),
            activations: all.activations | 1 << job.activation as u32,
        })
    }

    /// All that do not add; where the jobs add, those of the jobs. Where a dispatch is short, its pipeline had better be that of others
    /// too: see `store_by_pieces` in `matmul_coop.wgsl`.
    #[must_use]
    pub fn shared(jobs: &[Job]) -> Self {
        let own = Self::of(jobs);
        let added = 1 << Store::Add.number();
        let all = Self { stores: Self::ALL.stores & !added, ..Self::ALL };
        if own.stores & added == 0 { all } else { own }
    }

    /// Whether what others do is among it.
    #[must_use]
    pub const fn contains(self, others: Self) -> bool {
        self.stores | others.stores == self.stores
            && self.activations | others.activations == self.activations
    }

    /// The overrides of a pipeline for these alone; without, it is for all.
    #[must_use]
    pub fn overrides(self) -> [(&'static str, f64); 2] {
        [("STORES", self.stores.into()), ("ACTIVATIONS", self.activations.into())]
    }
}

impl Store {
    /// As the kernels tell it.
    const fn number(self) -> u32 {
        match self {
            Self::Put => 0,
            Self::Add => 1,
            Self::Halves(exponent) => 2 + exponent as u32,
        }
    }
}

/// A tile of a job's outputs, as the kernel reads it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Record {
    col: u32,
    inputs: u32,
    outputs: u32,
    weights: u32,
    x: u32,
    x_stride: u32,
    y: u32,
    y_stride: u32,
    scales: u32,
    store: u32,
    row: u32,
    format: u32, // the exponent, in the bits from the eighth on, the activation, from the sixteenth on
}

const _: () = assert!(size_of::<Record>() == 3 * 16, "three `vec4<u32>`");

/// Why a call cannot be encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Lanes and memory are laid out for some tiles.
    #[error("matmul: {got:?} is not among the tiles")]
    Tile {
        /// The tile asked for.
        got: Tile,
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
    /// Weights are read by eights, or by blocks, along a row of the matrix, of which blocks are whole ones.
    #[error("matmul: rows of {got} of {row} weights, in job {job}, are not whole eights, or blocks of all")]
    Row {
        /// Which job.
        job: usize,
        /// Its inputs or, transposed, outputs.
        got: usize,
        /// From row to row.
        row: usize,
    },
    /// Cooperative matrices read and write rows by four words.
    #[error(
        "matmul: in job {job}, rows of {words} words at {offset} every {stride} of {operand} are not by fours of words"
    )]
    Quads {
        /// Which job.
        job: usize,
        /// Which buffer.
        operand: &'static str,
        /// Words of a row.
        words: usize,
        /// Where row 0 starts.
        offset: usize,
        /// From row to row.
        stride: usize,
    },
    /// Halves times such a power of two are no activations.
    #[error("matmul: job {job} divides by 2^{got}, the most is 2^{MAX_EXPONENT}")]
    Exponent {
        /// Which job.
        job: usize,
        /// Its exponent, or that of what it stores.
        got: u8,
    },
    /// Halves are what cooperative matrices read and write, and no others.
    #[error("matmul: job {job} is to be stored as halves, but is not of cooperative matrices")]
    Halves {
        /// Which job.
        job: usize,
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

/// Lowers one call to the uniform block, the contents of `tiles` and the workgroup count. Workgroups that follow each other are of
/// other rows and the same outputs, so that those that run side by side read few weights: 2,048 rows of 4,096 inputs and
/// 16,384 outputs take 1,114 us on an H100, and 1,236 the other way round.
///
/// # Errors
///
/// If the kernel cannot run the call, whatever the device: see [`Error`].
pub fn lower(dims: Dims, jobs: &[Job]) -> Result<(Params, Vec<Record>, [u32; 3]), Error> {
    if ![&TILES[..], &COOP_TILES, &COOP_TILES_UNSPLIT].iter().any(|tiles| tiles.contains(&dims.tile)) {
        return Err(Error::Tile { got: dims.tile });
    }
    let max = dims.tile.rows * MAX_GROUPS;
    let rows = u32::try_from(dims.rows)
        .ok()
        .filter(|&rows| rows <= max)
        .ok_or(Error::Rows { got: dims.rows, max })?;
    let (mut records, mut tiles) = (Vec::new(), 0);
    for (at, job) in jobs.iter().enumerate() {
        let first = record(dims, at, job)?;
        let got = tiles as usize + job.outputs.div_ceil(dims.tile.cols as usize);
        tiles = u32::try_from(got)
            .ok()
            .filter(|&tiles| tiles <= MAX_GROUPS)
            .ok_or(Error::Tiles { got, max: MAX_GROUPS })?;
        let cols = (0..first.outputs).step_by(dims.tile.cols as usize);
        records.extend(cols.map(|col| Record { col, ..first }));
    }
    Ok((Params { rows }, records, [rows.div_ceil(dims.tile.rows), tiles, 1]))
}

/// Lowers the first tile of a job.
fn record(dims: Dims, at: usize, of: &Job) -> Result<Record, Error> {
    let Job { inputs, outputs, weights, row, format, scales, x, exponent, y, activation, store } = *of;
    let coop = dims.tile.coop.is_some();
    if inputs == 0 || outputs == 0 {
        return Err(Error::Empty { job: at, inputs, outputs });
    }
    let [along, rows] = if dims.transposed { [outputs, inputs] } else { [inputs, outputs] };
    let unit = stored::unit(format);
    let whole = along.is_multiple_of(unit) && row.is_multiple_of(unit);
    if !whole || row < along {
        return Err(Error::Row { job: at, got: along, row });
    }
    let stored = if let Store::Halves(exponent) = store { exponent } else { 0 };
    let got = exponent.max(stored);
    if got > MAX_EXPONENT {
        return Err(Error::Exponent { job: at, got });
    }
    let halves = matches!(store, Store::Halves(_));
    if halves && !coop {
        return Err(Error::Halves { job: at });
    }
    // Of halves two are a word.
    let [x_words, y_words] =
        [(coop, inputs), (halves, outputs)].map(|(two, n)| if two { n.div_ceil(2) } else { n });
    let odd = [coop && !inputs.is_multiple_of(2), halves && !outputs.is_multiple_of(2)];
    for ((operand, rows, words), odd) in [("x", x, x_words), ("y", y, y_words)].into_iter().zip(odd) {
        let Rows { offset, stride } = rows;
        if coop && (odd || [words, offset, stride].iter().any(|n| !n.is_multiple_of(QUAD))) {
            return Err(Error::Quads { job: at, operand, words, offset, stride });
        }
    }
    if dims.rows > 1 && y.stride < y_words {
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
    let matrix = row.checked_mul(rows - 1).and_then(|before| before.checked_add(along));
    let end_of_weights = matrix.and_then(|n| weights.checked_add(stored::elements(format, n)));
    let mut last = within("weights", dims.weights, end_of_weights)?;
    if format.is_some() {
        let end = matrix.and_then(|n| scales.checked_add(n / BLOCK));
        last = last.max(within("weights", dims.weights, end.map(|n| n.div_ceil(ELEMENT / HALF)))?);
        if !stored::indexable(last) {
            return Err(outside("weights", dims.weights));
        }
    }
    within("x", dims.x, end(x, x_words))?;
    within("y", dims.y, end(y, y_words))?;
    // Of one row the stride, and of none the rest, may still be beyond.
    let word = |operand, len, value: usize| u32::try_from(value).map_err(|_| outside(operand, len));
    Ok(Record {
        col: 0,
        inputs: word("x", dims.x, inputs)?,
        outputs: word("y", dims.y, outputs)?,
        weights: word("weights", dims.weights, weights)?,
        x: word("x", dims.x, x.offset)?,
        x_stride: word("x", dims.x, x.stride)?,
        y: word("y", dims.y, y.offset)?,
        y_stride: word("y", dims.y, y.stride)?,
        scales: if format.is_some() { word("weights", dims.weights, scales)? } else { 0 },
        store: store.number(),
        row: word("weights", dims.weights, row)?,
        format: stored::number(format) | u32::from(exponent) << 8 | (activation as u32) << 16,
    })
}
