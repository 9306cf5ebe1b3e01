//! In-context learning rate: how much of what a key held is replaced.
//!
//! ```text
//! eta = sigmoid(al)                          al = the output of the a adapter
//! k   = k0 * (1 + (eta - 1) * k_a)           the key as written into the state
//! a   = -kappa                               removal direction
//! b   = kappa * eta                          replacement direction
//! ```
//!
//! kappa is taken from the unmodified key `k0`, before `k` is.

use crate::Real;
use crate::real::sigmoid;

/// Turns `al` into `eta`, in place, any shape.
pub fn learning_rate<R: Real>(al: &mut [R]) {
    for a in al {
        *a = sigmoid(*a);
    }
}

/// Modulates the key by the learning rate: `k` `[T, D]` in place, `eta` `[T, D]`, `k_a` `[D]`.
///
/// # Panics
///
/// If a slice's length disagrees.
pub fn modulate_key<R: Real>(eta: &[R], k_a: &[R], k: &mut [R]) {
    assert_eq!(eta.len(), k.len(), "eta and k are not both [T, D]");
    assert_eq!(k.len() % k_a.len(), 0, "k is not [T, D]");
    for (k, eta) in k.chunks_exact_mut(k_a.len()).zip(eta.chunks_exact(k_a.len())) {
        for j in 0..k_a.len() {
            k[j] *= R::one() + (eta[j] - R::one()) * k_a[j];
        }
    }
}

/// Turns `eta` and `kappa`, of one shape, into the removal and replacement directions `a` and `b`, in place.
///
/// # Panics
///
/// If the lengths disagree.
pub fn directions<R: Real>(eta_to_a: &mut [R], kappa_to_b: &mut [R]) {
    assert_eq!(eta_to_a.len(), kappa_to_b.len(), "eta and kappa are not of one shape");
    for (a, b) in eta_to_a.iter_mut().zip(kappa_to_b) {
        (*a, *b) = (-*b, *b * *a);
    }
}

#[cfg(test)]
mod tests {
    use super::{directions, learning_rate, modulate_key};

    #[test]
    fn full_rate_leaves_the_key_and_none_scales_it() {
        let (k_a, mut k) = ([0.5f64, 4.0], [3.0, 3.0, 3.0, 3.0]);
        modulate_key(&[1.0, 1.0, 0.0, 0.5], &k_a, &mut k);
        assert_eq!(k, [3.0, 3.0, 1.5, -3.0], "k_a is not confined to [0, 1]");
    }

    #[test]
    fn rate_and_directions() {
        let mut eta = [0.0f64, 800.0, -800.0];
        learning_rate(&mut eta);
        assert_eq!(eta, [0.5, 1.0, 0.0], "sigmoid without overflow");
        let mut kappa = [0.5, -0.5, 1.0];
        directions(&mut eta, &mut kappa);
        assert_eq!((eta, kappa), ([-0.5, 0.5, -1.0], [0.25, -0.5, 0.0]), "a = -kappa, b = kappa eta");
    }
}
