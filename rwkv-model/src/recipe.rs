//! Which format the weights of each matrix have.
//!
//! As a text, in files and on command lines: a format for the six matrices of every layer, then others for some of them, of
//! all layers or of one, and for the head, which is in halves if nothing else is said:
//!
//! ```
//! use rwkv_model::recipe::{Matrix, Recipe, WeightFormat};
//!
//! let recipe: Recipe = "int4,ffn.value=int8,head=int8,0.ffn.key=f16".parse().unwrap();
//! assert_eq!(recipe.format(3, Matrix::Key), WeightFormat::Int4);
//! assert_eq!(recipe.format(0, Matrix::FfnKey), WeightFormat::F16);
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use rwkv_core::quant;

/// How the weights of a matrix are held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WeightFormat {
    /// Half precision on a GPU; on the CPU as the file has them.
    #[default]
    F16,
    /// Blocks of bytes: see [`quant::int8`].
    Int8,
    /// Blocks of half bytes: see [`quant::int4`].
    Int4,
}

impl WeightFormat {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F16, Self::Int8, Self::Int4];

    /// The format of its blocks, if it has any.
    #[must_use]
    pub const fn blocks(self) -> Option<quant::Format> {
        match self {
            Self::F16 => None,
            Self::Int8 => Some(quant::Format::Int8),
            Self::Int4 => Some(quant::Format::Int4),
        }
    }

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self.blocks() {
            None => "f16",
            Some(format) => format.name(),
        }
    }
}

/// A matrix that may be quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Matrix {
    /// Receptance of the time mix.
    Receptance,
    /// Its key.
    Key,
    /// Its value.
    Value,
    /// Its output.
    Output,
    /// Key of the channel mix.
    FfnKey,
    /// Its value, hidden-major where it is quantised.
    FfnValue,
    /// The head.
    Head,
}

impl Matrix {
    /// All of them, those of a layer first.
    pub const ALL: [Self; 7] =
        [Self::Receptance, Self::Key, Self::Value, Self::Output, Self::FfnKey, Self::FfnValue, Self::Head];

    /// Its official name in its layer.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Receptance => "att.receptance",
            Self::Key => "att.key",
            Self::Value => "att.value",
            Self::Output => "att.output",
            Self::FfnKey => "ffn.key",
            Self::FfnValue => "ffn.value",
            Self::Head => "head",
        }
    }

    /// The tensor that holds it, by official names. The head is of no layer.
    #[must_use]
    pub fn tensor(self, layer: usize) -> String {
        match self {
            Self::Head => "head.weight".to_owned(),
            _ => format!("blocks.{layer}.{}.weight", self.name()),
        }
    }

    /// Which matrix of which layer a tensor holds, if any.
    #[must_use]
    pub fn of(tensor: &str) -> Option<(usize, Self)> {
        let name = tensor.strip_suffix(".weight")?;
        let (layer, name) = match name.strip_prefix("blocks.") {
            None => (0, name),
            Some(of_layer) => {
                let (layer, name) = of_layer.split_once('.')?;
                (layer.parse().ok()?, name)
            }
        };
        Some((layer, Self::named(name)?)).filter(|(layer, of)| of.tensor(*layer) == tensor)
    }

    fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|of| of.name() == name)
    }
}

/// The format of every matrix. By default all are in halves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recipe {
    /// By [`Matrix`].
    formats: [WeightFormat; Matrix::ALL.len()],
    /// Of single layers.
    layers: BTreeMap<(usize, Matrix), WeightFormat>,
}

impl Recipe {
    /// One format for the six matrices of every layer; the head is in halves.
    #[must_use]
    pub fn layers(format: WeightFormat) -> Self {
        let mut formats = [format; Matrix::ALL.len()];
        formats[Matrix::Head as usize] = WeightFormat::F16;
        Self { formats, layers: BTreeMap::new() }
    }

    /// With another format for a matrix, in all layers.
    #[must_use]
    pub fn with(mut self, matrix: Matrix, format: WeightFormat) -> Self {
        self.formats[matrix as usize] = format;
        self.layers.retain(|(_, of), _| *of != matrix);
        self
    }

    /// With another format for a matrix of one layer. The head is of none, and stays as it is.
    #[must_use]
    pub fn with_layer(mut self, layer: usize, matrix: Matrix, format: WeightFormat) -> Self {
        if matrix != Matrix::Head {
            self.layers.insert((layer, matrix), format);
        }
        self
    }

    /// The format of a matrix.
    #[must_use]
    pub fn format(&self, layer: usize, matrix: Matrix) -> WeightFormat {
        self.layers.get(&(layer, matrix)).copied().unwrap_or(self.formats[matrix as usize])
    }

    /// The blocks that some matrices are in, over so many layers.
    pub(crate) fn blocks<'a>(
        &'a self,
        layers: usize,
        of: &'a [Matrix],
    ) -> impl Iterator<Item = Option<quant::Format>> + 'a {
        (0..layers).flat_map(move |layer| of.iter().map(move |&of| self.format(layer, of).blocks()))
    }

    /// What matrices are in of a file of so many layers that has some quantised, if the others are by this recipe.
    pub(crate) fn over(mut self, stored: &Self, layers: usize) -> Self {
        for (layer, of) in (0..layers).flat_map(|layer| Matrix::ALL.map(|of| (layer, of))) {
            self = match (stored.format(layer, of), of) {
                (WeightFormat::F16, _) => self,
                (format, Matrix::Head) => self.with(of, format),
                (format, _) => self.with_layer(layer, of, format),
            };
        }
        self
    }

    /// The first of its layers that a model of so many has not.
    pub(crate) fn layer_beyond(&self, layers: usize) -> Option<usize> {
        self.layers.keys().map(|(layer, _)| *layer).find(|layer| *layer >= layers)
    }
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let most = self.formats[Matrix::Receptance as usize];
        f.write_str(most.name())?;
        let usual = Self::layers(most);
        for of in Matrix::ALL {
            let format = self.formats[of as usize];
            if format != usual.formats[of as usize] {
                write!(f, ",{}={}", of.name(), format.name())?;
            }
        }
        for ((layer, of), format) in &self.layers {
            write!(f, ",{layer}.{}={}", of.name(), format.name())?;
        }
        Ok(())
    }
}

/// A part of a text that is no recipe.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no format of weights: f16, int8 or int4, or MATRIX=FORMAT, or LAYER.MATRIX=FORMAT")]
pub struct UnknownRecipe(pub String);

impl FromStr for Recipe {
    type Err = UnknownRecipe;

    fn from_str(text: &str) -> Result<Self, UnknownRecipe> {
        let mut recipe = Self::default();
        for (i, part) in text.split(',').map(str::trim).enumerate() {
            let unknown = || UnknownRecipe(part.to_owned());
            let format =
                |text| WeightFormat::ALL.into_iter().find(|of| of.name() == text).ok_or_else(unknown);
            recipe = match part.split_once('=') {
                None if i == 0 => Self::layers(format(part)?),
                None => return Err(unknown()),
                Some((name, of)) => match (Matrix::named(name), name.split_once('.')) {
                    (Some(matrix), _) => recipe.with(matrix, format(of)?),
                    (None, Some((layer, name))) => {
                        let matrix =
                            Matrix::named(name).filter(|of| *of != Matrix::Head).ok_or_else(unknown)?;
                        recipe.with_layer(layer.parse().map_err(|_| unknown())?, matrix, format(of)?)
                    }
                    (None, None) => return Err(unknown()),
                },
            };
        }
        Ok(recipe)
    }
}

#[cfg(test)]
mod tests {
    use super::{Matrix, Recipe, UnknownRecipe, WeightFormat};

    #[test]
    fn recipes_are_texts() {
        let all = [
            Recipe::default(),
            Recipe::layers(WeightFormat::Int8),
            Recipe::layers(WeightFormat::Int4)
                .with(Matrix::Head, WeightFormat::Int8)
                .with(Matrix::FfnValue, WeightFormat::F16)
                .with_layer(3, Matrix::Key, WeightFormat::Int8),
        ];
        for recipe in all {
            assert_eq!(recipe.to_string().parse(), Ok(recipe.clone()), "{recipe}");
        }
        assert_eq!("f16, head=int8".parse::<Recipe>().unwrap().to_string(), "f16,head=int8", "spaces");
        for (text, part) in [
            ("", ""),
            ("int2", "int2"),
            ("int8,int4", "int4"),
            ("int8,ffn=int4", "ffn=int4"),
            ("int8,ffn.key=", "ffn.key="),
            ("int8,-1.ffn.key=int4", "-1.ffn.key=int4"),
            ("int8,0.head=int4", "0.head=int4"),
        ] {
            assert_eq!(text.parse::<Recipe>(), Err(UnknownRecipe(part.to_owned())), "{text:?}");
        }
    }

    #[test]
    fn later_parts_win() {
        let recipe: Recipe = "int4,0.ffn.key=f16,ffn.key=int8,1.ffn.key=f16".parse().unwrap();
        let of = |layer| recipe.format(layer, Matrix::FfnKey);
        assert_eq!([of(0), of(1)], [WeightFormat::Int8, WeightFormat::F16], "of all layers, of one");
        assert_eq!(recipe.layer_beyond(1), Some(1), "a layer beyond");
    }

    #[test]
    fn tensors_are_matrices() {
        for of in Matrix::ALL {
            let layer = if of == Matrix::Head { 0 } else { 12 };
            assert_eq!(Matrix::of(&of.tensor(layer)), Some((layer, of)), "{of:?}");
        }
        for name in [
            "emb.weight",
            "blocks.0.att.w1",
            "blocks.0.head.weight",
            "blocks.00.ffn.key.weight",
            "att.key.weight",
        ] {
            assert_eq!(Matrix::of(name), None, "{name}");
        }
    }
}
