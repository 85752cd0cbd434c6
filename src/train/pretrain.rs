//! Training a mini model from nothing on drawn scenes, by a committed recipe.
//!
//! A recipe is a TOML file of `kind = "teacher"` or `"student"`. The architecture is not in it: it is what the
//! configuration files of the directory `layout` say, in the layout that diffusers and transformers publish. What
//! comes out is that directory with weights (f16), which everything else of this crate, and those libraries, open
//! as any other model.

mod schedule;
mod student;
mod teacher;

use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::{Table, Value};

use crate::data::scenes::{SceneSet, Split};
use crate::gpu::Gpu;
use crate::tensor::PendingRead;
use crate::{Error, Result, files};

pub use schedule::Schedule;
pub use student::StudentRecipe;
pub use teacher::TeacherRecipe;

/// What is trained and how.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Recipe {
    /// A latent-diffusion model: VAE, then U-Net and text encoder together.
    Teacher(TeacherRecipe),
    /// A vision-language model.
    Student(StudentRecipe),
}

impl Recipe {
    /// Reads a recipe and applies `--set KEY=VALUE` arguments to it.
    ///
    /// # Errors
    /// A file that cannot be read, no TOML, an unknown key, a value of another type: by file or argument.
    pub fn load(path: impl AsRef<Path>, sets: &[String]) -> Result<Self> {
        let path = path.as_ref();
        let text = files::read_text(path)?;
        let mut table: Table =
            toml::from_str(&text).map_err(|e| Error::file(path, e.to_string()))?;
        Recipe::deserialize(Value::Table(table.clone()))
            .map_err(|e| Error::file(path, e.to_string()))?;
        for set in sets {
            let wrong = |message: String| Error::Config(format!("--set {set}: {message}"));
            let Some((key, value)) = set.split_once('=') else {
                return Err(wrong("expected KEY=VALUE, such as unet.steps=100".into()));
            };
            let value = toml::from_str::<Table>(&format!("v = {}", value.trim()))
                .ok()
                .and_then(|mut t| t.remove("v"))
                .unwrap_or_else(|| Value::String(value.trim().to_owned()));
            let mut inner = &mut table;
            let mut names: Vec<&str> = key.trim().split('.').collect();
            let last = names.pop().unwrap_or_default();
            for name in names {
                inner = match inner.get_mut(name) {
                    Some(Value::Table(next)) => next,
                    _ => return Err(wrong(format!("unknown table `{name}`"))),
                };
            }
            inner.insert(last.to_owned(), value);
            Recipe::deserialize(Value::Table(table.clone())).map_err(|e| wrong(e.to_string()))?;
        }
        Recipe::deserialize(Value::Table(table)).map_err(|e| Error::file(path, e.to_string()))
    }

    /// The directory with the model's configuration files.
    pub fn layout(&self) -> &Path {
        match self {
            Self::Teacher(recipe) => &recipe.layout,
            Self::Student(recipe) => &recipe.layout,
        }
    }

    /// Changes the seed of weights, order and noise; the scenes stay.
    pub fn set_seed(&mut self, seed: u64) {
        match self {
            Self::Teacher(recipe) => recipe.seed = seed,
            Self::Student(recipe) => recipe.seed = seed,
        }
    }

    /// Measures the model in `dir` on the recipe's held-out scenes, without training.
    ///
    /// # Errors
    /// A model that cannot be opened, GPU faults.
    pub fn measure(&self, gpu: &Gpu, dir: &Path) -> Result<Vec<Figure>> {
        match self {
            Self::Teacher(recipe) => recipe.measure(gpu, dir),
            Self::Student(recipe) => recipe.measure(gpu, dir),
        }
    }

    /// Trains the model, writes it to `out`, opens what was written and measures it on held-out scenes.
    ///
    /// # Errors
    /// Configuration files that cannot be used, a loss that is not finite, GPU faults, [`Error::Interrupted`],
    /// files that cannot be written. Weights are written at the end only.
    pub fn run(&self, gpu: &Gpu, out: &Path, watch: &mut dyn Watch) -> Result<Vec<Figure>> {
        match self {
            Self::Teacher(recipe) => recipe.run(gpu, out, watch),
            Self::Student(recipe) => recipe.run(gpu, out, watch),
        }
    }
}

/// What the loop tells while it runs.
pub trait Watch {
    /// A part of `steps` steps begins.
    fn begin(&mut self, part: &str, steps: usize);
    /// A step's loss is known. An error (Ctrl-C) ends the training.
    fn step(&mut self, loss: f32) -> Result<()>;
}

/// A measured figure.
#[derive(Clone, Debug, PartialEq)]
pub struct Figure {
    /// What was measured, with its unit.
    pub name: String,
    /// The value.
    pub value: f64,
}

impl Figure {
    fn new(name: impl Into<String>, value: f64) -> Self {
        Self {
            name: name.into(),
            value,
        }
    }
}

/// Scenes of a recipe.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenes {
    /// Training scenes.
    pub train: usize,
    /// Held-out scenes that the result is measured on.
    pub held_out: usize,
    /// Seed of the scenes.
    pub seed: u64,
}

impl Scenes {
    fn training(&self) -> SceneSet {
        SceneSet::new(self.seed, Split::Train, self.train)
    }

    fn held_out(&self) -> SceneSet {
        SceneSet::new(self.seed, Split::HeldOut, self.held_out)
    }
}

/// Losses on their way from the device: each is looked at one step late, so the stream never stalls.
struct Losses<'a> {
    part: &'static str,
    watch: &'a mut dyn Watch,
    pending: Option<(u64, PendingRead)>,
}

impl<'a> Losses<'a> {
    fn new(part: &'static str, steps: usize, watch: &'a mut dyn Watch) -> Self {
        watch.begin(part, steps);
        Self {
            part,
            watch,
            pending: None,
        }
    }

    fn push(&mut self, gpu: &Gpu, step: u64, loss: PendingRead) -> Result<()> {
        gpu.check()?;
        let before = self.pending.replace((step, loss));
        self.look(before)
    }

    fn finish(mut self) -> Result<()> {
        let last = self.pending.take();
        self.look(last)
    }

    fn look(&mut self, pending: Option<(u64, PendingRead)>) -> Result<()> {
        let Some((step, read)) = pending else {
            return Ok(());
        };
        let loss = read.wait()?[0];
        if !loss.is_finite() {
            return Err(Error::NotFinite {
                step,
                what: format!("the {} loss", self.part),
                advice: "nothing was written; use a lower learning rate".into(),
            });
        }
        self.watch.step(loss)
    }
}

/// Copies the files of `layout` to `out`, but for weights.
fn copy_layout(layout: &Path, out: &Path) -> Result<()> {
    if !layout.is_dir() {
        return Err(Error::file(
            layout,
            "no such directory; expected the model's configuration files",
        ));
    }
    files::create_dir(out)?;
    if same_directory(layout, out) {
        return Ok(());
    }
    let entries = std::fs::read_dir(layout).map_err(|e| Error::io(layout, e))?;
    for entry in entries {
        let from = entry.map_err(|e| Error::io(layout, e))?.path();
        let to = out.join(from.file_name().unwrap_or_default());
        if from.is_dir() {
            copy_layout(&from, &to)?;
        } else if from.extension().is_none_or(|e| e != "safetensors") {
            let bytes = std::fs::read(&from).map_err(|e| Error::io(&from, e))?;
            files::write_bytes(&to, &bytes)?;
        }
    }
    Ok(())
}

fn same_directory(a: &Path, b: &Path) -> bool {
    let real = |path: &Path| -> Option<PathBuf> { path.canonicalize().ok() };
    real(a).is_some() && real(a) == real(b)
}
