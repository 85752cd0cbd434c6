//! Writing files so that a reader sees the old content or the new one, never half of it.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use crate::{Error, Result};

/// Writes `path` through a temporary file in the same directory: written, synced to disk, then renamed over `path`.
///
/// Missing parent directories are made. On any error (a full disk included) the temporary file is removed and an
/// older `path` stays as it was. Errors: [`Error::Io`] naming `path`.
pub fn write_atomic(
    path: impl AsRef<Path>,
    write: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>,
) -> Result<()> {
    let path = path.as_ref();
    let parent = parent(path);
    create_dir(parent)?;
    let temporary = tempfile::Builder::new()
        .prefix(".writing-")
        .suffix(".tmp")
        .tempfile_in(parent)
        .map_err(|e| Error::io(path, e))?;
    let (file, name) = temporary.into_parts();
    let mut buffered = BufWriter::new(file);
    write(&mut buffered).map_err(|e| Error::io(path, e))?;
    let file = buffered
        .into_inner()
        .map_err(|e| Error::io(path, e.into_error()))?;
    file.sync_all().map_err(|e| Error::io(path, e))?;
    open_to_all(&file);
    drop(file);
    name.persist(path).map_err(|e| Error::io(path, e.error))?;
    sync_dir(parent);
    Ok(())
}

/// [`write_atomic`] of bytes at hand.
pub fn write_bytes(path: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
    write_atomic(path, |w| w.write_all(bytes))
}

/// Makes a directory and its parents; no error where it exists.
pub fn create_dir(path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    fs::create_dir_all(path).map_err(|e| Error::io(path, e))
}

/// The whole of a text file as UTF-8.
pub fn read_text(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    let bytes = fs::read(path).map_err(|e| Error::io(path, e))?;
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Error::file(path, format!("byte {at} is not UTF-8 text"))
    })
}

/// Asks the system to put a directory's entries on disk, so that a rename in it survives a power cut.
pub fn sync_dir(path: &Path) {
    // Not every system lets a directory be opened or synced (Windows does not); the rename itself has happened.
    if let Ok(dir) = File::open(path) {
        let _ = dir.sync_all();
    }
}

/// The directory that holds `path`; `.` for a bare file name.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

/// Temporary files are private to the user; a result should have the usual permissions.
#[cfg(unix)]
fn open_to_all(file: &File) {
    use std::os::unix::fs::PermissionsExt;
    let _ = file.set_permissions(fs::Permissions::from_mode(0o644));
}

#[cfg(not(unix))]
fn open_to_all(_: &File) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_write_keeps_the_old_file_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b.txt");
        write_bytes(&path, b"old").unwrap();
        let error = write_atomic(&path, |w| {
            w.write_all(b"half")?;
            Err(std::io::Error::other("no space left"))
        })
        .unwrap_err();
        assert!(error.to_string().contains("b.txt"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn text_that_is_not_utf8_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        fs::write(&path, [b'a', 0xff]).unwrap();
        let error = read_text(&path).unwrap_err().to_string();
        assert!(error.contains("byte 1"), "{error}");
    }
}
