//! A store over the `object_store` crate: a directory, or a service.
//!
//! The snapshot of a key is the object of that name and `.state`, byte for byte the file that
//! [`Snapshot::save`] writes. A put is one request that replaces the object whole or not at all.
//!
//! In a directory, an object is written as `KEY.state#1`, or with the next number that is free, synced and renamed, and
//! its directory is synced: when a put has returned, a loss of power does not undo it. It may undo a removal. What a
//! process that is killed leaves of a put is read by nothing, named by no key, and in the way of no later put; a store that is
//! opened on the directory removes what is [older](STALE) than a put can be. Who may read the directory may read the sessions.
//!
//! Calls block. They wait for a thread of the store's own, on which the requests run, so that they work outside of any
//! runtime and inside of one, where they belong with other calls that block. How long a service is tried, its builder says.
//!
//! Invariant: an object is refused by the size that it is said to have before any of it is fetched, and by what comes as
//! soon as that is more.

use std::fmt;
use std::fs::DirBuilder;
use std::future::Future;
use std::io;
use std::path::Path as FilePath;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use futures_util::TryStreamExt;
pub use object_store;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{GetOptions, ObjectStore as Objects, ObjectStoreExt};
use tokio::runtime::{Builder, Runtime};

use super::{Error, StateStore, check_key, decode, encode};
use crate::snapshot::{FILE_LIMIT, Snapshot};

/// The largest object, in bytes, unless [`ObjectStore::with_limit`] says another.
pub const OBJECT_LIMIT: u64 = FILE_LIMIT;

/// A put that was not over after so long never will be.
pub const STALE: Duration = Duration::from_secs(3600);

/// Snapshots as objects of a directory or a service.
pub struct ObjectStore {
    objects: Arc<dyn Objects>,
    prefix: Path,
    limit: u64,
    /// Until it is dropped.
    runtime: Option<Runtime>,
}

impl ObjectStore {
    /// A directory, which is made for its owner alone if it is missing and its parent is there. What puts that were killed
    /// left there longer than [`STALE`] ago is removed, as far as that goes.
    ///
    /// # Errors
    ///
    /// If it cannot be made or is no directory.
    pub fn local(folder: impl AsRef<FilePath>) -> Result<Self, Error> {
        let folder = folder.as_ref();
        let place = || folder.display().to_string();
        make(folder).map_err(|source| Error::Open { place: place(), source: source.into() })?;
        // What cannot be removed is in no one's way.
        let _ = sweep(folder);
        let files = LocalFileSystem::new_with_prefix(folder)
            .map_err(|source| Error::Open { place: place(), source: source.into() })?;
        Self::new(Arc::new(files.with_fsync(true)), Path::ROOT)
    }

    /// The objects below `prefix` of a service, which [`object_store`] has a builder for, such as `aws::AmazonS3Builder`.
    /// A directory is better opened by [`Self::local`], which syncs.
    ///
    /// # Errors
    ///
    /// If its thread cannot be started.
    pub fn new(objects: Arc<dyn Objects>, prefix: Path) -> Result<Self, Error> {
        let place = objects.to_string();
        // One thread for the requests; a directory's files are read and written by others, started when needed.
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("state-store")
            .enable_all()
            .build()
            .map_err(|source| Error::Open { place, source: source.into() })?;
        Ok(Self { objects, prefix, limit: OBJECT_LIMIT, runtime: Some(runtime) })
    }

    /// The same, with another limit to the bytes of an object.
    #[must_use]
    pub const fn with_limit(mut self, limit: u64) -> Self {
        self.limit = limit;
        self
    }

    fn path(&self, key: &str) -> Result<Path, Error> {
        check_key(key)?;
        Ok(self.prefix.clone().join(format!("{key}.state")))
    }

    /// Runs a request to its end, on the store's thread.
    fn run<T: Send + 'static>(
        &self,
        key: &str,
        request: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        let (done, outcome) = sync_channel(1);
        if let Some(runtime) = &self.runtime {
            runtime.spawn(async move { done.send(request.await) });
        }
        // Nothing comes if the request panicked.
        outcome.recv().unwrap_or_else(|error| Err(failed(key, error)))
    }
}

fn failed(key: &str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::Failed { key: key.to_owned(), source: source.into() }
}

/// What a request reports that looked for an object.
fn missing(key: &str, error: object_store::Error) -> Error {
    match error {
        object_store::Error::NotFound { .. } => Error::Missing { key: key.to_owned() },
        error => failed(key, error),
    }
}

/// The bytes of an object, `limit` at most.
async fn fetch(objects: &dyn Objects, path: &Path, key: &str, limit: u64) -> Result<Vec<u8>, Error> {
    let too_large = |bytes| Error::TooLarge { key: key.to_owned(), bytes, limit };
    let object = objects.get_opts(path, GetOptions::default()).await.map_err(|error| missing(key, error))?;
    if object.meta.size > limit {
        return Err(too_large(object.meta.size));
    }
    let (mut bytes, mut chunks) = (Vec::new(), object.into_stream());
    while let Some(chunk) = chunks.try_next().await.map_err(|error| failed(key, error))? {
        let len = bytes.len() as u64 + chunk.len() as u64;
        if len > limit {
            return Err(too_large(len));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// Removes what puts left that were killed long ago.
fn sweep(folder: &FilePath) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let parts = name.to_str().and_then(|name| name.split_once(".state#"));
        let number = |text: &str| !text.is_empty() && text.bytes().all(|digit| digit.is_ascii_digit());
        if parts.is_some_and(|(key, n)| check_key(key).is_ok() && number(n)) {
            let of = entry.metadata()?;
            // One of the future is of a clock that is wrong, or of no put.
            if of.is_file() && of.modified()?.elapsed().is_ok_and(|age| age > STALE) {
                std::fs::remove_file(entry.path())?;
            }
        }
    }
    Ok(())
}

/// Makes a directory that is missing, and syncs its name.
fn make(folder: &FilePath) -> io::Result<()> {
    let mut builder = DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    match builder.create(folder) {
        Ok(()) => {}
        Err(_) if folder.is_dir() => return Ok(()),
        Err(error) => return Err(error),
    }
    #[cfg(unix)]
    std::fs::File::open(folder.canonicalize()?.parent().unwrap_or(folder))?.sync_all()?;
    Ok(())
}

impl StateStore for ObjectStore {
    fn put(&self, key: &str, snapshot: &Snapshot) -> Result<(), Error> {
        let path = self.path(key)?;
        let file = encode(key, snapshot)?;
        if file.len() as u64 > self.limit {
            let (bytes, limit) = (file.len() as u64, self.limit);
            return Err(Error::TooLarge { key: key.to_owned(), bytes, limit });
        }
        let (objects, named) = (self.objects.clone(), key.to_owned());
        self.run(key, async move {
            let put = objects.put(&path, file.into()).await;
            put.map(drop).map_err(|error| failed(&named, error))
        })
    }

    fn get(&self, key: &str) -> Result<Snapshot, Error> {
        let path = self.path(key)?;
        let (objects, named, limit) = (self.objects.clone(), key.to_owned(), self.limit);
        let bytes = self.run(key, async move { fetch(&*objects, &path, &named, limit).await })?;
        decode(key, &bytes)
    }

    fn remove(&self, key: &str) -> Result<(), Error> {
        let path = self.path(key)?;
        let (objects, named) = (self.objects.clone(), key.to_owned());
        let removed =
            self.run(key, async move { objects.delete(&path).await.map_err(|error| missing(&named, error)) });
        match removed {
            // Services that do not say so either.
            Err(Error::Missing { .. }) => Ok(()),
            removed => removed,
        }
    }

    fn contains(&self, key: &str) -> Result<bool, Error> {
        let path = self.path(key)?;
        let (objects, named) = (self.objects.clone(), key.to_owned());
        let found =
            self.run(key, async move { objects.head(&path).await.map_err(|error| missing(&named, error)) });
        match found {
            Err(Error::Missing { .. }) => Ok(false),
            found => found.map(|_| true),
        }
    }
}

impl Drop for ObjectStore {
    /// No request runs now, and inside of another runtime waiting for the threads would be a panic.
    fn drop(&mut self) {
        self.runtime.take().into_iter().for_each(Runtime::shutdown_background);
    }
}

impl fmt::Debug for ObjectStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { objects, prefix, limit, .. } = self;
        f.debug_struct("ObjectStore")
            .field("objects", &format_args!("{objects}"))
            .field("prefix", &prefix.as_ref())
            .field("limit", limit)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::ObjectStore;

    /// What no test can see without a loss of power.
    #[test]
    fn a_directory_is_synced() {
        let folder = tempfile::tempdir().unwrap();
        let store = ObjectStore::local(folder.path()).unwrap();
        let shown = format!("{:?}", store.objects);
        assert!(shown.contains("fsync: true"), "{shown}");
    }
}
