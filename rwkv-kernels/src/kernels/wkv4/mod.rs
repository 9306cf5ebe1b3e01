//! Bindings and lowering of `wkv4.wgsl`. The operation is defined in [`rwkv_core::ops::wkv4`].
//!
//! The state is one buffer `[3, C]`, the numerator, the denominator and the max of
//! [`State`](rwkv_core::ops::wkv4::State) one after the other. WGSL lets a device assume that there is no infinity:
//! before the first token the max is [`EMPTY`].

pub use super::extents::Error;
use super::extents::{elements, grid};
pub use crate::reflected::wkv4::{Params, VARIANTS};

#[cfg(test)]
#[cfg(feature = "gpu")]
mod tests;

/// The max before the first token: less than any key, and no decay moves it out of the range of `f32`.
pub const EMPTY: f32 = -1e38;

/// Extents of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Tokens, `T`.
    pub tokens: usize,
    /// Channels, `C`.
    pub channels: usize,
}

/// Lowers one call to the uniform block and the workgroup count.
///
/// # Errors
///
/// If the kernel cannot run the call, whatever the device: see [`Error`].
pub fn lower(dims: Dims) -> Result<(Params, [u32; 3]), Error> {
    let Dims { tokens, channels } = dims;
    let of = |rows, width| elements(&VARIANTS[0], rows, width);
    // The state has three rows of all channels.
    of(tokens.max(3), channels)?;
    let params = Params { tokens: of(tokens, 1)?, channels: of(1, channels)? };
    Ok((params, grid(&VARIANTS[0], params.channels)))
}
