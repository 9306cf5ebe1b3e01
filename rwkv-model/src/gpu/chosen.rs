//! Passes that choose the next token of every sequence in them, on the device: the next pass reads those tokens where they
//! are, before the host has seen them.
//!
//! Of the logits nothing is kept, and nothing but tokens goes to the host: of 256 sequences with a vocabulary of 65,536, a
//! pass leaves 64 MB of logits and 1 KB of tokens.

use rwkv_core::model::Skip;
use rwkv_core::ops::sample::Counts;
use rwkv_kernels::kernels::sample::{self, SamplerRow};

use super::layer::refused;
use super::plan::{Bound, Grid, Planner, Shape, Step};
use super::{Error, Executor, Pass, Record, count};

const WORD: u64 = size_of::<u32>() as u64;

/// What chooses, and what it chose last.
#[derive(Debug)]
pub(crate) struct Chooser {
    mask: wgpu::Buffer,
    /// `[R, 10]`, where R is the rows of logits that a pass has.
    samplers: wgpu::Buffer,
    /// `[R]`.
    chosen: wgpu::Buffer,
    /// `[rows, V]`.
    counts: wgpu::Buffer,
    /// Rows of the counts that are no one's.
    free: Vec<u32>,
    step: Step,
    /// Staging buffers that are not in use.
    idle: Vec<wgpu::Buffer>,
}

/// What a sequence reads in a pass.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Input<'a> {
    /// Tokens that the host knows, one at least.
    Given(&'a [u32]),
    /// The token that the last pass chose, by its place among all that it chose.
    Chosen(u32),
}

/// A sequence's share of a pass that chooses.
#[derive(Debug)]
pub(crate) struct Part<'a> {
    pub(crate) input: Input<'a>,
    /// Where the sequence stands; moved on by the pass. It has no logits then.
    pub(crate) record: &'a mut Record,
    /// How its next token is chosen, if it is.
    pub(crate) sampler: Option<SamplerRow>,
}

/// What a pass chose, under way.
#[derive(Debug)]
pub(crate) struct Chosen {
    tokens: wgpu::Buffer,
    n: usize,
    submission: wgpu::SubmissionIndex,
}

impl Executor {
    /// Something that chooses none of the `masked` tokens.
    pub(crate) fn chooser(&self, masked: &[u32]) -> Result<Chooser, Error> {
        self.sound()?;
        let mask = Planner::new(&self.device).table(&sample::mask(masked, self.config.vocab));
        let rows = self.scratch.logit_rows as u64;
        let samplers = self.words("samplers", rows * size_of::<SamplerRow>() as u64 / WORD)?;
        let chosen = self.words("chosen", rows)?;
        let counts = self.words("counts", self.config.vocab as u64)?;
        let step = self.choosing(&samplers, &mask, &counts, &chosen)?;
        Ok(Chooser { mask, samplers, chosen, counts, free: vec![0], step, idle: Vec::new() })
    }

    /// A buffer of so many words, which may be copied from and to.
    pub(super) fn words(&self, label: &str, words: u64) -> Result<wgpu::Buffer, Error> {
        let limits = self.device.device().limits();
        let (bytes, max) = (words * WORD, limits.max_storage_buffer_binding_size.min(limits.max_buffer_size));
        if bytes > max {
            return Err(Error::TooLarge { what: label.to_owned(), bytes, max });
        }
        rwkv_kernels::pipeline::checked(self.device.device(), || {
            self.device.device().create_buffer(&wgpu::BufferDescriptor {
                label: Some(label),
                size: bytes,
                usage: wgpu::BufferUsages::STORAGE
                    | wgpu::BufferUsages::COPY_SRC
                    | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        })
    }

    /// The dispatch that chooses.
    fn choosing(
        &self,
        samplers: &wgpu::Buffer,
        mask: &wgpu::Buffer,
        counts: &wgpu::Buffer,
        chosen: &wgpu::Buffer,
    ) -> Result<Step, Error> {
        let vocab = self.config.vocab;
        let rows = usize::try_from(counts.size() / WORD).unwrap_or(usize::MAX) / vocab;
        let dims = sample::Dims { rows: self.scratch.logit_rows, vocab, counts: rows };
        let (params, _) = sample::lower(dims).map_err(refused("sample"))?;
        let buffers = [samplers, &self.scratch.logits, mask, counts, chosen].map(Bound::Whole);
        let (pipeline, bytes) = (self.kernels.sample(), vocab as u64 * WORD);
        Planner::new(&self.device).step("sample", pipeline, params, &buffers, Grid::LogitRows, bytes)
    }

    /// Takes a row for the counts of a sequence that is penalised for what it generates; all are given back by
    /// [`Chooser::forget`].
    pub(crate) fn count(&self, chooser: &mut Chooser, counts: &Counts) -> Result<u32, Error> {
        let (vocab, queue) = (self.config.vocab, self.device.queue());
        let row_bytes = vocab as u64 * WORD;
        if chooser.free.is_empty() {
            let rows = chooser.counts.size() / row_bytes;
            let counts = self.words("counts", 2 * rows * vocab as u64)?;
            let step = self.choosing(&chooser.samplers, &chooser.mask, &counts, &chooser.chosen)?;
            let mut encoder = self.encoder();
            encoder.copy_buffer_to_buffer(&chooser.counts, 0, &counts, 0, chooser.counts.size());
            queue.submit([encoder.finish()]);
            let [from, to] = [rows, 2 * rows].map(|rows| u32::try_from(rows).unwrap_or(u32::MAX));
            (chooser.counts, chooser.step) = (counts, step);
            chooser.free.extend((from..to).rev());
        }
        let row = chooser.free.pop().unwrap_or_default();
        let counted = self.counted(counts);
        queue.write_buffer(&chooser.counts, u64::from(row) * row_bytes, bytemuck::cast_slice(&counted));
        Ok(row)
    }

    /// A row of counts as the sampler reads it, `[V]`.
    pub(super) fn counted(&self, counts: &Counts) -> Vec<u32> {
        let mut counted = vec![0; self.config.vocab];
        for (token, count) in counts.iter() {
            if let Some(of) = counted.get_mut(token as usize) {
                *of = count;
            }
        }
        counted
    }

    /// Runs sequences side by side and has the next tokens of some chosen, without waiting for them. There are no more
    /// sequences than [`Executor::segments`], and no more tokens than [`Executor::rows`].
    pub(crate) fn pass_choosing(
        &self,
        chooser: &mut Chooser,
        parts: &mut [Part<'_>],
    ) -> Result<Chosen, Error> {
        self.sound()?;
        let (mut tokens, mut wanted, mut samplers, mut copies) = (vec![], vec![], vec![], Vec::new());
        for part in &*parts {
            match part.input {
                Input::Given(given) => tokens.extend_from_slice(given),
                Input::Chosen(from) => {
                    // Neighbours that stay neighbours are copied at once.
                    let to = count(tokens.len());
                    match copies.last_mut() {
                        Some((first, at, n)) if (*first + *n, *at + *n) == (from, to) => *n += 1,
                        _ => copies.push((from, to, 1)),
                    }
                    tokens.push(0);
                }
            }
            if let Some(sampler) = part.sampler {
                wanted.push(count(tokens.len() - 1));
                samplers.push(sampler);
            }
        }
        let rows = |input: &Input<'_>| if let Input::Given(tokens) = input { tokens.len() } else { 1 };
        let sequences: Vec<_> = parts.iter().map(|part| (&*part.record, rows(&part.input), false)).collect();
        let idle = chooser.idle.pop().map_or_else(|| self.staging(chooser.chosen.size()), Ok)?;

        let mut work = self.lock();
        let moves = self.take(&mut work, &sequences)?;
        let shape =
            Shape { rows: count(tokens.len()), segments: count(parts.len()), logits: count(wanted.len()) };
        let queue = self.device.queue();
        queue.write_buffer(&self.scratch.tokens, 0, bytemuck::cast_slice(&tokens));
        queue.write_buffer(&chooser.samplers, 0, bytemuck::cast_slice(&samplers));
        let seat = self.seat(shape);
        self.tell(&work, seat, &moves, &wanted, Skip::default())?;
        let mut encoder = self.encoder();
        for (from, to, n) in copies {
            let [from, to, bytes] = [from, to, n].map(|words| u64::from(words) * WORD);
            encoder.copy_buffer_to_buffer(&chooser.chosen, from, &self.scratch.tokens, to, bytes);
        }
        let choose = (!wanted.is_empty()).then_some(&chooser.step);
        let pass = Pass { seat, skip: Skip::default(), first: None, last: choose };
        self.encode(&mut work, &mut encoder, shape, &[pass])?;
        if choose.is_some() {
            work.holds = None;
            encoder.copy_buffer_to_buffer(&chooser.chosen, 0, &idle, 0, wanted.len() as u64 * WORD);
        }
        // A failure shows when the range is asked for.
        encoder.map_buffer_on_submit(&idle, wgpu::MapMode::Read, .., |_| ());
        let submission = queue.submit([encoder.finish()]);
        drop(work);
        for (part, of) in parts.iter_mut().zip(moves) {
            *part.record = of.after;
        }
        Ok(Chosen { tokens: idle, n: wanted.len(), submission })
    }

    /// Waits for what a pass chose, in the order of its parts: tokens, or the codes of [`sample`].
    pub(crate) fn chosen(&self, chooser: &mut Chooser, of: Chosen) -> Result<Vec<u32>, Error> {
        let Chosen { tokens, n, submission } = of;
        self.device
            .device()
            .poll(wgpu::PollType::Wait { submission_index: Some(submission), timeout: None })?;
        self.sound()?;
        let mut words: Vec<u32> = bytemuck::pod_collect_to_vec(&tokens.slice(..).get_mapped_range()?);
        tokens.unmap();
        chooser.idle.push(tokens);
        words.truncate(n);
        Ok(words)
    }
}

impl Chooser {
    /// Gives a row of counts back.
    pub(crate) fn forget(&mut self, row: u32) {
        self.free.push(row);
    }
}
