//! The channel mix's value layer, added to the residual: `x += value hidden`.
//!
//! The hidden units are mostly zero (see [`channel_mix`](super::channel_mix)), and a zero may be left out of the sum.

use super::linear::Linear;
use crate::Real;

/// Multiplies `hidden` `[T, F]` by `value` and adds it to `x` `[T, D]`.
///
/// # Panics
///
/// If the lengths disagree.
pub fn channel_mix_value<R: Real, M: Linear<R>>(value: &M, hidden: &[R], x: &mut [R]) {
    let mut y = vec![R::zero(); x.len()];
    value.apply_sparse(hidden, &mut y);
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

#[cfg(test)]
mod tests {
    use super::channel_mix_value;
    use crate::ops::linear::Matrix;

    #[test]
    fn the_residual_stays() {
        let value = Matrix::new(2, vec![1.0f64, 2.0, 3.0, 4.0]);
        let mut x = [100.0, 200.0, 300.0, 400.0];
        channel_mix_value(&value, &[1.0, 0.0, 0.0, 0.5], &mut x);
        assert_eq!(x, [101.0, 203.0, 301.0, 402.0], "two rows");
    }
}
