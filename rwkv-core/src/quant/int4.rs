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
use pulp::Arch;

use super::{BLOCK, half_above, largest};

/// Of the largest magnitude over 8, as scales that are tried: what is beyond is cut, and the rest is off by less.
const SHARES: [f32; 8] = [1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72];

/// Encodes a block of finite weights and returns its scale, which is infinite where a half does not hold it.
pub(super) fn encode(block: &[f32], units: &mut [u8]) -> f16 {
    let largest = largest(block);
    let mut best = half_above(largest / 7.0);
    if !best.is_finite() || best == f16::ZERO {
        return best;
    }
    let mut weights = [0.0; BLOCK];
    weights[..block.len()].copy_from_slice(block);
    let q = Arch::new().dispatch(
        #[inline(always)]
        || {
            let (mut least, mut q) = quantised(&weights, best.to_f32());
            for share in SHARES {
                let scale = f16::from_f32(largest / 8.0 * share);
                for scale in [scale, -scale] {
                    let (error, of) = quantised(&weights, scale.to_f32());
                    if error < least {
                        (least, best, q) = (error, scale, of);
                    }
                }
            }
            q
        },
    );
    for (units, q) in units.as_chunks_mut::<4>().0.iter_mut().zip(q.as_chunks::<8>().0) {
        for (i, unit) in units.iter_mut().enumerate() {
            #[expect(clippy::cast_possible_truncation, reason = "within [-8, 7]")]
            let half = |q: f32| (q as i8).cast_unsigned() & 15;
            *unit = half(q[i]) | half(q[i + 4]) << 4;
        }
    }
    best
}

/// A block in steps of a scale, and the square error in it. The errors are summed in lanes, and so in one order on every machine.
#[inline(always)]
fn quantised(weights: &[f32; BLOCK], scale: f32) -> (f32, [f32; BLOCK]) {
    let (mut errors, mut q) = ([0.0f32; BLOCK / 2], [0.0f32; BLOCK]);
    if scale == 0.0 {
        return (f32::INFINITY, q);
    }
    for (weights, q) in
        weights.as_chunks::<{ BLOCK / 2 }>().0.iter().zip(q.as_chunks_mut::<{ BLOCK / 2 }>().0)
    {
        for i in 0..BLOCK / 2 {
            q[i] = (weights[i] / scale).round_ties_even().clamp(-8.0, 7.0);
            let off = scale * q[i] - weights[i];
            errors[i] += off * off;
        }
    }
    (errors.iter().sum(), q)
}

/// The `i`th weight of a block, in steps.
pub(super) fn unit(units: &[u8], i: usize) -> i8 {
    let both = units[i / 8 * 4 + i % 4];
    if i % 8 < 4 { (both << 4).cast_signed() >> 4 } else { both.cast_signed() >> 4 }
}
