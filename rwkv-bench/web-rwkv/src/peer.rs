//! web-rwkv behind four verbs: load a model, open slots, reset them, feed them.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, anyhow, ensure};
use clap::ValueEnum;
use half::f16;
use safetensors::SafeTensors;
use web_rwkv::context::{Context, ContextBuilder};
use web_rwkv::runtime::infer::{Rnn, RnnInput, RnnInputBatch, RnnOption};
use web_rwkv::runtime::loader::Loader;
use web_rwkv::runtime::model::{self, Bundle, ContextAutoLimits, ModelBuilder, State};
use web_rwkv::runtime::{TokioRuntime, v7};
use web_rwkv::wgpu::{Adapter, Backends, DeviceType, Features, Instance, InstanceDescriptor, PollType};

use crate::layout::{Dialect, Dims, Fault};

/// web-rwkv takes chunks in multiples of this; of such many tokens it multiplies by tiles, of others row by row.
pub(crate) const CHUNK_STEP: usize = 32;

/// The longest chunk of one sequence. web-rwkv packs the length of a sequence's part of a chunk into eight bits
/// (`Cursor::pack`, src/tensor/mod.rs: `self.len as u8`), so that 256 tokens count as none: their token shift is never
/// written, and the logits after them are wrong.
pub(crate) const CHUNK_MAX: usize = 224;

/// The most slots: web-rwkv packs the slot's number into eight bits as well.
const SLOTS_MAX: usize = 256;

/// What the matrices of every layer, not the head, are quantised to from F16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Quant {
    None,
    Int8,
    Nf4,
}

impl Quant {
    /// Its name.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Int8 => "int8",
            Self::Nf4 => "nf4",
        }
    }

    const fn of_layer(self) -> model::Quant {
        match self {
            Self::None => model::Quant::None,
            Self::Int8 => model::Quant::Int8,
            Self::Nf4 => model::Quant::NF4,
        }
    }
}

/// What activations are held in; the state is F32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Precision {
    F16,
    F32,
}

/// A model on a device.
pub(crate) struct Peer {
    pub(crate) adapter: String,
    pub(crate) dims: Dims,
    /// From the closed file to weights on the device, the device itself not counted.
    pub(crate) load_seconds: f64,
    context: Context,
    model: v7::Model,
}

/// Sequences that are run together, each with its state.
pub(crate) struct Slots {
    count: usize,
    vocab: usize,
    context: Context,
    runtime: TokioRuntime<Rnn>,
    state: Box<dyn State + Send + Sync>,
}

impl Peer {
    /// Loads a model onto the fastest adapter whose name holds `part`.
    pub(crate) async fn open(path: &Path, part: &str, quant: Quant) -> anyhow::Result<Self> {
        let adapter = choose(part).await?;
        let info = adapter.get_info();
        // `request_device` of web-rwkv says no more than that it failed
        ensure!(adapter.features().contains(Features::SUBGROUP), "{} has no subgroup operations", info.name);

        let start = Instant::now();
        let data = crate::map(path)?;
        let file = SafeTensors::deserialize(&data).map_err(Fault::from)?;
        let dims = Dims::read(&file, Dialect::WebRwkv)?;
        let extents = Loader::info(&file)?;
        let read = start.elapsed();

        let limits = adapter.limits();
        let most = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size);
        let largest = extents.head_buffer_size().max(extents.max_non_head_buffer_size()) as u64;
        ensure!(largest <= most, "{} binds {most} bytes, the model needs {largest}", info.name);
        let context = ContextBuilder::new(adapter)
            .auto_limits(&extents)
            .update_limits(|wanted| {
                // for the states of many slots
                wanted.max_buffer_size = limits.max_buffer_size;
                wanted.max_storage_buffer_binding_size = limits.max_storage_buffer_binding_size;
            })
            .build()
            .await?;
        // Unhandled, an error would panic on whatever thread polls, and leave the others waiting.
        context.device.on_uncaptured_error(Arc::new(|error| crate::fail(&anyhow!("the device: {error}"))));

        let start = Instant::now();
        let quants = (0..dims.layers).map(|layer| (layer, quant.of_layer())).collect();
        let model = ModelBuilder::new(&context, file).quant(quants).build_v7().await?;
        let load_seconds = (read + start.elapsed()).as_secs_f64();
        let adapter = format!("{} ({:?})", info.name, info.backend);
        Ok(Self { adapter, dims, load_seconds, context, model })
    }

    /// Opens `count` slots, all empty.
    pub(crate) async fn slots(&self, count: usize, precision: Precision) -> anyhow::Result<Slots> {
        ensure!((1..=SLOTS_MAX).contains(&count), "{count} slots: web-rwkv numbers at most {SLOTS_MAX}");
        let bytes = size_of::<f32>() * self.dims.width * (Dims::HEAD_SIZE + 2) * count;
        let most = self.context.device.limits().max_storage_buffer_binding_size;
        ensure!(
            bytes as u64 <= most,
            "the state of {count} slots has {bytes} bytes a layer, {most} can be bound"
        );
        let model = self.model.clone();
        let (state, runtime): (Box<dyn State + Send + Sync>, _) = match precision {
            Precision::F16 => {
                let bundle = v7::Bundle::<f16>::new(model, count);
                (Box::new(bundle.state()), TokioRuntime::new(bundle).await)
            }
            Precision::F32 => {
                let bundle = v7::Bundle::<f32>::new(model, count);
                (Box::new(bundle.state()), TokioRuntime::new(bundle).await)
            }
        };
        Ok(Slots { count, vocab: self.dims.vocab, context: self.context.clone(), runtime, state })
    }
}

impl Slots {
    /// Empties every slot, and waits until they are.
    pub(crate) fn reset(&self) -> anyhow::Result<()> {
        let empty = self.state.init();
        for slot in 0..self.count {
            self.state.load(empty.clone(), slot)?;
        }
        self.context.queue.submit(None);
        self.context.device.poll(PollType::wait_indefinitely())?;
        Ok(())
    }

    /// Feeds each slot its tokens, at most `chunk` of all slots at a time; the logits `[V]` after the last token of
    /// each, or with `every` those after each token, `[T, V]`.
    pub(crate) async fn feed(
        &self,
        tokens: &[&[u32]],
        chunk: usize,
        every: bool,
    ) -> anyhow::Result<Vec<Vec<f32>>> {
        let mut logits = vec![Vec::new(); self.count];
        self.run(tokens, chunk, every, |slot, row| logits[slot].extend_from_slice(row)).await?;
        Ok(logits)
    }

    /// [`Self::feed`], each slot's logits `[V]` going to `sink` as they come, uncopied.
    pub(crate) async fn run(
        &self,
        tokens: &[&[u32]],
        chunk: usize,
        every: bool,
        mut sink: impl FnMut(usize, &[f32]),
    ) -> anyhow::Result<()> {
        ensure!(tokens.len() == self.count, "{} sequences for {} slots", tokens.len(), self.count);
        ensure!(
            chunk <= CHUNK_MAX || tokens.iter().all(|tokens| tokens.len() <= CHUNK_MAX),
            "chunks of {chunk}"
        );
        // an unknown token would end web-rwkv's runtime for good
        for &token in tokens.iter().copied().flatten() {
            ensure!((token as usize) < self.vocab, "token {token} of a vocabulary of {}", self.vocab);
        }

        let option = if every { RnnOption::Full } else { RnnOption::Last };
        let batches = tokens.iter().map(|tokens| RnnInputBatch::new(tokens.to_vec(), option)).collect();
        let mut input = RnnInput::new(batches, chunk);
        while input.num_token() > 0 {
            let (rest, output) = self.runtime.infer(input).await?;
            for (slot, output) in output.iter().enumerate() {
                // rows are padded to a multiple of eight, by logits of zero
                for row in output.0.chunks_exact(self.vocab.next_multiple_of(8)) {
                    sink(slot, &row[..self.vocab]);
                }
            }
            input = rest;
        }
        Ok(())
    }
}

/// The fastest adapter whose name holds `part`.
async fn choose(part: &str) -> anyhow::Result<Adapter> {
    let wanted = InstanceDescriptor {
        backends: Backends::PRIMARY,
        ..InstanceDescriptor::new_without_display_handle()
    };
    let adapters = Instance::new(wanted).enumerate_adapters(Backends::PRIMARY).await;
    let name = |adapter: &Adapter| adapter.get_info().name;
    let names = adapters.iter().map(name).collect::<Vec<_>>().join(", ");
    let rank = |adapter: &Adapter| match adapter.get_info().device_type {
        DeviceType::DiscreteGpu => 0,
        DeviceType::IntegratedGpu => 1,
        DeviceType::VirtualGpu => 2,
        DeviceType::Other => 3,
        DeviceType::Cpu => 4,
    };
    let fitting =
        adapters.into_iter().filter(|adapter| name(adapter).to_lowercase().contains(&part.to_lowercase()));
    fitting.min_by_key(rank).with_context(|| format!("no adapter named `{part}` among [{names}]"))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::convert::convert;
    use crate::layout::find;

    const ASSETS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../rwkv-model/assets/books-10m");

    /// The bundled model, converted, gives its golden logits, in short chunks and in the longest.
    #[tokio::test]
    async fn golden_logits() {
        if let Err(error) = choose("").await {
            let required = std::env::var_os("RWKV_GPU").is_some_and(|value| value == "required");
            assert!(!required, "RWKV_GPU=required, but: {error}");
            writeln!(std::io::stderr(), "golden_logits: SKIPPED, {error}").unwrap();
            return;
        }
        let path = std::env::temp_dir().join(format!("web-rwkv-bench-{}.st", std::process::id()));
        convert(&Path::new(ASSETS).join("model.safetensors"), &path).unwrap();
        let peer = Peer::open(&path, "", Quant::None).await.unwrap();
        std::fs::remove_file(&path).unwrap();

        let data = crate::map(&Path::new(ASSETS).join("golden.safetensors")).unwrap();
        let golden = SafeTensors::deserialize(&data).unwrap();
        let words = |name| find(&golden, name).unwrap().data().as_chunks::<4>().0;
        let tokens: Vec<_> = words("tokens").iter().map(|&word| u32::from_le_bytes(word)).collect();
        let want: Vec<_> = words("logits").iter().map(|&word| f32::from_le_bytes(word)).collect();

        // web-rwkv rounds the constant of the decay to six digits and adds to the norm of a key where others bound it
        let slots = peer.slots(2, Precision::F32).await.unwrap();
        for chunk in [32, CHUNK_MAX] {
            slots.reset().unwrap();
            let logits = slots.feed(&[&tokens, &tokens[..9]], chunk, true).await.unwrap();
            for (slot, (got, want)) in
                logits.iter().zip([&want[..], &want[..9 * peer.dims.vocab]]).enumerate()
            {
                assert_eq!(got.len(), want.len(), "slot {slot}");
                let error = crate::measure::nmse(got, want);
                assert!(error < 1e-8, "chunk {chunk}, slot {slot}: {error:e}");
            }
        }
        let last = slots.feed(&[&[10], &[]], 32, false).await.unwrap();
        let lengths: Vec<_> = last.iter().map(Vec::len).collect();
        assert_eq!(lengths, [peer.dims.vocab, 0], "one row, and none for a slot that was fed nothing");

        let unknown = slots.feed(&[&[10], &[256]], 32, false).await.unwrap_err();
        assert!(unknown.to_string().contains("token 256"), "{unknown}");
        assert!(
            slots.feed(&[&tokens, &tokens], 256, false).await.is_err(),
            "a chunk that web-rwkv gets wrong"
        );
        assert!(slots.feed(&[&[10], &[11]], 32, false).await.is_ok(), "and it goes on after both");
    }
}
