//! One form for every data set.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::{Error, Result};

/// A file that holds many encoded images, read one by one: a tar archive, a parquet file.
pub trait ImageFile: std::fmt::Debug + Send + Sync {
    /// The file.
    fn path(&self) -> &Path;

    /// The encoded image at place `at`. Errors: the file changed, is damaged, or holds an unreasonable size there.
    fn read(&self, at: u64) -> Result<Vec<u8>>;
}

/// Where a sample's image is.
#[derive(Clone, Debug)]
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
    /// One of the images in a larger file; read when the sample is used.
    Stored {
        /// File name that it would have.
        name: String,
        /// The larger file.
        file: Arc<dyn ImageFile>,
        /// Its place there.
        at: u64,
    },
}

impl PartialEq for ImageRef {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Path(a), Self::Path(b)) => a == b,
            (Self::Embedded { name, bytes }, Self::Embedded { name: n, bytes: b }) => {
                name == n && bytes == b
            }
            (
                Self::Stored { name, file, at },
                Self::Stored {
                    name: n,
                    file: f,
                    at: a,
                },
            ) => name == n && file.path() == f.path() && at == a,
            _ => false,
        }
    }
}

impl Eq for ImageRef {}

impl ImageRef {
    /// The file name without directories, as the published target sets are ordered by.
    pub fn file_name(&self) -> String {
        match self {
            Self::Path(path) => path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            Self::Embedded { name, .. } | Self::Stored { name, .. } => name.clone(),
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

/// All samples of a data set, in the file's order, or of several data sets one after the other.
#[derive(Clone, Debug)]
pub struct DataSet {
    /// The file, for messages.
    pub path: PathBuf,
    /// The samples; ids are unique within a share.
    pub samples: Vec<Sample>,
    /// The data sets that the samples come from: one, or those of a mixture.
    pub shares: Vec<Share>,
}

/// One data set of a mixture.
#[derive(Clone, Debug, PartialEq)]
pub struct Share {
    /// The file.
    pub path: PathBuf,
    /// Its samples, as indices into [`DataSet::samples`].
    pub samples: Range<usize>,
    /// Passes over it in an epoch.
    pub weight: f64,
}

impl Share {
    /// Samples that an epoch takes of it: weight × samples, rounded, at least one where there are any.
    pub fn drawn(&self) -> usize {
        let drawn = (self.weight * self.samples.len() as f64).round() as usize;
        drawn.max(usize::from(!self.samples.is_empty()))
    }
}

impl DataSet {
    /// Loads a data set, telling its format by its name and content: see [`super::format`].
    ///
    /// `images` is the folder that image paths are relative to; by default the one that the file is in. Errors name
    /// the file, the line, entry or row, the field, what was found and what was expected.
    pub fn load(path: impl AsRef<Path>, images: Option<&Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::new(path, super::format::load(path, images)?)
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
        let share = Share {
            path: path.clone(),
            samples: 0..samples.len(),
            weight: 1.0,
        };
        Ok(Self {
            path,
            samples,
            shares: vec![share],
        })
    }

    /// Several data sets as one, each with its number of passes in an epoch. Ids may repeat between them.
    pub fn mixture(sets: Vec<(DataSet, f64)>) -> Self {
        let paths: Vec<String> = sets
            .iter()
            .map(|(set, _)| set.path.display().to_string())
            .collect();
        let mut all = Self {
            path: paths.join(" + ").into(),
            samples: Vec::new(),
            shares: Vec::new(),
        };
        for (set, weight) in sets {
            let start = all.samples.len();
            all.samples.extend(set.samples);
            all.shares.push(Share {
                path: set.path,
                samples: start..all.samples.len(),
                weight,
            });
        }
        all
    }

    /// Keeps the samples whose flag is set; `kept` has one for each.
    pub fn keep(&mut self, kept: &[bool]) {
        let mut start = 0;
        for share in &mut self.shares {
            let count = kept[share.samples.clone()].iter().filter(|&&k| k).count();
            share.samples = start..start + count;
            start += count;
        }
        let mut flags = kept.iter();
        self.samples.retain(|_| flags.next() == Some(&true));
    }

    /// The share that a sample belongs to, by their indices.
    pub fn share_of(&self, sample: usize) -> usize {
        self.shares.partition_point(|s| s.samples.end <= sample)
    }

    /// Samples of an epoch: all of them, each share counted by its weight.
    pub fn epoch_len(&self) -> usize {
        self.shares.iter().map(Share::drawn).sum()
    }

    /// The order of an epoch: indices into `samples`.
    ///
    /// With `shuffle` it depends on the seed, the epoch and the numbers of samples alone (ChaCha8, Fisher–Yates), on
    /// every machine alike; without, it is the files' order. A share of weight w gives the next w × its samples of an
    /// endless row of passes over it, each pass in an order of its own: 0.5 is one half, and the other half an epoch
    /// later; 2 is every sample twice.
    pub fn order(&self, seed: u64, epoch: u64, shuffle: bool) -> Vec<usize> {
        if let [only] = &self.shares[..]
            && only.weight == 1.0
        {
            // A stream of its own for every epoch.
            return shuffled(only.samples.clone(), seed, epoch, shuffle);
        }
        let mut order = Vec::with_capacity(self.epoch_len());
        for (number, share) in self.shares.iter().enumerate() {
            let (length, drawn) = (share.samples.len() as u64, share.drawn() as u64);
            let (mut at, end) = (epoch * drawn, (epoch + 1) * drawn);
            while at < end {
                let pass = at / length;
                let stream = (number as u64 + 1) << 40 | pass;
                let samples = shuffled(share.samples.clone(), seed, stream, shuffle);
                let until = end.min((pass + 1) * length);
                let within = (at - pass * length) as usize..(until - pass * length) as usize;
                order.extend_from_slice(&samples[within]);
                at = until;
            }
        }
        if shuffle {
            order.shuffle(&mut random(seed, 1 << 63 | epoch));
        }
        order
    }
}

fn shuffled(samples: Range<usize>, seed: u64, stream: u64, shuffle: bool) -> Vec<usize> {
    let mut order: Vec<usize> = samples.collect();
    if shuffle {
        order.shuffle(&mut random(seed, stream));
    }
    order
}

fn random(seed: u64, stream: u64) -> ChaCha8Rng {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(stream);
    random
}
