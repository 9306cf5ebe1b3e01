//! Rows of which only the significant values are stored: a bitmap of their places, and the values themselves.
//!
//! Bit `j % 8` of byte `j / 8` of a row's bitmap says that element `j` is kept; the kept ones follow in order, as `f32`,
//! exactly. The others decode to zero. Zeros are never kept.

use rwkv_core::Real;
use rwkv_core::fast::vectorised;

use super::Fault;
use super::exponent::{NotFinite, largest, magnitude};

/// Which values of a row are significant. It matters to encoding alone: any sparse row can be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SparseRule {
    /// Those of at least this share of the row's largest magnitude.
    Threshold {
        /// The share, in thousandths.
        per_mille: u16,
    },
    /// The so many largest magnitudes, of equal ones those of lower index.
    TopK {
        /// How many at most.
        k: usize,
    },
}

impl Default for SparseRule {
    /// 2 % of the row's largest magnitude.
    fn default() -> Self {
        Self::Threshold { per_mille: 20 }
    }
}

impl SparseRule {
    /// The most values that are kept of a row of `n`.
    #[must_use]
    pub fn most(self, n: usize) -> usize {
        match self {
            Self::Threshold { .. } => n,
            Self::TopK { k } => k.min(n),
        }
    }

    /// What is kept of a row, whose largest magnitude is `largest`.
    #[inline(always)]
    fn cut(self, row: &[f32], largest: f32) -> Cut {
        match self {
            Self::Threshold { per_mille } => {
                // Exact: 16 bits times 24.
                let least = f64::from(per_mille) * f64::from(largest);
                // The first magnitude that reaches it is the nearest to the quotient, or the next.
                let near = f32::of(least / 1000.0);
                let first = magnitude(near) + u32::from(f64::from(near) * 1000.0 < least);
                Cut { above: first.saturating_sub(1), equal: 0 }
            }
            Self::TopK { k } => {
                // The greatest that k magnitudes reach, bit by bit, is the k-th of them.
                let mut least = 0;
                for bit in (0..SIGN).rev().map(|bit| 1 << bit) {
                    match count_above(row, (least | bit) - 1) {
                        reach if reach == k => return Cut { above: (least | bit) - 1, equal: 0 },
                        reach if reach > k => least |= bit,
                        _ => {}
                    }
                }
                let equal = if least == 0 { 0 } else { k.saturating_sub(count_above(row, least)) };
                Cut { above: least, equal }
            }
        }
    }
}

/// How many magnitudes are above one, as bits.
#[inline(always)]
fn count_above(row: &[f32], bits: u32) -> usize {
    row.iter().map(|&x| u32::from(magnitude(x) > bits)).sum::<u32>() as usize
}

/// Which magnitudes of a row are kept, as bits.
struct Cut {
    /// Those above this one,
    above: u32,
    /// and the first so many that equal it.
    equal: usize,
}

/// The bit of the sign.
const SIGN: u32 = 31;

/// Bytes of the bitmap of a row of `n`.
#[must_use]
pub const fn bitmap_len(n: usize) -> usize {
    n.div_ceil(8)
}

/// Encodes a row: writes its `bitmap`, appends the values kept.
///
/// # Errors
///
/// If a value is not finite.
///
/// # Panics
///
/// If the bitmap is not [`bitmap_len`] long.
pub fn encode(
    row: &[f32],
    rule: SparseRule,
    bitmap: &mut [u8],
    values: &mut Vec<f32>,
) -> Result<(), NotFinite> {
    assert_eq!(bitmap.len(), bitmap_len(row.len()), "bytes of the bitmap");
    let Cut { above, mut equal } = vectorised(
        #[inline(always)]
        || largest(row).map(|largest| rule.cut(row, largest)),
    )?;
    for (row, marks) in row.chunks(8).zip(bitmap) {
        *marks = 0;
        let (mut own, mut count) = ([0.0; 8], 0);
        for (j, &x) in row.iter().enumerate() {
            let magnitude = magnitude(x);
            let tied = (magnitude == above) & (equal > 0);
            let kept = (magnitude > above) | tied;
            equal -= usize::from(tied);
            *marks |= u8::from(kept) << j;
            // Written over by the next, if it is not kept.
            own[count % 8] = x;
            count += usize::from(kept);
        }
        // All eight, since copies of a known length are faster.
        values.extend_from_slice(&own);
        values.truncate(values.len() - own.len() + count);
    }
    Ok(())
}

/// Decodes a row from its bitmap and the first of `values`; returns the others.
///
/// # Panics
///
/// If the bitmap is not [`bitmap_len`] long, or marks more values than there are.
pub fn decode<'a>(bitmap: &[u8], mut values: &'a [f32], row: &mut [f32]) -> &'a [f32] {
    assert_eq!(bitmap.len(), bitmap_len(row.len()), "bytes of the bitmap");
    for (row, &marks) in row.chunks_mut(8).zip(bitmap) {
        let (kept, others) = values.split_at(marks.count_ones() as usize);
        let (mut own, mut next) = ([0.0; 8], 0);
        match values.first_chunk() {
            Some(eight) => own = *eight, // copies of a known length are faster
            None => own[..kept.len()].copy_from_slice(kept),
        }
        for (j, x) in row.iter_mut().enumerate() {
            let kept = marks >> j & 1;
            *x = if kept == 1 { own[next % 8] } else { 0.0 };
            next += usize::from(kept);
        }
        values = others;
    }
    values
}

/// How many values a bitmap marks.
#[must_use]
pub fn marks(bitmap: &[u8]) -> usize {
    bitmap.iter().map(|b| b.count_ones() as usize).sum()
}

/// Bounds the error of an element of a row, from the row's largest magnitude:
///
/// ```text
/// |x' - x| <= per_mille / 1000 * largest        threshold
/// |x' - x| <= largest                           top-k: with k + 1 equal ones, no better bound holds
/// ```
///
/// It is 0 for an element that is kept, and the magnitude of one that is dropped.
#[must_use]
pub fn error_bound(row_largest: f32, rule: SparseRule) -> f64 {
    let largest = f64::from(row_largest);
    match rule {
        SparseRule::Threshold { per_mille } => largest * f64::from(per_mille.min(1000)) / 1000.0,
        SparseRule::TopK { .. } => largest,
    }
}

/// Whether a row's bitmap marks nothing past the row's end. Else where, and what is wrong.
pub(super) fn check(bitmap: &[u8], n: usize) -> Result<(), (usize, Fault)> {
    let stray = !n.is_multiple_of(8) && bitmap.last().is_some_and(|b| b >> (n % 8) != 0);
    if stray { Err((n - 1, Fault::Stray)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::draw;
    use super::super::exponent::largest;
    use super::{SparseRule, bitmap_len, check, decode, encode, error_bound, marks};

    fn round_trip(row: &[f32], rule: SparseRule) -> (usize, Vec<f32>) {
        let (mut bitmap, mut values) = (vec![0xff; bitmap_len(row.len())], vec![42.0]);
        encode(row, rule, &mut bitmap, &mut values).unwrap();
        assert_eq!(marks(&bitmap) + 1, values.len(), "a mark for each value");
        assert!(check(&bitmap, row.len()).is_ok(), "no mark past the end");
        let mut back = vec![f32::NAN; row.len()];
        assert_eq!(decode(&bitmap, &values[1..], &mut back), [0.0f32; 0], "all are used");
        (values.len() - 1, back)
    }

    proptest! {
        #[test]
        fn a_threshold_keeps_exactly_what_reaches_it(row in draw::row(0..80), per_mille in 0u16..1100) {
            let rule = SparseRule::Threshold { per_mille };
            let most = largest(&row).unwrap();
            let (kept, back) = round_trip(&row, rule);
            let mut want = 0;
            for (&x, &got) in row.iter().zip(&back) {
                let reaches = f64::from(x.abs()) * 1000.0 >= f64::from(per_mille) * f64::from(most) && x != 0.0;
                want += usize::from(reaches);
                prop_assert_eq!(got.to_bits(), if reaches { x.to_bits() } else { 0 }, "{} of {}", x, most);
                let error = (f64::from(got) - f64::from(x)).abs();
                prop_assert!(error <= error_bound(most, rule), "{} to {}", x, got);
            }
            prop_assert_eq!(kept, want, "values stored");
        }

        #[test]
        fn top_k_keeps_exactly_the_largest(row in draw::row(0..80), k in 0usize..90) {
            let rule = SparseRule::TopK { k };
            let (kept, back) = round_trip(&row, rule);
            let nonzero = row.iter().filter(|&&x| x != 0.0).count();
            prop_assert_eq!(kept, k.min(nonzero), "as many as there may be");
            prop_assert!(kept <= rule.most(row.len()), "at most");
            let least = back.iter().filter(|&&x| x != 0.0).fold(f32::INFINITY, |m, x| m.min(x.abs()));
            let mut dropped_of_least = false;
            for (&x, &got) in row.iter().zip(&back) {
                prop_assert!(got == x || got == 0.0, "{} to {}", x, got);
                prop_assert!(got == x || x.abs() <= least || k == 0, "{} dropped, {} kept", x, least);
                // Among equals the earlier ones are kept.
                prop_assert!(!(dropped_of_least && got != 0.0 && got.abs() == least), "a later equal of {}", least);
                dropped_of_least |= got != x && x.abs() == least;
            }
        }
    }

    #[test]
    fn two_percent() {
        let row = [100.0, 2.0, -2.0, 1.999_999, 0.0, -1.0, 50.0];
        let (kept, back) = round_trip(&row, SparseRule::default());
        assert_eq!((kept, back), (4, vec![100.0, 2.0, -2.0, 0.0, 0.0, 0.0, 50.0]), "at least 2 % of 100");
    }

    #[test]
    fn what_is_not_finite_is_an_error() {
        let error = encode(&[f32::NAN], SparseRule::default(), &mut [0], &mut Vec::new()).unwrap_err();
        assert_eq!(error.index, 0, "where");
    }
}
