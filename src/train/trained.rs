//! What is trained of a student: LoRA factors or its own weights; how it is loaded, kept and written.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use super::config::{Config, Mode};
use super::objective::Objective;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::nn::{
    Freeze, Kind, LoadOptions, LoraConfig, Parameter, load_lora, lora_config, save_lora,
};
use crate::tensor::{Checkpoint, DType};
use crate::vlm::Student;
use crate::vlm::merge::{Change, rewrite};

/// File of a checkpoint with a full fine-tune's weights, f32.
const WEIGHTS: &str = "weights.safetensors";
/// File of a checkpoint and of a run with the aligner's, f32.
const ALIGNER: &str = "aligner.safetensors";
/// File of a checkpoint and of a run with the parallel attention's, f32.
pub const PARALLEL: &str = "parallel.safetensors";

/// The LoRA factors' shape, or the model's own weights.
pub enum Trained {
    /// LoRA factors.
    Lora(LoraConfig),
    /// The model's own weights.
    Full,
}

impl Trained {
    /// The student with its trained parts, as `config` says.
    ///
    /// # Errors
    /// Files that cannot be used; patterns that match nothing; a configuration that trains nothing.
    pub fn load(gpu: &Gpu, config: &Config) -> Result<(Student, Trained)> {
        let mut options = LoadOptions {
            trainable: config.train.mode == Mode::Full,
            freeze: Freeze(config.train.freeze.clone()),
            activations: config.train.precision.dtype(gpu.tier())?,
            seed: config.train.seed,
            quantize: config.model.quantize.kind(),
            ..LoadOptions::default()
        };
        let lora = lora_of(config)?;
        options.lora = (config.train.mode == Mode::Lora).then(|| lora.clone());
        let mut student = Student::open(&config.model.path, gpu, options)?;
        student.set_checkpointing(config.train.checkpoint_activations);
        let parameters = student.parameters().all();
        if parameters.is_empty() {
            return Err(nothing(config, &lora));
        }
        if config.train.mode == Mode::Full {
            return Ok((student, Trained::Full));
        }
        if let Some(dir) = &config.init.lora {
            load_lora(dir, &student.parameters(), |name| student.rename_lora(name))?;
        }
        let chosen = !lora.exclude_modules.is_empty() || !config.train.freeze.is_empty();
        let lora = match chosen {
            // PEFT knows neither: the adapter names each of its modules.
            true => LoraConfig {
                target_modules: modules(&parameters),
                exclude_modules: Vec::new(),
                ..lora
            },
            false => lora,
        };
        Ok((student, Trained::Lora(lora)))
    }

    /// Writes what training has changed into the directory `dir` of a checkpoint.
    ///
    /// # Errors
    /// GPU errors, files that cannot be written.
    pub fn save(&self, dir: &Path, objective: &Objective, base: &Path) -> Result<()> {
        let parameters = objective.student.parameters();
        match self {
            Trained::Lora(lora) => {
                let base = base.display().to_string();
                save_lora(&dir.join("lora"), &parameters, lora, &base)?;
            }
            Trained::Full => parameters.save(&dir.join(WEIGHTS), DType::F32)?,
        }
        save_added(dir, objective)
    }

    /// Reads what [`Trained::save`] wrote.
    ///
    /// # Errors
    /// A checkpoint that does not fit this model.
    pub fn restore(&self, dir: &Path, objective: &Objective) -> Result<()> {
        let (student, aligner) = (&objective.student, objective.aligner.parameters());
        let from = |file: &str, parameters: Vec<Parameter>| {
            let saved = Checkpoint::open(&dir.join(file), file)?;
            parameters.iter().try_for_each(|p| p.restore(&saved))
        };
        match self {
            Trained::Lora(_) => {
                let rename = |name: &str| student.rename_lora(name);
                load_lora(&dir.join("lora"), &student.parameters(), rename)?;
            }
            Trained::Full => from(WEIGHTS, student.parameters().all())?,
        }
        if !objective.parallel.all().is_empty() {
            from(PARALLEL, objective.parallel.all())?;
        }
        from(ALIGNER, aligner.all())
    }

    /// Writes a run's result into `dir`: `lora/` or `model/`, the whole model as `base` lies there,
    /// `aligner.safetensors`, and `parallel.safetensors` of a run with `attention.parallel`.
    ///
    /// # Errors
    /// GPU errors, files that cannot be written.
    pub fn publish(&self, dir: &Path, objective: &Objective, base: &Path) -> Result<()> {
        match self {
            Trained::Lora(_) => self.save(dir, objective, base),
            Trained::Full => {
                write_model(&dir.join("model"), objective, base)?;
                save_added(dir, objective)
            }
        }
    }
}

/// Writes what was trained beside the student.
fn save_added(dir: &Path, objective: &Objective) -> Result<()> {
    if !objective.parallel.all().is_empty() {
        objective.parallel.save(&dir.join(PARALLEL), DType::F32)?;
    }
    let aligner = objective.aligner.parameters();
    aligner.save(&dir.join(ALIGNER), DType::F32)
}

/// The adapter that `config` asks for, or that of `init.lora`.
pub(super) fn lora_of(config: &Config) -> Result<LoraConfig> {
    let dropout = config.lora.dropout as f32;
    Ok(match &config.init.lora {
        Some(dir) => LoraConfig {
            dropout,
            ..lora_config(dir)?
        },
        None => LoraConfig {
            r: config.lora.r,
            alpha: config.lora.alpha as f32,
            dropout,
            target_modules: config.lora.target_modules.clone(),
            exclude_modules: config.lora.exclude_modules.clone(),
            use_rslora: config.lora.use_rslora,
            use_dora: config.lora.use_dora,
            ..LoraConfig::default()
        },
    })
}

/// Why nothing would be trained.
pub(super) fn nothing(config: &Config, lora: &LoraConfig) -> Error {
    let model = config.model.path.display();
    let frozen = match config.train.freeze.is_empty() {
        true => String::new(),
        false => format!(" outside train.freeze = {:?}", config.train.freeze),
    };
    Error::Config(match config.train.mode {
        Mode::Full => format!(
            "train.freeze = {:?} freezes every tensor of {model}; nothing would be trained",
            config.train.freeze
        ),
        Mode::Lora => format!(
            "lora.target_modules = {:?} without lora.exclude_modules = {:?} matches no linear layer of \
             {model}{frozen}; nothing would be trained",
            lora.target_modules, lora.exclude_modules
        ),
    })
}

/// The paths of the adapted modules.
fn modules(parameters: &[Parameter]) -> Vec<String> {
    let path = |p: &Parameter| p.name.strip_suffix(".lora_A.weight").map(String::from);
    parameters.iter().filter_map(path).collect()
}

/// Writes the model of directory `base` with the trained weights to `out`, in place of what is there.
fn write_model(out: &Path, objective: &Objective, base: &Path) -> Result<()> {
    let student = &objective.student;
    let parameters = student.parameters().all();
    let trained: BTreeMap<&str, &Parameter> = parameters
        .iter()
        .filter(|p| p.kind == Kind::Base)
        .map(|p| (p.name.as_str(), p))
        .collect();
    let table = parameters
        .iter()
        .find(|p| p.name.ends_with("embed_tokens.weight"));
    let checkpoint = Checkpoint::open(base, "model")?;
    let mut changes: BTreeMap<String, Change<'_>> = BTreeMap::new();
    for raw in checkpoint.names() {
        let name = student.rename_lora(raw);
        // A file may hold the output projection beside the table that it is tied to.
        let tied = || table.filter(|_| name == "lm_head.weight" && student.tied());
        let Some(&parameter) = trained.get(name.as_str()).or(tied().as_ref()) else {
            continue;
        };
        let change: Change<'_> = Box::new(move |weight| {
            weight.copy_from_slice(&parameter.values()?.0);
            Ok(())
        });
        changes.insert(raw.to_owned(), change);
    }
    let new = out.with_extension("new");
    let _ = fs::remove_dir_all(&new);
    rewrite(base, &checkpoint, &new, None, &changes, &mut |_, _, _| {
        Ok(())
    })?;
    if out.exists() {
        fs::remove_dir_all(out).map_err(|e| Error::io(out, e))?;
    }
    fs::rename(&new, out).map_err(|e| Error::io(out, e))
}
