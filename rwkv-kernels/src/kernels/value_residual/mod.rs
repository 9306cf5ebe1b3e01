//! Bindings and lowering of `value_residual.wgsl`. The operation is defined in [`rwkv_core::ops::value_residual`].
//!
//! It works in place, on `v`.

use super::extents::grid;
pub use super::extents::{Dims, Error};
pub use crate::reflected::value_residual::{Params, VARIANTS};

#[cfg(test)]
#[cfg(feature = "gpu")]
mod tests;

/// Lowers a call over `v_first`, `vl` and `v`, each `[T, D]`, to the uniform block and the workgroup count.
///
/// # Errors
///
/// If the kernel cannot run the call, whatever the device: see [`Error`].
pub fn lower(dims: Dims) -> Result<(Params, [u32; 3]), Error> {
    let (_, len) = dims.vectors(&VARIANTS[0])?;
    Ok((Params { len }, grid(&VARIANTS[0], len)))
}
