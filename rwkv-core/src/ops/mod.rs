//! One operation per file: the formula, then plain loops.
//!
//! Shapes are written slowest first: `[T, H, N]` is `T` tokens of `H` heads of `N` channels. `D = H * N`.
//! Slices that disagree with the stated extents are the caller's bug and panic.

pub mod activation;
pub mod add;
pub mod add_planes;
pub mod carry;
pub mod channel_mix;
pub mod channel_mix_value;
pub mod decay;
pub mod embedding;
pub mod head;
pub mod kappa;
pub mod layer_norm;
pub mod learning_rate;
pub mod linear;
pub mod lora;
pub mod matmul;
pub mod mix_in;
pub mod mix_rows;
pub mod readout;
pub mod sample;
pub mod softmax;
pub mod time_mix;
pub mod time_mix_resident;
pub mod to_halves;
pub mod token_shift;
pub mod value_residual;
pub mod wkv4;
pub mod wkv7;
pub mod wkv7_chunked;
pub mod wkv7_lazy;
