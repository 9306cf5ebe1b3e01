//! A session's state as a file: versioned, checked against damage, and marked with the model it belongs to.
//!
//! The file is safetensors, so that other programs can look into it. Its metadata, all of them texts:
//!
//! | entry | what it says |
//! |---|---|
//! | `format`, `version` | `rwkv-state` and [`VERSION`] |
//! | `state_format` | [`StateFormat::name`] |
//! | `layers`, `heads`, `head_size` | the layout: `L`, `H`, `N`, with `D = H N` |
//! | `position` | tokens read |
//! | `model`, `tokenizer` | fingerprints, opaque here; the second may be absent |
//! | `checksum` | [`Digest`] of all the rest: of every other entry, and of every tensor's name, type, shape and bytes |
//!
//! Its tensors, whatever order the state had where it ran: the shifts are `[layer, channel]`, the WKV matrices
//! `[layer, head, value, key]`. They are the planes of [the format](crate::format), byte for byte:
//!
//! ```text
//! att_shift, ffn_shift   f32         F32 [L, D]
//!                        otherwise   F16 [L, D]          .exponents I8 [L]
//! wkv                    f32         F32 [L, H, N, N]
//!                        f16         F16 [L, H, N, N]    .exponents I8 [L, H, N]
//!                        int8        I8  [L, H, N, N]    .exponents I8 [L, H, N]   .scales F16 [L, H, N, ceil(N / 16)]
//!                        sparse      .bitmap U8 [L, H, N, ceil(N / 8)]             .values F32 [kept]
//! counts                             U32 [K, 2]          tokens generated and how often, tokens ascending
//! logits                             F32 [V]             of the last token, exactly; may be absent
//! ```
//!
//! Invariant: a file is written under another name, synced, and then renamed: a crash leaves the old file or the new one.
//! It may leave the other name as well, `.rwkv-`, some letters and `.tmp`, which nothing reads and anyone may delete who
//! knows that no save is under way: a save cannot tell those of others from its own kind. Only its owner may read it, since a
//! state tells of what was read.
//!
//! Invariant: reading a file takes memory by the file's length, of which there is a [limit](FILE_LIMIT), never by what it
//! claims of itself; whatever the bytes, the outcome is a typed error or a snapshot whose state decodes to finite values. No name is in a header twice: all readers
//! see the same.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use rwkv_core::ModelConfig;
use rwkv_core::config::Ranks;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use crate::format::{self, EncodedState, StateFormat, int8};
use crate::layout::{Part, StateLayout};
use crate::replace::replace;

/// The version that is written, and the only one that is read.
pub const VERSION: u32 = 1;

/// The longest header, in bytes: ten times what one takes but for the fingerprints.
pub const HEADER_LIMIT: u64 = 1 << 16;

/// The longest file that is written or read, in bytes: four times a state in F32 of 61 layers of 64 heads of 64, which takes
/// 66 MB.
pub const FILE_LIMIT: u64 = 1 << 28;

/// Tokens that a snapshot may say were read, at most: a session can go on counting from there as long as it will.
pub const MAX_POSITION: u64 = u64::MAX >> 1;

/// What tells a snapshot from other safetensors files.
const FORMAT: &str = "rwkv-state";

/// A snapshot that cannot be saved or loaded, and which one it is.
#[derive(Debug, thiserror::Error)]
#[error("{file}: {fault}")]
pub struct Error {
    /// The file, as it was named.
    pub file: String,
    /// What is wrong.
    pub fault: Fault,
}

/// What is wrong with a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The system could not do it.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The file ends too early.
    #[error("the file is cut short: it lists {want} bytes or more, and has {got}")]
    CutShort {
        /// The end of its header or of its tensors.
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
    /// The file is longer than is written or read.
    #[error("a file of {bytes} bytes is above the limit of {FILE_LIMIT}")]
    FileTooLong {
        /// Its length.
        bytes: u64,
    },
    /// The header is longer than is written or read.
    #[error("a header of {bytes} bytes is above the limit of {HEADER_LIMIT}")]
    HeaderTooLong {
        /// Its length.
        bytes: u64,
    },
    /// The header is not what safetensors says.
    #[error("header: {0}")]
    Header(#[from] serde_json::Error),
    /// A safetensors file of something else.
    #[error("no snapshot: the metadata do not say `format` is `{FORMAT}`")]
    NotASnapshot,
    /// A version that is not read here.
    #[error("a snapshot of version {found}, expected {VERSION}")]
    Version {
        /// The version.
        found: String,
    },
    /// The metadata lack something.
    #[error("the metadata have no `{key}`")]
    MissingEntry {
        /// What they lack.
        key: &'static str,
    },
    /// The metadata say something that means nothing.
    #[error("the metadata say `{key}` is {value:?}")]
    Entry {
        /// Of what they say it.
        key: &'static str,
        /// What they say.
        value: String,
    },
    /// A layout without elements, or with more than memory has.
    #[error("a state of {layers} layers of {heads} heads of {head_size}")]
    Extents {
        /// Layers.
        layers: usize,
        /// Heads of a layer.
        heads: usize,
        /// Channels of a head.
        head_size: usize,
    },
    /// A tensor is missing.
    #[error("tensor {tensor} is missing, expected {expected}")]
    MissingTensor {
        /// Its name.
        tensor: String,
        /// The type and shape it should have.
        expected: String,
    },
    /// A tensor has another type or shape than the layout and the format say.
    #[error("tensor {tensor} is {found}, expected {expected}")]
    Tensor {
        /// Its name.
        tensor: String,
        /// The type and shape it has.
        found: String,
        /// The type and shape it should have.
        expected: String,
    },
    /// A tensor that no snapshot has.
    #[error("tensor {tensor:?} is none of a snapshot's in the format {format}")]
    ExtraTensor {
        /// Its name.
        tensor: String,
        /// The format of the state.
        format: &'static str,
    },
    /// Something is not as it was written.
    #[error("the checksum is {found}, the file says {expected}")]
    Checksum {
        /// Of what is there.
        found: String,
        /// Of what was written.
        expected: String,
    },
    /// A token is counted twice, or not in its place.
    #[error("the counts are not in order: token {token} after {before}")]
    Counts {
        /// The token.
        token: u32,
        /// The token before it.
        before: u32,
    },
    /// The state cannot be decoded.
    #[error("the state: {0}")]
    State(#[from] format::Error),
}

/// FNV-1a of 64 bits, for finding damage and telling things apart where nobody means harm. It shows as 16 hexadecimal
/// digits. Of equally many bytes, those that differ in one place alone never have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Digest(u64);

impl Digest {
    /// Of nothing.
    #[must_use]
    pub const fn new() -> Self {
        Self(0xCBF2_9CE4_8422_2325)
    }

    /// Goes on with bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3);
        }
    }

    /// Goes on with a number.
    pub fn number(&mut self, number: u64) {
        self.bytes(&number.to_le_bytes());
    }

    /// Goes on with bytes after their number, so that what comes next cannot be taken for a part of them.
    pub fn field(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.bytes(bytes);
    }
}

impl Default for Digest {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Where a session stands, with all that it needs to go on from there.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// Fingerprint of the model, opaque.
    pub model: String,
    /// Fingerprint of the tokenizer, opaque, where there was one.
    pub tokenizer: Option<String>,
    /// Tokens read, [`MAX_POSITION`] at most.
    pub position: u64,
    /// The state, with its layout. Of a sparse one, a file does not keep the rule.
    pub state: EncodedState,
    /// How often each token was generated, for the penalties.
    pub counts: BTreeMap<u32, u32>,
    /// Logits of the last token, `[V]`, if one was read; bit for bit, finite or not.
    pub logits: Option<Vec<f32>>,
}

/// A file's length, if it is within the limit.
const fn within(bytes: u64) -> Result<u64, Fault> {
    if bytes > FILE_LIMIT { Err(Fault::FileTooLong { bytes }) } else { Ok(bytes) }
}

impl Snapshot {
    /// Writes it to the file at `path`, in the place of any that is there.
    ///
    /// # Errors
    ///
    /// If the file cannot be written or is too long, the layout is empty, or the fingerprints are too long for a header. What was at
    /// `path` is there still, unless it was the folder's sync that failed.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        let path = path.as_ref();
        self.write(path).map_err(|fault| Error { file: path.display().to_string(), fault })
    }

    /// Reads the file at `path`.
    ///
    /// # Errors
    ///
    /// If the file cannot be read, is too long, is not a snapshot, or is damaged.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let open = || {
            let mut file = File::open(path)?;
            let len = within(file.metadata()?.len())?;
            Self::read(&mut file, len)
        };
        open().map_err(|fault| Error { file: path.display().to_string(), fault })
    }

    /// The bytes of its file.
    ///
    /// # Errors
    ///
    /// If the layout is empty, or the fingerprints are too long for a header.
    pub fn to_bytes(&self) -> Result<Vec<u8>, Fault> {
        let (format, layout) = (self.state.format(), self.state.layout());
        let [layers, heads, head_size] = extents(layout)?;
        let mut entries = BTreeMap::from(
            [
                ("format", FORMAT.to_owned()),
                ("version", VERSION.to_string()),
                ("state_format", format.name().to_owned()),
                ("layers", layers.to_string()),
                ("heads", heads.to_string()),
                ("head_size", head_size.to_string()),
                ("position", countable(self.position)?.to_string()),
                ("model", self.model.clone()),
            ]
            .map(|(key, value)| (key.to_owned(), value)),
        );
        entries.extend(self.tokenizer.clone().map(|tokenizer| ("tokenizer".to_owned(), tokenizer)));

        let counts: Vec<u8> =
            self.counts.iter().flat_map(|(t, n)| [t, n]).flat_map(|word| word.to_le_bytes()).collect();
        let logits: Option<Vec<u8>> =
            self.logits.as_ref().map(|logits| logits.iter().flat_map(|v| v.to_le_bytes()).collect());
        let mut tensors = Vec::new();
        let mut rest = self.state.as_bytes();
        let fixed: usize = planes(layout, format, 0).iter().map(Spec::bytes).sum();
        for spec in planes(layout, format, (rest.len() - fixed) / size_of::<f32>()) {
            let (plane, later) = rest.split_at(spec.bytes());
            tensors.push((spec, plane));
            rest = later;
        }
        tensors.push((Spec::counts(self.counts.len()), &counts));
        tensors.extend(logits.iter().map(|bytes| (Spec::logits(bytes.len() / size_of::<f32>()), &bytes[..])));
        entries.insert("checksum".to_owned(), checksum(&entries, &tensors));

        // The widest first, so that each begins at a multiple of its width.
        tensors.sort_by_key(|(spec, _)| Reverse(spec.dtype));
        let (mut end, mut header) =
            (0, vec![format!("\"__metadata__\":{}", serde_json::to_string(&entries)?)]);
        for (Spec { name, dtype, shape }, bytes) in &tensors {
            let start = end;
            end += bytes.len();
            let info = TensorInfo { dtype: *dtype, shape: shape.clone(), data_offsets: (start, end) };
            header.push(format!("\"{name}\":{}", serde_json::to_string(&info)?));
        }
        let mut header = format!("{{{}}}", header.join(",")).into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let bytes = header.len() as u64;
        if bytes > HEADER_LIMIT {
            return Err(Fault::HeaderTooLong { bytes });
        }
        let prefix = bytes.to_le_bytes();
        let data = tensors.into_iter().map(|(_, bytes)| bytes);
        Ok([&prefix[..], &header].into_iter().chain(data).collect::<Vec<_>>().concat())
    }

    /// Reads the bytes of a file.
    ///
    /// # Errors
    ///
    /// If they are not a snapshot, or damaged.
    pub fn from_bytes(mut bytes: &[u8]) -> Result<Self, Fault> {
        let len = bytes.len() as u64;
        Self::read(&mut bytes, len)
    }

    fn write(&self, path: &Path) -> Result<(), Fault> {
        let bytes = self.to_bytes()?;
        within(bytes.len() as u64)?;
        Ok(replace(path, |error| error, |file| file.write_all(&bytes))?)
    }

    /// Reads a file of `len` bytes: its header first, and the rest only if all of it is as the header should say.
    fn read(from: &mut impl Read, len: u64) -> Result<Self, Fault> {
        let fetch = |from: &mut dyn Read, bytes: u64| -> Result<Vec<u8>, Fault> {
            let mut buffer = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
            from.read_exact(&mut buffer)?;
            Ok(buffer)
        };
        if len < 8 {
            return Err(Fault::CutShort { want: 8, got: len });
        }
        let mut prefix = [0; 8];
        from.read_exact(&mut prefix)?;
        let bytes = u64::from_le_bytes(prefix);
        if bytes > HEADER_LIMIT {
            return Err(Fault::HeaderTooLong { bytes });
        }
        if 8 + bytes > len {
            return Err(Fault::CutShort { want: 8 + bytes, got: len });
        }
        let header = fetch(from, bytes)?;
        // Of a name that is there twice, what comes next takes the last and says nothing.
        serde_json::from_slice::<Names>(&header)?;
        // This checks that the tensors lie one after the other and have the bytes of their types and shapes.
        let header: Metadata = serde_json::from_slice(&header)?;
        let entries: BTreeMap<String, String> =
            header.metadata().clone().unwrap_or_default().into_iter().collect();
        let optional = |key: &str| entries.get(key).map(String::as_str);
        let entry = |key| optional(key).ok_or(Fault::MissingEntry { key });
        if optional("format") != Some(FORMAT) {
            return Err(Fault::NotASnapshot);
        }
        match entry("version")? {
            version if version == VERSION.to_string() => {}
            version => return Err(Fault::Version { found: version.to_owned() }),
        }
        let format = StateFormat::from_name(entry("state_format")?)
            .ok_or_else(|| Fault::Entry { key: "state_format", value: entries["state_format"].clone() })?;
        let layout =
            layout(number(&entries, "layers")?, number(&entries, "heads")?, number(&entries, "head_size")?)?;

        let (specs, planes) = specs(&header, &layout, format)?;
        let (want, got) = (8 + bytes + header.data_len() as u64, len);
        if got < want {
            return Err(Fault::CutShort { want, got });
        }
        if got > want {
            return Err(Fault::Trailing { bytes: got - want });
        }
        let data = fetch(from, len - 8 - bytes)?;
        let place = |spec: &Spec| {
            let (start, end) = header.info(&spec.name).map_or((0, 0), |info| info.data_offsets);
            &data[start..end]
        };
        let tensors: Vec<_> = specs.iter().map(|spec| (spec.clone(), place(spec))).collect();
        let (found, expected) = (checksum(&entries, &tensors), entry("checksum")?);
        if found != expected {
            return Err(Fault::Checksum { found, expected: expected.to_owned() });
        }

        let mut bytes = Vec::with_capacity(tensors[..planes].iter().map(|(_, plane)| plane.len()).sum());
        tensors[..planes].iter().for_each(|(_, plane)| bytes.extend_from_slice(plane));
        let words = |bytes: &[u8]| -> Vec<u32> {
            bytes.as_chunks().0.iter().map(|&word| u32::from_le_bytes(word)).collect()
        };
        let mut counts = BTreeMap::new();
        for &[token, count] in words(tensors[planes].1).as_chunks().0 {
            match counts.last_key_value() {
                Some((&before, _)) if before >= token => return Err(Fault::Counts { token, before }),
                _ => counts.insert(token, count),
            };
        }
        let position = countable(number(&entries, "position")?)?;
        let logits =
            tensors.get(planes + 1).map(|(_, bytes)| words(bytes).into_iter().map(f32::from_bits).collect());
        Ok(Self {
            model: entry("model")?.to_owned(),
            tokenizer: optional("tokenizer").map(str::to_owned),
            position,
            state: EncodedState::from_bytes(&layout, format, bytes)?,
            counts,
            logits,
        })
    }
}

/// The names in a header and in its metadata, none of them twice.
struct Names;

impl<'de> Deserialize<'de> for Names {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Self)
    }
}

impl<'de> Visitor<'de> for Names {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self, A::Error> {
        let mut names = BTreeSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<Option<Self>>()?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
            if let Some(name) = names.replace(name) {
                return Err(A::Error::custom(format_args!("{name:?} is there twice")));
            }
        }
        Ok(self)
    }
}

/// A tensor as it should be.
#[derive(Clone, Debug)]
struct Spec {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl Spec {
    fn counts(tokens: usize) -> Self {
        Self { name: "counts".to_owned(), dtype: Dtype::U32, shape: vec![tokens, 2] }
    }

    fn logits(vocab: usize) -> Self {
        Self { name: "logits".to_owned(), dtype: Dtype::F32, shape: vec![vocab] }
    }

    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }

    /// That the file has it so.
    fn check(&self, header: &Metadata) -> Result<(), Fault> {
        let shown = |dtype, shape: &[usize]| format!("{dtype} {shape:?}");
        let (tensor, expected) = (self.name.clone(), shown(self.dtype, &self.shape));
        match header.info(&self.name) {
            None => Err(Fault::MissingTensor { tensor, expected }),
            Some(info) if info.dtype == self.dtype && info.shape == self.shape => Ok(()),
            Some(info) => Err(Fault::Tensor { tensor, found: shown(info.dtype, &info.shape), expected }),
        }
    }
}

/// The planes of a state, in the order of its bytes; `kept` values, if it is sparse.
fn planes(layout: &StateLayout, format: StateFormat, kept: usize) -> Vec<Spec> {
    let of = |part: Part| {
        let shape = layout.shape(part);
        let (&n, rows) = shape.split_last().unwrap_or((&0, &[]));
        let rows_of = |columns: usize| [rows, &[columns]].concat();
        match (format, part) {
            (StateFormat::F32, _) => vec![("", Dtype::F32, shape)],
            (StateFormat::Int8Scaled, Part::Wkv) => vec![
                ("", Dtype::I8, rows_of(n)),
                (".scales", Dtype::F16, rows_of(n.div_ceil(int8::BLOCK))),
                (".exponents", Dtype::I8, rows.to_vec()),
            ],
            (StateFormat::Sparse(_), Part::Wkv) => {
                vec![(".bitmap", Dtype::U8, rows_of(n.div_ceil(8))), (".values", Dtype::F32, vec![kept])]
            }
            _ => vec![("", Dtype::F16, rows_of(n)), (".exponents", Dtype::I8, rows.to_vec())],
        }
    };
    let named = |part: Part| {
        of(part).into_iter().map(move |(plane, dtype, shape)| {
            let name = format!("{}{plane}", part.name());
            Spec { name, dtype, shape }
        })
    };
    Part::ALL.into_iter().flat_map(named).collect()
}

/// The tensors that a file should have, all there: the planes, so many, then the counts, then the logits if it has any.
fn specs(header: &Metadata, layout: &StateLayout, format: StateFormat) -> Result<(Vec<Spec>, usize), Fault> {
    // What the file alone knows: its own extent is right wherever the rank is.
    let first = |name: &str| header.info(name).and_then(|info| info.shape.first().copied());
    let mut specs = planes(layout, format, first("wkv.values").unwrap_or(0));
    let planes = specs.len();
    specs.push(Spec::counts(first("counts").unwrap_or(0)));
    specs.extend(header.info("logits").map(|_| Spec::logits(first("logits").unwrap_or(0))));
    specs.iter().try_for_each(|spec| spec.check(header))?;
    let extra = header.offset_keys().into_iter().find(|name| specs.iter().all(|spec| spec.name != *name));
    match extra {
        Some(tensor) => Err(Fault::ExtraTensor { tensor, format: format.name() }),
        None => Ok((specs, planes)),
    }
}

/// A layout from a file. Its bytes can be counted in any format.
fn layout(layers: usize, heads: usize, head_size: usize) -> Result<StateLayout, Fault> {
    // More than a state has in any format: 4 bytes of a value, and the same again for what lies beside it.
    let most = [layers, heads, head_size, head_size.saturating_add(2), 8];
    if most.contains(&0) || most.into_iter().try_fold(1usize, usize::checked_mul).is_none() {
        return Err(Fault::Extents { layers, heads, head_size });
    }
    let (width, ranks) = (heads * head_size, Ranks { w: 0, a: 0, v: 0, g: 0 });
    let config =
        ModelConfig { n_layers: layers, width, n_heads: heads, head_size, hidden: 0, vocab: 0, ranks };
    Ok(StateLayout::new(&config))
}

/// Layers, heads and head size of a layout that can be read again.
fn extents(of: &StateLayout) -> Result<[usize; 3], Fault> {
    let wkv = of.shape(Part::Wkv);
    let extents = [0, 1, 2].map(|axis| wkv.get(axis).copied().unwrap_or(0));
    layout(extents[0], extents[1], extents[2]).map(|_| extents)
}

/// A position that can be gone on from.
fn countable(position: u64) -> Result<u64, Fault> {
    let fault = || Fault::Entry { key: "position", value: position.to_string() };
    (position <= MAX_POSITION).then_some(position).ok_or_else(fault)
}

fn number<T: std::str::FromStr>(entries: &BTreeMap<String, String>, key: &'static str) -> Result<T, Fault> {
    let value = entries.get(key).ok_or(Fault::MissingEntry { key })?;
    value.parse().map_err(|_| Fault::Entry { key, value: value.clone() })
}

/// Of all entries but itself and of all tensors, in the order of their names.
fn checksum(entries: &BTreeMap<String, String>, tensors: &[(Spec, &[u8])]) -> String {
    let mut digest = Digest::new();
    for (key, value) in entries.iter().filter(|(key, _)| *key != "checksum") {
        digest.field(key.as_bytes());
        digest.field(value.as_bytes());
    }
    let mut tensors: Vec<_> = tensors.iter().collect();
    tensors.sort_by_key(|(spec, _)| spec.name.as_str());
    for (Spec { name, dtype, shape }, bytes) in tensors {
        digest.field(name.as_bytes());
        digest.field(dtype.to_string().as_bytes());
        digest.number(shape.len() as u64);
        shape.iter().for_each(|&extent| digest.number(extent as u64));
        digest.bytes(bytes);
    }
    digest.to_string()
}
