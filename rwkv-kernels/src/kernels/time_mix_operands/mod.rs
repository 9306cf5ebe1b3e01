//! [`operands`](rwkv_core::ops::time_mix::operands): what precedes the state update in a head, for many rows side by side,
//! as [`wkv7_scan`](super::wkv7_scan) reads it.

#[cfg(test)]
#[cfg(feature = "gpu")]
mod tests;

use rwkv_core::Real as _;
use rwkv_core::ops::decay::DECAY_SCALE;
use rwkv_core::ops::kappa::KAPPA_EPS;

pub use super::extents::Error;
use super::extents::{elements, fits, groups};
use super::wkv7_scan::{HEAD_SIZE, OPERANDS};
pub use crate::reflected::time_mix_operands::{Params, VARIANTS};

/// The extents of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// T.
    pub rows: usize,
    /// H.
    pub heads: usize,
    /// Elements of a row of `inputs`, of which `r`, `k` and `v` are the first 3 D.
    pub inputs: usize,
    /// Whether it is the first layer, which has no value residual and writes `v_first`.
    pub first_layer: bool,
}

/// The parameters and workgroups of a call.
///
/// # Errors
///
/// If the extents are not what the kernel can do.
pub fn lower(dims: Dims) -> Result<(Params, [u32; 3]), Error> {
    let (kernel, Dims { rows, heads, inputs, first_layer }) = (&VARIANTS[0], dims);
    let width = heads.saturating_mul(HEAD_SIZE);
    let inputs = fits(kernel, rows, [0, width.saturating_mul(3), inputs])?;
    elements(kernel, rows, width.saturating_mul(OPERANDS))?;
    let params = Params {
        width: elements(kernel, 1, width)?,
        inputs,
        first_layer: first_layer.into(),
        decay_scale: f32::of(DECAY_SCALE),
        kappa_eps_squared: f32::of(KAPPA_EPS * KAPPA_EPS),
    };
    Ok((params, groups(kernel, [heads, rows])?))
}
