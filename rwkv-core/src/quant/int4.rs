//! Blocks of half bytes.
//!
//! ```text
//! q[i] = round(w[i] / s), cut to [-8, 7]; all 0 where s is 0
//! w'   = s q
//! ```
//!
//! The scale has a sign, so that either end of a block may have the eighth step. Of the scales that were tried, it is the one
//! of the least square error: the largest magnitude over 7, rounded up to a half, and for either sign, the shares of it that `SHARES` has
//! over 8. With the first of these nothing is cut and every weight is off by half a step at most, so that the root mean square
//! error of a block is at most `(1/2 + 2^-16) s`, where `s <= max |w| / 7 * (1 + 2^-10) + 2^-24`.
//!
//! Measured on the bundled model (its six big matrices, 131,072 bytes of held-out text), in as many bits: 0.7 % more bits per
//! byte than halves, where blocks of 64 with an offset of their own have 0.6 %, and normal quantiles 0.5 %. Those cost a sum
//! over what is multiplied, or a look-up for every weight.
//!
//! A byte holds two `q` in two's complement, eight consecutive ones in four bytes: the first four in the low halves of the
//! bytes, the others in the high halves.

use half::f16;

use super::{BLOCK, half_above, largest, nearest, rounded};

/// Of the largest magnitude over 8, as scales that are tried: what is beyond is cut, and the rest is off by less.
pub(super) const SHARES: [f32; 8] = [1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72];

/// Lanes of a sum of errors.
const LANES: usize = 16;

/// Encodes a block of finite weights and returns its scale, which is infinite where a half does not hold it.
#[inline(always)]
pub(super) fn encode(block: &[f32; BLOCK], units: &mut [u8]) -> f16 {
    let largest = largest(block);
    let mut best = half_above(largest / 7.0);
    if !best.is_finite() || best == f16::ZERO {
        units.fill(0);
        return best;
    }
    let mut least = square_error(block, best.to_f32());
    for share in SHARES {
        let scale = f16::from_f32(largest / 8.0 * share);
        for scale in [scale, -scale] {
            let error = square_error(block, scale.to_f32());
            if error < least {
                (least, best) = (error, scale);
            }
        }
    }
    let scale = best.to_f32();
    for (units, weights) in units.as_chunks_mut::<4>().0.iter_mut().zip(block.as_chunks::<8>().0) {
        for (i, unit) in units.iter_mut().enumerate() {
            let half = |w: f32| nearest(steps(w, scale)) & 15;
            *unit = half(weights[i]) | half(weights[i + 4]) << 4;
        }
    }
    best
}

/// A weight in steps of a scale that is not zero, cut but not rounded.
#[inline(always)]
fn steps(w: f32, scale: f32) -> f32 {
    (w / scale).clamp(-8.0, 7.0)
}

/// The square error of a block in steps of a scale; infinite for none. It is summed in lanes, and so in one order on every machine.
#[inline(always)]
fn square_error(block: &[f32; BLOCK], scale: f32) -> f32 {
    if scale == 0.0 {
        return f32::INFINITY;
    }
    let square = |w: f32| {
        let off = scale * rounded(steps(w, scale)) - w;
        off * off
    };
    let mut errors = [0.0f32; LANES];
    for weights in block.as_chunks::<LANES>().0 {
        for i in 0..LANES {
            errors[i] += square(weights[i]);
        }
    }
    let mut n = LANES / 2;
    while n > 0 {
        for i in 0..n {
            errors[i] += errors[i + n];
        }
        n /= 2;
    }
    errors[0]
}

/// The `i`th weight of a block, in steps.
pub(super) fn unit(units: &[u8], i: usize) -> i8 {
    let both = units[i / 8 * 4 + i % 4];
    if i % 8 < 4 { (both << 4).cast_signed() >> 4 } else { both.cast_signed() >> 4 }
}
