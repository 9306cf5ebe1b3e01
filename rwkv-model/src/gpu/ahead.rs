//! Tokens generated ahead of the host: each step samples on the device, reads what it sampled, and leaves the token
//! where the host finds it a few steps later.
//!
//! A step's state is a record of its own, so that the host takes over exactly what it has seen: steps beyond that are
//! forgotten with their records.

use std::collections::VecDeque;

use rwkv_core::ops::sample::{Counts, Sampler};
use rwkv_kernels::kernels::sample;
use rwkv_kernels::pipeline::Pipeline;

use super::plan::{Bound, Grid, PART_BYTES, PART_WORDS, Planner, Shape, Step};
use super::records::Move;
use super::scratch::{Seat, Seated};
use super::{Error, Executor, Pass, Record};
use crate::skip::{Mask, Skipping};

/// Steps under way at most: those of a submission that runs, and of one that waits.
const DEPTH: usize = 2 * TOGETHER;

/// Steps of a submission, at most: between two the device waits for some microseconds. Measured on an H100, 0.4B: 943 tokens/s
/// with one, 950 with two, 967 with three.
pub(super) const TOGETHER: usize = 3;

/// One token of one sequence.
const ONE: Shape = Shape { rows: 1, segments: 1, logits: 1 };

/// What a step came to.
#[derive(Debug)]
pub(crate) struct Taken {
    /// The token, or one of the codes of [`sample`].
    pub(crate) token: u32,
    /// The state after it.
    pub(crate) record: Record,
}

/// A sequence that is generated.
#[derive(Debug)]
pub(crate) struct Ahead {
    sampler: Sampler,
    /// What the steps leave out.
    skipping: Option<Skipping>,
    /// The last record that was encoded, and the position of the token after it.
    tip: Record,
    position: u64,
    /// What chooses the token, of each of the steps that are submitted together.
    choosers: Vec<Step>,
    flights: VecDeque<Flight>,
    /// What has come.
    ready: VecDeque<Taken>,
    depth: usize,
    /// Staging buffers that are not in use.
    idle: Vec<wgpu::Buffer>,
}

/// Steps that were submitted together.
#[derive(Debug)]
struct Flight {
    /// At the beginning of a part each.
    tokens: wgpu::Buffer,
    records: Vec<Record>,
    submission: wgpu::SubmissionIndex,
}

impl Ahead {
    /// Steps that were encoded, and not handed over yet.
    fn under_way(&self) -> usize {
        self.flights.iter().map(|of| of.records.len()).sum::<usize>() + self.ready.len()
    }
}

impl Executor {
    /// Begins to generate after a record, which stands at `position` and has logits. Nothing is encoded yet.
    pub(crate) fn ahead(
        &self,
        from: &Record,
        position: u64,
        sampler: Sampler,
        masked: &[u32],
        counts: &Counts,
        skipping: Option<&Skipping>,
    ) -> Result<Ahead, Error> {
        self.sound()?;
        let vocab = self.config.vocab;
        let planner = Planner::new(&self.device);
        let (params, groups) = sample::lower(sample::Dims { rows: 1, vocab, counts: 1 })
            .map_err(|why| Error::Extents { part: "sample", why: why.to_string() })?;
        let mask = planner.table(&sample::mask(masked, vocab));
        let row = self.words("counts", vocab as u64)?;
        if sampler.penalises() {
            self.device.queue().write_buffer(&row, 0, bytemuck::cast_slice(&self.counted(counts)));
        }
        let pipeline: &Pipeline = self.kernels.sample();
        let chooser = |at| {
            let seat = self.seat_ahead(at);
            let Seated { sampler, tokens, .. } = self.scratch.seat(seat);
            let Seated { logits, .. } = self.scratch.seat(self.scratch.before(seat));
            let buffers = [sampler, logits, Bound::Whole(&mask), Bound::Whole(&row), tokens];
            planner.step("sample", pipeline, params, &buffers, Grid::Fixed(groups), 4 * vocab as u64)
        };
        Ok(Ahead {
            sampler,
            skipping: skipping.cloned(),
            tip: from.clone(),
            position,
            choosers: (0..self.together()).map(chooser).collect::<Result<_, _>>()?,
            flights: VecDeque::new(),
            ready: VecDeque::new(),
            depth: 0,
            idle: Vec::new(),
        })
    }

    /// Where steps that are submitted together are told what to do.
    pub(super) const fn seat_ahead(&self, at: usize) -> Seat {
        if self.in_one_step() { Seat::Ahead(at) } else { Seat::Rows }
    }

    /// The next token that was generated, with the state after it. `most` is how many are wanted at most, this one
    /// included.
    pub(crate) fn next(&self, ahead: &mut Ahead, most: usize) -> Result<Taken, Error> {
        // From one at the beginning, so that whoever wants few pays for few.
        ahead.depth = (ahead.depth + 1).min(DEPTH).min(most);
        while ahead.under_way() == 0 || ahead.under_way() + TOGETHER <= ahead.depth {
            self.launch(ahead, self.together().min((ahead.depth - ahead.under_way()).max(1)))?;
        }
        if ahead.ready.is_empty()
            && let Some(Flight { tokens, records, submission }) = ahead.flights.pop_front()
        {
            let wait = wgpu::PollType::Wait { submission_index: Some(submission), timeout: None };
            self.device.device().poll(wait)?;
            self.sound()?;
            let words: Vec<u32> = bytemuck::pod_collect_to_vec(&tokens.slice(..).get_mapped_range()?);
            tokens.unmap();
            ahead.idle.push(tokens);
            let taken = words.into_iter().step_by(PART_WORDS).zip(records);
            ahead.ready.extend(taken.map(|(token, record)| Taken { token, record }));
        }
        ahead.ready.pop_front().ok_or_else(|| Error::Lost("no step is under way".to_owned()))
    }

    /// Encodes some steps and submits them at once.
    fn launch(&self, ahead: &mut Ahead, steps: usize) -> Result<(), Error> {
        self.sound()?;
        let mut work = self.lock();
        // What they write is taken before any is encoded: if there is too little, buffers are replaced.
        let mut moves: Vec<Move> = Vec::new();
        let mut tables = Vec::new();
        // Where counts do not matter, the sampler does not wait for them.
        let counted = ahead.sampler.penalises().then_some(0);
        for position in (ahead.position..).take(steps) {
            let before = moves.last().map_or(&ahead.tip, |of| &of.after);
            let of = self.take(&mut work, &[(before, 1, true)])?.remove(0);
            // The sampler's settings were checked when it was handed over.
            let row = sample::SamplerRow::new(&ahead.sampler, position, counted)
                .map_err(|why| Error::Extents { part: "sample", why: why.to_string() })?;
            tables.push(self.scratch.table_of_one(&of, Some(row)));
            moves.push(of);
        }
        let lost = || Error::Lost("a step without logits".to_owned());
        let tip = ahead.tip.logits().ok_or_else(lost)?;
        let skipping = ahead.skipping.as_ref();
        let masks: Vec<Mask> = (ahead.position..)
            .take(steps)
            .map(|position| Mask::next(skipping, self.config.n_layers, position, true, 1).0)
            .collect();
        let passes = masks.iter().zip(&ahead.choosers).enumerate().map(|(at, (mask, chooser))| Pass {
            seat: self.seat_ahead(at),
            skip: mask.skip(skipping),
            first: Some(chooser),
            last: None,
        });
        let passes: Vec<_> = passes.collect();
        let queue = self.device.queue();
        let seat = self.seat_ahead(0);
        match (seat, &tables[..], &passes[..]) {
            (Seat::Ahead(_), ..) => self.scratch.write_ahead(queue, &tables),
            (_, [table], [pass]) => {
                self.scratch.write_one(queue, table);
                self.tell(&work, seat, &moves, &[0], pass.skip)?;
            }
            _ => return Err(Error::Lost("steps that have no tables of their own".to_owned())),
        }
        let tokens =
            ahead.idle.pop().map_or_else(|| self.staging(self.together() as u64 * PART_BYTES), Ok)?;

        let mut encoder = self.encoder();
        let row_bytes = (self.config.vocab * size_of::<f32>()) as u64;
        let row = |seat: Seat| seat.row() as u64 * row_bytes;
        // Unknown until all of this is submitted.
        let holds = work.holds.take();
        let before = self.scratch.before(seat);
        if holds != Some((tip.index(), before.row())) {
            let from = work.records.logits_offset(tip);
            let to = row(before);
            encoder.copy_buffer_to_buffer(&work.records.logits, from, &self.scratch.logits, to, row_bytes);
        }
        self.encode(&mut work, &mut encoder, ONE, &passes)?;
        let mut held = None;
        for (of, pass) in moves.iter().zip(&passes) {
            let to = of.after.logits().ok_or_else(lost)?;
            let (from, into) = (row(pass.seat), work.records.logits_offset(to));
            encoder.copy_buffer_to_buffer(&self.scratch.logits, from, &work.records.logits, into, row_bytes);
            held = Some((to.index(), pass.seat.row()));
        }
        let (from, bytes) = match seat {
            Seat::Ahead(_) => (&self.scratch.tokens_ahead, steps as u64 * PART_BYTES),
            Seat::Rows | Seat::One => (&self.scratch.tokens, size_of::<u32>() as u64),
        };
        encoder.copy_buffer_to_buffer(from, 0, &tokens, 0, bytes);
        // A failure shows when the range is asked for.
        encoder.map_buffer_on_submit(&tokens, wgpu::MapMode::Read, .., |_| ());
        let submission = queue.submit([encoder.finish()]);
        work.holds = held;
        drop(work);
        let records: Vec<_> = moves.into_iter().map(|of| of.after).collect();
        ahead.position += records.len() as u64;
        if let Some(tip) = records.last() {
            ahead.tip = tip.clone();
        }
        ahead.flights.push_back(Flight { tokens, records, submission });
        Ok(())
    }
}
