//! Token shift: each channel is mixed with its value at the previous token.
//!
//! ```text
//! out[m][t] = x[t] + (x[t-1] - x[t]) * mix[m]          x[-1] = the row kept in the state
//! ```
//!
//! The mix weighs the *previous* token. It is unconstrained after training (values of 9 occur): never clamp it.
//! The time mix has six mixes, in the order r, w, k, v, a, g; the channel mix has one.

use crate::Real;

/// Shifts `x` `[T, D]` against `previous` `[D]` by each of `mixes` `[M, D]` into `out` `[M, T, D]`.
///
/// # Panics
///
/// If a slice's length disagrees.
pub fn token_shift<R: Real>(x: &[R], previous: &[R], mixes: &[R], out: &mut [R]) {
    let width = previous.len();
    assert_eq!(x.len() % width, 0, "x is not [T, D]");
    assert_eq!(mixes.len() % width, 0, "mixes is not [M, D]");
    assert_eq!(out.len() * width, x.len() * mixes.len(), "out is not [M, T, D]");
    for (mix, out) in mixes.chunks_exact(width).zip(out.chunks_exact_mut(x.len())) {
        let mut before = previous;
        for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            lerp(x, before, mix, out);
            before = x;
        }
    }
}

/// `out = x + (before - x) * mix`, each `[D]`.
pub(crate) fn lerp<R: Real>(x: &[R], before: &[R], mix: &[R], out: &mut [R]) {
    for (((out, &x), &before), &mix) in out.iter_mut().zip(x).zip(before).zip(mix) {
        *out = x + (before - x) * mix;
    }
}

#[cfg(test)]
mod tests {
    use super::token_shift;

    #[test]
    fn mix_of_zero_is_now_and_of_one_is_before() {
        let x = [1.0f64, 2.0, 3.0, 4.0, 5.0, 6.0];
        let mut out = [f64::NAN; 18];
        token_shift(&x, &[-1.0, -2.0], &[0.0, 0.0, 1.0, 1.0, 0.5, 3.0], &mut out);
        assert_eq!(out[..6], x, "now");
        assert_eq!(out[6..12], [-1.0, -2.0, 1.0, 2.0, 3.0, 4.0], "before");
        assert_eq!(out[12..], [0.0, -10.0, 2.0, -2.0, 4.0, 0.0], "between and beyond");
    }
}
