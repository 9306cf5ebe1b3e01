//! [`readout`](rwkv_core::ops::readout) of what [`wkv7_scan`](super::wkv7_scan) answers, or [`time_mix`](super::time_mix) and
//! [`time_mix_resident`](super::time_mix_resident) where they leave the norm to others, for many rows side by side.

#[cfg(test)]
#[cfg(feature = "gpu")]
mod tests;

use rwkv_core::Real as _;
use rwkv_core::ops::readout::GN_EPS;

pub use super::extents::Error;
use super::extents::{elements, groups};
use super::wkv7_scan::{HEAD_SIZE, OPERANDS};
pub use crate::reflected::readout_packed::{Params, VARIANTS};

/// The override of the kernels with heads, whether they have the group norm, the bonus and the gate, or leave them to this
/// one.
#[must_use]
pub fn norm(fused: bool) -> (&'static str, f64) {
    ("NORM", f64::from(u8::from(fused)))
}

/// The override of this one for what kernels with heads leave to it.
#[must_use]
pub const fn of_heads() -> (&'static str, f64) {
    ("BONUS", 0.0)
}

/// The extents of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// T.
    pub rows: usize,
    /// H.
    pub heads: usize,
}

/// The parameters and workgroups of a call.
///
/// # Errors
///
/// If the extents are not what the kernel can do.
pub fn lower(dims: Dims) -> Result<(Params, [u32; 3]), Error> {
    let (kernel, Dims { rows, heads }) = (&VARIANTS[0], dims);
    let width = heads.saturating_mul(HEAD_SIZE);
    elements(kernel, rows, width.saturating_mul(OPERANDS))?;
    let params = Params { width: elements(kernel, 1, width)?, eps: f32::of(GN_EPS) };
    Ok((params, groups(kernel, [heads, rows])?))
}
