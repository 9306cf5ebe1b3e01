//! A checkpoint to a safetensors file with quantised matrices, a tensor at a time.

use std::io::{self, BufWriter, Write};
use std::path::Path;

use rwkv_core::Elements;
use rwkv_core::quant::{self, Blocks};
use rwkv_state::replace;
use serde_json::{Map, Value, json};

use super::directory::Dtype;
use super::{Checkpoint, Entry, Error, Fault, Progress, Reader, SCALES, WEIGHTS};
use crate::recipe::{Matrix, Recipe};

/// Why a quantised file was not written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] Error),
    /// The file.
    #[error("writing {file}: {error}")]
    Io {
        /// Its path.
        file: String,
        /// Why.
        error: io::Error,
    },
}

/// A tensor on its way.
enum Tensor<'a> {
    /// As it is.
    Plain(&'a Entry),
    /// The blocks of a matrix.
    Blocks { layer: usize, matrix: Matrix, format: quant::Format, rows: usize, blocks: usize },
}

impl Checkpoint {
    /// Writes the checkpoint as a safetensors file by official names, its matrices quantised by `recipe` unless they are already
    /// (see [`WEIGHTS`]). The file is written whole or not at all. `progress` is told of every stretch read.
    ///
    /// # Errors
    ///
    /// If the checkpoint cannot be read or quantised, or the file not written.
    pub fn write_quantised(
        &self,
        path: impl AsRef<Path>,
        recipe: &Recipe,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<(), WriteError> {
        let path = path.as_ref();
        let io = |error| WriteError::Io { file: path.display().to_string(), error };
        let reader = self.reader(progress);
        self.check(recipe)?;
        let (whole, tensors) = self.planned(recipe);

        replace(path, io, |file| {
            let mut out = BufWriter::new(file);
            let header = header(&whole, &tensors, self.metadata.clone());
            out.write_all(&(header.len() as u64).to_le_bytes()).map_err(io)?;
            out.write_all(header.as_bytes()).map_err(io)?;
            for (name, tensor) in &tensors {
                let pieces = reader.pieces(&whole, name, tensor).map_err(|fault| self.error(fault))?;
                pieces.iter().try_for_each(|piece| out.write_all(piece)).map_err(io)?;
            }
            out.flush().map_err(io)
        })
    }

    /// What will be quantised in all, and the tensors in the order of the file.
    fn planned(&self, recipe: &Recipe) -> (Recipe, Vec<(&str, Tensor<'_>)>) {
        let mut whole = self.recipe.clone();
        let mut tensors = Vec::new();
        for (name, entry) in self.tensors() {
            if name.strip_suffix(SCALES).is_some_and(|of| self.is_quantised(of)) {
                continue; // goes with its matrix
            }
            let matrix = Matrix::of(name).filter(|(layer, _)| *layer < self.config.n_layers);
            let Some((layer, matrix)) = matrix else {
                tensors.push((name, Tensor::Plain(entry)));
                continue;
            };
            if self.recipe.format(layer, matrix).blocks().is_none() {
                let format = recipe.format(layer, matrix);
                whole = match matrix {
                    Matrix::Head => whole.with(matrix, format),
                    _ => whole.with_layer(layer, matrix, format),
                };
            }
            tensors.push(match whole.format(layer, matrix).blocks() {
                None => (name, Tensor::Plain(entry)),
                Some(format) => {
                    let [outputs, inputs] = self.extents(matrix);
                    let (rows, columns) =
                        if matrix == Matrix::FfnValue { (inputs, outputs) } else { (outputs, inputs) };
                    let blocks = columns.div_ceil(quant::BLOCK);
                    (name, Tensor::Blocks { layer, matrix, format, rows, blocks })
                }
            });
        }
        // Of a file that had nothing quantised the recipe is the one given, in fewer words.
        let whole = if self.recipe == Recipe::default() { recipe.clone() } else { whole };
        (whole, tensors)
    }
}

/// The header of a safetensors file, padded so that tensors lie at multiples of 8 bytes.
fn header(
    recipe: &Recipe,
    tensors: &[(&str, Tensor<'_>)],
    mut metadata: std::collections::BTreeMap<String, String>,
) -> String {
    metadata.insert(WEIGHTS.to_owned(), recipe.to_string());
    let (mut all, mut end) = (Map::new(), 0);
    all.insert("__metadata__".to_owned(), json!(metadata));
    let mut add = |name: String, dtype: &str, shape: &[usize], bytes: u64| {
        all.insert(name, json!({ "dtype": dtype, "shape": shape, "data_offsets": [end, end + bytes] }));
        end += bytes;
    };
    for (name, tensor) in tensors {
        match tensor {
            Tensor::Plain(entry) => {
                add((*name).to_owned(), &entry.dtype.to_string(), &entry.shape, entry.bytes());
            }
            Tensor::Blocks { format, rows, blocks, .. } => {
                let row = blocks * format.block_bytes();
                add((*name).to_owned(), "U8", &[*rows, row], (rows * row) as u64);
                add(format!("{name}{SCALES}"), "F16", &[*rows, *blocks], (2 * rows * blocks) as u64);
            }
        }
    }
    let text = Value::Object(all).to_string();
    format!("{text:width$}", width = text.len().next_multiple_of(8))
}

impl Reader<'_> {
    /// The bytes of a tensor, and of its scales.
    fn pieces(&self, recipe: &Recipe, name: &str, tensor: &Tensor<'_>) -> Result<Vec<Vec<u8>>, Fault> {
        let words = |words: Vec<u16>| words.into_iter().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
        match tensor {
            Tensor::Plain(entry) => {
                let elements = self.elements(name, 0..entry.shape.iter().product())?;
                Ok(vec![match elements {
                    Elements::F32(values) => values.into_iter().flat_map(f32::to_le_bytes).collect(),
                    Elements::F16(values) => words(values.into_iter().map(half::f16::to_bits).collect()),
                    Elements::BF16(values) => words(values.into_iter().map(half::bf16::to_bits).collect()),
                }])
            }
            Tensor::Blocks { layer, matrix, .. } => {
                let missing = || Fault::Dtype { tensor: name.to_owned(), found: Dtype::F16 };
                let blocks: Blocks = self.blocks(recipe, *layer, *matrix)?.ok_or_else(missing)?;
                let scales = blocks.scales().iter().map(|scale| scale.to_bits()).collect();
                Ok(vec![blocks.weights().to_vec(), words(scales)])
            }
        }
    }
}
