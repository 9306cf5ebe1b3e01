//! `time_mix_resident.wgsl` against [`rwkv_core::ops::time_mix_resident`] in `f64`, and its bases against `rwkv_state`.

use proptest::prelude::*;
use rwkv_core::config::Ranks;
use rwkv_core::ops::time_mix_resident as twin;
use rwkv_core::ops::wkv7;
use rwkv_core::ops::wkv7_lazy::Undecayed;
use rwkv_core::rng::SplitMix64;
use rwkv_state::StateFormat;
use rwkv_state::base::{Base, head_words};
use rwkv_state::format::{Rounding as Stored, decay_dither, exponent, float16, int8};

use super::{
    Dims, ENTRY, Error, Format, HEAD_SIZE as N, Rounding, Segment, VARIANTS, lower, overrides, table,
    table_len, workgroup_bytes,
};
use crate::gpu::{Device, device_for_tests, variants_for_tests};
use crate::kernels::heads::{Heads, NAN, Operands, swapped, total};
use crate::kernels::intervals::{Interval, below, exact, floats, held};
use crate::kernels::testing::{bits as words, wide};
use crate::kernels::{packed, readout_packed};
use crate::pipeline::Pipeline;

/// How states are held.
#[derive(Clone, Copy, Debug)]
pub(in crate::kernels) struct Held {
    pub(in crate::kernels) format: Format,
    pub(in crate::kernels) rounding: Rounding,
    pub(in crate::kernels) capacity: usize,
}

impl Held {
    pub(in crate::kernels) const fn stored(self) -> StateFormat {
        match self.format {
            Format::F32 => StateFormat::F32,
            Format::F16 => StateFormat::F16,
            Format::Int8 => StateFormat::Int8Scaled,
        }
    }

    pub(in crate::kernels) const fn rounding_at(self, step: u32) -> Stored {
        match self.rounding {
            Rounding::Dither => Stored::Dither { step },
            Rounding::Nearest | Rounding::DecayDither => Stored::Nearest,
        }
    }

    /// That values `[value, key]` of a base are those of the intervals, but for what storing them rounds.
    pub(in crate::kernels) fn check_stored(
        self,
        what: &str,
        got: &[f32],
        bounds: &[Interval],
        rounding: Stored,
    ) -> Result<(), TestCaseError> {
        let widened: Vec<Interval> = got
            .chunks_exact(N)
            .zip(bounds.chunks_exact(N))
            .flat_map(|(_, row)| {
                let most = row.iter().map(|x| x.size()).fold(0.0, f64::max);
                #[expect(clippy::cast_possible_truncation, reason = "a bound, rounded up below")]
                let single = |x: f64| (x * (1.0 + 1e-6)) as f32;
                let of_block = |j: usize| {
                    let block = &row[j / int8::BLOCK * int8::BLOCK..][..int8::BLOCK];
                    single(block.iter().map(|x| x.size()).fold(0.0, f64::max))
                };
                let error = move |j: usize| match self.format {
                    Format::F32 => 0.0,
                    // A kept exponent has the row within its window.
                    Format::F16 => {
                        float16::error_bound(single(row[j].size()), exponent::fresh(single(most)), rounding)
                            .max(rounding.units() * most * 2f64.powi(-22))
                    }
                    // A quotient is off by some units of its last place, which may round it the other way.
                    Format::Int8 => int8::error_bound(of_block(j), single(most), rounding) * (1.0 + 1e-5),
                };
                (0..N).map(move |j| row[j].widened(error(j))).collect::<Vec<_>>()
            })
            .collect();
        held(what, got, &widened)
    }
}

/// Where a sequence stands.
#[derive(Clone, Debug)]
struct At {
    base: u32,
    pending: Vec<u32>,
    step: u32,
}

/// One call, and what it changes.
struct Case {
    of: Heads,
    dims: Dims,
    held: Held,
    /// First row and rows of each sequence.
    lengths: Vec<[u32; 2]>,
    /// Bases 0 to S - 1 are of the sequences before, S to 2 S - 1 of them afterwards; slots are given out in order.
    sequences: Vec<At>,
    state: Vec<u32>,
}

#[derive(Clone)]
struct After {
    state: Vec<u32>,
    v_first: Vec<f32>,
    out: Vec<f32>,
}

impl Case {
    fn draw(heads: usize, lengths: &[usize], ranks: Ranks, held: Held, seed: u64) -> Self {
        let mut rng = SplitMix64::new(seed);
        let (width, sequences) = (heads * N, lengths.len());
        let (mut first, mut rows) = (below(&mut rng, 2), Vec::new());
        for &length in lengths {
            let length = u32::try_from(length).unwrap();
            rows.push([first, length]);
            first += length + below(&mut rng, 2);
        }
        let of = Heads::draw(&mut rng, first.max(1) as usize, heads, ranks, 5);
        let head_words = held.format.head_words();
        let base_stride = heads * head_words + below(&mut rng, 9) as usize;
        let entry = below(&mut rng, 9) as usize;
        let slot_stride = entry + ENTRY * width + below(&mut rng, 9) as usize;
        let slots = 2 * sequences * base_stride;
        let state_len = slots + (first as usize + sequences) * slot_stride;
        let mut state = vec![f32::NAN.to_bits(); state_len];
        for s in 0..sequences {
            let heads: Vec<f32> = (0..heads).flat_map(|_| swapped(&Heads::draw_state(&mut rng))).collect();
            let base = Base::new(held.stored(), N, &heads).to_words();
            state[s * base_stride..][..base.len()].copy_from_slice(&base);
        }
        let dims = Dims {
            rows: of.rows,
            segments: sequences,
            heads,
            head_size: N,
            ranks,
            inputs: of.stride,
            format: held.format,
            capacity: held.capacity,
            base_stride,
            slots,
            slot_stride,
            entry,
            state: state_len,
        };
        let at = |base: usize| At {
            base: u32::try_from(base).unwrap(),
            pending: Vec::new(),
            step: below(&mut rng, 9),
        };
        let sequences = (0..sequences).map(at).collect();
        Self { of, dims, held, lengths: rows, sequences, state }
    }

    fn before(&self, of: &Compiled) -> After {
        let out = vec![f32::NAN; self.of.rows * of.planes * self.of.width()];
        After { state: self.state.clone(), v_first: self.of.v_first.clone(), out }
    }

    /// One call over `rows` rows of each sequence, from row `start` of it: what it leaves, and where the sequences stand.
    /// Row `t` of all rows has slot `t`.
    fn run(
        &self,
        of: &Compiled,
        sequences: &[At],
        start: u32,
        rows: u32,
        before: &After,
    ) -> (After, Vec<At>) {
        let (mut segments, mut stand) = (Vec::new(), Vec::new());
        let count = u32::try_from(self.sequences.len()).unwrap();
        let own: Vec<Vec<u32>> = self
            .lengths
            .iter()
            .map(|&[first, length]| {
                (first..first + length).skip(start as usize).take(rows as usize).collect()
            })
            .collect();
        for ((s, at), own) in (0..).zip(sequences).zip(&own) {
            let after = advance(self.held.capacity, at.pending.len(), own.len());
            let to = (after.0 && !own.is_empty()).then_some(count + s);
            let mut pending = if after.0 { Vec::new() } else { at.pending.clone() };
            let kept = after.1 - pending.len();
            pending.extend_from_slice(&own[own.len() - kept..]);
            let step = at.step + u32::try_from(own.len()).unwrap();
            stand.push(At { base: to.unwrap_or(at.base), pending, step });
            segments.push(Segment {
                first: own.first().copied().unwrap_or_default(),
                rows: u32::try_from(own.len()).unwrap(),
                from: at.base,
                to,
                pending: &at.pending,
                slots: if self.held.capacity == 0 { &[] } else { own },
                step: at.step,
            });
        }
        (self.call(of, &segments, before), stand)
    }

    fn call(&self, of: &Compiled, segments: &[Segment<'_>], before: &After) -> After {
        let (params, groups) = lower(self.dims, of.lora_up.then_some(of.lanes)).unwrap();
        let [weights, up] =
            if of.lora_up { [self.of.weights.words(), NAN.to_vec()] } else { [NAN.to_vec(), self.of.up()] };
        let table = table(segments);
        assert!(table.len() <= table_len(self.of.rows, segments.len(), self.held.capacity), "room");
        let buffers = [
            table,
            words(&self.of.inputs),
            weights,
            up,
            words(&self.of.vectors),
            before.state.clone(),
            words(&before.v_first),
            packed::tests::words(&before.out, of.planes * self.of.width(), of.halves),
        ];
        let after = of.device.run(&of.kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
        assert_eq!(after[..5], buffers[..5], "the operands are untouched");
        let out = packed::tests::floats(&after[7], of.planes * self.of.width(), of.halves);
        After { state: after[5].clone(), v_first: floats(&after[6]), out }
    }

    /// What a base holds, `[H, value, key]`.
    fn base(&self, state: &[u32], base: u32) -> Vec<f32> {
        let words = &state[base as usize * self.dims.base_stride..];
        let words = &words[..self.dims.heads * head_words(self.held.stored(), N)];
        Base::from_words(self.held.stored(), N, words).load().into_owned()
    }

    /// A vector of an entry.
    fn entry<'a>(&self, state: &'a [u32], slot: u32, vector: usize) -> &'a [u32] {
        let at = self.dims.slots + slot as usize * self.dims.slot_stride + self.dims.entry;
        &state[at + vector * self.of.width()..][..self.of.width()]
    }

    /// What is pending, as the twin has it.
    fn pending(&self, state: &[u32], slots: &[u32]) -> Undecayed<f64> {
        let mut log = Undecayed::new(self.dims.heads, N);
        for &slot in slots {
            let vector = |of| wide(&floats(self.entry(state, slot, of)));
            log.q.extend(vector(0));
            log.v.extend(vector(1));
            log.b.extend(vector(2));
            log.k.extend(vector(3));
            log.since = vector(4);
        }
        log
    }

    /// One row of a sequence: that what the kernel made of it is what it may be.
    fn check(
        &self,
        of: &Compiled,
        row: u32,
        now: &After,
        at: &At,
        next: &After,
        then: &At,
    ) -> Result<(), TestCaseError> {
        let label = &format!("{} {:?}", of.label, self.held);
        let written = |out: &[Interval]| out.iter().map(|out| out.rounded(of.halves)).collect::<Vec<_>>();
        let (heads, width, row_at) = (self.dims.heads, self.of.width(), row as usize);
        let folds = then.base != at.base;
        let lazy = self.held.capacity > 0;
        let mut log = self.pending(&now.state, &at.pending);
        let mut base = wide(&self.base(&now.state, at.base));
        if lazy && folds {
            // What was folded is what the next base holds, within what storing it rounds.
            let exact = log.materialize(&base);
            let stored = self.base(&next.state, then.base);
            for head in 0..heads {
                let undecayed = self.undecayed(&now.state, at, head);
                let folded = |i: usize, j: usize| undecayed.0[j * N + i] * undecayed.1[j];
                let bounds: Vec<Interval> = (0..N * N).map(|k| folded(k / N, k % N)).collect();
                held(&format!("{label}: twin: folded"), &exact[head * N * N..][..N * N], &bounds)?;
                let rounding = self.held.rounding_at(at.step);
                self.held.check_stored(
                    &format!("{label}: base"),
                    &stored[head * N * N..][..N * N],
                    &bounds,
                    rounding,
                )?;
            }
            base = wide(&stored);
            log = Undecayed::new(heads, N);
        }
        let pending = if folds && lazy { &[] } else { &at.pending[..] };
        let here = At {
            base: if lazy && folds { then.base } else { at.base },
            pending: pending.to_vec(),
            step: at.step,
        };
        let seen = if lazy && folds { next } else { now };
        let channel_dither = |head: usize, j: usize| {
            let channel = u32::try_from(head * N + j).unwrap();
            if self.held.rounding == Rounding::DecayDither { decay_dither(at.step, channel) } else { 0.0 }
        };

        let dims = wkv7::Dims { tokens: 1, heads, head_size: N };
        let mut eager = base.clone();
        let [out, v_first] = self.of.twin(row_at, |of, x, v_first, out| {
            if lazy {
                twin::time_mix_resident(dims, of, x, v_first, &base, &mut log, out);
            } else {
                rwkv_core::ops::time_mix::time_mix(dims, of, x, v_first, &mut eager, out);
            }
        });
        if self.dims.ranks.v == 0 {
            prop_assert_eq!(wide(&next.v_first[row_at * width..][..width]), v_first, "{}: v_first", label);
        }
        let of_row = &next.out[row_at * of.planes * width..][..of.planes * width];
        let of_row = if of.planes == 1 { of_row.to_vec() } else { self.of.finished(of_row) };
        for head in 0..heads {
            let own = head * N..(head + 1) * N;
            let mut x = self.of.operands(row_at, head);
            let got = &of_row[own.clone()];
            if lazy {
                let (vectors, bounds) = self.step(&x, &seen.state, &here, head);
                let slot = *then.pending.last().unwrap();
                let twins = [&log.q, &log.v, &log.b, &log.k, &log.since];
                for (of, (twin, bounds)) in twins.into_iter().zip(&vectors).enumerate() {
                    let twin = &twin[twin.len() - width..][own.clone()];
                    held(&format!("{label}: twin: vector {of}"), twin, bounds)?;
                    let vector = floats(&self.entry(&next.state, slot, of)[own.clone()]);
                    held(&format!("{label}: vector {of} of row {row}, head {head}"), &vector, bounds)?;
                }
                held(&format!("{label}: twin: out"), &out[own.clone()], &bounds)?;
                held(&format!("{label}: out of row {row}, head {head}"), got, &written(&bounds))?;
            } else {
                let dithered = self.held.rounding == Rounding::DecayDither;
                if dithered {
                    x.decay = (0..N).map(|j| x.decay[j] + Interval::exact(channel_dither(head, j))).collect();
                }
                let before: Vec<f32> =
                    swapped(&self.base(&now.state, at.base))[head * N * N..][..N * N].to_vec();
                let after = x.after(&exact(&before));
                let bounds = x.out(&x.answers(&after));
                if !dithered {
                    held(
                        &format!("{label}: twin: state"),
                        &eager[head * N * N..][..N * N],
                        &swapped(&after),
                    )?;
                    held(&format!("{label}: twin: out"), &out[own.clone()], &bounds)?;
                }
                held(&format!("{label}: out of row {row}, head {head}"), got, &written(&bounds))?;
                let stored = &self.base(&next.state, then.base)[head * N * N..][..N * N];
                let rounding = self.held.rounding_at(at.step + 1);
                self.held.check_stored(&format!("{label}: base"), stored, &swapped(&after), rounding)?;
            }
        }
        Ok(())
    }

    /// A head's state as if it had not decayed since its base, `[key, value]`, and by how much it has.
    fn undecayed(&self, state: &[u32], at: &At, head: usize) -> (Vec<Interval>, Vec<Interval>) {
        let own = head * N..(head + 1) * N;
        let base = self.base(state, at.base);
        let mut sum = exact(&swapped(&base)[head * N * N..][..N * N]);
        let mut since = vec![Interval::exact(1.0); N];
        for &slot in &at.pending {
            let vectors = [0, 1, 2, 3, 4].map(|of| exact(&floats(&self.entry(state, slot, of)[own.clone()])));
            let [q, v, b, k, e] = vectors;
            for at in 0..N * N {
                let (j, i) = (at / N, at % N);
                sum[at] = q[i] * b[j] + (v[i] * k[j] + sum[at]);
            }
            since = e;
        }
        (sum, since)
    }

    /// The entry that a row makes, and its output.
    fn step(&self, x: &Operands, state: &[u32], at: &At, head: usize) -> ([Vec<Interval>; 5], Vec<Interval>) {
        let (mut sum, before) = self.undecayed(state, at, head);
        let each = |f: &dyn Fn(usize) -> Interval| (0..N).map(f).collect::<Vec<_>>();
        let since = each(&|j| before[j] * x.decay[j] + before[j]);
        let key = each(&|j| x.key[j] * since[j].recip());
        let rate = each(&|j| x.eta[j] * since[j].recip());
        let q = each(&|i| {
            let asked = total((0..N).map(|j| sum[j * N + i] * (before[j] * x.removal[j])));
            Interval::ZERO - asked * x.unit
        });
        let b = each(&|j| x.removal[j] * x.unit * rate[j]);
        for at in 0..N * N {
            let (j, i) = (at / N, at % N);
            sum[at] = q[i] * b[j] + (x.value[i] * key[j] + sum[at]);
        }
        let y = each(&|i| total((0..N).map(|j| sum[j * N + i] * (since[j] * x.r[j]))));
        let out = x.out(&y);
        ([q, x.value.clone(), b, key, since], out)
    }

    /// Row by row each is within its bounds of the twin, which goes on from where the kernel is; and all together have the
    /// bits of one call.
    fn agrees(&self, of: &Compiled) -> Result<(), TestCaseError> {
        let longest = self.lengths.iter().map(|[_, rows]| *rows).max().unwrap_or_default();
        let (whole, ends) = self.run(of, &self.sequences, 0, longest, &self.before(of));
        let (mut now, mut at) = (self.before(of), self.sequences.clone());
        for t in 0..longest {
            let (next, then) = self.run(of, &at, t, 1, &now);
            for (s, &[first, _]) in self.lengths.iter().enumerate().filter(|(_, [_, rows])| t < *rows) {
                self.check(of, first + t, &now, &at[s], &next, &then[s])?;
            }
            (now, at) = self.moved(next, then);
        }
        for (s, (at, end)) in at.iter().zip(&ends).enumerate() {
            prop_assert_eq!(&at.pending, &end.pending, "{}: what is pending", of.label);
            let [got, want] =
                [(&now, at.base), (&whole, end.base)].map(|(of, base)| words(&self.base(&of.state, base)));
            prop_assert!(got == want, "{}: the base of sequence {s}, in one call", of.label);
            for (&slot, vector) in at.pending.iter().flat_map(|slot| (0..ENTRY).map(move |v| (slot, v))) {
                let [got, want] = [&now, &whole].map(|of| self.entry(&of.state, slot, vector));
                prop_assert!(got == want, "{}: entry {slot} of sequence {s}, in one call", of.label);
            }
        }
        prop_assert!(words(&now.out) == words(&whole.out), "{}: the output, in one call", of.label);
        self.folds_when_asked(of, &now, &at)
    }

    /// Bases that were written move to where bases are read, so that the next call may write them.
    fn moved(&self, mut after: After, mut at: Vec<At>) -> (After, Vec<At>) {
        let (count, stride) = (self.sequences.len(), self.dims.base_stride);
        for (s, at) in at.iter_mut().enumerate().filter(|(_, at)| at.base as usize >= count) {
            after.state.copy_within((count + s) * stride..(count + s + 1) * stride, s * stride);
            at.base = u32::try_from(s).unwrap();
        }
        (after, at)
    }

    /// A segment of no rows writes what is pending into a base.
    fn folds_when_asked(&self, of: &Compiled, now: &After, at: &[At]) -> Result<(), TestCaseError> {
        if self.held.capacity == 0 {
            return Ok(());
        }
        let count = u32::try_from(self.sequences.len()).unwrap();
        let segments: Vec<_> = (0..)
            .zip(at)
            .map(|(s, at)| Segment {
                first: 0,
                rows: 0,
                from: at.base,
                to: Some(count + s),
                pending: &at.pending,
                slots: &[],
                step: at.step,
            })
            .collect();
        let after = self.call(of, &segments, now);
        prop_assert!(words(&after.out) == words(&now.out), "{}: no output", of.label);
        for (segment, at) in segments.iter().zip(at) {
            let stored = self.base(&after.state, segment.to.unwrap());
            for head in 0..self.dims.heads {
                let (sum, since) = self.undecayed(&now.state, at, head);
                let bounds: Vec<_> = (0..N * N).map(|k| sum[k % N * N + k / N] * since[k % N]).collect();
                let rounding = self.held.rounding_at(at.step);
                self.held.check_stored("folded", &stored[head * N * N..][..N * N], &bounds, rounding)?;
            }
        }
        Ok(())
    }
}

/// Whether tokens fold what is pending, and how many are pending afterwards: one by one.
pub(in crate::kernels) fn advance(capacity: usize, mut pending: usize, tokens: usize) -> (bool, usize) {
    let mut folds = false;
    for _ in 0..tokens {
        if pending == capacity {
            (folds, pending) = (true, 0);
        }
        pending = (pending + 1).min(capacity);
    }
    (folds, pending)
}

/// The kernel with its overrides.
struct Compiled {
    device: &'static Device,
    kernel: Pipeline,
    lanes: u32,
    lora_up: bool,
    halves: Option<u8>,
    /// Vectors that it leaves of a row: one, or three where the norm is left to others.
    planes: usize,
    label: String,
}

fn compiled(held: Held) -> Vec<Compiled> {
    let Some(device) = device_for_tests() else { return Vec::new() };
    let sizes = [64u32, 128, 256, 512].into_iter().filter(|&lanes| {
        let capabilities = device.capabilities();
        lanes <= capabilities.invocations && workgroup_bytes(lanes) <= capabilities.workgroup_bytes
    });
    let of_lora = |lanes| {
        // The norm is left to others of the smallest workgroup.
        let all = [(lanes, true, true), (lanes, false, true), (lanes, false, false)];
        all.into_iter().filter(|(lanes, up, norm)| (!up || *lanes != 128) && (*norm || *lanes == 64))
    };
    let with = |(lanes, lora_up, norm): (u32, bool, bool)| {
        // Where products are given, those that read the output may be of cooperative matrices.
        let halves = if lora_up || lanes == 128 || !norm { None } else { Some(4) };
        let overrides = overrides(held.format, held.rounding, held.capacity > 0, lanes, lora_up);
        let overrides = [&overrides[..], &[packed::halves(halves), readout_packed::norm(norm)]].concat();
        variants_for_tests(VARIANTS, &overrides).into_iter().map(move |(device, kernel)| {
            let planes = if norm { 1 } else { 3 };
            let label = format!("{} {lanes} {lora_up} {halves:?} {norm}", kernel.kernel().label());
            Compiled { device, kernel, lanes, lora_up, halves, planes, label }
        })
    };
    sizes.flat_map(of_lora).flat_map(with).collect()
}

fn agree(held: Held) {
    let compiled = compiled(held);
    let config = ProptestConfig { cases: 3, ..ProptestConfig::with_source_file(file!()) };
    let lengths = prop::collection::vec(prop_oneof![1 => Just(0usize), 9 => 1..=7usize], 1..=2);
    let rank = || prop::sample::select(vec![1usize, 5, 8, 24, 33]);
    let ranks = (rank(), rank(), prop_oneof![1 => Just(0), 2 => rank()], rank());
    proptest!(config, |(heads in 1..=2usize, lengths in lengths, (w, a, v, g) in ranks, seed: u64)| {
        prop_assume!(lengths.iter().sum::<usize>() > 0);
        let case = Case::draw(heads, &lengths, Ranks { w, a, v, g }, held, seed);
        for of in &compiled {
            case.agrees(of)?;
        }
    });
}

#[test]
fn single_precision_agrees_with_its_twin() {
    agree(Held { format: Format::F32, rounding: Rounding::Nearest, capacity: 3 });
    agree(Held { format: Format::F32, rounding: Rounding::Nearest, capacity: 16 });
}

#[test]
fn halves_agree_with_their_twin() {
    agree(Held { format: Format::F16, rounding: Rounding::Nearest, capacity: 3 });
    agree(Held { format: Format::F16, rounding: Rounding::Dither, capacity: 1 });
}

#[test]
fn halves_at_every_token_agree_with_their_twin() {
    for rounding in [Rounding::Nearest, Rounding::Dither, Rounding::DecayDither] {
        agree(Held { format: Format::F16, rounding, capacity: 0 });
    }
}

#[test]
fn bytes_agree_with_their_twin() {
    agree(Held { format: Format::Int8, rounding: Rounding::Nearest, capacity: 4 });
}

#[test]
fn words_are_what_the_state_says() {
    for (format, stored) in [
        (Format::F32, StateFormat::F32),
        (Format::F16, StateFormat::F16),
        (Format::Int8, StateFormat::Int8Scaled),
    ] {
        assert_eq!(format.head_words(), head_words(stored, N), "{format:?}");
    }
}

#[test]
fn refuses_what_it_cannot_run() {
    let plain = Dims {
        rows: 9,
        segments: 2,
        heads: 3,
        head_size: 64,
        ranks: Ranks { w: 5, a: 6, v: 7, g: 8 },
        inputs: 9 * 64 + 26,
        format: Format::F16,
        capacity: 8,
        base_stride: 3 * 2064,
        slots: 4 * 3 * 2064,
        slot_stride: 7 * 192,
        entry: 2 * 192,
        state: 4 * 3 * 2064 + 20 * 7 * 192,
    };
    let (params, groups) = lower(plain, Some(256)).unwrap();
    assert_eq!((groups, params.width, params.first_layer, params.capacity), ([3, 2, 1], 192, 0, 8), "plain");
    assert_eq!(
        [params.base_stride, params.slots, params.slot_stride, params.entry],
        [6192, 24_768, 1344, 384],
        "layout"
    );
    assert!(lower(Dims { capacity: 0, slot_stride: 384, ..plain }, None).is_ok(), "no entries");
    let rows = "what rows have of heads";
    for (of, what) in [
        (Dims { head_size: 32, ..plain }, rows),
        (Dims { rows: 0, ..plain }, rows),
        (Dims { segments: 0, ..plain }, rows),
        (Dims { inputs: plain.inputs - 1, ..plain }, rows),
        (Dims { heads: usize::MAX, ..plain }, rows),
        (Dims { base_stride: plain.base_stride - 1, ..plain }, "the heads of a base"),
        (Dims { format: Format::F32, ..plain }, "the heads of a base"),
        (Dims { slot_stride: plain.slot_stride - 1, ..plain }, "an entry in a slot"),
        (Dims { entry: usize::MAX, ..plain }, "an entry in a slot"),
        (Dims { slots: plain.state + 1, ..plain }, "the bases before the slots"),
        (Dims { state: 1 << 32, ..plain }, "the state among 32-bit indices"),
    ] {
        assert_eq!(lower(of, Some(256)), Err(Error::Resident(what)), "{of:?}");
    }
    assert!(matches!(lower(plain, Some(48)), Err(Error::Lanes { .. })), "lanes");
    assert!(matches!(lower(Dims { segments: 65_536, ..plain }, None), Err(Error::Groups { .. })), "groups");
}
