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
use super::{Error, Executor, Record};

/// Steps under way at most: one that runs, one that waits, one that is encoded.
const DEPTH: usize = 3;

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
    ) -> Result<Ahead, Error> {
        self.sound()?;
        let vocab = self.config.vocab;
        let planner = Planner { device: &self.device };
        let (params, groups) = sample::lower(sample::Dims { rows: 1, vocab })
            .map_err(|why| Error::Extents { part: "sample", why: why.to_string() })?;
        let mask = planner.table(&sample::mask(masked, vocab));
        let mut counted = vec![0u32; vocab];
        for (token, count) in counts.iter().filter(|(token, _)| (*token as usize) < vocab) {
            counted[token as usize] = count;
        }
        let counts = planner.table(&counted);
        let [.., sampler_row] = self.scratch.parts_of_one();
        let tables = [&self.scratch.logits, &mask, &counts, &self.scratch.tokens].map(Bound::Whole);
        let buffers: Vec<_> = [sampler_row].into_iter().chain(tables).collect();
        let pipeline: &Pipeline = self.kernels.sample();
        let step =
            planner.step("sample", pipeline, params, &buffers, Grid::Fixed(groups), 4 * vocab as u64)?;
        let (tip, flights, idle) = (from.clone(), VecDeque::new(), Vec::new());
        Ok(Ahead { sampler, tip, position, step, flights, depth: 0, idle })
    }

    /// The next token that was generated, with the state after it. `most` is how many are wanted at most, this one
    /// included.
    pub(crate) fn next(&self, ahead: &mut Ahead, most: usize) -> Result<Taken, Error> {
        // From one at the beginning, so that whoever wants few pays for few.
        ahead.depth = (ahead.depth + 1).min(DEPTH).min(most);
        while ahead.flights.len() < ahead.depth.max(1) {
            self.launch(ahead)?;
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

    /// Encodes and submits one step.
    fn launch(&self, ahead: &mut Ahead) -> Result<(), Error> {
        self.sound()?;
        let mut work = self.lock();
        let of = self.take(&mut work, &[(&ahead.tip, 1, true)])?.remove(0);
        // The sampler's settings were checked when it was handed over.
        let row = sample::SamplerRow::new(&ahead.sampler, ahead.position)
            .map_err(|why| Error::Extents { part: "sample", why: why.to_string() })?;
        let queue = self.device.queue();
        self.scratch.write_one(queue, &of, Some(row));
        if !self.in_one_step() {
            self.tell(&work, std::slice::from_ref(&of), &[0])?;
        }
        let record = of.after;
        let mut encoder = self.encoder();
        let bytes = (self.config.vocab * size_of::<f32>()) as u64;
        let Some((from, to)) = ahead.tip.logits().zip(record.logits()) else {
            return Err(Error::Lost("a step without logits".to_owned()));
        };
        if work.holds != Some(from.index()) {
            let from = work.records.logits_offset(from);
            encoder.copy_buffer_to_buffer(&work.records.logits, from, &self.scratch.logits, 0, bytes);
        }
        self.encode(&mut work, &mut encoder, ONE, Some(&ahead.step))?;
        let into = work.records.logits_offset(to);
        encoder.copy_buffer_to_buffer(&self.scratch.logits, 0, &work.records.logits, into, bytes);
        work.holds = Some(to.index());
        let token = match ahead.idle.pop() {
            Some(idle) => idle,
            None => self.staging(size_of::<u32>() as u64)?,
        };
        encoder.copy_buffer_to_buffer(&self.scratch.tokens, 0, &token, 0, token.size());
        // A failure shows when the range is asked for.
        encoder.map_buffer_on_submit(&token, wgpu::MapMode::Read, .., |_| ());
        let submission = queue.submit([encoder.finish()]);
        ahead.tip = record.clone();
        ahead.position += 1;
        ahead.flights.push_back(Flight { token, record, submission });
        Ok(())
    }
}
