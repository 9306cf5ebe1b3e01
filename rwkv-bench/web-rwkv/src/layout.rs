//! The tensors of an RWKV-7 model, as they are published and as web-rwkv reads them.
//!
//! web-rwkv reads F16 only, the official names, and the factors of the low-rank adapters transposed:
//!
//! | factor | official | web-rwkv |
//! |---|---|---|
//! | `w1 a1 v1 g1` | `[D, rank]` | `[rank, D]` |
//! | `w2 a2 v2 g2` | `[rank, D]` | `[D, rank]` |
//!
//! It indexes shapes before it looks at them, so a file is checked here first: [`Dims::read`].

use std::collections::BTreeSet;

use safetensors::{Dtype, SafeTensorError, SafeTensors};

/// What is wrong with a model file.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    #[error("not a safetensors file")]
    Format(#[from] SafeTensorError),
    #[error("`{tensor}` is missing")]
    Missing { tensor: String },
    #[error("`{tensor}` is no tensor of RWKV-7")]
    Unknown { tensor: String },
    #[error("`{tensor}` is {got:?}, not {want:?}")]
    Shape { tensor: String, got: Vec<usize>, want: Vec<usize> },
    #[error("`{tensor}` has {got} axes, not {want}")]
    Axes { tensor: String, got: usize, want: usize },
    #[error("`{tensor}` is {got:?}: not the {dialect} layout, which has {width} along axis {axis}")]
    Layout { tensor: String, got: Vec<usize>, dialect: &'static str, width: usize, axis: usize },
    #[error("`{tensor}` is {got:?}, not one of {want:?}")]
    Type { tensor: String, got: Dtype, want: &'static [Dtype] },
    #[error("{got} layer: web-rwkv takes the rank of the value adapter from layer 1")]
    Layers { got: usize },
    #[error("{heads} heads of {head_size} in a width of {width}: web-rwkv is right for heads of 64 only")]
    Heads { heads: usize, head_size: usize, width: usize },
    #[error("`{tensor}` holds {value}, which F16 cannot")]
    Range { tensor: String, value: f32 },
}

/// How the adapters' factors lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    Official,
    WebRwkv,
}

impl Dialect {
    fn name(self) -> &'static str {
        match self {
            Self::Official => "official",
            Self::WebRwkv => "web-rwkv",
        }
    }

    /// The types that tensors may have.
    fn types(self) -> &'static [Dtype] {
        match self {
            Self::Official => &[Dtype::F16, Dtype::BF16, Dtype::F32],
            Self::WebRwkv => &[Dtype::F16],
        }
    }
}

/// The adapters of a layer, in the order of [`Dims::ranks`].
const ADAPTERS: [&str; 4] = ["w", "a", "v", "g"];

/// Layer 0 has no value residual: these are absent or unused.
const UNUSED: [&str; 3] = ["blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"];

/// The extents of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Dims {
    pub(crate) layers: usize,
    pub(crate) width: usize,
    pub(crate) hidden: usize,
    pub(crate) vocab: usize,
    heads: usize,
    ranks: [usize; 4],
}

impl Dims {
    /// The elements of a head.
    pub(crate) const HEAD_SIZE: usize = 64;

    /// The extents of a file in which every tensor that the model needs is there, of the right shape and type, and no
    /// other tensor is.
    pub(crate) fn read(file: &SafeTensors<'_>, dialect: Dialect) -> Result<Self, Fault> {
        let dims = Self::infer(file, dialect)?;
        let tensors = dims.tensors(dialect);
        for (tensor, want) in &tensors {
            let view = find(file, tensor)?;
            // vectors are published as [1, 1, D] and as [D]
            let squeezed = |shape: &[usize]| shape.iter().copied().filter(|&n| n != 1).collect::<Vec<_>>();
            if squeezed(view.shape()) != squeezed(want) {
                return Err(Fault::Shape {
                    tensor: tensor.clone(),
                    got: view.shape().to_vec(),
                    want: want.clone(),
                });
            }
            if !dialect.types().contains(&view.dtype()) {
                return Err(Fault::Type { tensor: tensor.clone(), got: view.dtype(), want: dialect.types() });
            }
        }
        let known: BTreeSet<_> = tensors.iter().map(|(tensor, _)| tensor.as_str()).chain(UNUSED).collect();
        match file.names().into_iter().find(|&tensor| !known.contains(tensor)) {
            Some(tensor) => Err(Fault::Unknown { tensor: tensor.to_owned() }),
            None => Ok(dims),
        }
    }

    fn infer(file: &SafeTensors<'_>, dialect: Dialect) -> Result<Self, Fault> {
        let [vocab, width] = matrix(file, "emb.weight")?;
        let [hidden, _] = matrix(file, "blocks.0.ffn.key.weight")?;
        let [heads, head_size] = matrix(file, "blocks.0.att.r_k")?;
        if head_size != Self::HEAD_SIZE || heads.checked_mul(head_size) != Some(width) {
            return Err(Fault::Heads { heads, head_size, width });
        }
        // bounded by the number of tensors, whatever their names say
        let layers =
            (0..file.len()).take_while(|n| find(file, &format!("blocks.{n}.att.r_k")).is_ok()).count();
        if layers < 2 {
            return Err(Fault::Layers { got: layers });
        }
        let mut ranks = [0; 4];
        for (rank, adapter) in ranks.iter_mut().zip(ADAPTERS) {
            let tensor = format!("blocks.1.att.{adapter}1");
            let shape = matrix(file, &tensor)?;
            let axis = match dialect {
                Dialect::Official => 0,
                Dialect::WebRwkv => 1,
            };
            if shape[axis] != width {
                let (got, dialect) = (shape.to_vec(), dialect.name());
                return Err(Fault::Layout { tensor, got, dialect, width, axis });
            }
            *rank = shape[1 - axis];
        }
        Ok(Self { layers, width, hidden, vocab, heads, ranks })
    }

    /// Every tensor that the model needs and its shape, layer by layer.
    pub(crate) fn tensors(&self, dialect: Dialect) -> Vec<(String, Vec<usize>)> {
        let &Self { layers, width: d, hidden, vocab, heads, ranks } = self;
        let mut tensors = Vec::new();
        let mut push = |name: String, shape: &[usize]| tensors.push((name, shape.to_vec()));
        push("emb.weight".to_owned(), &[vocab, d]);
        for layer in 0..layers {
            let norms =
                if layer == 0 { &["ln0", "ln1", "ln2", "att.ln_x"][..] } else { &["ln1", "ln2", "att.ln_x"] };
            for norm in norms {
                push(format!("blocks.{layer}.{norm}.weight"), &[d]);
                push(format!("blocks.{layer}.{norm}.bias"), &[d]);
            }
            for vector in ["x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "k_k", "k_a"] {
                push(format!("blocks.{layer}.att.{vector}"), &[d]);
            }
            for (adapter, rank) in
                ADAPTERS.into_iter().zip(ranks).filter(|(adapter, _)| layer > 0 || *adapter != "v")
            {
                let (down, up) = match dialect {
                    Dialect::Official => ([d, rank], [rank, d]),
                    Dialect::WebRwkv => ([rank, d], [d, rank]),
                };
                if adapter != "g" {
                    push(format!("blocks.{layer}.att.{adapter}0"), &[d]);
                }
                push(format!("blocks.{layer}.att.{adapter}1"), &down);
                push(format!("blocks.{layer}.att.{adapter}2"), &up);
            }
            push(format!("blocks.{layer}.att.r_k"), &[heads, Self::HEAD_SIZE]);
            for matrix in ["receptance", "key", "value", "output"] {
                push(format!("blocks.{layer}.att.{matrix}.weight"), &[d, d]);
            }
            push(format!("blocks.{layer}.ffn.x_k"), &[d]);
            push(format!("blocks.{layer}.ffn.key.weight"), &[hidden, d]);
            push(format!("blocks.{layer}.ffn.value.weight"), &[d, hidden]);
        }
        push("ln_out.weight".to_owned(), &[d]);
        push("ln_out.bias".to_owned(), &[d]);
        push("head.weight".to_owned(), &[vocab, d]);
        tensors
    }
}

/// Whether a tensor is a factor of a low-rank adapter, which the two layouts hold transposed to each other.
pub(crate) fn is_factor(tensor: &str) -> bool {
    let name = tensor.rsplit_once(".att.").map_or("", |(_, name)| name);
    ADAPTERS.iter().any(|adapter| matches!(name.strip_prefix(adapter), Some("1" | "2")))
}

pub(crate) fn find<'a>(
    file: &SafeTensors<'a>,
    tensor: &str,
) -> Result<safetensors::tensor::TensorView<'a>, Fault> {
    file.tensor(tensor).map_err(|_| Fault::Missing { tensor: tensor.to_owned() })
}

fn matrix(file: &SafeTensors<'_>, tensor: &str) -> Result<[usize; 2], Fault> {
    let view = find(file, tensor)?;
    let axes = Fault::Axes { tensor: tensor.to_owned(), got: view.shape().len(), want: 2 };
    view.shape().try_into().map_err(|_| axes)
}
