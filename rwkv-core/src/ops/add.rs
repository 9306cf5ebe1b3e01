//! Addition: `y[i] += x[i mod len(x)]`, of a bias to every row, or of what a layer says to the residual stream.

use crate::Real;

/// Adds `x` to `y` `[T, D]` in place: a bias `[D]` to every row, or rows `[T, D]`. Where `x` is empty, there is
/// nothing to add.
///
/// # Panics
///
/// If `y` is not a whole number of `x`.
pub fn add<R: Real>(x: &[R], y: &mut [R]) {
    let period = x.len().max(1);
    assert_eq!(y.len() % period, 0, "y is not [T, D]");
    for y in y.chunks_exact_mut(period) {
        y.iter_mut().zip(x).for_each(|(y, &x)| *y += x);
    }
}

#[cfg(test)]
mod tests {
    use super::add;

    #[test]
    fn a_bias_goes_to_every_row_and_rows_to_their_own() {
        let mut y = [1.0f64, 2.0, 3.0, 4.0];
        add(&[10.0, 20.0], &mut y);
        assert_eq!(y, [11.0, 22.0, 13.0, 24.0], "bias");
        add(&[1.0, 2.0, 3.0, 4.0], &mut y);
        assert_eq!(y, [12.0, 24.0, 16.0, 28.0], "rows");
        add(&[], &mut y);
        assert_eq!(y, [12.0, 24.0, 16.0, 28.0], "nothing");
    }

    #[test]
    #[should_panic(expected = "y is not [T, D]")]
    fn part_of_a_row_is_the_callers_bug() {
        add(&[1.0f64, 2.0], &mut [0.0; 3]);
    }
}
