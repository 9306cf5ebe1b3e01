//! The exponential average of RWKV-4, an operation of its own: no v7 model uses it, but it is the ancestor of the state
//! update and what engines for earlier versions need.
//!
//! Per channel, with decay `w >= 0` and bonus `u`:
//!
//! ```text
//!         sum_{i<t} exp(-(t-1-i) w + k[i]) v[i] + exp(u + k[t]) v[t]
//! y[t] = -----------------------------------------------------------
//!         sum_{i<t} exp(-(t-1-i) w + k[i])      + exp(u + k[t])
//! ```
//!
//! Both sums are kept relative to a running maximum exponent, so that no key overflows. The form without a bonus,
//! `sum_{i<=t} exp(-(t-i) w + k[i]) v[i] / sum_{i<=t} exp(-(t-i) w + k[i])`, is `u = w`.

use crate::Real;

/// What the past leaves behind: both sums, divided by `exp(max)`, each `[C]`.
#[derive(Clone, Debug, PartialEq)]
pub struct State<R> {
    /// `sum exp(..) v / exp(max)`.
    pub numerator: Vec<R>,
    /// `sum exp(..) / exp(max)`.
    pub denominator: Vec<R>,
    /// The largest exponent so far; negative infinity before the first token.
    pub max: Vec<R>,
}

impl<R: Real> State<R> {
    /// The state before the first token.
    #[must_use]
    pub fn new(channels: usize) -> Self {
        Self {
            numerator: vec![R::zero(); channels],
            denominator: vec![R::zero(); channels],
            max: vec![R::neg_infinity(); channels],
        }
    }
}

/// Averages `v` `[T, C]` by `k` `[T, C]` into `y` `[T, C]`, with `w` and `u` `[C]`; updates `state`.
///
/// # Panics
///
/// If a slice's length disagrees.
pub fn wkv4<R: Real>(w: &[R], u: &[R], k: &[R], v: &[R], state: &mut State<R>, y: &mut [R]) {
    let channels = w.len();
    for s in [u, &state.numerator, &state.denominator, &state.max] {
        assert_eq!(s.len(), channels, "vector is not [C]");
    }
    for s in [k, v] {
        assert_eq!(s.len(), y.len(), "operand is not [T, C]");
    }
    assert_eq!(y.len() % channels, 0, "y is not [T, C]");
    for t in (0..y.len()).step_by(channels) {
        for c in 0..channels {
            let (k, v) = (k[t + c], v[t + c]);
            let (num, den, max) = (state.numerator[c], state.denominator[c], state.max[c]);
            let top = max.max(u[c] + k);
            let (past, now) = ((max - top).exp(), (u[c] + k - top).exp());
            y[t + c] = (past * num + now * v) / (past * den + now);

            let top = (max - w[c]).max(k);
            let (past, now) = ((max - w[c] - top).exp(), (k - top).exp());
            state.numerator[c] = past * num + now * v;
            state.denominator[c] = past * den + now;
            state.max[c] = top;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{State, wkv4};
    use crate::compare::max_abs;
    use crate::rng::SplitMix64;

    /// The formula as it stands.
    fn naive(w: f64, u: f64, k: &[f64], v: &[f64]) -> Vec<f64> {
        let weight = |t: usize, i: usize| {
            if i == t { (u + k[t]).exp() } else { (-((t - 1 - i) as f64) * w + k[i]).exp() }
        };
        (0..k.len())
            .map(|t| {
                let total: f64 = (0..=t).map(|i| weight(t, i)).sum();
                (0..=t).map(|i| weight(t, i) * v[i]).sum::<f64>() / total
            })
            .collect()
    }

    fn draw(tokens: usize, seed: u64) -> (Vec<f64>, Vec<f64>) {
        let mut rng = SplitMix64::new(seed);
        let mut rows = |scale| (0..tokens).map(|_| f64::from(rng.normal() * scale)).collect::<Vec<_>>();
        (rows(4.0), rows(1.0))
    }

    proptest! {
        #[test]
        fn equals_the_formula(tokens in 1usize..40, w in 0.0f64..3.0, u in -3.0f64..3.0, seed: u64) {
            let (k, v) = draw(tokens, seed);
            let mut y = vec![f64::NAN; tokens];
            wkv4(&[w], &[u], &k, &v, &mut State::new(1), &mut y);
            prop_assert!(max_abs(&y, &naive(w, u, &k, &v), 1e-12).is_ok(), "{y:?}");
        }

        #[test]
        fn halves_compose(tokens in 2usize..40, cut in 1usize..39, w in 0.0f64..3.0, seed: u64) {
            let cut = cut.min(tokens - 1);
            let (k, v) = draw(tokens, seed);
            let (mut whole, mut halves) = (vec![f64::NAN; tokens], vec![f64::NAN; tokens]);
            let (mut one, mut two) = (State::new(1), State::new(1));
            wkv4(&[w], &[0.5], &k, &v, &mut one, &mut whole);
            wkv4(&[w], &[0.5], &k[..cut], &v[..cut], &mut two, &mut halves[..cut]);
            wkv4(&[w], &[0.5], &k[cut..], &v[cut..], &mut two, &mut halves[cut..]);
            prop_assert_eq!(whole, halves, "outputs");
            prop_assert_eq!(one, two, "states");
        }
    }

    #[test]
    fn huge_keys_do_not_overflow() {
        let mut y = [f32::NAN; 3];
        wkv4(&[0.5], &[1.0], &[3e4, -3e4, 3e4], &[1.0, 2.0, 5.0], &mut State::new(1), &mut y);
        assert_eq!(y[..2], [1.0, 1.0], "the first key dwarfs the second");
        // weights exp(-0.5) and exp(1) of the two great keys; 3e4 leaves f32 two thousandths
        let want = ((-0.5f32).exp() + 1f32.exp() * 5.0) / ((-0.5f32).exp() + 1f32.exp());
        assert!((y[2] - want).abs() < 4e-3, "{y:?} {want}");
    }

    #[test]
    fn channels_have_their_own_decay_and_bonus() {
        let (w, u) = ([0.1, 2.0, 0.7], [-1.0, 0.5, 3.0]);
        let (k, v) = draw(60, 1);
        let mut y = [f64::NAN; 60];
        wkv4(&w, &u, &k, &v, &mut State::new(3), &mut y);
        for c in 0..3 {
            let of = |rows: &[f64]| rows.iter().skip(c).step_by(3).copied().collect::<Vec<_>>();
            let want = naive(w[c], u[c], &of(&k), &of(&v));
            assert!(max_abs(&of(&y), &want, 1e-12).is_ok(), "channel {c}");
        }
    }

    #[test]
    fn tiny_keys_do_not_vanish() {
        let mut y = [f64::NAN; 1];
        wkv4(&[0.5], &[0.0], &[-1e4], &[3.0], &mut State::new(1), &mut y);
        assert_eq!(y, [3.0], "the only token, whatever its key");
        // one great key long ago still dwarfs what came since, though its own weight is below all numbers
        let (mut k, mut v, mut y) = ([-1e4; 400], [2.0; 400], [f64::NAN; 400]);
        (k[0], v[0]) = (0.0, 1.0);
        wkv4(&[3.0], &[0.0], &k, &v, &mut State::new(1), &mut y);
        assert_eq!(y, [1.0; 400], "exp(-1200) is more than exp(-1e4)");
    }
}
