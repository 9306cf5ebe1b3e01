//! What the tests of `time_mix` and `time_mix_resident` share: tokens of heads, what the twin makes of them, and in what
//! intervals the kernels' operands may be.

use rwkv_core::Real as _;
use rwkv_core::config::Ranks;
use rwkv_core::ops::decay::DECAY_SCALE;
use rwkv_core::ops::kappa::KAPPA_EPS;
use rwkv_core::ops::linear::Matrix;
use rwkv_core::ops::readout::{self, GN_EPS};
use rwkv_core::ops::time_mix::{Inputs, Weights};
use rwkv_core::rng::SplitMix64;

use super::intervals::{Halves, Interval, Sum, below, exact};
use super::testing::{bits as words, wide};
use super::time_mix::HEAD_SIZE as N;

/// Operands of one call.
pub(super) struct Heads {
    pub(super) rows: usize,
    pub(super) heads: usize,
    pub(super) ranks: Ranks,
    /// Of a row of `inputs`.
    pub(super) stride: usize,
    /// `[T, P]`, NaN where nothing is.
    pub(super) inputs: Vec<f32>,
    /// `[ranks, D]`.
    pub(super) weights: Halves,
    /// `[8, D]`.
    pub(super) vectors: Vec<f32>,
    /// `[T, D]`, NaN in the first layer.
    pub(super) v_first: Vec<f32>,
}

/// What a row comes to in a head, before the state is asked.
pub(super) struct Operands {
    pub(super) r: Vec<Interval>,
    pub(super) decay: Vec<Interval>,
    pub(super) eta: Vec<Interval>,
    pub(super) key: Vec<Interval>,
    pub(super) value: Vec<Interval>,
    /// Kappa before it is normalised, and what normalises it.
    pub(super) removal: Vec<Interval>,
    pub(super) unit: Interval,
    bonus: Interval,
    gain: Vec<Interval>,
    bias: Vec<Interval>,
    gate: Vec<Interval>,
}

/// The sum of as many terms as a head has channels, in any order.
pub(super) fn total(terms: impl Iterator<Item = Interval>) -> Interval {
    terms.collect::<Sum>().by(N)
}

impl Heads {
    /// Operands of the sizes that trained models have, and of all that the operation is defined for; rows have up to
    /// `more` elements that nothing reads.
    pub(super) fn draw(rng: &mut SplitMix64, rows: usize, heads: usize, ranks: Ranks, more: u32) -> Self {
        let (width, rank) = (heads * N, ranks.w + ranks.a + ranks.v + ranks.g);
        let stride = 3 * width + rank + below(rng, more) as usize;
        let mut x = Vec::new();
        for _ in 0..rows {
            // Receptances; keys of any size, zero, and of less than kappa's eps; values.
            for sizes in [[1.0, 5.0, 1.0, 5.0], [5.0, 1e-9, 0.0, 1e-14], [1.0, 10.0, 1.0, 10.0]] {
                for _ in 0..heads {
                    let size = sizes[below(rng, 4) as usize];
                    x.extend((0..N).map(|_| size * rng.normal()));
                }
            }
            // After tanh, nothing, nothing and sigmoid.
            x.extend((0..ranks.w).map(|_| rng.uniform(-1.0, 1.0)));
            x.extend((0..ranks.a + ranks.v).map(|_| rng.normal()));
            x.extend((0..ranks.g).map(|_| rng.uniform(0.0, 1.0)));
            x.resize(x.len().next_multiple_of(stride), f32::NAN);
        }
        // Decays of every size: none, slower than an f32 near 1 can tell, slow, the fastest, any.
        let decay = |rng: &mut SplitMix64| match below(rng, 8) {
            0 => -200.0,
            1 => -20.0,
            2 => -13.0,
            3 => 20.0,
            _ => rng.uniform(-6.0, 6.0),
        };
        let mut vectors: Vec<f32> = (0..width).map(|_| decay(rng)).collect();
        let ranges =
            [(-4.0, 4.0), (-4.0, 4.0), (0.2, 1.5), (-0.5, 2.0), (-1.0, 1.0), (-2.0, 2.0), (-1.0, 1.0)];
        for (lo, hi) in ranges {
            vectors.extend((0..width).map(|_| rng.uniform(lo, hi)));
        }
        let v_first = match ranks.v {
            0 => vec![f32::NAN; rows * width],
            _ => (0..rows * width).map(|_| 3.0 * rng.normal()).collect(),
        };
        let weights = Halves::draw(rng, rank * width);
        Self { rows, heads, ranks, stride, inputs: x, weights, vectors, v_first }
    }

    /// A head of a state, `[key, value]`.
    pub(super) fn draw_state(rng: &mut SplitMix64) -> Vec<f32> {
        let size = [0.0, 1.0, 180.0, 4e4][below(rng, 4) as usize];
        // One in four answers nearly the same in all channels: a mean of squares would keep nothing of their variance.
        let alike = below(rng, 4) == 0;
        let mut head = vec![0.0; N * N];
        for values in head.chunks_mut(N) {
            let value = rng.uniform(-size, size);
            values.fill_with(|| match alike {
                true => value * rng.uniform(0.9999, 1.0001),
                false => rng.uniform(-size, size),
            });
        }
        head
    }

    pub(super) fn width(&self) -> usize {
        self.heads * N
    }

    fn vector(&self, of: usize) -> &[f32] {
        &self.vectors[of * self.width()..][..self.width()]
    }

    /// Where the ranks of w, a, v and g begin, and where they end.
    fn starts(&self) -> [usize; 5] {
        let Ranks { w, a, v, g } = self.ranks;
        [0, w, w + a, w + a + v, w + a + v + g]
    }

    /// What adapter `of` has of a row.
    fn low_rank(&self, row: usize, of: usize) -> &[f32] {
        let [start, end] = [of, of + 1].map(|i| row * self.stride + 3 * self.width() + self.starts()[i]);
        &self.inputs[start..end]
    }

    /// `r`, `k` and `v` of a row.
    fn projected(&self, row: usize, of: usize) -> &[f32] {
        &self.inputs[row * self.stride + of * self.width()..][..self.width()]
    }

    /// The adapters' products, rounded once.
    pub(super) fn up(&self) -> Vec<u32> {
        let (weights, width) = (self.weights.values(), self.width());
        let mut up = Vec::new();
        for (row, of) in (0..self.rows).flat_map(|row| (0..4).map(move |of| (row, of))) {
            let product = |o: usize| {
                let low = self.low_rank(row, of).iter().zip(self.starts()[of]..);
                low.map(|(&low, r)| f64::from(low) * f64::from(weights[r * width + o])).sum::<f64>()
            };
            // There is none of v in the first layer.
            let absent = self.low_rank(row, of).is_empty();
            up.extend((0..width).map(|o| if absent { f32::NAN } else { f32::of(product(o)) }));
        }
        words(&up)
    }

    /// Lets the twin run over one row, from its operands, `v_first` and an output to be written; gives both back, the
    /// output first.
    pub(super) fn twin(
        &self,
        row: usize,
        run: impl FnOnce(Weights<'_, f64, Matrix<f32>>, Inputs<'_, f64>, &mut [f64], &mut [f64]),
    ) -> [Vec<f64>; 2] {
        let (weights, starts, width) = (self.weights.values(), self.starts(), self.width());
        let factor = |of: usize| {
            let rows = &weights[starts[of] * width..starts[of + 1] * width];
            let rank = rows.len() / width;
            let swapped = (0..width).flat_map(|o| (0..rank).map(move |r| r * width + o)).map(|at| rows[at]);
            Matrix::new(rank.max(1), swapped.collect())
        };
        let factors = [0, 1, 2, 3].map(factor);
        let vectors = [0, 1, 2, 3, 4, 5, 6, 7].map(|of| wide(self.vector(of)));
        let [w0, a0, v0, k_k, k_a, r_k, gain, bias] = &vectors;
        let of = Weights {
            w: (&factors[0], w0),
            a: (&factors[1], a0),
            v: (self.ranks.v > 0).then_some((&factors[2], v0)),
            g: &factors[3],
            k_k,
            k_a,
            r_k,
            gain,
            bias,
        };
        let [r, k, v] = [0, 1, 2].map(|of| wide(self.projected(row, of)));
        let [w_low, a_low, v_low, g_low] = [0, 1, 2, 3].map(|of| wide(self.low_rank(row, of)));
        let x = Inputs { r: &r, k: &k, v: &v, w_low: &w_low, a_low: &a_low, v_low: &v_low, g_low: &g_low };
        let (mut v_first, mut out) = (wide(&self.v_first[row * width..][..width]), vec![f64::NAN; width]);
        run(of, x, &mut v_first, &mut out);
        [out, v_first]
    }

    /// The output `[D]` of a row of which a kernel leaves the norm, `[3, D]`: the twin's readout of the answers, with a bonus of
    /// one times what it adds.
    pub(super) fn finished(&self, left: &[f32]) -> Vec<f32> {
        let width = self.width();
        let [y, v, gate] = [0, 1, 2].map(|of| wide(&left[of * width..][..width]));
        let [gain, bias] = [6, 7].map(|of| wide(self.vector(of)));
        let one: Vec<f64> = (0..width).map(|at| f64::from(u8::from(at % N == 0))).collect();
        let mut out = vec![f64::NAN; width];
        let x = readout::Inputs {
            y: &y,
            r: &one,
            k: &one,
            v: &v,
            gate: &gate,
            gain: &gain,
            bias: &bias,
            r_k: &one,
        };
        readout::readout(N, x, &mut out);
        out.into_iter().map(f32::of).collect()
    }

    /// The operands of a row in a head.
    ///
    /// An adapter's product passes at most as many additions as there are ranks, a term of a sum over the channels of a
    /// head as many as there are channels, in any order.
    pub(super) fn operands(&self, row: usize, head: usize) -> Operands {
        let own = head * N..(head + 1) * N;
        let (weights, width) = (self.weights.values(), self.width());
        let lora = |of: usize, i: usize| {
            let low = self.low_rank(row, of).iter().zip(self.starts()[of]..);
            let weight = |r: usize| Interval::exact(weights[r * width + own.start + i]);
            low.map(|(&low, r)| Interval::exact(low) * weight(r))
                .collect::<Sum>()
                .by(self.low_rank(row, of).len())
        };
        let vectors = [0, 1, 2, 3, 4, 5, 6, 7].map(|of| exact(&self.vector(of)[own.clone()]));
        let [w0, a0, v0, k_k, k_a, r_k, gain, bias] = vectors;
        let [r, k, v] = [0, 1, 2].map(|of| exact(&self.projected(row, of)[own.clone()]));
        let v_first = exact(&self.v_first[row * width..][own.clone()]);
        let each = |f: &dyn Fn(usize) -> Interval| (0..N).map(f).collect::<Vec<_>>();
        let one = Interval::exact(1.0);

        let scale = Interval::constant(-DECAY_SCALE);
        let decay = each(&|j| (scale * (w0[j] + lora(0, j)).sigmoid()).exp_m1());
        let eta = each(&|j| (a0[j] + lora(1, j)).sigmoid());
        let key = each(&|j| k[j] * (one + (eta[j] - one) * k_a[j]));
        let value = each(&|i| match self.ranks.v {
            0 => v[i],
            _ => v[i] + (v_first[i] - v[i]) * (v0[i] + lora(2, i)).sigmoid(),
        });
        let removal = each(&|j| k[j] * k_k[j]);
        let norm = total(removal.iter().map(|u| u.square())).sqrt();
        let unit = norm.max(Interval::constant(KAPPA_EPS)).recip();
        let bonus = total((0..N).map(|j| r[j] * key[j] * r_k[j]));
        let gate = each(&|i| lora(3, i));
        Operands { r, decay, eta, key, value, removal, unit, bonus, gain, bias, gate }
    }
}

impl Operands {
    /// What the state's answer comes to.
    pub(super) fn out(&self, y: &[Interval]) -> Vec<Interval> {
        let mean = total(y.iter().copied()) / N;
        let variance = total(y.iter().map(|&y| (y - mean).square())).max(Interval::ZERO) / N;
        let scale = (variance + Interval::constant(GN_EPS)).inverse_sqrt();
        let normed = |i: usize| (y[i] - mean) * scale * self.gain[i] + self.bias[i];
        (0..N).map(|i| (normed(i) + self.bonus * self.value[i]) * self.gate[i]).collect()
    }

    /// The state `[key, value]` after the row, from before it, written at every token.
    pub(super) fn after(&self, state: &[Interval]) -> Vec<Interval> {
        let mut after = state.to_vec();
        for i in 0..N {
            let q = total((0..N).map(|j| state[j * N + i] * self.removal[j])) * self.unit;
            for j in 0..N {
                let s = state[j * N + i];
                let kappa = self.removal[j] * self.unit;
                after[j * N + i] =
                    s + (s * self.decay[j] - q * (kappa * self.eta[j]) + self.value[i] * self.key[j]);
            }
        }
        after
    }

    /// What a state `[key, value]` answers.
    pub(super) fn answers(&self, state: &[Interval]) -> Vec<Interval> {
        (0..N).map(|i| total((0..N).map(|j| state[j * N + i] * self.r[j]))).collect()
    }
}

/// States of heads, between `[key, value]` and `[value, key]`, either way.
pub(super) fn swapped<T: Copy>(state: &[T]) -> Vec<T> {
    let swap = |head: &[T]| (0..N * N).map(|at| head[at % N * N + at / N]).collect::<Vec<_>>();
    state.chunks(N * N).flat_map(swap).collect()
}

/// An element of a buffer that is not read.
pub(super) const NAN: [u32; 4] = [0x7FFF_FFFF; 4];
