//! Addition of what a product comes to whose inputs were divided among several.

use crate::Real;

/// Adds to each row of `y` `[T, D]` the sum of its planes in `x` `[T, P, D]`, the first first.
///
/// # Panics
///
/// If `x` is not as many planes of each row.
pub fn add_planes<R: Real>(width: usize, planes: usize, x: &[R], y: &mut [R]) {
    assert_eq!(x.len(), y.len() * planes, "x is not {planes} planes of y");
    for (x, y) in x.chunks_exact((planes * width).max(1)).zip(y.chunks_exact_mut(width.max(1))) {
        for (i, y) in y.iter_mut().enumerate() {
            *y += x[i..].iter().step_by(width).fold(R::zero(), |sum, &x| sum + x);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::add_planes;

    #[test]
    fn each_row_has_its_planes() {
        let x = [1.0, 2.0, 10.0, 20.0, 100.0, 200.0, 3.0, 4.0, 30.0, 40.0, 300.0, 400.0];
        let mut y = [0.5, 0.0, 0.0, -0.5];
        add_planes(2, 3, &x, &mut y);
        assert_eq!(y, [111.5, 222.0, 333.0, 443.5]);
        add_planes(2, 0, &[], &mut y);
        assert_eq!(y, [111.5, 222.0, 333.0, 443.5], "nothing");
    }

    #[test]
    #[should_panic(expected = "not 2 planes")]
    fn planes_are_whole() {
        add_planes(2, 2, &[0.0; 6], &mut [0.0; 4]);
    }
}
