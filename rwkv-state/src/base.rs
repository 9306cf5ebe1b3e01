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
            Self::F16 { values, exponents } => {
                Self::F16 { values: values[first * n..][..len * n].to_vec(), exponents: exponents[rows].to_vec() }
            }
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
                for ((row, first), (values, exponent)) in rows.zip(values.chunks_exact_mut(n).zip(exponents)) {
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
                let planes = values.chunks_exact(n).zip(scales.chunks_exact(blocks)).zip(exponents).skip(first);
                planes.zip(state.chunks_exact_mut(n)).for_each(|(((values, scales), &exponent), row)| {
                    int8::decode(values, scales, exponent, row);
                });
            }
        }
    }
}

impl Base {
    /// Stores `state` `[rows, N]`, rounded to the nearest.
    pub(crate) fn new(format: StateFormat, n: usize, state: &[f32]) -> Self {
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
