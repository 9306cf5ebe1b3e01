//! What a state is stored in: exactly, or in less.
//!
//! | format | WKV | shifts | bytes per head of 64 | error of an element at most |
//! |---|---|---|---|---|
//! | [`F32`](StateFormat::F32) | `f32` | `f32` | 16384 | none |
//! | [`F16`](StateFormat::F16) | halves, an exponent per row | the same | 8256 | `2^-11` of itself or `2^-31` of its row |
//! | [`Int8Scaled`](StateFormat::Int8Scaled) | bytes, a scale per 16, an exponent per row | halves | 4672 | 1/254 of its block |
//! | [`Sparse`](StateFormat::Sparse) | a bitmap, the significant values in `f32` | halves | 512 + 4 per value kept | what is dropped: 2 % of its row |
//!
//! "Of its row", "of its block": of the largest magnitude there. The exact bounds, which hold from the smallest
//! subnormal `f32` to [`f32::MAX`], are [`float16::error_bound`], [`int8::error_bound`] and [`sparse::error_bound`].
//!
//! ```
//! use rwkv_core::{ModelConfig, config::Ranks};
//! use rwkv_state::StateLayout;
//! use rwkv_state::format::{SparseRule, StateFormat, bytes};
//!
//! let ranks = Ranks { w: 1, a: 1, v: 1, g: 1 };
//! let head = ModelConfig { n_layers: 1, width: 64, n_heads: 1, head_size: 64, hidden: 1, vocab: 1, ranks };
//! let layout = StateLayout::new(&head);
//! // Both shifts are 64 values: in halves, with an exponent each, 258 bytes.
//! assert_eq!(bytes(&layout, StateFormat::F32) - 2 * 256, 16384);
//! assert_eq!(bytes(&layout, StateFormat::F16) - 258, 8256);
//! assert_eq!(bytes(&layout, StateFormat::Int8Scaled) - 258, 4672);
//! assert_eq!(bytes(&layout, StateFormat::Sparse(SparseRule::TopK { k: 16 })) - 258, 512 + 4 * 16 * 64);
//! assert_eq!(bytes(&layout, StateFormat::Sparse(SparseRule::default())) - 258, 512 + 4 * 64 * 64); // at most
//! ```
//!
//! The shifts are never stored in less than halves: they are `2 D` values beside the `N D` of the WKV matrices, and
//! every token reads all of them in five products. Their exponent is one byte per vector and makes every finite value
//! safe; that a layer normalisation's output is at most `sqrt(D) |gain| + |bias|` would be a promise of the weights,
//! not of this format. They are replaced at every token, so that their rounding never adds up.
//!
//! The rows' encoders work on slices and know no layout, so that a stepping loop may store in these formats too;
//! [`EncodedState`] is a whole state at rest.
//!
//! # Byte layout
//!
//! The parts in canonical order, each as planes without padding, all numbers little endian, `N` columns:
//!
//! ```text
//! F32          values f32 [.., N]
//! F16          values f16 [.., N]           exponents i8 [..]
//! Int8Scaled   values i8  [.., N]           scales f16 [.., ceil(N / 16)]    exponents i8 [..]
//! Sparse       bitmap u8  [.., ceil(N / 8)] the values kept f32, in order
//! ```
//!
//! A shift is one row of `D` columns per layer.

pub mod exponent;
pub mod float16;
pub mod int8;
pub mod rounding;
mod row;
pub mod sparse;

use crate::layout::{Part, StateLayout, WrongLength};
use row::Row;

pub use exponent::NotFinite;
pub use rounding::{Rounding, decay_dither};
pub use sparse::SparseRule;

/// What a state is stored in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum StateFormat {
    /// Exactly.
    #[default]
    F32,
    /// In halves, with an exponent per row: [`float16`].
    F16,
    /// In bytes, with a scale per 16: [`int8`].
    Int8Scaled,
    /// The significant values alone: [`sparse`].
    Sparse(SparseRule),
}

impl StateFormat {
    /// Its name in files. The rule of a sparse state is not part of it: decoding does not depend on it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Int8Scaled => "int8",
            Self::Sparse(_) => "sparse",
        }
    }

    /// The format of this name; `sparse` with the default rule.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        let all = [Self::F32, Self::F16, Self::Int8Scaled, Self::Sparse(SparseRule::default())];
        all.into_iter().find(|format| format.name() == name)
    }

    /// What a part is stored in.
    const fn of(self, part: Part) -> Self {
        match (self, part) {
            (Self::F32, _) => Self::F32,
            (_, Part::AttShift | Part::FfnShift) => Self::F16,
            (_, Part::Wkv) => self,
        }
    }

    /// Bytes of the planes of `rows` rows of `n`, sparse values at their most. Of three planes, the middle one is that
    /// whose size may vary.
    fn planes(self, rows: usize, n: usize) -> [usize; 3] {
        match self {
            Self::F32 => [4 * n, 0, 0],
            Self::F16 => [2 * n, 0, 1],
            Self::Int8Scaled => [n, 2 * n.div_ceil(int8::BLOCK), 1],
            Self::Sparse(rule) => [sparse::bitmap_len(n), 4 * rule.most(n), 0],
        }
        .map(|bytes| bytes * rows)
    }
}

/// Bytes of a state in a format; the most that it may take in a sparse one, where it takes 4 less for each value that
/// is not kept though the rule allows it.
#[must_use]
pub fn bytes(layout: &StateLayout, format: StateFormat) -> usize {
    Part::ALL.iter().flat_map(|&part| Extents::new(layout, part).planes(format.of(part))).sum()
}

/// The rows of a part.
#[derive(Clone, Copy)]
struct Extents {
    rows: usize,
    /// Columns, `N` or `D`.
    n: usize,
}

impl Extents {
    fn new(layout: &StateLayout, part: Part) -> Self {
        let shape = layout.shape(part);
        Self { rows: shape.iter().rev().skip(1).product(), n: shape.last().copied().unwrap_or(0) }
    }

    /// [`StateFormat::planes`] of a part that is stored in `format`.
    fn planes(self, format: StateFormat) -> [usize; 3] {
        format.planes(self.rows, self.n)
    }
}

/// A value's place in a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// The part.
    pub part: Part,
    /// The layer.
    pub layer: usize,
    /// The element, within that part of that layer.
    pub index: usize,
}

impl Place {
    /// The place of element `index` of a part.
    fn new(layout: &StateLayout, part: Part, index: usize) -> Self {
        let layer_len = layout.layer_range(part, 0).len().max(1);
        Self { part, layer: index / layer_len, index: index % layer_len }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of layer {}, element {}", self.part.name(), self.layer, self.index)
    }
}

/// What is wrong at a place.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum Fault {
    /// A value that is infinite or no number.
    #[error("the value {value}")]
    NotFinite {
        /// The value.
        value: f32,
    },
    /// An exponent that no row has.
    #[error("a row of exponent {exponent}, outside of {} to {}", exponent::RANGE.start(), exponent::RANGE.end())]
    Exponent {
        /// The exponent.
        exponent: i8,
    },
    /// A scale that is negative, infinite or no number.
    #[error("a block of scale {scale}")]
    Scale {
        /// The scale.
        scale: f32,
    },
    /// The byte that no value has.
    #[error("the byte -128")]
    Byte,
    /// A mark past the end of a row.
    #[error("a bitmap that goes on past this last element of its row")]
    Stray,
}

/// Why a state cannot be encoded or decoded.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// A state of other extents.
    #[error(transparent)]
    WrongLength(#[from] WrongLength),
    /// Too few or too many bytes.
    #[error("an encoded state of {found} bytes, expected {expected}: {}, {layout}", format.name())]
    Bytes {
        /// Bytes found.
        found: usize,
        /// Bytes expected; of a sparse state, without the values.
        expected: usize,
        /// The format that expects them.
        format: StateFormat,
        /// The layout that expects them.
        layout: StateLayout,
    },
    /// A bitmap that disagrees with the values beside it.
    #[error("a bitmap with {marks} marks, but {bytes} bytes of values")]
    Bitmap {
        /// Values that it marks.
        marks: usize,
        /// Bytes found in their place.
        bytes: usize,
    },
    /// Something wrong at one place.
    #[error("{place}: {fault}")]
    At {
        /// The place; that of the first element concerned.
        place: Place,
        /// What is wrong.
        fault: Fault,
    },
}

/// A whole state in some format, at rest: rounded to nearest, exponents chosen fresh.
///
/// Invariant: its bytes decode, to finite values.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct EncodedState {
    layout: StateLayout,
    format: StateFormat,
    bytes: Vec<u8>,
}

impl EncodedState {
    /// Encodes a state in canonical order.
    ///
    /// # Errors
    ///
    /// If `state` has another length, or a value is not finite.
    pub fn encode(layout: &StateLayout, state: &[f32], format: StateFormat) -> Result<Self, Error> {
        Self::encode_in(Vec::new(), layout, state, format)
    }

    /// As [`EncodedState::encode`], in the memory of `bytes`, of what was encoded before for instance
    /// ([`EncodedState::into_bytes`]); what is in it is lost.
    ///
    /// # Errors
    ///
    /// As those of [`EncodedState::encode`].
    pub fn encode_in(
        mut bytes: Vec<u8>,
        layout: &StateLayout,
        state: &[f32],
        format: StateFormat,
    ) -> Result<Self, Error> {
        if state.len() != layout.len() {
            return Err(WrongLength { found: state.len(), expected: layout.len(), layout: *layout }.into());
        }
        bytes.clear();
        bytes.reserve(self::bytes(layout, format));
        // The first plane is written where it stays.
        let [mut middle, mut last] = [const { Vec::new() }; 2];
        for part in Part::ALL {
            let (values, Extents { rows, n }) = (&state[layout.range(part)], Extents::new(layout, part));
            let mut row = Row::new(format.of(part), n);
            for r in 0..rows {
                let at = |NotFinite { index, value }| Error::At {
                    place: Place::new(layout, part, r * n + index),
                    fault: Fault::NotFinite { value },
                };
                row.encode(&values[r * n..][..n]).map_err(at)?;
                row.write([&mut bytes, &mut middle, &mut last]);
            }
            bytes.append(&mut middle);
            bytes.append(&mut last);
        }
        Ok(Self { layout: *layout, format, bytes })
    }

    /// Takes what [`EncodedState::as_bytes`] gave, from wherever it has been.
    ///
    /// # Errors
    ///
    /// If the bytes are too few or too many, or could not be decoded to finite values.
    pub fn from_bytes(layout: &StateLayout, format: StateFormat, bytes: Vec<u8>) -> Result<Self, Error> {
        let state = Self { layout: *layout, format, bytes };
        state.check_len()?;
        for part in Part::ALL {
            let (mut planes, Extents { rows, n }) = (state.planes(part), Extents::new(layout, part));
            let mut row = Row::new(format.of(part), n);
            for r in 0..rows {
                let at = |(index, fault)| Error::At { place: Place::new(layout, part, r * n + index), fault };
                row.read(&mut planes);
                row.check(n).map_err(at)?;
            }
        }
        Ok(state)
    }

    /// Decodes it, to canonical order.
    #[must_use]
    pub fn decode(&self) -> Vec<f32> {
        let mut state = Vec::new();
        self.decode_in(&mut state);
        state
    }

    /// As [`EncodedState::decode`], in the memory of `state`; what is in it is lost.
    pub fn decode_in(&self, state: &mut Vec<f32>) {
        state.resize(self.layout.len(), 0.0);
        for part in Part::ALL {
            let (mut planes, Extents { rows, n }) = (self.planes(part), Extents::new(&self.layout, part));
            let out = &mut state[self.layout.range(part)];
            let mut row = Row::new(self.format.of(part), n);
            for r in 0..rows {
                row.read(&mut planes);
                row.decode(&mut out[r * n..][..n]);
            }
        }
    }

    /// Its layout.
    #[must_use]
    pub const fn layout(&self) -> &StateLayout {
        &self.layout
    }

    /// Its format.
    #[must_use]
    pub const fn format(&self) -> StateFormat {
        self.format
    }

    /// Its bytes, as [the module](self) lays them out.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Its bytes.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// The planes of a part. All sizes are known but that of the sparse values, the only ones of their kind: what lies
    /// before them is counted from the front, what lies behind them from the back.
    fn planes(&self, part: Part) -> [&[u8]; 3] {
        let len = |part| Extents::new(&self.layout, part).planes(self.format.of(part));
        let total = |part| len(part).iter().sum::<usize>();
        let (att, rest) = self.bytes.split_at(total(Part::AttShift));
        let (wkv, ffn) = rest.split_at(rest.len() - total(Part::FfnShift));
        let all = match part {
            Part::AttShift => att,
            Part::Wkv => wkv,
            Part::FfnShift => ffn,
        };
        let [first, _, last] = len(part);
        let (first, rest) = all.split_at(first);
        let (middle, last) = rest.split_at(rest.len() - last);
        [first, middle, last]
    }

    /// Whether the planes fill the bytes.
    fn check_len(&self) -> Result<(), Error> {
        let Self { layout, format, ref bytes } = *self;
        let most = self::bytes(&layout, format);
        let [_, values, _] = Extents::new(&layout, Part::Wkv).planes(format);
        let (expected, fits) = match format {
            StateFormat::Sparse(_) => (most - values, bytes.len() >= most - values),
            _ => (most, bytes.len() == most),
        };
        if !fits {
            return Err(Error::Bytes { found: bytes.len(), expected, format, layout });
        }
        if let StateFormat::Sparse(_) = format {
            let [bitmap, values, _] = self.planes(Part::Wkv);
            let (marks, bytes) = (sparse::marks(bitmap), values.len());
            if marks * 4 != bytes {
                return Err(Error::Bitmap { marks, bytes });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod draw {
    //! Rows for the formats' tests: of every scale, and of every kind that has broken a number format before.

    use std::ops::Range;

    use proptest::collection::vec;
    use proptest::prelude::*;
    use rwkv_core::Real;

    /// A row of finite values.
    pub(super) fn row(
        len: impl Into<prop::collection::SizeRange> + Clone,
    ) -> impl Strategy<Value = Vec<f32>> {
        let bits = |magnitude: Range<u32>| {
            (magnitude, any::<bool>()).prop_map(|(m, minus)| f32::from_bits(m | u32::from(minus) << 31))
        };
        let special = prop::sample::select(vec![
            0.0,
            -0.0,
            1.0,
            1e30,
            -1e30,
            1e-30,
            -1e-30,
            65504.0,
            65520.0,
            14_055.0,
            f32::MAX,
            f32::MIN,
            f32::MIN_POSITIVE,
            f32::from_bits(1),
        ]);
        let len = || len.clone();
        prop_oneof![
            // One scale for the row, as a state has: spread over 2^-149 to 2^127.
            4 => (vec(-1f32..1.0, len()), -149i32..=127).prop_map(|(row, e)| {
                row.into_iter().map(|x| f32::of(f64::from(x) * f64::from(e).exp2())).collect()
            }),
            // A scale for every element.
            2 => vec(bits(0..0x7f80_0000), len()),
            2 => vec(special.clone(), len()),
            // Subnormal numbers and zeros.
            1 => vec(bits(0..0x0080_0000), len()),
            // Numbers around f32::MAX.
            1 => vec(bits(0x7f00_0000..0x7f80_0000), len()),
            // All equal, and but for one outlier.
            1 => (vec(Just(()), len()), special.clone()).prop_map(|(row, x)| vec![x; row.len()]),
            2 => (vec(-1f32..1.0, len()), any::<prop::sample::Index>(), special).prop_map(|(mut row, at, x)| {
                if !row.is_empty() {
                    let at = at.index(row.len());
                    row[at] = x;
                }
                row
            }),
        ]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rwkv_core::ModelConfig;
    use rwkv_core::config::Ranks;

    use super::{EncodedState, Error, Fault, Place, Rounding, SparseRule, StateFormat, bytes, draw};
    use super::{exponent, float16, int8, sparse};
    use crate::layout::{Part, StateLayout};

    fn layout(n_layers: usize, n_heads: usize, head_size: usize) -> StateLayout {
        let ranks = Ranks { w: 1, a: 1, v: 1, g: 1 };
        let width = n_heads * head_size;
        StateLayout::new(&ModelConfig { n_layers, width, n_heads, head_size, hidden: 1, vocab: 1, ranks })
    }

    fn format() -> impl Strategy<Value = StateFormat> {
        prop_oneof![
            Just(StateFormat::F32),
            Just(StateFormat::F16),
            Just(StateFormat::Int8Scaled),
            (0u16..1000).prop_map(|per_mille| StateFormat::Sparse(SparseRule::Threshold { per_mille })),
            (0usize..40).prop_map(|k| StateFormat::Sparse(SparseRule::TopK { k })),
        ]
    }

    /// A state whose rows are drawn one by one; head sizes that 16 and 8 divide or do not.
    fn state() -> impl Strategy<Value = (StateLayout, Vec<f32>)> {
        (1usize..4, 1usize..3, prop::sample::select(vec![1usize, 2, 7, 16, 17, 33, 40])).prop_flat_map(
            |(l, h, n)| {
                let rows = prop::collection::vec(draw::row(n), 2 * l * h + l * h * n);
                rows.prop_map(move |rows| (layout(l, h, n), rows.concat()))
            },
        )
    }

    proptest! {
        /// Every element within the bound that its format states, and the bytes as many as computed.
        #[test]
        fn round_trip((layout, state) in state(), format in format()) {
            let encoded = EncodedState::encode(&layout, &state, format).unwrap();
            let back = encoded.decode();
            prop_assert_eq!(back.len(), state.len(), "length");
            let mut dropped = 0;
            for part in Part::ALL {
                let n = *layout.shape(part).last().unwrap();
                let (rows, back) = (&state[layout.range(part)], &back[layout.range(part)]);
                for (row, back) in rows.chunks_exact(n).zip(back.chunks_exact(n)) {
                    let most = exponent::largest(row).unwrap();
                    for (j, (&x, &got)) in row.iter().zip(back).enumerate() {
                        let block = &row[j / int8::BLOCK * int8::BLOCK..];
                        let block = &block[..block.len().min(int8::BLOCK)];
                        let bound = match (format, part) {
                            (StateFormat::F32, _) => 0.0,
                            (StateFormat::Int8Scaled, Part::Wkv) => {
                                int8::error_bound(exponent::largest(block).unwrap(), most, Rounding::Nearest)
                            }
                            (StateFormat::Sparse(rule), Part::Wkv) => sparse::error_bound(most, rule),
                            _ => float16::error_bound(x, exponent::fresh(most), Rounding::Nearest),
                        };
                        let error = (f64::from(got) - f64::from(x)).abs();
                        prop_assert!(error <= bound, "{:?} {:?}: {} to {}, more than {}", format, part, x, got, bound);
                        prop_assert!(x != 0.0 || got == 0.0, "zero stays zero, not {}", got);
                    }
                    if let (StateFormat::Sparse(rule), Part::Wkv) = (format, part) {
                        dropped += rule.most(n) - back.iter().filter(|&&x| x != 0.0).count();
                    }
                }
            }
            prop_assert_eq!(encoded.as_bytes().len(), bytes(&layout, format) - 4 * dropped, "{:?}", format);
            if format == StateFormat::F32 {
                prop_assert!(state.iter().zip(&back).all(|(x, y)| x.to_bits() == y.to_bits()), "bit for bit");
            }
            let (used, mut other) = (vec![7; 3 * state.len()], vec![f32::NAN; 2]);
            let in_used = EncodedState::encode_in(used, &layout, &state, format);
            prop_assert_eq!(in_used.as_ref(), Ok(&encoded), "in memory that was used");
            encoded.decode_in(&mut other);
            prop_assert!(other.iter().map(|x| x.to_bits()).eq(back.iter().map(|x| x.to_bits())), "memory that was used");
            let again = EncodedState::from_bytes(&layout, format, encoded.as_bytes().to_vec());
            prop_assert_eq!(again, Ok(encoded), "bytes that were written can be read");
        }

        /// Whatever bytes: a typed error, or a state that decodes to finite values.
        #[test]
        fn damage_never_decodes_to_what_is_not_finite(
            (layout, state) in state(),
            format in format(),
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
            cut in prop::option::of((any::<bool>(), 0usize..40)),
        ) {
            let mut bytes = EncodedState::encode(&layout, &state, format).unwrap().into_bytes();
            for (at, byte) in damage {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            let whole = bytes.len();
            match cut {
                Some((true, by)) => bytes.truncate(whole.saturating_sub(by)),
                Some((false, by)) => bytes.extend(std::iter::repeat_n(0x55, by)),
                None => {}
            }
            let found = bytes.len();
            match EncodedState::from_bytes(&layout, format, bytes) {
                Ok(state) => {
                    prop_assert!(state.decode().iter().all(|v| v.is_finite()), "{:?}", state);
                    let sparse = matches!(format, StateFormat::Sparse(_));
                    prop_assert!(sparse || found == whole, "{} bytes of {}", found, whole);
                }
                Err(error) => prop_assert!(!error.to_string().is_empty(), "says why"),
            }
        }

        /// As above, of bytes that never were a state.
        #[test]
        fn noise_never_decodes_to_what_is_not_finite(
            noise in prop::collection::vec(any::<u8>(), 200),
            format in format(),
        ) {
            let layout = layout(1, 1, 5);
            for len in [noise.len(), bytes(&layout, format).min(noise.len())] {
                if let Ok(state) = EncodedState::from_bytes(&layout, format, noise[..len].to_vec()) {
                    prop_assert!(state.decode().iter().all(|v| v.is_finite()), "{:?}", state);
                }
            }
        }

        #[test]
        fn what_is_not_finite_is_found((layout, mut state) in state(), format in format(), at: prop::sample::Index) {
            let at = at.index(state.len());
            state[at] = f32::NEG_INFINITY;
            let part = Part::ALL.into_iter().find(|&p| layout.range(p).contains(&at)).unwrap();
            let layer = (0..).find(|&l| layout.layer_range(part, l).contains(&at)).unwrap();
            let place = Place { part, layer, index: at - layout.layer_range(part, layer).start };
            let fault = Fault::NotFinite { value: f32::NEG_INFINITY };
            let got = EncodedState::encode(&layout, &state, format);
            prop_assert_eq!(got, Err(Error::At { place, fault }), "at {}", at);
        }
    }

    /// One head of 3 in one layer: 3 + 9 + 3 values.
    fn small(format: StateFormat) -> (StateLayout, Vec<u8>) {
        let layout = layout(1, 1, 3);
        let state: Vec<f32> = (0u8..15).map(f32::from).collect();
        (layout, EncodedState::encode(&layout, &state, format).unwrap().into_bytes())
    }

    #[test]
    fn the_byte_layout() {
        let halves = |values: [f32; 3]| values.map(|v| half::f16::from_f32(v).to_le_bytes()).concat();
        let att = || [halves([0.0, 64.0, 128.0].map(|v| v / 2.0)), vec![251]].concat();
        let ffn = || [halves([96.0, 104.0, 112.0]), vec![253]].concat();

        let (_, bytes) = small(StateFormat::F32);
        let want: Vec<u8> = (0u8..15).flat_map(|v| f32::from(v).to_le_bytes()).collect();
        assert_eq!(bytes, want, "f32");

        let (_, bytes) = small(StateFormat::F16);
        // Rows 3 4 5, 6 7 8 and 9 10 11, whose largest values are scaled to 80, 64 and 88.
        let rows = [halves([48.0, 64.0, 80.0]), halves([48.0, 56.0, 64.0]), halves([72.0, 80.0, 88.0])];
        assert_eq!(bytes, [att(), rows.concat(), vec![252, 253, 253], ffn()].concat(), "f16");

        let (_, bytes) = small(StateFormat::Int8Scaled);
        let values = vec![76, 102, 127, 95, 111, 127, 104, 115, 127];
        let scale = |most: f32| {
            let up = half::f16::from_f32(most / 127.0).to_bits();
            half::f16::from_bits(up + u16::from(half::f16::from_bits(up).to_f32() * 127.0 < most))
                .to_le_bytes()
        };
        let scales = [80.0, 64.0, 88.0].map(scale).concat();
        assert_eq!(bytes, [att(), values, scales, vec![252, 253, 253], ffn()].concat(), "int8");

        let (_, bytes) = small(StateFormat::Sparse(SparseRule::TopK { k: 1 }));
        let values = [5f32, 8.0, 11.0].map(f32::to_le_bytes).concat();
        assert_eq!(bytes, [att(), vec![4, 4, 4], values, ffn()].concat(), "sparse");
    }

    /// What cannot be decoded is refused, with the place.
    #[test]
    fn damage_is_named() {
        let refuse = |format: StateFormat, damage: &dyn Fn(&mut Vec<u8>)| {
            let (layout, mut bytes) = small(format);
            damage(&mut bytes);
            EncodedState::from_bytes(&layout, format, bytes).unwrap_err().to_string()
        };
        let (f16, int8) = (StateFormat::F16, StateFormat::Int8Scaled);
        let sparse = StateFormat::Sparse(SparseRule::TopK { k: 1 });
        let cases = [
            (
                refuse(StateFormat::F32, &|b| b.truncate(59)),
                "an encoded state of 59 bytes, expected 60: f32, 1 layers of 1 heads of 3",
            ),
            (
                refuse(StateFormat::F32, &|b| b[16..20].copy_from_slice(&f32::NAN.to_le_bytes())),
                "wkv of layer 0, element 1: the value NaN",
            ),
            (refuse(f16, &|b| b[5] = 0x7c), "att_shift of layer 0, element 2: the value inf"),
            (
                refuse(f16, &|b| b[6] = 122),
                "att_shift of layer 0, element 0: a row of exponent 122, outside of -126 to 121",
            ),
            (
                refuse(f16, &|b| b[26] = 129),
                "wkv of layer 0, element 3: a row of exponent -127, outside of -126 to 121",
            ),
            (
                refuse(f16, &|b| b.push(0)),
                "an encoded state of 36 bytes, expected 35: f16, 1 layers of 1 heads of 3",
            ),
            (refuse(int8, &|b| b[8] = 128), "wkv of layer 0, element 1: the byte -128"),
            (
                refuse(int8, &|b| b[18..20].copy_from_slice(&[0, 0x7c])),
                "wkv of layer 0, element 3: a block of scale inf",
            ),
            (refuse(int8, &|b| b[19] |= 0x80), "wkv of layer 0, element 3: a block of scale -0.50439453"),
            (
                refuse(int8, &|b| b[24] = 128),
                "wkv of layer 0, element 6: a row of exponent -128, outside of -126 to 121",
            ),
            (refuse(sparse, &|b| b[8] = 0), "a bitmap with 2 marks, but 12 bytes of values"),
            (
                refuse(sparse, &|b| b.truncate(16)),
                "an encoded state of 16 bytes, expected 17: sparse, 1 layers of 1 heads of 3",
            ),
            (
                refuse(sparse, &|b| b[8] = 8),
                "wkv of layer 0, element 5: a bitmap that goes on past this last element of its row",
            ),
            (
                refuse(sparse, &|b| b[16..18].copy_from_slice(&[0x80, 0x7f])),
                "wkv of layer 0, element 5: the value inf",
            ),
        ];
        for (got, want) in cases {
            assert_eq!(got, want, "facts");
        }
    }

    #[test]
    fn another_length_is_an_error() {
        let error = EncodedState::encode(&layout(2, 1, 4), &[0.0; 47], StateFormat::F16).unwrap_err();
        assert_eq!(
            error.to_string(),
            "a state of 47 elements, expected 48: 2 layers of 1 heads of 4",
            "facts"
        );
    }

    /// Layouts without elements are no reason to panic.
    #[test]
    fn nothing_is_a_state_too() {
        for layout in [layout(0, 2, 4), layout(2, 0, 4), layout(2, 2, 0)] {
            for format in [
                StateFormat::F32,
                StateFormat::F16,
                StateFormat::Int8Scaled,
                StateFormat::Sparse(SparseRule::default()),
            ] {
                let encoded = EncodedState::encode(&layout, &[], format).unwrap();
                assert_eq!(encoded.as_bytes().len(), bytes(&layout, format), "{format:?}, {layout}");
                assert!(encoded.decode().is_empty(), "{format:?}, {layout}");
                // Rows without values have exponents all the same, and those may mean nothing.
                match EncodedState::from_bytes(&layout, format, vec![0x7f; encoded.as_bytes().len()]) {
                    Ok(odd) => assert!(odd.decode().is_empty(), "{format:?}, {layout}"),
                    Err(why) => assert!(!encoded.as_bytes().is_empty(), "{format:?}, {layout}: {why}"),
                }
            }
        }
    }

    #[test]
    fn names_lead_back() {
        for format in [
            StateFormat::F32,
            StateFormat::F16,
            StateFormat::Int8Scaled,
            StateFormat::Sparse(SparseRule::default()),
        ] {
            assert_eq!(StateFormat::from_name(format.name()), Some(format), "{format:?}");
        }
        assert_eq!(StateFormat::from_name("int4"), None, "no such format");
    }
}
