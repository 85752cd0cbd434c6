//! A run's directory: what is where, made new or opened to go on.

use std::fs;
use std::path::{Path, PathBuf};

use super::checkpoint::{self, Checkpoint};
use super::config::Config;
use crate::{Error, Result, files};

/// Where default run directories are made.
const ROOT: &str = "runs";

/// A run directory. TensorBoard's event files lie at its top.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunDir {
    root: PathBuf,
}

impl RunDir {
    /// Makes the directory that `run.dir` names, or the first free one of `runs/001` …, and writes `config.toml`.
    ///
    /// Errors: the directory holds a run or anything else already.
    pub fn create(config: &Config) -> Result<Self> {
        let root = match &config.run.dir {
            Some(dir) => {
                files::create_dir(dir)?;
                if fs::read_dir(dir)
                    .map_err(|e| Error::io(dir, e))?
                    .next()
                    .is_some()
                {
                    return Err(Error::file(
                        dir,
                        "run.dir is not empty; go on with that run by `train --resume`, or choose another \
                         by `--set run.dir=…`",
                    ));
                }
                dir.clone()
            }
            None => first_free(Path::new(ROOT))?,
        };
        let mut config = config.clone();
        config.run.dir = Some(root.clone());
        files::write_bytes(root.join("config.toml"), config.to_toml()?.as_bytes())?;
        Ok(Self { root })
    }

    /// Opens a run to go on: its configuration, and the last whole checkpoint if there is one.
    ///
    /// What a killed program left half-written is removed. Errors: no run there.
    pub fn open(root: impl AsRef<Path>) -> Result<(Self, Config, Option<Checkpoint>)> {
        let (run, config) = Self::read(root)?;
        checkpoint::clean(&run.checkpoints())?;
        let last = checkpoint::last_whole(&run.checkpoints())?;
        Ok((run, config, last))
    }

    /// A run as it is, for looking: its configuration. Nothing is changed, so it may be one that is going on.
    ///
    /// # Errors
    /// No run there.
    pub fn read(root: impl AsRef<Path>) -> Result<(Self, Config)> {
        let root = root.as_ref().to_path_buf();
        if !root.is_dir() {
            fs::read_dir(&root).map_err(|e| Error::io(&root, e))?;
        }
        let path = root.join("config.toml");
        if !path.is_file() {
            return Err(Error::file(
                root,
                "not a run directory: it has no config.toml",
            ));
        }
        let config = Config::load(&path, &[])?;
        Ok((Self { root }, config))
    }

    /// Writes the configuration that the run goes on with.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn rewrite(&self, config: &Config) -> Result<()> {
        files::write_bytes(self.root.join("config.toml"), config.to_toml()?.as_bytes())
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// `metrics.jsonl`
    pub fn metrics(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    /// `eval.jsonl`
    pub fn evaluations(&self) -> PathBuf {
        self.root.join("eval.jsonl")
    }

    /// `model/`, the whole model of a full fine-tune.
    pub fn model(&self) -> PathBuf {
        self.root.join("model")
    }

    /// `checkpoints/`
    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// `lora/`, in PEFT's layout.
    pub fn lora(&self) -> PathBuf {
        self.root.join("lora")
    }

    /// `aligner.safetensors`
    pub fn aligner(&self) -> PathBuf {
        self.root.join("aligner.safetensors")
    }

    /// `maps/`: word maps as they were last.
    pub fn maps(&self) -> PathBuf {
        self.root.join("maps")
    }

    /// `maps/step-N/`: word maps after `step` updates.
    pub fn maps_at(&self, step: u64) -> PathBuf {
        self.maps().join(format!("step-{step}"))
    }

    /// `maps.jsonl`
    pub fn map_figures(&self) -> PathBuf {
        self.root.join("maps.jsonl")
    }

    /// `run.json`
    pub fn record(&self) -> PathBuf {
        self.root.join("run.json")
    }

    /// `report.html`
    pub fn report(&self) -> PathBuf {
        self.root.join("report.html")
    }
}

/// Makes `001`, `002` … under `parent`; two programs started together get different ones.
fn first_free(parent: &Path) -> Result<PathBuf> {
    files::create_dir(parent)?;
    let mut number = 1;
    loop {
        let dir = parent.join(format!("{number:03}"));
        match fs::create_dir(&dir) {
            Ok(()) => return Ok(dir),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => number += 1,
            Err(e) => return Err(Error::io(dir, e)),
        }
    }
}
