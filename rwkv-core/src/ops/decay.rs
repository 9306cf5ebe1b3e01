//! Decay: `lw = -exp(-1/2) * sigmoid(wl)`, the natural logarithm of what a key channel keeps per token.
//!
//! `wl` is the output of the w adapter. The decay `exp(lw)` lies in `(exp(-exp(-1/2)), 1)`, about (0.5452, 1);
//! where it nears 1 it must stay a logarithm (see [`wkv7`](super::wkv7)).

use crate::Real;
use crate::real::sigmoid;

/// `exp(-1/2)`: bounds the decay below, so that chunks of it can be inverted in `f32` (RWKV-7 paper,
/// arXiv:2503.14456). Engines that use the published 0.606531 differ by 1e-6 in their logits.
pub const DECAY_SCALE: f64 = 0.606_530_659_712_633_4;

/// Turns the adapter's output `wl` into `lw`, in place, any shape.
pub fn log_decay<R: Real>(wl: &mut [R]) {
    for w in wl {
        *w = -R::of(DECAY_SCALE) * sigmoid(*w);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{DECAY_SCALE, log_decay};

    #[test]
    fn scale_is_exp_of_minus_a_half() {
        assert_eq!(DECAY_SCALE.to_bits(), (-0.5f64).exp().to_bits(), "the constant");
    }

    proptest! {
        #[test]
        fn decay_is_bounded(wl in prop_oneof![-1e30f32..1e30, -20.0f32..20.0]) {
            let (mut narrow, mut wide) = ([wl], [f64::from(wl)]);
            log_decay(&mut narrow);
            log_decay(&mut wide);
            let floor = (-DECAY_SCALE).exp();
            prop_assert!(f64::from(narrow[0]).exp() >= floor - 1e-7 && narrow[0] <= 0.0, "f32: {narrow:?}");
            prop_assert!(wide[0].exp() >= floor && wide[0] <= 0.0, "f64: {wide:?}");
        }
    }
}
