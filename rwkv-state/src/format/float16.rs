//! Rows of halves, each with a power-of-two [exponent](super::exponent).
//!
//! ```text
//! stored[j] = round(x[j] * 2^-e)        11 significant bits, or a multiple of 2^-24
//! x'[j]     = stored[j] * 2^e
//! ```

use half::f16;
use half::slice::HalfFloatSliceExt;
use rwkv_core::fast::vectorised;

use super::Fault;
use super::exponent::{NotFinite, RANGE, binade, fresh, largest, lower, power_of_two, raise, renewed};
use super::rounding::Rounding;

/// Elements that are converted at a time.
const AT_ONCE: usize = 64;

/// Encodes a row and returns its exponent: chosen fresh, or kept from the `previous` time that this row was stored
/// while it [fits](renewed). `first` is the index of the row's first element in its state, of which
/// [`Rounding::Stochastic`] and [`Rounding::Dither`] are functions.
///
/// # Errors
///
/// If a value is not finite.
///
/// # Panics
///
/// If the slices differ in length.
pub fn encode(
    row: &[f32],
    previous: Option<i8>,
    rounding: Rounding,
    first: u64,
    stored: &mut [f16],
) -> Result<i8, NotFinite> {
    assert_eq!(row.len(), stored.len(), "lengths of the row and its halves");
    let largest = vectorised(
        #[inline(always)]
        || largest(row),
    )?;
    let exponent = previous.map_or_else(|| fresh(largest), |e| renewed(e, largest));
    if rounding == Rounding::Nearest {
        // As conversion rounds, which many processors have.
        let mut scaled = [0.0; AT_ONCE];
        for (row, stored) in row.chunks(AT_ONCE).zip(stored.chunks_mut(AT_ONCE)) {
            let scaled = &mut scaled[..row.len()];
            scaled.iter_mut().zip(row).for_each(|(y, &x)| *y = lower(x, exponent));
            stored.convert_from_f32_slice(scaled);
        }
        return Ok(exponent);
    }
    for (j, (&x, stored)) in row.iter().zip(stored).enumerate() {
        let y = lower(x, exponent);
        // The spacing of halves around y; dividing by it and multiplying with it are exact.
        let unit = power_of_two(binade(y).max(-14) - 10);
        let magnitude = rounding.round(y.abs() / unit, first.wrapping_add(j as u64)) * unit;
        *stored = f16::from_f32(magnitude.copysign(y));
    }
    Ok(exponent)
}

/// Decodes a row.
///
/// # Panics
///
/// If the slices differ in length.
pub fn decode(stored: &[f16], exponent: i8, row: &mut [f32]) {
    assert_eq!(row.len(), stored.len(), "lengths of the row and its halves");
    stored.convert_to_f32_slice(row);
    vectorised(
        #[inline(always)]
        || row.iter_mut().for_each(|x| *x = raise(*x, exponent)),
    );
}

/// Bounds the error of an element `x` of a row with this exponent:
///
/// ```text
/// |x' - x| <= u * max(2^-10 |x|, 2^(e - 24))        u = 1/2 to nearest, 1 otherwise
/// ```
///
/// Halves in `[2^k, 2^(k + 1))` are `2^(k - 10)` apart, at most `2^-10` of their magnitude, and below `2^-14` (the
/// subnormal ones) `2^-24`. A fresh exponent has `2^e <= 2^-6 largest`, which makes the second term at most `2^-30` of
/// the row's largest magnitude; a kept one has `2^e <= 4 largest`, so at most `2^-22` of it. (Where the exponent is at
/// its lower end, every `f32` that the second term is for is stored exactly.)
#[must_use]
pub fn error_bound(value: f32, exponent: i8, rounding: Rounding) -> f64 {
    rounding.units() * (2f64.powi(-10) * f64::from(value).abs()).max(2f64.powi(i32::from(exponent) - 24))
}

/// Whether a row decodes to finite values: its exponent in range, its halves finite. Else where, and what is wrong.
pub(super) fn check(stored: &[f16], exponent: i8) -> Result<(), (usize, Fault)> {
    if !RANGE.contains(&exponent) {
        return Err((0, Fault::Exponent { exponent }));
    }
    let bad = stored.iter().position(|v| !v.is_finite());
    bad.map_or(Ok(()), |j| Err((j, Fault::NotFinite { value: stored[j].to_f32() })))
}

#[cfg(test)]
mod tests {
    use half::f16;
    use proptest::prelude::*;

    use super::super::draw;
    use super::super::exponent::{binade, fresh, largest, lower, power_of_two, raise};
    use super::{Rounding, decode, encode, error_bound};

    fn round_trip(row: &[f32], previous: Option<i8>, rounding: Rounding) -> (i8, Vec<f32>) {
        let (mut stored, mut back) = (vec![f16::NAN; row.len()], vec![f32::NAN; row.len()]);
        let exponent = encode(row, previous, rounding, 0, &mut stored).unwrap();
        decode(&stored, exponent, &mut back);
        (exponent, back)
    }

    proptest! {
        #[test]
        fn within_the_bound(row in draw::row(0..80), previous: Option<i8>, seed: u64, step: u32) {
            let most = f64::from(largest(&row).unwrap());
            for rounding in [Rounding::Nearest, Rounding::Stochastic { seed }, Rounding::Dither { step }] {
                let (e, back) = round_trip(&row, previous, rounding);
                let share = if previous.is_some_and(|p| p == e) { -22 } else { -30 };
                for (&x, &got) in row.iter().zip(&back) {
                    let error = (f64::from(got) - f64::from(x)).abs();
                    let bound = error_bound(x, e, rounding);
                    prop_assert!(got.is_finite() && error <= bound, "{:?}: {} to {}", rounding, x, got);
                    // The same relative to the row alone, as documented.
                    let relative = f64::from(x.abs()) * 2f64.powi(-10);
                    let bound = rounding.units() * relative.max(most * 2f64.powi(share));
                    prop_assert!(error <= bound, "{:?}: {} to {} of {}", rounding, x, got, most);
                    prop_assert!(x != 0.0 || got == 0.0, "{:?}: zero stays zero, not {}", rounding, got);
                }
            }
        }

        /// To nearest is what IEEE 754 says it is, wherever no scaling is needed.
        #[test]
        fn nearest_is_nearest_even(x in -128f32..128.0) {
            let (e, back) = round_trip(&[x, 100.0], None, Rounding::Nearest);
            prop_assert_eq!(e, 0, "no scaling");
            prop_assert_eq!(back[0], f16::from_f32(x).to_f32(), "{}", x);
        }

        /// What conversion does is what the formula says.
        #[test]
        fn conversion_is_the_formula(row in draw::row(0..150), previous: Option<i8>) {
            let mut stored = vec![f16::NAN; row.len()];
            let exponent = encode(&row, previous, Rounding::Nearest, 0, &mut stored).unwrap();
            for (x, got) in row.iter().zip(stored) {
                let y = lower(*x, exponent);
                let unit = power_of_two(binade(y).max(-14) - 10);
                let want = f16::from_f32(((y.abs() / unit).round_ties_even() * unit).copysign(y));
                prop_assert_eq!(got.to_bits(), want.to_bits(), "{} under {}", x, exponent);
                let mut back = [f32::NAN];
                decode(&[got], exponent, &mut back);
                prop_assert_eq!(back[0].to_bits(), raise(got.to_f32(), exponent).to_bits(), "{} back", x);
            }
        }

        /// Stored again, to nearest, nothing moves: halves are exactly representable, whichever way they are rounded.
        #[test]
        fn twice_is_once(row in draw::row(1..40), seed: u64) {
            let (e, once) = round_trip(&row, None, Rounding::Nearest);
            prop_assert_eq!(&round_trip(&once, Some(e), Rounding::Nearest).1, &once, "to nearest");
            let drawn = round_trip(&once, Some(e), Rounding::Stochastic { seed }).1;
            for (x, got) in once.iter().zip(drawn) {
                // f32::MAX stands for 2^128, where decoding saturates; itself it is no half.
                prop_assert!(got == *x || x.abs() == f32::MAX, "{} to {}", x, got);
            }
        }

        /// A row that grows and shrinks keeps its exponent until its largest magnitude leaves the window.
        #[test]
        fn hysteresis(base in 64f32..127.0, shift in -20i32..20) {
            let e = fresh(base);
            let (next, _) = round_trip(&[base * 2f32.powi(shift), 0.0], Some(e), Rounding::Nearest);
            prop_assert_eq!(next == e, shift == 0 || (-8..=7).contains(&shift), "shifted by {}", shift);
        }
    }

    #[test]
    fn elements_draw_by_their_index() {
        let row = [1.000_3f32; 64];
        let rounding = Rounding::Stochastic { seed: 7 };
        let mut whole = [f16::ZERO; 64];
        encode(&row, None, rounding, 1000, &mut whole).unwrap();
        let mut tail = [f16::ZERO; 32];
        encode(&row[32..], None, rounding, 1032, &mut tail).unwrap();
        assert_eq!(whole[32..], tail, "the same elements, wherever the slice begins");
        assert!(whole.iter().any(|&v| v != whole[0]), "neighbours differ");
    }

    #[test]
    fn what_is_not_finite_is_an_error() {
        let mut stored = [f16::ZERO; 2];
        let error = encode(&[0.0, f32::NAN], None, Rounding::Nearest, 0, &mut stored).unwrap_err();
        assert_eq!(error.index, 1, "where");
    }
}
