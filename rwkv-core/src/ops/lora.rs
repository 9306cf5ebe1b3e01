//! Low-rank adapter: `y = bias + activation(x down) up`.
//!
//! The four adapters of the time mix differ in their activation and bias:
//!
//! | adapter | activation | bias | what becomes of `y` |
//! |---|---|---|---|
//! | w, decay | tanh | w0 | [`decay`](super::decay) |
//! | a, in-context learning rate | none | a0 | [`learning_rate`](super::learning_rate) |
//! | v, value residual | none | v0 | [`value_residual`](super::value_residual) |
//! | g, gate | sigmoid | none | multiplies the [`readout`](super::readout) as it is |

use super::activation::Activation;
use super::add::add;
use super::linear::Linear;
use crate::Real;

/// Runs the adapter over `x` `[T, D]` into `y` `[T, D]`. `down` has `rank` outputs, `up` has `rank` inputs;
/// `bias` `[D]` is empty where there is none.
///
/// # Panics
///
/// If a slice's length disagrees with the factors.
pub fn lora<R: Real, M: Linear<R>>(
    (down, activation, up): (&M, Activation, &M),
    bias: &[R],
    x: &[R],
    y: &mut [R],
) {
    assert_eq!(down.outputs(), up.inputs(), "the factors disagree in their rank");
    let mut hidden = vec![R::zero(); x.len() / down.inputs() * down.outputs()];
    down.apply(x, &mut hidden);
    activation.apply(&mut hidden);
    up.apply(&hidden, y);
    add(bias, y);
}

#[cfg(test)]
mod tests {
    use super::lora;
    use crate::ops::activation::Activation;
    use crate::ops::linear::Matrix;

    #[test]
    fn activation_stands_between_the_factors() {
        let (down, up) = (Matrix::new(2, vec![1.0f64, 1.0]), Matrix::new(1, vec![2.0f64, -1.0]));
        let run = |activation, bias: &[f64]| {
            let mut y = [f64::NAN; 2];
            lora((&down, activation, &up), bias, &[0.25, 0.75], &mut y);
            y
        };
        assert_eq!(run(Activation::Identity, &[10.0, 20.0]), [12.0, 19.0], "2 * 1, -1 * 1, bias");
        assert_eq!(run(Activation::Tanh, &[]), [2.0 * 1f64.tanh(), -(1f64.tanh())], "tanh, no bias");
        let s = 1.0 / (1.0 + (-1f64).exp());
        assert_eq!(run(Activation::Sigmoid, &[]), [2.0 * s, -s], "sigmoid");
    }
}
