//! `attention`: the word maps of one image and text, from a diffusion model or a vision-language model.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use image::RgbImage;

use super::targets::{Mode, PREVIEW_OF_NOISED};
use super::{Context, student};
use crate::align::filter::WordRules;
use crate::align::loss::aggregated;
use crate::align::maps::{SampleWords, min_max_host, word_maps};
use crate::align::options::Layers;
use crate::align::picture::{file_stem, gallery, overlay, save_png};
use crate::align::preview;
use crate::align::targets::{Item, TargetMaker, WordMaps};
use crate::align::words::{Case, Word};
use crate::autograd::{Var, no_grad};
use crate::data::ImageRef;
use crate::data::drawn::CAPTION_PROMPT;
use crate::diffusion::maps::MAP_SIDE;
use crate::diffusion::pipeline::centre_square;
use crate::diffusion::{MapLayers, StableDiffusion, TeacherOptions, Trajectory};
use crate::ops::permute::permute;
use crate::tensor::{HostTensor, Tensor, save_safetensors};
use crate::train::batch::answer_words;
use crate::train::config::{EMBEDDED, Precision, Quantize};
use crate::vlm::Taps;
use crate::vlm::processor::labels::Tail;
use crate::{Error, Result};

/// Options of `attention`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    lavender-wgpu attention --model sd-v1-4 --image dog.jpg --text \"a dog on a lawn\" --out maps.safetensors\n  \
    lavender-wgpu attention --model SmolVLM-256M-Instruct --image dog.jpg --prompt \"Describe the image.\" \\\n      \
    --text \"A dog on a lawn.\" --out maps.safetensors --png maps --sheet maps.png")]
pub struct Args {
    /// Model in diffusers layout, or in transformers layout
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Run directory or PEFT folder whose LoRA adapter is applied (vision-language models)
    #[arg(long, value_name = "DIR")]
    pub lora: Option<PathBuf>,
    /// Hold the model's linear weights in fewer bits (vision-language models) [default: as the run of --lora did,
    /// else none]
    #[arg(long, value_enum)]
    pub quantize: Option<Quantize>,
    /// Image
    #[arg(long, value_name = "FILE")]
    pub image: PathBuf,
    /// Text whose words get maps; for a vision-language model the answer, teacher-forced
    #[arg(long)]
    pub text: String,
    /// Question before the answer (vision-language models)
    #[arg(long, value_name = "Q")]
    pub prompt: Option<String>,
    /// File to write: `maps`, `raw` and the list of words
    #[arg(long, value_name = "FILE.safetensors")]
    pub out: PathBuf,
    /// Also write a picture of each word's map over the image
    #[arg(long, value_name = "DIR")]
    pub png: Option<PathBuf>,
    /// Also write all words' maps over the image on one sheet
    #[arg(long, value_name = "FILE.png")]
    pub sheet: Option<PathBuf>,
    /// How the latents get their noise (diffusion models)
    #[arg(long, value_enum, default_value_t = Mode::Ddim)]
    pub mode: Mode,
    /// Steps of the trajectory (diffusion models) [default: 50 for ddim, 5 for noised]
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// How maps of layers and heads become one (vision-language models)
    #[arg(long, value_name = "RULE", default_value = "mean-mean")]
    pub aggregate: String,
    /// Layers: `all`, `last:N` or a list such as `3,7` (vision-language models); `16+32`, `16` or `daam` (diffusion
    /// models) [default: all, 16+32]
    #[arg(long)]
    pub layers: Option<String>,
    /// Also write the image, its VAE round trip, and its DDIM and null-text reconstructions side by side, with their
    /// signal-to-noise ratios (diffusion models, --mode ddim or null-text)
    #[arg(long, value_name = "FILE.png")]
    pub preview: Option<PathBuf>,
    /// Also write `probs`, the maps of every layer and head (vision-language models)
    #[arg(long)]
    pub per_head: bool,
}

/// Writes the word maps of one image and text.
///
/// # Errors
/// A model or image that cannot be read, a text without a word, a file that cannot be written, what the GPU reports.
pub fn run(args: &Args, context: &Context) -> Result<()> {
    let student = args.model.join("config.json").is_file() || args.model == Path::new(EMBEDDED);
    match student {
        true => from_student(args, context),
        false => from_diffusion(args, context),
    }
}

/// The maps of a vision-language model's answer, teacher-forced.
fn from_student(args: &Args, context: &Context) -> Result<()> {
    let (aggregate, layers) = (
        parsed("aggregate", &args.aggregate)?,
        parsed::<Layers>("layers", args.layers.as_deref().unwrap_or("all"))?,
    );
    let image = ImageRef::Path(args.image.clone()).open()?;
    let model = student::open(&args.model, args.lora.as_deref(), args.quantize, context)?;
    let aligner = student::aligner(aggregate, model.heads(), args.lora.as_deref(), context)?;
    let available: Vec<usize> = (0..model.hooked_layers()).collect();
    let layers = layers.choose(&available).map_err(Error::Input)?;
    let turns = [student::question(
        args.prompt.as_deref().unwrap_or(CAPTION_PROMPT),
    )];
    let pictures = [image];
    let prepared = model.prepare_with(&pictures, &turns, Tail::Answer(&args.text))?;
    let found = answer_words(&prepared, &WordRules::default());
    let words = SampleWords::new(&found);
    if words.is_empty() {
        return Err(Error::Input(format!(
            "--text {:?} has no word, so there is nothing to map; give an answer with a word",
            args.text
        )));
    }
    let gpu = context.gpu()?;
    let rows: Vec<u32> = words.rows.iter().map(|&row| row as u32).collect();
    let taps = Taps {
        layers: &layers,
        rows: Tensor::from_u32(gpu, &rows, &[rows.len()]),
        columns: Tensor::from_u32(gpu, &prepared.columns, &[1, prepared.columns.len()]),
        mirror: None,
    };
    let maps: Vec<Var> = no_grad(|| -> Result<Vec<Var>> {
        let output = model.forward(&[&prepared], Some(&taps))?;
        let samples = [(&words, prepared.grid)];
        Ok(output
            .taps
            .iter()
            .filter_map(|tap| word_maps(gpu, tap, &samples))
            .collect())
    })?;
    let raw = no_grad(|| {
        aggregated(&maps, &[words.words.len()], &aggregate.into(), &aligner)
            .value()
            .to_f32()
    })?;
    let side = MAP_SIDE * MAP_SIDE;
    let result = WordMaps {
        words: words
            .words
            .iter()
            .map(|text| Word {
                text: text.clone(),
                spans: Vec::new(),
            })
            .collect(),
        maps: raw.chunks(side).flat_map(min_max_host).collect(),
        raw,
    };
    let mut tensors = word_tensors(&result);
    if args.per_head {
        // [words, R, R, heads] of each layer → [layers, heads, words, R, R].
        let mut values = Vec::new();
        for map in &maps {
            values.extend(permute(map.value(), &[3, 0, 1, 2]).to_f32()?);
        }
        let shape = [
            maps.len(),
            model.heads(),
            result.words.len(),
            MAP_SIDE,
            MAP_SIDE,
        ];
        tensors.push(("probs".into(), HostTensor::f32(&shape, &values)));
    }
    let mut metadata = word_metadata(&result)?;
    metadata.insert("aggregate".into(), args.aggregate.clone());
    let layers = args.layers.as_deref().unwrap_or("all");
    metadata.insert("layers".into(), layers.to_owned());
    save_safetensors(&args.out, &tensors, Some(metadata))?;
    write_pictures(args, &pictures[0], &result)?;
    context.print(format_args!(
        "{} word maps: {}",
        result.words.len(),
        args.out.display()
    ))
}

/// An option's value, with the option named where it cannot be read.
fn parsed<T: std::str::FromStr<Err = String>>(option: &str, text: &str) -> Result<T> {
    text.parse()
        .map_err(|e| Error::Input(format!("--{option}: {e}")))
}

/// The maps of a diffusion model, with the latents, text states and first noise prediction beside them.
fn from_diffusion(args: &Args, context: &Context) -> Result<()> {
    let trajectory = args.mode.trajectory(args.steps)?;
    if args.preview.is_some() && matches!(trajectory, Trajectory::Noised { .. }) {
        return Err(Error::Config(PREVIEW_OF_NOISED.into()));
    }
    let image = ImageRef::Path(args.image.clone()).open()?;
    let gpu = context.gpu()?;
    let options = TeacherOptions {
        activations: context.activations(Precision::default())?,
    };
    let (model, plan) = StableDiffusion::load_planned(gpu, &args.model, &options, trajectory)?;
    context.say(plan);
    let maker = TargetMaker {
        model: &model,
        trajectory,
        layers: match &args.layers {
            Some(name) => MapLayers::parse(name)?,
            None => MapLayers::default(),
        },
        case: Case::Lower,
        seed: context.seed(0),
    };
    // A text without a word is refused below, with what to do.
    let chunks = model.tokenizer.chunks(&args.text).unwrap_or_default();
    let total = model.progress(&[chunks], trajectory);
    let mut progress = context.progress("attention", total);
    let item = Item {
        id: "--text",
        image: &image,
        text: &args.text,
    };
    let made = maker.make(&[item], |step| {
        progress.step(format!("step {step}"));
        context.interrupt.check()
    })?;
    if let Some(file) = &args.preview {
        let found = preview::reconstructions(&model, &image, &made, 0, trajectory.steps())?;
        save_png(file, &preview::picture(&model, &image, &found))?;
    }
    let recorded = &made.recorded;
    let mut tensors = word_tensors(&made.maps[0]);
    tensors.push(("latents".into(), channels_first(&made.latents)?));
    tensors.push(("text".into(), host(&recorded.text)?));
    tensors.push(("eps0".into(), channels_first(&recorded.first_noise)?));
    if let (Some(embeddings), Some(latents)) = (&recorded.null_text, &recorded.reconstructed) {
        tensors.push(("null_text".into(), host(embeddings)?));
        tensors.push(("reconstructed".into(), channels_first(latents)?));
    }
    let mut metadata = word_metadata(&made.maps[0])?;
    metadata.insert("mode".into(), trajectory.mode().into());
    metadata.insert("steps".into(), trajectory.steps().to_string());
    save_safetensors(&args.out, &tensors, Some(metadata))?;
    write_pictures(args, &centre_square(&image), &made.maps[0])?;
    context.print(format_args!(
        "{} word maps: {}",
        made.maps[0].words.len(),
        args.out.display()
    ))
}

/// Words beside each other on the sheet.
const SHEET_COLUMNS: usize = 5;

/// The pictures that were asked for: one a word, `<word>.png`, its map over the part of the image that the model saw;
/// and all of them on one sheet.
fn write_pictures(args: &Args, seen: &RgbImage, maps: &WordMaps) -> Result<()> {
    if args.png.is_none() && args.sheet.is_none() {
        return Ok(());
    }
    let mut cells = vec![("image".to_owned(), seen.clone())];
    for (word, map) in maps.words.iter().zip(maps.maps.chunks(MAP_SIDE * MAP_SIDE)) {
        let picture = overlay(seen, map);
        if let Some(dir) = &args.png {
            let file = dir.join(format!("{}.png", file_stem(&word.text)));
            save_png(file, &picture)?;
        }
        cells.push((word.text.clone(), picture));
    }
    match &args.sheet {
        Some(file) => save_png(file, &gallery(&cells, SHEET_COLUMNS)),
        None => Ok(()),
    }
}

/// `maps` and `raw`, f32 `[words, 32, 32]`.
fn word_tensors(maps: &WordMaps) -> Vec<(String, HostTensor)> {
    let shape = [maps.words.len(), MAP_SIDE, MAP_SIDE];
    vec![
        ("maps".into(), HostTensor::f32(&shape, &maps.maps)),
        ("raw".into(), HostTensor::f32(&shape, &maps.raw)),
    ]
}

/// `words`: a JSON list in the order of the maps.
fn word_metadata(maps: &WordMaps) -> Result<HashMap<String, String>> {
    let words: Vec<&str> = maps.words.iter().map(|word| word.text.as_str()).collect();
    let words = serde_json::to_string(&words).map_err(|e| Error::Input(e.to_string()))?;
    Ok(HashMap::from([("words".into(), words)]))
}

/// `[batch, height, width, channels]` as the libraries lay it out, `[batch, channels, height, width]`.
fn channels_first(x: &Tensor) -> Result<HostTensor> {
    host(&permute(x, &[0, 3, 1, 2]))
}

fn host(x: &Tensor) -> Result<HostTensor> {
    Ok(HostTensor::f32(x.shape(), &x.to_f32()?))
}
