//! What lives no longer than a pass: the buffers between dispatches, and the tables that tell kernels of a pass.

use rwkv_core::ModelConfig;
use rwkv_kernels::gpu::Device;
use rwkv_kernels::kernels::sample::SamplerRow;
use rwkv_kernels::kernels::{carry, matmul, mix_in, time_mix_resident, wkv7_chunked_factors};
use rwkv_kernels::pipeline::checked;
use rwkv_state::Resident;
use rwkv_state::resident::MAX_CAPACITY;

use super::ahead::TOGETHER;
use super::layer::{ADAPTERS, MIXES};
use super::plan::{Bound, PART_BYTES, PART_WORDS, Shape};
use super::records::Move;
use super::{Error, count};

/// What lives no longer than a pass. Rows are those of a pass, `T` at most.
#[derive(Debug)]
pub(super) struct Scratch {
    pub(super) logit_rows: usize,
    /// Passes that are submitted together, at most: [`Seat::Ahead`].
    pub(super) together: usize,
    /// `[T]`.
    pub(super) tokens: wgpu::Buffer,
    /// The tables of a pass over one token, in parts, so that the host writes them at once: [`One`].
    one: wgpu::Buffer,
    /// Those of the passes that are submitted together, and of each the token, at the beginning of a part.
    ahead: wgpu::Buffer,
    pub(super) tokens_ahead: wgpu::Buffer,
    /// Record read and record written, where there are, and after the last row of a pass a mark that there are no more: `[T + 1]`.
    pub(super) cursors: wgpu::Buffer,
    /// Where the shifts of mixes that are left out stay what they were: slot read and slot written, where there is one.
    pub(super) carried: wgpu::Buffer,
    /// Of up to T segments.
    pub(super) segments: wgpu::Buffer,
    /// The same without their rows, for heads that are left out of a pass: states go on as they are.
    still: wgpu::Buffer,
    /// What states are held in.
    pub(super) resident: Resident,
    /// Rows whose logits are wanted, `[R]`.
    pub(super) wanted: wgpu::Buffer,
    /// No record read and none written: for the head.
    pub(super) no_cursor: wgpu::Buffer,
    /// Residual stream, `[T, D]`.
    pub(super) x: wgpu::Buffer,
    /// Where it is after planes were added to it: there and back.
    pub(super) x_summed: wgpu::Buffer,
    /// Normed and shifted, `[T, 6, D]`.
    pub(super) mixed: wgpu::Buffer,
    /// What the heads read, `[T, P]`.
    pub(super) inputs: wgpu::Buffer,
    /// Products of the adapters, `[T, 4, D]`.
    pub(super) up: wgpu::Buffer,
    /// What chunks of the heads do whatever state they meet, `[T, 6, D]`, where passes may go by chunks.
    pub(super) factors: Option<wgpu::Buffer>,
    /// Parameters of the kernel that computes them.
    pub(super) of_chunks: wgpu::Buffer,
    /// Layer 0's values, `[T, D]`.
    pub(super) v_first: wgpu::Buffer,
    /// Gated readout, `[T, D]`.
    pub(super) readout: wgpu::Buffer,
    /// `[T, F]`.
    pub(super) hidden: wgpu::Buffer,
    /// Normed rows whose logits are wanted, `[R, D]`.
    pub(super) normed: wgpu::Buffer,
    /// `[R, V]`.
    pub(super) logits: wgpu::Buffer,
    /// Parameters of `matmul` over the rows of a pass, and over the rows of logits.
    pub(super) of_rows: wgpu::Buffer,
    pub(super) of_logits: wgpu::Buffer,
    /// T.
    pub(super) rows: usize,
    /// Elements of the buffers that `matmul` reads and writes.
    pub(super) len: Lengths,
}

/// Where a pass is told what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Seat {
    /// A pass over any rows.
    Rows,
    /// Over one token.
    One,
    /// Over one token, the first, second, .. of some passes that are submitted together, and whose tokens and logits stay where they are
    /// until all are over.
    Ahead(usize),
}

impl Seat {
    /// The row of logits that a pass over one token leaves.
    pub(super) const fn row(self) -> usize {
        match self {
            Self::Rows | Self::One => 0,
            Self::Ahead(at) => at,
        }
    }
}

/// What kernels find there, or leave.
pub(super) struct Seated<'a> {
    /// Record read and record written of each row.
    pub(super) cursors: Bound<'a>,
    pub(super) segments: Bound<'a>,
    /// How the token is chosen: of one.
    pub(super) sampler: Bound<'a>,
    pub(super) tokens: Bound<'a>,
    pub(super) logits: Bound<'a>,
}

/// The tables of a pass over one token, each where it can be bound.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct One {
    pub(super) cursor: [u32; PART_WORDS],
    pub(super) segment: [u32; PART_WORDS],
    pub(super) sampler: [u32; PART_WORDS],
}

const _: () = assert!(size_of::<One>() as u64 == 3 * PART_BYTES, "parts");
const _: () = assert!(time_mix_resident::table_len(1, 1, MAX_CAPACITY) <= PART_WORDS, "a segment fits");

/// Rows of logits of a pass, at most: 268 MB with a vocabulary of 65,536.
const MAX_LOGIT_ROWS: usize = 1024;

#[derive(Clone, Copy, Debug)]
pub(super) struct Lengths {
    pub(super) mixed: usize,
    pub(super) inputs: usize,
    pub(super) up: usize,
    pub(super) x: usize,
    pub(super) hidden: usize,
    pub(super) normed: usize,
    pub(super) logits: usize,
}

impl Scratch {
    pub(super) fn new(
        device: &Device,
        config: &ModelConfig,
        resident: Resident,
        rows: usize,
        chunks: bool,
    ) -> Result<Self, Error> {
        let ModelConfig { width, hidden, vocab, ranks, .. } = *config;
        let limits = device.device().limits();
        let max = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size);
        let room = usize::try_from(max / size_of::<f32>() as u64).unwrap_or(usize::MAX);
        let inputs = 3 * width + ranks.w + ranks.a + ranks.v + ranks.g;
        let longest = (MIXES * width).max(inputs).max(hidden);
        // As many as the device binds.
        let rows = rows.min(room / longest);
        let logit_rows = rows.min(MAX_LOGIT_ROWS).min(room / vocab);
        if logit_rows == 0 {
            let bytes = (longest.max(vocab) * size_of::<f32>()) as u64;
            return Err(Error::TooLarge { what: "a row of a pass".to_owned(), bytes, max });
        }
        // Each has a row of logits of its own, which begins where it can be bound.
        let whole_parts = ((vocab * size_of::<f32>()) as u64).is_multiple_of(PART_BYTES);
        let together = if whole_parts { TOGETHER.min(logit_rows) } else { 1 };
        let len = Lengths {
            mixed: rows * MIXES * width,
            inputs: rows * inputs,
            up: rows * ADAPTERS * width,
            x: rows * width,
            hidden: rows * hidden,
            normed: logit_rows * width,
            logits: logit_rows * vocab,
        };
        let made = checked::<_, Error>(device.device(), || {
            let buffer = |label, words: usize, usage| {
                device.device().create_buffer(&wgpu::BufferDescriptor {
                    label: Some(label),
                    size: (words * size_of::<f32>()).next_multiple_of(16) as u64,
                    usage: usage | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC,
                    mapped_at_creation: false,
                })
            };
            let storage = |label, words| buffer(label, words, wgpu::BufferUsages::STORAGE);
            let uniform = || buffer("params", 4, wgpu::BufferUsages::UNIFORM);
            Self {
                logit_rows,
                together,
                tokens: storage("tokens", rows),
                one: storage("one", size_of::<One>() / size_of::<u32>()),
                ahead: storage("ahead", together * size_of::<One>() / size_of::<u32>()),
                tokens_ahead: storage("tokens", together * PART_WORDS),
                cursors: storage("cursors", 2 * (rows + 1)),
                carried: storage("carried", 2 * rows),
                segments: storage("segments", time_mix_resident::table_len(rows, rows, resident.capacity)),
                still: storage("still", if resident.is_plain() { 4 * rows } else { 4 }),
                resident,
                wanted: storage("wanted rows", logit_rows),
                no_cursor: storage("no cursor", 2),
                x: storage("x", len.x),
                x_summed: storage("x", len.x),
                mixed: storage("mixed", len.mixed),
                inputs: storage("inputs", len.inputs),
                up: storage("up", len.up),
                factors: chunks.then(|| storage("factors", len.mixed)),
                of_chunks: uniform(),
                v_first: storage("v_first", len.x),
                readout: storage("readout", len.x),
                hidden: storage("hidden", len.hidden),
                normed: storage("normed", len.normed),
                logits: storage("logits", len.logits),
                of_rows: uniform(),
                of_logits: uniform(),
                rows,
                len,
            }
        })?;
        device.queue().write_buffer(&made.no_cursor, 0, bytemuck::bytes_of(&[mix_in::NONE; 2]));
        Ok(made)
    }

    /// Writes the tables of a pass.
    pub(super) fn write(&self, queue: &wgpu::Queue, cursors: &[[u32; 2]], moves: &[&Move], wanted: &[u32]) {
        queue.write_buffer(&self.wanted, 0, bytemuck::cast_slice(wanted));
        queue.write_buffer(&self.cursors, 0, bytemuck::cast_slice(cursors));
        self.write_segments(queue, moves);
    }

    /// Segments of heads that are left out. Where tokens may be pending, each of them has to be counted.
    pub(super) const fn passed_by(&self) -> &wgpu::Buffer {
        if self.resident.is_plain() { &self.still } else { &self.segments }
    }

    /// Writes where shifts are carried that stay what they were.
    pub(super) fn write_carried(&self, queue: &wgpu::Queue, moves: &[Move]) {
        let mut pairs: Vec<[u32; 2]> = Vec::new();
        for of in moves {
            let from = of.before.slot().index();
            pairs.extend(of.slots[of.slots.len() - of.kept..].iter().map(|&to| [from, to]));
        }
        let rows: u32 = moves.iter().map(|of| of.rows).sum();
        pairs.resize(rows as usize, [carry::NONE; 2]);
        queue.write_buffer(&self.carried, 0, bytemuck::cast_slice(&pairs));
    }

    /// Writes what is left of the segments of a pass where heads are left out of it.
    pub(super) fn write_still(&self, queue: &wgpu::Queue, moves: &[Move]) {
        if self.resident.is_plain() {
            let still = |of: &Move| [0, 0, of.before.base().index(), of.after.base().index()];
            let still: Vec<_> = moves.iter().map(still).collect();
            queue.write_buffer(&self.still, 0, bytemuck::cast_slice(&still));
        }
    }

    /// Writes what the heads read of a pass.
    pub(super) fn write_segments(&self, queue: &wgpu::Queue, moves: &[&Move]) {
        queue.write_buffer(&self.segments, 0, bytemuck::cast_slice(&self.segments_of(moves)));
    }

    /// The segments of a pass, as the heads' kernel reads them.
    fn segments_of(&self, moves: &[&Move]) -> Vec<u32> {
        let firsts = moves.iter().scan(0, |end, of| {
            let first = *end;
            *end += of.rows;
            Some(first)
        });
        let all = firsts.zip(moves);
        if self.resident.is_plain() {
            let plain = |(first, of): (u32, &&Move)| {
                [first, of.rows, of.before.base().index(), of.after.base().index()]
            };
            return all.flat_map(plain).collect();
        }
        let pending: Vec<_> = moves.iter().map(|of| of.before.slots()).collect();
        let segments: Vec<_> = all
            .zip(&pending)
            .map(|((first, of), pending)| time_mix_resident::Segment {
                first,
                rows: of.rows,
                from: of.before.base().index(),
                to: of.written(),
                pending,
                slots: if self.resident.capacity == 0 { &[] } else { &of.slots },
                step: of.before.step(),
            })
            .collect();
        time_mix_resident::table(&segments)
    }

    /// The tables of a pass over one token of one sequence, and how it is chosen.
    pub(super) fn table_of_one(&self, of: &Move, sampler: Option<SamplerRow>) -> One {
        let mut one = One { cursor: [0; PART_WORDS], segment: [0; PART_WORDS], sampler: [0; PART_WORDS] };
        one.cursor[..2].copy_from_slice(&[of.before.slot().index(), of.after.slot().index()]);
        let segment = self.segments_of(&[of]);
        one.segment[..segment.len()].copy_from_slice(&segment);
        if let Some(sampler) = &sampler {
            let words: &[u32] = bytemuck::cast_slice(bytemuck::bytes_of(sampler));
            one.sampler[..words.len()].copy_from_slice(words);
        }
        one
    }

    /// Writes the tables of a pass over one token of one sequence.
    pub(super) fn write_one(&self, queue: &wgpu::Queue, table: &One) {
        queue.write_buffer(&self.one, 0, bytemuck::bytes_of(table));
    }

    /// Writes the tables of passes that are submitted together, each over one token of one sequence.
    pub(super) fn write_ahead(&self, queue: &wgpu::Queue, tables: &[One]) {
        queue.write_buffer(&self.ahead, 0, bytemuck::cast_slice(tables));
    }

    /// Where a pass finds what it is told, and leaves what it comes to.
    pub(super) fn seat(&self, seat: Seat) -> Seated<'_> {
        let part =
            |buffer, n: usize| Bound::Part { buffer, offset: n as u64 * PART_BYTES, bytes: PART_BYTES };
        let (tokens, logits) = (Bound::Whole(&self.tokens), Bound::Whole(&self.logits));
        let one = [0, 1, 2].map(|n| part(&self.one, n));
        match seat {
            Seat::Rows => {
                let [cursors, segments] = [&self.cursors, &self.segments].map(Bound::Whole);
                Seated { cursors, segments, sampler: one[2], tokens, logits }
            }
            Seat::One => Seated { cursors: one[0], segments: one[1], sampler: one[2], tokens, logits },
            Seat::Ahead(at) => {
                let bytes = (self.len.logits / self.logit_rows * size_of::<f32>()) as u64;
                Seated {
                    cursors: part(&self.ahead, 3 * at),
                    segments: part(&self.ahead, 3 * at + 1),
                    sampler: part(&self.ahead, 3 * at + 2),
                    tokens: part(&self.tokens_ahead, at),
                    logits: Bound::Part { buffer: &self.logits, offset: at as u64 * bytes, bytes },
                }
            }
        }
    }

    /// Whose logits a token is chosen from before its pass: of passes that are submitted together, the first finds them where the last
    /// leaves them.
    pub(super) fn before(&self, seat: Seat) -> Seat {
        match seat {
            Seat::Rows | Seat::One => seat,
            Seat::Ahead(at) => Seat::Ahead(at.checked_sub(1).unwrap_or(self.together - 1)),
        }
    }

    /// Tells kernels how many rows a pass has.
    pub(super) fn write_shape(&self, queue: &wgpu::Queue, config: &ModelConfig, shape: Shape) {
        for (rows, buffer) in [(shape.rows, &self.of_rows), (shape.logits, &self.of_logits)] {
            queue.write_buffer(buffer, 0, bytemuck::bytes_of(&matmul::Params { rows }));
        }
        let (heads, y_stride) = (count(config.n_heads), count(ADAPTERS * config.width));
        let params = wkv7_chunked_factors::Params { heads, segments: shape.segments, y_stride };
        queue.write_buffer(&self.of_chunks, 0, bytemuck::bytes_of(&params));
    }
}
