//! `targets`: word maps of every sample from a diffusion model.

use std::path::PathBuf;
use std::str::FromStr;

use clap::ValueEnum;

use super::Context;
use crate::align::picture::{file_stem, save_png};
use crate::align::preview;
use crate::align::store::{
    Layout, MapType, Planned, Provenance, TargetOptions, TargetStore, TargetWriter, belongs,
    hash_of_files,
};
use crate::align::targets::{Item, Made, TargetMaker};
use crate::align::words::Case;
use crate::data::{DataSet, Sample};
use crate::diffusion::{MapLayers, StableDiffusion, TeacherOptions, Trajectory};
use crate::gpu::Tier;
use crate::train::config::Precision;
use crate::{Error, Result};

mod report;
mod work;

/// Options of `targets`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    lavender-wgpu targets --diffusion sd-v1-4 --data train.json --images pictures --out targets\n  \
    lavender-wgpu targets --diffusion sd-v1-4 --data train.json --out targets --mode noised --steps 5\n  \
    lavender-wgpu targets --diffusion sd-v1-4 --data train.json --out targets --shard 0/4    one of four machines\n  \
    lavender-wgpu targets --diffusion sd-v1-4 --data train.json --out targets --report       and look at them\n\n\
    A run that was stopped, however it was stopped, goes on where it was and ends with the same files. Samples with \
    targets are skipped; those that cannot have any are listed in failures-*.jsonl and tried again by the next run.")]
pub struct Args {
    /// Diffusion model: a directory in diffusers layout or a single safetensors file (Stable Diffusion v1)
    #[arg(long, value_name = "DIR")]
    pub diffusion: PathBuf,
    /// Data set: LLaVA/ShareGPT JSON, JSONL with `messages`, parquet, WebDataset tar, Karpathy JSON, or a folder
    #[arg(long, value_name = "PATH")]
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
    /// Cross-attention layers that make the maps: 16+32, 16 or daam
    #[arg(long, value_name = "NAME", default_value = MapLayers::default().name())]
    pub layers: String,
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
    /// Samples made together; a run that goes on takes the same for the same bytes [default: by the model's size]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub batch: Option<u16>,
    /// Also write what the first N samples' trajectories know of them into OUT/preview: the image, its VAE round trip,
    /// its DDIM and its null-text reconstruction side by side, with their signal-to-noise ratios
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "4")]
    pub preview: Option<usize>,
    /// Also write a page to look at: maps over images, their entropy, failures [default: OUT/report.html]
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    pub report: Option<Option<PathBuf>>,
}

impl Args {
    /// The defaults of the command line.
    pub fn new(diffusion: PathBuf, data: PathBuf, images: Option<PathBuf>, out: PathBuf) -> Self {
        Self {
            diffusion,
            data,
            images,
            out,
            mode: Mode::Ddim,
            steps: None,
            layers: MapLayers::default().name().to_owned(),
            shard: Shard { part: 0, parts: 1 },
            layout: StoreLayout::Shards,
            maps: StoredMaps::F16,
            case: WordCase::Lower,
            batch: None,
            preview: None,
            report: None,
        }
    }

    /// The same with words in this case.
    pub fn with_case(mut self, case: Case) -> Self {
        self.case = match case {
            Case::Lower => WordCase::Lower,
            Case::Keep => WordCase::Keep,
        };
        self
    }
}

/// Writes the targets of every sample that has none yet.
///
/// Samples that cannot be made are skipped and listed.
///
/// # Errors
/// A model or data set that cannot be read, a store made with other options or in use, not one sample that could be
/// made, a full disk, what the GPU reports. What was finished before stays, and the next run goes on from there.
pub fn run(args: &Args, context: &Context) -> Result<()> {
    let trajectory = args.mode.trajectory(args.steps)?;
    let layers = MapLayers::parse(&args.layers)?;
    let previews = Previews::new(args, trajectory)?;
    let data = DataSet::load(&args.data, args.images.as_deref())?;
    let gpu = context.gpu()?;
    let options = TeacherOptions {
        activations: context.activations(Precision::default())?,
    };
    let (mut model, plan) =
        StableDiffusion::load_planned(gpu, &args.diffusion, &options, trajectory)?;
    context.say(plan);
    model.batch = args
        .batch
        .map_or(model.batch, |batch| model.batch.min(batch.into()));
    let maker = TargetMaker {
        model: &model,
        trajectory,
        layers,
        case: args.case.into(),
        seed: context.seed(0),
    };
    let part = (args.shard.part, args.shard.parts);
    let mut writer = TargetWriter::create(
        &args.out,
        args.layout.into(),
        TargetOptions {
            teacher_hash: hash_of_files(&model.files()?)?,
            mode: trajectory.mode().to_owned(),
            steps: trajectory.steps(),
            layers: layers.name().to_owned(),
            seed: maker.seed,
            case: maker.case,
            precision: format!("{:?}", options.activations).to_lowercase(),
            maps: args.maps.into(),
        },
        provenance(&model, gpu.tier()),
        part,
    )?;
    let mine: Vec<&Sample> = data
        .samples
        .iter()
        .filter(|sample| belongs(&sample.id, part))
        .collect();
    let planned = mine.iter().map(|sample| planned(sample)).collect();
    let batch = args.batch.map_or(model.batch, |batch| batch.into());
    for damage in writer.damaged() {
        context.say(format_args!("made again: {damage}"));
    }
    let batches = writer
        .plan(planned, batch)
        .map_err(|e| work::explained(e, 0))?;
    let tally = work::run(&maker, &mine, batches, &mut writer, previews, context)?;
    drop(writer);
    tally.print(args, context)?;
    if let Some(file) = &args.report {
        let file = file.clone().unwrap_or_else(|| args.out.join("report.html"));
        let store = tally.any().then(|| TargetStore::open(&args.out));
        let store = store.transpose()?;
        report::write(&file, &args.out, store.as_ref(), &data, context)?;
    }
    tally.check()
}

/// The previews that are still to be written.
struct Previews {
    left: usize,
    dir: PathBuf,
}

impl Previews {
    /// Errors: previews of a trajectory that does not lead back to the image.
    fn new(args: &Args, trajectory: Trajectory) -> Result<Self> {
        let left = args.preview.unwrap_or(0);
        if left > 0 && matches!(trajectory, Trajectory::Noised { .. }) {
            return Err(Error::Config(PREVIEW_OF_NOISED.into()));
        }
        Ok(Self {
            left,
            dir: args.out.join("preview"),
        })
    }

    /// Writes those of a batch that are wanted.
    fn write(&mut self, maker: &TargetMaker, items: &[Item], made: &Made) -> Result<()> {
        for (place, item) in items.iter().enumerate().take(self.left) {
            let steps = maker.trajectory.steps();
            let found = preview::reconstructions(maker.model, item.image, made, place, steps)?;
            let file = self.dir.join(format!("{}.png", file_stem(item.id)));
            save_png(file, &preview::picture(maker.model, item.image, &found))?;
        }
        self.left = self.left.saturating_sub(items.len());
        Ok(())
    }
}

/// Why `--preview` and `--mode noised` do not go together.
pub(super) const PREVIEW_OF_NOISED: &str = "--preview: nothing to show, `--mode noised` follows no path back to the \
    image; use `--mode ddim` or `--mode null-text`";

fn planned(sample: &Sample) -> Planned {
    Planned {
        id: sample.id.clone(),
        image: Some(sample.image.file_name()),
        caption: sample.answer(),
    }
}

fn provenance(model: &StableDiffusion, tier: &Tier) -> Provenance {
    Provenance {
        teacher: model.path.display().to_string(),
        adapter: tier.name.clone(),
        driver: tier.driver.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

/// `--mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// DDIM inversion of the image; deterministic
    Ddim,
    /// A forward pass at each of a few timesteps on the noised image; cheap
    Noised,
    /// DDIM inversion, then back with an unconditional text optimised at each step; the method's own, and slow
    NullText,
}

impl Mode {
    /// The name that the store records.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ddim => "ddim",
            Self::Noised => "noised",
            Self::NullText => "null-text",
        }
    }

    /// The trajectory of `--mode` and `--steps`. Errors: a mode that is not available, steps out of range.
    pub fn trajectory(self, steps: Option<usize>) -> Result<Trajectory> {
        Trajectory::parse(self.as_str(), steps)
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
