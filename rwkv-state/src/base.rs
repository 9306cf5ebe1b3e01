//! What lies under pending tokens: WKV matrices as they are held while a sequence runs, shared by its forks.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use half::f16;

use crate::format::{Rounding, StateFormat, float16, int8};

/// Rows of WKV matrices in a format that they are held in. Clones share them.
///
/// A row in which a value is not finite is stored as rows of no numbers, where the format is not exact.
#[derive(Clone, Debug)]
pub struct Base {
    /// Columns of a row, `N`.
    n: usize,
    rows: Arc<Rows>,
}

/// Rows, each plane with the elements of one row after those of another.
#[derive(Clone, Debug)]
pub enum Rows {
    /// As they are.
    F32(Vec<f32>),
    /// See [`float16`].
    F16 {
        /// `[rows, N]`.
        values: Vec<f16>,
        /// `[rows]`.
        exponents: Vec<i8>,
    },
    /// See [`int8`].
    Int8 {
        /// `[rows, N]`.
        values: Vec<i8>,
        /// `[rows, ceil(N / 16)]`.
        scales: Vec<f16>,
        /// `[rows]`.
        exponents: Vec<i8>,
    },
}

impl Rows {
    /// Rows of zeros. Sparse rows are for states at rest: they are single precision here.
    fn zeros(format: StateFormat, rows: usize, n: usize) -> Self {
        match format {
            StateFormat::F32 | StateFormat::Sparse(_) => Self::F32(vec![0.0; rows * n]),
            StateFormat::F16 => Self::F16 { values: vec![f16::ZERO; rows * n], exponents: vec![0; rows] },
            StateFormat::Int8Scaled => Self::Int8 {
                values: vec![0; rows * n],
                scales: vec![f16::ZERO; rows * n.div_ceil(int8::BLOCK)],
                exponents: vec![0; rows],
            },
        }
    }

    /// Some of the rows.
    pub(crate) fn part(&self, n: usize, rows: Range<usize>) -> Self {
        let (first, len) = (rows.start, rows.len());
        let blocks = n.div_ceil(int8::BLOCK);
        match self {
            Self::F32(values) => Self::F32(values[first * n..][..len * n].to_vec()),
            Self::F16 { values, exponents } => Self::F16 {
                values: values[first * n..][..len * n].to_vec(),
                exponents: exponents[rows].to_vec(),
            },
            Self::Int8 { values, scales, exponents } => Self::Int8 {
                values: values[first * n..][..len * n].to_vec(),
                scales: scales[first * blocks..][..len * blocks].to_vec(),
                exponents: exponents[rows].to_vec(),
            },
        }
    }

    /// Appends rows of the same format.
    fn append(&mut self, other: Self) {
        match (self, other) {
            (Self::F32(own), Self::F32(values)) => own.extend(values),
            (Self::F16 { values: own, exponents: es }, Self::F16 { values, exponents }) => {
                own.extend(values);
                es.extend(exponents);
            }
            (
                Self::Int8 { values: own, scales: ss, exponents: es },
                Self::Int8 { values, scales, exponents },
            ) => {
                own.extend(values);
                ss.extend(scales);
                es.extend(exponents);
            }
            _ => debug_assert!(false, "rows of two formats"),
        }
    }

    /// Stores `state` `[rows, N]`, of which the first element is element `first` of the whole; the exponents of halves
    /// are kept while they fit.
    pub(crate) fn store(&mut self, n: usize, state: &[f32], rounding: Rounding, first: usize) {
        let rows = state.chunks_exact(n).zip((first as u64..).step_by(n));
        match self {
            Self::F32(values) => values.copy_from_slice(state),
            Self::F16 { values, exponents } => {
                for ((row, first), (values, exponent)) in rows.zip(values.chunks_exact_mut(n).zip(exponents))
                {
                    match float16::encode(row, Some(*exponent), rounding, first, values) {
                        Ok(chosen) => *exponent = chosen,
                        Err(_) => values.fill(f16::NAN),
                    }
                }
            }
            Self::Int8 { values, scales, exponents } => {
                let planes = values.chunks_exact_mut(n).zip(scales.chunks_exact_mut(n.div_ceil(int8::BLOCK)));
                for ((row, first), ((values, scales), exponent)) in rows.zip(planes.zip(exponents)) {
                    match int8::encode(row, rounding, first, values, scales) {
                        Ok(chosen) => *exponent = chosen,
                        Err(_) => scales.fill(f16::NAN),
                    }
                }
            }
        }
    }

    /// What is stored in some of the rows, `[rows, N]`.
    pub(crate) fn load(&self, n: usize, rows: Range<usize>, state: &mut [f32]) {
        let (first, blocks) = (rows.start, n.div_ceil(int8::BLOCK));
        match self {
            Self::F32(values) => state.copy_from_slice(&values[first * n..rows.end * n]),
            Self::F16 { values, exponents } => {
                let rows = values.chunks_exact(n).zip(exponents).skip(first).zip(state.chunks_exact_mut(n));
                rows.for_each(|((values, &exponent), row)| float16::decode(values, exponent, row));
            }
            Self::Int8 { values, scales, exponents } => {
                let planes =
                    values.chunks_exact(n).zip(scales.chunks_exact(blocks)).zip(exponents).skip(first);
                planes.zip(state.chunks_exact_mut(n)).for_each(|(((values, scales), &exponent), row)| {
                    int8::decode(values, scales, exponent, row);
                });
            }
        }
    }
}

/// Words of a head of a base as devices hold it, of heads whose size is a multiple of 16:
///
/// ```text
/// values      [N / P, N]                 word (w, i): keys P w .. of value row i, the first in its low bits; P = 1, 2, 4
/// scales      [ceil(N / 32), N]          bytes alone; word (w, i): of blocks 2 w and 2 w + 1 of row i, as halves
/// exponents   [N / 4]                    not of single precision; word w: of rows 4 w .. as bytes
/// ```
///
/// So neighbouring lanes, which have neighbouring value rows, read neighbouring words.
#[must_use]
pub const fn head_words(format: StateFormat, n: usize) -> usize {
    match format {
        StateFormat::F32 | StateFormat::Sparse(_) => n * n,
        StateFormat::F16 => n * n / 2 + n / 4,
        StateFormat::Int8Scaled => n * n / 4 + n.div_ceil(2 * int8::BLOCK) * n + n / 4,
    }
}

impl Base {
    /// Stores `state` `[rows, N]`, rounded to the nearest.
    ///
    /// # Panics
    ///
    /// If N is 0.
    #[must_use]
    pub fn new(format: StateFormat, n: usize, state: &[f32]) -> Self {
        let mut rows = Rows::zeros(format, state.len() / n, n);
        rows.store(n, state, Rounding::Nearest, 0);
        Self { n, rows: Arc::new(rows) }
    }

    /// Of rows that were stored part by part.
    pub(crate) fn of_parts(n: usize, mut parts: impl Iterator<Item = Rows>) -> Option<Self> {
        let mut rows = parts.next()?;
        parts.for_each(|part| rows.append(part));
        Some(Self { n, rows: Arc::new(rows) })
    }

    /// The rows as they are stored.
    #[must_use]
    pub fn rows(&self) -> &Rows {
        &self.rows
    }

    /// The rows, to store others in their place: copied first, if they are shared.
    pub(crate) fn rows_mut(&mut self) -> &mut Rows {
        Arc::make_mut(&mut self.rows)
    }

    /// What is stored, `[rows, N]`.
    #[must_use]
    pub fn load(&self) -> Cow<'_, [f32]> {
        match &*self.rows {
            Rows::F32(values) => Cow::Borrowed(values),
            rows @ Rows::F16 { values: stored, .. } => self.widened(rows, stored.len()),
            rows @ Rows::Int8 { values: stored, .. } => self.widened(rows, stored.len()),
        }
    }

    fn widened(&self, rows: &Rows, len: usize) -> Cow<'static, [f32]> {
        let mut state = vec![0.0; len];
        rows.load(self.n, 0..len / self.n, &mut state);
        Cow::Owned(state)
    }

    /// The heads as devices hold them: [`head_words`].
    #[must_use]
    pub fn to_words(&self) -> Vec<u32> {
        let (n, mut words) = (self.n, Vec::new());
        let heads = |rows: usize| (0..rows).step_by(n);
        let bytes = |of: &[i8]| u32::from_le_bytes([of[0], of[1], of[2], of[3]].map(i8::cast_unsigned));
        let halves = |low: f16, high: f16| u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16;
        match &*self.rows {
            Rows::F32(values) => {
                for head in values.chunks_exact(n * n) {
                    words.extend((0..n * n).map(|at| head[at % n * n + at / n].to_bits()));
                }
            }
            Rows::F16 { values, exponents } => {
                for first in heads(exponents.len()) {
                    let pair = |w: usize, i: usize| {
                        let at = (first + i) * n + 2 * w;
                        halves(values[at], values[at + 1])
                    };
                    words.extend(
                        (0..n / 2).flat_map(|w| (0..n).map(move |i| (w, i))).map(|(w, i)| pair(w, i)),
                    );
                    words.extend(exponents[first..first + n].chunks_exact(4).map(bytes));
                }
            }
            Rows::Int8 { values, scales, exponents } => {
                let blocks = n.div_ceil(int8::BLOCK);
                for first in heads(exponents.len()) {
                    let four = |w: usize, i: usize| bytes(&values[(first + i) * n + 4 * w..][..4]);
                    words.extend(
                        (0..n / 4).flat_map(|w| (0..n).map(move |i| (w, i))).map(|(w, i)| four(w, i)),
                    );
                    let two = |w: usize, i: usize| {
                        let of = |b: usize| (b < blocks).then(|| scales[(first + i) * blocks + b]);
                        halves(of(2 * w).unwrap_or_default(), of(2 * w + 1).unwrap_or_default())
                    };
                    let pairs = (0..blocks.div_ceil(2)).flat_map(|w| (0..n).map(move |i| (w, i)));
                    words.extend(pairs.map(|(w, i)| two(w, i)));
                    words.extend(exponents[first..first + n].chunks_exact(4).map(bytes));
                }
            }
        }
        words
    }

    /// Heads as a device held them: so many words of each as [`head_words`] says.
    ///
    /// # Panics
    ///
    /// If N is 0.
    #[must_use]
    pub fn from_words(format: StateFormat, n: usize, words: &[u32]) -> Self {
        let len = head_words(format, n);
        let heads = words.len() / len;
        let mut rows = Rows::zeros(format, heads * n, n);
        let half = |word: u32, second: usize| {
            let bytes = word.to_le_bytes();
            f16::from_le_bytes([bytes[2 * second], bytes[2 * second + 1]])
        };
        let byte = |word: u32, b: usize| word.to_le_bytes()[b].cast_signed();
        for (h, head) in words.chunks_exact(len).enumerate() {
            let exponent = |i: usize| byte(head[len - n / 4 + i / 4], i % 4);
            for i in 0..n {
                let row = h * n + i;
                match &mut rows {
                    Rows::F32(values) => {
                        (0..n).for_each(|j| values[row * n + j] = f32::from_bits(head[j * n + i]));
                    }
                    Rows::F16 { values, exponents } => {
                        (0..n).for_each(|j| values[row * n + j] = half(head[j / 2 * n + i], j % 2));
                        exponents[row] = exponent(i);
                    }
                    Rows::Int8 { values, scales, exponents } => {
                        (0..n).for_each(|j| values[row * n + j] = byte(head[j / 4 * n + i], j % 4));
                        let blocks = n.div_ceil(int8::BLOCK);
                        for b in 0..blocks {
                            scales[row * blocks + b] = half(head[n * n / 4 + b / 2 * n + i], b % 2);
                        }
                        exponents[row] = exponent(i);
                    }
                }
            }
        }
        Self { n, rows: Arc::new(rows) }
    }

    /// Whether two are the same, not just alike.
    #[must_use]
    pub fn ptr_eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.rows, &other.rows)
    }

    /// Whether another holds it too.
    pub(crate) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.rows) > 1
    }

    /// Bytes that it takes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match &*self.rows {
            Rows::F32(values) => size_of_val(&values[..]),
            Rows::F16 { values, exponents } => size_of_val(&values[..]) + size_of_val(&exponents[..]),
            Rows::Int8 { values, scales, exponents } => {
                size_of_val(&values[..]) + size_of_val(&scales[..]) + size_of_val(&exponents[..])
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Base, head_words};
    use crate::format::StateFormat;

    proptest! {
        /// What goes to a device comes back as it was.
        #[test]
        fn words_keep_everything(
            heads in 1usize..3,
            n in prop::sample::select(vec![16usize, 32, 48, 64]),
            seed in any::<u64>(),
        ) {
            let mut rng = rwkv_core::rng::SplitMix64::new(seed);
            let state: Vec<f32> = (0..heads * n * n).map(|_| rng.normal() * 100.0).collect();
            for format in [StateFormat::F32, StateFormat::F16, StateFormat::Int8Scaled] {
                let base = Base::new(format, n, &state);
                let words = base.to_words();
                prop_assert_eq!(words.len(), heads * head_words(format, n), "{:?}: words", format);
                let back = Base::from_words(format, n, &words);
                prop_assert_eq!(back.load(), base.load(), "{:?}: values", format);
                prop_assert_eq!(back.to_words(), words, "{:?}: words", format);
            }
        }
    }

    /// Key 3 of value row 1, in every format.
    #[test]
    fn words_lie_where_kernels_read_them() {
        let mut state = vec![0.0; 16 * 16];
        state[16 + 3] = 96.0;
        let words = |format| Base::new(format, 16, &state).to_words();
        assert_eq!(words(StateFormat::F32)[3 * 16 + 1], 96f32.to_bits(), "a word for a key");
        assert_eq!(words(StateFormat::F16)[16 + 1], 0x5600_0000, "the second of two keys");
        let bytes = words(StateFormat::Int8Scaled);
        assert_eq!(bytes[1], 127 << 24, "the fourth of four keys");
        assert!(bytes[4 * 16 + 1] > 0 && bytes[4 * 16] == 0, "the scale of row 1");
    }
}
