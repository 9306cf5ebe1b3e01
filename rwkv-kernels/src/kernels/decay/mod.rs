//! Bindings and lowering of `decay.wgsl`. The operation is defined in [`rwkv_core::ops::decay`].
//!
//! It works in place: the adapter's output `wl` becomes `lw`.

use rwkv_core::Real as _;
use rwkv_core::ops::decay::DECAY_SCALE;

use super::extents::grid;
pub use super::extents::{Dims, Error};
pub use crate::reflected::decay::{Params, VARIANTS};

#[cfg(test)]
#[cfg(feature = "gpu")]
mod tests;

/// Lowers a call over `wl` `[T, D]` to the uniform block and the workgroup count.
///
/// # Errors
///
/// If the kernel cannot run the call, whatever the device: see [`Error`].
pub fn lower(dims: Dims) -> Result<(Params, [u32; 3]), Error> {
    let (_, len) = dims.vectors(&VARIANTS[0])?;
    Ok((Params { len, scale: f32::of(DECAY_SCALE) }, grid(&VARIANTS[0], len)))
}
