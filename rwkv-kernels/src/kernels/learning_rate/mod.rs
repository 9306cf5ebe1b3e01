//! Bindings and lowering of `learning_rate.wgsl`. The operation is defined in [`rwkv_core::ops::learning_rate`].
//!
//! One dispatch does all that the twin's three functions do, in place: the key `k0` becomes `k`, the adapter's output
//! `al` the removal direction `a`, and kappa the replacement direction `b`. eta itself is not kept.

use super::extents::grid;
pub use super::extents::{Dims, Error};
pub use crate::reflected::learning_rate::{Params, VARIANTS};

#[cfg(test)]
#[cfg(feature = "gpu")]
mod tests;

/// Lowers a call over `k`, `a` and `b`, each `[T, D]`, to the uniform block and the workgroup count.
///
/// # Errors
///
/// If the kernel cannot run the call, whatever the device: see [`Error`].
pub fn lower(dims: Dims) -> Result<(Params, [u32; 3]), Error> {
    let (width, len) = dims.vectors(&VARIANTS[0])?;
    Ok((Params { len, width }, grid(&VARIANTS[0], len)))
}
