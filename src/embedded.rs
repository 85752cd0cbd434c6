//! The mini models that travel inside the program.

use std::path::{Path, PathBuf};

use include_dir::{Dir, include_dir};

use crate::error::{Error, Result};
use crate::files;

static MINI: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/models/mini");

/// A text file of `models/mini`, by its path there.
///
/// # Errors
/// [`Error::Input`] where the program was built without it.
pub fn text(path: &str) -> Result<&'static str> {
    let file = MINI.get_file(path).and_then(|f| f.contents_utf8());
    file.ok_or_else(|| Error::Input(format!("this program was built without models/mini/{path}")))
}

/// Writes the embedded model `name` (`teacher` or `student`) below `into`, in the layout it is
/// published in, and gives its directory.
///
/// # Errors
/// A directory that cannot be written.
pub fn unpack(name: &str, into: &Path) -> Result<PathBuf> {
    let root = into.join(name);
    let mut waiting: Vec<&Dir<'_>> = MINI.get_dir(name).into_iter().collect();
    if waiting.is_empty() {
        return Err(Error::Input(format!(
            "this program was built without models/mini/{name}"
        )));
    }
    while let Some(dir) = waiting.pop() {
        waiting.extend(dir.dirs());
        for file in dir.files() {
            let path = into.join(file.path());
            if std::fs::metadata(&path).is_ok_and(|m| m.len() == file.contents().len() as u64) {
                continue;
            }
            files::write_bytes(&path, file.contents())?;
        }
    }
    Ok(root)
}
