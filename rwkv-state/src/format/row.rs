//! A row at rest in any format, and its way into and out of the planes of bytes.

use half::f16;
use rwkv_core::fast::vectorised;

use super::exponent::{NotFinite, largest};
use super::{Fault, Rounding, SparseRule, StateFormat, float16, int8, sparse};

/// A row at rest, or room for one.
pub(super) enum Row {
    F32 { values: Vec<f32> },
    F16 { values: Vec<f16>, exponent: i8 },
    Int8Scaled { values: Vec<i8>, scales: Vec<f16>, exponent: i8 },
    Sparse { rule: SparseRule, bitmap: Vec<u8>, values: Vec<f32> },
}

impl Row {
    /// Room for rows of `n`, one after another.
    pub(super) fn new(format: StateFormat, n: usize) -> Self {
        match format {
            StateFormat::F32 => Self::F32 { values: vec![0.0; n] },
            StateFormat::F16 => Self::F16 { values: vec![f16::ZERO; n], exponent: 0 },
            StateFormat::Int8Scaled => Self::Int8Scaled {
                values: vec![0; n],
                scales: vec![f16::ZERO; n.div_ceil(int8::BLOCK)],
                exponent: 0,
            },
            StateFormat::Sparse(rule) => {
                Self::Sparse { rule, bitmap: vec![0; sparse::bitmap_len(n)], values: Vec::with_capacity(n) }
            }
        }
    }

    pub(super) fn encode(&mut self, row: &[f32]) -> Result<(), NotFinite> {
        match self {
            Self::F32 { values } => {
                vectorised(
                    #[inline(always)]
                    || largest(row),
                )?;
                values.copy_from_slice(row);
            }
            Self::F16 { values, exponent } => {
                *exponent = float16::encode(row, None, Rounding::Nearest, 0, values)?;
            }
            Self::Int8Scaled { values, scales, exponent } => {
                *exponent = int8::encode(row, Rounding::Nearest, 0, values, scales)?;
            }
            Self::Sparse { rule, bitmap, values } => {
                values.clear();
                sparse::encode(row, *rule, bitmap, values)?;
            }
        }
        Ok(())
    }

    pub(super) fn decode(&self, row: &mut [f32]) {
        match self {
            Self::F32 { values } => row.copy_from_slice(values),
            Self::F16 { values, exponent } => float16::decode(values, *exponent, row),
            Self::Int8Scaled { values, scales, exponent } => int8::decode(values, scales, *exponent, row),
            Self::Sparse { bitmap, values, .. } => {
                sparse::decode(bitmap, values, row);
            }
        }
    }

    /// Whether it decodes to a row of `n` finite values. Else where, and what is wrong.
    pub(super) fn check(&self, n: usize) -> Result<(), (usize, Fault)> {
        let finite = || {
            let mut row = vec![0.0; n];
            self.decode(&mut row);
            largest(&row).map(drop).map_err(|e| (e.index, Fault::NotFinite { value: e.value }))
        };
        match self {
            Self::F32 { .. } => finite(),
            Self::F16 { values, exponent } => float16::check(values, *exponent),
            Self::Int8Scaled { values, scales, exponent } => int8::check(values, scales, *exponent),
            Self::Sparse { bitmap, .. } => sparse::check(bitmap, n).and_then(|()| finite()),
        }
    }

    /// Appends it to the planes.
    pub(super) fn write(&self, [first, middle, last]: [&mut Vec<u8>; 3]) {
        match self {
            Self::F32 { values } => put(first, values, f32::to_le_bytes),
            Self::F16 { values, exponent } => {
                put(first, values, f16::to_le_bytes);
                last.push(exponent.cast_unsigned());
            }
            Self::Int8Scaled { values, scales, exponent } => {
                put(first, values, i8::to_le_bytes);
                put(middle, scales, f16::to_le_bytes);
                last.push(exponent.cast_unsigned());
            }
            Self::Sparse { bitmap, values, .. } => {
                first.extend_from_slice(bitmap);
                put(middle, values, f32::to_le_bytes);
            }
        }
    }

    /// Takes a row from the front of the planes, which hold it.
    pub(super) fn read(&mut self, [first, middle, last]: &mut [&[u8]; 3]) {
        match self {
            Self::F32 { values } => take(first, values, f32::from_le_bytes),
            Self::F16 { values, exponent } => {
                take(first, values, f16::from_le_bytes);
                take(last, std::slice::from_mut(exponent), i8::from_le_bytes);
            }
            Self::Int8Scaled { values, scales, exponent } => {
                take(first, values, i8::from_le_bytes);
                take(middle, scales, f16::from_le_bytes);
                take(last, std::slice::from_mut(exponent), i8::from_le_bytes);
            }
            Self::Sparse { bitmap, values, .. } => {
                take(first, bitmap, u8::from_le_bytes);
                values.resize(sparse::marks(bitmap), 0.0);
                take(middle, values, f32::from_le_bytes);
            }
        }
    }
}

/// Appends numbers of `N` bytes to a plane.
fn put<const N: usize, T: Copy>(plane: &mut Vec<u8>, values: &[T], bytes: impl Fn(T) -> [u8; N]) {
    let start = plane.len();
    plane.resize(start + N * values.len(), 0);
    plane[start..].as_chunks_mut().0.iter_mut().zip(values).for_each(|(to, &value)| *to = bytes(value));
}

/// Takes numbers of `N` bytes from the front of a plane.
fn take<const N: usize, T>(plane: &mut &[u8], values: &mut [T], value: impl Fn([u8; N]) -> T) {
    let (own, rest) = plane.split_at(N * values.len());
    values.iter_mut().zip(own.as_chunks().0).for_each(|(to, &bytes)| *to = value(bytes));
    *plane = rest;
}
