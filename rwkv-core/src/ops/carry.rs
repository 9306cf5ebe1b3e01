//! What a mix that is left out keeps: a part of a record, carried to other records.

/// For each pair `[from, to]`, copies `width` elements at `offset` of record `from` of `records` `[records, stride]` to the
/// same place of record `to`. Pairs may run in any order.
///
/// # Panics
///
/// If the part does not lie in a record, a record is none, or one that is written is read, or written twice.
pub fn carry<T: Copy>(
    pairs: &[[usize; 2]],
    (width, stride, offset): (usize, usize, usize),
    records: &mut [T],
) {
    assert!(offset + width <= stride, "{width} elements at {offset} are not in a record of {stride}");
    for (i, &[from, to]) in pairs.iter().enumerate() {
        assert!(pairs.iter().all(|other| other[0] != to), "record {to} is read and written");
        assert!(pairs[..i].iter().all(|other| other[1] != to), "record {to} is written twice");
        let start = from * stride + offset;
        records.copy_within(start..start + width, to * stride + offset);
    }
}

#[cfg(test)]
mod tests {
    use super::carry;

    #[test]
    fn the_part_alone_is_carried() {
        let mut records = [1, 2, 3, 4, 0, 0, 0, 0, 5, 6, 7, 8, 0, 0, 0, 0];
        carry(&[[0, 1], [2, 3]], (2, 4, 1), &mut records);
        assert_eq!(records, [1, 2, 3, 4, 0, 2, 3, 0, 5, 6, 7, 8, 0, 6, 7, 0], "two of four, from the second");
    }

    #[test]
    #[should_panic(expected = "record 1 is read and written")]
    fn what_is_written_is_not_read() {
        carry(&[[0, 1], [1, 2]], (1, 1, 0), &mut [0; 3]);
    }
}
