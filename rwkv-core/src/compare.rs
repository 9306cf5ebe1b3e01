//! How two float buffers are compared. A value that is not finite is a fault, never a pass.

use crate::Real;

/// Why two buffers do not agree.
#[derive(Clone, Debug, PartialEq)]
pub enum Mismatch {
    /// The buffers differ in length.
    Length {
        /// Length of the buffer under test.
        got: usize,
        /// Length of the reference.
        want: usize,
    },
    /// A value on either side is not finite.
    NotFinite {
        /// Where.
        index: usize,
        /// The value under test.
        got: f64,
        /// The reference.
        want: f64,
    },
    /// The measure is above the limit.
    Above {
        /// What was measured.
        measured: f64,
        /// What was allowed.
        limit: f64,
    },
}

impl std::fmt::Display for Mismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Length { got, want } => write!(f, "length {got} is not {want}"),
            Self::NotFinite { index, got, want } => write!(f, "index {index}: got {got}, want {want}"),
            Self::Above { measured, limit } => write!(f, "{measured:.3e} > {limit:.3e}"),
        }
    }
}

impl std::error::Error for Mismatch {}

/// Pairs of equal length, each value widened and checked to be finite.
fn differences<A: Real, B: Real>(got: &[A], want: &[B]) -> Result<Vec<(f64, f64)>, Mismatch> {
    if got.len() != want.len() {
        return Err(Mismatch::Length { got: got.len(), want: want.len() });
    }
    got.iter()
        .zip(want)
        .enumerate()
        .map(|(index, (g, w))| {
            let (got, want) = (g.wide(), w.wide());
            if got.is_finite() && want.is_finite() {
                Ok((got, want))
            } else {
                Err(Mismatch::NotFinite { index, got, want })
            }
        })
        .collect()
}

fn within(measured: f64, limit: f64) -> Result<f64, Mismatch> {
    if measured <= limit { Ok(measured) } else { Err(Mismatch::Above { measured, limit }) }
}

/// Normalised mean squared error, `sum (got - want)^2 / sum want^2`.
///
/// # Errors
///
/// If the lengths differ, a value is not finite, or the error is above `limit`.
pub fn nmse<A: Real, B: Real>(got: &[A], want: &[B], limit: f64) -> Result<f64, Mismatch> {
    let pairs = differences(got, want)?;
    let error: f64 = pairs.iter().map(|(g, w)| (g - w) * (g - w)).sum();
    let scale: f64 = pairs.iter().map(|(_, w)| w * w).sum();
    within(if error == 0.0 { 0.0 } else { error / scale }, limit)
}

/// Largest absolute difference, `max |got - want|`.
///
/// # Errors
///
/// If the lengths differ, a value is not finite, or the difference is above `limit`.
pub fn max_abs<A: Real, B: Real>(got: &[A], want: &[B], limit: f64) -> Result<f64, Mismatch> {
    let pairs = differences(got, want)?;
    within(pairs.iter().map(|(g, w)| (g - w).abs()).fold(0.0, f64::max), limit)
}

/// Largest absolute value of a buffer.
#[must_use]
pub fn magnitude<R: Real>(values: &[R]) -> f64 {
    values.iter().map(|v| v.wide().abs()).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::{Mismatch, magnitude, max_abs, nmse};

    #[test]
    fn a_nan_never_passes() {
        for (got, want) in [([f32::NAN], [0.0f32]), ([0.0], [f32::NAN]), ([f32::NAN], [f32::NAN])] {
            let not_finite = |r| matches!(r, Err(Mismatch::NotFinite { index: 0, .. }));
            assert!(not_finite(nmse(&got, &want, f64::INFINITY)), "nmse {got:?} {want:?}");
            assert!(not_finite(max_abs(&got, &want, f64::INFINITY)), "max_abs {got:?} {want:?}");
        }
    }

    #[test]
    fn limits_hold() {
        assert!(nmse(&[1.0f32, 2.0], &[1.0f32, 2.0], 0.0).is_ok(), "equal");
        assert!(nmse(&[1.1f32], &[1.0f64], 1e-3).is_err(), "1e-2 off");
        assert!(nmse(&[1e-9f32], &[0.0f64], 1e30).is_err(), "something where nothing is");
        assert!(max_abs(&[1.5f32], &[1.0f32], 0.5).is_ok(), "at the limit");
        assert!(nmse(&[1.0f32], &[1.0f32, 2.0], 1.0).is_err(), "lengths");
    }

    #[test]
    fn the_sign_of_a_difference_does_not_matter() {
        for (got, want) in [(1.0f32, 2.0f32), (2.0, 1.0), (-1.0, 0.0), (0.0, -1.0)] {
            assert_eq!(max_abs(&[got], &[want], 1.0), Ok(1.0), "{got} {want}");
            assert!(max_abs(&[got], &[want], 0.5).is_err(), "{got} {want}");
        }
        assert_eq!(magnitude(&[-3.0f32, 2.0]), 3.0, "of the negative one");
        assert_eq!(nmse(&[0.0f32], &[2.0f32], 1.0), Ok(1.0), "measured by what is wanted");
        assert_eq!(nmse(&[0.0f32], &[0.0f32], 0.0), Ok(0.0), "nothing where nothing is");
    }
}
