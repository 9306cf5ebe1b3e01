//! Embedding: the table's row of each token, through ln0.

use super::layer_norm::{LN_EPS, layer_norm};
use crate::{Real, Weight};

/// Looks `tokens` `[T]` up in `table` `[V, D]` and normalises each row with ln0's `gain` and `bias` `[D]`
/// into `x` `[T, D]`.
///
/// # Panics
///
/// If a token is outside the vocabulary or a slice's length disagrees.
pub fn embedding<W: Weight, R: Real>(tokens: &[u32], table: &[W], gain: &[R], bias: &[R], x: &mut [R]) {
    let width = gain.len();
    assert_eq!(table.len() % width, 0, "table is not [V, D]");
    assert_eq!(x.len(), tokens.len() * width, "x is not [T, D]");
    let mut row = vec![R::zero(); width];
    for (&token, x) in tokens.iter().zip(x.chunks_exact_mut(width)) {
        for (row, &w) in row.iter_mut().zip(&table[token as usize * width..][..width]) {
            *row = w.widen();
        }
        layer_norm(&row, gain, bias, LN_EPS, x);
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::embedding;

    #[test]
    fn rows_are_looked_up_and_normalised() {
        let table = [0.0f32, 0.0, 1.0, 3.0, -5.0, 5.0].map(f16::from_f32);
        let mut x = [f64::NAN; 4];
        embedding(&[2, 1], &table, &[2.0, 2.0], &[1.0, 1.0], &mut x);
        for (got, want) in x.iter().zip([-1.0, 3.0, -1.0, 3.0]) {
            assert!((got - want).abs() < 1e-4, "{x:?}"); // eps moves the deviation of 1 by 5e-6
        }
    }
}
