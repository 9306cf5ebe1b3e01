//! Snapshot files: what was saved is loaded, what is damaged is named, and a save that fails leaves the old file.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use proptest::prelude::*;
use rwkv_state::snapshot::{Digest, FILE_LIMIT, Fault, HEADER_LIMIT, MAX_POSITION};
use rwkv_state::{EncodedState, Part, Snapshot, StateFormat};
use serde_json::{Value, json};
use support::{FORMATS, draw, header_len, layout, snapshot, with_header};

fn any_snapshot() -> impl Strategy<Value = Snapshot> {
    let extents = (1usize..4, 1usize..3, prop::sample::select(vec![1usize, 3, 8, 17, 33]));
    let counts = prop::collection::btree_map(any::<u32>(), any::<u32>(), 0..5);
    let logits = prop::option::of(prop::collection::vec(-1e30f32..1e30, 0..9));
    let rest = (any::<String>(), any::<Option<String>>(), 0..=MAX_POSITION, counts, logits);
    let state = (extents, prop::sample::select(FORMATS.to_vec()), any::<u64>());
    (state, rest).prop_map(|(((l, h, n), format, seed), (model, tokenizer, position, counts, logits))| {
        let state = snapshot(&layout(l, h, n), format, seed).state;
        Snapshot { model, tokenizer, position, state, counts, logits }
    })
}

/// The file with another header, which does not change what lies behind it.
fn edited(file: &[u8], edit: impl FnOnce(&mut Value)) -> Vec<u8> {
    let mut header: Value = serde_json::from_slice(&file[8..header_len(file)]).unwrap();
    edit(&mut header);
    with_header(file, &serde_json::to_vec(&header).unwrap())
}

fn fault(file: &[u8]) -> String {
    Snapshot::from_bytes(file).map(|_| "sound".to_owned()).unwrap_or_else(|fault| fault.to_string())
}

proptest! {
    #[test]
    fn round_trip(snapshot in any_snapshot()) {
        let file = snapshot.to_bytes().unwrap();
        prop_assert_eq!(&Snapshot::from_bytes(&file).unwrap(), &snapshot, "what was written");
        prop_assert_eq!(&snapshot.to_bytes().unwrap(), &file, "the same bytes each time");
    }

    /// A bit that flips is an error, or was in the header and says the same still (a space that became a tab).
    #[test]
    fn flipped_bits_are_found(
        snapshot in any_snapshot(),
        in_header: bool,
        at: prop::sample::Index,
        bit in 0u32..8,
    ) {
        let mut file = snapshot.to_bytes().unwrap();
        let header = header_len(&file);
        let at = if in_header { at.index(header) } else { header + at.index(file.len() - header) };
        file[at] ^= 1 << bit;
        match Snapshot::from_bytes(&file) {
            Ok(found) => {
                prop_assert!(in_header, "byte {} of the tensors", at);
                prop_assert_eq!(found, snapshot, "byte {} of the header", at);
            }
            Err(fault) => {
                prop_assert!(!fault.to_string().is_empty(), "says why");
                prop_assert!(in_header || matches!(fault, Fault::Checksum { .. }), "byte {}: {}", at, fault);
            }
        }
    }

    #[test]
    fn cuts_and_tails_are_found(snapshot in any_snapshot(), to: prop::sample::Index, tail in 1usize..99) {
        let file = snapshot.to_bytes().unwrap();
        let to = to.index(file.len());
        let cut = Snapshot::from_bytes(&file[..to]);
        let named = matches!(cut, Err(Fault::CutShort { want, got }) if got == to as u64 && want > got);
        prop_assert!(named, "cut to {}: {:?}", to, cut);
        let long = [&file[..], &vec![0x20; tail]].concat();
        let named = matches!(Snapshot::from_bytes(&long), Err(Fault::Trailing { bytes }) if bytes == tail as u64);
        prop_assert!(named, "{} bytes more", tail);
    }

    /// Any damage to several bytes, and bytes that never were a snapshot: no panic, and nothing that is not finite.
    #[test]
    fn noise_is_an_error_or_a_state(
        snapshot in any_snapshot(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..9),
        noise in prop::collection::vec(any::<u8>(), 0..99),
    ) {
        let mut file = snapshot.to_bytes().unwrap();
        for (at, byte) in damage {
            let at = at.index(file.len());
            file[at] = byte;
        }
        if let Ok(found) = Snapshot::from_bytes(&file) {
            prop_assert!(found.state.decode().iter().all(|v| v.is_finite()), "{:?}", found);
        }
        prop_assert!(Snapshot::from_bytes(&noise).is_err(), "noise");
        let behind = [&(noise.len() as u64).to_le_bytes()[..], &noise].concat();
        prop_assert!(Snapshot::from_bytes(&behind).is_err(), "noise as a header");
    }

    /// Other numbers in the header, its checksum left as it is.
    #[test]
    fn claims_are_refused(
        format in prop::sample::select(FORMATS.to_vec()),
        key in prop::sample::select(vec!["layers", "heads", "head_size"]),
        claim in prop_oneof![any::<u64>(), 0u64..20, Just(1 << 62), Just(u64::MAX / 8)],
    ) {
        let file = snapshot(&layout(2, 3, 5), format, 1).to_bytes().unwrap();
        let claimed = edited(&file, |header| header["__metadata__"][key] = claim.to_string().into());
        let same = [("layers", 2), ("heads", 3), ("head_size", 5)].contains(&(key, claim));
        prop_assert_eq!(Snapshot::from_bytes(&claimed).is_ok(), same, "{} {}", key, claim);
    }
}

/// The file is what other readers of safetensors take it for, each tensor aligned, in `[layer, head, value, key]`.
#[test]
fn others_can_read_it() {
    let layout = layout(2, 3, 17);
    let state = draw(&layout, 5);
    for format in FORMATS {
        let snapshot = snapshot(&layout, format, 5);
        let file = snapshot.to_bytes().unwrap();
        let (len, metadata) = safetensors::SafeTensors::read_metadata(&file).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
        for (name, view) in tensors.tensors() {
            let start = 8 + len + metadata.info(&name).unwrap().data_offsets.0;
            assert_eq!(start * 8 % view.dtype().bitsize(), 0, "{format:?} {name}: aligned");
        }
        let shape = |name: &str| tensors.tensor(name).unwrap().shape().to_vec();
        match format {
            StateFormat::F32 => {
                for part in Part::ALL {
                    let view = tensors.tensor(part.name()).unwrap();
                    let values: Vec<f32> =
                        view.data().as_chunks().0.iter().map(|&v| f32::from_le_bytes(v)).collect();
                    assert_eq!(view.shape(), layout.shape(part), "{part:?}");
                    assert_eq!(values, state[layout.range(part)], "{part:?}: canonical order");
                }
            }
            StateFormat::F16 => {
                assert_eq!(
                    (shape("wkv"), shape("wkv.exponents")),
                    (vec![2, 3, 17, 17], vec![2, 3, 17]),
                    "f16"
                );
                assert_eq!((shape("att_shift"), shape("att_shift.exponents")), (vec![2, 51], vec![2]), "f16");
            }
            StateFormat::Int8Scaled => assert_eq!(shape("wkv.scales"), [2, 3, 17, 2], "int8"),
            StateFormat::Sparse(_) => assert_eq!(shape("wkv.bitmap"), [2, 3, 17, 3], "sparse"),
        }
        assert_eq!((shape("counts"), shape("logits")), (vec![3, 2], vec![4]), "{format:?}");
    }
}

/// What the file's bytes are is part of the format: a change of them is a change of [`VERSION`](rwkv_state::snapshot).
#[test]
fn the_bytes_stay() {
    let digests = FORMATS.map(|format| {
        let state: Vec<f32> = (0u8..15).map(|v| f32::from(v) / 4.0).collect();
        let state = EncodedState::encode(&layout(1, 1, 3), &state, format).unwrap();
        let (counts, logits) = ([(3, 1)].into(), Some(vec![1.5, -2.0]));
        let snapshot =
            Snapshot { model: "m".to_owned(), tokenizer: None, position: 9, state, counts, logits };
        let mut digest = Digest::new();
        digest.bytes(&snapshot.to_bytes().unwrap());
        digest.to_string()
    });
    let want = ["c37507f3a964ea1d", "4a4b9dc8e11f4529", "381619d2715feafa", "69fdbe4d13ce3835"];
    assert_eq!(digests, want, "version 1");
}

/// The published vectors of FNV-1a.
#[test]
fn digests() {
    for (text, want) in [("", "cbf29ce484222325"), ("a", "af63dc4c8601ec8c"), ("foobar", "85944171f73967e8")]
    {
        let mut digest = Digest::default();
        digest.bytes(text.as_bytes());
        assert_eq!(digest.to_string(), want, "{text:?}");
    }
}

#[test]
fn what_differs_is_named() {
    let file = snapshot(&layout(2, 3, 5), StateFormat::F16, 1).to_bytes().unwrap();
    let entry = |key: &str, value: Value| {
        fault(&edited(&file, |header| match value {
            Value::Null => drop(header["__metadata__"].as_object_mut().unwrap().remove(key)),
            value => header["__metadata__"][key] = value,
        }))
    };
    let tensor = |edit: &dyn Fn(&mut serde_json::Map<String, Value>)| {
        fault(&edited(&file, |header| edit(header.as_object_mut().unwrap())))
    };
    let renamed = |from: &'static str, to: &'static str| {
        tensor(&|header| {
            let info = header.remove(from).unwrap();
            header.insert(to.to_owned(), info);
        })
    };
    let not_a_snapshot = "no snapshot: the metadata do not say `format` is `rwkv-state`";
    let cases = [
        (fault(&edited(&file, |_| ())), "sound"),
        (entry("format", "pt".into()), not_a_snapshot),
        (entry("format", Value::Null), not_a_snapshot),
        (entry("version", "2".into()), "a snapshot of version 2, expected 1"),
        (entry("version", Value::Null), "the metadata have no `version`"),
        (entry("state_format", "int4".into()), "the metadata say `state_format` is \"int4\""),
        (entry("heads", "three".into()), "the metadata say `heads` is \"three\""),
        (entry("heads", "-3".into()), "the metadata say `heads` is \"-3\""),
        (entry("layers", "0".into()), "a state of 0 layers of 3 heads of 5"),
        (
            entry("layers", "4611686018427387904".into()),
            "a state of 4611686018427387904 layers of 3 heads of 5",
        ),
        (entry("layers", "3".into()), "tensor att_shift is F16 [2, 15], expected F16 [3, 15]"),
        (entry("state_format", "f32".into()), "tensor att_shift is F16 [2, 15], expected F32 [2, 15]"),
        (entry("state_format", "int8".into()), "tensor wkv is F16 [2, 3, 5, 5], expected I8 [2, 3, 5, 5]"),
        (entry("state_format", "sparse".into()), "tensor wkv.bitmap is missing, expected U8 [2, 3, 5, 1]"),
        (renamed("ffn_shift", "shift"), "tensor ffn_shift is missing, expected F16 [2, 15]"),
        (renamed("counts", "count"), "tensor counts is missing, expected U32 [0, 2]"),
        (renamed("logits", "wkv.values"), "tensor \"wkv.values\" is none of a snapshot's in the format f16"),
        (
            tensor(&|header| header["counts"]["shape"] = json!([6])),
            "tensor counts is U32 [6], expected U32 [6, 2]",
        ),
        (
            tensor(&|header| header["logits"]["dtype"] = "U32".into()),
            "tensor logits is U32 [4], expected F32 [4]",
        ),
    ];
    for (got, want) in cases {
        assert_eq!(got, want, "facts");
    }
    // Each entry that nothing else checks is under the checksum, and so is the file's saying of it.
    for (key, value) in [("position", "17"), ("model", "x"), ("tokenizer", "x"), ("note", "x")] {
        assert!(entry(key, value.into()).starts_with("the checksum is "), "{key}");
    }
    assert!(entry("tokenizer", Value::Null).starts_with("the checksum is "), "no tokenizer");
    assert_eq!(entry("checksum", Value::Null), "the metadata have no `checksum`", "no checksum");
    assert!(entry("checksum", "0".into()).ends_with(", the file says 0"), "another checksum");
    assert!(renamed("logits", "x").contains("\"x\""), "logits by another name");
    let overlap = tensor(&|header| header["logits"]["data_offsets"] = json!([4, 20]));
    assert!(overlap.starts_with("header: invalid offset for tensor"), "{overlap}");
    for header in ["", "{", "[]", "{}x", r#"{"t":1}"#] {
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
        assert!(matches!(Snapshot::from_bytes(&bytes), Err(Fault::Header(_))), "{header}");
    }
}

/// A name that is there twice would be one thing to one reader and another to the next, whichever comes last.
#[test]
fn no_name_is_there_twice() {
    let file = snapshot(&layout(2, 3, 5), StateFormat::F16, 1).to_bytes().unwrap();
    let header = std::str::from_utf8(&file[8..header_len(&file)]).unwrap();
    let entry = "\"position\":\"9223372036854775807\"";
    let counts = &header[header.find("\"counts\"").unwrap()..];
    let counts = &counts[..=counts.find('}').unwrap()];
    let metadata = &header[header.find("\"__metadata__\"").unwrap()..];
    let metadata = &metadata[..=metadata.find('}').unwrap()];
    let cases = [
        (entry, "\"position\":\"5\"".to_owned(), "position"),
        (entry, entry.to_owned(), "position"),
        (entry, entry.replacen('o', "\\u006f", 1), "position"),
        (counts, counts.replace("[3,2]", "[2,3]"), "counts"),
        (metadata, "\"__metadata__\":null".to_owned(), "__metadata__"),
    ];
    for (there, before, name) in cases {
        let twice = header.replacen(there, &format!("{before},{there}"), 1);
        assert_ne!(twice, header, "{name}: not found");
        let fault = fault(&with_header(&file, twice.as_bytes()));
        assert!(fault.starts_with(&format!("header: {name:?} is there twice at line 1")), "{fault}");
    }
}

/// What a checksum cannot find, because it is right: values that no state has, counts out of order.
#[test]
fn sound_checksums_do_not_excuse() {
    let resealed = |file: Vec<u8>| match Snapshot::from_bytes(&file) {
        Err(Fault::Checksum { found, .. }) => {
            fault(&edited(&file, |header| header["__metadata__"]["checksum"] = found.into()))
        }
        other => panic!("no checksum to mend: {other:?}"),
    };
    let snapshot = snapshot(&layout(1, 1, 2), StateFormat::F32, 1);
    let file = snapshot.to_bytes().unwrap();
    let at = |name: &str| {
        let (len, metadata) = safetensors::SafeTensors::read_metadata(&file).unwrap();
        8 + len + metadata.info(name).unwrap().data_offsets.0
    };
    let with = |name: &str, offset: usize, word: u32| {
        let mut file = file.clone();
        file[at(name) + offset..][..4].copy_from_slice(&word.to_le_bytes());
        resealed(file)
    };
    let nan = with("wkv", 4, f32::NAN.to_bits());
    assert_eq!(nan, "the state: wkv of layer 0, element 1: the value NaN", "not finite");
    assert_eq!(with("counts", 8, 0), "the counts are not in order: token 0 after 0", "twice");
    assert_eq!(with("counts", 0, 9), "the counts are not in order: token 7 after 9", "out of order");
    let mut mended = edited(&file, |header| header["__metadata__"]["position"] = "x".into());
    assert_eq!(resealed(mended), "the metadata say `position` is \"x\"", "position");
    // A session could not count on from there.
    let beyond = MAX_POSITION + 1;
    mended = edited(&file, |header| header["__metadata__"]["position"] = beyond.to_string().into());
    assert_eq!(resealed(mended), format!("the metadata say `position` is \"{beyond}\""), "position");
    let unwritable =
        Snapshot { position: beyond, ..support::snapshot(&layout(1, 1, 4), StateFormat::F32, 1) };
    assert!(matches!(unwritable.to_bytes(), Err(Fault::Entry { key: "position", .. })));
    mended = edited(&file, |header| {
        header["__metadata__"].as_object_mut().unwrap().remove("model");
    });
    assert_eq!(resealed(mended), "the metadata have no `model`", "model");
}

/// A header may claim anything: what is read is what is there.
#[test]
fn memory_is_the_files() {
    let file = snapshot(&layout(1, 1, 4), StateFormat::F32, 1).to_bytes().unwrap();
    let far = 1u64 << 60;
    let claimed = edited(&file, |header| {
        let end = header["logits"]["data_offsets"][1].as_u64().unwrap();
        // The last of all, so that all before it stay where they are.
        assert_eq!(end, (file.len() - header_len(&file) - 24) as u64, "before the counts alone");
        for (name, at, len) in [("logits", end - 16, far), ("counts", end - 16 + far, 24)] {
            header[name]["data_offsets"] = json!([at, at + len]);
        }
        header["logits"]["shape"] = json!([far / 4]);
    });
    assert!(
        matches!(Snapshot::from_bytes(&claimed), Err(Fault::CutShort { want, .. }) if want > far),
        "tensor"
    );
    let long = (HEADER_LIMIT + 1).to_le_bytes();
    assert!(matches!(Snapshot::from_bytes(&long), Err(Fault::HeaderTooLong { .. })), "header");
    let deep = format!(r#"{{"t":{}"#, "[".repeat(60_000));
    let deep = [&(deep.len() as u64).to_le_bytes()[..], deep.as_bytes()].concat();
    assert!(matches!(Snapshot::from_bytes(&deep), Err(Fault::Header(_))), "depth");
}

#[test]
fn what_could_not_be_read_is_not_written() {
    let sound = snapshot(&layout(1, 1, 2), StateFormat::F32, 1);
    let model = "m".repeat(1 << 16);
    let long = Snapshot { model, ..sound.clone() };
    assert!(matches!(long.to_bytes(), Err(Fault::HeaderTooLong { .. })), "fingerprint");
    for layout in [layout(0, 2, 4), layout(2, 0, 4), layout(2, 2, 0)] {
        let state = EncodedState::encode(&layout, &[], StateFormat::F16).unwrap();
        let empty = Snapshot { state, ..sound.clone() };
        assert!(matches!(empty.to_bytes(), Err(Fault::Extents { .. })), "{layout}");
    }
    let bare = Snapshot { tokenizer: None, counts: BTreeMap::new(), logits: None, ..sound };
    assert_eq!(Snapshot::from_bytes(&bare.to_bytes().unwrap()).unwrap(), bare, "nothing but a state");
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn files() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.state");
    let [old, new] = [1, 2].map(|seed| snapshot(&layout(2, 1, 4), StateFormat::Int8Scaled, seed));
    old.save(&path).unwrap();
    assert_eq!(Snapshot::load(&path).unwrap(), old, "the first");
    new.save(&path).unwrap();
    assert_eq!(Snapshot::load(&path).unwrap(), new, "in the place of the first");
    assert_eq!(names(folder.path()), ["a.state"], "and nothing beside it");

    // A folder in the way: the rename fails, after all was written.
    let taken = folder.path().join("folder");
    fs::create_dir(&taken).unwrap();
    fs::write(taken.join("kept"), "").unwrap();
    let error = old.save(&taken).unwrap_err();
    assert!(matches!(error.fault, Fault::Io(_)), "{error}");
    assert!(error.to_string().starts_with(&taken.display().to_string()), "{error}");
    assert_eq!(names(folder.path()), ["a.state", "folder"], "what was written is gone");
    assert_eq!(names(&taken), ["kept"], "and the folder as it was");
    // What cannot be encoded never touches the file.
    let model = "m".repeat(1 << 16);
    assert!(Snapshot { model, ..old.clone() }.save(&path).is_err(), "too long");
    assert_eq!(Snapshot::load(&path).unwrap(), new, "the old file");

    let missing = folder.path().join("nowhere/b.state");
    assert!(matches!(old.save(&missing).unwrap_err().fault, Fault::Io(_)), "no folder");
    assert!(matches!(Snapshot::load(&missing).unwrap_err().fault, Fault::Io(_)), "no file");
    assert!(Snapshot::load(&taken).is_err(), "a folder is no snapshot");
    let short = folder.path().join("short");
    fs::write(&short, [0; 5]).unwrap();
    assert!(
        matches!(Snapshot::load(&short).unwrap_err().fault, Fault::CutShort { want: 8, got: 5 }),
        "five bytes"
    );
}

/// A file in use is never written into: whoever has it open reads the old one to its end.
#[cfg(unix)]
#[test]
fn the_old_file_is_not_touched() {
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.state");
    let [old, new] = [1, 2].map(|seed| snapshot(&layout(2, 1, 4), StateFormat::F16, seed));
    old.save(&path).unwrap();
    let mut open = fs::File::open(&path).unwrap();
    new.save(&path).unwrap();
    let mut bytes = Vec::new();
    open.read_to_end(&mut bytes).unwrap();
    assert_eq!(Snapshot::from_bytes(&bytes).unwrap(), old, "as it was opened");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o077, 0, "for its owner alone");

    // A folder that may not be written (the superuser may anyway).
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o555)).unwrap();
    let saved = old.save(&path).is_ok();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(Snapshot::load(&path).unwrap(), if saved { old } else { new }, "one or the other");
}

/// A file that is too long is refused by its length, before any of it is read.
#[test]
fn a_file_that_is_too_long() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.state");
    snapshot(&layout(1, 1, 2), StateFormat::F32, 1).save(&path).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    for (bytes, too_long) in [(FILE_LIMIT, false), (FILE_LIMIT + 1, true), (1 << 40, true)] {
        // It takes no room on a disk: what was never written is a hole.
        file.set_len(bytes).unwrap();
        let fault = Snapshot::load(&path).unwrap_err().fault;
        let found = matches!(fault, Fault::FileTooLong { bytes: found } if found == bytes);
        assert_eq!(found, too_long, "{bytes} bytes: {fault}");
    }
}
