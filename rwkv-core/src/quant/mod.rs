//! Weights of matrices in blocks: a scale for every [`BLOCK`] of them, and a few bits for each.
//!
//! | format | values of a weight | bytes of 32 weights |
//! |---|---|---|
//! | [`Int8`](int8) | `s q`, `q` in `[-127, 127]` | 34 |
//! | [`Int4`](int4) | `s q`, `q` in `[-8, 7]` | 18 |
//!
//! Blocks lie along the rows of a matrix `[rows, columns]`; a last block that is not full is filled up with zeros. Where a
//! matrix is multiplied, its rows are its outputs. The channel mix's value matrix alone lies the other way round,
//! hidden-major, `[F, D]`: a hidden unit that is zero then leaves a row and its scales unread.
//!
//! Decoding is exact: the product of a half and a small integer fits into an `f32`. So what quantising does to a model is
//! done when its weights are encoded, and [`Blocks`] multiply as the matrix of the decoded weights.

pub mod int4;
pub mod int8;

use std::str::FromStr;

use half::f16;
use pulp::Arch;
use rayon::prelude::*;

use crate::Real;
use crate::ops::linear::{Linear, Matrix, rows};

/// Consecutive weights of a row that share a scale.
pub const BLOCK: usize = 32;

/// How weights are encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Format {
    /// 8 bits: see [`int8`].
    Int8,
    /// 4 bits: see [`int4`].
    Int4,
}

impl Format {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Int8, Self::Int4];

    /// Bytes of a block's weights, without its scale.
    #[must_use]
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::Int8 => BLOCK,
            Self::Int4 => BLOCK / 2,
        }
    }

    /// Its name in files and on command lines.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        }
    }
}

/// A text that names no format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no format of weights: int8 or int4")]
pub struct UnknownFormat(pub String);

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(text: &str) -> Result<Self, UnknownFormat> {
        let named = |format: &Self| format.name() == text;
        Self::ALL.into_iter().find(named).ok_or_else(|| UnknownFormat(text.to_owned()))
    }
}

/// A weight that cannot be encoded, by its index among those given.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// It is infinite or no number.
    #[error("weight {index} is {value}")]
    NotFinite {
        /// Which.
        index: usize,
        /// What it is.
        value: f32,
    },
    /// Its block's scale would be beyond the largest half.
    #[error("weight {index} is {value:e}, beyond what a block's scale reaches")]
    Beyond {
        /// Which.
        index: usize,
        /// What it is.
        value: f32,
    },
}

/// A matrix `[rows, columns]` in blocks.
#[derive(Clone, Debug, PartialEq)]
pub struct Blocks {
    format: Format,
    rows: usize,
    columns: usize,
    /// `[rows, blocks, block_bytes]`.
    weights: Vec<u8>,
    /// `[rows, blocks]`.
    scales: Vec<f16>,
}

/// Some rows of [`Blocks`], to be written.
#[derive(Debug)]
pub struct Part<'a> {
    format: Format,
    columns: usize,
    weights: &'a mut [u8],
    scales: &'a mut [f16],
}

impl Blocks {
    /// A matrix of zeros, whose [parts](Self::parts) are to be encoded.
    #[must_use]
    pub fn zeros(format: Format, rows: usize, columns: usize) -> Self {
        let blocks = rows * columns.div_ceil(BLOCK);
        let (weights, scales) = (vec![0; blocks * format.block_bytes()], vec![f16::ZERO; blocks]);
        Self { format, rows, columns, weights, scales }
    }

    /// Encodes a matrix, row by row.
    ///
    /// # Errors
    ///
    /// If a weight is not finite or too large.
    ///
    /// # Panics
    ///
    /// If the weights are not rows of so many columns.
    pub fn encode(format: Format, columns: usize, weights: &[f32]) -> Result<Self, Error> {
        assert!(columns > 0 && weights.len().is_multiple_of(columns), "weights are not [rows, columns]");
        let mut blocks = Self::zeros(format, weights.len() / columns, columns);
        blocks.parts(weights.len() / columns).try_for_each(|mut part| part.encode(weights))?;
        Ok(blocks)
    }

    /// Takes what [`Self::weights`] and [`Self::scales`] gave of a matrix of such extents; `None` if there is not as much of
    /// them, a scale is not finite, or there are weights where the format has none.
    #[must_use]
    pub fn from_parts(
        format: Format,
        [rows, columns]: [usize; 2],
        weights: Vec<u8>,
        scales: Vec<f16>,
    ) -> Option<Self> {
        let blocks = rows.checked_mul(columns.div_ceil(BLOCK))?;
        let whole = scales.len() == blocks && Some(weights.len()) == blocks.checked_mul(format.block_bytes());
        (whole && scales.iter().all(|scale| scale.is_finite())).then_some(Self {
            format,
            rows,
            columns,
            weights,
            scales,
        })
    }

    /// Its parts of `rows` rows each, in order, the last perhaps of fewer.
    pub fn parts(&mut self, rows: usize) -> impl IndexedParallelIterator<Item = Part<'_>> {
        let (format, columns, blocks) = (self.format, self.columns, self.columns.div_ceil(BLOCK));
        let n = rows.max(1) * blocks.max(1);
        let weights = self.weights.par_chunks_mut(n * format.block_bytes());
        let part = move |(weights, scales)| Part { format, columns, weights, scales };
        weights.zip(self.scales.par_chunks_mut(n)).map(part)
    }

    /// How it is encoded.
    #[must_use]
    pub const fn format(&self) -> Format {
        self.format
    }

    /// Its rows.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.rows
    }

    /// Its columns.
    #[must_use]
    pub const fn columns(&self) -> usize {
        self.columns
    }

    /// Blocks of a row.
    #[must_use]
    pub const fn row_blocks(&self) -> usize {
        self.columns.div_ceil(BLOCK)
    }

    /// The encoded weights, `[rows, blocks, bytes of a block]`.
    #[must_use]
    pub fn weights(&self) -> &[u8] {
        &self.weights
    }

    /// The scales, `[rows, blocks]`.
    #[must_use]
    pub fn scales(&self) -> &[f16] {
        &self.scales
    }

    /// Bytes of weights and scales.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.weights.len() + size_of_val(self.scales.as_slice())
    }

    /// A weight in steps of its scale.
    pub(crate) fn unit(&self, row: usize, column: usize) -> i8 {
        let bytes = self.format.block_bytes();
        let block = row * self.row_blocks() + column / BLOCK;
        self.unit_of(&self.weights[block * bytes..][..bytes], column % BLOCK)
    }

    fn unit_of(&self, block: &[u8], i: usize) -> i8 {
        match self.format {
            Format::Int8 => int8::unit(block, i),
            Format::Int4 => int4::unit(block, i),
        }
    }

    /// Decodes a row.
    ///
    /// # Panics
    ///
    /// If `out` is not of as many columns, or there is no such row.
    pub fn decode_row<R: Real>(&self, row: usize, out: &mut [R]) {
        assert_eq!(out.len(), self.columns, "out is not [columns]");
        let (blocks, bytes) = (self.row_blocks(), self.format.block_bytes());
        let weights = self.weights[row * blocks * bytes..][..blocks * bytes].chunks_exact(bytes);
        let scales = &self.scales[row * blocks..][..blocks];
        for ((out, weights), scale) in out.chunks_mut(BLOCK).zip(weights).zip(scales) {
            let scale = scale.to_f32();
            for (i, out) in out.iter_mut().enumerate() {
                *out = R::of(f64::from(scale * f32::from(self.unit_of(weights, i))));
            }
        }
    }

    /// The decoded weights.
    #[must_use]
    pub fn decode(&self) -> Matrix<f32> {
        let mut all = vec![0.0; self.rows * self.columns];
        all.par_chunks_exact_mut(self.columns).enumerate().for_each(|(row, out)| self.decode_row(row, out));
        Matrix::new(self.columns, all)
    }
}

impl Part<'_> {
    /// Encodes its rows.
    ///
    /// # Errors
    ///
    /// If a weight is not finite or too large.
    ///
    /// # Panics
    ///
    /// If the weights are not as many as those of its rows.
    pub fn encode(&mut self, weights: &[f32]) -> Result<(), Error> {
        let row_blocks = self.columns.div_ceil(BLOCK);
        let rows = self.scales.len() / row_blocks;
        assert_eq!(weights.len(), rows * self.columns, "weights are not [rows, columns]");
        let finite = weights.iter().fold(true, |all, w| all & w.is_finite()); // of all, since that vectorises
        if !finite && let Some(index) = weights.iter().position(|w| !w.is_finite()) {
            return Err(Error::NotFinite { index, value: weights[index] });
        }
        match self.format {
            Format::Int8 => self.encode_by::<{ Format::Int8.block_bytes() }>(weights, int8::encode),
            Format::Int4 => self.encode_by::<{ Format::Int4.block_bytes() }>(weights, int4::encode),
        }
        let Some(beyond) = self.scales.iter().position(|scale| !scale.is_finite()) else { return Ok(()) };
        let first = beyond / row_blocks * self.columns + beyond % row_blocks * BLOCK;
        let end = (first + BLOCK).min((beyond / row_blocks + 1) * self.columns);
        let largest = |a: &usize, b: &usize| weights[*a].abs().total_cmp(&weights[*b].abs());
        let index = (first..end).max_by(largest).unwrap_or(first);
        Err(Error::Beyond { index, value: weights[index] })
    }

    /// Encodes blocks of `BYTES`, each filled up with zeros, in code that vectorises.
    fn encode_by<const BYTES: usize>(
        &mut self,
        weights: &[f32],
        encode: impl Fn(&[f32; BLOCK], &mut [u8]) -> f16,
    ) {
        let row_blocks = self.columns.div_ceil(BLOCK);
        Arch::new().dispatch(
            #[inline(always)]
            || {
                let rows = self.weights.chunks_exact_mut(row_blocks * BYTES);
                let rows = rows.zip(self.scales.chunks_exact_mut(row_blocks));
                for ((units, scales), row) in rows.zip(weights.chunks_exact(self.columns)) {
                    let encoded = units.as_chunks_mut::<BYTES>().0.iter_mut().zip(scales);
                    for ((units, scale), weights) in encoded.zip(row.chunks(BLOCK)) {
                        let mut block = [0.0; BLOCK];
                        block[..weights.len()].copy_from_slice(weights);
                        *scale = encode(&block, units);
                    }
                }
            },
        );
    }
}

/// Rows are outputs: [`Matrix`], of the decoded weights.
impl<R: Real> Linear<R> for Blocks {
    fn inputs(&self) -> usize {
        self.columns
    }

    fn outputs(&self) -> usize {
        self.rows
    }

    fn apply(&self, x: &[R], y: &mut [R]) {
        rows(self, x, y);
        let mut weights = vec![R::zero(); self.columns];
        for o in 0..self.rows {
            self.decode_row(o, &mut weights);
            for (x, y) in x.chunks_exact(self.columns).zip(y.chunks_exact_mut(self.rows)) {
                y[o] = R::zero();
                for (&w, &x) in weights.iter().zip(x) {
                    y[o] += w * x;
                }
            }
        }
    }
}

/// The largest magnitude of a block.
#[inline(always)]
fn largest(block: &[f32; BLOCK]) -> f32 {
    let mut most = [0.0f32; 8];
    for weights in block.as_chunks::<8>().0 {
        for (most, w) in most.iter_mut().zip(weights) {
            *most = w.abs().max(*most);
        }
    }
    most.into_iter().fold(0.0, f32::max)
}

/// A float of such a size has no fraction, and adding it to a number of magnitude below 2^22 rounds that to an integer, of two as
/// near to the even one, in code that vectorises everywhere. 1.5 2^23, so that the lowest bits are the integer's.
const FRACTIONLESS: f32 = 12_582_912.0;

/// The nearest integer.
#[inline(always)]
fn rounded(x: f32) -> f32 {
    x + FRACTIONLESS - FRACTIONLESS
}

/// The nearest integer, of those from -128 to 127, in two's complement.
#[inline(always)]
fn nearest(x: f32) -> u8 {
    (x + FRACTIONLESS).to_bits().to_le_bytes()[0]
}

/// The smallest half that is not below a magnitude; infinite where there is none.
#[inline(always)]
fn half_above(x: f32) -> f16 {
    let half = f16::from_f32(x);
    if half.to_f32() < x { f16::from_bits(half.to_bits() + 1) } else { half }
}

#[cfg(test)]
mod tests {
    use half::f16;
    use proptest::prelude::*;

    use super::{BLOCK, Blocks, Error, Format};
    use crate::ops::linear::Linear;
    use crate::rng::SplitMix64;

    /// As trained matrices have them: of any size, a block in eight with an outlier, one in eight of zeros, and some below
    /// what halves hold as normal numbers.
    fn draw(rows: usize, columns: usize, seed: u64) -> Vec<f32> {
        let mut rng = SplitMix64::new(seed);
        let scale = rng.uniform(-30.0, 6.0).exp2();
        let mut weights: Vec<f32> = (0..rows * columns).map(|_| scale * rng.normal()).collect();
        for block in weights.chunks_mut(columns).flat_map(|row| row.chunks_mut(BLOCK)) {
            match rng.next_u64() % 8 {
                0 => block.fill(0.0),
                1 => block[0] *= 50.0,
                _ => {}
            }
        }
        weights
    }

    /// A block's scale and its weights in steps.
    fn by_formula(format: Format, block: &[f32]) -> (f16, Vec<i8>) {
        let largest = block.iter().fold(0.0f32, |most, w| w.abs().max(most));
        let mut halves = (0..=f16::MAX.to_bits()).map(f16::from_bits);
        let above = halves.find(|half| half.to_f32() >= largest / steps(format)).unwrap();
        let in_steps = |scale: f16, [least, most]: [f32; 2]| {
            let q = move |w: f32| (w / scale.to_f32()).round_ties_even().clamp(least, most);
            block.iter().map(move |&w| if scale == f16::ZERO { 0.0 } else { q(w) })
        };
        let (scale, range) = match format {
            Format::Int8 => (above, [-127.0, 127.0]),
            Format::Int4 => {
                let range = [-8.0, 7.0];
                let error = |scale: f16| {
                    let mut lanes = [0.0f32; 16];
                    for (i, (q, w)) in in_steps(scale, range).zip(block).enumerate() {
                        let off = scale.to_f32() * q - w;
                        lanes[i % 16] += off * off;
                    }
                    let halves = |lanes: Vec<f32>| {
                        let (low, high) = lanes.split_at(lanes.len() / 2);
                        low.iter().zip(high).map(|(a, b)| a + b).collect()
                    };
                    (0..4).fold(lanes.to_vec(), |lanes, _| halves(lanes))[0]
                };
                let tried = super::int4::SHARES.map(|share| f16::from_f32(largest / 8.0 * share));
                let tried = tried.into_iter().flat_map(|scale| [scale, -scale]);
                let tried = [above]
                    .into_iter()
                    .chain(tried.filter(|&scale| scale != f16::ZERO && above != f16::ZERO));
                // the first of the least
                let best = tried.min_by(|&a, &b| error(a).total_cmp(&error(b))).unwrap();
                (best, range)
            }
        };
        #[expect(clippy::cast_possible_truncation, reason = "within the range")]
        let units = in_steps(scale, range).map(|q| q as i8).collect();
        (scale, units)
    }

    fn steps(format: Format) -> f32 {
        match format {
            Format::Int8 => 127.0,
            Format::Int4 => 7.0,
        }
    }

    fn extents() -> impl Strategy<Value = (usize, usize, u64)> {
        (1usize..5, 1usize..100, any::<u64>())
    }

    proptest! {
        /// The bounds that the formats state: of every weight of bytes, of the root mean square over a block of half bytes.
        #[test]
        fn errors_are_within_their_bounds((rows, columns, seed) in extents()) {
            let weights = draw(rows, columns, seed);
            for format in Format::ALL {
                let blocks = Blocks::encode(format, columns, &weights).unwrap();
                let decoded = blocks.decode();
                let pairs = weights.chunks(columns).zip(decoded.weights().chunks(columns));
                for (block, got) in pairs.flat_map(|(w, d)| w.chunks(BLOCK).zip(d.chunks(BLOCK))) {
                    let largest = block.iter().fold(0.0f32, |most, w| w.abs().max(most));
                    let s = f64::from(largest / steps(format)) * (1.0 + 2f64.powi(-10)) + 2f64.powi(-24);
                    let limit = (0.5 + 2f64.powi(-16)) * s;
                    let off = |(w, d): (&f32, &f32)| (f64::from(*w) - f64::from(*d)).abs();
                    let off: Vec<f64> = block.iter().zip(got).map(off).collect();
                    let got = match format {
                        Format::Int8 => off.into_iter().fold(0.0, f64::max),
                        Format::Int4 => (off.iter().map(|e| e * e).sum::<f64>() / off.len() as f64).sqrt(),
                    };
                    prop_assert!(got <= limit, "{format:?}: off by {got:e}, the limit is {limit:e}");
                }
            }
        }

        /// What is encoded in code that vectorises is, bit for bit, what plain loops over the formulas give.
        #[test]
        fn encoding_is_what_the_formulas_say((rows, columns, seed) in extents()) {
            let weights = draw(rows, columns, seed);
            for format in Format::ALL {
                let blocks = Blocks::encode(format, columns, &weights).unwrap();
                let of_rows = weights.chunks(columns).flat_map(|row| row.chunks(BLOCK));
                for (at, (block, &scale)) in of_rows.zip(blocks.scales()).enumerate() {
                    let (want, units) = by_formula(format, block);
                    prop_assert_eq!(scale.to_bits(), want.to_bits(), "{:?}: scale of block {}", format, at);
                    let (row, first) = (at / blocks.row_blocks(), at % blocks.row_blocks() * BLOCK);
                    let got: Vec<_> = (0..block.len()).map(|i| blocks.unit(row, first + i)).collect();
                    prop_assert_eq!(got, units, "{:?}: block {}", format, at);
                }
            }
        }

        #[test]
        fn encoding_goes_block_by_block((rows, columns, seed) in extents(), part in 1usize..4) {
            let weights = draw(rows, columns, seed);
            for format in Format::ALL {
                let whole = Blocks::encode(format, columns, &weights).unwrap();
                let mut parts = Blocks::zeros(format, rows, columns);
                for (i, mut of) in indexed(&mut parts, part) {
                    of.encode(&weights[i * part * columns..rows.min((i + 1) * part) * columns]).unwrap();
                }
                prop_assert_eq!(&parts, &whole, "{:?} in parts of {}", format, part);
                let again = |scales| Blocks::from_parts(format, [rows, columns], whole.weights().to_vec(), scales);
                prop_assert_eq!(again(Vec::new()), None, "{:?} without scales", format);
                prop_assert_eq!(again(whole.scales().to_vec()), Some(whole.clone()), "{:?} from its parts", format);
            }
        }

        /// Rows of blocks multiply as the matrix of the decoded weights.
        #[test]
        fn multiplies_as_decoded((rows, columns, seed) in extents(), tokens in 1usize..4) {
            let mut rng = SplitMix64::new(seed);
            let x: Vec<f64> = (0..tokens * columns).map(|_| rng.normal().into()).collect();
            for format in Format::ALL {
                let blocks = Blocks::encode(format, columns, &draw(rows, columns, seed)).unwrap();
                let (mut got, mut want) = (vec![f64::NAN; tokens * rows], vec![f64::NAN; tokens * rows]);
                blocks.apply(&x, &mut got);
                blocks.decode().apply(&x, &mut want);
                prop_assert_eq!(got, want, "{:?}", format);
            }
        }

        /// Whatever a file holds, it decodes to something finite.
        #[test]
        fn any_bytes_decode(bytes in prop::collection::vec(any::<u8>(), 32), scale: u16) {
            for format in Format::ALL {
                let (scale, weights) = (f16::from_bits(scale), bytes[..format.block_bytes()].to_vec());
                match Blocks::from_parts(format, [1, BLOCK], weights, vec![scale]) {
                    Some(blocks) => prop_assert!(blocks.decode().weights().iter().all(|w| w.is_finite()), "finite"),
                    None => prop_assert!(!scale.is_finite(), "a sound scale is refused"),
                }
            }
        }
    }

    fn indexed(blocks: &mut Blocks, rows: usize) -> Vec<(usize, super::Part<'_>)> {
        use rayon::prelude::*;
        blocks.parts(rows).enumerate().collect()
    }

    #[test]
    fn known_blocks() {
        let weights: Vec<f32> = (0..8u8).map(|i| 2.0 * (f32::from(i) - 4.0)).collect();
        let bytes = Blocks::encode(Format::Int8, 8, &weights).unwrap();
        assert_eq!(bytes.scales()[0], f16::from_f32(0.063_049_32), "rounded up");
        assert_eq!(bytes.weights()[..9], [129, 161, 193, 224, 0, 32, 63, 95, 0], "in steps, then filled up");
        let halves = Blocks::encode(Format::Int4, 8, &[-8.0, -6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 7.0]).unwrap();
        assert_eq!(halves.scales(), [f16::ONE], "a scale of the least error, which is none");
        assert_eq!(halves.weights()[..5], [0x08, 0x2A, 0x4C, 0x7E, 0], "the first four in the low halves");
        assert_eq!(halves.decode().weights(), [-8.0, -6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 7.0], "exact");
    }

    #[test]
    fn what_cannot_be_encoded_is_named() {
        for format in Format::ALL {
            for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut weights = vec![1.0; 80];
                weights[70] = value;
                let refused = Blocks::encode(format, 40, &weights).unwrap_err();
                assert!(matches!(refused, Error::NotFinite { index: 70, .. }), "{refused}");
            }
            let mut weights = vec![1.0; 80];
            weights[75] = -1e7;
            let refused = Blocks::encode(format, 40, &weights);
            assert_eq!(refused, Err(Error::Beyond { index: 75, value: -1e7 }), "{format:?}");
            let zeros = Blocks::encode(format, 40, &[0.0; 80]).unwrap();
            assert_eq!(zeros.decode().weights(), [0.0; 80], "{format:?}: zeros");
            assert_eq!(format.name().parse(), Ok(format), "its name");
        }
        assert!("int2".parse::<Format>().is_err(), "no format");
    }
}
