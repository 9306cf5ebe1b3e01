//! The state update of [`wkv7`](rwkv_core::ops::wkv7) over packed segments of many tokens, as a prompt has.
//!
//! It reads what [`time_mix_operands`](super::time_mix_operands) writes, and [`readout_packed`](super::readout_packed)
//! reads what it answers: all that does not wait for the token before is done for all tokens at once. Where subgroups are large
//! enough, [`wkv7_fours`](super::wkv7_fours) does the same for single precision, and waits less. For a token of
//! each of many sequences [`time_mix`](super::time_mix) and [`time_mix_resident`](super::time_mix_resident) are faster,
//! which do all in one.
//!
//! A segment's state is read from one base and written to another, which may be the same, but no other segment's. Single
//! precision that is written at every call has the bases and the segments of `time_mix`, all else those of
//! `time_mix_resident`, and the same entries are pending after a call as there. What differs is how often a state is rounded:
//! once in a call, when it is written, where `time_mix_resident` rounds it at every fold, or at every token. So
//! what the tokens do is
//!
//! ```text
//! S   = what is stored, and Undecayed::materialize of what is pending            see rwkv_core::ops::wkv7_lazy
//! S   = wkv7 of the tokens before those that are pending in the end              in single precision
//! S   = S as it is stored, if there is a base to write                           see rwkv_state::base
//! and Undecayed::step of the others
//! ```
//!
//! and the results of a sequence depend on how its tokens were spread over calls, within what its format rounds. Those of
//! single precision without `LAZY` do not, bit for bit, but with `PAIRED`, which takes tokens two at a time: they do then but for
//! rounding, since what the second of two asks is summed in another way where it is the first.

#[cfg(test)]
#[cfg(feature = "gpu")]
pub(super) mod tests;

pub use super::extents::Error;
use super::extents::{elements, fits, groups};
pub use super::time_mix::{HEAD_SIZE, Segment};
use super::time_mix_resident::{ENTRY, Format, Rounding};
use crate::Kernel;
pub use crate::reflected::wkv7_scan::{Params, VARIANTS};

/// Vectors that the state update reads of a token in a head, [`HEAD_SIZE`] elements each: `w - 1`, `k`, `kappa`, `b`, `r`
/// and `v`.
pub const OPERANDS: usize = 6;

/// The extents of a call, in words where they are lengths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Rows of all segments together.
    pub rows: usize,
    /// Segments.
    pub segments: usize,
    /// H.
    pub heads: usize,
    /// What bases are stored in.
    pub format: Format,
    /// From base to base.
    pub stride: usize,
    /// Of the heads in a base.
    pub offset: usize,
    /// From row to row of `y`, at least D.
    pub y_stride: usize,
    /// What is pending, with `LAZY`.
    pub pending: Option<Pending>,
}

/// Where the entries of pending tokens are, in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pending {
    /// Tokens that may be pending, at least one.
    pub capacity: usize,
    /// Slots, of which each has an entry.
    pub slots: usize,
    /// Where they begin.
    pub start: usize,
    /// From slot to slot.
    pub stride: usize,
    /// Of the entry in a slot.
    pub entry: usize,
}

/// What a pipeline is specialised for.
#[must_use]
pub fn overrides(format: Format, rounding: Rounding, lazy: bool, paired: bool) -> [(&'static str, f64); 4] {
    [
        ("FORMAT", f64::from(format as u8)),
        ("ROUNDING", f64::from(rounding as u8)),
        ("LAZY", f64::from(u8::from(lazy))),
        ("PAIRED", f64::from(u8::from(paired))),
    ]
}

/// Workgroups that share a head: in the variant with subgroups four invocations share a row of the state.
#[must_use]
pub const fn sharing(kernel: &Kernel) -> usize {
    if kernel.features.subgroup { 4 } else { 1 }
}

/// The parameters and workgroups of a call in a variant.
///
/// # Errors
///
/// If the extents are not what the kernel can do.
pub fn lower(kernel: &Kernel, dims: Dims) -> Result<(Params, [u32; 3]), Error> {
    let Dims { rows, segments, heads, format, stride, offset, y_stride, pending } = dims;
    let width = heads.saturating_mul(HEAD_SIZE);
    let y_stride = fits(kernel, rows, [0, width, y_stride])?;
    let stride = fits(kernel, 1, [offset, heads.saturating_mul(format.head_words()), stride])?;
    elements(kernel, rows, width.saturating_mul(OPERANDS))?;
    let grid = groups(kernel, [heads.saturating_mul(sharing(kernel)), segments])?;
    let of = |n| elements(kernel, 1, n);
    let mut params = Params {
        heads: of(heads)?,
        stride,
        offset: of(offset)?,
        y_stride,
        slots: 0,
        slot_stride: 0,
        entry: 0,
        capacity: 0,
    };
    if let Some(Pending { capacity, slots, start, stride, entry }) = pending {
        params.slot_stride = fits(kernel, slots, [entry, width.saturating_mul(ENTRY), stride])?;
        of(slots.saturating_mul(stride).saturating_add(start))?;
        (params.slots, params.entry, params.capacity) = (of(start)?, of(entry)?, of(capacity.max(1))?);
    }
    Ok((params, grid))
}
