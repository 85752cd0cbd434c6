//! Keys of the data: where it is, where its targets are, how it is read.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{EMBEDDED, range};
use crate::Result;
use crate::data::DataSet;

/// `[data]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Data {
    /// Data set: a file, a folder or a pattern as in [`crate::data::format`], `PATH#SPLIT` for a split; default
    /// [`EMBEDDED`].
    pub path: PathBuf,
    /// Folder that image paths are relative to; default the data set's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub images: Option<PathBuf>,
    /// Target store (ours or the public `lpm_attention` root). Without one, `data.diffusion` makes it in the run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub targets: Option<PathBuf>,
    /// Diffusion model that makes targets where there are none; default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub diffusion: Option<PathBuf>,
    /// Whether each epoch has its own order; default true.
    pub shuffle: bool,
    /// What becomes of samples that the target store lacks; default `language`.
    pub without_targets: WithoutTargets,
    /// Tokens that longer samples are cut to, at their end, never in a picture; default none: a sample that is longer
    /// than the model's context is refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<usize>,
    /// Threads that prepare samples ahead, 0 for none; default one for each core but one, at most 8.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workers: Option<usize>,
    /// Several data sets instead of `path`; default none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub mixture: Vec<MixturePart>,
}

/// `data.without_targets`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WithoutTargets {
    /// They are trained on with the language loss alone.
    #[default]
    Language,
    /// They are left out.
    Skip,
}

/// `[[data.mixture]]`: one data set of several.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixturePart {
    /// Data set.
    pub path: PathBuf,
    /// Folder that image paths are relative to; default the data set's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<PathBuf>,
    /// Its target store; without one, `data.diffusion` makes it in the run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub targets: Option<PathBuf>,
    /// How many times an epoch passes over it; 0.5 takes one half in the first epoch and the other in the second.
    /// Default 1.
    #[serde(default = "one")]
    pub weight: f64,
}

fn one() -> f64 {
    1.0
}

impl Default for Data {
    fn default() -> Self {
        Self {
            path: EMBEDDED.into(),
            images: None,
            targets: None,
            diffusion: None,
            shuffle: true,
            without_targets: WithoutTargets::default(),
            max_tokens: None,
            workers: None,
            mixture: Vec::new(),
        }
    }
}

impl Data {
    /// The data set, or the mixture of several. Errors as [`DataSet::load`]'s.
    pub fn load(&self) -> Result<DataSet> {
        if self.mixture.is_empty() {
            return DataSet::load(&self.path, self.images.as_deref());
        }
        let load = |part: &MixturePart| {
            Ok((
                DataSet::load(&part.path, part.images.as_deref())?,
                part.weight,
            ))
        };
        Ok(DataSet::mixture(
            self.mixture.iter().map(load).collect::<Result<_>>()?,
        ))
    }

    /// The target store of each of [`DataSet::shares`].
    pub fn stores(&self) -> Vec<Option<PathBuf>> {
        match self.mixture.is_empty() {
            true => vec![self.targets.clone()],
            false => self.mixture.iter().map(|p| p.targets.clone()).collect(),
        }
    }

    pub(super) fn check(&self) -> std::result::Result<(), (&'static str, String)> {
        if self.mixture.is_empty() {
            return Ok(());
        }
        for part in &self.mixture {
            range(
                "data.mixture",
                part.weight,
                part.weight > 0.0 && part.weight <= 1000.0,
                "a weight above 0, at most 1000",
            )?;
        }
        let beside = [
            ("data.path", self.path != Path::new(EMBEDDED)),
            ("data.images", self.images.is_some()),
            ("data.targets", self.targets.is_some()),
        ];
        match beside.iter().find(|(_, given)| *given) {
            Some((key, _)) => Err((
                key,
                "found beside `data.mixture`, expected in each of its parts instead".into(),
            )),
            None => Ok(()),
        }
    }
}
