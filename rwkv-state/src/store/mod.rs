//! Snapshots under keys, so that a session moves between machines: put here, gone on with there.
//!
//! | store | where the snapshots are |
//! |---|---|
//! | [`MemoryStore`] | in the process, within a bound: those that were used last |
//! | `ObjectStore` | in a directory, S3, Google Cloud Storage or Azure; the feature `object-store`, and one for each service |
//!
//! A store is shared by reference and used from several threads at once. What two of them put under one key at the same
//! time, the later wins, whole.
//!
//! A key is 1 to [`KEY_LIMIT`] bytes of `a` to `z`, `0` to `9`, `-`, `_` and `.`, the first and the last of them a letter
//! or a digit. So no key is a path or leads out of a directory, none is a hidden file or somebody's temporary one, and no
//! two are one file where the file system takes capital letters for small ones. Names that hold more are to be hashed or
//! written in hexadecimal.
//!
//! Invariant: what a store gives back is a snapshot that was put there, whole, or a typed error.

mod memory;
#[cfg(feature = "object-store")]
mod object;

pub use memory::{ENTRY_OVERHEAD, MemoryStore};
#[cfg(feature = "object-store")]
pub use object::{OBJECT_LIMIT, ObjectStore, STALE, object_store};

use std::fmt;

use crate::snapshot::{Fault, Snapshot};

/// The longest key, in bytes: with what stores add, a file's name everywhere.
pub const KEY_LIMIT: usize = 128;

/// Snapshots under keys. An implementation checks every key by [`check_key`].
pub trait StateStore: fmt::Debug + Send + Sync {
    /// Puts a snapshot under `key`, in the place of any that is there.
    ///
    /// # Errors
    ///
    /// If the key is none, the snapshot cannot be written, it is larger than the store takes, or the store failed. Then
    /// what was under the key is there still, unless it was the store that failed: it may have done all but say so.
    fn put(&self, key: &str, snapshot: &Snapshot) -> Result<(), Error>;

    /// The snapshot under `key`.
    ///
    /// # Errors
    ///
    /// If the key is none or has nothing under it, what is there is damaged or larger than the store takes, or the store
    /// failed.
    fn get(&self, key: &str) -> Result<Snapshot, Error>;

    /// Removes what is under `key`, if there is anything.
    ///
    /// # Errors
    ///
    /// If the key is none, or the store failed.
    fn remove(&self, key: &str) -> Result<(), Error>;

    /// Whether there is anything under `key`. It may be damaged.
    ///
    /// # Errors
    ///
    /// If the key is none, or the store failed.
    fn contains(&self, key: &str) -> Result<bool, Error>;
}

/// What a store can report.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A text that is no key.
    #[error("the key {key:?} {fault}")]
    Key {
        /// As it was given, up to its first [`KEY_LIMIT`] characters.
        key: String,
        /// What is wrong with it.
        fault: KeyFault,
    },
    /// Nothing under the key: it was never put, was removed, or had to make room.
    #[error("{key}: not in the store")]
    Missing {
        /// The key.
        key: String,
    },
    /// A snapshot that is larger than the store takes, or an object there that is.
    #[error("{key}: {bytes} bytes, above the store's limit of {limit}")]
    TooLarge {
        /// The key.
        key: String,
        /// Its bytes, as the store counts them; of an object that does not say, those that came.
        bytes: u64,
        /// The most that the store takes.
        limit: u64,
    },
    /// A snapshot that could not be read again.
    #[error("{key}: cannot be written: {fault}")]
    Unwritable {
        /// The key.
        key: String,
        /// What is wrong with it.
        fault: Fault,
    },
    /// Something else than a snapshot under the key.
    #[error("{key}: {fault}")]
    Damaged {
        /// The key.
        key: String,
        /// What is wrong with it.
        fault: Fault,
    },
    /// The system or the service could not do it.
    #[error("{key}: {source}")]
    Failed {
        /// The key.
        key: String,
        /// What it says.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The store cannot be opened.
    #[error("opening {place}: {source}")]
    Open {
        /// What was to be opened.
        place: String,
        /// What the system says.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Why a text is no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyFault {
    /// Nothing at all.
    #[error("is empty")]
    Empty,
    /// Longer than [`KEY_LIMIT`].
    #[error("has {bytes} bytes, above the limit of {KEY_LIMIT}")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// A character that no key has: capital letters, separators, blanks and all that is not ASCII are among them.
    #[error("has {found:?} at byte {at}, which is none of a to z, 0 to 9, `-`, `_` and `.`")]
    Character {
        /// Where.
        at: usize,
        /// The character.
        found: char,
    },
    /// A sign where a letter or a digit should be.
    #[error("begins or ends with {found:?}, which is no letter or digit")]
    End {
        /// The sign.
        found: char,
    },
}

/// Whether a text is a key, in every store: see [the module](self).
///
/// # Errors
///
/// [`Error::Key`], if it is none.
pub fn check_key(key: &str) -> Result<(), Error> {
    let no_end = |found: &char| !found.is_ascii_alphanumeric();
    let no_key = |found: char| !matches!(found, 'a'..='z' | '0'..='9' | '-' | '_' | '.');
    let fault = if key.is_empty() {
        Some(KeyFault::Empty)
    } else if key.len() > KEY_LIMIT {
        Some(KeyFault::TooLong { bytes: key.len() })
    } else if let Some((at, found)) = key.char_indices().find(|&(_, found)| no_key(found)) {
        Some(KeyFault::Character { at, found })
    } else {
        [key.chars().next(), key.chars().next_back()]
            .into_iter()
            .flatten()
            .find(no_end)
            .map(|found| KeyFault::End { found })
    };
    match fault {
        Some(fault) => Err(Error::Key { key: key.chars().take(KEY_LIMIT).collect(), fault }),
        None => Ok(()),
    }
}

/// A snapshot's bytes, for `key`.
fn encode(key: &str, snapshot: &Snapshot) -> Result<Vec<u8>, Error> {
    snapshot.to_bytes().map_err(|fault| Error::Unwritable { key: key.to_owned(), fault })
}

/// The snapshot that bytes are, which were under `key`.
fn decode(key: &str, bytes: &[u8]) -> Result<Snapshot, Error> {
    Snapshot::from_bytes(bytes).map_err(|fault| Error::Damaged { key: key.to_owned(), fault })
}
