//! One power-of-two exponent `e` per row, so that no finite `f32` overflows a narrower format.
//!
//! ```text
//! stored = x * 2^-e        2^6 <= largest |stored| < 2^7 when e is chosen fresh
//! ```
//!
//! A power of two moves no mantissa bit: on its own the exponent neither adds nor removes a rounding error.

use std::ops::RangeInclusive;

/// Exponents in use. The upper end serves [`f32::MAX`]. At the lower end `2^-e` and `2^e` are still normal numbers,
/// and the smallest subnormal `f32`, `2^-149`, becomes `2^-23`, which a half holds: nothing underflows there.
pub const RANGE: RangeInclusive<i8> = -126..=121;

/// Where a row's largest magnitude, once scaled, may wander before its exponent is chosen anew.
pub const WINDOW: RangeInclusive<f32> = 0.25..=16384.0;

/// The binade to which a fresh exponent brings a row's largest magnitude: the middle of [`WINDOW`].
const TARGET: i32 = 6;

/// A value that is infinite or no number.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("element {index} is {value}")]
pub struct NotFinite {
    /// Where in the row.
    pub index: usize,
    /// The value.
    pub value: f32,
}

/// A row's largest magnitude.
///
/// # Errors
///
/// If a value is not finite.
#[inline(always)]
pub fn largest(row: &[f32]) -> Result<f32, NotFinite> {
    let largest = f32::from_bits(row.iter().fold(0, |largest, &value| magnitude(value).max(largest)));
    if largest.is_finite() {
        return Ok(largest);
    }
    let index = row.iter().position(|value| !value.is_finite()).unwrap_or(0);
    Err(NotFinite { index, value: row[index] })
}

/// The bits of `|x|`, whose order is that of the magnitudes: what is not finite comes last.
#[inline(always)]
pub(super) const fn magnitude(x: f32) -> u32 {
    x.abs().to_bits()
}

/// The exponent of a row whose largest magnitude is `largest`; 0 for a row of zeros.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "clamped to RANGE")]
pub fn fresh(largest: f32) -> i8 {
    let (low, high) = (i32::from(*RANGE.start()), i32::from(*RANGE.end()));
    if largest == 0.0 { 0 } else { (binade(largest) - TARGET).clamp(low, high) as i8 }
}

/// `previous` while it keeps `largest` in [`WINDOW`], else a [`fresh`] exponent: a row that is stored again and again
/// is rescaled only when it must be.
#[must_use]
pub fn renewed(previous: i8, largest: f32) -> i8 {
    let fits = RANGE.contains(&previous) && WINDOW.contains(&(largest * power_of_two(-i32::from(previous))));
    if fits { previous } else { fresh(largest) }
}

/// `x * 2^e`. Saturates, because rounding up near [`f32::MAX`] may reach `2^128`.
#[inline(always)]
pub(super) fn raise(x: f32, e: i8) -> f32 {
    (x * power_of_two(i32::from(e))).clamp(f32::MIN, f32::MAX)
}

/// `x * 2^-e`: exact, but where the result is below `2^-126`.
#[inline(always)]
pub(super) fn lower(x: f32, e: i8) -> f32 {
    x * power_of_two(-i32::from(e))
}

/// `2^e`, for `e` in -126..=127.
#[inline(always)]
pub(super) const fn power_of_two(e: i32) -> f32 {
    f32::from_bits((e + 127).cast_unsigned() << 23)
}

/// `floor(log2 |x|)`; -127 for subnormal numbers and zero.
pub(super) const fn binade(x: f32) -> i32 {
    (x.to_bits() >> 23 & 0xff).cast_signed() - 127
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{RANGE, WINDOW, fresh, largest, lower, raise, renewed};

    proptest! {
        /// Scaling there and back is exact, and the largest magnitude lands where it should.
        #[test]
        fn fresh_brings_any_magnitude_home(bits in 1u32..0x7f80_0000) {
            let x = f32::from_bits(bits);
            let e = fresh(x);
            prop_assert!(RANGE.contains(&e), "{}", e);
            let scaled = lower(x, e);
            prop_assert!(scaled < 128.0 && (scaled >= 64.0 || e == *RANGE.start()), "{} to {}", x, scaled);
            prop_assert_eq!(raise(scaled, e), x, "a power of two loses nothing");
        }

        /// Kept exactly while the window holds it, whatever exponent came before.
        #[test]
        fn renewed_only_outside_the_window(bits in 0u32..0x7f80_0000, previous: i8) {
            let x = f32::from_bits(bits);
            let e = renewed(previous, x);
            let scaled = f64::from(x) * f64::from(-i32::from(previous)).exp2();
            let inside = RANGE.contains(&previous)
                && (f64::from(*WINDOW.start())..=f64::from(*WINDOW.end())).contains(&scaled);
            prop_assert_eq!(e, if inside { previous } else { fresh(x) }, "{} under {}", x, previous);
        }
    }

    #[test]
    fn the_ends() {
        assert_eq!(fresh(0.0), 0, "nothing to scale");
        assert_eq!(fresh(f32::MAX), 121, "the largest");
        assert_eq!(fresh(f32::from_bits(1)), -126, "the smallest");
        assert_eq!(fresh(100.0), 0, "a common magnitude");
        assert_eq!(raise(128.0, 121), f32::MAX, "2^128 saturates");
        let error = largest(&[1.0, -3.0, f32::NEG_INFINITY]).unwrap_err();
        assert_eq!(error.to_string(), "element 2 is -inf", "facts");
        assert_eq!(largest(&[1.0, -3.0, 2.0]), Ok(3.0), "magnitude");
    }
}
