//! Files that are written whole or not at all.

use std::fs::File;
use std::io;
use std::path::Path;

/// Puts a file where it shall be, in place of another if there is one: `write` fills it under a name of its own, `.rwkv-`,
/// some letters and `.tmp`; then it is synced and renamed. A crash leaves the old file or the new one, and perhaps the
/// other name, which nothing reads.
///
/// # Errors
///
/// What `write` returns, or `failed` makes of an error of the file system. The old file is then as it was, unless only the
/// folder's own entry could not be synced.
pub fn replace<E>(
    path: &Path,
    failed: impl Fn(io::Error) -> E,
    write: impl FnOnce(&mut File) -> Result<(), E>,
) -> Result<(), E> {
    // A bare file name has an empty parent: that means the current folder.
    let folder = path.parent().filter(|of| !of.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Removed when dropped, unless it was renamed.
    let mut file =
        tempfile::Builder::new().prefix(".rwkv-").suffix(".tmp").tempfile_in(folder).map_err(&failed)?;
    write(file.as_file_mut())?;
    file.as_file().sync_all().map_err(&failed)?;
    file.persist(path).map_err(|error| failed(error.error))?;
    // Where folders can be opened, the new name is synced too.
    #[cfg(unix)]
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(&failed)?;
    Ok(())
}
