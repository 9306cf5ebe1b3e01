//! Head: `logits = head ln_out(x)`.

use super::layer_norm::{LN_EPS, layer_norm};
use super::linear::Linear;
use crate::Real;

/// Computes `logits` `[T, V]` of `x` `[T, D]`, with `ln_out`'s `gain` and `bias` `[D]`.
///
/// # Panics
///
/// If a slice's length disagrees.
pub fn head<R: Real, M: Linear<R>>(head: &M, gain: &[R], bias: &[R], x: &[R], logits: &mut [R]) {
    let mut normed = vec![R::zero(); x.len()];
    layer_norm(x, gain, bias, LN_EPS, &mut normed);
    head.apply(&normed, logits);
}

#[cfg(test)]
mod tests {
    use super::head;
    use crate::ops::linear::Matrix;

    #[test]
    fn norm_then_product() {
        let mut logits = [f64::NAN; 1];
        head(&Matrix::new(2, vec![1.0f64, 2.0]), &[1.0, 1.0], &[0.0, 5.0], &[-1e3, 1e3], &mut logits);
        assert!((logits[0] - 11.0).abs() < 1e-9, "-1 + 2 (1 + 5): {logits:?}");
    }
}
