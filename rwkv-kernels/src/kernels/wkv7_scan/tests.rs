//! `wkv7_scan.wgsl` and its variants against [`rwkv_core::ops::wkv7`] in `f64`, and its numerics contract.

use proptest::prelude::*;
use rwkv_core::compare::{magnitude, nmse};
use rwkv_core::ops::wkv7::{self, Inputs, wkv7 as twin};
use rwkv_core::ops::wkv7_lazy::Undecayed;
use rwkv_core::rng::SplitMix64;
use rwkv_state::base::Base;
use rwkv_state::format::decay_dither;

use super::{
    Dims, ENTRY, Error, Format, HEAD_SIZE as N, OPERANDS, Pending, Rounding, Segment, VARIANTS, lower,
    overrides,
};
use crate::gpu::{Device, variants_for_tests};
use crate::kernels::MAX_GROUPS;
use crate::kernels::intervals::{Interval, below, floats};
use crate::kernels::testing::{U, bits, compare, wide};
use crate::kernels::time_mix_resident::tests::{Held, advance};
use crate::kernels::time_mix_resident::{self as resident, table};
use crate::kernels::wkv7::tests::{Case, limits, swapped};
use crate::pipeline::Pipeline;

/// Segments beside each other, each with operands of its own.
pub(in crate::kernels) struct Call {
    pub(in crate::kernels) cases: Vec<Case>,
    pub(in crate::kernels) segments: Vec<Segment>,
    pub(in crate::kernels) dims: Dims,
    /// `[T, H, 6, N]`, NaN in rows of no segment.
    pub(in crate::kernels) operands: Vec<f32>,
    /// NaN but for the heads that are read.
    pub(in crate::kernels) state: Vec<f32>,
}

impl Call {
    /// Rows of no segment come between, and a record has more than the heads.
    pub(in crate::kernels) fn draw(heads: usize, lengths: &[usize], seed: u64) -> Self {
        Self::draw_with(heads, lengths, seed, &|dims, seed| drawn(dims, &mut SplitMix64::new(seed)))
    }

    pub(in crate::kernels) fn draw_with(
        heads: usize,
        lengths: &[usize],
        seed: u64,
        draw: &dyn Fn(wkv7::Dims, u64) -> Case,
    ) -> Self {
        let mut rng = SplitMix64::new(seed);
        let width = heads * N;
        let offset = below(&mut rng, 40) as usize;
        let stride = offset + width * N + below(&mut rng, 40) as usize;
        let (mut cases, mut segments, mut rows) = (Vec::new(), Vec::new(), 0);
        for (s, &tokens) in lengths.iter().enumerate() {
            rows += below(&mut rng, 2) as usize;
            // Of the records s and s + S one is read, and either is written.
            let mut record = || s + lengths.len() * below(&mut rng, 2) as usize;
            let [first, len, from, to] =
                [rows, tokens, record(), record()].map(|n| u32::try_from(n).unwrap());
            segments.push(Segment { first, rows: len, from, to });
            cases.push(draw(wkv7::Dims { tokens, heads, head_size: N }, rng.next_u64()));
            rows += tokens;
        }
        rows += 1;
        let y_stride = width + below(&mut rng, 9) as usize;
        let dims = Dims {
            rows,
            segments: lengths.len(),
            heads,
            format: Format::F32,
            stride,
            offset,
            y_stride,
            pending: None,
        };
        let mut operands = vec![f32::NAN; rows * OPERANDS * width];
        let mut state = vec![f32::NAN; 2 * lengths.len() * stride];
        for (case, of) in cases.iter().zip(&segments) {
            packed(case, of.first as usize, &mut operands);
            let start = of.from as usize * stride + offset;
            state[start..][..width * N].copy_from_slice(&swapped(case.dims, &case.state));
        }
        Self { cases, segments, dims, operands, state }
    }

    /// States and outputs after some of the segments; `state` is what is there before.
    fn run(
        &self,
        (device, kernel): &(&Device, Pipeline),
        segments: &[Segment],
        state: &[f32],
    ) -> [Vec<f32>; 2] {
        let dims = Dims { segments: segments.len(), ..self.dims };
        let (params, groups) = lower(kernel.kernel(), dims).unwrap();
        let y = vec![f32::NAN; self.dims.rows * self.dims.y_stride];
        let segments = bytemuck::cast_slice(segments).to_vec();
        let buffers = [segments, bits(&self.operands), bits(state), bits(&y)];
        let after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
        assert!(after[..2] == buffers[..2], "what is only read is as it was");
        [floats(&after[2]), floats(&after[3])]
    }

    /// A state in the reference's order, and the output of a segment.
    pub(in crate::kernels) fn of(&self, s: usize, [state, y]: &[Vec<f32>; 2]) -> [Vec<f32>; 2] {
        let (of, Dims { heads, stride, offset, y_stride, .. }) = (self.segments[s], self.dims);
        let record = &state[of.to as usize * stride + offset..][..heads * N * N];
        let rows = (of.first..of.first + of.rows).map(|row| &y[row as usize * y_stride..][..heads * N]);
        [swapped(self.cases[s].dims, record), rows.flatten().copied().collect()]
    }

    /// That segment `s` has the bits that it has in `all`, whatever is beside it there, in two calls of which the first has so
    /// many of its rows. `run` gives states and outputs after some segments, from the states before.
    pub(in crate::kernels) fn holds_cut(
        &self,
        s: usize,
        first: u32,
        all: &[Vec<f32>; 2],
        label: &str,
        run: impl Fn(&[Segment], &[f32]) -> [Vec<f32>; 2],
    ) -> Result<(), TestCaseError> {
        let segment = self.segments[s];
        let begin = Segment { rows: first, ..segment };
        let rest =
            Segment { first: segment.first + first, rows: segment.rows - first, from: segment.to, ..segment };
        let [state, mut y] = run(&[begin], &self.state);
        let [state, rest] = run(&[rest], &state);
        for (y, rest) in y.iter_mut().zip(rest).filter(|(y, _)| y.is_nan()) {
            *y = rest;
        }
        let (got, want) = (self.of(s, &[state, y]), self.of(s, all));
        prop_assert!(bits(&got[0]) == bits(&want[0]), "state of {s}, {label}");
        prop_assert!(bits(&got[1]) == bits(&want[1]), "y of {s}, {label}");
        Ok(())
    }

    /// That states and outputs are the twin's, within limits for the tokens, and nothing else was written.
    pub(in crate::kernels) fn holds(
        &self,
        label: &str,
        after: [Vec<f32>; 2],
        limits: impl Fn(usize) -> (f64, f64),
    ) -> Result<(), TestCaseError> {
        for (s, case) in self.cases.iter().enumerate() {
            let [state, y] = self.of(s, &after);
            let tokens = case.dims.tokens;
            if tokens == 0 {
                prop_assert!(bits(&state) == bits(&case.state), "a state passed on");
                continue;
            }
            let (want, limits) = (case.twin(), limits(tokens));
            let within = |got: &[f32], want: &[f64], limit, what| {
                nmse(got, want, limit).map_err(|e| TestCaseError::fail(format!("{label}.{what}: {e}")))
            };
            within(&state, &want.0, limits.0, "state")?;
            within(&y, &want.1, limits.1, "y")?;
        }
        let Dims { heads, stride, offset, y_stride, .. } = self.dims;
        let [mut state, mut y] = after;
        for of in &self.segments {
            let start = of.to as usize * stride + offset;
            state[start..][..heads * N * N].copy_from_slice(&self.state[start..][..heads * N * N]);
            for row in of.first..of.first + of.rows {
                y[row as usize * y_stride..][..heads * N].fill(f32::NAN);
            }
        }
        prop_assert!(bits(&state) == bits(&self.state), "{label}: other records are as they were");
        prop_assert!(y.iter().all(|y| y.is_nan()), "{label}: other rows are as they were");
        Ok(())
    }
}

/// A case in which one token in four has the key of the one before it: what they ask is nearly the same then.
fn drawn(dims: wkv7::Dims, rng: &mut SplitMix64) -> Case {
    let (mut case, width) = (Case::draw(dims, rng.next_u64()), dims.heads * N);
    for t in (1..dims.tokens).filter(|_| rng.next_u64().is_multiple_of(4)) {
        let [_, _, k, _, a, b] = &mut case.operands;
        for of in [k, a, b] {
            of.copy_within((t - 1) * width..t * width, t * width);
        }
    }
    case
}

/// Writes the operands of a case as the kernel reads them, `[T, H, 6, N]`, from a row on.
fn packed(case: &Case, first: usize, operands: &mut [f32]) {
    let [r, lw, k, v, a, b] = &case.operands;
    let decay: Vec<f32> = lw.iter().map(|lw| lw.exp_m1()).collect();
    let kappa: Vec<f32> = a.iter().map(|a| -a).collect();
    for (n, x) in [&decay, k, &kappa, b, r, v].into_iter().enumerate() {
        for (at, x) in x.chunks(N).enumerate() {
            let head = first * case.dims.heads + at;
            operands[(head * OPERANDS + n) * N..][..N].copy_from_slice(x);
        }
    }
}

fn lengths() -> impl Strategy<Value = Vec<usize>> {
    let length = prop_oneof![1 => Just(0usize), 2 => Just(8), 2 => Just(9), 5 => 1..=40usize];
    proptest::collection::vec(length, 1..=4)
}

fn config() -> ProptestConfig {
    ProptestConfig { cases: 16, ..ProptestConfig::with_source_file(file!()) }
}

#[test]
fn agrees_with_its_twin() {
    let of = |paired| variants_for_tests(VARIANTS, &overrides(Format::F32, Rounding::Nearest, false, paired));
    let variants: Vec<_> = [false, true].into_iter().flat_map(of).collect();
    proptest!(config(), |(heads in 1..=5usize, lengths in lengths(), seed: u64)| {
        let call = Call::draw(heads, &lengths, seed);
        for of in &variants {
            let (label, after) = (of.1.kernel().label(), call.run(of, &call.segments, &call.state));
            call.holds(&label, after, limits)?;
        }
    });
}

/// A segment has its bits whatever is beside it; and one token at a time, in two calls those of one.
#[test]
fn a_segment_has_its_bits_alone_and_in_parts() {
    let variants = variants_for_tests(VARIANTS, &[]);
    proptest!(config(), |(heads in 1..=3usize, lengths in lengths(), part in 0..40u32, seed: u64)| {
        let call = Call::draw(heads, &lengths, seed);
        for of in &variants {
            let all = call.run(of, &call.segments, &call.state);
            for (s, &segment) in call.segments.iter().enumerate() {
                let first = part.min(segment.rows);
                let begin = Segment { rows: first, ..segment };
                let rest = Segment {
                    first: segment.first + first,
                    rows: segment.rows - first,
                    from: segment.to,
                    ..segment
                };
                let [state, mut y] = call.run(of, &[begin], &call.state);
                let [state, rest] = call.run(of, &[rest], &state);
                for (y, rest) in y.iter_mut().zip(rest).filter(|(y, _)| y.is_nan()) {
                    *y = rest;
                }
                let (got, want) = (call.of(s, &[state, y]), call.of(s, &all));
                prop_assert!(bits(&got[0]) == bits(&want[0]), "state of {s}");
                prop_assert!(bits(&got[1]) == bits(&want[1]), "y of {s}");
            }
        }
    });
}

// ---- States that are held in less, or written seldom ----

/// Where a sequence stands before a call, and what it reads in it.
struct Sequence {
    case: Case,
    /// First row.
    first: u32,
    /// Slots of what is pending, and of each row.
    pending: Vec<u32>,
    slots: Vec<u32>,
    /// Tokens read before.
    step: u32,
}

struct HeldCall {
    held: Held,
    dims: Dims,
    /// Base `s` is of the sequence before, `S + s` of it afterwards.
    sequences: Vec<Sequence>,
    operands: Vec<f32>,
    state: Vec<u32>,
}

impl HeldCall {
    /// Lengths of what each sequence reads, after some that is pending.
    fn draw(held: Held, heads: usize, lengths: &[usize], seed: u64) -> Self {
        let mut rng = SplitMix64::new(seed);
        let (width, count) = (heads * N, lengths.len());
        let offset = below(&mut rng, 9) as usize;
        let stride = offset + heads * held.format.head_words() + below(&mut rng, 9) as usize;
        let entry = below(&mut rng, 9) as usize;
        let slot_stride = entry + ENTRY * width + below(&mut rng, 9) as usize;
        let ring = held.capacity + 1;
        let slots = count * (held.capacity + ring);
        let pending = (held.capacity > 0).then_some(Pending {
            capacity: held.capacity,
            slots,
            start: 2 * count * stride,
            stride: slot_stride,
            entry,
        });
        let (mut rows, mut sequences) = (0, Vec::new());
        for (s, &tokens) in lengths.iter().enumerate() {
            rows += below(&mut rng, 2) as usize;
            let own = s * (held.capacity + ring);
            let slot = |n: usize| u32::try_from(own + n).unwrap();
            let pending = below(&mut rng, u32::try_from(ring).unwrap());
            sequences.push(Sequence {
                case: drawn(wkv7::Dims { tokens, heads, head_size: N }, &mut rng),
                first: u32::try_from(rows).unwrap(),
                pending: (0..pending as usize).map(slot).collect(),
                // As few as suffice: those of tokens that are folded are taken again.
                slots: (0..tokens).map(|row| slot(held.capacity + row % ring)).collect(),
                step: below(&mut rng, 9),
            });
            rows += tokens;
        }
        rows += 1;
        let y_stride = width + below(&mut rng, 9) as usize;
        let dims =
            Dims { rows, segments: count, heads, format: held.format, stride, offset, y_stride, pending };
        let mut call = Self {
            held,
            dims,
            sequences,
            operands: vec![f32::NAN; rows * OPERANDS * width],
            state: vec![f32::NAN.to_bits(); 2 * count * stride + slots * slot_stride],
        };
        for s in 0..count {
            let of = &call.sequences[s];
            packed(&of.case, of.first as usize, &mut call.operands);
            let base = Base::new(held.stored(), N, &of.case.state);
            call.state[s * stride + offset..][..base.to_words().len()].copy_from_slice(&base.to_words());
            let tokens = of.pending.len();
            let (mut log, mut y) = (Undecayed::<f64>::new(heads, N), vec![0.0; tokens * width]);
            let before = Case::draw(wkv7::Dims { tokens, heads, head_size: N }, rng.next_u64());
            for (t, slot) in of.pending.clone().into_iter().enumerate() {
                let token = before.tokens(t..t + 1, Vec::new());
                log.step(
                    token.dims,
                    inputs(&token.operands.map(|x| wide(&x))),
                    &wide(&base.load()),
                    &mut y[..width],
                );
                let own = t * width..(t + 1) * width;
                let vectors = [&log.q[own.clone()], &log.v[own.clone()], &log.b[own.clone()], &log.k[own]];
                for (vector, x) in vectors.into_iter().chain([&log.since[..]]).enumerate() {
                    #[expect(clippy::cast_possible_truncation, reason = "entries are single precision")]
                    let x: Vec<u32> = x.iter().map(|&x| (x as f32).to_bits()).collect();
                    let at = call.entry_at(slot, vector);
                    call.state[at..at + width].copy_from_slice(&x);
                }
            }
        }
        call
    }

    fn width(&self) -> usize {
        self.dims.heads * N
    }

    /// Where a vector of an entry begins.
    fn entry_at(&self, slot: u32, vector: usize) -> usize {
        let of = self.dims.pending.unwrap();
        of.start + slot as usize * of.stride + of.entry + vector * self.width()
    }

    /// Where the heads of a base are.
    fn base_at(&self, base: usize) -> std::ops::Range<usize> {
        let start = base * self.dims.stride + self.dims.offset;
        start..start + self.dims.heads * self.held.format.head_words()
    }

    fn base(&self, state: &[u32], base: usize) -> Vec<f32> {
        Base::from_words(self.held.stored(), N, &state[self.base_at(base)]).load().into_owned()
    }

    /// What is pending, as the twin has it.
    fn log(&self, state: &[u32], slots: &[u32]) -> Undecayed<f64> {
        let mut log = Undecayed::new(self.dims.heads, N);
        for &slot in slots {
            let vector = |of| wide(&floats(&state[self.entry_at(slot, of)..][..self.width()]));
            log.q.extend(vector(0));
            log.v.extend(vector(1));
            log.b.extend(vector(2));
            log.k.extend(vector(3));
            log.since = vector(4);
        }
        log
    }

    /// State and outputs after some of the sequences, by number.
    fn run(&self, (device, kernel): &(&Device, Pipeline), of: &[usize]) -> (Vec<u32>, Vec<f32>) {
        let count = self.sequences.len();
        let segment = |&s: &usize| {
            let Sequence { case, first, pending, slots, step } = &self.sequences[s];
            let (folds, _) = advance(self.held.capacity, pending.len(), case.dims.tokens);
            resident::Segment {
                first: *first,
                rows: u32::try_from(case.dims.tokens).unwrap(),
                from: u32::try_from(s).unwrap(),
                to: folds.then(|| u32::try_from(count + s).unwrap()),
                pending,
                slots: if self.held.capacity == 0 { &[] } else { slots },
                step: *step,
            }
        };
        let segments = table(&of.iter().map(segment).collect::<Vec<_>>());
        let dims = Dims { segments: of.len(), ..self.dims };
        let (params, groups) = lower(kernel.kernel(), dims).unwrap();
        let y = vec![f32::NAN.to_bits(); self.dims.rows * self.dims.y_stride];
        let buffers = [segments, bits(&self.operands), self.state.clone(), y];
        let after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
        assert!(after[..2] == buffers[..2], "what is only read is as it was");
        (after[2].clone(), floats(&after[3]))
    }

    /// That a sequence is where it should be, and what was written of it, put back.
    fn check(&self, label: &str, s: usize, state: &mut [u32], y: &mut [f32]) -> Result<(), TestCaseError> {
        let (held, width, count) = (self.held, self.width(), self.sequences.len());
        let Sequence { case, first, pending, slots, step } = &self.sequences[s];
        let tokens = case.dims.tokens;
        let (folds, left) = advance(held.capacity, pending.len(), tokens);
        let later = if folds { left } else { tokens };
        let first_later = tokens - later;
        let (dims, limit) = (case.dims, limits(tokens + pending.len()));
        let within = |got: &[f32], want: &[f64], limit, what: &str| {
            nmse(got, want, limit).map_err(|e| TestCaseError::fail(format!("{label}: {what} of {s}: {e}")))
        };

        let mut x = case.operands.each_ref().map(|x| wide(x));
        if held.rounding == Rounding::DecayDither && tokens > 0 {
            let last = step + u32::try_from(tokens - 1).unwrap();
            for (channel, lw) in (0..).zip(&mut x[1][(tokens - 1) * width..]) {
                *lw = (lw.exp_m1() + f64::from(decay_dither(last, channel))).ln_1p();
            }
        }
        let part = |rows: std::ops::Range<usize>| {
            x.each_ref().map(|x| x[rows.start * width..rows.end * width].to_vec())
        };
        let mut base = wide(&self.base(&self.state, s));
        let mut log = self.log(&self.state, pending);
        let mut want = vec![0.0; tokens * width];
        let (head, tail) = want.split_at_mut(first_later * width);
        if folds {
            let mut exact = log.materialize(&base);
            twin(wkv7::Dims { tokens: first_later, ..dims }, inputs(&part(0..first_later)), &mut exact, head);
            let rounding = held.rounding_at(step + u32::try_from(first_later).unwrap());
            let got = self.base(state, count + s);
            // What rounding did to single values: eight times what it does to their squares in the mean.
            let off = 8.0 * (limit.0 * magnitude(&exact).powi(2)).sqrt();
            #[expect(clippy::cast_possible_truncation, reason = "an interval around it")]
            let bounds: Vec<_> = exact.iter().map(|&x| Interval::exact(x as f32).widened(off)).collect();
            held.check_stored(&format!("{label}: base of {s}"), &got, &bounds, rounding)?;
            (base, log) = (wide(&got), Undecayed::new(self.dims.heads, N));
        }
        log.step(wkv7::Dims { tokens: later, ..dims }, inputs(&part(first_later..tokens)), &base, tail);

        let rows = |t: usize| (*first as usize + t) * self.dims.y_stride..;
        let got: Vec<f32> = (0..tokens).flat_map(|t| y[rows(t)][..width].to_vec()).collect();
        if tokens > 0 {
            within(&got, &want, limit.1, "y")?;
        }
        let kept = if held.capacity == 0 { 0 } else { later };
        let start = log.q.len() - kept * width;
        let entries = |of: usize| -> Vec<f32> {
            let slots = slots[tokens - kept..].iter();
            slots.flat_map(|&slot| floats(&state[self.entry_at(slot, of)..][..width])).collect()
        };
        if kept > 0 {
            within(&entries(0), &log.q[start..], limit.1, "q")?;
            compare("v", &entries(1), &log.v[start..], |_| 0.0)?;
            // Products of so many decays, a division and another product.
            #[expect(clippy::cast_precision_loss, reason = "a small count")]
            let roundings = (held.capacity + 5) as f64 * U;
            for (vector, want) in [(2, &log.b), (3, &log.k)] {
                let want = &want[start..];
                compare("b or k", &entries(vector), want, |at| roundings * want[at].abs())?;
            }
            let last = entries(4);
            compare("since", &last[last.len() - width..], &log.since, |at| roundings * log.since[at])?;
        }

        for t in 0..tokens {
            y[rows(t)][..width].fill(f32::NAN);
        }
        for at in [self.base_at(count + s)].into_iter().chain(
            slots[tokens - kept..].iter().map(|&slot| self.entry_at(slot, 0)..self.entry_at(slot, ENTRY)),
        ) {
            state[at.clone()].copy_from_slice(&self.state[at]);
        }
        Ok(())
    }
}

fn inputs(x: &[Vec<f64>; 6]) -> Inputs<'_, f64> {
    let [r, lw, k, v, a, b] = x;
    Inputs { r, lw, k, v, a, b }
}

/// `paired`: two tokens at a time.
fn held_so(held: Held, paired: bool) {
    let overrides = overrides(held.format, held.rounding, held.capacity > 0, paired);
    let variants = variants_for_tests(VARIANTS, &overrides);
    let config = ProptestConfig { cases: 6, ..ProptestConfig::with_source_file(file!()) };
    proptest!(config, |(heads in 1..=3usize, lengths in lengths(), seed: u64)| {
        let call = HeldCall::draw(held, heads, &lengths, seed);
        // Without a list there is nothing to pass on.
        let all: Vec<usize> =
            (0..lengths.len()).filter(|&s| held.capacity > 0 || lengths[s] > 0).collect();
        for of in variants.iter().filter(|_| !all.is_empty()) {
            let label = format!("{} {held:?}", of.1.kernel().label());
            let (mut state, mut y) = call.run(of, &all);
            let whole = (state.clone(), bits(&y));
            for &s in &all {
                call.check(&label, s, &mut state, &mut y)?;
            }
            prop_assert!(state == call.state, "{label}: nothing else is written of the state");
            prop_assert!(y.iter().all(|y| y.is_nan()), "{label}: other rows are as they were");
            // Alone as beside others.
            let s = all[0];
            let (state, y) = call.run(of, &[s]);
            let rows = call.sequences[s].first as usize * call.dims.y_stride..;
            let len = lengths[s] * call.dims.y_stride;
            prop_assert!(bits(&y[rows.clone()][..len]) == whole.1[rows][..len], "{label}: alone");
            let base = call.base_at(lengths.len() + s);
            prop_assert!(state[base.clone()] == whole.0[base], "{label}: a base alone");
        }
    });
}

#[test]
fn single_precision_that_is_written_seldom() {
    let held = Held { format: Format::F32, rounding: Rounding::Nearest, capacity: 7 };
    held_so(held, false);
    held_so(held, true);
    held_so(Held { capacity: 1, ..held }, true);
}

#[test]
fn halves() {
    held_so(Held { format: Format::F16, rounding: Rounding::Nearest, capacity: 5 }, true);
    held_so(Held { format: Format::F16, rounding: Rounding::Dither, capacity: 2 }, false);
}

#[test]
fn halves_without_a_list() {
    for (rounding, paired) in
        [(Rounding::Nearest, true), (Rounding::Dither, false), (Rounding::DecayDither, true)]
    {
        held_so(Held { format: Format::F16, rounding, capacity: 0 }, paired);
    }
}

#[test]
fn bytes() {
    held_so(Held { format: Format::Int8, rounding: Rounding::Nearest, capacity: 16 }, true);
    held_so(Held { format: Format::Int8, rounding: Rounding::Dither, capacity: 3 }, false);
}

#[test]
fn refuses_what_it_cannot_run() {
    let (kernel, name) = (&VARIANTS[0], "wkv7_scan");
    let state = 3 * N * N;
    let plain = Dims {
        rows: 9,
        segments: 2,
        heads: 3,
        format: Format::F32,
        stride: state + 10,
        offset: 10,
        y_stride: 192,
        pending: None,
    };
    let halves = Dims { format: Format::F16, stride: 3 * Format::F16.head_words() + 10, ..plain };
    assert!(lower(kernel, halves).is_ok(), "halves take less");
    let slots = Pending { capacity: 4, slots: 7, start: 2 * state, stride: 5 * 192 + 3, entry: 3 };
    let with = |slots| lower(kernel, Dims { pending: Some(slots), ..plain });
    let params = with(slots).unwrap().0;
    assert_eq!(
        [params.capacity, params.slots, params.slot_stride, params.entry],
        [4, 24_576, 963, 3],
        "slots"
    );
    let short = Pending { stride: 962, ..slots };
    let refused = Err(Error::Stride { kernel: name, width: 960, offset: 3, stride: 962 });
    assert_eq!(with(short).map(|_| ()), refused, "an entry");
    for slots in [
        Pending { slots: usize::MAX, ..slots },
        Pending { start: usize::MAX, ..slots },
        Pending { capacity: usize::MAX, ..slots },
    ] {
        assert!(with(slots).is_err(), "{slots:?}");
    }
    let lowered = |dims| lower(kernel, dims).map(|(of, groups)| (of.heads, of.stride, of.offset, groups));
    assert_eq!(lowered(plain), Ok((3, 12_298, 10, [3, 2, 1])), "plain");
    if let Some(shared) = VARIANTS.get(1) {
        assert_eq!(lower(shared, plain).map(|(_, groups)| groups), Ok([12, 2, 1]), "four to a head");
    }
    let stride = |width, offset, stride| Err(Error::Stride { kernel: name, width, offset, stride });
    assert_eq!(lowered(Dims { offset: 11, ..plain }), stride(state, 11, state + 10), "record");
    assert_eq!(lowered(Dims { y_stride: 191, ..plain }), stride(192, 0, 191), "y");
    let groups = |got| Err(Error::Groups { kernel: name, got });
    assert_eq!(lowered(Dims { segments: 65_536, ..plain }), groups([3, 65_536]), "segments");
    assert!(lowered(Dims { segments: MAX_GROUPS as usize, ..plain }).is_ok(), "the most");
    for dims in [
        Dims { rows: usize::MAX, ..plain },
        Dims { heads: usize::MAX, ..plain },
        Dims { offset: usize::MAX, stride: usize::MAX, ..plain },
        Dims { rows: 1 << 22, ..plain },
    ] {
        assert!(lowered(dims).is_err(), "{dims:?}");
    }
}
