//! `targets`: word maps of every sample from a diffusion model.

use std::path::PathBuf;
use std::str::FromStr;

use clap::ValueEnum;

use crate::align::store::{Layout, MapType};
use crate::align::words::Case;

/// Options of `targets`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    lavender-wgpu targets --diffusion sd-v1-4 --data train.json --images pictures --out targets\n  \
    lavender-wgpu targets --diffusion sd-v1-4 --data train.json --out targets --mode noised --steps 5\n  \
    lavender-wgpu targets --diffusion sd-v1-4 --data train.json --out targets --shard 0/4    one of four machines\n\n\
    A run that was stopped goes on where it was: samples with targets are skipped.")]
pub struct Args {
    /// Diffusion model in diffusers layout (Stable Diffusion v1)
    #[arg(long, value_name = "DIR")]
    pub diffusion: PathBuf,
    /// Data set: LLaVA/ShareGPT JSON, or JSONL with `messages`
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    /// Folder that image paths are relative to [default: the data set's]
    #[arg(long, value_name = "DIR")]
    pub images: Option<PathBuf>,
    /// Target store to write or to go on with
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// How the latents get their noise
    #[arg(long, value_enum, default_value_t = Mode::Ddim)]
    pub mode: Mode,
    /// Steps of the trajectory [default: 50 for ddim, 5 for noised]
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// Only part I of N (I from 0), for several machines
    #[arg(long, value_name = "I/N", default_value = "0/1")]
    pub shard: Shard,
    /// Layout of the store
    #[arg(long, value_enum, default_value_t = StoreLayout::Shards)]
    pub layout: StoreLayout,
    /// Type of the stored maps
    #[arg(long, value_enum, default_value_t = StoredMaps::F16)]
    pub maps: StoredMaps,
    /// Case in which words are stored and compared
    #[arg(long, value_enum, default_value_t = WordCase::Lower)]
    pub case: WordCase,
}

/// `--mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// DDIM inversion of the image; deterministic
    Ddim,
    /// A forward pass at each of a few timesteps on the noised image; cheap
    Noised,
}

impl Mode {
    /// The name that the store records.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ddim => "ddim",
            Self::Noised => "noised",
        }
    }
}

/// `--layout`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StoreLayout {
    /// Safetensors shards with a JSONL index
    Shards,
    /// The published `lpm_attention` folders of JPEG files
    LpmAttention,
}

impl From<StoreLayout> for Layout {
    fn from(layout: StoreLayout) -> Self {
        match layout {
            StoreLayout::Shards => Self::Shards,
            StoreLayout::LpmAttention => Self::Published,
        }
    }
}

/// `--maps`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StoredMaps {
    /// Half precision
    F16,
    /// One byte
    U8,
}

impl From<StoredMaps> for MapType {
    fn from(maps: StoredMaps) -> Self {
        match maps {
            StoredMaps::F16 => Self::F16,
            StoredMaps::U8 => Self::U8,
        }
    }
}

/// `--case`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WordCase {
    /// Lower case
    Lower,
    /// As written
    Keep,
}

impl From<WordCase> for Case {
    fn from(case: WordCase) -> Self {
        match case {
            WordCase::Lower => Self::Lower,
            WordCase::Keep => Self::Keep,
        }
    }
}

/// `--shard I/N`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// I, from 0.
    pub part: usize,
    /// N.
    pub parts: usize,
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let numbers = text
            .split_once('/')
            .and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        match numbers {
            Some((part, parts)) if part < parts => Ok(Self { part, parts }),
            _ => Err("expected I/N with I from 0 to N-1, such as 0/4".into()),
        }
    }
}
