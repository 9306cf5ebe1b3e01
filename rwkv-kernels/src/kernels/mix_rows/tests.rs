//! `mix_rows.wgsl` and its variants against [`rwkv_core::ops::mix_rows`] in `f64`, and its numerics contract.

use proptest::prelude::*;
use rwkv_core::ops::add_planes::add_planes;
use rwkv_core::ops::layer_norm::{LN_EPS, layer_norm};
use rwkv_core::ops::mix_rows::{self as twin, Kept, Segment};
use rwkv_core::rng::SplitMix64;

use super::{Dims, END, Error, Form, MAX_GROUPS, VARIANTS, cursors, lower};
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
    /// `[T, P, D]`.
    planes: Vec<f32>,
    gain: Vec<f32>,
    bias: Vec<f32>,
    mixes: Vec<f32>,
    state: Vec<f32>,
}

/// What a call leaves.
#[derive(Debug, PartialEq)]
struct After<T> {
    state: Vec<T>,
    /// The rows with their planes, if there are any.
    sum: Vec<T>,
    out: Vec<T>,
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().copied().map(f64::from).collect()
}

impl Case {
    /// Segments of `lengths` rows, on records in a drawn order, some of which no segment has.
    fn draw(lengths: &[usize], form: Form, width: usize, mixes: usize, seed: u64) -> Self {
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
        let run = 1 + (rng.next_u64() % 5) as u32;
        let dims = Dims { rows, width, mixes, records, stride: width + 16, offset, form, run };
        let x = draw_rows(rows, width, &mut rng);
        let mut planes = Vec::new();
        // As far from zero as the rows are.
        for row in x.chunks_exact(width) {
            for _ in 0..form.planes {
                planes.extend(row.iter().map(|x| x * rng.uniform(-1.0, 1.0)));
            }
        }
        let mut draw = |n: usize, size: f32| (0..n).map(|_| rng.uniform(-size, size)).collect::<Vec<f32>>();
        let (gain, bias) = (draw(width, 2.0), draw(width, 1.0));
        // A trained mix is not confined to [0, 1].
        let (mixes, state) = (draw(mixes * width, 9.0), draw(records * dims.stride, 3.0));
        Self { dims, segments, x, planes, gain, bias, mixes, state }
    }

    /// What is wanted, and how far off it may be.
    ///
    /// A row with `P` planes is off by `P u` times the sum of sizes at most, as `add_planes` says: what is wanted is of the row as
    /// the kernel has summed it, since a norm may take any multiple of that.
    ///
    /// Let `e(t)` be the limit of the layer norm of row `t`, `u` as there. The row before is off by `e(t - 1)`, or not
    /// at all where it is kept. `now + (before - now) mix` then rounds the difference, the product and the sum:
    /// `|1 - mix| e(t) + |mix| e(t - 1) + 2 u |mix (before - now)| + u |out|`, a tenth more for the products of errors.
    fn twin(&self, summed: &[f32]) -> (After<f64>, After<f64>) {
        let lanes = self.dims.form.lanes as usize;
        let x = if self.planes.is_empty() { &self.x } else { summed };
        let Dims { rows, width, mixes, stride, offset, .. } = self.dims;
        let u = f64::from(f32::EPSILON);
        let planes = self.dims.form.planes as usize;
        let (mut sum, mut sizes) = (wide(&self.x), wide(&self.x));
        sizes.iter_mut().for_each(|x| *x = x.abs());
        add_planes(width, planes, &wide(&self.planes), &mut sum);
        add_planes(
            width,
            planes,
            &wide(&self.planes).iter().map(|x| x.abs()).collect::<Vec<_>>(),
            &mut sizes,
        );
        let mut want = After { state: wide(&self.state), sum, out: vec![f64::NAN; rows * mixes * width] };
        let mut kept = Kept { records: &mut want.state, stride, offset };
        let (gain, bias, all) = (&wide(&self.gain), &wide(&self.bias), wide(&self.mixes));
        twin::mix_rows(&self.segments, &wide(x), (gain, bias), &all, &mut kept, &mut want.out);

        let mut normed = vec![f64::NAN; rows * width];
        layer_norm(&wide(x), gain, bias, LN_EPS, &mut normed);
        let of_norm = limits(x, &self.gain, &normed, lanes);
        let sum = sizes.iter().map(|size| planes as f64 * u * size).collect();
        let mut limit = After { state: vec![0.0; self.state.len()], sum, out: Vec::new() };
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
        let mut cursors = cursors(&self.segments, self.dims.records).unwrap();
        assert_eq!(cursors.len(), self.dims.rows + 1, "one cursor a row, and the end");
        if params.run == 1 {
            cursors.pop(); // not read
        }
        let vectors = [self.gain.as_slice(), &self.bias, &self.mixes].concat();
        let width = self.dims.width;
        let poison = |n: usize| vec![f32::NAN.to_bits(); n * width];
        let Dims { rows, mixes, .. } = self.dims;
        // A buffer is bound, though nothing is read of it.
        let planes = if self.planes.is_empty() { poison(1) } else { bits(&self.planes) };
        let [x, state] = [&self.x, &self.state].map(|of| bits(of));
        let (sum, out) = (poison(rows), poison(rows * mixes));
        let buffers = [x, planes, cursors.concat(), bits(&vectors), state, sum, out];
        let mut after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
        let out = packed::tests::floats(&after.pop().unwrap(), width, halves);
        let mut sum = floats(after.pop().unwrap());
        if self.planes.is_empty() {
            assert!(sum.iter().all(|x| x.is_nan()), "nothing is summed");
            sum.clone_from(&self.x);
        }
        let state = floats(after.pop().unwrap());
        assert_eq!(after, buffers[..4], "the operands are untouched");
        After { state, sum, out }
    }
}

fn config() -> ProptestConfig {
    ProptestConfig { cases: 32, ..ProptestConfig::with_source_file(file!()) }
}

fn lengths() -> impl Strategy<Value = Vec<usize>> {
    proptest::collection::vec(prop_oneof![4 => 1..=4usize, 1 => 5..=60usize], 1..=6)
}

/// Vectors of a row, fewer than lanes to more than one to each, not a whole number of them.
fn widths(form: Form) -> impl Strategy<Value = usize> {
    let most = form.most() / 4;
    prop_oneof![Just(1), Just(form.lanes as usize), Just(most), 1..=most].prop_map(|quads| 4 * quads)
}

const fn form(lanes: u32, each: u32, planes: u32) -> Form {
    Form { lanes, each, planes }
}

#[test]
fn agrees_with_its_twin() {
    for (form, halves) in [
        (form(4, 8, 0), EXPONENTS[0]),
        (form(4, 8, 4), EXPONENTS[2]),
        (form(64, 1, 1), EXPONENTS[0]),
        (form(256, 2, 4), EXPONENTS[1]),
    ] {
        let overrides = [&form.overrides()[..], &[packed::halves(halves)]].concat();
        let variants = variants_for_tests(VARIANTS, &overrides);
        proptest!(config(), |(lengths in lengths(), width in widths(form), mixes in 0..=6usize, seed: u64)| {
            let case = Case::draw(&lengths, form, width, mixes, seed);
            for (device, kernel) in &variants {
                let (got, label) = (case.run(device, kernel, halves), kernel.kernel().label());
                let fail = |what, e| TestCaseError::fail(format!("{label}.{what}{e}"));
                let (mut want, mut limit) = case.twin(&got.sum);
                for (want, limit) in want.out.iter_mut().zip(&mut limit.out) {
                    (*want, *limit) = packed::tests::rounded(*want, *limit, halves);
                }
                compare(&got.sum, &want.sum, &limit.sum).map_err(|e| fail("sum", e))?;
                compare(&got.out, &want.out, &limit.out).map_err(|e| fail("out", e))?;
                // To the bit, wherever no segment keeps a row.
                compare(&got.state, &want.state, &limit.state).map_err(|e| fail("state", e))?;
            }
        });
    }
}

/// A pass over a sequence and two over its parts leave the same bits, whatever runs beside them: the row before is the
/// same whether it is summed and normed again, carried on in a run, or kept.
#[test]
fn a_sequence_has_its_bits_however_it_is_split() {
    for form in [form(64, 2, 4), form(64, 2, 0)] {
        same_however_split(form);
    }
}

fn same_however_split(form: Form) {
    let variants = variants_for_tests(VARIANTS, &form.overrides());
    proptest!(config(), |(lengths in lengths(), split in 0..60usize, width in widths(form), run in 1..=6u32, seed: u64)| {
        let mixes = 2;
        let case = Case::draw(&lengths, form, width, mixes, seed);
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
                    let dims = Dims { rows: part.len(), records: 3, run, ..case.dims };
                    let rows = |of: &[f32], each: usize| of[part.start * each..part.end * each].to_vec();
                    let x = rows(&case.x, width);
                    let planes = rows(&case.planes, form.planes as usize * width);
                    let segments = vec![Segment { rows: part.len(), from, to: vec![from + 1] }];
                    let after =
                        Case { dims, segments, x, planes, state, ..case.clone() }.run(device, kernel, None);
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
fn forms_hold_a_row() {
    let form = |width, lanes| Form::new(width, lanes, 4).map(|of| (of.lanes, of.each));
    assert_eq!(form(2048, 512), Ok((512, 1)), "a vector to each");
    assert_eq!(form(2560, 512), Ok((512, 2)), "not a whole number");
    assert_eq!(form(4, 512), Ok((1, 1)), "no more lanes than there are");
    assert_eq!(form(4096, 64), Ok((128, 8)), "more, so that all is held");
    assert_eq!(form(32_768, 64), Ok((1024, 8)), "as wide as there can be");
    for width in [0, 32_772, usize::MAX] {
        assert_eq!(form(width, 64), Err(Error::Width { got: width, max: 32_768 }), "none, or wider");
    }
}

#[test]
fn refuses_what_it_cannot_run() {
    let form = form(64, 8, 0);
    let plain = Dims { rows: 3, width: 192, mixes: 6, records: 5, stride: 400, offset: 200, form, run: 1 };
    let lowered = |dims| lower(dims).map(|(params, groups)| (params.width, params.mixes, groups));
    assert_eq!(lowered(plain), Ok((192, 6, [3, 1, 1])), "plain");
    assert_eq!(lowered(Dims { rows: 0, ..plain }), Ok((192, 6, [0, 1, 1])), "nothing to do");
    for (run, groups) in [(0, 3), (2, 2), (3, 1), (u32::MAX, 1)] {
        assert_eq!(lowered(Dims { run, ..plain }), Ok((192, 6, [groups, 1, 1])), "runs of {run}");
    }
    let divided = Form { planes: 2, ..form };
    assert_eq!(lowered(Dims { run: 2, form: divided, ..plain }), Ok((192, 6, [3, 1, 1])), "with planes");
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
    let max = 4 * 64 * 8;
    let wide = Dims { width: max + 4, stride: max + 4, offset: 0, ..plain };
    assert_eq!(lowered(wide), Err(Error::Width { got: max + 4, max }), "wider than the form");
    let wide = Dims { width: max, stride: 1 << 20, offset: 0, ..plain };
    assert_eq!(lowered(Dims { records: 1 << 12, ..wide }), beyond(1 << 12, 1 << 20), "state");
    let wide = Dims { width: 1 << 10, stride: 1 << 10, offset: 0, ..plain };
    let max = MAX_GROUPS as usize;
    assert!(lowered(Dims { rows: max, ..wide }).is_ok(), "the most rows");
    let form = Form { planes: 1 << 7, ..form };
    assert_eq!(lowered(Dims { rows: max, form, ..wide }), beyond(max << 7, 1 << 10), "planes");
    for mixes in [7, usize::MAX] {
        assert_eq!(lowered(Dims { mixes, ..plain }), Err(Error::Mixes { got: mixes }), "mixes");
    }
}

#[test]
fn cursors_name_records_where_segments_begin_and_end() {
    let segment = |rows, from, to| Segment { rows, from, to: vec![to] };
    let (none, end) = (u32::MAX, [END; 2]);
    let got = cursors(&[segment(3, 1, 2), segment(1, 1, 0)], 3);
    assert_eq!(got, Ok(vec![[1, none], [none, none], [none, 2], [1, 0], end]), "both read one record");
    let last = |to: &[usize]| cursors(&[Segment { rows: 3, from: 0, to: to.to_vec() }], 4);
    assert_eq!(last(&[3, 1]), Ok(vec![[0, none], [none, 3], [none, 1], end]), "the last two");
    assert_eq!(last(&[]), Ok(vec![[0, none], [none, none], [none, none], end]), "none");
    assert_eq!(last(&[1, 2, 3, 1]), Err(Error::Shared { segment: 0, record: 1 }), "one twice");
    let too_many = cursors(&[Segment { rows: 1, from: 0, to: vec![1, 2] }], 4);
    assert_eq!(too_many, Err(Error::Kept { segment: 0, kept: 2, rows: 1 }), "more than there are");
    assert_eq!(cursors(&[], 0), Ok(vec![end]), "nothing to do");
    let records = 3;
    assert_eq!(cursors(&[segment(0, 0, 1)], records), Err(Error::Empty { segment: 0 }), "empty");
    for (from, to) in [(0, 3), (3, 0)] {
        let none = Error::NoRecord { segment: 0, record: 3, records };
        assert_eq!(cursors(&[segment(1, from, to)], records), Err(none), "no such record");
    }
    for mark in [none, END].map(|mark| mark as usize) {
        let none = Error::NoRecord { segment: 0, record: mark, records: usize::MAX };
        assert_eq!(cursors(&[segment(1, mark, 0)], usize::MAX), Err(none), "a mark");
    }
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
