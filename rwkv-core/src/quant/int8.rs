//! Blocks of bytes.
//!
//! ```text
//! s    = max |w| / 127, rounded up to a half
//! q[i] = round(w[i] / s), of two as near the even one, in [-127, 127]; all 0 where s is 0
//! w'   = s q
//! ```
//!
//! Because `s` is rounded up, `127 s` reaches the largest weight. A weight is off by half a step at most, and by what the
//! quotient is rounded: `|w' - w| <= (1/2 + 2^-16) s`, where `s <= max |w| / 127 * (1 + 2^-10) + 2^-24`. A byte is a `q`.

use half::f16;

use super::{BLOCK, half_above, largest, nearest};

/// Steps from zero to the largest weight of a block.
const STEPS: f32 = 127.0;

/// Encodes a block of finite weights and returns its scale, which is infinite where a half does not hold it.
#[inline(always)]
pub(super) fn encode(block: &[f32; BLOCK], units: &mut [u8]) -> f16 {
    let scale = half_above(largest(block) / STEPS);
    let s = if scale == f16::ZERO { 1.0 } else { scale.to_f32() }; // of zeros
    for (unit, w) in units.iter_mut().zip(block) {
        *unit = nearest((w / s).clamp(-STEPS, STEPS));
    }
    scale
}

/// The `i`th weight of a block, in steps.
pub(super) fn unit(units: &[u8], i: usize) -> i8 {
    units[i].cast_signed()
}
