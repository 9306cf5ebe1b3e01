//! A row at rest in any format, and its way into and out of the planes of bytes.

use half::f16;

use super::exponent::{NotFinite, largest};
use super::{Fault, Rounding, StateFormat, float16, int8, sparse};

/// A row at rest.
pub(super) enum Row {
    F32 { values: Vec<f32> },
    F16 { values: Vec<f16>, exponent: i8 },
    Int8Scaled { values: Vec<i8>, scales: Vec<f16>, exponent: i8 },
    Sparse { bitmap: Vec<u8>, values: Vec<f32> },
}

impl Row {
    pub(super) fn encode(format: StateFormat, row: &[f32]) -> Result<Self, NotFinite> {
        let n = row.len();
        Ok(match format {
            StateFormat::F32 => {
                largest(row)?;
                Self::F32 { values: row.to_vec() }
            }
            StateFormat::F16 => {
                let mut values = vec![f16::ZERO; n];
                let exponent = float16::encode(row, None, Rounding::Nearest, 0, &mut values)?;
                Self::F16 { values, exponent }
            }
            StateFormat::Int8Scaled => {
                let (mut values, mut scales) = (vec![0; n], vec![f16::ZERO; n.div_ceil(int8::BLOCK)]);
                let exponent = int8::encode(row, Rounding::Nearest, 0, &mut values, &mut scales)?;
                Self::Int8Scaled { values, scales, exponent }
            }
            StateFormat::Sparse(rule) => {
                let (mut bitmap, mut values) = (vec![0; sparse::bitmap_len(n)], Vec::new());
                sparse::encode(row, rule, &mut bitmap, &mut values)?;
                Self::Sparse { bitmap, values }
            }
        })
    }

    pub(super) fn decode(&self, row: &mut [f32]) {
        match self {
            Self::F32 { values } => row.copy_from_slice(values),
            Self::F16 { values, exponent } => float16::decode(values, *exponent, row),
            Self::Int8Scaled { values, scales, exponent } => int8::decode(values, scales, *exponent, row),
            Self::Sparse { bitmap, values } => {
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
    pub(super) fn write(&self, [first, middle, last]: &mut [Vec<u8>; 3]) {
        match self {
            Self::F32 { values } => first.extend(values.iter().flat_map(|v| v.to_le_bytes())),
            Self::F16 { values, exponent } => {
                first.extend(values.iter().flat_map(|v| v.to_le_bytes()));
                last.push(exponent.cast_unsigned());
            }
            Self::Int8Scaled { values, scales, exponent } => {
                first.extend(values.iter().map(|v| v.cast_unsigned()));
                middle.extend(scales.iter().flat_map(|v| v.to_le_bytes()));
                last.push(exponent.cast_unsigned());
            }
            Self::Sparse { bitmap, values } => {
                first.extend_from_slice(bitmap);
                middle.extend(values.iter().flat_map(|v| v.to_le_bytes()));
            }
        }
    }

    /// Takes a row of `n` from the front of the planes, which hold it.
    pub(super) fn read(format: StateFormat, n: usize, [first, middle, last]: &mut [&[u8]; 3]) -> Self {
        match format {
            StateFormat::F32 => Self::F32 { values: f32s(take(first, 4 * n)) },
            StateFormat::F16 => {
                Self::F16 { values: f16s(take(first, 2 * n)), exponent: i8s(take(last, 1))[0] }
            }
            StateFormat::Int8Scaled => Self::Int8Scaled {
                values: i8s(take(first, n)),
                scales: f16s(take(middle, 2 * n.div_ceil(int8::BLOCK))),
                exponent: i8s(take(last, 1))[0],
            },
            StateFormat::Sparse(_) => {
                let bitmap = take(first, sparse::bitmap_len(n)).to_vec();
                let values = f32s(take(middle, 4 * sparse::marks(&bitmap)));
                Self::Sparse { bitmap, values }
            }
        }
    }
}

fn take<'a>(plane: &mut &'a [u8], len: usize) -> &'a [u8] {
    let (head, tail) = plane.split_at(len);
    *plane = tail;
    head
}

fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

fn f16s(bytes: &[u8]) -> Vec<f16> {
    bytes.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b)).collect()
}

fn i8s(bytes: &[u8]) -> Vec<i8> {
    bytes.iter().map(|b| b.cast_signed()).collect()
}
