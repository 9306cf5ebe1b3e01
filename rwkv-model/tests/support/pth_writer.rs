//! Writes `.pth` files for tests, as `torch.save` of a dict does: a zip of stored entries around a pickle.

/// A file of contiguous tensors: name, type (`F32`, `F16`, `BF16`, `F64` or `I64`), shape, bytes.
pub(crate) fn write_pth(tensors: &[(String, &str, Vec<usize>, Vec<u8>)]) -> Vec<u8> {
    let views = tensors.iter().enumerate().map(|(key, (name, dtype, shape, _))| {
        let mut stride = vec![1; shape.len()];
        for axis in (1..shape.len()).rev() {
            stride[axis - 1] = stride[axis] * shape[axis].max(1);
        }
        let signed = |values: &[usize]| values.iter().copied().map(fit).collect();
        let (shape, stride) = (signed(shape), signed(&stride));
        View { name: name.clone(), class: class(dtype), key: key.to_string(), start: 0, shape, stride }
    });
    let mut entries = vec![
        ("model/data.pkl".to_owned(), state_dict(&views.collect::<Vec<_>>())),
        ("model/byteorder".to_owned(), b"little".to_vec()),
    ];
    for (key, (.., bytes)) in tensors.iter().enumerate() {
        entries.push((format!("model/data/{key}"), bytes.clone()));
    }
    entries.push(("model/version".to_owned(), b"3\n".to_vec()));
    zip(&entries)
}

fn class(dtype: &str) -> &'static str {
    match dtype {
        "F32" => "FloatStorage",
        "F16" => "HalfStorage",
        "BF16" => "BFloat16Storage",
        "F64" => "DoubleStorage",
        "I64" => "LongStorage",
        _ => panic!("no class of storage for {dtype}"),
    }
}

/// A tensor as a view of a storage.
#[derive(Clone)]
pub(crate) struct View {
    pub(crate) name: String,
    /// The storage's class, in module `torch`.
    pub(crate) class: &'static str,
    /// The storage's key: its entry is `data/KEY`.
    pub(crate) key: String,
    /// The first element.
    pub(crate) start: i64,
    pub(crate) shape: Vec<i64>,
    pub(crate) stride: Vec<i64>,
}

/// The pickle of a dict of tensors, in protocol 2.
pub(crate) fn state_dict(views: &[View]) -> Vec<u8> {
    let mut out = b"\x80\x02}(".to_vec();
    for View { name, class, key, start, shape, stride } in views {
        let elements = shape.iter().fold(1i64, |n, &extent| n.wrapping_mul(extent));
        text(&mut out, name);
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut out, "storage");
        out.extend(format!("ctorch\n{class}\n").bytes());
        text(&mut out, key);
        text(&mut out, "cpu");
        int(&mut out, elements);
        out.extend(b"tQ");
        int(&mut out, *start);
        for values in [shape, stride] {
            out.push(b'(');
            values.iter().for_each(|&value| int(&mut out, value));
            out.push(b't');
        }
        out.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    }
    out.extend(b"u.");
    out
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend(fit::<u32>(text.len()).to_le_bytes());
    out.extend(text.bytes());
}

fn int(out: &mut Vec<u8>, value: i64) {
    out.extend(b"\x8a\x08");
    out.extend(value.to_le_bytes());
}

/// A zip of stored entries. Data begin at multiples of 64, by padding in the local headers alone, as torch's.
pub(crate) fn zip(entries: &[(String, Vec<u8>)]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, bytes) in entries {
        let header: u32 = fit(out.len());
        let name_len: u16 = fit(name.len());
        // from the version needed to the name's length: no flags, method 0, no time
        let mut common = vec![0; 10];
        common.extend(crc32(bytes).to_le_bytes());
        let len = fit::<u32>(bytes.len()).to_le_bytes();
        common.extend([len, len].concat());
        common.extend(name_len.to_le_bytes());

        let padding = 64 - (out.len() + 30 + name.len() + 4) % 64;
        let padding_len: u16 = fit(padding);
        out.extend(b"PK\x03\x04");
        out.extend(&common);
        out.extend((padding_len + 4).to_le_bytes());
        out.extend(name.bytes());
        out.extend(b"FB");
        out.extend(padding_len.to_le_bytes());
        out.extend(std::iter::repeat_n(b'Z', padding));
        out.extend(bytes);

        directory.extend(b"PK\x01\x02\0\0");
        directory.extend(common);
        // no extra field, comment, disk or attributes
        directory.extend([0; 12]);
        directory.extend(header.to_le_bytes());
        directory.extend(name.bytes());
    }
    let count = fit::<u16>(entries.len()).to_le_bytes();
    let (start, len): (u32, u32) = (fit(out.len()), fit(directory.len()));
    out.extend(directory);
    out.extend(b"PK\x05\x06\0\0\0\0");
    out.extend([count, count].concat());
    out.extend(len.to_le_bytes());
    out.extend(start.to_le_bytes());
    out.extend([0; 2]);
    out
}

/// A length in the type that the file gives it.
fn fit<T: TryFrom<usize>>(len: usize) -> T {
    T::try_from(len).ok().expect("test files are small")
}

/// The checksum that torch verifies (ISO 3309, reflected).
fn crc32(bytes: &[u8]) -> u32 {
    let bit = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, &byte| (0..8).fold(crc ^ u32::from(byte), bit))
}
