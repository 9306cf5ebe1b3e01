//! One kernel per folder: `<name>.wgsl` and its variants, `mod.rs` (bindings and lowering),
//! `tests.rs` (against the twin).

pub mod channel_mix_value;
pub mod layer_norm;
pub mod linear;
pub mod mix_in;
pub mod time_mix;
pub mod wkv7;

/// Workgroups of one dispatch along one dimension, at most: the default limit of WebGPU.
const MAX_GROUPS: u32 = 65_535;
