//! [`time_mix`](super::time_mix) of many sequences side by side, the adapters' products given: the same operation and operands,
//! with records whose strides and heads are multiples of four words.

pub use super::time_mix::{Dims, Error};
pub use crate::reflected::time_mix_batch::{Params, VARIANTS};

#[cfg(test)]
#[cfg(feature = "gpu")]
mod tests;

/// The parameters and workgroups of a call.
///
/// # Errors
///
/// If the extents are not what the kernel can do.
pub fn lower(dims: Dims) -> Result<(Params, [u32; 3]), Error> {
    if !dims.stride.is_multiple_of(4) || !dims.offset.is_multiple_of(4) {
        return Err(Error::Vectors { stride: dims.stride, offset: dims.offset });
    }
    let (params, groups) = super::time_mix::lower(dims, None)?;
    // They are declared alike.
    Ok((bytemuck::cast(params), groups))
}
