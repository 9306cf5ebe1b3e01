//! The zip directory of a `.pth` file: where the bytes of each stored entry lie.
//!
//! Read here and not through a zip library because positions are all that is wanted, and because every
//! allocation must be bounded by a constant, whatever number of entries a file claims. Sizes and names are
//! the central directory's; the place of the data is the local header's, as its length is known there alone.

use std::collections::BTreeMap;
use std::io;

use super::directory::HEADER_LIMIT;
use super::source::{Source, fetch};

/// Why a zip has no directory, or an entry no bytes.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The source could not be read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// There is no end record where a zip ends.
    #[error("no zip directory at the end: the file is cut short, or bytes follow it")]
    NoEnd,
    /// The directory lies outside the file, or is longer than is read.
    #[error(
        "a zip directory of {bytes} bytes at {start} must end by {end}, and is read up to {HEADER_LIMIT} bytes"
    )]
    Directory {
        /// Its length, by the file.
        bytes: u64,
        /// Its place, by the file.
        start: u64,
        /// Where the end record begins.
        end: u64,
    },
    /// An entry of the directory is malformed, or bytes follow the last.
    #[error("zip directory: entry {index} of {count} is malformed")]
    Malformed {
        /// Which, from 0.
        index: u64,
        /// Entries, by the file.
        count: u64,
    },
    /// A name comes twice.
    #[error("zip entry {name:?} is listed twice")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// A name does not come at all.
    #[error("there is no zip entry {name:?}")]
    Missing {
        /// The name.
        name: String,
    },
    /// An entry is compressed or encrypted.
    #[error("zip entry {name:?} is not plainly stored: compression method {method}, flags {flags:#x}")]
    NotStored {
        /// The entry.
        name: String,
        /// Its method of compression, 0 for none.
        method: u64,
        /// Its flags, of which bit 0 is encryption.
        flags: u64,
    },
    /// An entry's bytes are not where the directory says.
    #[error(
        "zip entry {name:?}: no local header and {bytes} bytes at {header}, before the directory at {end}"
    )]
    Outside {
        /// The entry.
        name: String,
        /// Where its local header should be.
        header: u64,
        /// Its length.
        bytes: u64,
        /// Where the directory begins.
        end: u64,
    },
}

/// A zip's directory.
#[derive(Debug)]
pub(super) struct Archive {
    records: BTreeMap<String, Record>,
    /// Where the directory begins, and all entries must have ended.
    end: u64,
}

#[derive(Debug)]
struct Record {
    method: u64,
    flags: u64,
    header: u64,
    bytes: u64,
}

/// An entry's bytes, all inside the source.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

// The fixed parts of the format's records, in bytes (PKWARE APPNOTE 4.3).
const END: usize = 22;
const LOCATOR: u64 = 20;
const END64: u64 = 56;
const CENTRAL: usize = 46;
const LOCAL: u64 = 30;

/// A field that did not fit, so that its value is in the zip64 record.
const FULL: u64 = u32::MAX as u64;

/// The little-endian number of `N` bytes at `at`.
fn le<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + N].iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

impl Archive {
    pub(super) fn read(source: &dyn Source) -> Result<Self, Error> {
        // The end record is the file's last, but for a comment of up to 2^16 - 1 bytes whose length it says.
        let from = source.len().saturating_sub(END as u64 + 0xFFFF);
        let tail = fetch(source, from, source.len() - from)?;
        let ends_zip = |at: &usize| {
            let record = &tail[*at..];
            record.starts_with(b"PK\x05\x06") && le::<2>(record, 20) == (record.len() - END) as u64
        };
        let last = tail.len().checked_sub(END).ok_or(Error::NoEnd)?;
        let at = (0..=last).rev().find(ends_zip).ok_or(Error::NoEnd)?;
        let record = &tail[at..];
        let mut end = from + at as u64;
        let (mut count, mut bytes, mut start) =
            (le::<2>(record, 10), le::<4>(record, 12), le::<4>(record, 16));

        if count == 0xFFFF || bytes == FULL || start == FULL {
            let locator = fetch(source, end.saturating_sub(LOCATOR), LOCATOR)?;
            if locator.starts_with(b"PK\x06\x07") {
                end = le::<8>(&locator, 8);
                let record = fetch(source, end, END64)?;
                if !record.starts_with(b"PK\x06\x06") {
                    return Err(Error::NoEnd);
                }
                (count, bytes, start) = (le::<8>(&record, 32), le::<8>(&record, 40), le::<8>(&record, 48));
            }
        }
        if bytes > HEADER_LIMIT || start.checked_add(bytes).is_none_or(|directory_end| directory_end > end) {
            return Err(Error::Directory { bytes, start, end });
        }

        let directory = fetch(source, start, bytes)?;
        let (mut rest, mut records) = (&directory[..], BTreeMap::new());
        for index in 0..count {
            let (name, record) = central(&mut rest).ok_or(Error::Malformed { index, count })?;
            if records.insert(name.to_owned(), record).is_some() {
                return Err(Error::Duplicate { name: name.to_owned() });
            }
        }
        if rest.is_empty() {
            Ok(Self { records, end: start })
        } else {
            Err(Error::Malformed { index: count, count })
        }
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.records.keys().map(String::as_str)
    }

    /// Where the bytes of an entry lie.
    pub(super) fn span(&self, source: &dyn Source, name: &str) -> Result<Span, Error> {
        let own = || name.to_owned();
        let &Record { method, flags, header, bytes } =
            self.records.get(name).ok_or_else(|| Error::Missing { name: own() })?;
        if method != 0 || flags & 1 != 0 {
            return Err(Error::NotStored { name: own(), method, flags });
        }
        let outside = || Error::Outside { name: own(), header, bytes, end: self.end };
        if header.checked_add(LOCAL).is_none_or(|end| end > self.end) {
            return Err(outside());
        }
        let local = fetch(source, header, LOCAL)?;
        let offset = header + LOCAL + le::<2>(&local, 26) + le::<2>(&local, 28);
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= self.end);
        if local.starts_with(b"PK\x03\x04") && inside { Ok(Span { offset, bytes }) } else { Err(outside()) }
    }
}

/// Takes one entry off the central directory; `None` if it is malformed.
fn central<'a>(rest: &mut &'a [u8]) -> Option<(&'a str, Record)> {
    let fixed = rest.split_off(..CENTRAL)?.first_chunk::<CENTRAL>()?;
    let mut take = |at| rest.split_off(..usize::try_from(le::<2>(fixed, at)).ok()?);
    let (name, mut extra, _comment) = (take(28)?, take(30)?, take(32)?);
    let (packed, unpacked, header) = (le::<4>(fixed, 20), le::<4>(fixed, 24), le::<4>(fixed, 42));

    // Values that did not fit are in the extra field of kind 1, in this order, each only if it is needed.
    let mut wide: &[u8] = &[];
    while let Some(head) = extra.split_off(..4) {
        let field = extra.split_off(..usize::try_from(le::<2>(head, 2)).ok()?)?;
        if le::<2>(head, 0) == 1 {
            wide = field;
        }
    }
    let mut widen = |value| if value == FULL { Some(le::<8>(wide.split_off(..8)?, 0)) } else { Some(value) };
    let (unpacked, packed, header) = (widen(unpacked)?, widen(packed)?, widen(header)?);
    let (flags, method) = (le::<2>(fixed, 8), le::<2>(fixed, 10));
    let sound = fixed.starts_with(b"PK\x01\x02") && (method != 0 || packed == unpacked);
    let record = Record { method, flags, header, bytes: unpacked };
    sound.then_some((std::str::from_utf8(name).ok()?, record))
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::super::pth::pth_writer::zip;
    use super::{Archive, Error, Source, fetch, le};
    use crate::checkpoint::source::MemorySource;

    fn sample() -> Vec<u8> {
        zip(&[
            ("a/x".to_owned(), vec![1, 2, 3]),
            ("a/y".to_owned(), Vec::new()),
            ("b".to_owned(), vec![4; 100]),
        ])
    }

    /// Every entry's bytes, or the first error.
    fn contents(bytes: &[u8]) -> Result<Vec<(String, Vec<u8>)>, Error> {
        let source = MemorySource(bytes);
        let archive = Archive::read(&source)?;
        let read = |name: &str| {
            let span = archive.span(&source, name)?;
            Ok((name.to_owned(), fetch(&source, span.offset, span.bytes)?))
        };
        archive.names().map(read).collect()
    }

    /// The place of the `n`th record with this signature.
    fn place(bytes: &[u8], signature: &[u8; 4], n: usize) -> usize {
        bytes.windows(4).enumerate().filter(|(_, w)| w == signature).nth(n).unwrap().0
    }

    /// The file with `value` written at `at`.
    fn patched(bytes: &[u8], at: usize, value: &[u8]) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        bytes[at..at + value.len()].copy_from_slice(value);
        bytes
    }

    #[test]
    fn stored_entries_are_found() {
        let want = [
            ("a/x".to_owned(), vec![1, 2, 3]),
            ("a/y".to_owned(), Vec::new()),
            ("b".to_owned(), vec![4; 100]),
        ];
        assert_eq!(contents(&sample()).unwrap(), want, "plain");
        let mut commented = sample();
        let len = commented.len();
        commented[len - 2] = 30;
        commented.extend([&b"PK\x05\x06"[..], &[0; 26]].concat());
        assert_eq!(contents(&commented).unwrap(), want, "with a comment that holds the signature");
        assert!(contents(&zip(&[])).unwrap().is_empty(), "empty");
    }

    /// The end record's numbers in a zip64 record, and a header's in an extra field, as in files over 4 GiB.
    #[test]
    fn zip64_values_are_used() {
        let plain = sample();
        let (cd, end) = (place(&plain, b"PK\x01\x02", 0), place(&plain, b"PK\x05\x06", 0));
        let (header, size) = (le::<4>(&plain, cd + 42), le::<4>(&plain, cd + 24));
        let extra =
            [&[9, 0, 2, 0, 7, 7, 1, 0, 24, 0][..], &[size, size, header].map(u64::to_le_bytes).concat()]
                .concat();
        let mut directory = plain[cd..end].to_vec();
        directory[30] = u8::try_from(extra.len()).unwrap();
        directory[20..28].fill(0xFF);
        directory[42..46].fill(0xFF);
        let name_end = 46 + 3;
        directory.splice(name_end..name_end, extra);

        let (start, len) = (cd as u64, directory.len() as u64);
        let mut file = [&plain[..cd], &directory].concat();
        let end64 = file.len() as u64;
        file.extend(b"PK\x06\x06\x2c\0\0\0\0\0\0\0\x2d\0\x2d\0\0\0\0\0\0\0\0\0");
        file.extend([3, 3, len, start].map(u64::to_le_bytes).concat());
        file.extend(b"PK\x06\x07\0\0\0\0");
        file.extend(end64.to_le_bytes());
        file.extend(b"\x01\0\0\0PK\x05\x06\0\0\0\0");
        file.extend([0xFF; 12]);
        file.extend([0; 2]);
        assert_eq!(contents(&file).unwrap(), contents(&plain).unwrap(), "as without zip64");

        let at = usize::try_from(end64).unwrap();
        for (field, value) in
            [(32, u64::MAX), (32, 2), (32, 4), (40, u64::MAX), (40, 0), (48, u64::MAX), (48, 0)]
        {
            let bad = patched(&file, at + field, &value.to_le_bytes());
            assert!(contents(&bad).is_err(), "{value} at {field} of the zip64 record");
        }
        let far = patched(&file, at + 56 + 8, &u64::MAX.to_le_bytes());
        assert!(
            matches!(contents(&far), Err(Error::Io(e)) if e.kind() == io::ErrorKind::UnexpectedEof),
            "far away"
        );
        let torn = patched(&file, cd + 46 + 3 + 6 + 2, &[16]);
        assert!(
            matches!(contents(&torn), Err(Error::Malformed { index: 0, count: 3 })),
            "a short extra field"
        );
    }

    #[test]
    fn faults_are_named() {
        let good = sample();
        let (cd, end) = (place(&good, b"PK\x01\x02", 0), place(&good, b"PK\x05\x06", 0));
        let fault = |at, value: &[u8]| contents(&patched(&good, at, value)).unwrap_err();
        assert!(matches!(contents(&good[..good.len() - 1]), Err(Error::NoEnd)), "cut short");
        assert!(matches!(contents(b"PK\x05\x06"), Err(Error::NoEnd)), "too short");
        assert!(matches!(fault(cd + 10, &[8]), Error::NotStored { method: 8, .. }), "deflate");
        assert!(matches!(fault(cd + 8, &[1]), Error::NotStored { flags: 1, .. }), "encryption");
        assert!(matches!(fault(cd + 24, &[4]), Error::Malformed { index: 0, .. }), "sizes that differ");
        assert!(matches!(fault(cd + 46, &[0xFF]), Error::Malformed { index: 0, .. }), "name");
        assert!(matches!(fault(cd + 28, &[0xFF, 0xFF]), Error::Malformed { index: 0, .. }), "length of name");
        assert!(matches!(fault(end + 10, &[2]), Error::Malformed { index: 2, count: 2 }), "an entry too few");
        assert!(
            matches!(fault(end + 10, &[4]), Error::Malformed { index: 3, count: 4 }),
            "an entry too many"
        );
        let large = 0xFFFF_FFF0u32.to_le_bytes();
        assert!(matches!(fault(end + 12, &large), Error::Directory { .. }), "length of directory");
        assert!(matches!(fault(end + 16, &large), Error::Directory { .. }), "place of directory");
        assert!(matches!(fault(cd + 20, &[large, large].concat()), Error::Outside { .. }), "absurd size");
        assert!(matches!(fault(cd + 42, &large), Error::Outside { .. }), "place of local header");
        assert!(matches!(fault(0, b"QK"), Error::Outside { .. }), "local header");
        assert!(matches!(fault(28, &[0xFF, 0xFF]), Error::Outside { .. }), "length of the local extra field");
        let twice = zip(&[("a".to_owned(), vec![1]), ("a".to_owned(), vec![2])]);
        assert!(matches!(contents(&twice), Err(Error::Duplicate { name }) if name == "a"), "twice");
        let archive = Archive::read(&MemorySource(&good[..])).unwrap();
        assert!(matches!(archive.span(&MemorySource(&good[..]), "c"), Err(Error::Missing { .. })), "missing");
    }

    /// A source of 2^60 zeros but for a zip64 end, whose claims a reader must not take memory for.
    #[derive(Debug)]
    struct Huge(Vec<u8>);

    impl Source for Huge {
        fn len(&self) -> u64 {
            1 << 60
        }

        fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
            for (byte, at) in buf.iter_mut().zip(offset..) {
                let behind = usize::try_from(self.len() - at).unwrap();
                *byte = self.0.len().checked_sub(behind).map_or(0, |i| self.0[i]);
            }
            Ok(())
        }
    }

    #[test]
    fn memory_is_not_taken_on_a_claim() {
        let end = |count: u64, len: u64| {
            let (place, start) = ((1u64 << 60) - 98, (1u64 << 60) - 98 - len);
            let mut bytes = b"PK\x06\x06\x2c\0\0\0\0\0\0\0\x2d\0\x2d\0\0\0\0\0\0\0\0\0".to_vec();
            bytes.extend([count, count, len, start].map(u64::to_le_bytes).concat());
            bytes.extend([&b"PK\x06\x07\0\0\0\0"[..], &place.to_le_bytes(), b"\x01\0\0\0"].concat());
            bytes.extend([&b"PK\x05\x06\0\0\0\0"[..], &[0xFF; 12], &[0; 2]].concat());
            Huge(bytes)
        };
        let count = (1 << 60) / 46;
        assert!(
            matches!(Archive::read(&end(count, 1 << 59)), Err(Error::Directory { .. })),
            "a vast directory"
        );
        assert!(
            matches!(Archive::read(&end(count, 460)), Err(Error::Malformed { index: 0, .. })),
            "vast counts"
        );
    }
}
