//! `attention`: the word maps of one image and text, from a diffusion model or a vision-language model.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use image::RgbImage;

use super::Context;
use super::targets::Mode;
use crate::align::picture::{file_stem, overlay, save_png};
use crate::align::targets::{Item, TargetMaker, WordMaps};
use crate::align::words::Case;
use crate::data::ImageRef;
use crate::diffusion::maps::MAP_SIDE;
use crate::diffusion::pipeline::centre_square;
use crate::diffusion::{MapLayers, StableDiffusion, TeacherOptions};
use crate::ops::permute::permute;
use crate::tensor::{HostTensor, Tensor, save_safetensors};
use crate::train::config::Precision;
use crate::{Error, Result};

/// Options of `attention`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    lavender-wgpu attention --model sd-v1-4 --image dog.jpg --text \"a dog on a lawn\" --out maps.safetensors\n  \
    lavender-wgpu attention --model SmolVLM-256M-Instruct --image dog.jpg --prompt \"Describe the image.\" \\\n      \
    --text \"A dog on a lawn.\" --out maps.safetensors --png maps")]
pub struct Args {
    /// Model in diffusers layout, or in transformers layout
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Run directory or PEFT folder whose LoRA adapter is applied (vision-language models)
    #[arg(long, value_name = "DIR")]
    pub lora: Option<PathBuf>,
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
    /// How the latents get their noise (diffusion models)
    #[arg(long, value_enum, default_value_t = Mode::Ddim)]
    pub mode: Mode,
    /// Steps of the trajectory (diffusion models) [default: 50 for ddim, 5 for noised]
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// How maps of layers and heads become one (vision-language models)
    #[arg(long, value_name = "RULE", default_value = "mean-mean")]
    pub aggregate: String,
    /// Layers: `all`, `last:N` or a list such as `3,7` (vision-language models)
    #[arg(long, default_value = "all")]
    pub layers: String,
    /// Also write `probs`, the maps of every layer and head (vision-language models)
    #[arg(long)]
    pub per_head: bool,
}

/// Writes the word maps of one image and text.
///
/// # Errors
/// A model or image that cannot be read, a text without a word, a file that cannot be written, what the GPU reports.
pub fn run(args: &Args, context: &Context) -> Result<()> {
    from_diffusion(args, context)
}

/// The maps of a diffusion model, with the latents, text states and first noise prediction beside them.
fn from_diffusion(args: &Args, context: &Context) -> Result<()> {
    let trajectory = args.mode.trajectory(args.steps)?;
    let image = ImageRef::Path(args.image.clone()).open()?;
    let gpu = context.gpu()?;
    let options = TeacherOptions {
        activations: context.activations(Precision::default())?,
    };
    let model = StableDiffusion::load(gpu, &args.model, &options)?;
    let maker = TargetMaker {
        model: &model,
        trajectory,
        layers: MapLayers::default(),
        case: Case::Lower,
        seed: context.seed(0),
    };
    let mut progress = context.progress("attention", trajectory.steps());
    let item = Item {
        id: "--text",
        image: &image,
        text: &args.text,
    };
    let made = maker.make(&[item], |step| progress.step(format!("step {step}")))?;
    let run = &made.recorded.run;
    let mut tensors = word_tensors(&made.maps[0]);
    tensors.push(("latents".into(), channels_first(&made.latents)?));
    tensors.push(("text".into(), host(&made.recorded.text)?));
    tensors.push(("eps0".into(), channels_first(&run.first_noise)?));
    let mut metadata = word_metadata(&made.maps[0])?;
    metadata.insert("mode".into(), trajectory.mode().into());
    metadata.insert("steps".into(), trajectory.steps().to_string());
    save_safetensors(&args.out, &tensors, Some(metadata))?;
    if let Some(dir) = &args.png {
        write_pictures(dir, &centre_square(&image), &made.maps[0])?;
    }
    context.print(format_args!(
        "{} word maps: {}",
        made.maps[0].words.len(),
        args.out.display()
    ))
}

/// One picture a word, `<word>.png`: its map over the part of the image that the model saw.
fn write_pictures(dir: &Path, seen: &RgbImage, maps: &WordMaps) -> Result<()> {
    for (word, map) in maps.words.iter().zip(maps.maps.chunks(MAP_SIDE * MAP_SIDE)) {
        let file = dir.join(format!("{}.png", file_stem(&word.text)));
        save_png(file, &overlay(seen, map))?;
    }
    Ok(())
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
