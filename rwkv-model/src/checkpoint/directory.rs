//! A checkpoint's directory: the name, type, shape and place of every tensor, whatever the container.
//!
//! The container is told from its content, never from a file's name. Reading a directory reads headers
//! alone, at most [`HEADER_LIMIT`] bytes each, so memory is bounded by a constant and not by what a file
//! claims of itself.
//!
//! Invariant: every entry's bytes lie inside the source.

use std::collections::BTreeMap;
use std::fmt;
use std::io;

use super::source::{Source, fetch};
use super::{pth, safetensors};

/// The longest header that is read: a safetensors header, a zip directory, a pickle. RWKV-7 checkpoints
/// need less than half a megabyte.
pub const HEADER_LIMIT: u64 = 16 << 20;

/// The tensors of a checkpoint, none of them read yet.
#[derive(Clone, Debug)]
pub struct Directory {
    /// The container.
    pub format: Format,
    /// Every tensor, by name.
    pub tensors: BTreeMap<String, Entry>,
    /// The writer's notes (`__metadata__` of safetensors; empty for `.pth`).
    pub metadata: BTreeMap<String, String>,
}

/// A container of tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Hugging Face safetensors.
    Safetensors,
    /// `torch.save` of `PyTorch` 1.6 or later: a pickle and the tensors' bytes in a zip.
    Pth,
}

/// One tensor: row-major, little endian, without gaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Type of the elements.
    pub dtype: Dtype,
    /// Extents, slowest first.
    pub shape: Vec<usize>,
    /// Where the first element lies in the source.
    pub offset: u64,
    bytes: u64,
}

impl Entry {
    /// The caller has checked that `bytes` agrees with type and shape, and lies inside the source.
    pub(super) const fn new(dtype: Dtype, shape: Vec<usize>, offset: u64, bytes: u64) -> Self {
        Self { dtype, shape, offset, bytes }
    }

    /// Length in bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Type of a tensor's elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of an `F32`.
    BF16,
    /// A type no model here is made of, by its safetensors name. Files may hold such tensors; only
    /// needing one is an error.
    Other(String),
}

impl From<&str> for Dtype {
    fn from(name: &str) -> Self {
        match name {
            "F32" => Self::F32,
            "F16" => Self::F16,
            "BF16" => Self::BF16,
            _ => Self::Other(name.to_owned()),
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Other(name) => name,
        })
    }
}

/// Why a source has no directory. A message is one whole sentence: what it quotes is not its `source` again.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The source could not be read.
    #[error("reading the checkpoint: {0}")]
    Io(io::Error),
    /// There is nothing in it.
    #[error("the checkpoint is empty")]
    Empty,
    /// A known container that is not read.
    #[error("{format} is not supported: {remedy}")]
    Unsupported {
        /// The container.
        format: &'static str,
        /// What to do about it.
        remedy: &'static str,
    },
    /// Not a container that is known.
    #[error("neither safetensors nor .pth: the first bytes are \"{}\"", first.escape_ascii())]
    Unknown {
        /// The first bytes, at most 16.
        first: Vec<u8>,
    },
    /// Damage in a safetensors file.
    #[error("safetensors: {0}")]
    Safetensors(safetensors::Error),
    /// Damage in a `.pth` file, or something in it that is not read.
    #[error("pth: {0}")]
    Pth(pth::Error),
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<safetensors::Error> for Error {
    fn from(error: safetensors::Error) -> Self {
        Self::Safetensors(error)
    }
}

impl From<pth::Error> for Error {
    fn from(error: pth::Error) -> Self {
        Self::Pth(error)
    }
}

/// What torch before 1.6 begins with: a pickle, protocol 2, of the number 0x1950a86a20f9469cfc6c.
const LEGACY_TORCH: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";

/// Tells the container from its first bytes and reads the directory.
///
/// # Errors
///
/// If the source cannot be read, is of another format, or is damaged.
pub fn read(source: &dyn Source) -> Result<Directory, Error> {
    let first = fetch(source, 0, source.len().min(16))?;
    match &first[..] {
        [] => Err(Error::Empty),
        [b'P', b'K', 3, 4, ..] => {
            let tensors = pth::read(source)?;
            Ok(Directory { format: Format::Pth, tensors, metadata: BTreeMap::new() })
        }
        [b'G', b'G', b'U', b'F', ..] => Err(Error::Unsupported {
            format: "GGUF",
            remedy: "use the model's .safetensors or .pth file, from which it was converted",
        }),
        // "ggml", "ggmf" and "ggjt" as little-endian words: llama.cpp before GGUF, and rwkv.cpp
        [b'l', b'm', b'g', b'g', ..] | [b'f', b'm', b'g', b'g', ..] | [b't', b'j', b'g', b'g', ..] => {
            Err(Error::Unsupported {
                format: "ggml",
                remedy: "use the model's .safetensors or .pth file, from which it was converted",
            })
        }
        _ if first.starts_with(LEGACY_TORCH) => Err(Error::Unsupported {
            format: "the .pth format of PyTorch before 1.6",
            remedy: "convert with torch.save(torch.load(old), new) of a later PyTorch",
        }),
        // the header's length, then the header
        [_, _, _, _, _, _, _, _, b'{', ..] => {
            let (tensors, metadata) = safetensors::read(source)?;
            Ok(Directory { format: Format::Safetensors, tensors, metadata })
        }
        _ => Err(Error::Unknown { first }),
    }
}

#[cfg(test)]
mod tests {
    use ::safetensors::{Dtype as Theirs, serialize, tensor::TensorView};
    use proptest::prelude::{ProptestConfig, any, prop};
    use proptest::{prop_assert, proptest};

    use super::super::pth::pth_writer::write_pth;
    use super::super::source::MemorySource;
    use super::{Directory, Error, Format, read};

    fn pth() -> Vec<u8> {
        write_pth(&[
            ("emb.weight".to_owned(), "F16", vec![3, 4], (0..24).collect()),
            ("blocks.0.ln1.bias".to_owned(), "F32", vec![2], (0..8).collect()),
            ("empty".to_owned(), "BF16", vec![0], vec![]),
        ])
    }

    fn safetensors() -> Vec<u8> {
        let bytes: Vec<u8> = (0..24).collect();
        let view =
            |dtype, shape: &[usize], len| TensorView::new(dtype, shape.to_vec(), &bytes[..len]).unwrap();
        let views = [
            ("emb.weight", view(Theirs::F16, &[3, 4], 24)),
            ("blocks.0.ln1.bias", view(Theirs::F32, &[2], 8)),
            ("empty", view(Theirs::BF16, &[0], 0)),
        ];
        serialize(views, Some([("format".to_owned(), "pt".to_owned())].into())).unwrap()
    }

    /// Reads a file that may be damaged. Whatever it holds: a typed error, whose message can be written, or
    /// a directory of which every entry lies inside.
    fn survive(bytes: &[u8]) -> Result<Directory, Error> {
        let read = read(&MemorySource(bytes));
        match &read {
            Ok(directory) => {
                for (name, entry) in &directory.tensors {
                    let end = entry.offset.checked_add(entry.bytes());
                    assert!(end.is_some_and(|end| end <= bytes.len() as u64), "{name}: {entry:?} is outside");
                }
            }
            Err(error) => assert!(!error.to_string().is_empty(), "{error:?} says nothing"),
        }
        read
    }

    #[test]
    fn the_content_tells_the_format() {
        for (file, format) in [(pth(), Format::Pth), (safetensors(), Format::Safetensors)] {
            let directory = survive(&file).unwrap();
            assert_eq!(directory.format, format, "format");
            let names: Vec<_> = directory.tensors.keys().map(String::as_str).collect();
            assert_eq!(names, ["blocks.0.ln1.bias", "emb.weight", "empty"], "{format:?}");
            let entry = &directory.tensors["emb.weight"];
            let from = usize::try_from(entry.offset).unwrap();
            assert_eq!(file[from..from + 24], (0..24).collect::<Vec<u8>>(), "{format:?}: bytes");
        }
        assert!(matches!(survive(b""), Err(Error::Empty)), "empty");
        let unsupported: [(&[u8], &str); 4] = [
            (b"GGUF\x03\0\0\0{", "GGUF"),
            (b"tjgg\x03\0\0\0", "ggml"),
            (b"fmgg\x65\0\0\0", "ggml"),
            (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02", "PyTorch before 1.6"),
        ];
        for (bytes, name) in unsupported {
            let message = survive(bytes).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains("is not supported: "), "{message}");
        }
        let unknown = survive(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\0\0").unwrap_err().to_string();
        assert!(unknown.contains(r#"the first bytes are "\x7fELF\x02\x01\x01\x00"#), "{unknown}");
    }

    #[test]
    fn a_file_cut_anywhere_is_an_error() {
        for file in [pth(), safetensors()] {
            for len in 0..file.len() {
                assert!(survive(&file[..len]).is_err(), "cut to {len} of {}", file.len());
            }
            assert!(survive(&[&file[..], b"x"].concat()).is_err(), "a byte too many");
        }
    }

    #[test]
    fn any_byte_may_take_any_value() {
        for mut file in [pth(), safetensors()] {
            for at in 0..file.len() {
                let was = file[at];
                for value in [0, 1, was ^ 1, was ^ 0x80, 0x7F, 0xFF] {
                    file[at] = value;
                    let _ = survive(&file);
                }
                file[at] = was;
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        #[test]
        fn damage_is_survived(
            of_pth in any::<bool>(),
            flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
            (from, to, len) in (any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0usize..64),
        ) {
            let mut file = if of_pth { pth() } else { safetensors() };
            for (at, value) in flips {
                let at = at.index(file.len());
                file[at] = value;
            }
            // a piece of the file written over another, or put between
            let (from, to) = (from.index(file.len()), to.index(file.len()));
            let piece = file[from..file.len().min(from + len)].to_vec();
            let end = if len % 2 == 0 { to } else { file.len().min(to + len) };
            file.splice(to..end, piece);
            let _ = survive(&file);
        }

        #[test]
        fn noise_is_survived(
            start in prop::sample::select(vec![&b""[..], b"PK\x03\x04", b"\x20\0\0\0\0\0\0\0{"]),
            noise in prop::collection::vec(any::<u8>(), 0..256),
        ) {
            let read = survive(&[start, &noise].concat());
            prop_assert!(read.is_err(), "noise is no checkpoint");
        }
    }
}
