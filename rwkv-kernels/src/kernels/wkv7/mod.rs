//! Bindings and lowering of `wkv7.wgsl`. The operation is defined in [`rwkv_core::ops::wkv7`].
//!
//! The kernel keeps the state as `[head, key, value]`, not in the reference's order `[head, value, key]`:
//! neighbouring invocations own neighbouring value rows, and so read neighbouring words.
//!
//! The buffer `state` may hold many states: a call reads one and writes another, or the same: see [`Places`].

use rwkv_core::ops::wkv7::Dims;

use super::MAX_GROUPS;
pub use crate::reflected::wkv7::{Params, VARIANTS};

#[cfg(test)]
#[cfg(feature = "gpu")]
pub(super) mod tests;

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
    /// A state `[heads, head_size, head_size]` ends where a `u32` cannot index.
    #[error("wkv7: a state of {heads} heads at element {at} is beyond 32-bit indices")]
    State {
        /// Where it begins.
        at: usize,
        /// The heads asked for.
        heads: u32,
    },
    /// Heads run in any order, so that one could read what another has written.
    #[error("wkv7: the states of {heads} heads at elements {before} and {after} overlap")]
    Overlap {
        /// Where the one that is read begins.
        before: usize,
        /// Where the one that is written begins.
        after: usize,
        /// The heads asked for.
        heads: u32,
    },
}

/// Where the states of a call are in the buffer `state`, in elements. By default one at its start, changed in place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Places {
    /// The state before the tokens, `[H, key N, value N]`.
    pub before: usize,
    /// The state after them.
    pub after: usize,
}

/// Lowers the extents of one call to the uniform block and the workgroup count.
///
/// # Errors
///
/// If the kernel cannot run the call, whatever the device: see [`Error`].
pub fn lower(dims: Dims, places: Places) -> Result<(Params, [u32; 3]), Error> {
    // One invocation per value row, in every variant.
    let [head_size, ..] = VARIANTS[0].workgroup_size;
    if u32::try_from(dims.head_size) != Ok(head_size) {
        return Err(Error::HeadSize { got: dims.head_size, want: head_size });
    }
    let heads = super::groups(dims.heads).ok_or(Error::Heads { got: dims.heads, max: MAX_GROUPS })?;
    let tokens = u32::try_from(dims.tokens)
        .ok()
        .filter(|tokens| tokens.checked_mul(heads * head_size).is_some())
        .ok_or(Error::Tokens { tokens: dims.tokens, heads })?;
    let Places { before, after } = places;
    let len = dims.state_len();
    let place = |at: usize| {
        let end = at.checked_add(len).and_then(|end| u32::try_from(end).ok());
        end.and(u32::try_from(at).ok()).ok_or(Error::State { at, heads })
    };
    if before != after && before.abs_diff(after) < len {
        return Err(Error::Overlap { before, after, heads });
    }
    Ok((Params { heads, tokens, before: place(before)?, after: place(after)? }, [heads, 1, 1]))
}
