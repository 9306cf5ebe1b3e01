//! Damaged snapshots: each is refused by a typed error, from bytes, from a file and from a store, in bounded memory.
//!
//! The snapshots are small; the allocator of this test refuses more than [`LIMIT`] bytes in all, which ends the test.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::alloc::System;
use std::fs;

use cap::Cap;
use rwkv_core::rng::SplitMix64;
use rwkv_state::snapshot::{Fault, HEADER_LIMIT};
use rwkv_state::{Snapshot, StateFormat};
use serde_json::Value;
use support::{FORMATS, header_len, layout, snapshot, with_header};

const LIMIT: usize = 32 << 20;

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, LIMIT);

/// Files of each kind of damage.
const FILES: usize = 800;

/// Draws where and how.
struct Draw(SplitMix64);

impl Draw {
    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.0.next_u64() % n.max(1) as u64).unwrap()
    }

    fn byte(&mut self) -> u8 {
        self.0.next_u64().to_le_bytes()[0]
    }

    fn one_of<T: Clone>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())].clone()
    }

    /// A number that a file may claim.
    fn claim(&mut self) -> u64 {
        let near = self.0.next_u64() % 100;
        let any = self.0.next_u64();
        self.one_of(&[
            near,
            any,
            any >> 32,
            u64::MAX,
            u64::MAX - near,
            1 << 63,
            1 << 62,
            1 << 40,
            HEADER_LIMIT,
        ])
    }
}

/// Damages the file of a snapshot.
type Damage = fn(&mut Vec<u8>, &mut Draw);

/// Every kind. All leave a checksum that is no longer right, but for the last.
const KINDS: [(&str, Damage); 18] = [
    ("a bit", |file, draw| {
        let at = draw.below(file.len());
        flip(file, at, draw);
    }),
    ("a bit of the header or its length", |file, draw| {
        let at = draw.below(header_len(file));
        flip(file, at, draw);
    }),
    ("a bit of the checksum", |file, draw| {
        let at = find(file, "\"checksum\"") + draw.below(30);
        flip(file, at, draw);
    }),
    ("bytes", |file, draw| {
        for _ in 0..=draw.below(8) {
            let at = draw.below(file.len());
            file[at] = draw.byte();
        }
    }),
    ("a block", |file, draw| {
        let (from, to) = range(file, draw);
        let fill = draw.one_of(&[0, 0xFF]);
        file[from..to].fill(fill);
    }),
    ("cut short", |file, draw| file.truncate(draw.below(file.len()))),
    ("a tail", |file, draw| {
        for _ in 0..=draw.below(40) {
            file.push(draw.byte());
        }
    }),
    ("bytes more", |file, draw| {
        let (at, n) = (draw.below(file.len()), 1 + draw.below(16));
        drop(file.splice(at..at, (0..n).map(|_| draw.byte())));
    }),
    ("bytes less", |file, draw| {
        let (from, to) = range(file, draw);
        drop(file.drain(from..to));
    }),
    ("two sections swapped", |file, draw| {
        let len = 1 + draw.below(file.len() / 3);
        let first = draw.below(file.len() - 2 * len);
        let second = first + len + draw.below(file.len() - 2 * len - first);
        let (before, after) = file.split_at_mut(second);
        before[first..first + len].swap_with_slice(&mut after[..len]);
    }),
    ("two planes swapped", |file, draw| {
        // Of the same extent, so that the header is as good as before.
        let tail = draw.one_of(&["data_offsets", "dtype"]);
        edit(file, |header| {
            let [a, b] = ["att_shift", "ffn_shift"].map(|name| header[name]["data_offsets"].clone());
            (header["att_shift"]["data_offsets"], header["ffn_shift"]["data_offsets"]) = (b, a);
            if tail == "dtype" {
                header["att_shift"]["dtype"] = "U32".into();
            }
        });
    }),
    ("the header's length", |file, draw| {
        let length = match draw.below(3) {
            0 => (header_len(file) as u64).wrapping_add(draw.claim() % 40).wrapping_sub(28),
            _ => draw.claim(),
        };
        file[..8].copy_from_slice(&length.to_le_bytes());
    }),
    ("a number that is claimed", |file, draw| {
        let claim: Value = draw.claim().into();
        let (tensor, field) =
            (draw.one_of(&["att_shift", "wkv", "counts", "logits"]), draw.one_of(&["shape", "data_offsets"]));
        let at = draw.below(2);
        edit(file, |header| {
            let Some(list) = header.get_mut(tensor).and_then(|info| info[field].as_array_mut()) else {
                return drop(header.as_object_mut().unwrap().remove("counts"));
            };
            let at = at.min(list.len() - 1);
            list[at] = claim;
        });
    }),
    ("an entry", |file, draw| {
        let key = draw.one_of(&[
            "layers",
            "heads",
            "head_size",
            "position",
            "model",
            "tokenizer",
            "state_format",
            "more",
        ]);
        let value =
            [draw.claim().to_string(), draw.0.next_u64().to_string(), "f16 ".to_owned(), String::new()];
        let value = draw.one_of(&value);
        edit(file, |header| header["__metadata__"][key] = value.into());
    }),
    ("an entry or a tensor less", |file, draw| {
        let names = [
            "format",
            "version",
            "layers",
            "position",
            "model",
            "tokenizer",
            "checksum",
            "att_shift",
            "counts",
            "logits",
        ];
        let name = draw.one_of(&names);
        edit(file, |header| {
            if header.as_object_mut().unwrap().remove(name).is_none() {
                header["__metadata__"].as_object_mut().unwrap().remove(name);
            }
        });
    }),
    ("a name twice", |file, draw| {
        let mut header = String::from_utf8(file[8..header_len(file)].to_vec()).unwrap();
        // Behind what opens the object, so that the last of the two is the right one.
        let (open, names) = draw.one_of(&[
            (
                "{\"__metadata__\"",
                [
                    "\"__metadata__\":{},",
                    "\"logits\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[0,1]},",
                ],
            ),
            ("{\"checksum\"", ["\"model\":\"another\",", "\"position\":\"5\","]),
        ]);
        let (at, name) = (header.find(open).unwrap() + 1, draw.one_of(&names));
        header.insert_str(at, name);
        *file = with_header(file, header.as_bytes());
    }),
    ("another version", |file, draw| {
        let version = [
            "0".to_owned(),
            "01".to_owned(),
            "1 ".to_owned(),
            "1.0".to_owned(),
            String::new(),
            draw.claim().to_string(),
        ];
        let version = draw.one_of(&version);
        edit(file, |header| {
            header["__metadata__"]["version"] = if version == "1" { "2".into() } else { version.into() }
        });
    }),
    ("what no state is, under a right checksum", |file, draw| {
        let word =
            draw.one_of(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]).to_bits() | u32::from(draw.byte());
        *file = snapshot(&layout(1, 1, 4), StateFormat::F32, draw.0.next_u64()).to_bytes().unwrap();
        let header: Value = serde_json::from_slice(&file[8..header_len(file)]).unwrap();
        let offset = |name: &str| usize::try_from(header[name]["data_offsets"][0].as_u64().unwrap()).unwrap();
        let (at, word) = match draw.below(3) {
            0 => {
                // The three tokens are 0, 7 and the last there is: another's in the place of one.
                let (place, other) = (draw.below(3), 1 + draw.below(2));
                (offset("counts") + 8 * place, [0, 7, u32::MAX][(place + other) % 3])
            }
            _ => (offset("wkv") + 4 * draw.below(16), word),
        };
        let at = header_len(file) + at;
        file[at..at + 4].copy_from_slice(&word.to_le_bytes());
        if let Err(Fault::Checksum { found, .. }) = Snapshot::from_bytes(file) {
            edit(file, |header| header["__metadata__"]["checksum"] = found.into());
        }
    }),
];

fn flip(file: &mut [u8], at: usize, draw: &mut Draw) {
    file[at] ^= 1 << draw.below(8);
}

fn range(file: &[u8], draw: &mut Draw) -> (usize, usize) {
    let from = draw.below(file.len());
    (from, (from + 1 + draw.below(64)).min(file.len()))
}

fn find(file: &[u8], text: &str) -> usize {
    file.windows(text.len()).position(|window| window == text.as_bytes()).unwrap()
}

fn edit(file: &mut Vec<u8>, edit: impl FnOnce(&mut Value)) {
    let mut header: Value = serde_json::from_slice(&file[8..header_len(file)]).unwrap();
    edit(&mut header);
    *file = with_header(file, &serde_json::to_vec(&header).unwrap());
}

/// Calls with each damaged file, and says of what kind it is.
fn each_damaged(mut each: impl FnMut(&str, &[u8])) {
    let sound = FORMATS.map(|format| snapshot(&layout(2, 2, 5), format, 1).to_bytes().unwrap());
    let mut draw = Draw(SplitMix64::new(7));
    for (kind, damage) in KINDS {
        for n in 0..FILES {
            let whole = &sound[n % sound.len()];
            let mut file = whole.clone();
            while file == *whole {
                damage(&mut file, &mut draw);
            }
            each(kind, &file);
        }
    }
}

#[test]
fn damaged_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.state");
    let mut refused = 0;
    each_damaged(|kind, file| {
        let fault = match Snapshot::from_bytes(file) {
            Ok(found) => panic!("{kind}: taken for {found:?}"),
            Err(fault) => fault.to_string(),
        };
        // By its version and not by its checksum, which one that is sound would have right.
        assert!(kind != "another version" || fault.starts_with("a snapshot of version "), "{fault}");
        fs::write(&path, file).unwrap();
        let error = Snapshot::load(&path).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("{}: {fault}", path.display()),
            "{kind}: the same from the file"
        );
        refused += 1;
    });
    assert!(refused >= 10_000, "only {refused} files");
}

#[cfg(feature = "object-store")]
#[test]
fn damaged_objects_are_refused() {
    use std::sync::Arc;

    use rwkv_state::StateStore;
    use rwkv_state::store::object_store::ObjectStoreExt;
    use rwkv_state::store::object_store::memory::InMemory;
    use rwkv_state::store::object_store::path::Path;
    use rwkv_state::store::{Error, ObjectStore};

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.state");
    let service = Arc::new(InMemory::new());
    let local = ObjectStore::local(folder.path()).unwrap();
    let remote = ObjectStore::new(service.clone(), Path::ROOT).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let mut refused = 0;
    each_damaged(|kind, file| {
        let fault = Snapshot::from_bytes(file).unwrap_err().to_string();
        fs::write(&path, file).unwrap();
        runtime.block_on(service.put(&Path::from("a.state"), file.to_vec().into())).unwrap();
        for store in [&local, &remote] {
            match store.get("a") {
                Err(Error::Damaged { key, fault: found }) => {
                    assert_eq!((key.as_str(), found.to_string()), ("a", fault.clone()), "{kind}");
                }
                other => panic!("{kind}: {other:?}"),
            }
        }
        refused += 1;
    });
    assert!(refused >= 10_000, "only {refused} objects");
}
