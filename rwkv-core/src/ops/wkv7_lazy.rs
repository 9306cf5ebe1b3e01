//! The RWKV-7 state update with the state matrix left alone for a while.
//!
//! The same operation as [`wkv7`](super::wkv7), which reads and writes all of `S` `[N, N]` at every token. Here a head
//! keeps a base `S0` that is only read, and what the tokens since then did to it.
//!
//! # The factored log, [`Pending`]
//!
//! Token `s` of `m` left `(q, v, b, k, lw)[s]`, five vectors `[N]`, behind. With `L[s] = lw[s+1] + .. + lw[m]` per key
//! channel, so that `L[m] = 0` and `L[0]` is the decay of the base,
//!
//! ```text
//! S       = S0 diag(exp(L[0])) + sum_s (q[s] b[s]^T + v[s] k[s]^T) diag(exp(L[s]))
//! read(x) = S0 (exp(L[0]) * x) + sum_s q[s] <b[s], exp(L[s]) * x> + v[s] <k[s], exp(L[s]) * x>      = S x
//! step:     q = read(a);  append (q, v, b, k, lw);  y = read(r)
//! fold:     S0 = S;  no entries
//! ```
//!
//! This is exact. The two reads of a step need `S0` in one pass only: what `q` adds to `y` is known after it. A step
//! is undone by dropping its entry.
//!
//! Decay accumulates in the log domain: `L` is a sum of logarithms, and a decay is the exponential of such a sum, never
//! a product of rounded decays. Every exponent is at most zero; underflow is right. Entries hold `lw` rather than its
//! sum since the base, and `L` is summed from the newest entry to the oldest: its error is then relative to itself, where
//! the difference of two sums since the base would lose the digits of a slow decay after a fast one.
//!
//! # The log without decay, [`Undecayed`]
//!
//! With `E[s]` the product of the decays of all tokens up to `s`, `bu = b / E` and `ku = k / E`,
//!
//! ```text
//! S = (S0 + sum_s q[s] bu[s]^T + v[s] ku[s]^T) diag(E[m])
//! step:     q = S a;  E = E + E expm1(lw);  append (q, v, b / E, k / E);  y = S r
//! ```
//!
//! What an entry adds does not change with the tokens after it, so that a kernel adds the entries to `S0` in registers, in
//! the same way whether they come from memory or were just made. A product of `m` rounded decays is off by `m` units or
//! two, as the state itself is that is multiplied at every token; the decays between two tokens are `E[t] / E[s]`, in
//! which the errors of those before `s` cancel. `E` is at least `exp(-0.61 m)`: 3.7e-9 after 32 tokens.
//!
//! # The dense delta, [`step_delta`]
//!
//! ```text
//! S = S0 diag(gamma) + D        gamma = exp(sum_s lw[s])
//! step:     q = S a;  D = D diag(exp(lw)) + q b^T + v k^T;  gamma = gamma * exp(lw);  y = S r
//! ```
//!
//! Also exact, but `D` is as large as the state and is read and written at every token: it saves nothing but the base,
//! which any number of sequences may share for as long as they live. `gamma` too is kept as its logarithm.

use std::ops::Range;

use super::decay::loss;
pub use super::wkv7::{Dims, Inputs};
use crate::Real;

impl<R> Inputs<'_, R> {
    /// The operands of some of the tokens alone, given by their elements.
    ///
    /// # Panics
    ///
    /// If `elements` is out of bounds.
    #[must_use]
    pub fn part(&self, elements: Range<usize>) -> Self {
        let Self { r, lw, k, v, a, b } = *self;
        let [r, lw, k, v, a, b] = [r, lw, k, v, a, b].map(|operand| &operand[elements.clone()]);
        Self { r, lw, k, v, a, b }
    }
}

/// Runs the recurrence over `dims.tokens` tokens, folding after every `capacity` of them and at the end: updates `state`
/// `[H, N, N]`, writes `y` `[T, H, N]`.
///
/// # Panics
///
/// If a slice's length disagrees with `dims`, or an extent or `capacity` is zero.
pub fn wkv7_lazy<R: Real>(dims: Dims, capacity: usize, x: Inputs<'_, R>, state: &mut [R], y: &mut [R]) {
    dims.check(&x, state, y);
    assert!(capacity > 0, "a log has room for at least one token");
    let width = dims.heads * dims.head_size;
    let mut pending = Pending::new(dims.heads, dims.head_size);
    for start in (0..dims.tokens).step_by(capacity) {
        let tokens = capacity.min(dims.tokens - start);
        let at = start * width..(start + tokens) * width;
        pending.step(Dims { tokens, ..dims }, x.part(at.clone()), state, &mut y[at]);
        pending.fold(state);
    }
}

/// What the tokens since the base did to it: the factored log of `H` heads.
#[derive(Clone, Debug, PartialEq)]
pub struct Pending<R> {
    heads: usize,
    head_size: usize,
    q: Vec<R>,
    v: Vec<R>,
    b: Vec<R>,
    k: Vec<R>,
    lw: Vec<R>,
}

impl<R: Real> Pending<R> {
    /// A log without entries.
    ///
    /// # Panics
    ///
    /// If an extent is zero.
    #[must_use]
    pub const fn new(heads: usize, head_size: usize) -> Self {
        assert!(heads > 0 && head_size > 0, "a log is of at least one channel");
        Self { heads, head_size, q: Vec::new(), v: Vec::new(), b: Vec::new(), k: Vec::new(), lw: Vec::new() }
    }

    /// Entries, `m`: one per token since the base.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.q.len() / (self.heads * self.head_size)
    }

    /// Whether the base is the state.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.q.is_empty()
    }

    /// All entries, oldest first: `q`, `v`, `b`, `k` and `lw`, each `[m, H, N]`.
    #[must_use]
    pub fn columns(&self) -> [&[R]; 5] {
        [&self.q, &self.v, &self.b, &self.k, &self.lw]
    }

    /// Bytes allocated for entries.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        let Self { q, v, b, k, lw, .. } = self;
        (q.capacity() + v.capacity() + b.capacity() + k.capacity() + lw.capacity()) * size_of::<R>()
    }

    /// Forgets all but the oldest `len` entries: undoes the later tokens.
    pub fn truncate(&mut self, len: usize) {
        let len = len.min(self.len()) * self.heads * self.head_size;
        for column in self.columns_mut() {
            column.truncate(len);
        }
    }

    /// Runs the recurrence over `dims.tokens` tokens on top of `base` `[H, N, N]`: appends as many entries, writes `y`
    /// `[T, H, N]`.
    ///
    /// # Panics
    ///
    /// If a slice's length disagrees with `dims`, or `dims` with the log.
    pub fn step(&mut self, dims: Dims, x: Inputs<'_, R>, base: &[R], y: &mut [R]) {
        dims.check(&x, base, y);
        assert_eq!((dims.heads, dims.head_size), (self.heads, self.head_size), "the log has other extents");
        let width = dims.heads * dims.head_size;
        let mut q = vec![R::zero(); width];
        for (t, y) in y.chunks_exact_mut(width).enumerate() {
            let token = x.part(t * width..(t + 1) * width);
            self.read(base, token.a, &mut q);
            for (column, row) in self.columns_mut().into_iter().zip([&q, token.v, token.b, token.k, token.lw])
            {
                column.extend_from_slice(row);
            }
            self.read(base, token.r, y);
        }
    }

    /// The state applied to a vector per head, `y = S x`; `x` and `y` are `[H, N]`, `base` is `[H, N, N]`.
    ///
    /// # Panics
    ///
    /// If a slice has another length.
    pub fn read(&self, base: &[R], x: &[R], y: &mut [R]) {
        let n = self.head_size;
        self.check(base);
        assert_eq!((x.len(), y.len()), (self.heads * n, self.heads * n), "a vector is not [H, N]");
        for h in 0..self.heads {
            let (x, y) = (&x[h * n..][..n], &mut y[h * n..][..n]);
            let (of_base, of_entries) = self.logs(h);
            let seen = scaled(x, &of_base);
            for (i, y) in y.iter_mut().enumerate() {
                *y = dot(&base[(h * n + i) * n..][..n], &seen);
            }
            for (s, log) in of_entries.chunks_exact(n).enumerate() {
                let seen = scaled(x, log);
                add_scaled(y, dot(self.row(&self.b, s, h), &seen), self.row(&self.q, s, h));
                add_scaled(y, dot(self.row(&self.k, s, h), &seen), self.row(&self.v, s, h));
            }
        }
    }

    /// The state, `[H, N, N]`.
    ///
    /// # Panics
    ///
    /// If `base` is not `[H, N, N]`.
    #[must_use]
    pub fn materialize(&self, base: &[R]) -> Vec<R> {
        let mut state = base.to_vec();
        self.write(&mut state);
        state
    }

    /// Makes the state the base, `[H, N, N]`, and forgets the entries.
    ///
    /// # Panics
    ///
    /// If `base` is not `[H, N, N]`.
    pub fn fold(&mut self, base: &mut [R]) {
        self.write(base);
        self.truncate(0);
    }

    /// Turns the base into the state.
    ///
    /// A base that is mostly kept gains `expm1(L) S0` in one sum with all that was written, which halves the rounding
    /// error and keeps decays that `exp(L)` is too coarse for (see [`wkv7`](super::wkv7)). A base that is mostly lost
    /// must be scaled: the same sum would leave its rounding error behind.
    fn write(&self, base: &mut [R]) {
        self.check(base);
        if self.is_empty() {
            return;
        }
        let n = self.head_size;
        let mostly_kept = |log: R| log > -R::of(std::f64::consts::LN_2);
        for h in 0..self.heads {
            let (of_base, of_entries) = self.logs(h);
            let factor: Vec<R> =
                of_base.iter().map(|&log| if mostly_kept(log) { loss(log) } else { log.exp() }).collect();
            let decayed = |column: &[R]| -> Vec<R> {
                let rows = of_entries.chunks_exact(n).enumerate();
                rows.flat_map(|(s, log)| scaled(self.row(column, s, h), log)).collect()
            };
            let (b, k) = (decayed(&self.b), decayed(&self.k));
            for i in 0..n {
                let row = &mut base[(h * n + i) * n..][..n];
                let mut sum: Vec<R> = row.iter().zip(&factor).map(|(&s, &factor)| s * factor).collect();
                for s in 0..self.len() {
                    add_scaled(&mut sum, self.row(&self.q, s, h)[i], &b[s * n..][..n]);
                    add_scaled(&mut sum, self.row(&self.v, s, h)[i], &k[s * n..][..n]);
                }
                for j in 0..n {
                    row[j] = if mostly_kept(of_base[j]) { row[j] + sum[j] } else { sum[j] };
                }
            }
        }
    }

    /// `L` of head `h`: of the base, `L[0]` `[N]`, and of each entry, `L[1..=m]` `[m, N]`.
    fn logs(&self, h: usize) -> (Vec<R>, Vec<R>) {
        let (n, m) = (self.head_size, self.len());
        let mut log = vec![R::zero(); n];
        let mut of_entries = vec![R::zero(); m * n];
        for s in (0..m).rev() {
            of_entries[s * n..][..n].copy_from_slice(&log);
            add_scaled(&mut log, R::one(), self.row(&self.lw, s, h));
        }
        (log, of_entries)
    }

    /// Entry `s` of head `h` in a column, `[N]`.
    fn row<'a>(&self, column: &'a [R], s: usize, h: usize) -> &'a [R] {
        &column[(s * self.heads + h) * self.head_size..][..self.head_size]
    }

    const fn columns_mut(&mut self) -> [&mut Vec<R>; 5] {
        [&mut self.q, &mut self.v, &mut self.b, &mut self.k, &mut self.lw]
    }

    fn check(&self, base: &[R]) {
        assert_eq!(base.len(), self.heads * self.head_size * self.head_size, "base is not [H, N, N]");
    }
}

/// Vectors of an entry of [`Undecayed`] where each is written out by itself: `q`, `v`, `b / E`, `k / E` and `E`.
pub const ENTRY: usize = 5;

/// What the tokens since the base did to it, as if none had decayed: see [the module](self).
#[derive(Clone, Debug, PartialEq)]
pub struct Undecayed<R> {
    heads: usize,
    head_size: usize,
    /// Entries, oldest first: `[m, H, N]` each.
    pub q: Vec<R>,
    /// Values.
    pub v: Vec<R>,
    /// `b / E`.
    pub b: Vec<R>,
    /// `k / E`.
    pub k: Vec<R>,
    /// `E` after the last token, `[H, N]`.
    pub since: Vec<R>,
}

impl<R: Real> Undecayed<R> {
    /// A log without entries.
    #[must_use]
    pub fn new(heads: usize, head_size: usize) -> Self {
        let (none, since) = (Vec::new(), vec![R::one(); heads * head_size]);
        Self { heads, head_size, q: none.clone(), v: none.clone(), b: none.clone(), k: none, since }
    }

    /// Runs the recurrence over `dims.tokens` tokens on top of `base` `[H, N, N]`: appends as many entries, writes `y`
    /// `[T, H, N]`.
    ///
    /// # Panics
    ///
    /// If a slice's length disagrees with `dims`, or `dims` with the log.
    pub fn step(&mut self, dims: Dims, x: Inputs<'_, R>, base: &[R], y: &mut [R]) {
        dims.check(&x, base, y);
        assert_eq!((dims.heads, dims.head_size), (self.heads, self.head_size), "the log has other extents");
        let n = self.head_size;
        let mut state = self.sum(base);
        for (t, y) in y.chunks_exact_mut(self.heads * n).enumerate() {
            let token = x.part(t * y.len()..(t + 1) * y.len());
            for h in 0..self.heads {
                let head = h * n..(h + 1) * n;
                let (state, since) = (&mut state[h * n * n..][..n * n], &mut self.since[head.clone()]);
                let decayed =
                    |x: &[R], since: &[R]| x.iter().zip(since).map(|(&x, &e)| x * e).collect::<Vec<_>>();
                let a = decayed(&token.a[head.clone()], since);
                let q: Vec<R> = state.chunks_exact(n).map(|row| dot(row, &a)).collect();
                since.iter_mut().zip(&token.lw[head.clone()]).for_each(|(e, lw)| *e += *e * loss(*lw));
                let undecayed = |x: &[R]| x.iter().zip(&*since).map(|(&x, &e)| x / e).collect::<Vec<_>>();
                let (b, k) = (undecayed(&token.b[head.clone()]), undecayed(&token.k[head.clone()]));
                let (v, r) = (&token.v[head.clone()], decayed(&token.r[head.clone()], since));
                for (i, row) in state.chunks_exact_mut(n).enumerate() {
                    add_scaled(row, q[i], &b);
                    add_scaled(row, v[i], &k);
                    y[h * n + i] = dot(row, &r);
                }
                let columns = [(&mut self.q, &q[..]), (&mut self.v, v), (&mut self.b, &b), (&mut self.k, &k)];
                columns.into_iter().for_each(|(column, row)| column.extend_from_slice(row));
            }
        }
    }

    /// The state, `[H, N, N]`.
    ///
    /// # Panics
    ///
    /// If `base` is not `[H, N, N]`.
    #[must_use]
    pub fn materialize(&self, base: &[R]) -> Vec<R> {
        let (n, mut state) = (self.head_size, self.sum(base));
        for (head, since) in state.chunks_exact_mut(n * n).zip(self.since.chunks_exact(n)) {
            head.chunks_exact_mut(n).for_each(|row| row.iter_mut().zip(since).for_each(|(s, &e)| *s *= e));
        }
        state
    }

    /// `S0`, and what the entries add to it.
    fn sum(&self, base: &[R]) -> Vec<R> {
        let (n, width) = (self.head_size, self.heads * self.head_size);
        assert_eq!(base.len(), width * n, "base is not [H, N, N]");
        let mut state = base.to_vec();
        for at in (0..self.q.len()).step_by(n) {
            let h = at % width / n;
            for i in 0..n {
                let row = &mut state[(h * n + i) * n..][..n];
                add_scaled(row, self.q[at + i], &self.b[at..][..n]);
                add_scaled(row, self.v[at + i], &self.k[at..][..n]);
            }
        }
        state
    }
}

/// Runs the recurrence over `dims.tokens` tokens on top of `base` `[H, N, N]`: updates `log_gamma` `[H, N]` and `delta`
/// `[H, N, N]`, writes `y` `[T, H, N]`. Before the first token both are zero.
///
/// # Panics
///
/// If a slice's length disagrees with `dims`.
pub fn step_delta<R: Real>(
    dims: Dims,
    x: Inputs<'_, R>,
    base: &[R],
    log_gamma: &mut [R],
    delta: &mut [R],
    y: &mut [R],
) {
    dims.check(&x, base, y);
    assert_eq!(delta.len(), dims.state_len(), "delta is not [H, N, N]");
    assert_eq!(log_gamma.len(), dims.heads * dims.head_size, "gamma is not [H, N]");
    let (n, width) = (dims.head_size, dims.heads * dims.head_size);
    let mut q = vec![R::zero(); width];
    for t in 0..dims.tokens {
        let token = x.part(t * width..(t + 1) * width);
        read_delta(base, log_gamma, delta, token.a, &mut q);
        for h in 0..dims.heads {
            let head = token.part(h * n..(h + 1) * n);
            for i in 0..n {
                let row = &mut delta[(h * n + i) * n..][..n];
                for j in 0..n {
                    row[j] += row[j] * loss(head.lw[j]) + q[h * n + i] * head.b[j] + head.v[i] * head.k[j];
                }
            }
        }
        add_scaled(log_gamma, R::one(), token.lw);
        read_delta(base, log_gamma, delta, token.r, &mut y[t * width..][..width]);
    }
}

/// The state applied to a vector per head, `y = (S0 diag(gamma) + D) x`; `log_gamma`, `x` and `y` are `[H, N]`, `base`
/// and `delta` are `[H, N, N]`.
///
/// # Panics
///
/// If the slices disagree in extents.
pub fn read_delta<R: Real>(base: &[R], log_gamma: &[R], delta: &[R], x: &[R], y: &mut [R]) {
    let n = head_size(base, log_gamma, delta);
    assert_eq!((x.len(), y.len()), (log_gamma.len(), log_gamma.len()), "a vector is not [H, N]");
    let seen = scaled(x, log_gamma);
    for (row, y) in y.iter_mut().enumerate() {
        let (at, head) = (row * n..(row + 1) * n, row / n * n..(row / n + 1) * n);
        *y = dot(&base[at.clone()], &seen[head.clone()]) + dot(&delta[at], &x[head]);
    }
}

/// The state, `S0 diag(gamma) + D` `[H, N, N]`.
///
/// # Panics
///
/// If the slices disagree in extents.
#[must_use]
pub fn materialize_delta<R: Real>(base: &[R], log_gamma: &[R], delta: &[R]) -> Vec<R> {
    let n = head_size(base, log_gamma, delta);
    let gamma: Vec<R> = log_gamma.iter().map(|log| log.exp()).collect();
    let place = |at: usize| base[at] * gamma[at / (n * n) * n + at % n] + delta[at];
    (0..delta.len()).map(place).collect()
}

/// `N`, from `[H, N, N]`, `[H, N]`, `[H, N, N]`.
fn head_size<R>(base: &[R], log_gamma: &[R], delta: &[R]) -> usize {
    let n = delta.len().checked_div(log_gamma.len()).unwrap_or(0);
    assert_eq!(
        (base.len(), delta.len()),
        (delta.len(), log_gamma.len() * n),
        "base or delta is not [H, N, N]"
    );
    n
}

/// `x * exp(log)`.
fn scaled<R: Real>(x: &[R], log: &[R]) -> Vec<R> {
    x.iter().zip(log).map(|(&x, &log)| x * log.exp()).collect()
}

fn dot<R: Real>(a: &[R], b: &[R]) -> R {
    a.iter().zip(b).map(|(&a, &b)| a * b).sum()
}

fn add_scaled<R: Real>(sum: &mut [R], factor: R, x: &[R]) {
    for (sum, &x) in sum.iter_mut().zip(x) {
        *sum += factor * x;
    }
}
