//! Layer norm: `y = (x - mean(x)) / sqrt(var(x) + eps) * gain + bias`, with the biased variance.

use crate::Real;

/// The eps of ln0, ln1, ln2 and `ln_out` (the default of PyTorch's `LayerNorm`, which the models were trained with).
pub const LN_EPS: f64 = 1e-5;

/// Normalises each row of `x` `[T, D]` into `y` `[T, D]`, with `gain` and `bias` `[D]`.
///
/// # Panics
///
/// If a slice's length disagrees.
pub fn layer_norm<R: Real>(x: &[R], gain: &[R], bias: &[R], eps: f64, y: &mut [R]) {
    let width = gain.len();
    assert_eq!(bias.len(), width, "bias is not [D]");
    assert_eq!(x.len(), y.len(), "x and y are not both [T, D]");
    assert_eq!(x.len() % width, 0, "x is not [T, D]");
    for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
        let (mean, scale) = moments(x, eps);
        for j in 0..width {
            y[j] = (x[j] - mean) * scale * gain[j] + bias[j];
        }
    }
}

/// Mean and `1 / sqrt(var + eps)` of one row, by two passes: the one-pass form cancels.
pub(crate) fn moments<R: Real>(x: &[R], eps: f64) -> (R, R) {
    let n = R::of(1.0 / x.len() as f64);
    let mean = sum(x, |v| v) * n;
    let variance = sum(x, |v| (v - mean) * (v - mean)) * n;
    (mean, R::one() / (variance + R::of(eps)).sqrt())
}

/// `sum f(x)` in eight interleaved partial sums: less rounding than one, and a loop that vectorises.
fn sum<R: Real>(x: &[R], f: impl Fn(R) -> R) -> R {
    let mut lanes = [R::zero(); 8];
    let chunks = x.chunks_exact(8);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane += f(v);
        }
    }
    for (lane, &v) in lanes.iter_mut().zip(rest) {
        *lane += f(v);
    }
    lanes.into_iter().sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{LN_EPS, layer_norm};
    use crate::compare::max_abs;

    proptest! {
        /// A row's norm does not change when the row is shifted and, eps aside, scaled.
        #[test]
        fn invariant_under_shift_and_scale(
            row in proptest::collection::vec(-3.0f64..3.0, 2..70),
            shift in -100.0f64..100.0,
            scale in 0.5f64..8.0,
        ) {
            let n = row.len();
            let (gain, bias) = (vec![1.0; n], vec![0.0; n]);
            let (mut a, mut b) = (vec![f64::NAN; n], vec![f64::NAN; n]);
            let moved: Vec<f64> = row.iter().map(|v| v * scale + shift).collect();
            // scaling eps by scale^2 makes the invariance exact
            layer_norm(&row, &gain, &bias, LN_EPS, &mut a);
            layer_norm(&moved, &gain, &bias, LN_EPS * scale * scale, &mut b);
            prop_assert!(max_abs(&a, &b, 1e-9).is_ok(), "{a:?} {b:?}");
        }
    }

    #[test]
    fn known_row() {
        let mut y = [f64::NAN; 2];
        layer_norm(&[1.0, 3.0], &[2.0, 2.0], &[10.0, 10.0], 0.0, &mut y);
        assert_eq!(y, [8.0, 12.0], "unit deviation, doubled, moved to 10");
    }
}
