//! All that happens in a head between the projections and the output layer, of one sequence.
//!
//! ```text
//! lw  = log_decay(w0 + w_low up_w)             a, v and g likewise, see their operations
//! eta = sigmoid(a0 + a_low up_a)
//! v   = v + (v_first - v) sigmoid(v0 + v_low up_v)          v_first = v in the first layer
//! kappa, k, the state update, and out = readout(..) gated by g_low up_g
//! ```

use super::add::add;
use super::linear::Linear;
use super::{decay, kappa, learning_rate, readout, value_residual, wkv7};
use crate::Real;

/// The weights that the heads share with no other part.
#[derive(Clone, Copy, Debug)]
pub struct Weights<'a, R, M> {
    /// Second factor `[D, rank]` and bias `[D]` of the decay adapter.
    pub w: (&'a M, &'a [R]),
    /// Of the learning rate adapter.
    pub a: (&'a M, &'a [R]),
    /// Of the value residual adapter; none in the first layer.
    pub v: Option<(&'a M, &'a [R])>,
    /// Second factor of the gate adapter.
    pub g: &'a M,
    /// Scale of the removal key, `[D]`.
    pub k_k: &'a [R],
    /// Key modulation, `[D]`.
    pub k_a: &'a [R],
    /// Bonus weight, `[D]`.
    pub r_k: &'a [R],
    /// Gain of the group norm, `[D]`.
    pub gain: &'a [R],
    /// Bias of the group norm, `[D]`.
    pub bias: &'a [R],
}

/// What the projections and the adapters' first factors made of the tokens.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, R> {
    /// Receptance, `[T, D]`.
    pub r: &'a [R],
    /// Key, `[T, D]`.
    pub k: &'a [R],
    /// Value, `[T, D]`.
    pub v: &'a [R],
    /// Low ranks of the decay, after its tanh; `[T, rank]`.
    pub w_low: &'a [R],
    /// Low ranks of the learning rate.
    pub a_low: &'a [R],
    /// Low ranks of the value residual; empty in the first layer.
    pub v_low: &'a [R],
    /// Low ranks of the gate, after its sigmoid.
    pub g_low: &'a [R],
}

/// Runs one sequence's tokens through the heads: `state` `[H, N, N]` moves on, `out` `[T, D]` is the gated readout.
/// `v_first` `[T, D]` is written in the first layer and read in the others.
///
/// # Panics
///
/// If a slice's length disagrees.
pub fn time_mix<R: Real, M: Linear<R>>(
    dims: wkv7::Dims,
    weights: Weights<'_, R, M>,
    x: Inputs<'_, R>,
    v_first: &mut [R],
    state: &mut [R],
    out: &mut [R],
) {
    let up = |(up, bias): (&M, &[R]), low: &[R]| {
        let mut y = vec![R::zero(); out.len()];
        up.apply(low, &mut y);
        add(bias, &mut y);
        y
    };
    let (mut lw, mut a) = (up(weights.w, x.w_low), up(weights.a, x.a_low));
    let gate = up((weights.g, &[]), x.g_low);
    let mut v = x.v.to_vec();
    match weights.v {
        Some(adapter) => value_residual::value_residual(v_first, &up(adapter, x.v_low), &mut v),
        None => v_first.copy_from_slice(&v),
    }
    decay::log_decay(&mut lw);
    learning_rate::learning_rate(&mut a);
    let (mut k, mut b) = (x.k.to_vec(), vec![R::zero(); x.k.len()]);
    kappa::kappa(dims.head_size, &k, weights.k_k, &mut b);
    learning_rate::modulate_key(&a, weights.k_a, &mut k);
    learning_rate::directions(&mut a, &mut b);
    let mut y = vec![R::zero(); out.len()];
    wkv7::wkv7(dims, wkv7::Inputs { r: x.r, lw: &lw, k: &k, v: &v, a: &a, b: &b }, state, &mut y);
    let (gain, bias, r_k) = (weights.gain, weights.bias, weights.r_k);
    readout::readout(
        dims.head_size,
        readout::Inputs { y: &y, r: x.r, k: &k, v: &v, gate: &gate, gain, bias, r_k },
        out,
    );
}
