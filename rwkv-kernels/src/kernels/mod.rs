//! One kernel per folder: `<name>.wgsl` and its variants, `mod.rs` (bindings and lowering),
//! `tests.rs` (against the twin). What several share is beside the folders.

pub mod activation;
pub mod add;
pub mod add_planes;
pub mod carry;
pub mod channel_mix_value;
pub mod decay;
pub mod embedding;
pub mod extents;
pub mod kappa;
pub mod layer_norm;
pub mod learning_rate;
pub mod linear;
pub mod matmul;
pub mod mix_in;
pub mod mix_rows;
pub mod own_columns;
pub mod packed;
pub mod readout;
pub mod readout_packed;
pub mod sample;
pub mod softmax;
pub mod time_mix;
pub mod time_mix_batch;
pub mod time_mix_operands;
pub mod time_mix_resident;
pub mod to_halves;
pub mod token_shift;
pub mod value_residual;
pub mod weights;
pub mod wkv4;
pub mod wkv7;
pub mod wkv7_chunked;
pub mod wkv7_chunked_factors;
pub mod wkv7_fours;
pub mod wkv7_scan;

#[cfg(test)]
#[cfg(feature = "gpu")]
mod heads;
#[cfg(test)]
#[cfg(feature = "gpu")]
mod intervals;
#[cfg(test)]
#[cfg(feature = "gpu")]
mod testing;

/// Workgroups of one dispatch along one dimension, at most: the default limit of WebGPU.
const MAX_GROUPS: u32 = 65_535;

/// `n` workgroups, if one dispatch holds so many along a dimension.
fn groups(n: usize) -> Option<u32> {
    u32::try_from(n).ok().filter(|&n| n <= MAX_GROUPS)
}

/// `width`, if a kernel can index `rows` rows of so many elements: a workgroup steps over the end of a row by less than
/// its own size, 1024 invocations at most, and must not wrap to the start of the buffer.
fn indexable(rows: usize, width: usize) -> Option<u32> {
    let end = rows.checked_mul(width).and_then(|end| u32::try_from(end).ok());
    end.filter(|&end| end <= u32::MAX - 1023).and(u32::try_from(width).ok())
}
