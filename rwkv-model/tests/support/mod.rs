//! What the tests share: tensors read from the golden files, and models written in every format and dialect.
#![allow(
    clippy::allow_attributes,
    dead_code,
    reason = "each test binary uses its part, and none may use all"
)]

use half::{bf16, f16};
use rwkv_core::rng::SplitMix64;
use rwkv_model::checkpoint::source::MemorySource;
use rwkv_model::checkpoint::{self, Checkpoint, LoraLayout};
use rwkv_model::engine::Device;
use rwkv_model::{Engine, EngineOptions, Error, Session};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

pub(crate) mod pth_writer;

/// The bundled model.
pub(crate) const BUNDLED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/books-10m/model.safetensors");

/// A golden file.
pub(crate) fn vectors(name: &str) -> String {
    format!("{}/tests/vectors/{name}.safetensors", env!("CARGO_MANIFEST_DIR"))
}

/// A tensor in memory, of a type by its safetensors name.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: &'static str,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

impl Tensor {
    pub(crate) fn new(name: &str, shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self { name: name.to_owned(), dtype: "F32", shape: shape.to_vec(), bytes }
    }

    /// The values, widened.
    pub(crate) fn values(&self) -> Vec<f32> {
        let bits16 = || self.bytes.as_chunks::<2>().0.iter().map(|&b| u16::from_le_bytes(b));
        match self.dtype {
            "F16" => bits16().map(|bits| f16::from_bits(bits).to_f32()).collect(),
            "BF16" => bits16().map(|bits| bf16::from_bits(bits).to_f32()).collect(),
            _ => self.bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
        }
    }

    /// The tensor rounded to another type.
    pub(crate) fn to(&self, dtype: &'static str) -> Self {
        let values = self.values();
        let bytes = match dtype {
            "F16" => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
            "BF16" => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        };
        Self { dtype, bytes, ..self.clone() }
    }

    /// The matrix the other way round.
    pub(crate) fn transposed(&self) -> Self {
        let (rows, columns) = (self.shape[0], self.shape[1]);
        let size = self.bytes.len() / (rows * columns);
        let element = |row: usize, column: usize| &self.bytes[(row * columns + column) * size..][..size];
        let bytes = (0..columns).flat_map(|c| (0..rows).flat_map(move |r| element(r, c))).copied().collect();
        Self { shape: vec![columns, rows], bytes, ..self.clone() }
    }

    fn renamed(&self, name: String) -> Self {
        Self { name, ..self.clone() }
    }
}

/// Every tensor of a safetensors file.
pub(crate) fn read(path: &str) -> Vec<Tensor> {
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |(name, view): (&str, TensorView<'_>)| {
        let dtype = match view.dtype() {
            Dtype::F16 => "F16",
            Dtype::BF16 => "BF16",
            Dtype::F32 => "F32",
            _ => "I32",
        };
        Tensor { name: name.to_owned(), dtype, shape: view.shape().to_vec(), bytes: view.data().to_vec() }
    };
    file.iter().map(tensor).collect()
}

/// The values of one tensor of many.
pub(crate) fn get(tensors: &[Tensor], name: &str) -> Vec<f32> {
    tensors.iter().find(|t| t.name == name).unwrap_or_else(|| panic!("no tensor {name}")).values()
}

/// Token ids, stored as I32.
pub(crate) fn tokens(tensors: &[Tensor]) -> Vec<u32> {
    let tokens = tensors.iter().find(|t| t.name == "tokens").unwrap();
    tokens.bytes.as_chunks::<4>().0.iter().map(|&b| u32::from_le_bytes(b)).collect()
}

/// A small random model by official names: sizes are `[layers, heads, head size, hidden, vocabulary, rank]`.
pub(crate) fn random_model(sizes: [usize; 6], seed: u64) -> Vec<Tensor> {
    let [layers, heads, head_size, hidden, vocab, rank] = sizes;
    let (d, mut rng, mut model) = (heads * head_size, SplitMix64::new(seed), Vec::new());
    let mut push = |name: String, shape: &[usize], mean: f32, deviation: f32| {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| mean + deviation * rng.normal()).collect();
        model.push(Tensor::new(&name, shape, &values));
    };
    push("emb.weight".to_owned(), &[vocab, d], 0.0, 0.5);
    push("head.weight".to_owned(), &[vocab, d], 0.0, 0.5);
    push("blocks.0.ln0.weight".to_owned(), &[d], 1.0, 0.1);
    push("blocks.0.ln0.bias".to_owned(), &[d], 0.0, 0.1);
    push("ln_out.weight".to_owned(), &[d], 1.0, 0.1);
    push("ln_out.bias".to_owned(), &[d], 0.0, 0.1);
    for layer in 0..layers {
        let mut push =
            |name: &str, shape: &[usize], mean| push(format!("blocks.{layer}.{name}"), shape, mean, 0.2);
        for norm in ["ln1", "ln2", "att.ln_x"] {
            push(&format!("{norm}.weight"), &[d], 1.0);
            push(&format!("{norm}.bias"), &[d], 0.0);
        }
        for mix in ["x_r", "x_w", "x_k", "x_v", "x_a", "x_g"] {
            push(&format!("att.{mix}"), &[1, 1, d], 0.5);
        }
        for adapter in ["w", "a", "v", "g"].into_iter().filter(|&a| layer > 0 || a != "v") {
            push(&format!("att.{adapter}1"), &[d, rank], 0.0);
            push(&format!("att.{adapter}2"), &[rank, d], 0.0);
            if adapter != "g" {
                push(&format!("att.{adapter}0"), &[1, 1, d], 0.0);
            }
        }
        for vector in ["k_k", "k_a"] {
            push(&format!("att.{vector}"), &[1, 1, d], 1.0);
        }
        push("att.r_k", &[heads, head_size], 0.0);
        for matrix in ["receptance", "key", "value", "output"] {
            push(&format!("att.{matrix}.weight"), &[d, d], 0.0);
        }
        push("ffn.x_k", &[1, 1, d], 0.5);
        push("ffn.key.weight", &[hidden, d], 0.0);
        push("ffn.value.weight", &[d, hidden], 0.0);
    }
    model
}

/// Opens a checkpoint in memory.
pub(crate) fn open(bytes: Vec<u8>, lora: Option<LoraLayout>) -> Result<Checkpoint, checkpoint::Error> {
    Checkpoint::from_source("memory", Box::new(MemorySource(bytes)), checkpoint::Options { lora })
}

/// An engine over a checkpoint in memory.
pub(crate) fn engine(bytes: Vec<u8>, options: EngineOptions) -> Engine {
    try_engine(bytes, options).unwrap()
}

/// An engine over a checkpoint in memory, unless it is refused.
pub(crate) fn try_engine(bytes: Vec<u8>, options: EngineOptions) -> Result<Engine, Error> {
    Engine::new(&open(bytes, options.lora)?, options, &|_| {})
}

/// On the CPU, whatever else the machine has.
pub(crate) fn on_cpu() -> EngineOptions {
    EngineOptions { device: Device::Cpu, ..EngineOptions::default() }
}

/// On the GPU, if there is one. Without, it is said on standard error, and fails under `RWKV_GPU=required`.
pub(crate) fn on_gpu() -> Option<EngineOptions> {
    rwkv_kernels::gpu::device_for_tests()
        .map(|_| EngineOptions { device: Device::Gpu(None), ..EngineOptions::default() })
}

/// A session that has read a prompt.
pub(crate) fn alone(engine: &Engine, prompt: &[u32]) -> Session {
    let mut session = engine.session();
    session.prefill(prompt).unwrap();
    session
}

/// Feeds each session its prompt in one call.
pub(crate) fn together(engine: &Engine, prompts: &[Vec<u32>]) -> Vec<Session> {
    let mut sessions: Vec<Session> = prompts.iter().map(|_| engine.session()).collect();
    let mut batch: Vec<_> = sessions.iter_mut().zip(prompts).map(|(s, p)| (s, p.as_slice())).collect();
    engine.step(&mut batch).unwrap();
    sessions
}

/// All that a session shows.
pub(crate) fn shown(session: &Session) -> (Vec<f32>, Vec<f32>, u64) {
    (session.state().unwrap(), session.logits().map(<[f32]>::to_vec).unwrap_or_default(), session.position())
}

/// Writes a safetensors file.
pub(crate) fn safetensors(tensors: &[Tensor]) -> Vec<u8> {
    let views = tensors.iter().map(|t| {
        let dtype = match t.dtype {
            "F16" => Dtype::F16,
            "BF16" => Dtype::BF16,
            "F32" => Dtype::F32,
            other => panic!("no type {other}"),
        };
        (t.name.as_str(), TensorView::new(dtype, t.shape.clone(), &t.bytes).unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

/// Writes a `.pth` file.
pub(crate) fn pth(tensors: &[Tensor]) -> Vec<u8> {
    let tensors: Vec<_> =
        tensors.iter().map(|t| (t.name.clone(), t.dtype, t.shape.clone(), t.bytes.clone())).collect();
    pth_writer::write_pth(&tensors)
}

/// As web-rwkv's converter writes a model: every adapter factor the other way round.
pub(crate) fn as_web_rwkv(model: &[Tensor]) -> Vec<Tensor> {
    let factor = |name: &str| name.contains(".att.") && name.ends_with(['1', '2']);
    model.iter().map(|t| if factor(&t.name) { t.transposed() } else { t.clone() }).collect()
}

/// By the names and shapes of flash-linear-attention.
pub(crate) fn as_fla(model: &[Tensor]) -> Vec<Tensor> {
    model.iter().map(to_fla).collect()
}

/// As [`as_fla`], with the six mixes of each layer in one tensor, as the oldest of its files have them.
pub(crate) fn as_stacked_fla(model: &[Tensor]) -> Vec<Tensor> {
    let (mixes, mut rest): (Vec<_>, Vec<_>) =
        as_fla(model).into_iter().partition(|t| t.name.contains(".attn.x_"));
    let layers = mixes.len() / 6;
    for layer in 0..layers {
        let name = |mix: char| format!("model.layers.{layer}.attn.x_{mix}");
        let find = |mix: char| mixes.iter().find(|t| t.name == name(mix)).unwrap();
        let bytes = "rwkvag".chars().flat_map(|mix| find(mix).bytes.clone()).collect();
        let one = find('r');
        let shape = vec![6, 1, *one.shape.last().unwrap()];
        rest.push(Tensor { name: name('x'), dtype: one.dtype, shape, bytes });
    }
    rest
}

fn to_fla(t: &Tensor) -> Tensor {
    let whole = [
        ("emb.weight", "model.embeddings.weight"),
        ("ln_out.weight", "model.norm.weight"),
        ("ln_out.bias", "model.norm.bias"),
        ("head.weight", "lm_head.weight"),
    ];
    if let Some((_, fla)) = whole.iter().find(|(official, _)| *official == t.name) {
        return t.renamed((*fla).to_owned());
    }
    let (layer, name) = t.name.strip_prefix("blocks.").unwrap().split_once('.').unwrap();
    let named = |name: &str| t.renamed(format!("model.layers.{layer}.{name}"));
    let flat = |t: Tensor| Tensor { shape: vec![t.shape.iter().product()], ..t };
    match name.split_once('.').unwrap() {
        ("ln0", rest) => named(&format!("pre_norm.{rest}")),
        ("ln1", rest) => named(&format!("attn_norm.{rest}")),
        ("ln2", rest) => named(&format!("ffn_norm.{rest}")),
        ("ffn", rest) => named(&format!("ffn.{rest}")),
        (_, "receptance.weight") => named("attn.r_proj.weight"),
        (_, "key.weight") => named("attn.k_proj.weight"),
        (_, "value.weight") => named("attn.v_proj.weight"),
        (_, "output.weight") => named("attn.o_proj.weight"),
        (_, "ln_x.weight") => named("attn.g_norm.weight"),
        (_, "ln_x.bias") => named("attn.g_norm.bias"),
        (_, vector @ ("k_k" | "k_a")) => flat(named(&format!("attn.{vector}"))),
        (_, rest) if rest.starts_with("x_") || rest == "r_k" => named(&format!("attn.{rest}")),
        (_, rest) => {
            let (adapter, part) = rest.split_at(1);
            match part {
                "0" => flat(named(&format!("attn.{adapter}_lora.lora.2.bias"))),
                "1" => named(&format!("attn.{adapter}_lora.lora.0.weight")).transposed(),
                _ => named(&format!("attn.{adapter}_lora.lora.2.weight")).transposed(),
            }
        }
    }
}
