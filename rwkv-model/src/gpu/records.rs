//! What sequences leave behind, on the device: bases, slots and logits, each given out by number.
//!
//! None is ever changed: a pass reads a sequence's base and slots and writes others. So forks and snapshots share them, a
//! token is undone by forgetting its slot, a pass that fails leaves its sequences where they were, and steps that were run
//! ahead in vain are forgotten by dropping what they wrote. Base 0 and slot 0 are the state before the first token, all
//! zero, and are never written.

use std::sync::{Arc, Mutex, PoisonError};

use rwkv_core::ModelConfig;
use rwkv_kernels::gpu::Device;
use rwkv_kernels::pipeline::checked;
use rwkv_state::layout::DeviceLayout;
use rwkv_state::resident::{Advance, step};
use rwkv_state::{Resident, StateLayout, lazy};

use super::plan::Bound;
use super::{Error, count};

/// One of a kind of things on the device. Clones share it; when the last is dropped, it is free.
#[derive(Clone, Debug)]
pub(super) struct Place(Arc<Slot>);

#[derive(Debug)]
struct Slot {
    index: u32,
    free: Free,
}

/// Those that nothing refers to.
type Free = Arc<Mutex<Vec<u32>>>;

impl Drop for Slot {
    fn drop(&mut self) {
        if self.index != 0 {
            // Passes that read it are in the queue before any that writes it anew.
            self.free.lock().unwrap_or_else(PoisonError::into_inner).push(self.index);
        }
    }
}

impl Place {
    pub(super) fn index(&self) -> u32 {
        self.0.index
    }
}

/// Where a sequence stands. Clones share what it names.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    base: Place,
    /// The slot of the token before those that are pending.
    floor: Place,
    /// The slots of what is pending, oldest first.
    pending: Vec<Place>,
    /// The logits of the last token, if it has any.
    logits: Option<Place>,
    /// Those of the token before those that are pending.
    floor_logits: Option<Place>,
    /// Tokens read since its state was made.
    tokens: u64,
}

impl Record {
    /// Tokens that can be undone.
    pub(crate) fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Undoes tokens; there are no logits then, but those before all that was pending.
    pub(crate) fn rollback(&mut self, tokens: usize) -> Result<(), lazy::Error> {
        let pending = self.pending();
        let left = pending.checked_sub(tokens).ok_or(lazy::Error::Rollback { asked: tokens, pending })?;
        if tokens > 0 {
            self.pending.truncate(left);
            self.logits = if left == 0 { self.floor_logits.clone() } else { None };
            self.tokens -= tokens as u64;
        }
        Ok(())
    }

    pub(super) fn base(&self) -> &Place {
        &self.base
    }

    /// The slot of the last token.
    pub(super) fn slot(&self) -> &Place {
        self.pending.last().unwrap_or(&self.floor)
    }

    /// The slots of what is pending, oldest first.
    pub(super) fn pending_places(&self) -> &[Place] {
        &self.pending
    }

    /// The same by number.
    pub(super) fn slots(&self) -> Vec<u32> {
        self.pending.iter().map(Place::index).collect()
    }

    pub(super) const fn logits(&self) -> Option<&Place> {
        self.logits.as_ref()
    }

    /// Tokens read, as kernels count them.
    pub(super) const fn step(&self) -> u32 {
        step(self.tokens)
    }
}

/// A sequence's way through a pass.
#[derive(Debug)]
pub(super) struct Move {
    pub(super) rows: u32,
    pub(super) before: Record,
    pub(super) after: Record,
    /// The slot of each row: those of rows that follow each other closely enough to be pending together differ.
    pub(super) slots: Vec<u32>,
    /// The last rows, so many, are those whose slots outlive the pass.
    pub(super) kept: usize,
}

impl Move {
    /// The base that it writes.
    pub(super) fn written(&self) -> Option<u32> {
        let (before, after) = (self.before.base.index(), self.after.base.index());
        (before != after).then_some(after)
    }
}

/// As many of each kind as there are, and those of them that are free.
#[derive(Debug)]
struct Pool {
    capacity: u32,
    free: Free,
}

impl Pool {
    /// The first is never given out.
    fn new(capacity: u32) -> Self {
        Self { capacity, free: Arc::new(Mutex::new((1..capacity).rev().collect())) }
    }

    fn lacks(&self, n: usize) -> usize {
        n.saturating_sub(self.free.lock().unwrap_or_else(PoisonError::into_inner).len())
    }

    /// Those that are taken together ascend: what was neighbours before is so again, and is copied at once.
    fn take(&self, n: usize) -> Vec<Place> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let first = free.len().saturating_sub(n);
        let mut taken: Vec<u32> = free.drain(first..).collect();
        taken.sort_unstable();
        taken.into_iter().map(|index| self.place(index)).collect()
    }

    fn place(&self, index: u32) -> Place {
        Place(Arc::new(Slot { index, free: Arc::clone(&self.free) }))
    }

    /// Room for so many more at least, and for twice as many as there are where that is asked for.
    fn enlarged(&self, more: usize, roomy: bool) -> u64 {
        let least = u64::from(self.capacity) + more as u64;
        if more > 0 && roomy { least.max(2 * u64::from(self.capacity)) } else { least }
    }

    fn grow(&mut self, capacity: u32) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.extend((self.capacity..capacity).rev());
        self.capacity = capacity;
    }
}

/// How many of each kind.
#[derive(Clone, Copy, Debug, Default)]
struct Wanted {
    bases: usize,
    slots: usize,
    logits: usize,
}

/// All that sequences leave behind.
#[derive(Debug)]
pub(super) struct Records {
    pub(super) layout: DeviceLayout,
    pub(super) resident: Resident,
    /// One buffer per layer: bases, then slots.
    pub(super) layers: Vec<wgpu::Buffer>,
    /// `[capacity, V]`.
    pub(super) logits: wgpu::Buffer,
    vocab: usize,
    bases: Pool,
    slots: Pool,
    of_logits: Pool,
    empty: Record,
}

/// As many as there are at first: a sequence, and what a few steps ahead of it write.
const FIRST: u32 = 10;

const WORD: u64 = size_of::<u32>() as u64;

impl Records {
    pub(super) fn new(
        device: &Device,
        config: &ModelConfig,
        resident: Resident,
        sessions: usize,
    ) -> Result<Self, Error> {
        let layout = StateLayout::new(config).device(resident);
        // A pass reads one base and writes another, and while it is written the pending slots are held.
        let pool = |each: usize| Pool::new(count(sessions.saturating_mul(each)).saturating_add(FIRST));
        let (bases, slots, of_logits) = (pool(2), pool(resident.capacity + 2), pool(2));
        let layers =
            allocate_layers(device, layout, config.n_layers, bases.capacity.into(), slots.capacity.into())?;
        let logits = allocate_logits(device, config.vocab, of_logits.capacity.into())?;
        let (base, floor) = (bases.place(0), slots.place(0));
        let empty = Record { base, floor, pending: Vec::new(), logits: None, floor_logits: None, tokens: 0 };
        Ok(Self { layout, resident, layers, logits, vocab: config.vocab, bases, slots, of_logits, empty })
    }

    /// The state before the first token.
    pub(super) fn empty(&self) -> Record {
        self.empty.clone()
    }

    /// Takes what sequences write that read so many tokens each, and leave logits or not; more is made where there is too
    /// little. Says whether it was: then the buffers are new, and what was bound to the old ones must be bound again.
    pub(super) fn take(
        &mut self,
        device: &Device,
        sequences: &[(&Record, usize, bool)],
    ) -> Result<(Vec<Move>, bool), Error> {
        let mut wanted = Wanted::default();
        for (record, rows, logits) in sequences {
            wanted.bases += usize::from(self.resident.advance(record.pending(), *rows).folds);
            wanted.slots += self.ring(*rows);
            wanted.logits += usize::from(*logits);
        }
        let grown = self.reserve(device, wanted)?;
        let mut bases = self.bases.take(wanted.bases).into_iter();
        let mut slots = self.slots.take(wanted.slots).into_iter();
        let mut of_logits = self.of_logits.take(wanted.logits).into_iter();
        let moves = sequences.iter().map(|&(before, rows, logits)| {
            let Advance { folds, pending } = self.resident.advance(before.pending(), rows);
            let ring: Vec<Place> = slots.by_ref().take(self.ring(rows)).collect();
            let slot = |row: usize| ring[row % ring.len()].clone();
            let mut after = before.clone();
            let mut kept = rows;
            if folds {
                after.base = bases.next().unwrap_or_else(|| before.base.clone());
                kept = rows.min(pending + 1);
                after.floor = if kept > pending { slot(rows - kept) } else { before.slot().clone() };
                after.pending.clear();
            }
            if folds || before.pending.is_empty() {
                after.floor_logits = if rows == pending { before.logits.clone() } else { None };
            }
            after.pending.extend((rows - pending.min(rows)..rows).filter(|_| pending > 0).map(slot));
            after.tokens += rows as u64;
            after.logits = if logits { of_logits.next() } else { None };
            let slots = (0..rows).map(|row| slot(row).index()).collect();
            Move { rows: count(rows), before: before.clone(), after, slots, kept }
        });
        Ok((moves.collect(), grown))
    }

    /// Slots that so many rows of a sequence take.
    fn ring(&self, rows: usize) -> usize {
        rows.min(self.resident.capacity + 1)
    }

    /// Takes a base for what is pending.
    pub(super) fn take_base(&mut self, device: &Device, of: &Record) -> Result<(Record, bool), Error> {
        let grown = self.reserve(device, Wanted { bases: 1, ..Wanted::default() })?;
        let base = self.bases.take(1).pop().unwrap_or_else(|| of.base.clone());
        let (floor, logits) = (of.slot().clone(), of.logits.clone());
        let tokens = of.tokens;
        Ok((Record { base, floor, pending: Vec::new(), logits, floor_logits: None, tokens }, grown))
    }

    /// Takes a base and a slot for a state.
    pub(super) fn take_state(&mut self, device: &Device) -> Result<(Record, bool), Error> {
        let grown = self.reserve(device, Wanted { bases: 1, slots: 1, logits: 0 })?;
        let mut record = self.empty();
        record.base = self.bases.take(1).pop().unwrap_or(record.base);
        record.floor = self.slots.take(1).pop().unwrap_or(record.floor);
        Ok((record, grown))
    }

    fn reserve(&mut self, device: &Device, wanted: Wanted) -> Result<bool, Error> {
        let (bases, slots) = (self.bases.lacks(wanted.bases), self.slots.lacks(wanted.slots));
        let logits = self.of_logits.lacks(wanted.logits);
        if logits > 0 {
            self.grow_logits(device, logits)?;
        }
        if bases + slots > 0 {
            self.grow(device, bases, slots)?;
        }
        Ok(bases + slots > 0)
    }

    /// Makes room for so many more bases and slots, for twice as many as there are if the device has it.
    fn grow(&mut self, device: &Device, bases: usize, slots: usize) -> Result<(), Error> {
        let make = |roomy: bool| {
            let [b, s] = [self.bases.enlarged(bases, roomy), self.slots.enlarged(slots, roomy)];
            Ok::<_, Error>(([b, s], allocate_layers(device, self.layout, self.layers.len(), b, s)?))
        };
        let ([b, s], layers) = make(true).or_else(|_| make(false))?;
        let [before, base_bytes] = [self.slots_at(), self.layout.base_words as u64 * WORD];
        let mut encoder = device.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        for (from, to) in self.layers.iter().zip(&layers) {
            encoder.copy_buffer_to_buffer(from, 0, to, 0, before);
            encoder.copy_buffer_to_buffer(from, before, to, b * base_bytes, from.size() - before);
        }
        device.queue().submit([encoder.finish()]);
        self.layers = layers;
        self.bases.grow(u32::try_from(b).unwrap_or(u32::MAX));
        self.slots.grow(u32::try_from(s).unwrap_or(u32::MAX));
        Ok(())
    }

    fn grow_logits(&mut self, device: &Device, more: usize) -> Result<(), Error> {
        let make = |roomy: bool| {
            let rows = self.of_logits.enlarged(more, roomy);
            Ok::<_, Error>((rows, allocate_logits(device, self.vocab, rows)?))
        };
        let (rows, logits) = make(true).or_else(|_| make(false))?;
        let mut encoder = device.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        encoder.copy_buffer_to_buffer(&self.logits, 0, &logits, 0, self.logits.size());
        device.queue().submit([encoder.finish()]);
        self.logits = logits;
        self.of_logits.grow(u32::try_from(rows).unwrap_or(u32::MAX));
        Ok(())
    }

    /// Slots there are, in use or not.
    pub(super) const fn slots(&self) -> usize {
        self.slots.capacity as usize
    }

    /// Where slots begin in a layer's buffer, in words.
    pub(super) const fn slot_start(&self) -> usize {
        self.bases.capacity as usize * self.layout.base_words
    }

    const fn slots_at(&self) -> u64 {
        self.slot_start() as u64 * WORD
    }

    /// The slots of a layer.
    pub(super) fn slots_of<'a>(&self, layer: &'a wgpu::Buffer) -> Bound<'a> {
        Bound::Part { buffer: layer, offset: self.slots_at(), bytes: layer.size() - self.slots_at() }
    }

    /// Where a base begins in a layer's buffer, in bytes.
    pub(super) fn base_offset(&self, base: &Place) -> u64 {
        u64::from(base.index()) * self.layout.base_words as u64 * WORD
    }

    /// Where a slot begins in a layer's buffer, in bytes.
    pub(super) fn slot_offset(&self, slot: &Place) -> u64 {
        self.slots_at() + u64::from(slot.index()) * self.layout.slot_words as u64 * WORD
    }

    /// Where logits begin, in bytes.
    pub(super) fn logits_offset(&self, logits: &Place) -> u64 {
        u64::from(logits.index()) * self.vocab as u64 * WORD
    }
}

/// A buffer for each layer, with so many bases and slots, if the device binds it.
fn allocate_layers(
    device: &Device,
    layout: DeviceLayout,
    n: usize,
    bases: u64,
    slots: u64,
) -> Result<Vec<wgpu::Buffer>, Error> {
    let bytes = (bases * layout.base_words as u64 + slots * layout.slot_words as u64) * WORD;
    let limits = device.device().limits();
    let max = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size);
    if bytes > max {
        return Err(Error::States { bases, slots, bytes, max });
    }
    allocate(device, "states", n, bytes)
}

/// A buffer for so many rows of logits, if the device has it.
fn allocate_logits(device: &Device, vocab: usize, rows: u64) -> Result<wgpu::Buffer, Error> {
    let (row, max) = (vocab as u64 * WORD, device.device().limits().max_buffer_size);
    if rows * row > max {
        return Err(Error::Logits { wanted: rows, max: max / row });
    }
    Ok(allocate(device, "logits of sequences", 1, rows * row)?.remove(0))
}

/// So many buffers, all zero.
fn allocate(device: &Device, label: &str, n: usize, bytes: u64) -> Result<Vec<wgpu::Buffer>, Error> {
    let buffer = |_| {
        device.device().create_buffer(&wgpu::BufferDescriptor {
            label: Some(label),
            size: bytes,
            usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        })
    };
    checked(device.device(), || (0..n).map(buffer).collect())
}
