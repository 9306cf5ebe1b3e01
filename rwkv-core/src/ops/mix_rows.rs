//! The rows of a pass before its matrices: [`layer_norm`], then [`token_shift`] of each segment against the row that its
//! state keeps.
//!
//! States are records of one buffer, and the kept row is a part of a record. A pass reads one record of a segment and
//! writes another, so that its segments may run in any order, and the record that it read still holds.

use super::layer_norm::{LN_EPS, layer_norm};
use super::token_shift::token_shift;
use crate::Real;

/// Consecutive rows of one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// How many; at least one.
    pub rows: usize,
    /// The record that keeps the normed row before the first.
    pub from: usize,
    /// The records that are to keep the normed last rows, one each, of the very last one last.
    pub to: Vec<usize>,
}

/// Records that keep a row each: `[records, stride]`, the row of `D` elements at `offset`.
#[derive(Debug)]
pub struct Kept<'a, R> {
    /// All records.
    pub records: &'a mut [R],
    /// Elements of a record.
    pub stride: usize,
    /// Where in a record the row begins.
    pub offset: usize,
}

impl<R> Kept<'_, R> {
    fn row(&mut self, record: usize, width: usize) -> &mut [R] {
        &mut self.records[record * self.stride..][..self.stride][self.offset..][..width]
    }
}

/// Norms `x` `[T, D]`, whose rows are those of the `segments` one after the other, with `gain` and `bias` `[D]` and
/// shifts it by each of `mixes` `[M, D]` into `out` `[T, M, D]`.
///
/// # Panics
///
/// If a slice's length disagrees, a segment is empty or is to keep more rows than it has, a record is none, or if one
/// that is written is read or written by another segment too, or read by its own.
pub fn mix_rows<R: Real>(
    segments: &[Segment],
    x: &[R],
    (gain, bias): (&[R], &[R]),
    mixes: &[R],
    kept: &mut Kept<'_, R>,
    out: &mut [R],
) {
    let width = gain.len();
    assert_eq!(x.len(), segments.iter().map(|s| s.rows).sum::<usize>() * width, "x is not [T, D]");
    assert_eq!(out.len() * width, x.len() * mixes.len(), "out is not [T, M, D]");
    for (i, s) in segments.iter().enumerate() {
        assert!(s.rows > 0, "an empty segment");
        assert!(s.to.len() <= s.rows, "{} of {} rows are to be kept", s.to.len(), s.rows);
        for (at, to) in s.to.iter().enumerate() {
            assert!(segments.iter().all(|other| other.from != *to), "record {to} is read and written");
            let written = segments[..i].iter().any(|other| other.to.contains(to)) || s.to[..at].contains(to);
            assert!(!written, "record {to} is written twice");
        }
    }
    let mut normed = vec![R::zero(); x.len()];
    layer_norm(x, gain, bias, LN_EPS, &mut normed);
    let (mut normed, mut out) = (normed.as_slice(), out);
    for s in segments {
        let (own, rest) = normed.split_at(s.rows * width);
        let (rows, others) = out.split_at_mut(s.rows * mixes.len());
        let mut planes = vec![R::zero(); rows.len()]; // [M, T, D]
        token_shift(own, kept.row(s.from, width), mixes, &mut planes);
        for (m, plane) in planes.chunks_exact(own.len()).enumerate() {
            for (row, from) in rows.chunks_exact_mut(mixes.len()).zip(plane.chunks_exact(width)) {
                row[m * width..][..width].copy_from_slice(from);
            }
        }
        for (&to, row) in s.to.iter().rev().zip(own.chunks_exact(width).rev()) {
            kept.row(to, width).copy_from_slice(row);
        }
        (normed, out) = (rest, others);
    }
}

#[cfg(test)]
mod tests {
    use super::{Kept, Segment, mix_rows};

    /// Two channels whose norm is -1 and 1, or the reverse: `[a, b]` has the sign of `a - b` first.
    #[test]
    fn each_segment_is_shifted_against_its_own_row() {
        let x = [0.0f64, 2.0, 9.0, 1.0, 3.0, 5.0];
        let segments = [Segment { rows: 2, from: 1, to: vec![2] }, Segment { rows: 1, from: 0, to: vec![3] }];
        let mut records = [f64::NAN; 16];
        records[1..3].copy_from_slice(&[7.0, 8.0]);
        records[5..7].copy_from_slice(&[3.0, 4.0]);
        let mut kept = Kept { records: &mut records, stride: 4, offset: 1 };
        let mut out = [f64::NAN; 12];
        // by a mix of 0, now, and of 1, before
        mix_rows(&segments, &x, (&[1.0; 2], &[0.0; 2]), &[0.0, 0.0, 1.0, 1.0], &mut kept, &mut out);
        let want = [-1.0, 1.0, 3.0, 4.0, 1.0, -1.0, -1.0, 1.0, -1.0, 1.0, 7.0, 8.0];
        let near = |got: &[f64], want: &[f64]| got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-4);
        assert!(near(&out, &want), "{out:?}");
        assert!(near(&records[9..11], &[1.0, -1.0]) && near(&records[13..15], &[-1.0, 1.0]), "{records:?}");
        let untouched = records.iter().filter(|x| x.is_nan()).count();
        assert_eq!(
            (untouched, &records[1..3], &records[5..7]),
            (8, &[7.0, 8.0][..], &[3.0, 4.0][..]),
            "the rest"
        );
    }

    #[test]
    #[should_panic(expected = "record 1 is read and written")]
    fn a_record_is_read_or_written() {
        let segments = [Segment { rows: 1, from: 0, to: vec![1] }, Segment { rows: 1, from: 1, to: vec![2] }];
        let mut kept = Kept { records: &mut [0.0f64; 3], stride: 1, offset: 0 };
        mix_rows(&segments, &[1.0, 2.0], (&[1.0], &[0.0]), &[0.5], &mut kept, &mut [0.0; 2]);
    }
}
