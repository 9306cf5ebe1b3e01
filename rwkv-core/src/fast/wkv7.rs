//! The CPU executor's state update. Twin: [`ops::wkv7`], bit for bit.
//!
//! Each head of each segment is a task. The head's state is turned to `[key, value]` for the length of the segment, so
//! that the value rows, which never interact, are lanes and every sum over keys stays inside its lane, in the order of
//! the reference.
//!
//! There is no form by [chunks](ops::wkv7_chunked) here. A head's 16 KiB of state stay in the first-level cache and heads are
//! enough for all threads, so that nothing is waited for, neither memory nor the token before; and by chunks of 16 a token is
//! 24,600 multiplications and additions where it is 20,500 here. Tried with vectors, on a Xeon with AVX-512, both ways with
//! fused multiply-adds: 0.82 us a token and head by chunks, 0.48 token by token.

use pulp::Arch;
use rayon::prelude::*;

use crate::model::WkvSegment;
use crate::ops;
use crate::ops::decay::loss;
use crate::ops::wkv7::{Dims, Inputs};

/// One head of one segment.
struct Head<'a> {
    dims: Dims,
    inputs: Inputs<'a, f32>,
    head: usize,
    state: &'a mut [f32],
    /// The head's part of each token's output.
    y: Vec<&'a mut [f32]>,
}

/// Runs the recurrence of every segment.
///
/// # Panics
///
/// If a segment's slices disagree with its extents.
pub fn wkv7(segments: &mut [WkvSegment<'_, f32>]) {
    let mut heads = Vec::new();
    for s in segments {
        s.dims.check(&s.inputs, s.state, s.y);
        let n = s.dims.head_size;
        let first = heads.len();
        heads.extend(s.state.chunks_exact_mut(n * n).enumerate().map(|(head, state)| Head {
            dims: s.dims,
            inputs: s.inputs,
            head,
            state,
            y: Vec::with_capacity(s.dims.tokens),
        }));
        for token in s.y.chunks_exact_mut(n * s.dims.heads) {
            for (head, y) in heads[first..].iter_mut().zip(token.chunks_exact_mut(n)) {
                head.y.push(y);
            }
        }
    }
    heads.into_par_iter().for_each(|head| match head.dims.head_size {
        64 => Arch::new().dispatch(
            #[inline(always)]
            || head.run::<64>(),
        ),
        128 => Arch::new().dispatch(
            #[inline(always)]
            || head.run::<128>(),
        ),
        _ => head.plain(),
    });
}

impl Head<'_> {
    #[inline(always)]
    fn run<const N: usize>(mut self) {
        let (given, _) = self.state.as_chunks_mut::<N>();
        let mut state = [[0.0; N]; N];
        for (i, row) in given.iter().enumerate() {
            for j in 0..N {
                state[j][i] = row[j];
            }
        }
        for t in 0..self.dims.tokens {
            let at = (t * self.dims.heads + self.head) * N;
            let row = |s: &'_ [f32]| -> [f32; N] { std::array::from_fn(|j| s[at + j]) };
            let (r, k, v) = (row(self.inputs.r), row(self.inputs.k), row(self.inputs.v));
            let (a, b) = (row(self.inputs.a), row(self.inputs.b));
            let loss = row(self.inputs.lw).map(loss);
            let mut q = [0.0; N];
            for j in 0..N {
                for i in 0..N {
                    q[i] += state[j][i] * a[j];
                }
            }
            let mut y = [0.0; N];
            for j in 0..N {
                for i in 0..N {
                    let s = &mut state[j][i];
                    *s += *s * loss[j] + q[i] * b[j] + v[i] * k[j];
                    y[i] += *s * r[j];
                }
            }
            self.y[t].copy_from_slice(&y);
        }
        for (i, row) in given.iter_mut().enumerate() {
            for j in 0..N {
                row[j] = state[j][i];
            }
        }
    }

    /// Head sizes that no model has been released with.
    fn plain(mut self) {
        let (n, dims) = (self.dims.head_size, Dims { tokens: 1, heads: 1, ..self.dims });
        for (t, y) in self.y.iter_mut().enumerate() {
            let at = (t * self.dims.heads + self.head) * n;
            let row = |s: &'_ [f32]| s[at..at + n].to_vec();
            let x = self.inputs;
            let [r, lw, k, v, a, b] = [x.r, x.lw, x.k, x.v, x.a, x.b].map(row);
            let x = Inputs { r: &r, lw: &lw, k: &k, v: &v, a: &a, b: &b };
            ops::wkv7::wkv7(dims, x, self.state, y);
        }
    }
}
