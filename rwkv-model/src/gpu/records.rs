//! What sequences leave behind, on the device: a record per state, and the logits of its last token beside it.
//!
//! Records are never changed: a pass reads a sequence's record and writes another. So forks and snapshots share one,
//! a pass that fails leaves its sequences where they were, and steps that were run ahead in vain are forgotten by
//! dropping what they wrote. Record 0 is the state before the first token, all zero, and is never written.

use std::sync::{Arc, Mutex, PoisonError};

use rwkv_core::ModelConfig;
use rwkv_kernels::gpu::Device;
use rwkv_kernels::pipeline::checked;
use rwkv_state::StateLayout;
use rwkv_state::layout::RecordLayout;

use super::Error;

/// A sequence's place on the device. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Record(Arc<Slot>);

#[derive(Debug)]
struct Slot {
    index: u32,
    free: Free,
}

/// Records that nothing refers to.
type Free = Arc<Mutex<Vec<u32>>>;

impl Drop for Slot {
    fn drop(&mut self) {
        if self.index != 0 {
            // Passes that read it are in the queue before any that writes it anew.
            self.free.lock().unwrap_or_else(PoisonError::into_inner).push(self.index);
        }
    }
}

impl Record {
    pub(super) fn index(&self) -> u32 {
        self.0.index
    }
}

/// The records of all layers.
#[derive(Debug)]
pub(super) struct Records {
    pub(super) layout: RecordLayout,
    /// One buffer per layer, `[capacity, stride]`.
    pub(super) layers: Vec<wgpu::Buffer>,
    /// `[capacity, V]`.
    pub(super) logits: wgpu::Buffer,
    vocab: usize,
    capacity: u32,
    free: Free,
    empty: Record,
}

/// As many as there are at first: a sequence, and what a few steps ahead of it write.
const FIRST: u32 = 8;

impl Records {
    pub(super) fn new(device: &Device, config: &ModelConfig) -> Result<Self, Error> {
        let layout = StateLayout::new(config).record();
        let (layers, logits) = allocate(device, layout, config.n_layers, config.vocab, FIRST)?;
        let free = Free::default();
        let empty = Record(Arc::new(Slot { index: 0, free: Arc::clone(&free) }));
        free.lock().unwrap_or_else(PoisonError::into_inner).extend((1..FIRST).rev());
        Ok(Self { layout, layers, logits, vocab: config.vocab, capacity: FIRST, free, empty })
    }

    /// The state before the first token.
    pub(super) fn empty(&self) -> Record {
        self.empty.clone()
    }

    /// Takes `n` records that nothing refers to; more are made where they do not suffice. Says whether they were: then
    /// the buffers are new, and what was bound to the old ones must be bound again.
    pub(super) fn take(&mut self, device: &Device, n: usize) -> Result<(Vec<Record>, bool), Error> {
        let found = self.free.lock().unwrap_or_else(PoisonError::into_inner).len();
        let grown = found < n;
        if grown {
            self.grow(device, n - found)?;
        }
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let first = free.len() - n;
        let taken = free.drain(first..).rev();
        let record = |index| Record(Arc::new(Slot { index, free: Arc::clone(&self.free) }));
        Ok((taken.map(record).collect(), grown))
    }

    /// Makes room for at least `more` records, for twice as many as there are if the device has it.
    fn grow(&mut self, device: &Device, more: usize) -> Result<(), Error> {
        let per_record = (self.layout.stride.max(self.vocab) * size_of::<f32>()) as u64;
        let limits = device.device().limits();
        let max = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size) / per_record;
        let least = u64::from(self.capacity) + more as u64;
        if least > max {
            return Err(Error::Records { wanted: least, max });
        }
        let roomy = (2 * u64::from(self.capacity)).max(least).min(max);
        let allocate = |capacity: u64| {
            let capacity = u32::try_from(capacity).unwrap_or(u32::MAX);
            let made = allocate(device, self.layout, self.layers.len(), self.vocab, capacity)?;
            Ok::<_, Error>((capacity, made))
        };
        let (capacity, (layers, logits)) = allocate(roomy).or_else(|_| allocate(least))?;
        let mut encoder = device.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let pairs = self.layers.iter().zip(&layers).chain([(&self.logits, &logits)]);
        for (from, to) in pairs {
            encoder.copy_buffer_to_buffer(from, 0, to, 0, from.size());
        }
        device.queue().submit([encoder.finish()]);
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.extend((self.capacity..capacity).rev());
        (self.layers, self.logits, self.capacity) = (layers, logits, capacity);
        Ok(())
    }

    /// As many as there are, in use or not.
    pub(super) const fn capacity(&self) -> usize {
        self.capacity as usize
    }

    /// Where a record begins in a layer's buffer, in bytes.
    pub(super) fn offset(&self, record: &Record) -> u64 {
        u64::from(record.index()) * (self.layout.stride * size_of::<f32>()) as u64
    }

    /// Where a record's logits begin, in bytes.
    pub(super) fn logits_offset(&self, record: &Record) -> u64 {
        u64::from(record.index()) * (self.vocab * size_of::<f32>()) as u64
    }
}

/// Buffers for so many records, all zero.
fn allocate(
    device: &Device,
    layout: RecordLayout,
    layers: usize,
    vocab: usize,
    capacity: u32,
) -> Result<(Vec<wgpu::Buffer>, wgpu::Buffer), Error> {
    let buffer = |label, elements: usize| {
        device.device().create_buffer(&wgpu::BufferDescriptor {
            label: Some(label),
            size: u64::from(capacity) * (elements * size_of::<f32>()) as u64,
            usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        })
    };
    checked(device.device(), || {
        ((0..layers).map(|_| buffer("records", layout.stride)).collect(), buffer("logits of records", vocab))
    })
}
