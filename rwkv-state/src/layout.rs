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
use rwkv_core::ops::wkv7_lazy::{ENTRY, Undecayed};

use crate::base::{Base, head_words};
use crate::format::StateFormat;
use crate::resident::Resident;

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

/// Where the parts of one layer's state lie on a device, in words. What a sequence is there is, for each layer, a base, the
/// WKV matrices as they were last written, and a slot for each token since, and for the one before:
///
/// ```text
/// base     WKV matrices          H heads of base::head_words, and room up to a multiple of 64 words
/// slot     shifts f32 [2, D]     of the time mix and the channel mix, after the token
///          entry f32 [5, D]      what the token did to the base, if it is pending: ops::wkv7_lazy::Undecayed of rwkv-core
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceLayout {
    /// What bases are stored in.
    pub format: StateFormat,
    /// D.
    pub width: usize,
    /// N.
    pub head_size: usize,
    /// Of a base.
    pub base_words: usize,
    /// [`Part::AttShift`] in a slot, `[D]`.
    pub att_shift: usize,
    /// [`Part::FfnShift`] in a slot, `[D]`.
    pub ffn_shift: usize,
    /// The entry in a slot, if slots have any.
    pub entry: usize,
    /// Of a slot.
    pub slot_words: usize,
}

/// Bases and slots begin at multiples of so many words.
const WORDS: usize = 64;

/// What a device has of one layer of a sequence, in words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceState {
    /// The base.
    pub base: Vec<u32>,
    /// What the shifts remember now, `[2, D]`.
    pub shifts: Vec<u32>,
    /// The entries of pending tokens, oldest first, `[m, 5, D]`.
    pub entries: Vec<u32>,
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

    /// Where the parts of one layer lie on a device.
    #[must_use]
    pub fn device(&self, resident: Resident) -> DeviceLayout {
        let (format, head_size, width) = (resident.format, self.head_size, self.n_heads * self.head_size);
        let entry = if resident.capacity == 0 { 0 } else { ENTRY * width };
        DeviceLayout {
            format,
            width,
            head_size,
            base_words: (self.n_heads * head_words(format, head_size)).next_multiple_of(WORDS),
            att_shift: 0,
            ffn_shift: width,
            entry: 2 * width,
            slot_words: (2 * width + entry).next_multiple_of(WORDS),
        }
    }

    /// A state in canonical order as a device has it, layer by layer; nothing is pending.
    ///
    /// # Errors
    ///
    /// If `flat` has another length.
    pub fn to_device(&self, resident: Resident, flat: &[f32]) -> Result<Vec<DeviceState>, WrongLength> {
        self.check_len(flat)?;
        let of_layer = |layer| {
            let part = |part| &flat[self.layer_range(part, layer)];
            let shifts = [part(Part::AttShift), part(Part::FfnShift)].concat();
            DeviceState {
                base: Base::new(resident.format, self.head_size, part(Part::Wkv)).to_words(),
                shifts: shifts.iter().map(|x| x.to_bits()).collect(),
                entries: Vec::new(),
            }
        };
        Ok((0..self.n_layers).map(of_layer).collect())
    }

    /// The state in canonical order that a device has, layer by layer.
    ///
    /// # Errors
    ///
    /// If there is not as much of each as there should be.
    pub fn from_device(&self, resident: Resident, layers: &[DeviceState]) -> Result<Vec<f32>, WrongLength> {
        let (n, width) = (self.head_size, self.n_heads * self.head_size);
        let head = head_words(resident.format, n);
        let floats = |words: &[u32]| words.iter().map(|&word| f32::from_bits(word)).collect::<Vec<_>>();
        let mut parts = [const { Vec::new() }; 3];
        for DeviceState { base, shifts, entries } in layers {
            let base = base.get(..self.n_heads * head).unwrap_or_default();
            let base = Base::from_words(resident.format, n, base);
            let mut pending = Undecayed::new(self.n_heads, n);
            for entry in entries.chunks_exact(ENTRY * width) {
                let vector = |of: usize| floats(&entry[of * width..][..width]);
                pending.q.extend(vector(0));
                pending.v.extend(vector(1));
                pending.b.extend(vector(2));
                pending.k.extend(vector(3));
                pending.since = vector(4);
            }
            let shifts = floats(shifts);
            let (att, ffn) = shifts.split_at(width.min(shifts.len()));
            parts[0].extend_from_slice(att);
            self.check(base.load().len(), self.part_len(Part::Wkv) / self.n_layers)?;
            parts[1].extend(pending.materialize(&base.load()));
            parts[2].extend_from_slice(ffn);
        }
        let flat = parts.concat();
        self.check_len(&flat)?;
        Ok(flat)
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
    use crate::resident::Resident;

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

    /// A state survives the way to a device and back, in every format that it is exact in; there, keys are rows.
    #[test]
    fn devices_have_the_state() {
        let layout = StateLayout::new(&config(2, 2, 16));
        let flat: Vec<f32> = (0..layout.len()).map(|i| (i % 127) as f32 - 63.0).collect();
        for resident in [Resident::default(), Resident::lazy(8), Resident::f16(8)] {
            let device = layout.to_device(resident, &flat).unwrap();
            assert_eq!(layout.from_device(resident, &device).unwrap(), flat, "{resident:?}");
            let words = layout.device(resident);
            assert!(device[0].base.len() <= words.base_words && words.base_words.is_multiple_of(64), "room");
            assert_eq!(
                words.slot_words,
                if resident.capacity == 0 { 64 } else { 256 },
                "{resident:?}: slots"
            );
        }
        let device = layout.to_device(Resident::default(), &flat).unwrap();
        let wkv = layout.layer_range(Part::Wkv, 1).start;
        let [last, transposed] = [(15, 3), (3, 15)].map(|(x, y)| 256 + x * 16 + y);
        assert_eq!(f32::from_bits(device[1].base[transposed]), flat[wkv + last], "of the last head");
        let shift = layout.layer_range(Part::FfnShift, 1).start;
        assert_eq!(f32::from_bits(device[1].shifts[32]), flat[shift], "the channel mix's shift");
        assert!(layout.from_device(Resident::default(), &device[..1]).is_err(), "a layer short");
        assert!(
            layout.from_device(Resident::default(), &[device[0].clone(), Default::default()]).is_err(),
            "empty"
        );
        assert!(layout.to_device(Resident::default(), &flat[1..]).is_err(), "an element short");
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
