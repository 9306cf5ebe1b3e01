//! Softmax and the log-likelihood of a token: `p[i] = exp(x[i] - max) / sum_j exp(x[j] - max)`.

use crate::Real;

/// Turns `logits` into probabilities, in place. Logits of negative infinity get probability 0.
pub fn softmax<R: Real>(logits: &mut [R]) {
    let max = logits.iter().copied().fold(R::neg_infinity(), R::max);
    for x in logits.iter_mut() {
        *x = (*x - max).exp();
    }
    let scale = R::one() / logits.iter().copied().sum::<R>();
    for x in logits {
        *x *= scale;
    }
}

/// Natural logarithm of the probability of `token` under `logits` `[V]`, summed in `f64`.
///
/// # Panics
///
/// If `token` is outside the logits.
#[must_use]
pub fn log_probability<R: Real>(logits: &[R], token: u32) -> f64 {
    let max = logits.iter().copied().fold(R::neg_infinity(), R::max).wide();
    let sum: f64 = logits.iter().map(|x| (x.wide() - max).exp()).sum();
    logits[token as usize].wide() - max - sum.ln()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{log_probability, softmax};
    use crate::compare::max_abs;

    proptest! {
        #[test]
        fn a_distribution_that_ignores_shifts(
            logits in proptest::collection::vec(-80.0f64..80.0, 1..50),
            shift in -1e3f64..1e3,
        ) {
            let mut p = logits.clone();
            softmax(&mut p);
            prop_assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-12, "sums to 1");
            let mut shifted: Vec<f64> = logits.iter().map(|x| x + shift).collect();
            softmax(&mut shifted);
            prop_assert!(max_abs(&shifted, &p, 1e-11).is_ok(), "shift {shift}");
            for (token, p) in (0u32..).zip(&p) {
                prop_assert!((log_probability(&logits, token) - p.ln()).abs() < 1e-9, "token {token}");
            }
        }
    }

    #[test]
    fn masked_and_huge_logits() {
        let mut p = [f32::NEG_INFINITY, 1e38, 1e38];
        softmax(&mut p);
        assert_eq!(p, [0.0, 0.5, 0.5], "no overflow");
    }

    #[test]
    fn probabilities_of_huge_logits_do_not_overflow() {
        assert!((log_probability(&[1e30f32, 1e30], 0) + 2f64.ln()).abs() < 1e-12, "a half");
        assert!((log_probability(&[-1e4f32, -1e4], 1) + 2f64.ln()).abs() < 1e-12, "a half");
    }
}
