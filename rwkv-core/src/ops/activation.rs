//! Activations: what stands between two linear layers.

use crate::Real;
use crate::real::sigmoid;

/// A function of one value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Activation {
    /// `x`.
    #[default]
    Identity,
    /// Hyperbolic tangent: in the decay adapter.
    Tanh,
    /// Logistic function: in the gate adapter.
    Sigmoid,
    /// `max(x, 0)^2`: in the channel mix. It leaves `f16` from 256 on.
    SquaredRelu,
}

impl Activation {
    /// Applies it to each value.
    pub fn apply<R: Real>(self, values: &mut [R]) {
        match self {
            Self::Identity => {}
            Self::Tanh => values.iter_mut().for_each(|v| *v = v.tanh()),
            Self::Sigmoid => values.iter_mut().for_each(|v| *v = sigmoid(*v)),
            Self::SquaredRelu => values.iter_mut().for_each(|v| {
                let positive = v.max(R::zero());
                *v = positive * positive;
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Activation;

    #[test]
    fn each_is_what_it_says() {
        let of = |activation: Activation| {
            let mut x = [-3.0f64, 0.0, 2.0];
            activation.apply(&mut x);
            x
        };
        assert_eq!(of(Activation::Identity), [-3.0, 0.0, 2.0], "identity");
        assert_eq!(of(Activation::Tanh), [(-3f64).tanh(), 0.0, 2f64.tanh()], "tanh");
        let s = |x: f64| 1.0 / (1.0 + (-x).exp());
        for (got, want) in of(Activation::Sigmoid).into_iter().zip([s(-3.0), 0.5, s(2.0)]) {
            assert!((got - want).abs() < 1e-15, "sigmoid: {got} {want}");
        }
        assert_eq!(of(Activation::SquaredRelu), [0.0, 0.0, 4.0], "squared relu");
    }
}
