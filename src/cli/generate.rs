//! `generate`: a picture from a text, to see that a teacher can paint.

use std::path::PathBuf;

use super::Context;
use crate::align::picture::save_png;
use crate::diffusion::ddim::gaussian;
use crate::diffusion::sampler::{GenerateOptions, Sampler};
use crate::diffusion::{StableDiffusion, TeacherOptions};
use crate::tensor::Tensor;
use crate::train::config::Precision;
use crate::{Error, Result};

/// Options of `generate`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    lavender-wgpu generate --diffusion sd-v1-4 \"a dog on a lawn\" --out dog.png\n  \
    lavender-wgpu generate --diffusion sd-v1-4 \"a dog on a lawn\" --sampler ddim --steps 20 --seed 7 --count 4\n\n\
    The picture of a seed is the same on every machine but for rounding; it is not the one that PyTorch draws from it.")]
pub struct Args {
    /// Diffusion model: a directory in diffusers layout or a single safetensors file (Stable Diffusion v1)
    #[arg(long, value_name = "DIR")]
    pub diffusion: PathBuf,
    /// What to paint; cut where it is longer than the text encoder's context
    pub text: String,
    /// File to write; with --count the number is put before its ending [default: generated-SEED.png]
    #[arg(long, value_name = "FILE.png")]
    pub out: Option<PathBuf>,
    /// Steps from noise to picture
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub steps: usize,
    /// Weight of the text, 1 for none beyond the model's own
    #[arg(long, value_name = "G", default_value_t = 7.5)]
    pub guidance: f32,
    /// ddim or pndm
    #[arg(long, value_name = "NAME", default_value_t = Sampler::default())]
    pub sampler: Sampler,
    /// What not to paint
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub negative: String,
    /// Pictures to paint, with the seeds from --seed up
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub count: u64,
}

/// Paints and writes the pictures.
///
/// # Errors
/// A model that cannot be read, options out of range, a file that cannot be written, what the GPU reports.
pub fn run(args: &Args, context: &Context) -> Result<()> {
    if !args.guidance.is_finite() {
        return Err(Error::Config(format!(
            "--guidance: found {}, expected a number",
            args.guidance
        )));
    }
    let gpu = context.gpu()?;
    let options = TeacherOptions {
        activations: context.activations(Precision::default())?,
    };
    let model = StableDiffusion::load(gpu, &args.diffusion, &options)?;
    let options = GenerateOptions {
        steps: args.steps,
        guidance: args.guidance,
        sampler: args.sampler,
        negative: args.negative.clone(),
    };
    let chunk = model.tokenizer.chunk_of(&args.text)?;
    if model
        .tokenizer
        .chunks(&args.text)
        .is_ok_and(|c| c.len() > 1)
    {
        context.say(format_args!(
            "the text is longer than the model's context; it paints the first {} tokens",
            chunk.offsets.len()
        ));
    }
    let side = model.latent_side();
    let channels = model.vae.config().latent_channels;
    let first = context.seed(0);
    let total = model.moves(&options) * args.count as usize;
    let mut progress = context.progress("generate", total);
    for seed in (0..args.count).map(|i| first.wrapping_add(i)) {
        let noise = gaussian(seed, side * side * channels);
        let noise = Tensor::from_f32(gpu, &noise, &[1, side, side, channels]);
        let latents = model.generate(&noise, &[&args.text], &options, |step| {
            progress.step(format!("seed {seed}, step {step}"));
            context.interrupt.check()
        })?;
        let out = match (&args.out, args.count) {
            (None, _) => PathBuf::from(format!("generated-{seed}.png")),
            (Some(out), 1) => out.clone(),
            (Some(out), _) => {
                let stem = out.file_stem().unwrap_or_default().to_string_lossy();
                out.with_file_name(format!("{stem}-{seed}.png"))
            }
        };
        for image in model.decode_latents(&latents)? {
            save_png(&out, &image)?;
        }
        context.print(format_args!("{}", out.display()))?;
    }
    Ok(())
}
