//! Values as halves of what a power of two divides: what tensor cores multiply.

use half::f16;

/// `x / 2^exponent`, rounded to the nearest half, to the even one of two. What is beyond the largest half, 65504, counts as
/// that, so that a sum over halves never overflows where its terms do not; what is no number, or infinite, stays so.
///
/// As far as `|x| <= 65504 * 2^exponent` what a half times `2^exponent` says is off by `2^-11 |x| + 2^(exponent - 25)` at
/// most: half a unit of eleven bits, or of the least half there is.
#[must_use]
pub fn to_half(x: f32, exponent: u8) -> f16 {
    let scaled = x * 0.5f32.powi(exponent.into());
    let largest = f16::MAX.to_f32();
    f16::from_f32(if x.is_finite() { scaled.clamp(-largest, largest) } else { x })
}

/// Each of some values as [`to_half`] has it.
#[must_use]
pub fn to_halves(x: &[f32], exponent: u8) -> Vec<f16> {
    x.iter().map(|&x| to_half(x, exponent)).collect()
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::{to_half, to_halves};

    #[test]
    fn what_halves_hold_is_exact() {
        for exponent in [0u8, 4, 8] {
            for bits in (0..=u16::MAX).map(f16::from_bits).filter(|half| half.is_finite()) {
                let x = bits.to_f32() * f32::from(exponent).exp2();
                assert_eq!(to_half(x, exponent).to_bits(), bits.to_bits(), "{x} / 2^{exponent}");
            }
        }
    }

    #[test]
    fn the_rest_is_nearest() {
        let bits = |x: &[f32]| to_halves(x, 0).into_iter().map(f16::to_bits).collect::<Vec<_>>();
        let u = 2f32.powi(-11);
        assert_eq!(bits(&[1.0 + u, 1.0 + 3.0 * u, 1.0 + 1.1 * u]), [0x3C00, 0x3C02, 0x3C01], "ties");
        assert_eq!(bits(&[2f32.powi(-25), 1.1 * 2f32.powi(-25)]), [0, 1], "the least");
    }

    #[test]
    fn the_largest_stands_for_what_is_beyond() {
        assert_eq!(
            to_halves(&[65520.0, -1e30, 65504.0 * 16.0], 0),
            [f16::MAX, -f16::MAX, f16::MAX],
            "beyond"
        );
        assert_eq!(to_half(65504.0 * 16.0, 4), f16::MAX, "at the end");
        assert_eq!(to_half(f32::NEG_INFINITY, 8), f16::NEG_INFINITY, "infinite");
        assert!(to_half(f32::NAN, 8).is_nan(), "no number");
    }
}
