//! Bindings and lowering of `to_halves.wgsl`. The operation is defined in [`rwkv_core::ops::to_halves`], and how rows of halves
//! lie in [`packed`](super::packed).

use rwkv_core::ops::matmul::Rows;

pub use super::extents::{Dims, Error};
use super::extents::{fits, grid};
pub use crate::reflected::to_halves::{Params, VARIANTS};

#[cfg(test)]
#[cfg(feature = "gpu")]
mod tests;

/// Lowers one call over rows `[T, D]`, which lie in `x` among others and which `2^exponent` divides, to the uniform block and
/// the workgroup count. Rows of `y` lie one after the other.
///
/// # Errors
///
/// If the kernel cannot run the call, whatever the device: see [`Error`].
pub fn lower(dims: Dims, x: Rows, exponent: u8) -> Result<(Params, [u32; 3]), Error> {
    let kernel = &VARIANTS[0];
    let (width, len) = dims.vectors(kernel)?;
    let place = |n| Dims { rows: 1, width: n }.vectors(kernel).map(|(n, _)| n);
    fits(kernel, dims.rows, [x.offset, dims.width, x.stride])?;
    let (offset, stride) = (place(x.offset)?, place(x.stride)?);
    let scale = 0.5f32.powi(exponent.into());
    Ok((Params { len, width, offset, stride, scale }, grid(kernel, len)))
}
