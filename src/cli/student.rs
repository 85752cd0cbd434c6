//! Opening a vision-language model for `ask` and `attention`.

use std::cell::OnceCell;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::Context;
use crate::align::aligner::{Aligner, AlignerShape};
use crate::align::options::{
    Aggregate, Aggregation, AlignerActivation, AlignerKind, AlignerNorm, Parallel,
};
use crate::error::{Error, Result};
use crate::nn::{LoadOptions, load_lora, lora_config};
use crate::train::config::{Config, EMBEDDED, Precision, Quantize};
use crate::train::trained::PARALLEL;
use crate::vlm::Student;
use crate::vlm::processor::template::Message;

/// The model at `dir` (`mini`: the embedded one), with the LoRA
/// adapter of a PEFT folder or of a run directory. Linear weights are held as `quantize` says, else as that run
/// held them.
///
/// # Errors
/// A model or adapter that cannot be read or does not fit.
pub(super) fn open(
    dir: &Path,
    lora: Option<&Path>,
    quantize: Option<Quantize>,
    context: &Context,
) -> Result<Student> {
    let quantize = match (quantize, lora) {
        (Some(quantize), _) => quantize,
        (None, Some(lora)) => quantize_of(lora)?,
        (None, None) => Quantize::None,
    };
    let lora = lora.map(peft_folder);
    let options = LoadOptions {
        lora: lora.as_deref().map(lora_config).transpose()?,
        activations: context.activations(Precision::default())?,
        quantize: quantize.kind(),
        ..LoadOptions::default()
    };
    let scratch = Scratch::default();
    let mut student = Student::open(scratch.model(dir)?, context.gpu()?, options)?;
    if let Some(lora) = &lora {
        load_lora(lora, &student.parameters(), |name| {
            student.rename_lora(name)
        })?;
    }
    add_parallel(&mut student, lora.as_deref().unwrap_or(dir))?;
    Ok(student)
}

/// The parallel attention of the run that trained what is at `trained`, if it had one.
fn add_parallel(student: &mut Student, trained: &Path) -> Result<()> {
    let Some(attention) = run_config(trained)?.map(|config| config.attention) else {
        return Ok(());
    };
    if attention.parallel == Parallel::None {
        return Ok(());
    }
    let available: Vec<usize> = (0..student.hooked_layers()).collect();
    let layers = attention.layers.choose(&available).map_err(Error::Config)?;
    let file = trained.with_file_name(PARALLEL);
    student.add_parallel(attention.parallel, &layers, Some(&file), 0)?;
    Ok(())
}

/// Where the embedded model is unpacked to while it is read.
#[derive(Default)]
pub(super) struct Scratch(OnceCell<TempDir>);

impl Scratch {
    /// The directory `dir`, or for `mini` the embedded model's.
    ///
    /// # Errors
    /// No room for temporary files.
    pub(super) fn model(&self, dir: &Path) -> Result<PathBuf> {
        if dir != Path::new(EMBEDDED) {
            return Ok(dir.to_path_buf());
        }
        let made = tempfile::tempdir().map_err(|e| Error::io(dir, e))?;
        crate::embedded::unpack("student", self.0.get_or_init(|| made).path())
    }
}

/// A run directory's `lora/`, or the folder itself.
pub(super) fn peft_folder(dir: &Path) -> PathBuf {
    match dir.join("lora/adapter_config.json").is_file() {
        true => dir.join("lora"),
        false => dir.to_path_buf(),
    }
}

/// `model.quantize` of the run that `lora` lies in, up to `checkpoints/step-N/lora`; `none` of a PEFT folder elsewhere.
fn quantize_of(lora: &Path) -> Result<Quantize> {
    let config = run_config(lora)?;
    Ok(config.map_or(Quantize::None, |config| config.model.quantize))
}

/// The configuration of the run that `dir` lies in, up to `checkpoints/step-N/lora`; `None` of a folder elsewhere.
pub(super) fn run_config(dir: &Path) -> Result<Option<Config>> {
    let run = dir.ancestors().take(4).find(|dir| {
        let files = ["config.toml", "metrics.jsonl"];
        files.iter().all(|file| dir.join(file).is_file())
    });
    run.map(|run| Config::load(run.join("config.toml"), &[]))
        .transpose()
}

/// The aligner that `aggregate` needs: a run's, or none where one map comes out without it.
///
/// # Errors
/// An aggregation with a learned part where `lora` is no run directory.
pub(super) fn aligner(
    aggregate: Aggregate,
    heads: usize,
    lora: Option<&Path>,
    context: &Context,
) -> Result<Aligner> {
    let gpu = context.gpu()?;
    let plain = AlignerShape {
        kind: AlignerKind::None,
        channels: 1,
        hidden: 1,
        norm: AlignerNorm::Instance,
        activation: AlignerActivation::Relu6,
    };
    let aggregation = Aggregation::from(aggregate);
    if aggregation.stands_alone() {
        return Aligner::new(gpu, plain, 0);
    }
    let file = lora.map(|dir| dir.join("aligner.safetensors"));
    let (Some(file), Some(run)) = (file.filter(|f| f.is_file()), lora) else {
        return Err(Error::Input(format!(
            "--aggregate {} has a learned part: give the run directory that trained it by --lora, \
             or use mean-mean or max-max",
            serde_json::to_value(aggregate)
                .ok()
                .as_ref()
                .and_then(|v| v.as_str())
                .unwrap_or("")
        )));
    };
    let config = Config::load(run.join("config.toml"), &[])?;
    let shape = AlignerShape {
        kind: config.aligner.kind,
        channels: aggregation.channels(heads),
        hidden: config.aligner.hidden,
        norm: config.aligner.norm,
        activation: config.aligner.activation,
    };
    Aligner::open(gpu, &file, shape)
}

/// The user's turn about one image.
pub(super) fn question(text: &str) -> Message {
    Message::image_and_text(text)
}
