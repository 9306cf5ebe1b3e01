//! Bindings and lowering of `readout.wgsl`. The operation is defined in [`rwkv_core::ops::readout`].
//!
//! It works in place: the output takes the place of `y`.

use rwkv_core::Real as _;
use rwkv_core::ops::readout::GN_EPS;
use rwkv_core::ops::wkv7::Dims;

pub use super::extents::Error;
use super::extents::{Rows, rows};
pub use crate::reflected::readout::{Params, VARIANTS};

#[cfg(test)]
#[cfg(feature = "gpu")]
pub(super) mod tests;

/// Lowers a call over operands `[T, H, N]` to the uniform block and the workgroup count.
///
/// # Errors
///
/// If the kernel cannot run the call, whatever the device: see [`Error`].
pub fn lower(dims: Dims) -> Result<(Params, [u32; 3]), Error> {
    let (Rows { rows, heads, head_size }, groups) = rows(&VARIANTS[0], dims)?;
    Ok((Params { rows, heads, head_size, eps: f32::of(GN_EPS) }, groups))
}
