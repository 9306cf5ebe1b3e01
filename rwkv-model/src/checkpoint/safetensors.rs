//! The safetensors container: the length of a JSON header as eight bytes, the header, then the tensors.
//!
//! The element types and the header's records are the `safetensors` crate's. The checks are made here,
//! because the crate's want the whole file in memory, let a repeated name pass, and do not say which tensor
//! is at fault.

use std::collections::BTreeMap;
use std::fmt;
use std::io;

use ::safetensors::tensor::TensorInfo;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};

use super::directory::{Dtype, Entry, HEADER_LIMIT};
use super::source::{Source, fetch};

/// Why a safetensors file has no directory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The source could not be read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The header is longer than is read.
    #[error("a header of {bytes} bytes is above the limit of {HEADER_LIMIT}")]
    HeaderTooLong {
        /// Its length, by the file.
        bytes: u64,
    },
    /// The header is not what the format says.
    #[error("header: {0}")]
    Header(serde_json::Error),
    /// A name comes twice.
    #[error("tensor {name:?} is listed twice")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// A tensor does not begin where the one before it ends.
    #[error("tensor {name:?} spans bytes {start} to {end}, but the one before it ends at {previous}")]
    Offsets {
        /// The tensor.
        name: String,
        /// Its first byte.
        start: usize,
        /// The byte after its last.
        end: usize,
        /// Where the tensor before it ends.
        previous: usize,
    },
    /// A tensor's bytes disagree with its type and shape.
    #[error("tensor {name:?} is {dtype} {shape:?}, which does not fill {bytes} bytes")]
    Extent {
        /// The tensor.
        name: String,
        /// Its type.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<usize>,
        /// The bytes between its offsets.
        bytes: usize,
    },
    /// The file ends too early.
    #[error("the file is cut short: it lists {want} bytes or more, and has {got}")]
    CutShort {
        /// The end of the header, or of the first tensor that is not all there.
        want: u64,
        /// The file's length.
        got: u64,
    },
    /// The file goes on after the last tensor.
    #[error("{bytes} bytes follow the last tensor")]
    Trailing {
        /// How many.
        bytes: u64,
    },
}

/// Tensors and metadata.
type Contents = (BTreeMap<String, Entry>, BTreeMap<String, String>);

pub(super) fn read(source: &dyn Source) -> Result<Contents, Error> {
    let mut prefix = [0; 8];
    source.read_exact_at(&mut prefix, 0)?;
    let (bytes, got) = (u64::from_le_bytes(prefix), source.len());
    if bytes > HEADER_LIMIT {
        return Err(Error::HeaderTooLong { bytes });
    }
    let data = 8 + bytes;
    if data > got {
        return Err(Error::CutShort { want: data, got });
    }
    let Header { mut listed, metadata } =
        serde_json::from_slice(&fetch(source, 8, bytes)?).map_err(Error::Header)?;
    listed.sort_by_key(|(_, info)| info.data_offsets);

    let (mut tensors, mut previous) = (BTreeMap::new(), 0);
    for (name, TensorInfo { dtype, shape, data_offsets: (start, end) }) in listed {
        if start != previous || end < start {
            return Err(Error::Offsets { name, start, end, previous });
        }
        let bytes = end - start;
        let bits = shape.iter().try_fold(dtype.bitsize(), |bits, &extent| bits.checked_mul(extent));
        let dtype = Dtype::from(dtype.to_string().as_str());
        if bits.is_none_or(|bits| bits % 8 != 0 || bits / 8 != bytes) {
            return Err(Error::Extent { name, dtype, shape, bytes });
        }
        if end as u64 > got - data {
            return Err(Error::CutShort { want: data.saturating_add(end as u64), got });
        }
        let entry = Entry::new(dtype, shape, data + start as u64, bytes as u64);
        if tensors.insert(name.clone(), entry).is_some() {
            return Err(Error::Duplicate { name });
        }
        previous = end;
    }
    match got - data - previous as u64 {
        0 => Ok((tensors, metadata)),
        bytes => Err(Error::Trailing { bytes }),
    }
}

/// The header as listed: the order kept, and a name that comes twice not lost as it would be in a map.
#[derive(Default)]
struct Header {
    listed: Vec<(String, TensorInfo)>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Records;

        impl<'de> Visitor<'de> for Records {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut header = Header::default();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        header.metadata = map.next_value::<Option<_>>()?.unwrap_or_default();
                    } else {
                        header.listed.push((name, map.next_value()?));
                    }
                }
                Ok(header)
            }
        }

        deserializer.deserialize_map(Records)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::{Entry, Error, HEADER_LIMIT, read};
    use crate::checkpoint::directory::Dtype;
    use crate::checkpoint::source::MemorySource;

    fn file(header: &str, data: usize) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat()
    }

    fn open(header: &str, data: usize) -> Result<BTreeMap<String, Entry>, Error> {
        read(&MemorySource(file(header, data))).map(|(tensors, _)| tensors)
    }

    #[test]
    fn tensors_are_ranges_of_the_file() {
        let header = r#"{"b":{"dtype":"BF16","shape":[],"data_offsets":[24,26]},"__metadata__":{"k":"v"},
            "a":{"dtype":"F32","shape":[2,1,3],"data_offsets":[0,24]},
            "e":{"dtype":"F16","shape":[0,7],"data_offsets":[24,24]},
            "i":{"dtype":"I64","shape":[1],"data_offsets":[26,34]}}  "#;
        let (tensors, metadata) = read(&MemorySource(file(header, 34))).unwrap();
        let at = 8 + header.len() as u64;
        let want = [
            ("a", Entry::new(Dtype::F32, vec![2, 1, 3], at, 24)),
            ("b", Entry::new(Dtype::BF16, vec![], at + 24, 2)),
            ("e", Entry::new(Dtype::F16, vec![0, 7], at + 24, 0)),
            ("i", Entry::new(Dtype::Other("I64".to_owned()), vec![1], at + 26, 8)),
        ];
        assert_eq!(tensors, want.map(|(name, entry)| (name.to_owned(), entry)).into(), "tensors");
        assert_eq!(metadata, [("k".to_owned(), "v".to_owned())].into(), "metadata");
        assert!(open("{}", 0).unwrap().is_empty(), "none");
    }

    /// Another's writer: the crate's own.
    #[test]
    fn the_crates_files_are_read() {
        use ::safetensors::{Dtype as Theirs, serialize, tensor::TensorView};
        let bytes: Vec<u8> = (0..24).collect();
        let view = |dtype, shape: &[usize], bytes| TensorView::new(dtype, shape.to_vec(), bytes).unwrap();
        let views =
            [("x", view(Theirs::F32, &[2, 3], &bytes)), ("y", view(Theirs::F16, &[5], &bytes[7..17]))];
        let file = serialize(views, Some([("k".to_owned(), "v".to_owned())].into())).unwrap();
        let (tensors, metadata) = read(&MemorySource(&file[..])).unwrap();
        for (name, want) in [("x", &bytes[..]), ("y", &bytes[7..17])] {
            let from = usize::try_from(tensors[name].offset).unwrap();
            assert_eq!(&file[from..][..want.len()], want, "{name}");
            assert_eq!(tensors[name].bytes(), want.len() as u64, "{name}");
        }
        assert_eq!(metadata["k"], "v", "metadata");
    }

    #[test]
    fn faults_are_named() {
        let tensor = |name: &str, shape: &str, offsets: &str| {
            format!(r#""{name}":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}"#)
        };
        let one = |shape: &str, offsets: &str| format!("{{{}}}", tensor("t", shape, offsets));
        let two = |a: &str, b: &str, offsets: &str| {
            format!("{{{},{}}}", tensor(a, "[1]", "[0,4]"), tensor(b, "[1]", offsets))
        };
        let header = one("[2]", "[0,8]");
        let want = 8 + header.len() as u64 + 8;
        assert!(open(&header, 8).is_ok(), "sound");
        assert!(
            matches!(open(&header, 7), Err(Error::CutShort { want: w, got }) if (w, got) == (want, want - 1)),
            "short"
        );
        assert!(matches!(open(&header, 10), Err(Error::Trailing { bytes: 2 })), "long");
        let cut = read(&MemorySource(&file(&header, 8)[..20]));
        assert!(matches!(cut, Err(Error::CutShort { got: 20, .. })), "within the header");
        let long = (HEADER_LIMIT + 1).to_le_bytes();
        assert!(matches!(read(&MemorySource(&long[..])), Err(Error::HeaderTooLong { .. })), "header");

        assert!(open(&two("a", "b", "[4,8]"), 8).is_ok(), "two");
        assert!(
            matches!(open(&two("a", "a", "[4,8]"), 8), Err(Error::Duplicate { name }) if name == "a"),
            "twice"
        );
        for (offsets, what) in
            [("[2,6]", "overlap"), ("[5,9]", "gap"), ("[0,4]", "the same bytes"), ("[4,2]", "backwards")]
        {
            let fault = open(&two("a", "b", offsets), 9);
            assert!(matches!(fault, Err(Error::Offsets { previous: 4, .. })), "{what}: {fault:?}");
        }
        for shape in ["[3]", "[4611686018427387904,4]", "[18446744073709551615,18446744073709551615]"] {
            let fault = open(&one(shape, "[0,8]"), 8);
            assert!(matches!(fault, Err(Error::Extent { bytes: 8, .. })), "{shape}: {fault:?}");
        }
        let far = open(&one("[288230376151711744]", "[0,1152921504606846976]"), 8);
        assert!(matches!(far, Err(Error::CutShort { .. })), "2^60 bytes: {far:?}");
        let half = one("[3]", "[0,1]").replace("F32", "F4");
        assert!(matches!(open(&half, 1), Err(Error::Extent { .. })), "a byte and a half");

        let unknown = header.replace("F32", "F33");
        let negative = one("[-1]", "[0,8]");
        let deep = format!(r#"{{"t":{}"#, "[".repeat(1 << 20));
        for header in
            ["{", "[]", "{}x", r#"{"t":1}"#, r#"{"__metadata__":{"k":1}}"#, &unknown, &negative, &deep]
        {
            let fault = open(header, 8);
            assert!(matches!(fault, Err(Error::Header(_))), "{header:.50}: {fault:?}");
        }
        let mut bytes = file(&header, 8);
        bytes[10] = 0xFF;
        assert!(matches!(read(&MemorySource(bytes)), Err(Error::Header(_))), "a name that is not UTF-8");
    }
}
