//! `merge`: a model with a LoRA adapter merged into its weights.

use std::path::PathBuf;

use super::{Context, student};
use crate::align::options::Parallel;
use crate::tensor::DType;
use crate::vlm::merge::merge;
use crate::{Error, Result};

/// Options of `merge`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    lavender-wgpu merge --model SmolVLM-256M-Instruct --lora runs/001 --out SmolVLM-256M-Lavender\n  \
    lavender-wgpu merge --model Llama-3.2-11B-Vision-Instruct --lora adapter --out merged --dtype bf16")]
pub struct Args {
    /// Model in transformers layout, or `mini`
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Run directory or PEFT folder of the LoRA adapter
    #[arg(long, value_name = "DIR")]
    pub lora: PathBuf,
    /// Directory to write; must be new or empty
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Type of the written weights [default: each as in the base]
    #[arg(long, value_enum)]
    pub dtype: Option<Dtype>,
}

/// Type of written weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Dtype {
    /// 32-bit floats
    F32,
    /// 16-bit floats
    F16,
    /// bfloat16
    Bf16,
}

impl From<Dtype> for DType {
    fn from(dtype: Dtype) -> DType {
        match dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::Bf16 => DType::Bf16,
        }
    }
}

/// Writes W + scale · B A to a new directory that `transformers` loads; needs no GPU.
///
/// # Errors
/// As [`merge`]; Ctrl-C.
pub fn run(args: &Args, context: &Context) -> Result<()> {
    let scratch = student::Scratch::default();
    let base = scratch.model(&args.model)?;
    let lora = student::peft_folder(&args.lora);
    let config = student::run_config(&lora)?;
    if config.is_some_and(|config| config.attention.parallel == Parallel::DiffOutput) {
        return Err(Error::Input(format!(
            "--lora {}: its run has attention.parallel = \"diff-output\", and no Hugging Face model has room for what \
             parallel.safetensors adds to the output; `ask` and `eval` take the run by --lora",
            args.lora.display()
        )));
    }
    let mut progress = None;
    let merged = merge(
        &base,
        &lora,
        &args.out,
        args.dtype.map(DType::from),
        &mut |_, all, name| {
            context.interrupt.check()?;
            progress
                .get_or_insert_with(|| context.progress("merge", all))
                .step(name);
            Ok(())
        },
    )?;
    drop(progress);
    context.print(format_args!(
        "{} modules merged; {} tensors, {:.1} MiB in {}",
        merged.modules,
        merged.tensors,
        merged.bytes as f64 / (1 << 20) as f64,
        args.out.display()
    ))
}
