//! [`time_mix_resident`](rwkv_core::ops::time_mix_resident), fused: as [`time_mix`](super::time_mix), on states in less
//! than single precision or written seldom.
//!
//! A sequence's state is a base and, with the override `LAZY`, the entries of the tokens since. Both are never changed:
//! a call reads a base and entries, and writes an entry for each token and, where too many are pending, another base.
//! So a fork shares all of them, and a token is undone by forgetting its entry.
//!
//! The buffer `state` holds bases and then slots, of which each has an entry somewhere:
//!
//! ```text
//! base     H heads of Format::head_words                    see there
//! entry    q, v, b / E, k / E, E, each f32 [D]              see rwkv_core::ops::wkv7_lazy
//! ```
//!
//! The results of a row do not depend on what else is in the call, nor on how a sequence's rows are spread over calls,
//! bit for bit, as long as `LANES` and `LORA_UP` are the same.

#[cfg(test)]
#[cfg(feature = "gpu")]
pub(super) mod tests;

use rwkv_core::config::Ranks;
use rwkv_core::ops::decay::DECAY_SCALE;
use rwkv_core::ops::kappa::KAPPA_EPS;
use rwkv_core::ops::readout::GN_EPS;
pub use rwkv_core::ops::wkv7_lazy::ENTRY;

pub use super::time_mix::{Error, HEAD_SIZE};
use super::time_mix::{common, divided};
pub use crate::reflected::time_mix_resident::*;

/// In place of a base that is written.
pub const NONE: u32 = u32::MAX;

/// What bases are stored in: the override `FORMAT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Single precision.
    F32,
    /// Halves, with an exponent for each row.
    F16,
    /// Bytes, with a scale for 16 and an exponent for each row.
    Int8,
}

impl Format {
    /// Words of a head of a base:
    ///
    /// ```text
    /// values      [64 / P, 64]     word (w, i): keys P w .. of value row i, the first in its low bits; P = 1, 2 or 4
    /// scales      [2, 64]          bytes alone; word (w, i): of blocks 2 w and 2 w + 1 of row i, as halves
    /// exponents   [16]             not of single precision; word w: of rows 4 w .. as bytes
    /// ```
    #[must_use]
    pub const fn head_words(self) -> usize {
        match self {
            Self::F32 => HEAD_SIZE * HEAD_SIZE,
            Self::F16 => HEAD_SIZE * HEAD_SIZE / 2 + HEAD_SIZE / 4,
            Self::Int8 => HEAD_SIZE * HEAD_SIZE / 4 + 2 * HEAD_SIZE + HEAD_SIZE / 4,
        }
    }
}

/// How bases are rounded: the override `ROUNDING`. All depend on the tokens that a sequence has read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// To the nearest.
    Nearest,
    /// By a dither: `rwkv_state::format::Rounding::Dither`.
    Dither,
    /// To the nearest, after a dither was added to the decay.
    DecayDither,
}

/// Bytes of memory that a workgroup of so many lanes takes, at most.
#[must_use]
pub const fn workgroup_bytes(lanes: u32) -> u32 {
    // By lane what the helpers `head`, `second_factors` and `sixteen` hold; by channel the vectors of a token; entries.
    40 * lanes + 5500
}

/// What a pipeline is specialised for.
#[must_use]
pub fn overrides(
    format: Format,
    rounding: Rounding,
    lazy: bool,
    lanes: u32,
    lora_up: bool,
) -> [(&'static str, f64); 5] {
    [
        ("FORMAT", f64::from(format as u8)),
        ("ROUNDING", f64::from(rounding as u8)),
        ("LAZY", f64::from(u8::from(lazy))),
        ("LANES", f64::from(lanes)),
        ("LORA_UP", f64::from(u8::from(lora_up))),
    ]
}

/// The extents of a call, in words where they are lengths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Rows of all segments together.
    pub rows: usize,
    /// Segments.
    pub segments: usize,
    /// H.
    pub heads: usize,
    /// N.
    pub head_size: usize,
    /// Of the adapters; `v` is 0 in the first layer, which has none.
    pub ranks: Ranks,
    /// Of a row of `inputs`: at least 3 D and the ranks.
    pub inputs: usize,
    /// What bases are stored in.
    pub format: Format,
    /// Tokens that may be pending; 0 without `LAZY`.
    pub capacity: usize,
    /// Of a base.
    pub base_stride: usize,
    /// Where slots begin.
    pub slots: usize,
    /// Of a slot.
    pub slot_stride: usize,
    /// Of the entry in a slot.
    pub entry: usize,
    /// Of the buffer.
    pub state: usize,
}

/// A segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment<'a> {
    /// Its first row.
    pub first: u32,
    /// Its rows. One of none folds what is pending.
    pub rows: u32,
    /// The base that it reads.
    pub from: u32,
    /// The base that it writes: without `LAZY` always; with it, if it has more rows than may be pending, or none.
    pub to: Option<u32>,
    /// The slots of what is pending, oldest first.
    pub pending: &'a [u32],
    /// The slots of its rows, which those of any `capacity` rows one after the other do not share; empty without `LAZY`.
    pub slots: &'a [u32],
    /// Tokens read before, modulo 2^32.
    pub step: u32,
}

/// Words of a segment in `segments`, without its lists.
const SEGMENT: usize = 8;

/// The contents of `segments`.
#[must_use]
pub fn table(segments: &[Segment<'_>]) -> Vec<u32> {
    let (mut table, mut lists) = (Vec::new(), Vec::new());
    let word = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    for of in segments {
        let entries = segments.len() * SEGMENT + lists.len();
        lists.extend_from_slice(of.pending);
        let slots = segments.len() * SEGMENT + lists.len();
        lists.extend_from_slice(of.slots);
        table.extend([of.first, of.rows, of.from, of.to.unwrap_or(NONE), word(of.pending.len())]);
        table.extend([word(entries), word(slots), of.step]);
    }
    table.extend(lists);
    table
}

/// Words of [`table`] at most.
#[must_use]
pub const fn table_len(rows: usize, segments: usize, capacity: usize) -> usize {
    segments * (SEGMENT + capacity) + rows
}

/// The parameters and workgroups of a call. `lora_up` is the pipeline's override `LANES` if its override `LORA_UP` is
/// set.
///
/// # Errors
///
/// If the extents are not what the kernel can do.
pub fn lower(dims: Dims, lora_up: Option<u32>) -> Result<(Params, [u32; 3]), Error> {
    let Dims { rows, segments, heads, head_size, ranks, inputs, .. } = dims;
    let u = |n: usize| u32::try_from(n).map_err(|_| Error::Resident("an extent among 32-bit indices"));
    common(rows, segments, heads, head_size, ranks, inputs)
        .ok_or(Error::Resident("what rows have of heads"))?;
    let width = heads * HEAD_SIZE;
    let entry = if dims.capacity == 0 { 0 } else { ENTRY * width };
    let checks = [
        ("the heads of a base", heads * dims.format.head_words() <= dims.base_stride),
        ("an entry in a slot", dims.entry.checked_add(entry).is_some_and(|end| end <= dims.slot_stride)),
        ("the bases before the slots", dims.slots <= dims.state),
        ("the state among 32-bit indices", u32::try_from(dims.state).is_ok()),
    ];
    if let Some((what, _)) = checks.into_iter().find(|(_, fits)| !fits) {
        return Err(Error::Resident(what));
    }
    let [teams_w, teams_a, teams_v] = lora_up.map_or(Ok([0; 3]), |lanes| divided(ranks, lanes))?;
    #[expect(clippy::cast_possible_truncation, reason = "constants that an f32 holds well enough")]
    let params = Params {
        width: u(width)?,
        inputs: u(inputs)?,
        rank_w: u(ranks.w)?,
        rank_a: u(ranks.a)?,
        rank_v: u(ranks.v)?,
        rank_g: u(ranks.g)?,
        teams_w,
        teams_a,
        teams_v,
        first_layer: (ranks.v == 0).into(),
        base_stride: u(dims.base_stride)?,
        slots: u(dims.slots)?,
        slot_stride: u(dims.slot_stride)?,
        entry: u(dims.entry)?,
        capacity: u(dims.capacity)?,
        decay_scale: DECAY_SCALE as f32,
        kappa_eps: KAPPA_EPS as f32,
        norm_eps: GN_EPS as f32,
    };
    match (super::groups(heads), super::groups(segments)) {
        (Some(x), Some(y)) => Ok((params, [x, y, 1])),
        _ => Err(Error::Groups { got: [heads, segments], max: super::MAX_GROUPS }),
    }
}
