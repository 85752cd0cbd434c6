//! One form for every data set.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::{Error, Result};

/// Where a sample's image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageRef {
    /// A file; read when the sample is used.
    Path(PathBuf),
    /// An encoded image (PNG, JPEG, WebP …) in memory, with a name for messages and for the target store.
    Embedded {
        /// File name that it would have.
        name: String,
        /// The encoded file.
        bytes: Arc<[u8]>,
    },
}

impl ImageRef {
    /// The file name without directories, as the published target sets are ordered by.
    pub fn file_name(&self) -> String {
        match self {
            Self::Path(path) => path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            Self::Embedded { name, .. } => name.clone(),
        }
    }
}

/// Who speaks in a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Instructions before the conversation.
    System,
    /// The person.
    User,
    /// The model; what it says is what is learned.
    Assistant,
}

impl Role {
    /// The name that chat templates use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// A piece of a turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// The sample's image stands here.
    Image,
    /// Text.
    Text(String),
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Who speaks.
    pub role: Role,
    /// What is said, in order.
    pub parts: Vec<Part>,
}

impl Turn {
    /// The turn's text parts, joined.
    pub fn text(&self) -> String {
        self.parts
            .iter()
            .filter_map(|part| match part {
                Part::Text(text) => Some(text.as_str()),
                Part::Image => None,
            })
            .collect()
    }
}

/// An image and a conversation about it that ends with an assistant's turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Unique within the data set; targets are found by it.
    pub id: String,
    /// The image.
    pub image: ImageRef,
    /// The conversation.
    pub turns: Vec<Turn>,
}

impl Sample {
    /// A sample of one question and its answer.
    pub fn question(id: impl Into<String>, image: ImageRef, question: &str, answer: &str) -> Self {
        Self {
            id: id.into(),
            image,
            turns: vec![
                Turn {
                    role: Role::User,
                    parts: vec![Part::Image, Part::Text(question.to_owned())],
                },
                Turn {
                    role: Role::Assistant,
                    parts: vec![Part::Text(answer.to_owned())],
                },
            ],
        }
    }

    /// The texts of the assistant's turns, joined by a space: the caption whose words get targets.
    pub fn answer(&self) -> String {
        let turns: Vec<String> = self
            .turns
            .iter()
            .filter(|turn| turn.role == Role::Assistant)
            .map(Turn::text)
            .collect();
        turns.join(" ")
    }
}

/// All samples of a data set, in the file's order.
#[derive(Clone, Debug)]
pub struct DataSet {
    /// The file, for messages.
    pub path: PathBuf,
    /// The samples; ids are unique.
    pub samples: Vec<Sample>,
}

impl DataSet {
    /// Loads a data set, telling its format by its content.
    ///
    /// LLaVA/ShareGPT JSON and JSONL with `messages` are read (see [`super::conversations`]). `images` is the folder
    /// that image paths are relative to; by default the one that the file is in. Errors name the file, the line or
    /// entry, the field, what was found and what was expected.
    pub fn load(path: impl AsRef<Path>, images: Option<&Path>) -> Result<Self> {
        let path = path.as_ref();
        let samples = super::conversations::load(path, images)?;
        Self::new(path, samples)
    }

    /// A data set of samples at hand. Errors: none at all, or two of the same id.
    pub fn new(path: impl AsRef<Path>, samples: Vec<Sample>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        if samples.is_empty() {
            return Err(Error::file(path, "holds no samples"));
        }
        let mut seen = std::collections::HashSet::new();
        for sample in &samples {
            if !seen.insert(sample.id.as_str()) {
                return Err(Error::file(
                    path,
                    format!(
                        "field `id`: `{}` stands twice, expected one sample an id",
                        sample.id
                    ),
                ));
            }
        }
        Ok(Self { path, samples })
    }

    /// The order of an epoch: indices into `samples`, each once.
    ///
    /// With `shuffle` it depends on the seed, the epoch and the number of samples alone (ChaCha8, Fisher–Yates), on
    /// every machine alike; without, it is the file's order.
    pub fn order(&self, seed: u64, epoch: u64, shuffle: bool) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.samples.len()).collect();
        if shuffle {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            // A stream of its own for every epoch.
            random.set_stream(epoch);
            order.shuffle(&mut random);
        }
        order
    }
}
