//! A store in the process: within a bound, those snapshots that were used last.
//!
//! It counts the bytes of each snapshot's file, those of its key, and [`ENTRY_OVERHEAD`] for what the allocator and the
//! two trees add. What the store holds takes no more memory than that, but for less than 1 KiB: a tree frees what it does
//! not need, where a hash table keeps room for the most that it ever held.
//!
//! Invariant: the count is never above the bound, within a call neither. What a call works on comes beside it: the file of
//! the snapshot that is being put, and that of one being read, until it is decoded.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Error, StateStore, check_key, decode, encode};
use crate::snapshot::Snapshot;

/// Bytes counted for an entry beside its file and its key: at most 140 in the two trees, whose nodes are half full at the
/// least, 64 for the headers of the file and the key, and the rest for the allocator's own.
pub const ENTRY_OVERHEAD: usize = 256;

/// Snapshots in memory. When there is no room for another, those go that were not put or got for the longest time.
///
/// They are kept as the bytes of their files: getting one checks and decodes it, outside of the lock.
pub struct MemoryStore {
    bound: usize,
    entries: Mutex<Entries>,
}

#[derive(Default)]
struct Entries {
    by_key: BTreeMap<Arc<str>, Entry>,
    /// The keys by the time of their last use.
    by_use: BTreeMap<u64, Arc<str>>,
    /// What all of them count.
    used: usize,
    /// The time, in uses.
    now: u64,
}

struct Entry {
    file: Arc<Vec<u8>>,
    last_use: u64,
}

/// What an entry counts.
fn cost(key: &str, file: &Vec<u8>) -> usize {
    file.capacity() + key.len() + ENTRY_OVERHEAD
}

impl MemoryStore {
    /// A store that holds at most `bound` bytes, by its count.
    #[must_use]
    pub fn new(bound: usize) -> Self {
        Self { bound, entries: Mutex::default() }
    }

    /// The most that it holds, in bytes.
    #[must_use]
    pub const fn bound(&self) -> usize {
        self.bound
    }

    /// What it holds, in bytes, by its count.
    #[must_use]
    pub fn used(&self) -> usize {
        self.lock().used
    }

    /// How many snapshots it holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().by_key.len()
    }

    /// Whether it holds none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        // Nothing that is done under the lock panics halfway.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entries {
    fn insert(&mut self, key: &str, file: Vec<u8>, bound: usize) {
        let bytes = cost(key, &file);
        self.remove(key);
        while self.used + bytes > bound
            && let Some((_, oldest)) = self.by_use.pop_first()
        {
            self.remove(&oldest);
        }
        let (key, last_use): (Arc<str>, u64) = (key.into(), self.tick());
        self.by_use.insert(last_use, key.clone());
        self.by_key.insert(key, Entry { file: Arc::new(file), last_use });
        self.used += bytes;
    }

    fn remove(&mut self, key: &str) {
        if let Some(Entry { file, last_use }) = self.by_key.remove(key) {
            self.used -= cost(key, &file);
            self.by_use.remove(&last_use);
        }
    }

    /// The file under `key`, which is thereby used.
    fn get(&mut self, key: &str) -> Option<Arc<Vec<u8>>> {
        let now = self.tick();
        let entry = self.by_key.get_mut(key)?;
        if let Some(key) = self.by_use.remove(&entry.last_use) {
            self.by_use.insert(now, key);
        }
        entry.last_use = now;
        Some(entry.file.clone())
    }

    const fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }
}

impl StateStore for MemoryStore {
    fn put(&self, key: &str, snapshot: &Snapshot) -> Result<(), Error> {
        check_key(key)?;
        let file = encode(key, snapshot)?;
        let bytes = cost(key, &file);
        if bytes > self.bound {
            let (bytes, limit) = (bytes as u64, self.bound as u64);
            return Err(Error::TooLarge { key: key.to_owned(), bytes, limit });
        }
        self.lock().insert(key, file, self.bound);
        Ok(())
    }

    fn get(&self, key: &str) -> Result<Snapshot, Error> {
        check_key(key)?;
        let file = self.lock().get(key);
        decode(key, &file.ok_or_else(|| Error::Missing { key: key.to_owned() })?)
    }

    fn remove(&self, key: &str) -> Result<(), Error> {
        check_key(key)?;
        self.lock().remove(key);
        Ok(())
    }

    /// Asking is no use.
    fn contains(&self, key: &str) -> Result<bool, Error> {
        check_key(key)?;
        Ok(self.lock().by_key.contains_key(key))
    }
}

/// Not what is in it.
impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Entries { by_key, used, .. } = &*self.lock();
        f.debug_struct("MemoryStore")
            .field("bound", &self.bound)
            .field("used", used)
            .field("len", &by_key.len())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::{MemoryStore, StateStore};
    use crate::snapshot::Fault;
    use crate::store::Error;

    /// No caller can put such bytes; memory that fails can.
    #[test]
    fn damage_is_named() {
        let store = MemoryStore::new(1 << 10);
        store.lock().insert("a", vec![0; 7], 1 << 10);
        let got = store.get("a");
        assert!(
            matches!(&got, Err(Error::Damaged { key, fault: Fault::CutShort { want: 8, got: 7 } }) if key == "a"),
            "{got:?}"
        );
    }
}
