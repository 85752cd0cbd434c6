//! `attention`: the word maps of one image and text, from a diffusion model or a vision-language model.

use std::path::PathBuf;

use super::targets::Mode;

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
