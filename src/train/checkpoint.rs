//! Checkpoints: `step-N/` directories that are whole or not there, and never change.
//!
//! Files are written into a temporary directory and synced; `state.json`, written last, lists each with its size and
//! SHA-256; then the directory is renamed. A program killed at any moment leaves the earlier checkpoints as they were.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::{Error, Result, files};

/// The file that marks a checkpoint whole.
pub const STATE: &str = "state.json";

/// Beginning of a temporary directory's name.
const TEMPORARY: &str = ".writing-";

/// A whole checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// Its directory.
    pub dir: PathBuf,
    /// Steps done.
    pub step: u64,
    /// What [`write()`] was given beside the files.
    pub state: Value,
}

#[derive(Serialize, Deserialize)]
struct State {
    step: u64,
    files: BTreeMap<String, Content>,
    state: Value,
}

#[derive(Serialize, Deserialize, PartialEq)]
struct Content {
    bytes: u64,
    sha256: String,
}

/// Writes the checkpoint of `step` done steps under `root`; `fill` writes its files into the directory it is given.
///
/// On an error (a full disk, say) nothing of it stays. A checkpoint of this step that is there already and whole is
/// left alone. Returns the directory.
pub fn write(
    root: &Path,
    step: u64,
    state: &impl Serialize,
    fill: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let place = root.join(format!("step-{step}"));
    if place.exists() {
        if read(&place).is_ok() {
            return Ok(place);
        }
        // Not whole, so not a checkpoint.
        fs::remove_dir_all(&place).map_err(|e| Error::io(&place, e))?;
    }
    files::create_dir(root)?;
    let temporary = tempfile::Builder::new()
        .prefix(TEMPORARY)
        .tempdir_in(root)
        .map_err(|e| Error::io(root, e))?;
    fill(temporary.path())?;
    let state = serde_json::to_value(state).map_err(|e| Error::file(&place, e.to_string()))?;
    let state = State {
        step,
        files: contents(temporary.path())?,
        state,
    };
    let text = serde_json::to_vec_pretty(&state).map_err(|e| Error::file(&place, e.to_string()))?;
    files::write_bytes(temporary.path().join(STATE), &text)?;
    open_to_all(temporary.path());
    let whole = temporary.keep();
    fs::rename(&whole, &place).map_err(|e| {
        let _ = fs::remove_dir_all(&whole);
        Error::io(&place, e)
    })?;
    files::sync_dir(root);
    Ok(place)
}

/// The last whole checkpoint under `root`, checked file by file; damaged ones are passed over with a warning.
pub fn last_whole(root: &Path) -> Result<Option<Checkpoint>> {
    for step in steps(root)?.into_iter().rev() {
        let dir = root.join(format!("step-{step}"));
        match read(&dir) {
            Ok(checkpoint) => return Ok(Some(checkpoint)),
            Err(error) => tracing::warn!("passing over a checkpoint that is not whole: {error}"),
        }
    }
    Ok(None)
}

/// The steps of the checkpoints under `root`, ascending, whole or not.
fn steps(root: &Path) -> Result<Vec<u64>> {
    let mut steps = Vec::new();
    if root.is_dir() {
        for item in fs::read_dir(root).map_err(|e| Error::io(root, e))? {
            let name = item.map_err(|e| Error::io(root, e))?.file_name();
            let name = name.to_string_lossy();
            let number = name.strip_prefix("step-");
            steps.extend(number.and_then(|n| n.parse::<u64>().ok()));
        }
    }
    steps.sort_unstable();
    Ok(steps)
}

/// Removes all checkpoints under `root` but the last `keep` and that of step `best`; none for `keep` 0.
///
/// One that is to go is renamed first, so that a program killed meanwhile leaves no half of it.
pub fn prune(root: &Path, keep: usize, best: Option<u64>) -> Result<()> {
    let steps = steps(root)?;
    let old = match keep {
        0 => 0,
        keep => steps.len().saturating_sub(keep),
    };
    for &step in steps[..old].iter().filter(|&&step| Some(step) != best) {
        let dir = root.join(format!("step-{step}"));
        let going = root.join(format!("{TEMPORARY}gone-{step}"));
        fs::rename(&dir, &going).map_err(|e| Error::io(&dir, e))?;
        fs::remove_dir_all(&going).map_err(|e| Error::io(&going, e))?;
    }
    Ok(())
}

/// Reads and checks one checkpoint. Errors: no state file, or a file missing, cut or changed.
pub fn read(dir: &Path) -> Result<Checkpoint> {
    let path = dir.join(STATE);
    let state: State = serde_json::from_str(&files::read_text(&path)?)
        .map_err(|e| Error::file(&path, format!("not a checkpoint's state: {e}")))?;
    let found = contents(dir)?;
    for (name, expected) in &state.files {
        let path = dir.join(name);
        match found.get(name) {
            None => {
                return Err(Error::file(
                    path,
                    "missing, though the checkpoint's state lists it",
                ));
            }
            Some(content) if content != expected => {
                return Err(Error::file(
                    path,
                    format!(
                        "found {} bytes, SHA-256 {}; expected {} bytes, SHA-256 {}",
                        content.bytes, content.sha256, expected.bytes, expected.sha256
                    ),
                ));
            }
            Some(_) => {}
        }
    }
    Ok(Checkpoint {
        dir: dir.to_path_buf(),
        step: state.step,
        state: state.state,
    })
}

/// Removes what a killed program left half-written under `root`.
pub fn clean(root: &Path) -> Result<()> {
    if !root.is_dir() {
        return Ok(());
    }
    for item in fs::read_dir(root).map_err(|e| Error::io(root, e))? {
        let item = item.map_err(|e| Error::io(root, e))?;
        if item.file_name().to_string_lossy().starts_with(TEMPORARY) {
            fs::remove_dir_all(item.path()).map_err(|e| Error::io(item.path(), e))?;
        }
    }
    Ok(())
}

/// Every file below `dir` but the state file, by its path relative to `dir`; each is synced to disk on the way.
fn contents(dir: &Path) -> Result<BTreeMap<String, Content>> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![(dir.to_path_buf(), String::new())];
    while let Some((folder, prefix)) = waiting.pop() {
        for item in fs::read_dir(&folder).map_err(|e| Error::io(&folder, e))? {
            let path = item.map_err(|e| Error::io(&folder, e))?.path();
            let name = format!(
                "{prefix}{}",
                path.file_name().unwrap_or_default().to_string_lossy()
            );
            if path.is_dir() {
                waiting.push((path, format!("{name}/")));
                continue;
            }
            if name == STATE {
                continue;
            }
            let io = |e| Error::io(&path, e);
            let mut file = File::open(&path).map_err(io)?;
            let mut hasher = Hasher(Sha256::new());
            let bytes = std::io::copy(&mut file, &mut hasher).map_err(io)?;
            let sha256 = hasher
                .0
                .finalize()
                .iter()
                .map(|b| format!("{b:02x}"))
                .collect();
            found.insert(name, Content { bytes, sha256 });
        }
    }
    Ok(found)
}

struct Hasher(Sha256);

impl std::io::Write for Hasher {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Temporary directories are private to the user; a checkpoint should have the usual permissions.
#[cfg(unix)]
fn open_to_all(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    let _ = fs::set_permissions(path, fs::Permissions::from_mode(0o755));
}

#[cfg(not(unix))]
fn open_to_all(_: &Path) {}
