//! Where each part of a state lies, in the canonical order.
//!
//! ```text
//! time mix shift      [L, D]
//! WKV                 [L, H, N, N]       value row, key column
//! channel mix shift   [L, D]
//! ```
//!
//! Executors may keep a state in another order, but they exchange it in this one.

use std::ops::Range;

use rwkv_core::ModelConfig;
use rwkv_core::model::State;

/// A part of a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// What the time mix's token shift remembers: ln1's output at the last token, `[L, D]`.
    AttShift,
    /// The WKV matrices, `[L, H, N, N]`: value row, key column.
    Wkv,
    /// What the channel mix's token shift remembers: ln2's output at the last token, `[L, D]`.
    FfnShift,
}

impl Part {
    /// Every part, in order.
    pub const ALL: [Self; 3] = [Self::AttShift, Self::Wkv, Self::FfnShift];

    /// Its name in files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::AttShift => "att_shift",
            Self::Wkv => "wkv",
            Self::FfnShift => "ffn_shift",
        }
    }
}

/// The extents of a state and the place of each part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StateLayout {
    n_layers: usize,
    n_heads: usize,
    head_size: usize,
}

/// Where the parts of one layer's state lie in a record, in elements: what a sequence is on a GPU is a record for each
/// layer. The matrices are `[H, key N, value N]` there, so that neighbouring lanes read neighbouring words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordLayout {
    /// [`Part::AttShift`], `[D]`.
    pub att_shift: usize,
    /// [`Part::FfnShift`], `[D]`.
    pub ffn_shift: usize,
    /// [`Part::Wkv`], `[H, key N, value N]`.
    pub heads: usize,
    /// Of a record.
    pub stride: usize,
}

/// A state of other extents than wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a state of {found} elements, expected {expected}: {layout}")]
pub struct WrongLength {
    /// Elements found.
    pub found: usize,
    /// Elements expected.
    pub expected: usize,
    /// The layout that expects them.
    pub layout: StateLayout,
}

impl std::fmt::Display for StateLayout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} layers of {} heads of {}", self.n_layers, self.n_heads, self.head_size)
    }
}

impl StateLayout {
    /// The layout of a model's states.
    #[must_use]
    pub const fn new(config: &ModelConfig) -> Self {
        Self { n_layers: config.n_layers, n_heads: config.n_heads, head_size: config.head_size }
    }

    /// Extents of a part, slowest first.
    #[must_use]
    pub fn shape(&self, part: Part) -> Vec<usize> {
        match part {
            Part::AttShift | Part::FfnShift => vec![self.n_layers, self.n_heads * self.head_size],
            Part::Wkv => vec![self.n_layers, self.n_heads, self.head_size, self.head_size],
        }
    }

    /// Elements of a part.
    #[must_use]
    pub fn part_len(&self, part: Part) -> usize {
        self.shape(part).iter().product()
    }

    /// Where a part lies, in elements.
    #[must_use]
    pub fn range(&self, part: Part) -> Range<usize> {
        let start = Part::ALL.iter().take_while(|&&p| p != part).map(|&p| self.part_len(p)).sum();
        start..start + self.part_len(part)
    }

    /// Where a part of one layer lies, in elements.
    ///
    /// # Panics
    ///
    /// If there is no such layer.
    #[must_use]
    pub fn layer_range(&self, part: Part, layer: usize) -> Range<usize> {
        assert!(layer < self.n_layers, "layer {layer} of {}", self.n_layers);
        let len = self.part_len(part) / self.n_layers;
        let start = self.range(part).start + layer * len;
        start..start + len
    }

    /// Elements of a whole state.
    #[must_use]
    pub fn len(&self) -> usize {
        Part::ALL.iter().map(|&p| self.part_len(p)).sum()
    }

    /// Whether a state has no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes a state out in canonical order.
    ///
    /// # Errors
    ///
    /// If the state has other extents.
    pub fn flatten(&self, state: &State<f32>) -> Result<Vec<f32>, WrongLength> {
        let parts = [&state.att_shift, &state.wkv, &state.ffn_shift];
        for (part, values) in Part::ALL.iter().zip(parts) {
            self.check(values.len(), self.part_len(*part))?;
        }
        Ok(parts.into_iter().flatten().copied().collect())
    }

    /// Reads a state in canonical order.
    ///
    /// # Errors
    ///
    /// If `flat` has another length.
    pub fn unflatten(&self, flat: &[f32]) -> Result<State<f32>, WrongLength> {
        self.check(flat.len(), self.len())?;
        let part = |part| flat[self.range(part)].to_vec();
        Ok(State { att_shift: part(Part::AttShift), wkv: part(Part::Wkv), ffn_shift: part(Part::FfnShift) })
    }

    /// Where the parts of one layer lie in a device's record.
    #[must_use]
    pub const fn record(&self) -> RecordLayout {
        let width = self.n_heads * self.head_size;
        let heads = 2 * width;
        RecordLayout { att_shift: 0, ffn_shift: width, heads, stride: heads + width * self.head_size }
    }

    /// A state in canonical order as records, one for each layer.
    ///
    /// # Errors
    ///
    /// If `flat` has another length.
    pub fn to_records(&self, flat: &[f32]) -> Result<Vec<f32>, WrongLength> {
        self.check(flat.len(), self.len())?;
        let mut records = Vec::with_capacity(flat.len());
        for layer in 0..self.n_layers {
            records.extend_from_slice(&flat[self.layer_range(Part::AttShift, layer)]);
            records.extend_from_slice(&flat[self.layer_range(Part::FfnShift, layer)]);
            self.swap(&flat[self.layer_range(Part::Wkv, layer)], &mut records);
        }
        Ok(records)
    }

    /// The state in canonical order that records, one for each layer, hold.
    ///
    /// # Errors
    ///
    /// If `records` has another length.
    pub fn from_records(&self, records: &[f32]) -> Result<Vec<f32>, WrongLength> {
        self.check(records.len(), self.len())?;
        let RecordLayout { att_shift, ffn_shift, heads, stride } = self.record();
        let layers = || records.chunks_exact(stride);
        let mut flat = Vec::with_capacity(records.len());
        layers().for_each(|record| flat.extend_from_slice(&record[att_shift..ffn_shift]));
        layers().for_each(|record| self.swap(&record[heads..], &mut flat));
        layers().for_each(|record| flat.extend_from_slice(&record[ffn_shift..heads]));
        Ok(flat)
    }

    /// Appends the matrices of a layer with key and value in each other's place.
    fn swap(&self, wkv: &[f32], to: &mut Vec<f32>) {
        let n = self.head_size;
        for head in wkv.chunks_exact(n * n) {
            (0..n).for_each(|column| to.extend(head.iter().skip(column).step_by(n)));
        }
    }

    /// Checks that a state in canonical order has this layout's elements.
    pub(crate) fn check_len(&self, flat: &[f32]) -> Result<(), WrongLength> {
        self.check(flat.len(), self.len())
    }

    const fn check(&self, found: usize, expected: usize) -> Result<(), WrongLength> {
        if found == expected { Ok(()) } else { Err(WrongLength { found, expected, layout: *self }) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rwkv_core::ModelConfig;
    use rwkv_core::config::Ranks;
    use rwkv_core::model::State;

    use super::{Part, StateLayout};

    fn config(n_layers: usize, n_heads: usize, head_size: usize) -> ModelConfig {
        let ranks = Ranks { w: 1, a: 1, v: 1, g: 1 };
        ModelConfig { n_layers, width: n_heads * head_size, n_heads, head_size, hidden: 1, vocab: 1, ranks }
    }

    proptest! {
        #[test]
        fn a_state_survives_the_trip(layers in 1usize..5, heads in 1usize..4, size in 1usize..9) {
            let config = config(layers, heads, size);
            let layout = StateLayout::new(&config);
            let mut state = State::<f32>::new(&config);
            let values = state.att_shift.iter_mut().chain(&mut state.wkv).chain(&mut state.ffn_shift);
            values.zip(0u16..).for_each(|(v, i)| *v = f32::from(i));
            let flat = layout.flatten(&state).unwrap();
            prop_assert_eq!(flat.len(), layout.len(), "length");
            let records = layout.to_records(&flat).unwrap();
            prop_assert_eq!(&layout.from_records(&records).unwrap(), &flat, "by way of records");
            // Of the last layer, head and column: the element before the last in its row.
            let (record, wkv) = (layout.record(), layout.layer_range(Part::Wkv, layers - 1));
            let [last, transposed] = [(size - 1, 0), (0, size - 1)].map(|(x, y)| (heads - 1) * size * size + x * size + y);
            let at = (layers - 1) * record.stride + record.heads + transposed;
            prop_assert_eq!(records[at], flat[wkv.start + last], "keys are rows");
            let shift = layout.layer_range(Part::FfnShift, layers - 1).start;
            prop_assert_eq!(records[at - transposed - heads * size], flat[shift], "the shift before them");
            prop_assert!(flat.iter().zip(0u16..).all(|(&v, i)| v == f32::from(i)), "order");
            prop_assert_eq!(layout.unflatten(&flat).unwrap(), state, "round trip");
        }

        /// The layers' ranges tile each part, and the parts tile the state.
        #[test]
        fn ranges_tile(layers in 1usize..5, heads in 1usize..4, size in 1usize..9) {
            let layout = StateLayout::new(&config(layers, heads, size));
            let mut end = 0;
            for part in Part::ALL {
                prop_assert_eq!(layout.range(part).start, end, "{:?} begins where the one before ends", part);
                for layer in 0..layers {
                    prop_assert_eq!(layout.layer_range(part, layer).start, end, "{:?} {}", part, layer);
                    end = layout.layer_range(part, layer).end;
                }
            }
            prop_assert_eq!(end, layout.len(), "nothing is left");
        }
    }

    #[test]
    fn another_length_is_an_error() {
        let layout = StateLayout::new(&config(2, 1, 4));
        let error = layout.unflatten(&[0.0; 47]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "a state of 47 elements, expected 48: 2 layers of 1 heads of 4",
            "facts"
        );
        let other = State::new(&config(2, 1, 5));
        assert!(layout.flatten(&other).is_err(), "another head size");
    }

    #[test]
    fn names_and_shapes() {
        let layout = StateLayout::new(&config(2, 3, 4));
        let parts = Part::ALL.map(|part| (part.name(), layout.shape(part)));
        let want = [("att_shift", vec![2, 12]), ("wkv", vec![2, 3, 4, 4]), ("ffn_shift", vec![2, 12])];
        assert_eq!(parts, want, "in order");
    }

    /// Two heads of 4 and one head of 8 are of one width, but their WKV parts differ.
    #[test]
    fn every_part_is_checked() {
        let layout = StateLayout::new(&config(2, 2, 4));
        assert!(layout.flatten(&State::new(&config(2, 1, 8))).is_err(), "WKV");
        let mut state = State::new(&config(2, 2, 4));
        state.ffn_shift.pop();
        assert!(layout.flatten(&state).is_err(), "channel mix shift");
    }

    #[test]
    #[should_panic(expected = "layer 2 of 2")]
    fn a_layer_too_many() {
        let _ = StateLayout::new(&config(2, 1, 4)).layer_range(Part::AttShift, 2);
    }
}
