//! [`time_mix`](rwkv_core::ops::time_mix), fused: all that happens in a head between the projections and the output
//! layer, in one dispatch, for packed segments of any length.
//!
//! A segment is consecutive rows of one sequence. Its state is read from one record and written to another, which may
//! be the same, but no other segment's. Records hold the heads at `offset` as `[H, key N, value N]`: value rows side by
//! side, so that neighbouring invocations read neighbouring words.

#[cfg(test)]
#[cfg(feature = "gpu")]
pub(super) mod tests;

use rwkv_core::config::Ranks;
use rwkv_core::ops::decay::DECAY_SCALE;
use rwkv_core::ops::kappa::KAPPA_EPS;
use rwkv_core::ops::readout::GN_EPS;

pub use crate::reflected::time_mix::*;

/// Channels of a head, the only number that the kernel is made for.
pub const HEAD_SIZE: usize = 64;

/// The extents of a call, in `f32` where they are lengths.
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
    /// Of a record of the state.
    pub stride: usize,
    /// Of the heads in a record.
    pub offset: usize,
}

/// A segment: an element of `segments`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Segment {
    /// Its first row.
    pub first: u32,
    /// Its rows.
    pub rows: u32,
    /// The record that it reads.
    pub from: u32,
    /// The record that it writes.
    pub to: u32,
}

/// Why a call cannot be lowered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A head size that there is no kernel for.
    #[error("head size {got}, the kernel is made for {want}")]
    HeadSize {
        /// As asked for.
        got: usize,
        /// As it is.
        want: usize,
    },
    /// The heads do not fit into a record, or the operands into a row of inputs.
    #[error("{0:?}: the heads exceed a record, or the operands a row of inputs")]
    Layout(Dims),
    /// Of [`time_mix_resident`](super::time_mix_resident): what does not fit, or is nothing.
    #[error("{0} does not fit, or is nothing")]
    Resident(&'static str),
    /// More elements than the kernel can index, or none.
    #[error("{0:?}: nothing to do, or too much for 32-bit indices")]
    Extents(Dims),
    /// Too few lanes for the adapters.
    #[error("{got} lanes multiply four adapters, at least {want} are needed")]
    Lanes {
        /// As asked for.
        got: u32,
        /// At least.
        want: usize,
    },
    /// Of [`time_mix_batch`](super::time_mix_batch): it reads records by four words.
    #[error("heads from {offset} on, in records of {stride}: words are read by fours")]
    Vectors {
        /// Of a record.
        stride: usize,
        /// Of the heads in it.
        offset: usize,
    },
    /// More workgroups along a dimension than a dispatch has.
    #[error("{got:?} workgroups, at most {max} along a dimension")]
    Groups {
        /// As many as asked for.
        got: [usize; 2],
        /// As many as there can be.
        max: u32,
    },
}

/// The parameters and workgroups of a call. `lora_up` is the pipeline's override `LANES`, if the adapters' second factors are
/// multiplied in it, as they are in all but [`time_mix_batch`](super::time_mix_batch).
///
/// # Errors
///
/// If the extents are not what the kernel can do.
pub fn lower(dims: Dims, lora_up: Option<u32>) -> Result<(Params, [u32; 3]), Error> {
    let Dims { rows, segments, heads, head_size, ranks, inputs, stride, offset } = dims;
    if head_size != HEAD_SIZE {
        return Err(Error::HeadSize { got: head_size, want: HEAD_SIZE });
    }
    let too_much = Error::Extents(dims);
    let product = |a: usize, b: usize| a.checked_mul(b).filter(|&n| u32::try_from(n).is_ok()).ok_or(too_much);
    let width = product(heads, HEAD_SIZE)?;
    let sum = |terms: &[usize]| terms.iter().try_fold(0usize, |sum, &x| sum.checked_add(x)).ok_or(too_much);
    let operands = sum(&[ranks.w, ranks.a, ranks.v, ranks.g])?;
    if offset.saturating_add(product(width, HEAD_SIZE)?) > stride
        || product(3, width)?.saturating_add(operands) > inputs
    {
        return Err(Error::Layout(dims));
    }
    common(rows, segments, heads, head_size, ranks, inputs).ok_or(too_much)?;
    let [teams_w, teams_a, teams_v] = lora_up.map_or(Ok([0; 3]), |lanes| divided(ranks, lanes))?;
    let u = |n: usize| u32::try_from(n).map_err(|_| too_much);
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
        stride: u(stride)?,
        offset: u(offset)?,
        first_layer: (ranks.v == 0).into(),
        decay_scale: DECAY_SCALE as f32,
        kappa_eps: KAPPA_EPS as f32,
        norm_eps: GN_EPS as f32,
    };
    let (got, max) = ([heads, segments], super::MAX_GROUPS);
    match got.map(u32::try_from) {
        [Ok(x), Ok(y)] if x.max(y) <= max => Ok((params, [x, y, 1])),
        _ => Err(Error::Groups { got, max }),
    }
}

/// That there is something to do, and that its operands can be indexed: all but the state.
pub(super) fn common(
    rows: usize,
    segments: usize,
    heads: usize,
    head_size: usize,
    ranks: Ranks,
    inputs: usize,
) -> Option<()> {
    let product = |a: usize, b: usize| a.checked_mul(b).filter(|&n| u32::try_from(n).is_ok());
    let width = product(heads, head_size)?;
    let rank = ranks.w.checked_add(ranks.a)?.checked_add(ranks.v)?.checked_add(ranks.g)?;
    let elements = [product(rows, inputs)?, product(product(rows, 4)?, width)?, segments];
    product(rank, width)?;
    let operands = product(3, width)?.checked_add(rank)?;
    (head_size == HEAD_SIZE && !elements.contains(&0) && operands <= inputs).then_some(())
}

/// Lanes of a team in `second_factors.wgsl`.
const TEAM: usize = 16;

/// How many of the teams multiply the adapters w, a and v; the rest is for g. Each has one, and the others go where most
/// ranks wait for a team.
pub(super) fn divided(ranks: Ranks, lanes: u32) -> Result<[u32; 3], Error> {
    let (ranks, mut shares) = ([ranks.w, ranks.a, ranks.v, ranks.g], [1; 4]);
    let teams = lanes as usize / TEAM;
    if teams < shares.len() {
        return Err(Error::Lanes { got: lanes, want: shares.len() * TEAM });
    }
    for _ in shares.len()..teams {
        let most = (0..4).max_by_key(|&i| ranks[i].div_ceil(shares[i] as usize)).unwrap_or_default();
        shares[most] += 1;
    }
    let [w, a, v, _] = shares;
    Ok([w, a, v])
}
