//! `time_mix.wgsl` and `time_mix_batch.wgsl` against [`rwkv_core::ops::time_mix`] in `f64`.

use std::ops::Range;

use proptest::prelude::*;
use rwkv_core::config::Ranks;
use rwkv_core::ops::time_mix as twin;
use rwkv_core::ops::wkv7;
use rwkv_core::rng::SplitMix64;

use super::{Dims, Error, HEAD_SIZE as N, Segment, VARIANTS, lower};
use crate::gpu::{Device, device_for_tests, variants_for_tests};
use crate::kernels::MAX_GROUPS;
use crate::kernels::heads::{Heads, NAN, swapped};
use crate::kernels::intervals::{Interval, below, exact, floats, held};
use crate::kernels::testing::{bits as words, wide};
use crate::kernels::{packed, readout_packed, time_mix_batch};
use crate::pipeline::Pipeline;

/// One call.
struct Case {
    of: Heads,
    dims: Dims,
    segments: Vec<Segment>,
    /// Records, NaN but for the heads that are read.
    state: Vec<f32>,
}

/// What a call changes.
#[derive(Clone)]
struct After {
    state: Vec<f32>,
    v_first: Vec<f32>,
    out: Vec<f32>,
}

impl Case {
    fn draw(heads: usize, lengths: &[usize], ranks: Ranks, seed: u64) -> Self {
        let mut rng = SplitMix64::new(seed);
        let mut some = |n| below(&mut rng, n) as usize;
        let (width, records) = (heads * N, 2 * lengths.len());
        let offset = 4 * some(10);
        let stride = offset + width * N + 4 * some(10);

        // Rows of no segment come between; record `s` or `s + segments` is read, and either is written.
        let (mut rows, mut segments) = (some(2), Vec::new());
        for (s, &length) in lengths.iter().enumerate() {
            let [from, to] = [s + lengths.len() * some(2), s + lengths.len() * some(2)];
            let [first, len, from, to] = [rows, length, from, to].map(|n| u32::try_from(n).unwrap());
            segments.push(Segment { first, rows: len, from, to });
            rows += length + some(2);
        }
        let mut state = vec![f32::NAN; records * stride];
        for segment in &segments {
            for head in state[segment.from as usize * stride + offset..][..width * N].chunks_mut(N * N) {
                head.copy_from_slice(&Heads::draw_state(&mut rng));
            }
        }
        let of = Heads::draw(&mut rng, rows, heads, ranks, 5);
        let inputs = of.stride;
        let dims = Dims { rows, segments: lengths.len(), heads, head_size: N, ranks, inputs, stride, offset };
        Self { of, dims, segments, state }
    }

    fn width(&self) -> usize {
        self.of.width()
    }

    /// Where a head of a record is.
    fn head(&self, record: u32, head: usize) -> Range<usize> {
        let start = record as usize * self.dims.stride + self.dims.offset + head * N * N;
        start..start + N * N
    }

    /// Heads, output and `v_first` of one row, the state being `state`, `[H, key, value]`.
    fn twin(&self, row: usize, state: &[f32]) -> [Vec<f64>; 3] {
        let mut state = swapped(&wide(state));
        let dims = wkv7::Dims { tokens: 1, heads: self.dims.heads, head_size: N };
        let [out, v_first] = self.of.twin(row, |of, x, v_first, out| {
            twin::time_mix(dims, of, x, v_first, &mut state, out);
        });
        [swapped(&state), out, v_first]
    }

    /// State and output of one head after one row, the state being `state`.
    fn bounds(&self, row: usize, head: usize, state: &[f32]) -> [Vec<Interval>; 2] {
        let x = self.of.operands(row, head);
        let after = x.after(&exact(state));
        let out = x.out(&x.answers(&after));
        [after, out]
    }

    /// One call over `segments`, going on from `before`, of which nothing but what they name may change.
    fn run(&self, of: &Compiled, segments: &[Segment], before: &After) -> After {
        let dims = Dims { segments: segments.len(), ..self.dims };
        let (params, groups) = if of.lora_up {
            let (params, groups) = lower(dims, Some(of.lanes)).unwrap();
            (bytemuck::bytes_of(&params).to_vec(), groups)
        } else {
            let (params, groups) = time_mix_batch::lower(dims).unwrap();
            (bytemuck::bytes_of(&params).to_vec(), groups)
        };
        let [weights, up] =
            if of.lora_up { [self.of.weights.words(), NAN.to_vec()] } else { [NAN.to_vec(), self.of.up()] };
        let buffers = [
            bytemuck::cast_slice(segments).to_vec(),
            words(&self.of.inputs),
            weights,
            up,
            words(&self.of.vectors),
            words(&before.state),
            words(&before.v_first),
            packed::tests::words(&before.out, of.planes * self.width(), of.halves),
        ];
        let after = of.device.run(&of.kernel, &params, &buffers, groups).unwrap();
        assert_eq!(after[..5], buffers[..5], "the operands are untouched");
        let [state, v_first] = [5, 6].map(|i| floats(&after[i]));
        let out = packed::tests::floats(&after[7], of.planes * self.width(), of.halves);
        After { state, v_first, out }
    }

    fn before(&self, of: &Compiled) -> After {
        let out = vec![f32::NAN; self.dims.rows * of.planes * self.width()];
        After { state: self.state.clone(), v_first: self.of.v_first.clone(), out }
    }

    /// What may differ between `before` and `after` a call over `segments`, put back.
    fn put_back(&self, segments: &[Segment], before: &After, mut after: After) -> After {
        for segment in segments {
            let heads = self.head(segment.to, 0).start..self.head(segment.to, self.dims.heads).start;
            after.state[heads.clone()].copy_from_slice(&before.state[heads]);
            let [first, end] = [segment.first, segment.first + segment.rows].map(|row| row as usize);
            let rows = |of: &[f32]| first * (of.len() / self.dims.rows)..end * (of.len() / self.dims.rows);
            after.out[rows(&before.out)].copy_from_slice(&before.out[rows(&before.out)]);
            if self.dims.ranks.v == 0 {
                after.v_first[rows(&before.v_first)].copy_from_slice(&before.v_first[rows(&before.v_first)]);
            }
        }
        after
    }

    /// Runs the first row of every segment, then the second, and so on. Each is within its bounds of the twin, which
    /// goes on from where the kernel is; and all together have the bits of one call.
    fn agrees(&self, of: &Compiled) -> Result<(), TestCaseError> {
        let mut now = self.before(of);
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
                let got = of.finished(&self.of, row, &next.out);
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
                    let written: Vec<_> = bounds[1].iter().map(|out| out.rounded(of.halves)).collect();
                    let what = |of: &str, label| format!("{label}: {of} of row {row}, head {head}");
                    held(&what("state", of.label), &next.state[self.head(to, head)], &bounds[0])?;
                    held(&what("out", of.label), &got[head * N..][..N], &written)?;
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

/// The kernel with its overrides.
struct Compiled {
    device: &'static Device,
    kernel: Pipeline,
    lanes: u32,
    /// Without, it is `time_mix_batch`.
    lora_up: bool,
    halves: Option<u8>,
    /// Vectors that it leaves of a row: one, or three where the norm is left to others.
    planes: usize,
    label: &'static str,
}

impl Compiled {
    /// A row of the output `[D]`.
    fn finished(&self, of: &Heads, row: usize, out: &[f32]) -> Vec<f32> {
        let row = &out[row * self.planes * of.width()..][..self.planes * of.width()];
        if self.planes == 1 { row.to_vec() } else { of.finished(row) }
    }
}

/// Workgroups of one group of keys and more; the largest beyond what WebGPU promises.
fn compiled(lora_up: bool) -> Vec<Compiled> {
    let Some(device) = device_for_tests() else { return Vec::new() };
    let sizes = [64u32, 128, 256, 512].into_iter().filter(|&lanes| {
        let capabilities = device.capabilities();
        // 40 bytes a lane, and those of a token
        lanes <= capabilities.invocations && 40 * lanes + 3000 <= capabilities.workgroup_bytes
    });
    // The norm is left to others of one size.
    let norms =
        |lanes| [(lanes, true), (lanes, false)].into_iter().filter(|(lanes, norm)| *norm || *lanes == 256);
    let with = |(lanes, norm): (u32, bool)| {
        // Where products are given, those that read the output may be of cooperative matrices.
        let halves = if lora_up || lanes == 128 || !norm { None } else { Some(4) };
        let variants = if lora_up { VARIANTS } else { time_mix_batch::VARIANTS };
        let overrides = [("LANES", lanes.into()), packed::halves(halves), readout_packed::norm(norm)];
        variants_for_tests(variants, &overrides).into_iter().map(move |(device, kernel)| {
            let label = format!("{} {lanes} {halves:?} {norm}", kernel.kernel().label()).leak();
            Compiled { device, kernel, lanes, lora_up, halves, planes: if norm { 1 } else { 3 }, label }
        })
    };
    sizes.flat_map(norms).flat_map(with).collect()
}

#[test]
fn agrees_with_its_twin() {
    agrees(true);
}

/// The kernel that multiplies the adapters' second factors, or the other, against the twin.
pub(in crate::kernels) fn agrees(lora_up: bool) {
    let compiled = compiled(lora_up);
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
    let teams = |ranks, lanes| {
        let params = lower(Dims { ranks, inputs: 2000, ..plain }, Some(lanes)).unwrap().0;
        [params.teams_w, params.teams_a, params.teams_v]
    };
    let released = Ranks { w: 96, a: 96, v: 64, g: 256 };
    assert_eq!([teams(released, 512), teams(ranks, 256)], [[6, 6, 4], [3, 3, 4]], "by rank");
    let [long_g, long_w] = [Ranks { w: 1, a: 1, v: 1, g: 1000 }, Ranks { w: 1000, a: 1, v: 1, g: 1 }];
    assert_eq!([teams(long_g, 512), teams(long_g, 64)], [[1; 3]; 2], "one each");
    assert_eq!([teams(long_w, 512), teams(long_w, 64)], [[29, 1, 1], [1; 3]], "one is left for g");
    assert_eq!(lower(plain, Some(48)), Err(Error::Lanes { got: 48, want: 64 }), "lanes");
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
