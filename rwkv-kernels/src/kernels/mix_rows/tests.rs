//! `mix_rows.wgsl` and its variants against [`rwkv_core::ops::mix_rows`] in `f64`, and its numerics contract.

use proptest::prelude::*;
use rwkv_core::ops::layer_norm::{LN_EPS, layer_norm};
use rwkv_core::ops::mix_rows::{self as twin, Kept, Segment};
use rwkv_core::rng::SplitMix64;

use super::{Dims, Error, MAX_GROUPS, VARIANTS, cursors, lower};
use crate::gpu::{Device, variants_for_tests};
use crate::kernels::layer_norm::tests::{bits, compare, draw_rows, floats, limits};
use crate::kernels::packed::{self, tests::EXPONENTS};
use crate::pipeline::Pipeline;

/// Operands of one call.
#[derive(Clone, Debug)]
struct Case {
    dims: Dims,
    segments: Vec<Segment>,
    x: Vec<f32>,
    gain: Vec<f32>,
    bias: Vec<f32>,
    mixes: Vec<f32>,
    state: Vec<f32>,
}

/// What a call leaves.
#[derive(Debug, PartialEq)]
struct After<T> {
    state: Vec<T>,
    out: Vec<T>,
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().copied().map(f64::from).collect()
}

impl Case {
    /// Segments of `lengths` rows, on records in a drawn order, some of which no segment has.
    fn draw(lengths: &[usize], width: usize, mixes: usize, seed: u64) -> Self {
        let mut rng = SplitMix64::new(seed);
        let records = 4 * lengths.len() + 2;
        let mut order: Vec<usize> = (0..records).collect();
        order.sort_by_cached_key(|_| rng.next_u64());
        let mut segment = |(&rows, r): (&usize, &[usize])| {
            let kept = (1 + (rng.next_u64() % 3) as usize).min(rows);
            Segment { rows, from: r[0], to: r[1..][..kept].to_vec() }
        };
        let segments: Vec<_> = lengths.iter().zip(order.chunks_exact(4)).map(&mut segment).collect();
        let rows = lengths.iter().sum();
        let offset = 4 * (rng.next_u64() % 3) as usize;
        let dims = Dims { rows, width, mixes, records, stride: width + 16, offset };
        let x = draw_rows(rows, width, &mut rng);
        let mut draw = |n: usize, size: f32| (0..n).map(|_| rng.uniform(-size, size)).collect::<Vec<f32>>();
        let (gain, bias) = (draw(width, 2.0), draw(width, 1.0));
        // A trained mix is not confined to [0, 1].
        let (mixes, state) = (draw(mixes * width, 9.0), draw(records * dims.stride, 3.0));
        Self { dims, segments, x, gain, bias, mixes, state }
    }

    /// What is wanted, and how far off it may be.
    ///
    /// Let `e(t)` be the limit of the layer norm of row `t`, `u` as there. The row before is off by `e(t - 1)`, or not
    /// at all where it is kept. `now + (before - now) mix` then rounds the difference, the product and the sum:
    /// `|1 - mix| e(t) + |mix| e(t - 1) + 2 u |mix (before - now)| + u |out|`, a tenth more for the products of errors.
    fn twin(&self, lanes: usize) -> (After<f64>, After<f64>) {
        let Dims { rows, width, mixes, stride, offset, .. } = self.dims;
        let u = f64::from(f32::EPSILON);
        let mut want = After { state: wide(&self.state), out: vec![f64::NAN; rows * mixes * width] };
        let mut kept = Kept { records: &mut want.state, stride, offset };
        let (gain, bias, all) = (&wide(&self.gain), &wide(&self.bias), wide(&self.mixes));
        twin::mix_rows(&self.segments, &wide(&self.x), (gain, bias), &all, &mut kept, &mut want.out);

        let mut normed = vec![f64::NAN; rows * width];
        layer_norm(&wide(&self.x), gain, bias, LN_EPS, &mut normed);
        let of_norm = limits(&self.x, &self.gain, &normed, lanes);
        let mut limit = After { state: vec![0.0; self.state.len()], out: Vec::new() };
        let mut t = 0;
        for s in &self.segments {
            for first in (0..s.rows).map(|i| i == 0) {
                let kept = s.from * stride + offset;
                for m in 0..mixes {
                    for j in 0..width {
                        let at = t * width + j;
                        let (before, e) = match first {
                            true => (f64::from(self.state[kept + j]), 0.0),
                            false => (normed[at - width], of_norm[at - width]),
                        };
                        let mix = all[m * width + j];
                        let moved = 2.0 * u * (mix * (before - normed[at])).abs();
                        let out = want.out[(t * mixes + m) * width + j].abs();
                        limit
                            .out
                            .push(1.1 * ((1.0 - mix).abs() * of_norm[at] + mix.abs() * e + moved + u * out));
                    }
                }
                t += 1;
            }
            for (to, row) in s.to.iter().rev().zip((0..t).rev()) {
                limit.state[to * stride + offset..][..width]
                    .copy_from_slice(&of_norm[row * width..][..width]);
            }
        }
        (want, limit)
    }

    fn run(&self, device: &Device, kernel: &Pipeline, halves: Option<u8>) -> After<f32> {
        let (params, groups) = lower(self.dims).unwrap();
        let cursors = cursors(&self.segments, self.dims.records).unwrap();
        assert_eq!(cursors.len(), self.dims.rows, "one cursor a row");
        let vectors = [self.gain.as_slice(), &self.bias, &self.mixes].concat();
        let poison = vec![f32::NAN; self.dims.rows * self.dims.mixes * self.dims.width];
        let buffers = [bits(&self.x), cursors.concat(), bits(&vectors), bits(&self.state), bits(&poison)];
        let width = self.dims.width;
        let mut after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
        let out = packed::tests::floats(&after.pop().unwrap(), width, halves);
        let state = floats(after.pop().unwrap());
        assert_eq!(after, buffers[..3], "the operands are untouched");
        After { state, out }
    }
}

fn config() -> ProptestConfig {
    ProptestConfig { cases: 32, ..ProptestConfig::with_source_file(file!()) }
}

fn lengths() -> impl Strategy<Value = Vec<usize>> {
    proptest::collection::vec(prop_oneof![4 => 1..=4usize, 1 => 5..=60usize], 1..=6)
}

/// Less than one round of lanes, several, not a whole number of them.
fn widths() -> impl Strategy<Value = usize> {
    prop_oneof![Just(4usize), Just(192), Just(1100), (1..=80usize).prop_map(|quads| 4 * quads)]
}

#[test]
fn agrees_with_its_twin() {
    for (lanes, halves) in [(4u16, EXPONENTS[0]), (4, EXPONENTS[2]), (256, EXPONENTS[0]), (256, EXPONENTS[1])]
    {
        let variants = variants_for_tests(VARIANTS, &[("LANES", lanes.into()), packed::halves(halves)]);
        proptest!(config(), |(lengths in lengths(), width in widths(), mixes in 0..=6usize, seed: u64)| {
            let case = Case::draw(&lengths, width, mixes, seed);
            let (mut want, mut limit) = case.twin(lanes.into());
            for (want, limit) in want.out.iter_mut().zip(&mut limit.out) {
                (*want, *limit) = packed::tests::rounded(*want, *limit, halves);
            }
            for (device, kernel) in &variants {
                let (got, label) = (case.run(device, kernel, halves), kernel.kernel().label());
                let fail = |what, e| TestCaseError::fail(format!("{label}.{what}{e}"));
                compare(&got.out, &want.out, &limit.out).map_err(|e| fail("out", e))?;
                // To the bit, wherever no segment keeps a row.
                compare(&got.state, &want.state, &limit.state).map_err(|e| fail("state", e))?;
            }
        });
    }
}

/// A pass over a sequence and two over its parts leave the same bits, whatever runs beside them: the row before is the
/// same whether it is normed again or kept.
#[test]
fn a_sequence_has_its_bits_however_it_is_split() {
    let variants = variants_for_tests(VARIANTS, &[]);
    proptest!(config(), |(lengths in lengths(), split in 0..60usize, width in widths(), seed: u64)| {
        let mixes = 2;
        let case = Case::draw(&lengths, width, mixes, seed);
        let mut at = 0;
        let starts = lengths.iter().map(|rows| (at, at += rows).0).collect::<Vec<_>>();
        for (device, kernel) in &variants {
            let whole = case.run(device, kernel, None);
            for (s, start) in case.segments.iter().zip(&starts) {
                // On fewer records: 0 is read first, then 1, and 2 is left.
                let first = split % s.rows;
                let record = |of: usize, state: &[f32]| state[of * case.dims.stride..][..case.dims.stride].to_vec();
                let mut state = record(s.from, &case.state);
                state.resize(3 * case.dims.stride, f32::NAN);
                let mut out = Vec::new();
                let mut from = 0;
                for part in [*start..start + first, start + first..start + s.rows] {
                    if part.is_empty() {
                        continue;
                    }
                    let dims = Dims { rows: part.len(), records: 3, ..case.dims };
                    let x = case.x[part.start * width..part.end * width].to_vec();
                    let segments = vec![Segment { rows: part.len(), from, to: vec![from + 1] }];
                    let after = Case { dims, segments, x, state, ..case.clone() }.run(device, kernel, None);
                    out.extend(after.out);
                    (state, from) = (after.state, from + 1);
                }
                let kept = |of: usize, state: &[f32]| {
                    bits(&record(of, state)[case.dims.offset..][..width])
                };
                prop_assert_eq!(kept(from, &state), kept(*s.to.last().unwrap(), &whole.state), "state");
                let rows = start * mixes * width..(start + s.rows) * mixes * width;
                prop_assert!(bits(&out) == bits(&whole.out[rows]), "out of rows {}..+{}", start, s.rows);
            }
        }
    });
}

#[test]
fn refuses_what_it_cannot_run() {
    let plain = Dims { rows: 3, width: 192, mixes: 6, records: 5, stride: 400, offset: 200 };
    let lowered = |dims| lower(dims).map(|(params, groups)| (params.width, params.mixes, groups));
    assert_eq!(lowered(plain), Ok((192, 6, [3, 1, 1])), "plain");
    assert_eq!(lowered(Dims { rows: 0, ..plain }), Ok((192, 6, [0, 1, 1])), "nothing to do");
    let quads = |what, got| Err(Error::Quads { what, got });
    assert_eq!(lowered(Dims { width: 190, ..plain }), quads("width", 190), "width");
    assert_eq!(lowered(Dims { width: 0, ..plain }), quads("width", 0), "no channels");
    assert_eq!(lowered(Dims { stride: 402, ..plain }), quads("record", 402), "stride");
    assert_eq!(lowered(Dims { offset: 1, ..plain }), quads("place in a record", 1), "offset");
    for offset in [212, usize::MAX - 3] {
        let outside = Error::Record { width: 192, offset, stride: 400 };
        assert_eq!(lowered(Dims { offset, ..plain }), Err(outside), "outside of the record");
    }
    assert!(lowered(Dims { offset: 208, ..plain }).is_ok(), "at the end of the record");
    let rows = Error::Rows { got: 65_536, max: MAX_GROUPS };
    assert_eq!(lowered(Dims { rows: 65_536, ..plain }), Err(rows), "rows");
    let beyond = |rows, width| Err(Error::Index { rows, width });
    let wide = Dims { width: 1 << 20, stride: 1 << 20, offset: 0, ..plain };
    assert_eq!(lowered(Dims { records: 1 << 12, ..wide }), beyond(1 << 12, 1 << 20), "state");
    assert_eq!(lowered(Dims { rows: 1 << 10, ..wide }), beyond(6 << 10, 1 << 20), "out");
    assert_eq!(lowered(Dims { rows: 1 << 12, mixes: 0, ..wide }), beyond(1 << 12, 1 << 20), "x");
    assert_eq!(lowered(Dims { mixes: 1 << 12, ..wide }), beyond(3 << 12, 1 << 20), "vectors");
    let mixes = usize::MAX;
    assert_eq!(lowered(Dims { mixes, ..plain }), beyond(usize::MAX, 192), "no overflow");
}

#[test]
fn cursors_name_records_where_segments_begin_and_end() {
    let segment = |rows, from, to| Segment { rows, from, to: vec![to] };
    let none = u32::MAX;
    let got = cursors(&[segment(3, 1, 2), segment(1, 1, 0)], 3);
    assert_eq!(got, Ok(vec![[1, none], [none, none], [none, 2], [1, 0]]), "both read one record");
    let last = |to: &[usize]| cursors(&[Segment { rows: 3, from: 0, to: to.to_vec() }], 4);
    assert_eq!(last(&[3, 1]), Ok(vec![[0, none], [none, 3], [none, 1]]), "the last two");
    assert_eq!(last(&[]), Ok(vec![[0, none], [none, none], [none, none]]), "none");
    assert_eq!(last(&[1, 2, 3, 1]), Err(Error::Shared { segment: 0, record: 1 }), "one twice");
    let too_many = cursors(&[Segment { rows: 1, from: 0, to: vec![1, 2] }], 4);
    assert_eq!(too_many, Err(Error::Kept { segment: 0, kept: 2, rows: 1 }), "more than there are");
    assert_eq!(cursors(&[], 0), Ok(Vec::new()), "nothing to do");
    let records = 3;
    assert_eq!(cursors(&[segment(0, 0, 1)], records), Err(Error::Empty { segment: 0 }), "empty");
    for (from, to) in [(0, 3), (3, 0)] {
        let none = Error::NoRecord { segment: 0, record: 3, records };
        assert_eq!(cursors(&[segment(1, from, to)], records), Err(none), "no such record");
    }
    let mark = u32::MAX as usize;
    let none = Error::NoRecord { segment: 0, record: mark, records: usize::MAX };
    assert_eq!(cursors(&[segment(1, mark, 0)], usize::MAX), Err(none), "the mark of none");
    let shared = |segment, record| Err(Error::Shared { segment, record });
    assert_eq!(cursors(&[segment(1, 1, 1)], records), shared(0, 1), "in place");
    assert_eq!(cursors(&[segment(1, 0, 1), segment(1, 1, 2)], records), shared(0, 1), "read by the next");
    assert_eq!(cursors(&[segment(1, 0, 1), segment(1, 0, 1)], records), shared(1, 1), "written twice");
    let rows = |got| Err(Error::Rows { got, max: MAX_GROUPS });
    assert_eq!(cursors(&[segment(1, 0, 1), segment(65_535, 0, 2)], records), rows(65_536), "rows");
    assert_eq!(
        cursors(&[segment(1, 0, 1), segment(usize::MAX, 0, 2)], records),
        rows(usize::MAX),
        "no overflow"
    );
}
