//! Checkpoints: from a file in any of the usual formats to a model, every tensor checked.
//!
//! [`Checkpoint::open`] tells the container (safetensors, `.pth`) and the dialect of the names by the content alone,
//! reads every extent from the tensors, and checks that every tensor is there in the expected shape, before a single
//! weight is read. [`Checkpoint::load`] then reads the weights, each once, by position, into their final place.
//!
//! A file that is cut short while open gives an error that names the tensor (see [`source`]); once loaded, a model no
//! longer needs its file.

pub mod archive;
pub mod directory;
mod load;
mod names;
pub mod pickle;
pub mod pth;
pub mod safetensors;
pub mod source;
mod write;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use rwkv_core::ModelConfig;
use rwkv_core::config::Ranks;
use rwkv_core::quant;

pub use self::directory::{Dtype, Entry, Format};
pub(crate) use self::load::Reader;
pub use self::load::{LoadMatrix, Progress};
pub use self::names::Dialect;
use self::source::{FileSource, Source};
pub use self::write::WriteError;
use crate::recipe::{Matrix, Recipe, UnknownRecipe};

/// What is wrong with a checkpoint, and which one it is.
#[derive(Debug, thiserror::Error)]
#[error("{file}: {fault}")]
pub struct Error {
    /// The file, as it was named.
    pub file: String,
    /// What is wrong.
    pub fault: Fault,
}

/// What is wrong with a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The container cannot be read.
    #[error(transparent)]
    Directory(#[from] directory::Error),
    /// No tensor by which a dialect is told.
    #[error(
        "no RWKV-7 model: none of its {tensors} tensors ({}, ..) is emb.weight or model.embeddings.weight",
        first.as_deref().unwrap_or("none")
    )]
    NoEmbedding {
        /// How many tensors there are.
        tensors: usize,
        /// One of them.
        first: Option<String>,
    },
    /// Another architecture.
    #[error("tensor {tensor}: a model of {architecture}; only RWKV-7 is supported")]
    Architecture {
        /// The tensor that tells.
        tensor: String,
        /// What it tells.
        architecture: &'static str,
    },
    /// A tensor is missing.
    #[error("tensor {tensor} is missing, expected {expected}")]
    Missing {
        /// Its official name.
        tensor: String,
        /// The shape it should have.
        expected: String,
    },
    /// Two tensors of one name, the case of letters and the dialect aside.
    #[error("tensor {tensor} is there twice, the second time as {name}")]
    Duplicate {
        /// The official name.
        tensor: String,
        /// The name in the file of the second.
        name: String,
    },
    /// Tensors that share their bytes, so that a model would take far more memory than its file.
    #[error("the tensors have {tensors} bytes, the file only {file}")]
    Shared {
        /// Bytes of the tensors.
        tensors: u64,
        /// Bytes of the file.
        file: u64,
    },
    /// A tensor has another shape than the rest of the model implies.
    #[error("tensor {tensor} has shape {found:?}, expected {expected}")]
    Shape {
        /// Its official name.
        tensor: String,
        /// The shape it has.
        found: Vec<usize>,
        /// The shape it should have.
        expected: String,
    },
    /// A tensor has a type that no model has.
    #[error("tensor {tensor} is of type {found}, expected F32, F16 or BF16")]
    Dtype {
        /// Its official name.
        tensor: String,
        /// The type it has.
        found: Dtype,
    },
    /// A weight is infinite or no number.
    #[error("tensor {tensor} is not finite at element {index}")]
    NotFinite {
        /// Its official name.
        tensor: String,
        /// Which element.
        index: usize,
    },
    /// A weight is beyond what the format of the weights holds.
    #[error("tensor {tensor} is {value:e} at element {index}, beyond half precision")]
    Beyond {
        /// Its official name.
        tensor: String,
        /// Which element.
        index: usize,
        /// What it is.
        value: f32,
    },
    /// A weight is beyond what its block can hold.
    #[error("tensor {tensor}, which is to be quantised, from element {first} on: {error}")]
    Quantising {
        /// Its official name.
        tensor: String,
        /// The element that the error counts from; of the matrix the other way round if it is the channel mix's value.
        first: usize,
        /// What is wrong.
        error: quant::Error,
    },
    /// What the file says of its quantised matrices says nothing.
    #[error("{WEIGHTS}: {0}")]
    Recipe(#[from] UnknownRecipe),
    /// A recipe names a layer that is not there.
    #[error("the weights of layer {layer} are to be quantised, of {layers}")]
    RecipeLayer {
        /// The layer.
        layer: usize,
        /// How many there are.
        layers: usize,
    },
    /// Scales of blocks that are infinite or no numbers.
    #[error("tensor {tensor} has scales that are not finite")]
    Scales {
        /// Its official name.
        tensor: String,
    },
    /// A tensor's bytes cannot be read.
    #[error("reading tensor {tensor}: {error}")]
    Io {
        /// Its official name.
        tensor: String,
        /// Why.
        error: io::Error,
    },
}

/// Which way round the adapters' factors are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoraLayout {
    /// `w1 [D, rank]`, `w2 [rank, D]`.
    Official,
    /// `w1 [rank, D]`, `w2 [D, rank]`: web-rwkv's converter, and fla.
    Transposed,
}

/// How to read a checkpoint.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Which way round the adapters are, where their shapes do not tell because every rank equals the width. The
    /// default there is [`LoraLayout::Official`] for official names.
    pub lora: Option<LoraLayout>,
}

/// A checkpoint whose tensors are all known and checked, none of them read yet.
#[derive(Debug)]
pub struct Checkpoint {
    file: String,
    source: Box<dyn Source>,
    format: Format,
    dialect: Dialect,
    lora: LoraLayout,
    config: ModelConfig,
    /// Those that a model is made of, by official names.
    tensors: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
    ignored: Vec<String>,
    /// What the file has quantised.
    recipe: Recipe,
}

/// The writer's note that says which matrices are quantised, as the text of a [`Recipe`].
///
/// A quantised matrix is a tensor of bytes `[rows, bytes of a row]` as [`Blocks::weights`](quant::Blocks::weights) are, and one
/// of halves `[rows, blocks]` named as it is and [`SCALES`]. The channel mix's value is `[F, D]` then.
pub const WEIGHTS: &str = "rwkv.weights";

/// What the name of a tensor of scales ends with.
pub const SCALES: &str = ".scales";

impl Checkpoint {
    /// Opens the checkpoint at `path`.
    ///
    /// # Errors
    ///
    /// If the file cannot be read, is of no known format, or a tensor is missing or of an unexpected shape or type.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        Self::open_with(path, Options::default())
    }

    /// As [`Self::open`], with options.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub fn open_with(path: impl AsRef<Path>, options: Options) -> Result<Self, Error> {
        let file = path.as_ref().display().to_string();
        match FileSource::open(path) {
            Ok(source) => Self::from_source(file, Box::new(source), options),
            Err(error) => Err(Error { file, fault: Fault::Directory(error.into()) }),
        }
    }

    /// Reads a checkpoint from any source; `file` is what errors call it.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub fn from_source(
        file: impl Into<String>,
        source: Box<dyn Source>,
        options: Options,
    ) -> Result<Self, Error> {
        let file = file.into();
        match Self::read(file.clone(), source, options) {
            Ok(checkpoint) => Ok(checkpoint),
            Err(fault) => Err(Error { file, fault }),
        }
    }

    fn read(file: String, source: Box<dyn Source>, options: Options) -> Result<Self, Fault> {
        let directory = directory::read(&*source)?;
        let (dialect, mut tensors) = names::official(directory.tensors)?;
        let (config, lora) = extents(&tensors, dialect, options)?;
        let recipe = match directory.metadata.get(WEIGHTS) {
            Some(text) => text.parse()?,
            None => Recipe::default(),
        };
        if let Some(layer) = recipe.layer_beyond(config.n_layers) {
            return Err(Fault::RecipeLayer { layer, layers: config.n_layers });
        }
        let mut used = BTreeMap::new();
        for (name, shape) in expected(&config, lora, |name| tensors.contains_key(name)) {
            if let Some(format) = quantised(&recipe, &name) {
                for (name, entry) in of_blocks(&tensors, &name, &shape, format)? {
                    used.insert(name, entry);
                }
                continue;
            }
            let entry = require(&tensors, &name, || format!("{shape:?}"))?;
            // files hold vectors as [D] and as [1, 1, D]; matrices have no more axes than two
            let same = match shape.len() {
                1 => squeezed(&entry.shape) == squeezed(&shape),
                _ => {
                    entry.shape == shape
                        || name.ends_with(".x_x") && squeezed(&entry.shape) == squeezed(&shape)
                }
            };
            if !same {
                let expected = format!("{shape:?}");
                return Err(Fault::Shape { tensor: name, found: entry.shape.clone(), expected });
            }
            if let Dtype::Other(_) = entry.dtype {
                return Err(Fault::Dtype { tensor: name, found: entry.dtype.clone() });
            }
            used.insert(name, entry.clone());
        }
        tensors.retain(|name, _| !used.contains_key(name));
        let ignored = tensors.into_keys().collect();
        let (format, metadata) = (directory.format, directory.metadata);
        let checkpoint =
            Self { file, source, format, dialect, lora, config, tensors: used, metadata, ignored, recipe };
        // embedding and head may be one, but no more than that
        let (tensors, file) = (checkpoint.bytes(), checkpoint.source.len());
        if tensors > file.saturating_mul(2) { Err(Fault::Shared { tensors, file }) } else { Ok(checkpoint) }
    }

    /// The model's extents.
    #[must_use]
    pub const fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The container.
    #[must_use]
    pub const fn format(&self) -> Format {
        self.format
    }

    /// How its tensors are named.
    #[must_use]
    pub const fn dialect(&self) -> Dialect {
        self.dialect
    }

    /// Which way round its adapters are.
    #[must_use]
    pub const fn lora(&self) -> LoraLayout {
        self.lora
    }

    /// Bytes of the tensors that a model is made of.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.tensors.values().map(Entry::bytes).sum()
    }

    /// Tensors that the file holds and a model has no use for, such as the value residual adapter of layer 0.
    #[must_use]
    pub fn ignored(&self) -> &[String] {
        &self.ignored
    }

    /// What a model is made of: every tensor by its official name, in the shape and order of the file (see [`Self::lora`]).
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.tensors.iter().map(|(name, entry)| (name.as_str(), entry))
    }

    /// What the file has quantised.
    #[must_use]
    pub const fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// Outputs and inputs of a matrix.
    pub(crate) const fn extents(&self, matrix: Matrix) -> [usize; 2] {
        let ModelConfig { width, hidden, vocab, .. } = self.config;
        match matrix {
            Matrix::FfnKey => [hidden, width],
            Matrix::FfnValue => [width, hidden],
            Matrix::Head => [vocab, width],
            Matrix::Receptance | Matrix::Key | Matrix::Value | Matrix::Output => [width; 2],
        }
    }

    /// Whether one of its [tensors](Self::tensors) holds a quantised matrix.
    pub(crate) fn is_quantised(&self, tensor: &str) -> bool {
        quantised(&self.recipe, tensor).is_some()
    }

    /// What the writer noted beside the tensors.
    #[must_use]
    pub const fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    pub(crate) fn error(&self, fault: Fault) -> Error {
        Error { file: self.file.clone(), fault }
    }
}

fn require<'a>(
    tensors: &'a BTreeMap<String, Entry>,
    name: &str,
    expected: impl FnOnce() -> String,
) -> Result<&'a Entry, Fault> {
    tensors.get(name).ok_or_else(|| Fault::Missing { tensor: name.to_owned(), expected: expected() })
}

/// The format of a tensor's blocks, if a recipe gives it any.
fn quantised(recipe: &Recipe, tensor: &str) -> Option<quant::Format> {
    let (layer, matrix) = Matrix::of(tensor)?;
    recipe.format(layer, matrix).blocks()
}

/// The two tensors of a quantised matrix, whose shape would be `shape`.
fn of_blocks(
    tensors: &BTreeMap<String, Entry>,
    name: &str,
    shape: &[usize],
    format: quant::Format,
) -> Result<[(String, Entry); 2], Fault> {
    let hidden_major = Matrix::of(name).is_some_and(|(_, of)| of == Matrix::FfnValue);
    let [rows, columns] = if hidden_major { [shape[1], shape[0]] } else { [shape[0], shape[1]] };
    let blocks = columns.div_ceil(quant::BLOCK);
    let check = |name: String, last: Option<usize>, dtype: Dtype| {
        let expected = || format!("[{rows}, {}] of {dtype}", last.unwrap_or(usize::MAX));
        let entry = require(tensors, &name, expected)?;
        if last.is_none_or(|last| entry.shape != [rows, last]) {
            return Err(Fault::Shape { tensor: name, found: entry.shape.clone(), expected: expected() });
        }
        match entry.dtype == dtype {
            true => Ok((name, entry.clone())),
            false => Err(Fault::Dtype { tensor: name, found: entry.dtype.clone() }),
        }
    };
    Ok([
        check(name.to_owned(), blocks.checked_mul(format.block_bytes()), Dtype::Other("U8".to_owned()))?,
        check(format!("{name}{SCALES}"), Some(blocks), Dtype::F16)?,
    ])
}

/// A shape without its axes of one.
fn squeezed(shape: &[usize]) -> Vec<usize> {
    shape.iter().copied().filter(|&extent| extent != 1).collect()
}

/// Reads every extent from the tensors that reveal it.
fn extents(
    tensors: &BTreeMap<String, Entry>,
    dialect: Dialect,
    options: Options,
) -> Result<(ModelConfig, LoraLayout), Fault> {
    let shape = |name: &str, expected: &str, rank: usize| -> Result<Vec<usize>, Fault> {
        let entry = require(tensors, name, || expected.to_owned())?;
        if entry.shape.len() == rank && !entry.shape.contains(&0) {
            Ok(entry.shape.clone())
        } else {
            Err(Fault::Shape {
                tensor: name.to_owned(),
                found: entry.shape.clone(),
                expected: expected.to_owned(),
            })
        }
    };
    let embedding = shape("emb.weight", "[vocabulary, width]", 2)?;
    let (vocab, width) = (embedding[0], embedding[1]);
    let bonus = shape("blocks.0.att.r_k", "[heads, head size]", 2)?;
    let (n_heads, head_size) = (bonus[0], bonus[1]);
    if n_heads.checked_mul(head_size) != Some(width) {
        let expected = format!("[heads, head size] with a product of {width}");
        return Err(Fault::Shape { tensor: "blocks.0.att.r_k".to_owned(), found: bonus, expected });
    }
    let hidden = shape("blocks.0.ffn.key.weight", "[hidden, width]", 2)?[0];
    let block = |name: &str| name.strip_prefix("blocks.")?.split('.').next()?.parse::<usize>().ok();
    let n_layers =
        tensors.keys().filter_map(|name| block(name)).max().map_or(1, |last| last.saturating_add(1));
    if n_layers > tensors.len() {
        // a layer in between is missing; say which without counting to the last
        let name = |layer: usize| format!("blocks.{layer}.ln1.weight");
        let missing = (0..n_layers).map(name).find(|name| !tensors.contains_key(name)).unwrap_or_default();
        return Err(Fault::Missing { tensor: missing, expected: format!("{:?}", [width]) });
    }

    // the first factor that is not square tells which way round all are
    let factors = tensors.iter().filter(|(name, entry)| {
        let adapter = name.rsplit('.').next().unwrap_or_default();
        let official_rank = entry.shape.len() == 2 && entry.shape[0] != entry.shape[1];
        name.contains(".att.") && ["w1", "a1", "v1", "g1"].contains(&adapter) && official_rank
    });
    let told = factors.map(|(_, entry)| match entry.shape[1] == width {
        true => LoraLayout::Transposed,
        false => LoraLayout::Official,
    });
    let by_dialect = match dialect {
        Dialect::Official => LoraLayout::Official,
        Dialect::Fla => LoraLayout::Transposed,
    };
    let lora = told.into_iter().next().or(options.lora).unwrap_or(by_dialect);
    let rank = |name: &str| -> Result<usize, Fault> {
        let shape = shape(name, "[width, rank] or [rank, width]", 2)?;
        Ok(shape[if lora == LoraLayout::Official { 1 } else { 0 }])
    };
    let ranks = Ranks {
        w: rank("blocks.0.att.w1")?,
        a: rank("blocks.0.att.a1")?,
        v: if n_layers > 1 { rank("blocks.1.att.v1")? } else { 0 },
        g: rank("blocks.0.att.g1")?,
    };
    Ok((ModelConfig { n_layers, width, n_heads, head_size, hidden, vocab, ranks }, lora))
}

/// Every tensor of a model with the shape it has in the file, by official names, one layer after another and no more at a
/// time than asked for. Old fla files hold the six mixes of a layer as one tensor: which it is, `present` tells.
fn expected(
    config: &ModelConfig,
    lora: LoraLayout,
    present: impl Fn(&str) -> bool,
) -> impl Iterator<Item = (String, Vec<usize>)> {
    let (d, vocab) = (config.width, config.vocab);
    let whole = [("emb.weight", vec![vocab, d]), ("head.weight", vec![vocab, d])]
        .into_iter()
        .chain(
            ["blocks.0.ln0.weight", "blocks.0.ln0.bias", "ln_out.weight", "ln_out.bias"]
                .map(|name| (name, vec![d])),
        )
        .map(|(name, shape)| (name.to_owned(), shape));
    whole.chain((0..config.n_layers).flat_map(move |layer| expected_of_layer(config, lora, layer, &present)))
}

fn expected_of_layer(
    config: &ModelConfig,
    lora: LoraLayout,
    layer: usize,
    present: &impl Fn(&str) -> bool,
) -> Vec<(String, Vec<usize>)> {
    let (d, ranks, mut all) = (config.width, config.ranks, Vec::new());
    let mut push = |name: &str, shape: &[usize]| all.push((format!("blocks.{layer}.{name}"), shape.to_vec()));
    for norm in ["ln1", "ln2", "att.ln_x"] {
        push(&format!("{norm}.weight"), &[d]);
        push(&format!("{norm}.bias"), &[d]);
    }
    if present(&format!("blocks.{layer}.att.x_x")) {
        push("att.x_x", &[MIXES.len(), d]);
    } else {
        MIXES.iter().for_each(|mix| push(&format!("att.{mix}"), &[d]));
    }
    for (adapter, rank, bias) in
        [("w", ranks.w, true), ("a", ranks.a, true), ("v", ranks.v, true), ("g", ranks.g, false)]
    {
        if adapter == "v" && layer == 0 {
            continue; // absent, or present and meaningless
        }
        let (down, up) = match lora {
            LoraLayout::Official => ([d, rank], [rank, d]),
            LoraLayout::Transposed => ([rank, d], [d, rank]),
        };
        push(&format!("att.{adapter}1"), &down);
        push(&format!("att.{adapter}2"), &up);
        if bias {
            push(&format!("att.{adapter}0"), &[d]);
        }
    }
    push("att.k_k", &[d]);
    push("att.k_a", &[d]);
    push("att.r_k", &[config.n_heads, config.head_size]);
    for matrix in ["receptance", "key", "value", "output"] {
        push(&format!("att.{matrix}.weight"), &[d, d]);
    }
    push("ffn.x_k", &[d]);
    push("ffn.key.weight", &[config.hidden, d]);
    push("ffn.value.weight", &[d, config.hidden]);
    all
}

/// The token-shift mixes of the time mix, in the order of [`TimeMix::mixes`](rwkv_core::model::TimeMix::mixes).
const MIXES: [&str; 6] = ["x_r", "x_w", "x_k", "x_v", "x_a", "x_g"];
