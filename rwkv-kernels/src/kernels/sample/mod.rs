//! Bindings and lowering of `sample.wgsl`. The operation is defined in [`rwkv_core::ops::sample`].
//!
//! A row gives the token that [`Sampler::sample_except`] gives, but where rounding decides: where two tokens come as
//! near to being drawn, or to being cut off, as the errors of a device's `exp` and division. It counts what it
//! chose, where it has a row of counts. Where there is no token to choose, it gives [`ALL_MASKED`] or [`NOT_FINITE`] and counts none.

use rwkv_core::ops::sample::{Error as SamplerError, Sampler};

use super::MAX_GROUPS;
pub use crate::reflected::sample::{Params, VARIANTS};

#[cfg(test)]
#[cfg(feature = "gpu")]
mod tests;

/// What a row gives all of whose tokens are masked, by name or by a logit of negative infinity.
pub const ALL_MASKED: u32 = 0xFFFF_FFFF;

/// What a row gives that has a logit, not masked by name, which is NaN or positive infinity before the penalties or
/// after them.
pub const NOT_FINITE: u32 = 0xFFFF_FFFE;

/// A vocabulary is smaller: so many weights of at most `2^40` units add up in 64 bits.
const MAX_VOCAB: u32 = 1 << 24;

/// What the word for a row of counts says of a row that has none.
const UNCOUNTED: u32 = 0xFFFF_FFFF;

/// One row of `samplers`: a [`Sampler`], the position it is to sample at, and where it counts.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct SamplerRow {
    /// [`Sampler::temperature`]; where it is not 0, from `2^-126` to `2^126`, the divisors that WGSL knows.
    pub temperature: f32,
    /// [`Sampler::top_k`].
    pub top_k: u32,
    /// [`Sampler::top_p`].
    pub top_p: f32,
    /// [`Sampler::presence_penalty`].
    pub presence_penalty: f32,
    /// [`Sampler::frequency_penalty`].
    pub frequency_penalty: f32,
    /// [`Sampler::seed`], the low word first.
    pub seed: [u32; 2],
    /// The position in the sequence, the low word first.
    pub position: [u32; 2],
    /// Its row of `counts`, below [`Dims::counts`] and no other row's; or `0xFFFF_FFFF` for none.
    pub counts: u32,
}

impl SamplerRow {
    /// Of `sampler` at `position`, with a row of `counts`; without one no token counts as generated, now or later. A
    /// temperature beyond the divisors that WGSL knows is taken to the nearest.
    ///
    /// # Errors
    ///
    /// If a setting is out of its range.
    pub fn new(sampler: &Sampler, position: u64, counts: Option<u32>) -> Result<Self, SamplerError> {
        sampler.validate()?;
        let greedy = sampler.temperature == 0.0;
        let divisor = sampler.temperature.clamp(f32::MIN_POSITIVE, f32::MIN_POSITIVE.recip());
        Ok(Self {
            temperature: if greedy { 0.0 } else { divisor },
            top_k: sampler.top_k,
            top_p: sampler.top_p,
            presence_penalty: sampler.presence_penalty,
            frequency_penalty: sampler.frequency_penalty,
            seed: words(sampler.seed),
            position: words(position),
            counts: counts.unwrap_or(UNCOUNTED),
        })
    }
}

#[expect(clippy::cast_possible_truncation, reason = "one half at a time")]
const fn words(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}

/// `mask`, `[V / 32, rounded up]`: bit `t % 32` of word `t / 32` is 1 where token `t` is `masked`. Tokens outside of
/// the vocabulary play no part.
#[must_use]
pub fn mask(masked: &[u32], vocab: usize) -> Vec<u32> {
    let mut words = vec![0; vocab.div_ceil(32)];
    for token in masked {
        if let Some(word) = words.get_mut(*token as usize / 32) {
            *word |= 1 << (token % 32);
        }
    }
    words
}

/// Extents of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Rows.
    pub rows: usize,
    /// Logits of a row, `V`.
    pub vocab: usize,
    /// Rows of counts.
    pub counts: usize,
}

/// Why a call cannot be encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Of no tokens none can be chosen.
    #[error("sample: rows of no logits")]
    Empty,
    /// One dispatch holds one workgroup per row, and not so many workgroups.
    #[error("sample: {got} rows are more than {max}")]
    Rows {
        /// The rows asked for.
        got: usize,
        /// The most that one dispatch can hold.
        max: u32,
    },
    /// The weights of so many tokens may not add up in 64 bits, or `[rows, V]` is longer than a `u32` can index.
    #[error("sample: {rows} rows of {vocab} logits are beyond 2^24 - 1 a row or 32-bit indices")]
    Vocab {
        /// The rows asked for, of logits or of counts.
        rows: usize,
        /// The logits asked for.
        vocab: usize,
    },
}

/// Lowers one call to the uniform block and the workgroup count.
///
/// # Errors
///
/// If the kernel cannot run the call, whatever the device: see [`Error`].
pub fn lower(dims: Dims) -> Result<(Params, [u32; 3]), Error> {
    let rows = super::groups(dims.rows).ok_or(Error::Rows { got: dims.rows, max: MAX_GROUPS })?;
    if dims.vocab == 0 {
        return Err(Error::Empty);
    }
    let most = dims.rows.max(dims.counts);
    let indexed = |vocab: u32| u32::try_from(most).ok().and_then(|rows| rows.checked_mul(vocab)).is_some();
    let vocab = u32::try_from(dims.vocab)
        .ok()
        .filter(|&vocab| vocab < MAX_VOCAB && indexed(vocab))
        .ok_or(Error::Vocab { rows: most, vocab: dims.vocab })?;
    Ok((Params { vocab }, [rows, 1, 1]))
}
