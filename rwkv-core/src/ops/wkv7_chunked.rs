//! The RWKV-7 state update, a chunk of tokens at a time.
//!
//! The same operation as [`wkv7`](super::wkv7), unrolled over a chunk of `C` tokens, so that most of it becomes
//! matrix products. With `G[t] = sum_{s<=t} lw[s]` and `P[t] = G[t-1]` per key channel, and the pair weights
//!
//! ```text
//! A_ab[t][s] = sum_j a[t][j] * b[s][j] * exp(P[t][j] - G[s][j])        s <  t
//! A_ak[t][s] = sum_j a[t][j] * k[s][j] * exp(P[t][j] - G[s][j])        s <  t
//! A_rb[t][s] = sum_j r[t][j] * b[s][j] * exp(G[t][j] - G[s][j])        s <= t
//! A_rk[t][s] = sum_j r[t][j] * k[s][j] * exp(G[t][j] - G[s][j])        s <= t
//! ```
//!
//! the chunk that enters with state `S` is
//!
//! ```text
//! q[t] = S (a[t] * exp(P[t])) + sum_{s<t} A_ak[t][s] v[s] + A_ab[t][s] q[s]       row after row
//! y[t] = S (r[t] * exp(G[t])) + sum_{s<=t} A_rb[t][s] q[s] + A_rk[t][s] v[s]
//! S    = S diag(exp(G[C])) + sum_s (q[s] b[s]^T + v[s] k[s]^T) diag(exp(G[C] - G[s]))
//! ```
//!
//! Of this, little waits for the state. With `q[t] = S w[t] + u[t]` and `y[t] = S r'[t] + y'[t]`, the [`Factors`]
//!
//! ```text
//! w[t]  = a[t] * exp(P[t]) + sum_{s<t} A_ab[t][s] w[s]        u[t]  = sum_{s<t} A_ak[t][s] v[s] + A_ab[t][s] u[s]
//! r'[t] = r[t] * exp(G[t]) + sum_{s<=t} A_rb[t][s] w[s]       y'[t] = sum_{s<=t} A_rb[t][s] u[s] + A_rk[t][s] v[s]
//! ```
//!
//! of all chunks can be computed side by side, and three products are left to be done one chunk after the other. Tokens
//! are written into the state by [blocks](BLOCK): `b` and `k` are then relative to the end of their block.
//!
//! The exponents of the pair weights are at most zero, but as products of two factors they are not: they are taken
//! by blocks of 16 tokens. Inside a block both factors are relative to its middle, so that neither exceeds
//! `exp(9 * 0.6066) = 235`, far inside `f16`. Against earlier blocks they are relative to the block's left edge,
//! and both factors are at most 1. Masked pairs are left out, never multiplied by zero: they may be large.
//!
//! `w` and `u` come from forward substitution. A doubling product of `(I - A_ab)^-1` loses all accuracy when keys repeat.

use std::ops::Range;

use super::decay::loss;
pub use super::wkv7::{Dims, Inputs};
use crate::Real;

/// Tokens in a block of the pair weights.
pub const BLOCK: usize = 16;

/// Runs the recurrence by chunks of `chunk` tokens, the last one shorter: updates `state` `[H, N, N]`,
/// writes `y` `[T, H, N]`.
///
/// # Panics
///
/// If a slice's length disagrees with `dims`, or `chunk` is zero.
pub fn wkv7_chunked<R: Real>(dims: Dims, chunk: usize, x: Inputs<'_, R>, state: &mut [R], y: &mut [R]) {
    dims.check(&x, state, y);
    let n = dims.head_size;
    for (tokens, h) in chunks(dims, chunk) {
        let out = Factors::new(dims, x, tokens.clone(), h).advance(&mut state[h * n * n..][..n * n]);
        for (t, out) in tokens.zip(out.chunks_exact(n)) {
            y[(t * dims.heads + h) * n..][..n].copy_from_slice(out);
        }
    }
}

/// The tokens and the head of every chunk, in the order of the tokens.
///
/// # Panics
///
/// If `chunk` is zero.
pub fn chunks(dims: Dims, chunk: usize) -> impl Iterator<Item = (Range<usize>, usize)> {
    assert!(chunk > 0, "a chunk has at least one token");
    let tokens = (0..dims.tokens).step_by(chunk).map(move |at| at..(at + chunk).min(dims.tokens));
    tokens.flat_map(move |tokens| (0..dims.heads).map(move |h| (tokens.clone(), h)))
}

/// What a chunk of a head does, whatever state it meets. Vectors are `[C, N]`.
#[derive(Clone, Debug)]
pub struct Factors<R> {
    n: usize,
    /// What of the state each token removes, those before it in the chunk counted in: `q[t] = S w[t] + u[t]`.
    pub w: Vec<R>,
    /// What it removes of the tokens before it in the chunk.
    pub u: Vec<R>,
    /// What of the state each token reads: `y[t] = S r'[t] + y'[t]`.
    pub r: Vec<R>,
    /// What it reads of the tokens up to it in the chunk.
    pub y: Vec<R>,
    /// Replacement direction, decayed to the end of the token's block.
    pub b: Vec<R>,
    /// Key, decayed to the end of the token's block.
    pub k: Vec<R>,
    /// Value.
    pub v: Vec<R>,
    /// What each block leaves of the state, `[C / 16, N]`, rounded up: less one where that is more than a half, so that it
    /// is not positive. Near one it would be too coarse, near none the sum with what is lost.
    pub kept: Vec<R>,
}

impl<R: Real> Factors<R> {
    /// Those of the tokens `tokens` in head `h`.
    ///
    /// # Panics
    ///
    /// If there are no such tokens or there is no such head in `x`.
    #[must_use]
    pub fn new(dims: Dims, x: Inputs<'_, R>, tokens: Range<usize>, h: usize) -> Self {
        let n = dims.head_size;
        let gather = |s: &[R]| -> Vec<R> {
            tokens.clone().flat_map(|t| &s[(t * dims.heads + h) * n..][..n]).copied().collect()
        };
        let head = Head {
            n,
            r: gather(x.r),
            k: gather(x.k),
            v: gather(x.v),
            a: gather(x.a),
            b: gather(x.b),
            log: cumulative(n, &gather(x.lw)),
        };
        head.factors()
    }

    /// Moves a state `[N, N]` on over the chunk. Returns what its tokens read, `[C, N]`.
    ///
    /// # Panics
    ///
    /// If the state is of another length.
    pub fn advance(&self, state: &mut [R]) -> Vec<R> {
        let n = self.n;
        assert_eq!(state.len(), n * n, "state is not [N, N]");
        let of_state = |x: &[R], own: &[R]| -> Vec<R> {
            let rows = x.chunks_exact(n).flat_map(|x| product(state, x));
            rows.zip(own).map(|(read, &own)| read + own).collect()
        };
        let (q, y) = (of_state(&self.w, &self.u), of_state(&self.r, &self.y));
        let block = |x: &[R], at: usize| x.chunks(BLOCK * n).nth(at).map(<[R]>::to_vec).unwrap_or_default();
        for (at, kept) in self.kept.chunks_exact(n).enumerate() {
            for row in state.chunks_exact_mut(n) {
                for (s, &kept) in row.iter_mut().zip(kept) {
                    *s = if kept > R::zero() { *s * kept } else { *s + *s * kept };
                }
            }
            let [q, v, b, k] = [&q, &self.v, &self.b, &self.k].map(|x| block(x, at));
            for (s, (b, k)) in b.chunks_exact(n).zip(k.chunks_exact(n)).enumerate() {
                for (i, row) in state.chunks_exact_mut(n).enumerate() {
                    add_scaled(row, q[s * n + i], b);
                    add_scaled(row, v[s * n + i], k);
                }
            }
        }
        y
    }
}

/// `P` and `G` in one: row `t` is `P[t]`, row `t + 1` is `G[t]`; `[C + 1, N]`.
fn cumulative<R: Real>(n: usize, lw: &[R]) -> Vec<R> {
    let mut log = vec![R::zero(); lw.len() + n];
    for at in 0..lw.len() {
        log[at + n] = log[at] + lw[at];
    }
    log
}

/// One head's share of a chunk, operands `[C, N]`.
struct Head<R> {
    n: usize,
    r: Vec<R>,
    k: Vec<R>,
    v: Vec<R>,
    a: Vec<R>,
    b: Vec<R>,
    log: Vec<R>,
}

/// The pair weights, each `[C, C]`.
struct Pairs<R> {
    ab: Vec<R>,
    ak: Vec<R>,
    rb: Vec<R>,
    rk: Vec<R>,
}

impl<R: Real> Head<R> {
    fn tokens(&self) -> usize {
        self.v.len() / self.n
    }

    /// Row `t` of an operand.
    fn row<'a>(&self, operand: &'a [R], t: usize) -> &'a [R] {
        &operand[t * self.n..][..self.n]
    }

    /// `log` before token `t`.
    fn before(&self, t: usize) -> &[R] {
        self.row(&self.log, t)
    }

    /// `log` after token `t`.
    fn after(&self, t: usize) -> &[R] {
        self.row(&self.log, t + 1)
    }

    fn factors(self) -> Factors<R> {
        let (n, c) = (self.n, self.tokens());
        let pairs = self.pairs();
        let [mut w, mut u, mut r, mut y] = [(); 4].map(|()| Vec::with_capacity(c * n));
        for t in 0..c {
            let mut row = scaled(self.row(&self.a, t), self.before(t));
            let mut own = vec![R::zero(); n];
            for s in 0..t {
                add_scaled(&mut row, pairs.ab[t * c + s], self.row(&w, s));
                add_scaled(&mut own, pairs.ak[t * c + s], self.row(&self.v, s));
                add_scaled(&mut own, pairs.ab[t * c + s], self.row(&u, s));
            }
            w.extend(row);
            u.extend(own);

            let mut row = scaled(self.row(&self.r, t), self.after(t));
            let mut own = vec![R::zero(); n];
            for s in 0..=t {
                add_scaled(&mut row, pairs.rb[t * c + s], self.row(&w, s));
                add_scaled(&mut own, pairs.rb[t * c + s], self.row(&u, s));
                add_scaled(&mut own, pairs.rk[t * c + s], self.row(&self.v, s));
            }
            r.extend(row);
            y.extend(own);
        }

        let [mut b, mut k, mut kept] = [(); 3].map(|()| Vec::new());
        for left in (0..c).step_by(BLOCK) {
            let right = (left + BLOCK).min(c);
            let (start, end) = (self.before(left), self.before(right));
            for s in left..right {
                let remaining: Vec<R> = end.iter().zip(self.after(s)).map(|(&end, &at)| end - at).collect();
                b.extend(scaled(self.row(&self.b, s), &remaining));
                k.extend(scaled(self.row(&self.k, s), &remaining));
            }
            kept.extend(start.iter().zip(end).map(|(&start, &end)| match end - start {
                log if log > -R::of(std::f64::consts::LN_2) => loss(log),
                log => log.exp(),
            }));
        }
        Factors { n, w, u, r, y, b, k, v: self.v, kept }
    }

    fn pairs(&self) -> Pairs<R> {
        let c = self.tokens();
        let zero = || vec![R::zero(); c * c];
        let mut pairs = Pairs { ab: zero(), ak: zero(), rb: zero(), rk: zero() };
        for left in (0..c).step_by(BLOCK) {
            let block = left..(left + BLOCK).min(c);
            let middle = self.after(left + (block.len() / 2).max(1) - 1);
            self.pair(&mut pairs, block.clone(), block.clone(), middle);
            self.pair(&mut pairs, block, 0..left, self.before(left));
        }
        pairs
    }

    /// Fills the weights of rows `ts` against columns `ss`, both factors relative to `reference` `[N]`.
    fn pair(&self, pairs: &mut Pairs<R>, ts: Range<usize>, ss: Range<usize>, reference: &[R]) {
        let c = self.tokens();
        let relative = |operand: &[R], t: usize, log: &[R], sign: R| -> Vec<R> {
            let row = self.row(operand, t);
            (0..self.n).map(|j| row[j] * (sign * (log[j] - reference[j])).exp()).collect()
        };
        let (one, minus) = (R::one(), -R::one());
        let columns: Vec<_> = ss
            .clone()
            .map(|s| (relative(&self.b, s, self.after(s), minus), relative(&self.k, s, self.after(s), minus)))
            .collect();
        for t in ts {
            let a = relative(&self.a, t, self.before(t), one);
            let r = relative(&self.r, t, self.after(t), one);
            for (s, (b, k)) in ss.clone().zip(&columns) {
                if s < t {
                    pairs.ab[t * c + s] = dot(&a, b);
                    pairs.ak[t * c + s] = dot(&a, k);
                }
                if s <= t {
                    pairs.rb[t * c + s] = dot(&r, b);
                    pairs.rk[t * c + s] = dot(&r, k);
                }
            }
        }
    }
}

/// `x * exp(log)`.
fn scaled<R: Real>(x: &[R], log: &[R]) -> Vec<R> {
    x.iter().zip(log).map(|(&x, &log)| x * log.exp()).collect()
}

fn dot<R: Real>(a: &[R], b: &[R]) -> R {
    a.iter().zip(b).map(|(&a, &b)| a * b).sum()
}

/// `S x`, rows of `S` `[N, N]`.
fn product<R: Real>(state: &[R], x: &[R]) -> Vec<R> {
    state.chunks_exact(x.len()).map(|row| dot(row, x)).collect()
}

fn add_scaled<R: Real>(sum: &mut [R], factor: R, x: &[R]) {
    for (sum, &x) in sum.iter_mut().zip(x) {
        *sum += factor * x;
    }
}
