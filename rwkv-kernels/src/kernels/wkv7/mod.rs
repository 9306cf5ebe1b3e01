//! Bindings and lowering of `wkv7.wgsl`. The operation is defined in [`rwkv_core::ops::wkv7`].
//!
//! The kernel keeps the state as `[head, key, value]`, not in the reference's order `[head, value, key]`:
//! neighbouring invocations own neighbouring value rows, and so read neighbouring words.

use rwkv_core::ops::wkv7::Dims;

use super::MAX_GROUPS;
pub use crate::reflected::wkv7::{Params, VARIANTS};

#[cfg(test)]
#[cfg(feature = "gpu")]
mod tests;

/// Why a call cannot be encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The kernel is written for one head size.
    #[error("wkv7: head size {got} is not {want}")]
    HeadSize {
        /// The head size asked for.
        got: usize,
        /// The head size of the kernel.
        want: u32,
    },
    /// One dispatch holds one workgroup per head, and not so many workgroups.
    #[error("wkv7: {got} heads are more than {max}")]
    Heads {
        /// The heads asked for.
        got: usize,
        /// The most that one dispatch can hold.
        max: u32,
    },
    /// An operand `[tokens, heads, head_size]` is longer than a `u32` can index.
    #[error("wkv7: {tokens} tokens of {heads} heads are beyond 32-bit indices")]
    Tokens {
        /// The tokens asked for.
        tokens: usize,
        /// The heads asked for.
        heads: u32,
    },
}

/// Lowers the extents of one call to the uniform block and the workgroup count.
///
/// # Errors
///
/// If the kernel cannot run the call, whatever the device: see [`Error`].
pub fn lower(dims: Dims) -> Result<(Params, [u32; 3]), Error> {
    // One invocation per value row, in every variant.
    let [head_size, ..] = VARIANTS[0].workgroup_size;
    if u32::try_from(dims.head_size) != Ok(head_size) {
        return Err(Error::HeadSize { got: dims.head_size, want: head_size });
    }
    let heads = u32::try_from(dims.heads)
        .ok()
        .filter(|&heads| heads <= MAX_GROUPS)
        .ok_or(Error::Heads { got: dims.heads, max: MAX_GROUPS })?;
    let tokens = u32::try_from(dims.tokens)
        .ok()
        .filter(|tokens| tokens.checked_mul(heads * head_size).is_some())
        .ok_or(Error::Tokens { tokens: dims.tokens, heads })?;
    Ok((Params { heads, tokens }, [heads, 1, 1]))
}
