//! Where a checkpoint's bytes come from: a file read by position, or bytes in memory.
//!
//! Invariant: files are read, never mapped. A mapped file that is cut short while open kills the process
//! with a SIGBUS; a positional read returns an [`io::ErrorKind::UnexpectedEof`] for the tensor being read.
//! Reading also leaves no second copy of the weights in the resident set, and needs no `unsafe`.

use std::fmt::{self, Debug};
use std::fs::File;
use std::io;
use std::path::Path;

/// Bytes that can be read at any position, from several threads at once.
pub trait Source: Send + Sync + Debug {
    /// Length in bytes, fixed when the source was opened.
    fn len(&self) -> u64;

    /// Whether there is nothing to read.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buf` with the bytes from `offset` on.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::UnexpectedEof`] if the source ends first, or whatever the system reports.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
}

/// The `len` bytes from `offset` on, which must lie inside the source: checked before memory is taken.
pub(super) fn fetch(source: &dyn Source, offset: u64, len: u64) -> io::Result<Vec<u8>> {
    let inside = offset.checked_add(len).is_some_and(|end| end <= source.len());
    let len = usize::try_from(len).ok().filter(|_| inside).ok_or(io::ErrorKind::UnexpectedEof)?;
    let mut bytes = vec![0; len];
    source.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

/// A file.
#[derive(Debug)]
pub struct FileSource {
    file: Handle,
    len: u64,
}

/// Where the system has positional reads, they need no lock.
#[cfg(any(unix, windows))]
type Handle = File;
#[cfg(not(any(unix, windows)))]
type Handle = std::sync::Mutex<File>;

impl FileSource {
    /// Opens the file at `path` and takes its length.
    ///
    /// # Errors
    ///
    /// If the file cannot be opened.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        #[cfg_attr(any(unix, windows), expect(clippy::useless_conversion, reason = "a mutex elsewhere"))]
        Ok(Self { file: file.into(), len })
    }
}

impl Source for FileSource {
    fn len(&self) -> u64 {
        self.len
    }

    #[cfg(unix)]
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.file, buf, offset)
    }

    #[cfg(windows)]
    fn read_exact_at(&self, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buf.is_empty() {
            match std::os::windows::fs::FileExt::seek_read(&self.file, buf, offset) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    buf = &mut buf[n..];
                    offset += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    #[cfg(not(any(unix, windows)))]
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        use std::io::{Read, Seek, SeekFrom};
        // A panic elsewhere leaves at worst a wrong position, which the seek sets anew.
        let mut file = self.file.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        file.seek(SeekFrom::Start(offset))?;
        file.read_exact(buf)
    }
}

/// Bytes in memory: `Vec<u8>`, `Arc<[u8]>`, `&'static [u8]`.
#[derive(Clone)]
pub struct MemorySource<B>(pub B);

impl<B: AsRef<[u8]>> Debug for MemorySource<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemorySource({} bytes)", self.0.as_ref().len())
    }
}

impl<B: AsRef<[u8]> + Send + Sync> Source for MemorySource<B> {
    fn len(&self) -> u64 {
        self.0.as_ref().len() as u64
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let rest = usize::try_from(offset).ok().and_then(|at| self.0.as_ref().get(at..));
        let bytes = rest.and_then(|rest| rest.get(..buf.len())).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Write};
    use std::sync::Arc;

    use super::{FileSource, MemorySource, Source, fetch};

    fn reads(source: &dyn Source) {
        assert_eq!(source.len(), 10, "{source:?}");
        assert_eq!(fetch(source, 3, 4).unwrap(), [3, 4, 5, 6], "{source:?}: middle");
        assert!(fetch(source, 10, 0).unwrap().is_empty(), "{source:?}: nothing, at the end");
        for (offset, len) in [(7, 4), (10, 1), (11, 0), (u64::MAX, 1), (1, u64::MAX)] {
            let kind = fetch(source, offset, len).unwrap_err().kind();
            assert_eq!(kind, ErrorKind::UnexpectedEof, "{source:?}: {len} bytes at {offset}");
        }
        let mut buf = [0; 4];
        let kind = source.read_exact_at(&mut buf, 7).unwrap_err().kind();
        assert_eq!(kind, ErrorKind::UnexpectedEof, "{source:?}: past the end");
    }

    #[test]
    fn every_source_reads_by_position() {
        let bytes: Vec<u8> = (0..10).collect();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&bytes).unwrap();
        reads(&FileSource::open(file.path()).unwrap());
        reads(&MemorySource(Arc::<[u8]>::from(&bytes[..])));
        reads(&MemorySource(bytes));
        reads(&MemorySource::<&'static [u8]>(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]));
    }

    #[test]
    fn a_file_cut_short_while_open_is_an_error() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[7; 100]).unwrap();
        let source = FileSource::open(file.path()).unwrap();
        file.as_file().set_len(50).unwrap();
        assert_eq!(fetch(&source, 40, 10).unwrap(), [7; 10], "what is left");
        assert_eq!(fetch(&source, 40, 11).unwrap_err().kind(), ErrorKind::UnexpectedEof, "what is gone");
    }
}
