//! All that happens in a head, as [`time_mix`](super::time_mix), on a state that is written seldom.

use super::linear::Linear;
use super::time_mix::{Inputs, Weights, time_mix_with};
use super::wkv7;
use super::wkv7_lazy::Undecayed;
use crate::Real;

/// Runs one sequence's tokens through the heads: `pending` is appended to, on top of `base` `[H, N, N]`, and `out` `[T, D]`
/// is the gated readout. `v_first` `[T, D]` is written in the first layer and read in the others.
///
/// # Panics
///
/// If a slice's length disagrees.
pub fn time_mix_resident<R: Real, M: Linear<R>>(
    dims: wkv7::Dims,
    weights: Weights<'_, R, M>,
    x: Inputs<'_, R>,
    v_first: &mut [R],
    base: &[R],
    pending: &mut Undecayed<R>,
    out: &mut [R],
) {
    time_mix_with(dims, weights, x, v_first, out, |inputs, y| pending.step(dims, inputs, base, y));
}
