//! `ask`: a vision-language model's answer about an image.

use std::path::PathBuf;

/// Options of `ask`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    lavender-wgpu ask --model SmolVLM-256M-Instruct --image dog.jpg \"What is on the lawn?\"\n  \
    lavender-wgpu ask --model SmolVLM-256M-Instruct --lora runs/001/lora --image dog.jpg \"Describe the image.\"\n  \
    lavender-wgpu ask --model DIR --image dog.jpg \"Describe.\" --max-tokens 0 --logits logits.safetensors")]
pub struct Args {
    /// Model in transformers layout
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Run directory or PEFT folder whose LoRA adapter is applied
    #[arg(long, value_name = "DIR")]
    pub lora: Option<PathBuf>,
    /// Image
    #[arg(long, value_name = "FILE")]
    pub image: PathBuf,
    /// The question
    #[arg(value_name = "PROMPT")]
    pub prompt: String,
    /// Most tokens to generate
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub max_tokens: usize,
    /// 0 always takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub temperature: f32,
    /// Also write `logits`, `tokens` and `generated`
    #[arg(long, value_name = "FILE.safetensors")]
    pub logits: Option<PathBuf>,
}
