//! The `.pth` container: what `torch.save` of a state dict writes.
//!
//! It is a zip of one folder, of any name: `data.pkl`, a pickle of the dict, whose tensors refer to storages
//! by key; `data/KEY`, each storage's bytes; and `byteorder`, which says `little`. Storages lie in the zip
//! as they are, so a tensor is a range of the file.
//!
//! Read are the tensors of a plain dict (or `OrderedDict`), also as parameters and as views that share a
//! storage. Other values of the dict, such as numbers, strings and nested dicts, are passed over.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry::{Occupied, Vacant};
use std::io;

use super::archive::{self, Archive};
use super::directory::{Dtype, Entry, HEADER_LIMIT};
use super::pickle::{self, Id, Pickle, Value};
use super::source::{Source, fetch};

#[cfg(test)]
#[path = "../../tests/support/pth_writer.rs"]
pub(super) mod pth_writer;

/// Why a `.pth` file has no directory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The source could not be read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Damage in the zip.
    #[error(transparent)]
    Archive(#[from] archive::Error),
    /// Damage in the pickle, or something in it that is not read.
    #[error(transparent)]
    Pickle(#[from] pickle::Error),
    /// The zip was not written by torch.
    #[error("the zip has {found} entries named */data.pkl, where torch.save writes one")]
    NotTorch {
        /// How many.
        found: usize,
    },
    /// The pickle is longer than is read.
    #[error("a pickle of {bytes} bytes is above the limit of {HEADER_LIMIT}")]
    PickleTooLong {
        /// Its length.
        bytes: u64,
    },
    /// The tensors were written on another kind of machine.
    #[error("the byte order is {got:?}, not \"little\"")]
    ByteOrder {
        /// What the file says.
        got: String,
    },
    /// The pickle is not of a state dict.
    #[error("the pickle is not a dict of tensors by name; nested checkpoints and whole modules are not read")]
    NotStateDict,
    /// A name comes twice.
    #[error("tensor {name:?} is listed twice")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// A tensor is not what torch writes, or not a plain one.
    #[error("tensor {name:?}: its {what} is not that of a plain tensor")]
    Malformed {
        /// The tensor.
        name: String,
        /// The part of it at fault.
        what: &'static str,
    },
    /// A tensor's elements do not lie one after the other.
    #[error("tensor {name:?} of shape {shape:?} has strides {stride:?}: save it after .contiguous()")]
    NotContiguous {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Elements between neighbours, along each axis.
        stride: Vec<usize>,
    },
    /// A tensor goes beyond its storage.
    #[error(
        "tensor {name:?} of shape {shape:?}, from element {start} on, is not inside its storage of {bytes} bytes"
    )]
    Extent {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Its first element, in the storage.
        start: u64,
        /// The storage's length.
        bytes: u64,
    },
}

/// The most axes of a tensor: above torch's own use, and a bound on what one tensor costs.
const MAX_AXES: usize = 16;

/// The longest key of a storage: torch counts them, and a 64-bit count has 20 digits.
const MAX_KEY: usize = 20;

pub(super) fn read(source: &dyn Source) -> Result<BTreeMap<String, Entry>, Error> {
    let archive = Archive::read(source)?;
    let folders: Vec<_> = archive.names().filter_map(|name| name.strip_suffix("/data.pkl")).collect();
    let &[folder] = &folders[..] else {
        return Err(Error::NotTorch { found: folders.len() });
    };
    check_byte_order(source, &archive, folder)?;
    let span = archive.span(source, &format!("{folder}/data.pkl"))?;
    if span.bytes > HEADER_LIMIT {
        return Err(Error::PickleTooLong { bytes: span.bytes });
    }
    let bytes = fetch(source, span.offset, span.bytes)?;
    let pickle = Pickle::read(&bytes)?;
    let Value::Dict(items) = pickle.root() else {
        return Err(Error::NotStateDict);
    };
    let file = File { source, archive: &archive, folder, pickle: &pickle };
    let mut tensors = BTreeMap::new();
    for &(key, value) in items {
        let Some(arguments) = file.tensor(value) else { continue };
        let &Value::Str(name) = pickle.get(key) else {
            return Err(Error::NotStateDict);
        };
        match tensors.entry(name.to_owned()) {
            Occupied(taken) => return Err(Error::Duplicate { name: taken.key().clone() }),
            Vacant(free) => drop(free.insert(file.entry(name, arguments)?)),
        }
    }
    // A dict of dicts, as training checkpoints are, would pass for a model without tensors.
    if tensors.is_empty() && !items.is_empty() { Err(Error::NotStateDict) } else { Ok(tensors) }
}

/// Checks the note that torch leaves since version 2.1; before, files were little endian as a rule.
fn check_byte_order(source: &dyn Source, archive: &Archive, folder: &str) -> Result<(), Error> {
    let span = match archive.span(source, &format!("{folder}/byteorder")) {
        Err(archive::Error::Missing { .. }) => return Ok(()),
        span => span?,
    };
    let got = fetch(source, span.offset, span.bytes.min(8))?;
    if got == b"little" {
        Ok(())
    } else {
        Err(Error::ByteOrder { got: String::from_utf8_lossy(&got).into_owned() })
    }
}

struct File<'a> {
    source: &'a dyn Source,
    archive: &'a Archive,
    folder: &'a str,
    pickle: &'a Pickle<'a>,
}

impl File<'_> {
    /// The arguments from which a tensor is rebuilt; `None` if the value is no tensor.
    fn tensor(&self, value: Id) -> Option<&[Id]> {
        let arguments = match *self.pickle.get(value) {
            Value::Tensor(arguments) => arguments,
            Value::Parameter(arguments) => match *self.pickle.get(*self.pickle.tuple(arguments)?.first()?) {
                Value::Tensor(arguments) => arguments,
                _ => return None,
            },
            _ => return None,
        };
        self.pickle.tuple(arguments)
    }

    fn entry(&self, name: &str, arguments: &[Id]) -> Result<Entry, Error> {
        let malformed = |what| Error::Malformed { name: name.to_owned(), what };
        let &[storage, start, shape, stride, ref rest @ ..] = arguments else {
            return Err(malformed("list of arguments"));
        };
        // after whether it is trained, and its hooks: bits that negate or conjugate what the storage holds
        match rest.get(2..).unwrap_or_default() {
            [] => {}
            &[marks] if matches!(self.pickle.get(marks), Value::Other) => {}
            &[marks] if matches!(self.pickle.get(marks), Value::Dict(marks) if marks.is_empty()) => {}
            _ => return Err(malformed("metadata")),
        }
        let (key, dtype, width) = self.storage(storage).ok_or_else(|| malformed("storage"))?;
        let start = self.count(start).ok_or_else(|| malformed("storage offset"))?;
        let shape = self.counts(shape).ok_or_else(|| malformed("shape"))?;
        let stride = self.counts(stride).filter(|stride| stride.len() == shape.len());
        let stride = stride.ok_or_else(|| malformed("stride"))?;

        // The product of the extents, from the last axis on, is the stride that the next one must have.
        let mut len = Some(1usize);
        for (&extent, &step) in shape.iter().zip(&stride).rev() {
            if extent > 1 && len != Some(step) && !shape.contains(&0) {
                return Err(Error::NotContiguous { name: name.to_owned(), shape, stride });
            }
            len = len.and_then(|len| len.checked_mul(extent));
        }
        let span = self.archive.span(self.source, &format!("{}/data/{key}", self.folder))?;
        let from = (start as u64).checked_mul(width);
        let bytes = len.and_then(|len| (len as u64).checked_mul(width));
        match from
            .zip(bytes)
            .filter(|(from, bytes)| from.checked_add(*bytes).is_some_and(|end| end <= span.bytes))
        {
            Some((from, bytes)) => Ok(Entry::new(dtype, shape, span.offset + from, bytes)),
            None => {
                Err(Error::Extent { name: name.to_owned(), shape, start: start as u64, bytes: span.bytes })
            }
        }
    }

    /// A storage's key, type and bytes per element: `("storage", torch.HalfStorage, key, device, elements)`.
    fn storage(&self, id: Id) -> Option<(&str, Dtype, u64)> {
        let &Value::Persistent(id) = self.pickle.get(id) else { return None };
        let &[tag, class, key, _device, _elements] = self.pickle.tuple(id)? else { return None };
        match (self.pickle.get(tag), self.pickle.get(class), self.pickle.get(key)) {
            (Value::Str("storage"), &Value::Global { module: "torch", name }, Value::Str(key))
                if key.len() <= MAX_KEY =>
            {
                let (dtype, width) = element(name)?;
                Some((key, dtype.into(), width))
            }
            _ => None,
        }
    }

    fn count(&self, id: Id) -> Option<usize> {
        if let &Value::Int(value) = self.pickle.get(id) { usize::try_from(value).ok() } else { None }
    }

    fn counts(&self, id: Id) -> Option<Vec<usize>> {
        let parts = self.pickle.tuple(id).filter(|parts| parts.len() <= MAX_AXES)?;
        parts.iter().map(|&part| self.count(part)).collect()
    }
}

/// The safetensors name and the bytes of the elements of torch's classes of storage.
fn element(class: &str) -> Option<(&'static str, u64)> {
    Some(match class {
        "FloatStorage" => ("F32", 4),
        "HalfStorage" => ("F16", 2),
        "BFloat16Storage" => ("BF16", 2),
        "DoubleStorage" => ("F64", 8),
        "LongStorage" => ("I64", 8),
        "IntStorage" => ("I32", 4),
        "ShortStorage" => ("I16", 2),
        "CharStorage" => ("I8", 1),
        "ByteStorage" => ("U8", 1),
        "BoolStorage" => ("BOOL", 1),
        "ComplexFloatStorage" => ("C64", 8),
        "ComplexDoubleStorage" => ("C128", 16),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::pth_writer::{View, state_dict, write_pth, zip};
    use super::{Entry, Error, read};
    use crate::checkpoint::directory::Dtype;
    use crate::checkpoint::pickle::{self, Fault};
    use crate::checkpoint::source::{MemorySource, fetch};

    type Tensors = BTreeMap<String, Entry>;

    /// A file of one storage, key 0, of 24 bytes, which come first so that their place is always the same.
    fn file(pickle: &[u8]) -> Vec<u8> {
        zip(&[("m/data/0".to_owned(), (0..24).collect()), ("m/data.pkl".to_owned(), pickle.to_vec())])
    }

    fn view(start: i64, shape: &[i64], stride: &[i64]) -> View {
        let (shape, stride) = (shape.to_vec(), stride.to_vec());
        View { name: "t".to_owned(), class: "HalfStorage", key: "0".to_owned(), start, shape, stride }
    }

    fn open(views: &[View]) -> Result<Tensors, Error> {
        read(&MemorySource(file(&state_dict(views))))
    }

    #[test]
    fn tensors_are_ranges_of_the_file() {
        let tensors = [
            ("a".to_owned(), "F32", vec![2, 1, 3], (0..24).collect::<Vec<u8>>()),
            ("b.weight".to_owned(), "BF16", vec![], vec![7, 8]),
            ("c".to_owned(), "F16", vec![0, 5], vec![]),
            ("d".to_owned(), "I64", vec![1], vec![9; 8]),
        ];
        let source = MemorySource(write_pth(&tensors));
        let read = read(&source).unwrap();
        assert_eq!(read.len(), tensors.len(), "all of them");
        for (name, dtype, shape, bytes) in tensors {
            let entry = &read[&name];
            assert_eq!((&entry.dtype, &entry.shape), (&Dtype::from(dtype), &shape), "{name}");
            assert_eq!(fetch(&source, entry.offset, entry.bytes()).unwrap(), bytes, "{name}");
        }
    }

    #[test]
    fn views_share_a_storage() {
        type Case = (i64, &'static [i64], &'static [i64], u64, u64);
        let cases: [Case; 7] = [
            (0, &[3, 4], &[4, 1], 0, 24),
            (4, &[2, 4], &[4, 1], 8, 16),
            (3, &[3, 1, 3], &[3, 99, 1], 6, 18),
            (5, &[1, 4], &[0, 1], 10, 8),
            (11, &[], &[], 22, 2),
            (11, &[1], &[5], 22, 2),
            (12, &[3, 0], &[1, 1], 24, 0),
        ];
        let base = open(&[view(0, &[12], &[1])]).unwrap()["t"].offset;
        for (start, shape, stride, from, bytes) in cases {
            let entry = &open(&[view(start, shape, stride)]).unwrap()["t"];
            assert_eq!((entry.offset - base, entry.bytes()), (from, bytes), "{shape:?} from {start}");
        }
        let other = View { name: "u".to_owned(), ..view(6, &[6], &[1]) };
        assert_eq!(open(&[view(0, &[12], &[1]), other]).unwrap()["u"].offset, base + 12, "both");
    }

    #[test]
    fn what_is_no_plain_tensor_is_named() {
        let fault = |start, shape: &[i64], stride: &[i64]| open(&[view(start, shape, stride)]).unwrap_err();
        for (shape, stride) in [([3, 4], [1, 3]), ([3, 4], [5, 1]), ([3, 4], [0, 1]), ([2, 2], [1, 1])] {
            let fault = fault(0, &shape, &stride);
            assert!(matches!(fault, Error::NotContiguous { .. }), "{shape:?}, {stride:?}: {fault}");
        }
        let huge = i64::MAX;
        let cases: [(i64, &[i64], &[i64]); 6] = [
            (0, &[13], &[1]),
            (1, &[12], &[1]),
            (13, &[0], &[1]),
            (huge, &[1], &[1]),
            (0, &[huge], &[1]),
            (0, &[2, huge, 1], &[huge, 1, 1]),
        ];
        for (start, shape, stride) in cases {
            let fault = fault(start, shape, stride);
            assert!(matches!(fault, Error::Extent { bytes: 24, .. }), "{shape:?} from {start}: {fault}");
        }
        // the product of these extents is 2^64, and 0 if it wraps
        let wraps = fault(0, &[4, 1 << 62], &[1 << 62, 1]);
        assert!(matches!(wraps, Error::Extent { .. }), "{wraps}");
        for (start, shape, stride, part) in [
            (-1, &[1][..], &[1][..], "storage offset"),
            (0, &[-1], &[1], "shape"),
            (0, &[2], &[-1], "stride"),
            (0, &[2], &[1, 1], "stride"),
            (0, &[1; 17], &[1; 17], "shape"),
        ] {
            let fault = fault(start, shape, stride);
            assert!(matches!(fault, Error::Malformed { what, .. } if what == part), "{part}: {fault}");
        }
        let class = View { class: "QInt8Storage", ..view(0, &[1], &[1]) };
        assert!(matches!(open(&[class]), Err(Error::Malformed { what: "storage", .. })), "class");
        let long = View { key: "0".repeat(21), ..view(0, &[1], &[1]) };
        assert!(matches!(open(&[long]), Err(Error::Malformed { what: "storage", .. })), "long key");
        let missing = View { key: "1".to_owned(), ..view(0, &[1], &[1]) };
        assert!(matches!(open(&[missing]), Err(Error::Archive(_))), "no such storage");
        let twice = [view(0, &[1], &[1]), view(0, &[1], &[1])];
        assert!(matches!(open(&twice), Err(Error::Duplicate { name }) if name == "t"), "twice");
    }

    #[test]
    fn the_dict_is_plain() {
        let open = |pickle: &[u8]| read(&MemorySource(file(pickle)));
        let tensor = state_dict(&[view(0, &[12], &[1])]);
        // the value alone: without protocol, dict, mark and key, and without what ends the dict
        let value = &tensor[4 + 6..tensor.len() - 2];
        let dict = |items: &[&[u8]]| {
            [b"\x80\x02ccollections\nOrderedDict\n)R(", &items.concat()[..], b"u}b."].concat()
        };
        let names = |pickle: &[u8]| open(pickle).unwrap().into_keys().collect::<Vec<_>>();
        assert_eq!(names(&dict(&[b"U\x01a", value])), ["a"], "ordered, with attributes");
        let parameter = [b"ctorch._utils\n_rebuild_parameter\n(", value, b"\x88}tR"].concat();
        assert_eq!(names(&dict(&[b"U\x01a", &parameter])), ["a"], "parameter");
        assert_eq!(names(&dict(&[b"U\x01a", value, b"U\x01nK\x05", b"K\x02N"])), ["a"], "besides numbers");
        assert!(open(&dict(&[])).unwrap().is_empty(), "an empty dict");
        let not_dict = |pickle: &[u8]| matches!(open(pickle), Err(Error::NotStateDict));
        assert!(not_dict(&[b"\x80\x02", value, b"."].concat()), "a tensor alone");
        assert!(not_dict(&dict(&[b"K\x01", value])), "a number for a name");
        assert!(not_dict(&dict(&[b"U\x05model}U\x01a", value, b"s"])), "a dict in the dict");
        // `value` ends in the call: close its tuple after one more argument
        let marked = |mark: &[u8]| [b"U\x01a", &value[..value.len() - 2], mark, b"tR"].concat();
        for plain in [&b"N"[..], b"}"] {
            assert_eq!(names(&dict(&[&marked(plain)])), ["a"], "no metadata: {}", plain.escape_ascii());
        }
        let negated = open(&dict(&[&marked(b"}U\x03neg\x88s")]));
        assert!(matches!(negated, Err(Error::Malformed { what: "metadata", .. })), "negated: {negated:?}");
        let called = open(&dict(&[b"U\x01a", b"cos\nsystem\nU\x02ls\x85R"]));
        assert!(
            matches!(called, Err(Error::Pickle(pickle::Error { fault: Fault::Call { .. }, .. }))),
            "a call"
        );
    }

    #[test]
    fn the_zip_is_torchs() {
        let pickle = state_dict(&[]);
        let with = |entries: &[(&str, &[u8])]| {
            let entries: Vec<_> =
                entries.iter().map(|&(name, bytes)| (name.to_owned(), bytes.to_vec())).collect();
            read(&MemorySource(zip(&entries)))
        };
        assert!(with(&[("m/data.pkl", &pickle), ("m/byteorder", b"little")]).is_ok(), "little");
        let big = with(&[("m/data.pkl", &pickle), ("m/byteorder", b"big")]);
        assert!(matches!(big, Err(Error::ByteOrder { got }) if got == "big"), "big");
        assert!(matches!(with(&[("m/x", &pickle)]), Err(Error::NotTorch { found: 0 })), "no pickle");
        let two = with(&[("m/data.pkl", &pickle), ("n/data.pkl", &pickle)]);
        assert!(matches!(two, Err(Error::NotTorch { found: 2 })), "two");
        let long = vec![b'N'; 16 * 1024 * 1024 + 1];
        assert!(matches!(with(&[("m/data.pkl", &long)]), Err(Error::PickleTooLong { .. })), "long");
    }
}
