//! Bindings and lowering of `add.wgsl`. The operation is defined in [`rwkv_core::ops::add`].

use super::extents::grid;
pub use super::extents::{Dims, Error};
pub use crate::reflected::add::{Params, VARIANTS};

#[cfg(test)]
#[cfg(feature = "gpu")]
mod tests;

/// Lowers the addition of an `x` of `dims.width` elements to `dims.rows` times as many of `y`: for a bias `[D]`, `D`
/// and `T`; for rows `[T, D]`, `T D` and 1.
///
/// # Errors
///
/// If the kernel cannot run the call, whatever the device: see [`Error`].
pub fn lower(dims: Dims) -> Result<(Params, [u32; 3]), Error> {
    let (period, len) = dims.vectors(&VARIANTS[0])?;
    Ok((Params { len, period }, grid(&VARIANTS[0], len)))
}
