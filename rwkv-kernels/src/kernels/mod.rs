//! One kernel per folder: `<name>.wgsl` and its variants, `mod.rs` (bindings and lowering),
//! `tests.rs` (against the twin). What several share is beside the folders.

pub mod add;
pub mod channel_mix_value;
pub mod decay;
pub mod extents;
pub mod kappa;
pub mod layer_norm;
pub mod learning_rate;
pub mod linear;
pub mod mix_in;
pub mod readout;
#[cfg(test)]
#[cfg(feature = "gpu")]
mod testing;
pub mod time_mix;
pub mod token_shift;
pub mod value_residual;
pub mod wkv4;
pub mod wkv7;

/// Workgroups of one dispatch along one dimension, at most: the default limit of WebGPU.
const MAX_GROUPS: u32 = 65_535;
