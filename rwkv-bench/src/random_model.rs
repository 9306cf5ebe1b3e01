//! A checkpoint of random F16 weights at a released model's shape: for speed, never for quality.

use std::borrow::Cow;
use std::path::Path;

use anyhow::Context as _;
use half::f16;
use rayon::prelude::*;
use rwkv_core::rng::SplitMix64;
use safetensors::{Dtype, View};

/// The shapes of released models.
pub(crate) const SHAPES: [Shape; 4] = [
    Shape::new("0.4B", 24, 1024, [64, 64, 32, 128]),
    Shape::new("1.5B", 24, 2048, [96, 96, 64, 256]),
    Shape::new("2.9B", 32, 2560, [96, 96, 64, 320]),
    Shape::new("7.2B", 32, 4096, [128, 128, 96, 480]),
];

/// Tokens of the released vocabulary.
const VOCAB: usize = 65536;

/// What the channel mix reads is this much above zero, and its key weights are below zero by as much as moves a hidden
/// unit by [`LEAN`] deviations.
const LEAN_BIAS: f32 = 0.5;

/// 95 % of the hidden units are then zero, as in the bundled model.
const LEAN: f32 = 1.64;

/// What a layer adds to the residual stream is so much smaller than what it reads. Random layers amplify rounding
/// without bound, a norm over a rank-one state first of all; trained ones do not, and neither do these.
const RESIDUAL: f32 = 0.1;

/// Elements generated from one seed.
const STRETCH: usize = 1 << 16;

/// Extents of a model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) name: &'static str,
    layers: usize,
    width: usize,
    /// Of the adapters w, a, v, g.
    ranks: [usize; 4],
}

impl Shape {
    const fn new(name: &'static str, layers: usize, width: usize, ranks: [usize; 4]) -> Self {
        Self { name, layers, width, ranks }
    }

    /// D.
    pub(crate) const fn width(&self) -> usize {
        self.width
    }
}

/// A tensor that is made when it is written. Values are uniform, of the deviation and around the mean given.
struct Random {
    shape: Vec<usize>,
    mean: f32,
    deviation: f32,
    seed: u64,
}

impl View for &Random {
    fn dtype(&self) -> Dtype {
        Dtype::F16
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = vec![0; self.data_len()];
        let reach = self.deviation * 3f32.sqrt();
        bytes.par_chunks_mut(2 * STRETCH).enumerate().for_each(|(stretch, bytes)| {
            let mut rng = SplitMix64::new(self.seed ^ ((stretch as u64) << 20));
            for out in bytes.as_chunks_mut::<2>().0 {
                *out = f16::from_f32(self.mean + rng.uniform(-reach, reach)).to_le_bytes();
            }
        });
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        2 * self.shape.iter().product::<usize>()
    }
}

/// The released shape of a name.
pub(crate) fn shape_of(name: &str) -> anyhow::Result<&'static Shape> {
    let shape = SHAPES.iter().find(|shape| shape.name == name);
    shape.with_context(|| format!("no shape {name}, there are 0.4B, 1.5B, 2.9B, 7.2B"))
}

/// Runs something on a model of the given shape, which is written to a folder and deleted again, whatever comes of it.
pub(crate) fn with<T>(
    shape: &Shape,
    folder: &Path,
    run: impl FnOnce(&Path) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let path = folder.join(format!("random-{}.safetensors", shape.name));
    let done = write(shape, &path).and_then(|()| run(&path));
    let removed = std::fs::remove_file(&path).with_context(|| path.display().to_string());
    let done = done?;
    removed.map(|()| done)
}

/// Writes a model of the given shape.
fn write(shape: &Shape, path: &Path) -> anyhow::Result<()> {
    let (d, mut tensors) = (shape.width, Vec::new());
    let mut push = |name: String, extents: &[usize], mean: f32, deviation: f32| {
        let seed = (tensors.len() as u64) << 44;
        tensors.push((name, Random { shape: extents.to_vec(), mean, deviation, seed }));
    };
    // a row of n weights of deviation n^-1/2 keeps the size of what it multiplies
    let fan = |inputs: usize| (inputs as f32).sqrt().recip();
    push("emb.weight".to_owned(), &[VOCAB, d], 0.0, 0.5);
    push("head.weight".to_owned(), &[VOCAB, d], 0.0, fan(d));
    push("blocks.0.ln0.weight".to_owned(), &[d], 1.0, 0.1);
    push("blocks.0.ln0.bias".to_owned(), &[d], 0.0, 0.02);
    push("ln_out.weight".to_owned(), &[d], 1.0, 0.1);
    push("ln_out.bias".to_owned(), &[d], 0.0, 0.02);
    for layer in 0..shape.layers {
        let mut push = |name: &str, extents: &[usize], mean, deviation| {
            push(format!("blocks.{layer}.{name}"), extents, mean, deviation);
        };
        for (norm, bias) in [("ln1", 0.0), ("ln2", LEAN_BIAS), ("att.ln_x", 0.0)] {
            push(&format!("{norm}.weight"), &[d], 1.0, 0.1);
            push(&format!("{norm}.bias"), &[d], bias, 0.02);
        }
        for mix in ["x_r", "x_w", "x_k", "x_v", "x_a", "x_g"] {
            push(&format!("att.{mix}"), &[1, 1, d], 0.5, 0.3);
        }
        for (adapter, rank) in ["w", "a", "v", "g"].into_iter().zip(shape.ranks) {
            push(&format!("att.{adapter}1"), &[d, rank], 0.0, fan(d));
            push(&format!("att.{adapter}2"), &[rank, d], 0.0, fan(rank));
        }
        push("att.w0", &[1, 1, d], -2.5, 2.0);
        push("att.a0", &[1, 1, d], 0.0, 0.5);
        push("att.v0", &[1, 1, d], 0.0, 0.5);
        push("att.k_k", &[1, 1, d], 0.75, 0.15);
        push("att.k_a", &[1, 1, d], 0.5, 0.3);
        push("att.r_k", &[d / 64, 64], 0.0, 0.1);
        for (matrix, size) in [("receptance", 1.0), ("key", 1.0), ("value", 1.0), ("output", RESIDUAL)] {
            push(&format!("att.{matrix}.weight"), &[d, d], 0.0, size * fan(d));
        }
        push("ffn.x_k", &[1, 1, d], 0.5, 0.3);
        push("ffn.key.weight", &[4 * d, d], -LEAN / (LEAN_BIAS * d as f32), fan(d));
        push("ffn.value.weight", &[d, 4 * d], 0.0, RESIDUAL * fan(4 * d));
    }
    safetensors::serialize_to_file(tensors.iter().map(|(name, tensor)| (name, tensor)), None, path)?;
    Ok(())
}
