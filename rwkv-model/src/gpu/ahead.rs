//! Tokens generated ahead of the host: each step samples on the device, reads what it sampled, and leaves the token
//! where the host finds it a few steps later.
//!
//! A step's state is a record of its own, so that the host takes over exactly what it has seen: steps beyond that are
//! forgotten with their records.

use std::collections::VecDeque;

use rwkv_core::ops::sample::{Counts, Sampler};
use rwkv_kernels::kernels::sample;
use rwkv_kernels::pipeline::Pipeline;

use super::plan::{Bound, Grid, Planner, Shape, Step};
use super::records::Move;
use super::{Error, Executor, Record};
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
    step: Step,
    flights: VecDeque<Flight>,
    depth: usize,
    /// Staging buffers that are not in use.
    idle: Vec<wgpu::Buffer>,
}

#[derive(Debug)]
struct Flight {
    token: wgpu::Buffer,
    record: Record,
    submission: wgpu::SubmissionIndex,
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
        let mut counted = vec![0u32; vocab];
        for (token, count) in counts.iter().filter(|(token, _)| (*token as usize) < vocab) {
            counted[token as usize] = count;
        }
        let counts = self.words("counts", vocab as u64)?;
        self.device.queue().write_buffer(&counts, 0, bytemuck::cast_slice(&counted));
        let [.., sampler_row] = self.scratch.parts_of_one();
        let tables = [&self.scratch.logits, &mask, &counts, &self.scratch.tokens].map(Bound::Whole);
        let buffers: Vec<_> = [sampler_row].into_iter().chain(tables).collect();
        let pipeline: &Pipeline = self.kernels.sample();
        let step =
            planner.step("sample", pipeline, params, &buffers, Grid::Fixed(groups), 4 * vocab as u64)?;
        let (tip, flights, idle) = (from.clone(), VecDeque::new(), Vec::new());
        let skipping = skipping.cloned();
        Ok(Ahead { sampler, skipping, tip, position, step, flights, depth: 0, idle })
    }

    /// The next token that was generated, with the state after it. `most` is how many are wanted at most, this one
    /// included.
    pub(crate) fn next(&self, ahead: &mut Ahead, most: usize) -> Result<Taken, Error> {
        // From one at the beginning, so that whoever wants few pays for few.
        ahead.depth = (ahead.depth + 1).min(DEPTH).min(most);
        while ahead.flights.is_empty() || ahead.flights.len() + TOGETHER <= ahead.depth {
            self.launch(ahead, self.together().min((ahead.depth - ahead.flights.len()).max(1)))?;
        }
        let Some(Flight { token, record, submission }) = ahead.flights.pop_front() else {
            return Err(Error::Lost("no step is under way".to_owned()));
        };
        let wait = wgpu::PollType::Wait { submission_index: Some(submission), timeout: None };
        self.device.device().poll(wait)?;
        self.sound()?;
        let word = {
            let bytes = token.slice(..).get_mapped_range()?;
            bytemuck::pod_read_unaligned(&bytes)
        };
        token.unmap();
        ahead.idle.push(token);
        Ok(Taken { token: word, record })
    }

    /// Steps of a submission.
    pub(crate) const fn together(&self) -> usize {
        if self.in_one_step() { TOGETHER } else { 1 }
    }

    /// Encodes some steps and submits them at once.
    fn launch(&self, ahead: &mut Ahead, steps: usize) -> Result<(), Error> {
        self.sound()?;
        let mut work = self.lock();
        // What they write is taken before any is encoded: if there is too little, buffers are replaced.
        let mut moves: Vec<Move> = Vec::new();
        let mut tables = Vec::new();
        for position in (ahead.position..).take(steps) {
            let before = moves.last().map_or(&ahead.tip, |of| &of.after);
            let of = self.take(&mut work, &[(before, 1, true)])?.remove(0);
            // The sampler's settings were checked when it was handed over.
            let row = sample::SamplerRow::new(&ahead.sampler, position, Some(0))
                .map_err(|why| Error::Extents { part: "sample", why: why.to_string() })?;
            tables.push(self.scratch.table_of_one(&of, Some(row)));
            moves.push(of);
        }
        let queue = self.device.queue();
        self.scratch.write_ahead(queue, &tables);
        let skipping = ahead.skipping.clone();
        let mask = |position: u64| Mask::next(skipping.as_ref(), self.config.n_layers, position, true, 1).0;
        if let ([of], false) = (&moves[..], self.in_one_step()) {
            let skip = mask(ahead.position);
            self.tell(&work, std::slice::from_ref(of), &[0], skip.skip(skipping.as_ref()))?;
        }
        let mut encoder = self.encoder();
        let (bytes, mut tokens) = ((self.config.vocab * size_of::<f32>()) as u64, Vec::new());
        // Unknown until all of this is submitted.
        let mut holds = work.holds.take();
        for ((at, of), position) in moves.iter().enumerate().zip(ahead.position..) {
            let Some((from, to)) = of.before.logits().zip(of.after.logits()) else {
                return Err(Error::Lost("a step without logits".to_owned()));
            };
            self.scratch.use_ahead(&mut encoder, at);
            if holds != Some(from.index()) {
                let from = work.records.logits_offset(from);
                encoder.copy_buffer_to_buffer(&work.records.logits, from, &self.scratch.logits, 0, bytes);
            }
            let mask = mask(position);
            let skip = mask.skip(skipping.as_ref());
            self.encode(&mut work, &mut encoder, ONE, skip, [Some(&ahead.step), None])?;
            let into = work.records.logits_offset(to);
            encoder.copy_buffer_to_buffer(&self.scratch.logits, 0, &work.records.logits, into, bytes);
            holds = Some(to.index());
            let token = match ahead.idle.pop() {
                Some(idle) => idle,
                None => self.staging(size_of::<u32>() as u64)?,
            };
            encoder.copy_buffer_to_buffer(&self.scratch.tokens, 0, &token, 0, token.size());
            // A failure shows when the range is asked for.
            encoder.map_buffer_on_submit(&token, wgpu::MapMode::Read, .., |_| ());
            tokens.push(token);
        }
        let submission = queue.submit([encoder.finish()]);
        work.holds = holds;
        for (token, Move { after: record, .. }) in tokens.into_iter().zip(moves) {
            ahead.tip = record.clone();
            ahead.position += 1;
            ahead.flights.push_back(Flight { token, record, submission: submission.clone() });
        }
        Ok(())
    }
}
