//! Stores: what was put is got, keys are no paths, bounds hold, and each error is the one that is promised.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::collections::BTreeMap;

use proptest::prelude::*;
use rwkv_state::snapshot::Fault;
use rwkv_state::store::{ENTRY_OVERHEAD, Error, KEY_LIMIT, KeyFault, MemoryStore, check_key};
use rwkv_state::{EncodedState, Snapshot, StateFormat, StateStore};
use support::{layout, snapshot};

/// One of any number of small ones.
fn nth(n: u64) -> Snapshot {
    Snapshot { position: n, ..snapshot(&layout(1, 1, 2), StateFormat::F16, n % 7) }
}

/// A snapshot whose file has at least so many bytes.
fn sized(bytes: usize, n: u64) -> Snapshot {
    Snapshot { logits: Some(vec![0.5; bytes / 4]), ..nth(n) }
}

/// What a memory store counts for it.
fn cost(key: &str, snapshot: &Snapshot) -> usize {
    snapshot.to_bytes().unwrap().len() + key.len() + ENTRY_OVERHEAD
}

/// A snapshot that cannot be written.
fn unwritable() -> Snapshot {
    Snapshot { model: "m".repeat(1 << 16), ..nth(0) }
}

/// What holds of every store.
fn contract(store: &dyn StateStore) {
    let missing = |key: &str| matches!(store.get(key), Err(Error::Missing { key: named }) if named == key);
    assert!(missing("a"), "at first");
    assert!(!store.contains("a").unwrap(), "at first");
    store.remove("a").unwrap();

    store.put("a", &nth(1)).unwrap();
    store.put("a.b", &nth(2)).unwrap();
    assert_eq!(store.get("a").unwrap(), nth(1), "what was put");
    assert_eq!(store.get("a.b").unwrap(), nth(2), "under each key");
    assert!(store.contains("a").unwrap() && store.contains("a.b").unwrap(), "both");
    assert!(missing("b") && missing("a.state") && missing("a.b.state"), "no other");
    store.put("a", &nth(3)).unwrap();
    assert_eq!(store.get("a").unwrap(), nth(3), "in the place of the first");
    assert_eq!(store.get("a.b").unwrap(), nth(2), "and of no other");

    let error = store.put("a", &unwritable()).unwrap_err();
    assert!(
        matches!(&error, Error::Unwritable { key, fault: Fault::HeaderTooLong { .. } } if key == "a"),
        "{error}"
    );
    assert!(error.to_string().starts_with("a: cannot be written: a header of "), "{error}");
    assert_eq!(store.get("a").unwrap(), nth(3), "as it was");

    store.remove("a").unwrap();
    assert!(missing("a") && !store.contains("a").unwrap(), "removed");
    assert_eq!(store.get("a.b").unwrap(), nth(2), "alone");
    store.remove("a").unwrap();
    store.put("a", &nth(4)).unwrap();
    assert_eq!(store.get("a").unwrap(), nth(4), "again");

    let longest = "k".repeat(KEY_LIMIT);
    store.put(&longest, &nth(5)).unwrap();
    assert_eq!(store.get(&longest).unwrap(), nth(5), "the longest key");
    for (key, fault) in no_keys() {
        let named = |error: Error| matches!(error, Error::Key { fault: found, .. } if found == fault);
        assert!(named(store.put(&key, &nth(1)).unwrap_err()), "put {key:?}");
        assert!(named(store.get(&key).unwrap_err()), "get {key:?}");
        assert!(named(store.remove(&key).unwrap_err()), "remove {key:?}");
        assert!(named(store.contains(&key).unwrap_err()), "contains {key:?}");
    }
}

/// Texts that are no keys, and why.
fn no_keys() -> Vec<(String, KeyFault)> {
    let character = |key: &str, at, found| (key.to_owned(), KeyFault::Character { at, found });
    let end = |key: &str, found| (key.to_owned(), KeyFault::End { found });
    vec![
        (String::new(), KeyFault::Empty),
        ("k".repeat(KEY_LIMIT + 1), KeyFault::TooLong { bytes: KEY_LIMIT + 1 }),
        ("/".repeat(1 << 20), KeyFault::TooLong { bytes: 1 << 20 }),
        end("..", '.'),
        end(".", '.'),
        end(".hidden", '.'),
        end("a.", '.'),
        end("-rf", '-'),
        end("a_", '_'),
        character("../a", 2, '/'),
        character("/etc/passwd", 0, '/'),
        character("a/b", 1, '/'),
        character("a\\b", 1, '\\'),
        character("c:a", 1, ':'),
        character("a%2fb", 1, '%'),
        character("a#1", 1, '#'),
        character("a b", 1, ' '),
        character("a\0", 1, '\0'),
        character("a\n", 1, '\n'),
        character("aA", 1, 'A'),
        character("caf\u{e9}", 3, '\u{e9}'),
        character("*", 0, '*'),
    ]
}

#[test]
fn keys() {
    for key in ["a", "7", "a.b", "a..b", "user-17_0.x", "0123456789abcdef", &"k".repeat(KEY_LIMIT)] {
        assert!(check_key(key).is_ok(), "{key}");
    }
    for (key, fault) in no_keys() {
        match check_key(&key) {
            Err(Error::Key { key: named, fault: found }) => {
                assert_eq!(found, fault, "{key:?}");
                assert!(key.starts_with(&named) && named.len() <= KEY_LIMIT, "no more than that");
            }
            other => panic!("{key:?}: {other:?}"),
        }
    }
    let says = |key: &str| check_key(key).unwrap_err().to_string();
    assert_eq!(says(""), "the key \"\" is empty", "says");
    assert_eq!(
        says("a/b"),
        "the key \"a/b\" has '/' at byte 1, which is none of a to z, 0 to 9, `-`, `_` and `.`",
        "says"
    );
    assert_eq!(says(".."), "the key \"..\" begins or ends with '.', which is no letter or digit", "says");
    assert!(says(&"k".repeat(200)).ends_with(" has 200 bytes, above the limit of 128"), "says");
}

#[test]
fn memory() {
    contract(&MemoryStore::new(1 << 20));
    // The contents are none of a log's business.
    let store = MemoryStore::new(10_000);
    store.put("a", &nth(1)).unwrap();
    let used = cost("a", &nth(1));
    assert_eq!(
        format!("{store:?}"),
        format!("MemoryStore {{ bound: 10000, used: {used}, len: 1 }}"),
        "debug"
    );
}

/// What cannot fit is refused before anything makes room for it, and does not remove what it would have replaced.
#[test]
fn what_is_larger_than_the_bound_evicts_nothing() {
    let each = cost("a", &nth(1));
    let store = MemoryStore::new(2 * each);
    store.put("a", &nth(1)).unwrap();
    store.put("b", &nth(2)).unwrap();
    let large = sized(2 * each, 3);
    for key in ["a", "c"] {
        let want = cost(key, &large) as u64;
        match store.put(key, &large) {
            Err(error @ Error::TooLarge { bytes, limit, .. }) => {
                assert_eq!((bytes, limit), (want, 2 * each as u64), "{key}");
                let says = format!("{key}: {want} bytes, above the store's limit of {limit}");
                assert_eq!(error.to_string(), says, "{key}");
            }
            other => panic!("{key}: {other:?}"),
        }
    }
    assert_eq!((store.get("a").unwrap(), store.get("b").unwrap()), (nth(1), nth(2)), "both as they were");
    assert_eq!((store.used(), store.len(), store.bound()), (2 * each, 2, 2 * each), "full");
    // One that fits exactly does fit.
    let exact = MemoryStore::new(cost("a", &large));
    exact.put("a", &large).unwrap();
    assert_eq!((exact.used(), exact.is_empty()), (exact.bound(), false), "to the byte");
    let short = MemoryStore::new(cost("a", &large) - 1);
    assert!(matches!(short.put("a", &large), Err(Error::TooLarge { .. })), "a byte less");
    assert!(short.is_empty(), "and nothing in it");
}

/// What a program does with a store.
#[derive(Clone, Debug)]
enum Use {
    Put { key: usize, bytes: usize },
    Get(usize),
    Remove(usize),
    Contains(usize),
}

fn any_use() -> impl Strategy<Value = Use> {
    prop_oneof![
        4 => (0usize..9, 0usize..4_000).prop_map(|(key, bytes)| Use::Put { key, bytes }),
        3 => (0usize..9).prop_map(Use::Get),
        1 => (0usize..9).prop_map(Use::Remove),
        1 => (0usize..9).prop_map(Use::Contains),
    ]
}

/// A list of what is there, that which was used last at its end.
#[derive(Default)]
struct Model(Vec<(usize, Snapshot)>);

impl Model {
    fn used(&self) -> usize {
        self.0.iter().map(|(key, snapshot)| cost(&name(*key), snapshot)).sum()
    }

    fn take(&mut self, key: usize) -> Option<Snapshot> {
        let at = self.0.iter().position(|(there, _)| *there == key)?;
        Some(self.0.remove(at).1)
    }
}

/// Keys of different lengths.
fn name(key: usize) -> String {
    "k".repeat(1 + 10 * key)
}

proptest! {
    /// The same as the list, whatever is done: contents, order of leaving, and what is counted.
    #[test]
    fn memory_is_as_the_model(bound in 0usize..12_000, uses in prop::collection::vec(any_use(), 1..80)) {
        let (store, mut model) = (MemoryStore::new(bound), Model::default());
        for (n, what) in (0u64..).zip(&uses) {
            match *what {
                Use::Put { key, bytes } => {
                    let snapshot = sized(bytes, n);
                    let fits = cost(&name(key), &snapshot) <= bound;
                    prop_assert_eq!(store.put(&name(key), &snapshot).is_ok(), fits, "{:?}", what);
                    if fits {
                        model.take(key);
                        while model.used() + cost(&name(key), &snapshot) > bound {
                            model.0.remove(0);
                        }
                        model.0.push((key, snapshot));
                    }
                }
                Use::Get(key) => {
                    let want = model.take(key);
                    model.0.extend(want.iter().map(|snapshot| (key, snapshot.clone())));
                    match store.get(&name(key)) {
                        Err(Error::Missing { .. }) => prop_assert!(want.is_none(), "lost: {:?}", what),
                        got => prop_assert_eq!(got.ok(), want, "{:?}", what),
                    }
                }
                Use::Remove(key) => {
                    store.remove(&name(key)).unwrap();
                    model.take(key);
                }
                Use::Contains(key) => {
                    let want = model.0.iter().any(|(there, _)| *there == key);
                    prop_assert_eq!(store.contains(&name(key)).unwrap(), want, "{:?}", what);
                }
            }
            prop_assert!(store.used() <= bound, "{} of {}", store.used(), bound);
            prop_assert_eq!((store.used(), store.len()), (model.used(), model.0.len()), "after {:?}", what);
        }
        for (key, snapshot) in model.0 {
            prop_assert_eq!(store.get(&name(key)).unwrap(), snapshot, "in the end");
        }
    }
}

/// What each of several threads gets is what one of them put there, and the bound holds for whoever looks.
fn by_several_threads(store: &dyn StateStore, rounds: u64, look: &(dyn Fn() + Sync)) {
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || {
                for round in 0..rounds {
                    // Each key has its own snapshots: the position tells the key.
                    let key = (thread + round) % 5;
                    store.put(&format!("k{key}"), &nth(1_000 * round + key)).unwrap();
                    match store.get(&format!("k{key}")) {
                        Ok(got) => {
                            assert_eq!(got, nth(got.position), "whole");
                            assert_eq!(got.position % 1_000, key, "of this key");
                        }
                        Err(Error::Missing { .. }) => {}
                        Err(error) => panic!("k{key}: {error}"),
                    }
                    store.remove(&format!("k{}", (key + 1) % 5)).unwrap();
                    look();
                }
            });
        }
    });
}

#[test]
fn memory_by_several_threads() {
    let store = MemoryStore::new(3 * cost("k0", &nth(1)));
    by_several_threads(&store, 500, &|| assert!(store.used() <= store.bound(), "{store:?}"));
    let there = (0..5).filter(|key| store.contains(&format!("k{key}")).unwrap()).count();
    assert_eq!(there, store.len(), "nothing else is left");
}

/// A state of every format, and one without anything beside it, are stored as they are.
#[test]
fn every_snapshot() {
    let store = MemoryStore::new(1 << 20);
    for format in support::FORMATS {
        let full = snapshot(&layout(2, 2, 17), format, 3);
        let bare = Snapshot { tokenizer: None, counts: BTreeMap::new(), logits: None, ..full.clone() };
        for snapshot in [full, bare] {
            store.put("a", &snapshot).unwrap();
            assert_eq!(store.get("a").unwrap(), snapshot, "{format:?}");
        }
    }
    let empty = layout(0, 2, 4);
    let state = EncodedState::encode(&empty, &[], StateFormat::F16).unwrap();
    let error = store.put("b", &Snapshot { state, ..nth(1) }).unwrap_err();
    assert!(matches!(error, Error::Unwritable { fault: Fault::Extents { .. }, .. }), "{error}");
}

#[cfg(feature = "object-store")]
mod objects {
    use std::fs;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use async_trait::async_trait;
    use futures_util::StreamExt;
    use futures_util::stream::{self, BoxStream};
    use rwkv_state::store::object_store::path::Path;
    use rwkv_state::store::object_store::{self, memory::InMemory};
    use rwkv_state::store::object_store::{
        CopyOptions, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
        ObjectStore as Objects, ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult,
        Result,
    };
    use rwkv_state::store::{OBJECT_LIMIT, ObjectStore, STALE};

    use super::*;

    fn local(folder: &tempfile::TempDir) -> ObjectStore {
        ObjectStore::local(folder.path().join("states")).unwrap()
    }

    #[test]
    fn a_directory() {
        let folder = tempfile::tempdir().unwrap();
        contract(&local(&folder));
        // The same directory, opened anew, as on another day.
        assert_eq!(local(&folder).get("a").unwrap(), nth(4), "still there");
    }

    /// What puts left that were killed long ago goes, and nothing else.
    #[test]
    fn a_directory_is_swept() {
        let folder = tempfile::tempdir().unwrap();
        local(&folder).put("a", &nth(1)).unwrap();
        let states = folder.path().join("states");
        let (now, hour) = (std::time::SystemTime::now(), STALE);
        let left = |name: &str, at: std::time::SystemTime| {
            let file = fs::File::create(states.join(name)).unwrap();
            file.set_modified(at).unwrap();
        };
        let old = now - 2 * hour;
        ["a.state#1", "a.state#27", "b.c.state#2"].into_iter().for_each(|name| left(name, old));
        let kept = ["A.state#1", "a.state#", "a.state#x", "a.state", "a#1", ".state#1", "notes"];
        kept[..3].iter().chain(&kept[4..]).for_each(|name| left(name, old));
        left("fresh.state#1", now - hour / 2);
        left("later.state#1", now + 2 * hour);
        fs::create_dir(states.join("d.state#1")).unwrap();
        assert_eq!(local(&folder).get("a").unwrap(), nth(1), "still there");
        let entries = fs::read_dir(&states).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        let mut want: Vec<_> = kept.iter().chain(&["fresh.state#1", "later.state#1", "d.state#1"]).collect();
        names.sort();
        want.sort();
        assert_eq!(names.iter().collect::<Vec<_>>(), want, "what is left");
    }

    #[test]
    fn a_service() {
        let service = Arc::new(InMemory::new());
        let store = |prefix: &str| ObjectStore::new(service.clone(), Path::from(prefix)).unwrap();
        contract(&store("states/here"));
        contract(&store(""));
        assert_eq!(store("states/here").get("a").unwrap(), nth(4), "by any store of the prefix");
        assert!(matches!(store("states").get("a"), Err(Error::Missing { .. })), "and by no other");
        let shown = format!("{:?}", store("states/here"));
        let want = "ObjectStore { objects: InMemory, prefix: \"states/here\", limit: 268435456, .. }";
        assert_eq!((shown.as_str(), OBJECT_LIMIT), (want, 268_435_456), "debug");
    }

    #[test]
    fn by_several_threads() {
        let folder = tempfile::tempdir().unwrap();
        super::by_several_threads(&local(&folder), 20, &|| ());
        let service = ObjectStore::new(Arc::new(InMemory::new()), Path::ROOT).unwrap();
        super::by_several_threads(&service, 200, &|| ());
    }

    /// An object is the file that a save writes, either way.
    #[test]
    fn objects_are_files() {
        let folder = tempfile::tempdir().unwrap();
        let store = local(&folder);
        store.put("a", &nth(1)).unwrap();
        assert_eq!(Snapshot::load(folder.path().join("states/a.state")).unwrap(), nth(1), "from the store");
        nth(2).save(folder.path().join("states/b.state")).unwrap();
        assert_eq!(store.get("b").unwrap(), nth(2), "to the store");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = fs::metadata(folder.path().join("states")).unwrap().permissions().mode();
            assert_eq!(mode & 0o077, 0, "made for its owner alone");
        }
    }

    /// What a put that was killed leaves is nobody's, and in nobody's way.
    #[test]
    fn what_is_left_over_is_ignored() {
        let folder = tempfile::tempdir().unwrap();
        let store = local(&folder);
        for n in 1..4 {
            fs::write(folder.path().join(format!("states/a.state#{n}")), "half of").unwrap();
        }
        assert!(!store.contains("a").unwrap(), "no object");
        contract(&store);
        assert_eq!(fs::read(folder.path().join("states/a.state#2")).unwrap(), b"half of", "nor touched");
        assert!(!folder.path().join("states/a.state#4").exists(), "a put removes its own");
    }

    #[test]
    fn damage_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let store = local(&folder);
        store.put("a", &nth(1)).unwrap();
        let path = folder.path().join("states/a.state");
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, &bytes).unwrap();
        let error = store.get("a").unwrap_err();
        assert!(
            matches!(&error, Error::Damaged { key, fault: Fault::Checksum { .. } } if key == "a"),
            "{error}"
        );
        assert!(error.to_string().starts_with("a: the checksum is "), "{error}");
        assert!(store.contains("a").unwrap(), "there all the same");
        fs::write(&path, "").unwrap();
        let cut = store.get("a");
        assert!(
            matches!(cut, Err(Error::Damaged { fault: Fault::CutShort { want: 8, got: 0 }, .. })),
            "{cut:?}"
        );
        store.put("a", &nth(2)).unwrap();
        assert_eq!(store.get("a").unwrap(), nth(2), "mended");
    }

    #[test]
    fn what_the_system_refuses() {
        let folder = tempfile::tempdir().unwrap();
        // A directory in the way of the object.
        let store = local(&folder);
        fs::create_dir_all(folder.path().join("states/a.state/b")).unwrap();
        let failed = |error: Error| matches!(&error, Error::Failed { key, .. } if key == "a" && error.to_string().starts_with("a: "));
        assert!(failed(store.put("a", &nth(1)).unwrap_err()), "put");
        assert!(matches!(store.get("a"), Err(Error::Missing { .. })), "a directory is no object");
        assert!(failed(store.remove("a").unwrap_err()), "remove");
        assert!(!folder.path().join("states/a.state#1").exists(), "what was written is gone");
        assert!(folder.path().join("states/a.state/b").is_dir(), "and the directory as it was");
        // A directory that went away: a put makes it again, and a service would not say more.
        fs::remove_dir_all(folder.path().join("states")).unwrap();
        assert!(matches!(store.get("a"), Err(Error::Missing { .. })), "nothing");

        let nowhere = folder.path().join("no/where");
        for place in [nowhere, folder.path().join("file")] {
            fs::write(folder.path().join("file"), "").unwrap();
            let error = ObjectStore::local(&place).unwrap_err();
            let says = format!("opening {}: ", place.display());
            assert!(matches!(error, Error::Open { .. }) && error.to_string().starts_with(&says), "{error}");
        }
    }

    #[test]
    fn what_is_larger_than_the_limit() {
        let folder = tempfile::tempdir().unwrap();
        let (store, large) = (local(&folder), sized(5_000, 1));
        let bytes = large.to_bytes().unwrap().len() as u64;
        store.put("a", &large).unwrap();
        let refused = |outcome: Result<(), Error>, limit| match outcome {
            Err(Error::TooLarge { key, bytes: found, limit: most }) => {
                assert_eq!((key.as_str(), found, most), ("a", bytes, limit), "facts");
            }
            other => panic!("{other:?}"),
        };
        let exact = local(&folder).with_limit(bytes);
        exact.put("a", &large).unwrap();
        assert_eq!(exact.get("a").unwrap(), large, "to the byte");
        let less = local(&folder).with_limit(bytes - 1);
        refused(less.put("a", &large), bytes - 1);
        refused(less.get("a").map(drop), bytes - 1);
        assert_eq!(store.get("a").unwrap(), large, "as it was");
        // A file of a tebibyte that takes no room.
        fs::File::create(folder.path().join("states/b.state")).unwrap().set_len(1 << 40).unwrap();
        let huge = store.get("b");
        assert!(
            matches!(huge, Err(Error::TooLarge { bytes, limit: OBJECT_LIMIT, .. }) if bytes == 1 << 40),
            "{huge:?}"
        );
    }

    /// A service that lies, fails or panics.
    #[derive(Debug)]
    struct Odd {
        /// What it says that an object has, and what it sends; the requests fail if it says none.
        size: Option<u64>,
        sent: usize,
        /// Bytes that were taken from it.
        taken: Arc<AtomicUsize>,
    }

    impl std::fmt::Display for Odd {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("Odd")
        }
    }

    const CHUNK: usize = 100;

    fn down<T>() -> Result<T> {
        Err(object_store::Error::Generic { store: "Odd", source: "is down".into() })
    }

    #[async_trait]
    impl Objects for Odd {
        async fn put_opts(&self, _: &Path, _: PutPayload, _: PutOptions) -> Result<PutResult> {
            down()
        }

        async fn put_multipart_opts(
            &self,
            _: &Path,
            _: PutMultipartOptions,
        ) -> Result<Box<dyn MultipartUpload>> {
            panic!("an upload in parts is not whole or not at all");
        }

        async fn get_opts(&self, location: &Path, _: GetOptions) -> Result<GetResult> {
            if location.as_ref() == "panic.state" {
                // Without a word on the terminal.
                std::panic::resume_unwind(Box::new(()));
            }
            let Some(size) = self.size else { return down() };
            let taken = self.taken.clone();
            let chunks = stream::iter(0..self.sent / CHUNK).map(move |_| {
                taken.fetch_add(CHUNK, Ordering::Relaxed);
                Ok(vec![0; CHUNK].into())
            });
            let meta = ObjectMeta {
                location: location.clone(),
                last_modified: Default::default(),
                size,
                e_tag: None,
                version: None,
            };
            Ok(GetResult {
                payload: GetResultPayload::Stream(chunks.boxed()),
                meta,
                range: 0..size,
                attributes: Default::default(),
                extensions: Default::default(),
            })
        }

        fn delete_stream(&self, _: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
            stream::once(async { down() }).boxed()
        }

        fn list(&self, _: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
            stream::empty().boxed()
        }

        async fn list_with_delimiter(&self, _: Option<&Path>) -> Result<ListResult> {
            down()
        }

        async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
            down()
        }
    }

    /// No more is taken from a service than the limit, whatever it says that there is.
    #[test]
    fn a_service_that_lies() {
        let get = |size, sent| {
            let taken = Arc::new(AtomicUsize::new(0));
            let odd = Odd { size: Some(size), sent, taken: taken.clone() };
            let store = ObjectStore::new(Arc::new(odd), Path::ROOT).unwrap().with_limit(1_000);
            (store.get("a").unwrap_err(), taken.load(Ordering::Relaxed))
        };
        let (error, taken) = get(u64::MAX, 1 << 20);
        assert!(matches!(error, Error::TooLarge { bytes: u64::MAX, limit: 1_000, .. }), "{error}");
        assert_eq!(taken, 0, "nothing of what is said to be too large");
        let (error, taken) = get(10, 1 << 20);
        assert!(matches!(error, Error::TooLarge { bytes: 1_100, limit: 1_000, .. }), "{error}");
        assert_eq!(taken, 1_100, "no more than shows it");
        let (error, taken) = get(1_000, 300);
        assert!(matches!(error, Error::Damaged { .. }), "less than it said: {error}");
        assert_eq!(taken, 300, "all that there is");
    }

    #[test]
    fn a_service_that_fails() {
        let odd = Odd { size: None, sent: 0, taken: Arc::default() };
        let store = ObjectStore::new(Arc::new(odd), Path::ROOT).unwrap();
        let says = |error: Error| {
            assert!(matches!(error, Error::Failed { .. }), "{error:?}");
            error.to_string()
        };
        let down = "a: Generic Odd error: is down";
        assert_eq!(says(store.put("a", &nth(1)).unwrap_err()), down, "put");
        assert_eq!(says(store.get("a").unwrap_err()), down, "get");
        assert_eq!(says(store.remove("a").unwrap_err()), down, "remove");
        assert_eq!(says(store.contains("a").unwrap_err()), down, "contains");
        // The panic is the thread's, not the caller's, and the next call is served.
        assert!(says(store.get("panic").unwrap_err()).starts_with("panic: "), "panic");
        assert_eq!(says(store.get("a").unwrap_err()), down, "afterwards");
    }

    /// Opened, used and dropped where a caller's own runtime runs, of either kind.
    #[test]
    fn inside_a_runtime() {
        use tokio::runtime::Builder;
        let folder = tempfile::tempdir().unwrap();
        let mut builders = [Builder::new_current_thread(), Builder::new_multi_thread()];
        for builder in &mut builders {
            let runtime = builder.build().unwrap();
            runtime.block_on(async {
                let store = local(&folder);
                store.put("a", &nth(1)).unwrap();
                assert_eq!(store.get("a").unwrap(), nth(1), "put and got");
            });
            let path = folder.path().to_owned();
            let task = runtime.spawn(async move {
                let store = ObjectStore::local(path.join("states")).unwrap();
                store.get("a").unwrap()
            });
            assert_eq!(runtime.block_on(task).unwrap(), nth(1), "in a task");
        }
        // A service of which others hold the parts.
        let service = Arc::new(InMemory::new());
        let store = ObjectStore::new(service.clone(), Path::ROOT).unwrap();
        store.put("a", &nth(1)).unwrap();
        let runtime = Builder::new_current_thread().build().unwrap();
        let size = runtime.block_on(service.head(&Path::from("a.state"))).unwrap().size;
        assert_eq!(size, nth(1).to_bytes().unwrap().len() as u64, "seen by others");
    }
}
