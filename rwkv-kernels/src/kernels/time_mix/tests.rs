//! `time_mix.wgsl` against [`rwkv_core::ops::time_mix`] in `f64`.

use std::ops::Range;

use proptest::prelude::*;
use rwkv_core::Real as _;
use rwkv_core::config::Ranks;
use rwkv_core::ops::decay::DECAY_SCALE;
use rwkv_core::ops::kappa::KAPPA_EPS;
use rwkv_core::ops::linear::Matrix;
use rwkv_core::ops::readout::GN_EPS;
use rwkv_core::ops::time_mix::{self as twin, Inputs, Weights};
use rwkv_core::ops::wkv7;
use rwkv_core::rng::SplitMix64;

use super::{Dims, Error, HEAD_SIZE as N, Segment, VARIANTS, lower};
use crate::gpu::{Device, device_for_tests};
use crate::kernels::MAX_GROUPS;
use crate::kernels::intervals::{Halves, Interval, Sum, below, exact, floats, held};
use crate::kernels::testing::{bits as words, wide};
use crate::pipeline::Pipeline;

/// Operands of one call.
struct Case {
    dims: Dims,
    segments: Vec<Segment>,
    /// `[T, P]`, NaN where nothing is.
    inputs: Vec<f32>,
    /// `[ranks, D]`.
    weights: Halves,
    /// `[8, D]`.
    vectors: Vec<f32>,
    /// Records, NaN but for the heads that are read.
    state: Vec<f32>,
    /// `[T, D]`, NaN in the first layer.
    v_first: Vec<f32>,
}

/// What a call changes.
#[derive(Clone)]
struct After {
    state: Vec<f32>,
    v_first: Vec<f32>,
    out: Vec<f32>,
}

impl Case {
    /// Operands of the sizes that trained models have, and of all that the operation is defined for.
    fn draw(heads: usize, lengths: &[usize], ranks: Ranks, seed: u64) -> Self {
        let mut rng = SplitMix64::new(seed);
        let mut some = |n| below(&mut rng, n) as usize;
        let (width, records) = (heads * N, 2 * lengths.len());
        let rank = ranks.w + ranks.a + ranks.v + ranks.g;
        let (inputs, offset) = (3 * width + rank + some(5), some(40));
        let stride = offset + width * N + some(40);

        // Rows of no segment come between; record `s` or `s + segments` is read, and either is written.
        let (mut rows, mut segments) = (some(2), Vec::new());
        for (s, &length) in lengths.iter().enumerate() {
            let [from, to] = [s + lengths.len() * some(2), s + lengths.len() * some(2)];
            let [first, len, from, to] = [rows, length, from, to].map(|n| u32::try_from(n).unwrap());
            segments.push(Segment { first, rows: len, from, to });
            rows += length + some(2);
        }
        let dims = Dims { rows, segments: lengths.len(), heads, head_size: N, ranks, inputs, stride, offset };

        let mut state = vec![f32::NAN; records * stride];
        for segment in &segments {
            for head in state[segment.from as usize * stride + offset..][..width * N].chunks_mut(N * N) {
                let size = [0.0, 1.0, 180.0, 4e4][below(&mut rng, 4) as usize];
                // One in four answers nearly the same in all channels: a mean of squares would keep nothing of
                // their variance.
                let alike = below(&mut rng, 4) == 0;
                for values in head.chunks_mut(N) {
                    let value = rng.uniform(-size, size);
                    values.fill_with(|| match alike {
                        true => value * rng.uniform(0.9999, 1.0001),
                        false => rng.uniform(-size, size),
                    });
                }
            }
        }
        let mut x = Vec::new();
        for _ in 0..rows {
            // Receptances; keys of any size, zero, and of less than kappa's eps; values.
            for sizes in [[1.0, 5.0, 1.0, 5.0], [5.0, 1e-9, 0.0, 1e-14], [1.0, 10.0, 1.0, 10.0]] {
                for _ in 0..heads {
                    let size = sizes[below(&mut rng, 4) as usize];
                    x.extend((0..N).map(|_| size * rng.normal()));
                }
            }
            // After tanh, nothing, nothing and sigmoid.
            x.extend((0..ranks.w).map(|_| rng.uniform(-1.0, 1.0)));
            x.extend((0..ranks.a + ranks.v).map(|_| rng.normal()));
            x.extend((0..ranks.g).map(|_| rng.uniform(0.0, 1.0)));
            x.resize(x.len().next_multiple_of(inputs), f32::NAN);
        }
        // Decays of every size: none, slower than an f32 near 1 can tell, slow, the fastest, any.
        let decay = |rng: &mut SplitMix64| match below(rng, 8) {
            0 => -200.0,
            1 => -20.0,
            2 => -13.0,
            3 => 20.0,
            _ => rng.uniform(-6.0, 6.0),
        };
        let mut vectors: Vec<f32> = (0..width).map(|_| decay(&mut rng)).collect();
        let ranges =
            [(-4.0, 4.0), (-4.0, 4.0), (0.2, 1.5), (-0.5, 2.0), (-1.0, 1.0), (-2.0, 2.0), (-1.0, 1.0)];
        for (lo, hi) in ranges {
            vectors.extend((0..width).map(|_| rng.uniform(lo, hi)));
        }
        let v_first = match ranks.v {
            0 => vec![f32::NAN; rows * width],
            _ => (0..rows * width).map(|_| 3.0 * rng.normal()).collect(),
        };
        let weights = Halves::draw(&mut rng, rank * width);
        Self { dims, segments, inputs: x, weights, vectors, state, v_first }
    }

    fn width(&self) -> usize {
        self.dims.heads * N
    }

    fn vector(&self, of: usize) -> &[f32] {
        &self.vectors[of * self.width()..][..self.width()]
    }

    /// Where the ranks of w, a, v and g begin, and where they end.
    fn starts(&self) -> [usize; 5] {
        let Ranks { w, a, v, g } = self.dims.ranks;
        [0, w, w + a, w + a + v, w + a + v + g]
    }

    /// What adapter `of` has of a row.
    fn low_rank(&self, row: usize, of: usize) -> &[f32] {
        let [start, end] = [of, of + 1].map(|i| row * self.dims.inputs + 3 * self.width() + self.starts()[i]);
        &self.inputs[start..end]
    }

    /// `r`, `k` and `v` of a row.
    fn projected(&self, row: usize, of: usize) -> &[f32] {
        &self.inputs[row * self.dims.inputs + of * self.width()..][..self.width()]
    }

    /// Where a head of a record is.
    fn head(&self, record: u32, head: usize) -> Range<usize> {
        let start = record as usize * self.dims.stride + self.dims.offset + head * N * N;
        start..start + N * N
    }

    /// Heads, output and `v_first` of one row, the state being `state`, `[H, key, value]`.
    fn twin(&self, row: usize, state: &[f32]) -> [Vec<f64>; 3] {
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
            v: (self.dims.ranks.v > 0).then_some((&factors[2], v0)),
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
        let mut state = swapped(&wide(state));
        let (mut v_first, mut out) = (wide(&self.v_first[row * width..][..width]), vec![f64::NAN; width]);
        let dims = wkv7::Dims { tokens: 1, heads: self.dims.heads, head_size: N };
        twin::time_mix(dims, of, x, &mut v_first, &mut state, &mut out);
        [swapped(&state), out, v_first]
    }

    /// State and output of one head after one row, the state being `state`.
    ///
    /// An adapter's product passes at most as many additions as there are ranks, a term of a sum over the channels of a
    /// head as many as there are channels, in any order.
    fn bounds(&self, row: usize, head: usize, state: &[f32]) -> [Vec<Interval>; 2] {
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
        let [w0, a0, v0, k_k, k_a, r_k, gain, bias] = &vectors;
        let [r, k, v] = [0, 1, 2].map(|of| exact(&self.projected(row, of)[own.clone()]));
        let v_first = exact(&self.v_first[row * width..][own.clone()]);
        let each = |f: &dyn Fn(usize) -> Interval| (0..N).map(f).collect::<Vec<_>>();
        let one = Interval::exact(1.0);
        let total = |terms: &mut dyn Iterator<Item = Interval>| terms.collect::<Sum>().by(N);

        let scale = Interval::constant(-DECAY_SCALE);
        let decay = each(&|j| (scale * (w0[j] + lora(0, j)).sigmoid()).exp_m1());
        let eta = each(&|j| (a0[j] + lora(1, j)).sigmoid());
        let key = each(&|j| k[j] * (one + (eta[j] - one) * k_a[j]));
        let value = each(&|i| match self.dims.ranks.v {
            0 => v[i],
            _ => v[i] + (v_first[i] - v[i]) * (v0[i] + lora(2, i)).sigmoid(),
        });
        let u = each(&|j| k[j] * k_k[j]);
        let norm = total(&mut u.iter().map(|u| u.square())).sqrt();
        let unit = norm.max(Interval::constant(KAPPA_EPS)).recip();
        let kappa = each(&|j| u[j] * unit);

        let (mut after, mut y) = (exact(state), Vec::new());
        for i in 0..N {
            let q = total(&mut (0..N).map(|j| after[j * N + i] * u[j])) * unit;
            for j in 0..N {
                let s = after[j * N + i];
                after[j * N + i] = s + (s * decay[j] - q * (kappa[j] * eta[j]) + value[i] * key[j]);
            }
            y.push(total(&mut (0..N).map(|j| after[j * N + i] * r[j])));
        }
        let mean = total(&mut y.iter().copied()) / N;
        let variance = total(&mut y.iter().map(|&y| (y - mean).square())).max(Interval::ZERO) / N;
        let scale = (variance + Interval::constant(GN_EPS)).inverse_sqrt();
        let bonus = total(&mut (0..N).map(|j| r[j] * key[j] * r_k[j]));
        let normed = |i: usize| (y[i] - mean) * scale * gain[i] + bias[i];
        [after, each(&|i| (normed(i) + bonus * value[i]) * lora(3, i))]
    }

    /// One call over `segments`, going on from `before`, of which nothing but what they name may change.
    fn run(&self, of: &Compiled, segments: &[Segment], before: &After) -> After {
        let (params, groups) =
            lower(Dims { segments: segments.len(), ..self.dims }, of.lora_up.then_some(of.lanes)).unwrap();
        let [weights, up] =
            if of.lora_up { [self.weights.words(), NAN.to_vec()] } else { [NAN.to_vec(), self.up()] };
        let buffers = [
            bytemuck::cast_slice(segments).to_vec(),
            words(&self.inputs),
            weights,
            up,
            words(&self.vectors),
            words(&before.state),
            words(&before.v_first),
            words(&before.out),
        ];
        let after = of.device.run(&of.kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
        assert_eq!(after[..5], buffers[..5], "the operands are untouched");
        let [state, v_first, out] = [5, 6, 7].map(|i| floats(&after[i]));
        After { state, v_first, out }
    }

    /// The adapters' products, rounded once.
    fn up(&self) -> Vec<u32> {
        let (weights, width) = (self.weights.values(), self.width());
        let mut up = Vec::new();
        for (row, of) in (0..self.dims.rows).flat_map(|row| (0..4).map(move |of| (row, of))) {
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

    fn before(&self) -> After {
        let out = vec![f32::NAN; self.dims.rows * self.width()];
        After { state: self.state.clone(), v_first: self.v_first.clone(), out }
    }

    /// What may differ between `before` and `after` a call over `segments`, put back.
    fn put_back(&self, segments: &[Segment], before: &After, mut after: After) -> After {
        for segment in segments {
            let heads = self.head(segment.to, 0).start..self.head(segment.to, self.dims.heads).start;
            after.state[heads.clone()].copy_from_slice(&before.state[heads]);
            let rows =
                segment.first as usize * self.width()..(segment.first + segment.rows) as usize * self.width();
            after.out[rows.clone()].copy_from_slice(&before.out[rows.clone()]);
            if self.dims.ranks.v == 0 {
                after.v_first[rows.clone()].copy_from_slice(&before.v_first[rows]);
            }
        }
        after
    }

    /// Runs the first row of every segment, then the second, and so on. Each is within its bounds of the twin, which
    /// goes on from where the kernel is; and all together have the bits of one call.
    fn agrees(&self, of: &Compiled) -> Result<(), TestCaseError> {
        let mut now = self.before();
        let (whole, width) = (self.run(of, &self.segments, &now), self.width());
        let untouched = self.put_back(&self.segments, &now, whole.clone());
        prop_assert!(untouched.bits() == now.bits(), "{}: all else is as it was", of.label);
        for t in 0..self.segments.iter().map(|segment| segment.rows).max().unwrap_or_default() {
            let step = |of: &Segment| Segment {
                first: of.first + t,
                rows: 1,
                from: if t == 0 { of.from } else { of.to },
                to: of.to,
            };
            let steps: Vec<_> = self.segments.iter().filter(|of| t < of.rows).map(step).collect();
            let next = self.run(of, &steps, &now);
            for &Segment { first, from, to, .. } in &steps {
                let row = first as usize;
                let heads = self.head(from, 0).start..self.head(from, self.dims.heads).start;
                let [state, out, v_first] = self.twin(row, &now.state[heads]);
                if self.dims.ranks.v == 0 {
                    prop_assert_eq!(
                        wide(&next.v_first[row * width..][..width]),
                        v_first,
                        "{}: v_first",
                        of.label
                    );
                }
                for head in 0..self.dims.heads {
                    let bounds = self.bounds(row, head, &now.state[self.head(from, head)]);
                    held("twin: state", &state[head * N * N..][..N * N], &bounds[0])?;
                    held("twin: out", &out[head * N..][..N], &bounds[1])?;
                    let what = |of: &str, label| format!("{label}: {of} of row {row}, head {head}");
                    held(&what("state", of.label), &next.state[self.head(to, head)], &bounds[0])?;
                    held(&what("out", of.label), &next.out[row * width + head * N..][..N], &bounds[1])?;
                }
            }
            now = next;
        }
        // A segment of no rows passes its state on.
        let empty: Vec<_> = self.segments.iter().filter(|of| of.rows == 0).copied().collect();
        if !empty.is_empty() {
            now = self.run(of, &empty, &now);
        }
        for segment in &empty {
            let [from, to] = [segment.from, segment.to].map(|record| {
                words(&now.state[self.head(record, 0).start..self.head(record, self.dims.heads).start])
            });
            prop_assert!(from == to, "{}: a state passed on", of.label);
        }
        prop_assert!(now.bits() == whole.bits(), "{}: the bits of one call", of.label);
        Ok(())
    }
}

impl After {
    fn bits(&self) -> [Vec<u32>; 3] {
        [words(&self.state), words(&self.v_first), words(&self.out)]
    }
}

/// States of heads, between `[key, value]` and `[value, key]`, either way.
fn swapped(state: &[f64]) -> Vec<f64> {
    let swap = |head: &[f64]| (0..N * N).map(|at| head[at % N * N + at / N]).collect::<Vec<_>>();
    state.chunks(N * N).flat_map(swap).collect()
}

/// An element of a buffer that is not read.
const NAN: [u32; 4] = [0x7FFF_FFFF; 4];

/// The kernel with its overrides.
struct Compiled {
    device: &'static Device,
    kernel: Pipeline,
    lanes: u32,
    lora_up: bool,
    label: &'static str,
}

/// Workgroups of one group of keys and more; the largest beyond what WebGPU promises.
fn compiled() -> Vec<Compiled> {
    let Some(device) = device_for_tests() else { return Vec::new() };
    let sizes = [64u32, 128, 256, 512].into_iter().filter(|&lanes| {
        let capabilities = device.capabilities();
        // 48 words a lane, and those of a token
        lanes <= capabilities.invocations && 52 * lanes + 3000 <= capabilities.workgroup_bytes
    });
    let with = |(lanes, lora_up): (u32, bool)| {
        let overrides = [("LANES", lanes.into()), ("LORA_UP", u8::from(lora_up).into())];
        let kernel = device.pipeline(&VARIANTS[0], &overrides).unwrap();
        Compiled { device, kernel, lanes, lora_up, label: format!("{lanes} {lora_up}").leak() }
    };
    let of_lora =
        |lanes| [(lanes, true), (lanes, false)].into_iter().filter(|(lanes, up)| !up || *lanes >= 256);
    sizes.flat_map(of_lora).map(with).collect()
}

#[test]
fn agrees_with_its_twin() {
    let compiled = compiled();
    let config = ProptestConfig { cases: 16, ..ProptestConfig::with_source_file(file!()) };
    let lengths = prop::collection::vec(prop_oneof![1 => Just(0usize), 9 => 1..=9usize], 1..=4);
    let rank = || prop::sample::select(vec![1usize, 5, 8, 24, 33, 64]);
    let ranks = (rank(), rank(), prop_oneof![1 => Just(0), 2 => rank()], rank());
    proptest!(config, |(heads in 1..=5usize, lengths in lengths, (w, a, v, g) in ranks, seed: u64)| {
        prop_assume!(lengths.iter().sum::<usize>() > 0);
        let case = Case::draw(heads, &lengths, Ranks { w, a, v, g }, seed);
        for of in &compiled {
            case.agrees(of)?;
        }
    });
}

#[test]
fn refuses_what_it_cannot_run() {
    let ranks = Ranks { w: 5, a: 6, v: 7, g: 8 };
    let plain = Dims {
        rows: 9,
        segments: 2,
        heads: 3,
        head_size: 64,
        ranks,
        inputs: 9 * 64 + 26,
        stride: 3 * 64 * 64 + 10,
        offset: 10,
    };
    let (params, groups) = lower(plain, Some(256)).unwrap();
    assert_eq!((groups, params.width, params.first_layer), ([3, 2, 1], 192, 0), "plain");
    assert_eq!([params.rank_w, params.rank_a, params.rank_v, params.rank_g], [5, 6, 7, 8], "ranks");
    assert_eq!((params.inputs as usize, params.stride as usize, params.offset), (602, 12_298, 10), "layout");
    let groups = |ranks, lanes| {
        let params = lower(Dims { ranks, inputs: 2000, ..plain }, Some(lanes)).unwrap().0;
        [params.groups_w, params.groups_a, params.groups_v]
    };
    let released = Ranks { w: 64, a: 64, v: 32, g: 128 };
    assert_eq!([groups(released, 512), groups(ranks, 1024)], [[2, 2, 1], [3, 3, 4]], "by rank");
    let [long_g, long_w] = [Ranks { w: 1, a: 1, v: 1, g: 1000 }, Ranks { w: 1000, a: 1, v: 1, g: 1 }];
    assert_eq!([groups(long_g, 512), groups(long_g, 256)], [[1; 3]; 2], "one each");
    assert_eq!([groups(long_w, 512), groups(long_w, 256)], [[5, 1, 1], [1; 3]], "one is left for g");
    assert_eq!(lower(plain, Some(192)), Err(Error::Lanes { got: 192, want: 256 }), "lanes");
    assert!(lower(plain, None).is_ok(), "given");
    let first = lower(Dims { ranks: Ranks { v: 0, ..ranks }, ..plain }, Some(256)).unwrap().0;
    assert_eq!((first.rank_v, first.first_layer), (0, 1), "no value residual in the first layer");

    assert_eq!(
        lower(Dims { head_size: 32, ..plain }, Some(256)),
        Err(Error::HeadSize { got: 32, want: 64 }),
        "head size"
    );
    for of in [
        Dims { inputs: plain.inputs - 1, ..plain },
        Dims { stride: plain.stride - 1, ..plain },
        Dims { offset: 11, ..plain },
        Dims { ranks: Ranks { g: 9, ..ranks }, ..plain },
    ] {
        assert_eq!(lower(of, Some(256)), Err(Error::Layout(of)), "{of:?}");
    }
    let far = usize::MAX;
    for of in [
        Dims { rows: 0, ..plain },
        Dims { segments: 0, ..plain },
        Dims { heads: 0, ..plain },
        Dims { rows: 1 << 23, ..plain },
        Dims { rows: 1 << 12, inputs: 1 << 20, ..plain },
        Dims { rows: far, ..plain },
        Dims { heads: far, ..plain },
        Dims { heads: 1 << 20, stride: far, ..plain },
        Dims { offset: far, stride: far, ..plain },
        Dims { ranks: Ranks { w: far, a: far, ..ranks }, ..plain },
        Dims { rows: 1, inputs: 1 << 32, ..plain },
        Dims { stride: 1 << 32, ..plain },
        Dims { ranks: Ranks { w: 1 << 25, ..ranks }, inputs: 1 << 26, rows: 1, ..plain },
    ] {
        assert_eq!(lower(of, Some(256)), Err(Error::Extents(of)), "{of:?}");
    }
    for (of, got) in [
        (Dims { segments: 65_536, ..plain }, [3, 65_536]),
        (Dims { heads: 65_536, inputs: 1 << 24, stride: 1 << 29, rows: 1, ..plain }, [65_536, 2]),
    ] {
        assert_eq!(lower(of, Some(256)), Err(Error::Groups { got, max: MAX_GROUPS }), "{of:?}");
    }
}
