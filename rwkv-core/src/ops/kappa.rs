//! kappa normalisation: the removal key, of unit length in each head.
//!
//! ```text
//! u     = k0 * k_k
//! kappa = u / max(|u|, 1e-12)                  |.| over the channels of a head
//! ```
//!
//! This is the official form, PyTorch's `F.normalize`. Other engines divide by `sqrt(|u|^2 + eps)` or by
//! `|u| + eps`; they differ for small keys. A zero key gives a zero kappa.

use crate::Real;

/// The eps of PyTorch's `F.normalize`.
pub const KAPPA_EPS: f64 = 1e-12;

/// Normalises `k0 * k_k` per head: `k0` `[T, H, N]`, `k_k` `[H, N]`, `kappa` `[T, H, N]`.
///
/// # Panics
///
/// If a slice's length disagrees.
pub fn kappa<R: Real>(head_size: usize, k0: &[R], k_k: &[R], kappa: &mut [R]) {
    assert_eq!(k0.len(), kappa.len(), "k0 and kappa are not both [T, H, N]");
    assert_eq!(k0.len() % k_k.len(), 0, "k0 is not [T, H, N]");
    assert_eq!(k_k.len() % head_size, 0, "k_k is not [H, N]");
    for (token, kappa) in k0.chunks_exact(k_k.len()).zip(kappa.chunks_exact_mut(k_k.len())) {
        for j in 0..k_k.len() {
            kappa[j] = token[j] * k_k[j];
        }
        for head in kappa.chunks_exact_mut(head_size) {
            let norm = head.iter().map(|&u| u * u).sum::<R>().sqrt();
            let scale = norm.max(R::of(KAPPA_EPS));
            head.iter_mut().for_each(|u| *u = *u / scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::kappa;
    use crate::rng::SplitMix64;

    proptest! {
        #[test]
        fn each_head_has_unit_length(heads in 1usize..4, half_size in 1usize..40, log_scale in -8i32..8, seed: u64) {
            let (n, mut rng) = (2 * half_size, SplitMix64::new(seed));
            let k0: Vec<f32> = (0..3 * heads * n).map(|_| rng.normal() * 10f32.powi(log_scale)).collect();
            let mut out = vec![f32::NAN; k0.len()];
            kappa(n, &k0, &vec![1.0; heads * n], &mut out);
            for head in out.chunks_exact(n) {
                let norm = head.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
                // the sum of n squares, its root and the quotient round by at most (n / 2 + 2) units
                prop_assert!((norm - 1.0).abs() < (n as f64 / 2.0 + 2.0) * f64::from(f32::EPSILON), "{norm}");
            }
        }
    }

    #[test]
    fn zero_key_gives_zero_and_a_tiny_one_is_not_blown_up() {
        let mut out = [f64::NAN; 4];
        kappa(2, &[0.0, 0.0, 3e-13, 4e-13], &[1.0, 1.0, 1.0, 1.0], &mut out);
        assert_eq!(out[..2], [0.0, 0.0], "zero");
        assert!((out[2] - 0.3).abs() < 1e-12 && (out[3] - 0.4).abs() < 1e-12, "divided by 1e-12: {out:?}");
    }
}
