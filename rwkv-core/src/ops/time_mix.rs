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
    time_mix_with(dims, weights, x, v_first, out, |inputs, y| wkv7::wkv7(dims, inputs, state, y));
}

/// As [`time_mix`], with the state update left to the caller: from its operands to its output, each `[T, D]`.
pub(super) fn time_mix_with<R: Real, M: Linear<R>>(
    dims: wkv7::Dims,
    weights: Weights<'_, R, M>,
    x: Inputs<'_, R>,
    v_first: &mut [R],
    out: &mut [R],
    update: impl FnOnce(wkv7::Inputs<'_, R>, &mut [R]),
) {
    let Operands { lw, k, v, a, b, gate } = operands(dims.head_size, &weights, x, v_first);
    let mut y = vec![R::zero(); out.len()];
    update(wkv7::Inputs { r: x.r, lw: &lw, k: &k, v: &v, a: &a, b: &b }, &mut y);
    let (gain, bias, r_k) = (weights.gain, weights.bias, weights.r_k);
    readout::readout(
        dims.head_size,
        readout::Inputs { y: &y, r: x.r, k: &k, v: &v, gate: &gate, gain, bias, r_k },
        out,
    );
}

/// What the state update reads besides the receptance, and the gate of what it answers; each `[T, D]`.
#[derive(Clone, Debug)]
pub struct Operands<R> {
    /// Logarithm of the decay.
    pub lw: Vec<R>,
    /// Key.
    pub k: Vec<R>,
    /// Value.
    pub v: Vec<R>,
    /// `-kappa`.
    pub a: Vec<R>,
    /// `kappa eta`.
    pub b: Vec<R>,
    /// Gate.
    pub gate: Vec<R>,
}

/// What precedes the state update in [`time_mix`], for heads of `head_size` channels.
///
/// # Panics
///
/// If a slice's length disagrees.
pub fn operands<R: Real, M: Linear<R>>(
    head_size: usize,
    weights: &Weights<'_, R, M>,
    x: Inputs<'_, R>,
    v_first: &mut [R],
) -> Operands<R> {
    let up = |(up, bias): (&M, &[R]), low: &[R]| {
        let mut y = vec![R::zero(); x.k.len()];
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
    kappa::kappa(head_size, &k, weights.k_k, &mut b);
    learning_rate::modulate_key(&a, weights.k_a, &mut k);
    learning_rate::directions(&mut a, &mut b);
    Operands { lw, k, v, a, b, gate }
}

#[cfg(test)]
mod tests {
    use super::{Inputs, Weights, time_mix};
    use crate::compare::max_abs;
    use crate::ops::decay::DECAY_SCALE;
    use crate::ops::kappa::KAPPA_EPS;
    use crate::ops::linear::Matrix;
    use crate::ops::readout::GN_EPS;
    use crate::ops::wkv7::Dims;
    use crate::real::sigmoid;
    use crate::rng::SplitMix64;

    const DIMS: Dims = Dims { tokens: 3, heads: 2, head_size: 4 };
    const WIDTH: usize = DIMS.heads * DIMS.head_size;
    /// Of w, a, v and g.
    const RANKS: [usize; 4] = [3, 1, 2, 5];

    /// What the weights and inputs are, by name.
    struct Case {
        ups: [Matrix<f64>; 4],
        low: [Vec<f64>; 4],
        /// `w0 a0 v0 k_k k_a r_k`, gain and bias, each `[D]`.
        vectors: [Vec<f64>; 8],
        /// `r k v` and the values of the first layer, each `[T, D]`.
        rows: [Vec<f64>; 4],
        state: Vec<f64>,
    }

    impl Case {
        fn draw() -> Self {
            let mut rng = SplitMix64::new(5);
            let mut draw = |len| (0..len).map(|_| f64::from(rng.normal())).collect::<Vec<_>>();
            let ups = RANKS.map(|rank| Matrix::new(rank, draw(WIDTH * rank)));
            let low = RANKS.map(|rank| draw(DIMS.tokens * rank));
            let vectors = [(); 8].map(|()| draw(WIDTH));
            let mut rows = [(); 4].map(|()| draw(DIMS.vector_len()));
            rows[1][4..8].fill(0.0); // a zero key has no direction
            Self { ups, low, vectors, rows, state: draw(DIMS.state_len()) }
        }

        /// Values of the first layer, state and output, as the operation has them.
        fn run(&self, first_layer: bool) -> [Vec<f64>; 3] {
            let ([w, a, v, g], [w0, a0, v0, k_k, k_a, r_k, gain, bias]) = (&self.ups, &self.vectors);
            let v = (!first_layer).then_some((v, &v0[..]));
            let weights = Weights { w: (w, w0), a: (a, a0), v, g, k_k, k_a, r_k, gain, bias };
            let ([r, k, v, v_first], [w_low, a_low, v_low, g_low]) = (&self.rows, &self.low);
            let v_low: &[f64] = if first_layer { &[] } else { v_low };
            let (mut v_first, mut state) = (v_first.clone(), self.state.clone());
            let mut out = vec![f64::NAN; DIMS.vector_len()];
            let x = Inputs { r, k, v, w_low, a_low, v_low, g_low };
            time_mix(DIMS, weights, x, &mut v_first, &mut state, &mut out);
            [v_first, state, out]
        }

        /// The same by the formulas of the model, channel by channel, without any other operation.
        fn by_hand(&self, first_layer: bool) -> [Vec<f64>; 3] {
            let n = DIMS.head_size;
            let [w0, a0, v0, k_k, k_a, r_k, gain, bias] = &self.vectors;
            let [r, k0, v0_, _] = &self.rows;
            let (mut v_first, mut state) = (self.rows[3].clone(), self.state.clone());
            let mut out = vec![f64::NAN; DIMS.vector_len()];
            for (t, h) in (0..DIMS.tokens).flat_map(|t| (0..DIMS.heads).map(move |h| (t, h))) {
                let channels = h * n..(h + 1) * n;
                let at = |c: usize| t * WIDTH + c;
                let up = |of: usize, c: usize| {
                    let rank = RANKS[of];
                    let (weights, low) = (&self.ups[of].weights()[c * rank..], &self.low[of][t * rank..]);
                    (0..rank).map(|i| weights[i] * low[i]).sum::<f64>()
                };
                let decay = |c: usize| (-DECAY_SCALE * sigmoid(w0[c] + up(0, c))).exp();
                let eta = |c: usize| sigmoid(a0[c] + up(1, c));
                let own = |c: usize| v0_[at(c)];
                let mut v = |c: usize| {
                    if first_layer {
                        v_first[at(c)] = own(c);
                        return own(c);
                    }
                    own(c) + (v_first[at(c)] - own(c)) * sigmoid(v0[c] + up(2, c))
                };
                let v: Vec<_> = channels.clone().map(&mut v).collect();
                let norm = channels.clone().map(|c| (k0[at(c)] * k_k[c]).powi(2)).sum::<f64>().sqrt();
                let kappa = |c: usize| k0[at(c)] * k_k[c] / norm.max(KAPPA_EPS);
                let k = |c: usize| k0[at(c)] * (1.0 + (eta(c) - 1.0) * k_a[c]);
                let mut y = Vec::new();
                for i in 0..n {
                    let row = &mut state[(h * n + i) * n..][..n];
                    let q: f64 = row.iter().zip(channels.clone()).map(|(s, c)| s * -kappa(c)).sum();
                    for (s, c) in row.iter_mut().zip(channels.clone()) {
                        *s = *s * decay(c) + q * kappa(c) * eta(c) + v[i] * k(c);
                    }
                    y.push(row.iter().zip(channels.clone()).map(|(s, c)| s * r[at(c)]).sum::<f64>());
                }
                let mean = y.iter().sum::<f64>() / n as f64;
                let variance = y.iter().map(|y| (y - mean).powi(2)).sum::<f64>() / n as f64;
                let bonus: f64 = channels.clone().map(|c| r[at(c)] * k(c) * r_k[c]).sum();
                for (i, c) in channels.enumerate() {
                    let normed = (y[i] - mean) / (variance + GN_EPS).sqrt() * gain[c] + bias[c];
                    out[at(c)] = (normed + bonus * v[i]) * up(3, c);
                }
            }
            [v_first, state, out]
        }
    }

    #[test]
    fn is_what_the_formulas_of_the_model_say() {
        let case = Case::draw();
        for first_layer in [true, false] {
            let (got, want) = (case.run(first_layer), case.by_hand(first_layer));
            for ((got, want), what) in got.iter().zip(&want).zip(["v_first", "state", "out"]) {
                let agree = max_abs(got, want, 1e-11);
                assert!(agree.is_ok(), "{what}, first layer {first_layer}: {agree:?}");
            }
            let kept = if first_layer { &case.rows[2] } else { &case.rows[3] };
            assert_eq!(&got[0], kept, "v_first is written in the first layer and kept in the others");
        }
    }
}
