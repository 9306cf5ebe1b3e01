//! The RWKV-7 state update, one token after another.
//!
//! For each head, with state `S[i][j]` (value row `i`, key column `j`) and decay `w = exp(lw)`:
//!
//! ```text
//! q[i]    = sum_j S[i][j] * a[j]                                a = -kappa
//! S[i][j] = S[i][j] * w[j] + q[i] * b[j] + v[i] * k[j]          b = kappa * eta
//! y[i]    = sum_j S[i][j] * r[j]
//! ```
//!
//! The value rows of a head never interact; only the key-side vectors are shared.
//!
//! The decay comes as its natural logarithm `lw`, in `(-exp(-1/2), 0]`, because `w` itself is too coarse:
//! near 1 its spacing is as large as the decay it should express. The update is computed as
//! `S + (S * expm1(lw) + q * b + v * k)`, which halves the rounding error of `S * exp(lw) + ...`.

use super::decay::loss;
use crate::Real;

/// Extents of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Tokens, `T`.
    pub tokens: usize,
    /// Heads, `H`.
    pub heads: usize,
    /// Channels per head, `N`.
    pub head_size: usize,
}

impl Dims {
    /// Elements of one operand, `[T, H, N]`.
    #[must_use]
    pub const fn vector_len(&self) -> usize {
        self.tokens * self.heads * self.head_size
    }

    /// Elements of the state, `[H, N, N]`.
    #[must_use]
    pub const fn state_len(&self) -> usize {
        self.heads * self.head_size * self.head_size
    }

    /// Checks operands and state against the extents.
    pub(crate) fn check<R>(&self, x: &Inputs<'_, R>, state: &[R], y: &[R]) {
        for s in [x.r, x.lw, x.k, x.v, x.a, x.b, y] {
            assert_eq!(s.len(), self.vector_len(), "operand is not [T, H, N]");
        }
        assert_eq!(state.len(), self.state_len(), "state is not [H, N, N]");
    }
}

/// The operands, each `[T, H, N]`.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, R> {
    /// Receptance.
    pub r: &'a [R],
    /// Natural logarithm of the decay, in `(-exp(-1/2), 0]`.
    pub lw: &'a [R],
    /// Key, as written into the state.
    pub k: &'a [R],
    /// Value.
    pub v: &'a [R],
    /// Removal direction, `-kappa`; `|kappa| = 1` per head, or 0 for a zero key.
    pub a: &'a [R],
    /// Replacement direction, `kappa * eta`.
    pub b: &'a [R],
}

/// Runs the recurrence over `dims.tokens` tokens: updates `state` `[H, N, N]`, writes `y` `[T, H, N]`.
///
/// # Panics
///
/// If a slice's length disagrees with `dims`.
pub fn wkv7<R: Real>(dims: Dims, x: Inputs<'_, R>, state: &mut [R], y: &mut [R]) {
    dims.check(&x, state, y);
    let n = dims.head_size;
    for t in 0..dims.tokens {
        for h in 0..dims.heads {
            let at = (t * dims.heads + h) * n;
            let head = at..at + n;
            let (r, lw, k) = (&x.r[head.clone()], &x.lw[head.clone()], &x.k[head.clone()]);
            let (v, a, b) = (&x.v[head.clone()], &x.a[head.clone()], &x.b[head]);
            for i in 0..n {
                let row = &mut state[(h * n + i) * n..][..n];
                let mut q = R::zero();
                for j in 0..n {
                    q += row[j] * a[j];
                }
                let mut out = R::zero();
                for j in 0..n {
                    row[j] += row[j] * loss(lw[j]) + q * b[j] + v[i] * k[j];
                    out += row[j] * r[j];
                }
                y[at + i] = out;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Dims, Inputs, wkv7};

    #[test]
    fn one_token_from_zero_is_an_outer_product() {
        let dims = Dims { heads: 1, head_size: 2, tokens: 1 };
        let (mut s, mut y) = ([0.0f64; 4], [0.0; 2]);
        let x = Inputs {
            r: &[1.0, 1.0],
            lw: &[-0.1, -0.2],
            k: &[2.0, 3.0],
            v: &[5.0, 7.0],
            a: &[-1.0, 0.0],
            b: &[1.0, 0.0],
        };
        wkv7(dims, x, &mut s, &mut y);
        assert_eq!(s, [10.0, 15.0, 14.0, 21.0], "S = v k^T");
        assert_eq!(y, [25.0, 35.0], "y = S r");
    }
}
