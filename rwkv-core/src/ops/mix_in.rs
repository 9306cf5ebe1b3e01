//! What a decode step does first in a layer's half: norm, token shift, and all matrices that read the shifted token.
//!
//! ```text
//! u    = layer_norm(x)
//! z[m] = u + (shift - u) * mix[m]          shift = u of the token before
//! y    = [activation(W z[m]), ..]          for each matrix W, with its m; z = u where it has none
//! ```

use super::activation::Activation;
use super::layer_norm::{LN_EPS, layer_norm};
use super::linear::Linear;
use super::token_shift::token_shift;
use crate::Real;

/// A matrix of the stack.
#[derive(Clone, Copy, Debug)]
pub struct Stacked<'a, M> {
    /// `[outputs, D]`.
    pub matrix: &'a M,
    /// Which mix it reads; the unmixed token if none.
    pub mix: Option<usize>,
    /// What is done to its product.
    pub activation: Activation,
}

/// Runs one token `x` `[D]` through norm (`gain`, `bias` `[D]`), shift by `mixes` `[M, D]` and `matrices` into `y`
/// `[sum of outputs]`. `shift` `[D]` is the normed token before, and then this one.
///
/// # Panics
///
/// If a slice's length disagrees, or a mix is not there.
pub fn mix_in<R: Real, M: Linear<R>>(
    x: &[R],
    (gain, bias): (&[R], &[R]),
    mixes: &[R],
    shift: &mut [R],
    matrices: &[Stacked<'_, M>],
    y: &mut [R],
) {
    let mut normed = vec![R::zero(); x.len()];
    layer_norm(x, gain, bias, LN_EPS, &mut normed);
    let mut mixed = vec![R::zero(); mixes.len()];
    token_shift(&normed, shift, mixes, &mut mixed);
    shift.copy_from_slice(&normed);
    let mut rest = y;
    for &Stacked { matrix, mix, activation } in matrices {
        let (y, others) = rest.split_at_mut(matrix.outputs());
        matrix.apply(mix.map_or(&normed, |m| &mixed[m * x.len()..(m + 1) * x.len()]), y);
        activation.apply(y);
        rest = others;
    }
    assert!(rest.is_empty(), "y is not [sum of outputs]");
}

#[cfg(test)]
mod tests {
    use super::{Stacked, mix_in};
    use crate::ops::activation::Activation;
    use crate::ops::linear::Matrix;

    #[test]
    fn each_matrix_reads_its_mix() {
        let sum = Matrix::new(2, vec![1.0f64, 0.5]);
        let stack = [
            (Some(1), Activation::Identity),
            (None, Activation::SquaredRelu),
            (Some(0), Activation::Identity),
        ];
        let stack = stack.map(|(mix, activation)| Stacked { matrix: &sum, mix, activation });
        let (mut shift, mut y) = ([10.0, 20.0], [f64::NAN; 3]);
        // normed: -1 and 1 (eps moves 1e6 by nothing), times 2
        mix_in(&[-1e6, 1e6], (&[2.0, 2.0], &[0.0, 8.0]), &[1.0, 1.0, 0.5, 0.5], &mut shift, &stack, &mut y);
        let normed = [-2.0f64, 10.0];
        let want = [4.0 + 7.5, 9.0, 20.0];
        for (got, want) in shift.iter().zip(normed).chain(y.iter().zip(want)) {
            assert!((got - want).abs() < 1e-9, "{shift:?} {y:?}");
        }
    }
}
