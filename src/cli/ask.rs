//! `ask`: a vision-language model's answer about an image.

use std::io::Write;
use std::path::PathBuf;

use super::{Context, student};
use crate::data::ImageRef;
use crate::tensor::{HostTensor, save_safetensors};
use crate::train::config::Quantize;
use crate::vlm::Sampling;
use crate::vlm::processor::labels::Tail;
use crate::{Error, Result};

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
    /// Hold the model's linear weights in fewer bits [default: as the run of --lora did, else none]
    #[arg(long, value_enum)]
    pub quantize: Option<Quantize>,
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

/// Answers one question about one image; the answer goes to standard output as it comes.
///
/// # Errors
/// A model, adapter or image that cannot be read, a prompt longer than the context, what the GPU reports.
pub fn run(args: &Args, context: &Context) -> Result<()> {
    if !(args.temperature >= 0.0 && args.temperature.is_finite()) {
        return Err(Error::Input(format!(
            "--temperature: {} found, a number from 0 expected",
            args.temperature
        )));
    }
    let picture = ImageRef::Path(args.image.clone()).open()?;
    let model = student::open(&args.model, args.lora.as_deref(), args.quantize, context)?;
    let turns = [student::question(&args.prompt)];
    let prompt = model.prepare_with(&[picture], &turns, Tail::GenerationPrompt)?;
    let logits = match &args.logits {
        Some(_) => model.prompt_logits(&prompt)?,
        None => Vec::new(),
    };
    let sampling = Sampling {
        temperature: args.temperature,
        seed: context.seed(0),
    };
    let interrupt = &context.interrupt;
    let mut broken = None;
    let generated = model.generate(&prompt, args.max_tokens, sampling, &mut |_, text| {
        let mut out = std::io::stdout().lock();
        if let Err(error) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            broken.get_or_insert(error);
        }
    })?;
    interrupt.check()?;
    if let Some(error) = broken {
        return Err(Error::io(super::context::STANDARD_OUTPUT, error));
    }
    context.print("")?;
    if let Some(path) = &args.logits {
        let tokens = prompt.tokens();
        let tensors = [
            (
                "logits".to_string(),
                HostTensor::f32(&[tokens, model.vocabulary()], &logits),
            ),
            (
                "tokens".to_string(),
                HostTensor::u32(&[tokens], &prompt.ids),
            ),
            (
                "generated".to_string(),
                HostTensor::u32(&[generated.tokens.len()], &generated.tokens),
            ),
        ];
        save_safetensors(path, &tensors, None)?;
    }
    Ok(())
}
