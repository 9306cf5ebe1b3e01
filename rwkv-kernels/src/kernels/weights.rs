//! How matrices lie in a buffer, as `blocks.wgsl` reads them: halves, or blocks and then their scales.
//!
//! A matrix is told by its [`Format`], `None` for halves, and begins at an element of 16 bytes.

use std::borrow::Cow;

use rwkv_core::quant::{BLOCK, Blocks, Format};

/// Bytes of an element.
pub const ELEMENT: usize = 16;

/// Bytes of a half.
pub(super) const HALF: usize = 2;

/// A format as kernels tell it.
#[must_use]
pub const fn number(format: Option<Format>) -> u32 {
    match format {
        None => 0,
        Some(Format::Int8) => 1,
        Some(Format::Int4) => 2,
    }
}

/// Formats, a bit for each.
#[must_use]
pub fn set(all: impl IntoIterator<Item = Option<Format>>) -> u32 {
    all.into_iter().fold(0, |bits, format| bits | 1 << number(format))
}

/// The override `FORMATS` of a pipeline that reads matrices of these formats.
#[must_use]
pub fn formats(all: impl IntoIterator<Item = Option<Format>>) -> (&'static str, f64) {
    ("FORMATS", set(all).max(1).into())
}

/// Of which rows of weights must be whole multiples.
#[must_use]
pub const fn unit(format: Option<Format>) -> usize {
    match format {
        None => ELEMENT / HALF,
        Some(_) => BLOCK,
    }
}

/// Elements of so many weights, which are whole rows, without their scales.
#[must_use]
pub const fn elements(format: Option<Format>, weights: usize) -> usize {
    match format {
        None => weights / (ELEMENT / HALF),
        Some(format) => weights / BLOCK * format.block_bytes() / ELEMENT,
    }
}

/// Elements that a matrix of so many weights takes, scales and all.
#[must_use]
pub const fn len(format: Option<Format>, weights: usize) -> usize {
    let scales = match format {
        None => 0,
        Some(_) => (weights / BLOCK * HALF).div_ceil(ELEMENT),
    };
    elements(format, weights) + scales
}

/// Whether a matrix that ends with such an element can be read: halves are counted in 32 bits.
pub(super) fn indexable(end: usize) -> bool {
    end.checked_mul(ELEMENT / HALF).is_some_and(|halves| u32::try_from(halves).is_ok())
}

/// The bytes of a matrix in blocks, whose rows are whole ones.
///
/// # Panics
///
/// If they are not.
#[must_use]
pub fn bytes(blocks: &Blocks) -> Vec<u8> {
    let mut all = laid(blocks.format(), blocks.weights()).into_owned();
    all.extend(scales(blocks));
    all
}

/// The weights of blocks, or whole words of them, as kernels read them: in Int4, of each word the second and the third byte change places.
/// What a kernel makes into halves at once, of the first byte and of the third, is then neighbours. (Int8 in this order is slower by a
/// fiftieth of a prompt, on an H200 by driver 580, for two instructions fewer of nine.)
#[must_use]
pub fn laid(format: Format, weights: &[u8]) -> Cow<'_, [u8]> {
    match format {
        Format::Int8 => Cow::Borrowed(weights),
        Format::Int4 => {
            let mut laid = weights.to_vec();
            laid.as_chunks_mut::<4>().0.iter_mut().for_each(|word| word.swap(1, 2));
            Cow::Owned(laid)
        }
    }
}

/// The bytes of its scales, which are the end of them.
///
/// # Panics
///
/// If the rows are not whole blocks.
#[must_use]
pub fn scales(blocks: &Blocks) -> Vec<u8> {
    assert!(blocks.columns().is_multiple_of(BLOCK), "rows are whole blocks");
    let mut scales: Vec<u8> =
        blocks.scales().iter().flat_map(|scale| scale.to_bits().to_le_bytes()).collect();
    scales.resize(scales.len().next_multiple_of(ELEMENT), 0);
    scales
}
