//! Bindings and lowering of `activation.wgsl`. The operation is defined in [`rwkv_core::ops::activation`].

use rwkv_core::ops::activation::Activation;

use super::MAX_GROUPS;
pub use crate::reflected::activation::{Params, VARIANTS};

#[cfg(test)]
#[cfg(feature = "gpu")]
pub(super) mod tests;

/// Why a call cannot be encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There are more values than a `u32` can index.
    #[error("activation: {got} values are beyond 32-bit indices")]
    Len {
        /// The values asked for.
        got: usize,
    },
}

/// Lowers one call, over `len` values, to the uniform block and the workgroup count.
///
/// # Errors
///
/// If the kernel cannot run the call, whatever the device: see [`Error`].
pub fn lower(len: usize, activation: Activation) -> Result<(Params, [u32; 3]), Error> {
    let [lanes, ..] = VARIANTS[0].workgroup_size;
    // An invocation steps over the end by as much as there are invocations, and must not wrap to the start.
    let last = u32::MAX - MAX_GROUPS * lanes;
    let len = u32::try_from(len).ok().filter(|&len| len <= last).ok_or(Error::Len { got: len })?;
    Ok((Params { len, activation: activation as u32 }, [len.div_ceil(lanes).min(MAX_GROUPS), 1, 1]))
}
