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

/// `expm1(lw)`, what a key channel keeps less one, for `lw` in `[-ln 2, 0]`: of a token, or of several that keep more than half.
///
/// It is `x + x^2 p(x)`, `p` the Taylor polynomial up to `x^17 / 17!`: the library's function takes one value at a time, and
/// with that two fifths of the time of the CPU's state update. The series alternates, so that it is off by less than
/// `ln(2)^18 / (18! / 2) < 5e-19`, relatively. What rounds is `x * (x * p)`, less than 0.39 of the sum, 3.75 units, and the
/// sum, one: 2.5 units together (`rwkv-kernels/src/wgsl/expm1.wgsl` has the analysis).
#[must_use]
#[inline]
pub fn loss<R: Real>(lw: R) -> R {
    let mut p = R::zero();
    for n in (2..=17u32).rev() {
        p = p * lw + R::of(INVERSE_FACTORIALS[n as usize]);
    }
    lw + lw * (lw * p)
}

/// `1 / n!`.
const INVERSE_FACTORIALS: [f64; 18] = {
    let mut all = [1.0; 18];
    let mut n = 1;
    while n < all.len() {
        all[n] = all[n - 1] / n as f64;
        n += 1;
    }
    all
};

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{DECAY_SCALE, log_decay, loss};

    #[test]
    fn scale_is_exp_of_minus_a_half() {
        assert_eq!(DECAY_SCALE.to_bits(), (-0.5f64).exp().to_bits(), "the constant");
    }

    proptest! {
        /// Within 2.5 units of rounding, and two of the library's for the wide one; far below the spacing at 1, too.
        #[test]
        fn loss_is_within_its_bound(lw in -std::f32::consts::LN_2..=0.0, binades in 0..60) {
            let lw = lw * 0.5f32.powi(binades);
            let want = f64::from(lw).exp_m1();
            let narrow = (f64::from(loss(lw)) - want).abs();
            prop_assert!(narrow <= 2.5 / 2.0 * f64::from(f32::EPSILON) * want.abs(), "f32: {narrow:e} of {want:e}");
            let wide = (loss(f64::from(lw)) - want).abs();
            prop_assert!(wide <= 4.5 / 2.0 * f64::EPSILON * want.abs(), "f64: {wide:e} of {want:e}");
        }

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
