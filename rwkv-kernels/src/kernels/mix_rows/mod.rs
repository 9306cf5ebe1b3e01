//! Bindings and lowering of `mix_rows.wgsl`. The operation is defined in [`rwkv_core::ops::mix_rows`]; planes are added to the rows
//! first as [`rwkv_core::ops::add_planes`] says.
//!
//! The extents are lowered by [`lower`], the segments, which all layers of a pass share, by [`cursors`].

use std::collections::BTreeSet;

use rwkv_core::Real as _;
use rwkv_core::ops::layer_norm::LN_EPS;
use rwkv_core::ops::mix_rows::Segment;

use super::{MAX_GROUPS, indexable};
pub use crate::reflected::mix_rows::{Params, VARIANTS};

#[cfg(test)]
#[cfg(feature = "gpu")]
mod tests;

/// In a cursor, in place of a record.
const NONE: u32 = u32::MAX;

/// In a cursor, in place of both records: there is no row.
const END: u32 = NONE - 1;

/// Mixes, at most: those of the time mix.
const MIXES: usize = 6;

/// Vectors of a row that an invocation holds, at most.
const MOST: usize = 8;

/// How a row is divided among the invocations of a workgroup, and what is added to it first: a pipeline's overrides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    lanes: u32,
    each: u32,
    planes: u32,
}

impl Form {
    /// For rows of `width` channels, of which a workgroup has up to `lanes` vectors of four, a power of two, at once, or more
    /// if an invocation would not hold the rest. To each row so many planes are added: see
    /// [`add_planes`](rwkv_core::ops::add_planes).
    ///
    /// # Errors
    ///
    /// If a row has no channels, or more than any workgroup holds.
    pub fn new(width: usize, lanes: u32, planes: u32) -> Result<Self, Error> {
        let quads = width.div_ceil(4);
        let wide = Error::Width { got: width, max: 4 * MOST * MAX_LANES as usize };
        let count = |n: usize| u32::try_from(n).map_err(|_| wide);
        let least = count(quads.div_ceil(MOST).next_power_of_two())?;
        let lanes = count(quads.next_power_of_two())?.min(lanes).max(least);
        if width == 0 || lanes > MAX_LANES {
            return Err(wide);
        }
        Ok(Self { lanes, each: count(quads.div_ceil(lanes as usize))?, planes })
    }

    /// The overrides.
    #[must_use]
    pub fn overrides(self) -> [(&'static str, f64); 3] {
        [("LANES", self.lanes.into()), ("EACH", self.each.into()), ("PLANES", self.planes.into())]
    }

    /// Invocations of a workgroup.
    #[must_use]
    pub const fn lanes(self) -> u32 {
        self.lanes
    }

    /// Channels of a row, at most.
    const fn most(self) -> usize {
        4 * self.lanes as usize * self.each as usize
    }
}

/// Invocations of a workgroup, at most, on any device.
const MAX_LANES: u32 = 1024;

/// Extents of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Rows of all segments, `T`.
    pub rows: usize,
    /// Channels of a row, `D`.
    pub width: usize,
    /// Mixes, `M`: six at most.
    pub mixes: usize,
    /// Records of the state.
    pub records: usize,
    /// Elements of a record.
    pub stride: usize,
    /// Where in a record the kept row begins.
    pub offset: usize,
    /// The pipeline's.
    pub form: Form,
    /// Rows of a workgroup, one after the other; one where planes are added, which is done to few rows. Those after its first
    /// do not wait for gain, bias and mixes, and do not norm the row before them again.
    pub run: u32,
}

/// Why a call cannot be encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The kernel reads four elements at a time.
    #[error("mix_rows: a {what} of {got} is no multiple of 4")]
    Quads {
        /// Of what.
        what: &'static str,
        /// The elements asked for.
        got: usize,
    },
    /// The kept row does not lie in its record.
    #[error("mix_rows: {width} channels from {offset} are not in a record of {stride}")]
    Record {
        /// Channels of a row.
        width: usize,
        /// Where the row begins.
        offset: usize,
        /// Elements of a record.
        stride: usize,
    },
    /// A workgroup holds a row.
    #[error("mix_rows: rows of {got} channels are none or more than the {max} that a workgroup holds")]
    Width {
        /// The channels asked for.
        got: usize,
        /// The most there can be.
        max: usize,
    },
    /// The kernel holds all mixes of a channel.
    #[error("mix_rows: {got} mixes are more than {MIXES}")]
    Mixes {
        /// The mixes asked for.
        got: usize,
    },
    /// More rows than one dispatch may have workgroups, be they of one row each or not.
    #[error("mix_rows: {got} rows are more than {max}")]
    Rows {
        /// The rows asked for.
        got: usize,
        /// The most that one dispatch can hold.
        max: u32,
    },
    /// An operand is longer than a `u32` can index.
    #[error("mix_rows: {rows} rows of {width} elements are beyond 32-bit indices")]
    Index {
        /// Its rows.
        rows: usize,
        /// Elements of a row.
        width: usize,
    },
    /// A segment without rows has none to keep.
    #[error("mix_rows: segment {segment} is empty")]
    Empty {
        /// Which.
        segment: usize,
    },
    /// A segment is to keep more rows than it has.
    #[error("mix_rows: segment {segment} is to keep {kept} of {rows} rows")]
    Kept {
        /// Which.
        segment: usize,
        /// Rows to be kept.
        kept: usize,
        /// Its rows.
        rows: usize,
    },
    /// There is no such record.
    #[error("mix_rows: segment {segment} has record {record} of {records}")]
    NoRecord {
        /// Which segment.
        segment: usize,
        /// The record asked for.
        record: usize,
        /// How many there are.
        records: usize,
    },
    /// Workgroups run in any order, so that a record which one writes is of no other, and not read.
    #[error(
        "mix_rows: record {record}, which segment {segment} writes, is read or written by another or read by itself"
    )]
    Shared {
        /// Which segment.
        segment: usize,
        /// The record.
        record: usize,
    },
}

/// Lowers the extents of one call to the uniform block and the workgroup count.
///
/// # Errors
///
/// If the kernel cannot run the call, whatever the device: see [`Error`].
pub fn lower(dims: Dims) -> Result<(Params, [u32; 3]), Error> {
    let Dims { rows, width, mixes, records, stride, offset, form, run } = dims;
    let run = if form.planes > 0 { 1 } else { run.max(1) };
    for (what, got) in [("width", width), ("record", stride), ("place in a record", offset)] {
        if !got.is_multiple_of(4) || (what == "width" && got == 0) {
            return Err(Error::Quads { what, got });
        }
    }
    if width > form.most() {
        return Err(Error::Width { got: width, max: form.most() });
    }
    if mixes > MIXES {
        return Err(Error::Mixes { got: mixes });
    }
    if offset.checked_add(width).is_none_or(|end| end > stride) {
        return Err(Error::Record { width, offset, stride });
    }
    let groups = super::groups(rows).ok_or(Error::Rows { got: rows, max: MAX_GROUPS })?.div_ceil(run);
    let run = run.min(MAX_GROUPS); // so that no index wraps
    let index = |rows: usize, width: usize| indexable(rows, width).ok_or(Error::Index { rows, width });
    let (stride, offset) = (index(records.max(1), stride)?, index(1, offset)?);
    let most = mixes.max(form.planes as usize);
    index((mixes + 2).max(rows.saturating_mul(most)), width)?;
    let (width, mixes) = (index(rows.max(1), width)?, index(1, mixes)?);
    Ok((Params { width, stride, offset, mixes, eps: f32::of(LN_EPS), run }, [groups, 1, 1]))
}

/// Lowers the segments of a pass to the records that each of its rows reads and writes, `[T + 1]`: the last is the end, which is not
/// read where a run is of one row.
///
/// # Errors
///
/// If a segment is empty, there are more rows than one dispatch can hold, or a record is not among the `records` there
/// are or shared.
pub fn cursors(segments: &[Segment], records: usize) -> Result<Vec<[u32; 2]>, Error> {
    let reads: BTreeSet<usize> = segments.iter().map(|s| s.from).collect();
    let mut writes = BTreeSet::new();
    let mut cursors = Vec::new();
    for (segment, s) in segments.iter().enumerate() {
        let record = |record: usize| {
            let found = u32::try_from(record).ok().filter(|&of| record < records && of < END);
            found.ok_or(Error::NoRecord { segment, record, records })
        };
        let from = record(s.from)?;
        let to = s.to.iter().map(|&to| record(to)).collect::<Result<Vec<_>, _>>()?;
        if let Some(&record) = s.to.iter().find(|to| reads.contains(to) || !writes.insert(**to)) {
            return Err(Error::Shared { segment, record });
        }
        if s.rows == 0 {
            return Err(Error::Empty { segment });
        }
        if to.len() > s.rows {
            return Err(Error::Kept { segment, kept: to.len(), rows: s.rows });
        }
        let (first, got) = (cursors.len(), cursors.len().saturating_add(s.rows));
        if got > MAX_GROUPS as usize {
            return Err(Error::Rows { got, max: MAX_GROUPS });
        }
        cursors.resize(got, [NONE; 2]);
        cursors[first][0] = from;
        cursors.iter_mut().rev().zip(to.into_iter().rev()).for_each(|(cursor, to)| cursor[1] = to);
    }
    cursors.push([END; 2]);
    Ok(cursors)
}
