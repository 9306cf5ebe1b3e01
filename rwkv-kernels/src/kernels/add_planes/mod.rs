//! Bindings and lowering of `add_planes.wgsl`. The operation is defined in [`rwkv_core::ops::add_planes`].

pub use super::extents::{Dims, Error};
use super::extents::{elements, groups};
pub use crate::reflected::add_planes::{Params, VARIANTS};

#[cfg(test)]
#[cfg(feature = "gpu")]
mod tests;

/// Lowers the addition of so many planes to rows `[T, D]` to the uniform block and the workgroups: of a row, and rows.
///
/// # Errors
///
/// If the kernel cannot run the call, whatever the device: see [`Error`].
pub fn lower(dims: Dims, planes: usize) -> Result<(Params, [u32; 3]), Error> {
    let kernel = &VARIANTS[0];
    let (width, _) = dims.vectors(kernel)?;
    elements(kernel, dims.rows.saturating_mul(planes), dims.width)?;
    let planes = elements(kernel, 1, planes)?;
    let of_row = width.div_ceil(kernel.workgroup_size[0]) as usize;
    Ok((Params { width, planes }, groups(kernel, [of_row, dims.rows])?))
}
