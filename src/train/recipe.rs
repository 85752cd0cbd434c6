//! The training recipe: one flat loop.
//!
//! Next-token loss plus λ × the mean squared error between the student's aligned word maps and the
//! teacher's, LoRA factors and aligner under one AdamW. Data order, dropout masks and initial
//! weights depend on the seed and the step alone, so a resumed run repeats an unbroken one bit by
//! bit. Figures are read back a step late and never stall the stream; an update whose gradients are
//! not finite is skipped on the device, so the weights that the message speaks of are good ones.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::batch::{Batch, Example};
use super::checkpoint::{self, Checkpoint};
use super::config::Config;
use super::events::EventWriter;
use super::loader::Loader;
use super::metrics::{MetricsLog, StepMetrics};
use super::objective::{Objective, Weights, WordSheet};
use super::optimizer::Optimizer;
use super::rundir::RunDir;
use crate::autograd::{Gradients, find_non_finite};
use crate::data::DataSet;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::nn::{
    LoadOptions, LoraConfig, Parameter, load_lora, lora_config, save_lora, set_dropout_seed,
};
use crate::ops::adamw::AdamW;
use crate::tensor::{DType, PendingRead};
use crate::vlm::Student;

/// What the loop reports and asks while it runs.
pub trait Observer {
    /// A step's figures are known; `total` steps in all.
    fn step(&mut self, metrics: &StepMetrics, total: u64);
    /// Whether to stop after the current step and save.
    fn interrupted(&self) -> bool;
}

/// The trained parts with what they were trained on.
pub struct Training {
    /// Student, aligner and the losses between them and the data.
    pub objective: Objective,
    loader: Arc<Loader>,
    config: Config,
    lora: LoraConfig,
    optimizer: Optimizer,
    /// Updates done.
    step: u64,
}

/// Where a run's figures go.
struct Log {
    metrics: MetricsLog,
    events: EventWriter,
    total: u64,
}

/// The figures of one step, still on the device.
struct Pending {
    metrics: StepMetrics,
    lm_loss: PendingRead,
    attn_loss: Option<PendingRead>,
    grad_norm: Option<PendingRead>,
    order: Vec<usize>,
}

impl Training {
    /// Loads student, aligner, data and targets as `config` says.
    ///
    /// # Errors
    /// Anything wrong with the configuration or the files that it names.
    pub fn new(gpu: &Gpu, config: &Config) -> Result<Training> {
        let lora = match &config.init.lora {
            Some(dir) => LoraConfig {
                dropout: config.lora.dropout as f32,
                ..lora_config(dir)?
            },
            None => LoraConfig {
                r: config.lora.r,
                alpha: config.lora.alpha as f32,
                dropout: config.lora.dropout as f32,
                target_modules: config.lora.target_modules.clone(),
                use_rslora: config.lora.use_rslora,
                ..LoraConfig::default()
            },
        };
        let options = LoadOptions {
            lora: Some(lora.clone()),
            activations: config.train.precision.dtype(gpu.tier())?,
            seed: config.train.seed,
            quantize: config.model.quantize.kind(),
            ..LoadOptions::default()
        };
        let student = Student::open(&config.model.path, gpu, options)?;
        if let Some(dir) = &config.init.lora {
            load_lora(dir, &student.parameters(), |name| student.rename_lora(name))?;
        }
        let objective = Objective::new(gpu, config, student)?;
        let student = &objective.student;
        let loader = Arc::new(Loader::new(config, student.processor().clone())?);
        let mut trained: Vec<Parameter> = student.parameters().all();
        if trained.is_empty() {
            return Err(Error::Config(format!(
                "lora.target_modules = {:?} matches no linear layer of {}; nothing would be trained",
                lora.target_modules,
                config.model.path.display()
            )));
        }
        trained.extend(objective.aligner.parameters().all());
        let o = &config.optimizer;
        let settings = AdamW {
            lr: o.lr as f32,
            betas: (o.betas[0] as f32, o.betas[1] as f32),
            eps: o.eps as f32,
            weight_decay: o.weight_decay as f32,
            decoupled: true,
            step: 0,
        };
        Ok(Training {
            optimizer: Optimizer::new(trained, settings, o.grad_clip as f32),
            objective,
            loader,
            config: config.clone(),
            lora,
            step: 0,
        })
    }

    /// Continues from a whole checkpoint.
    ///
    /// # Errors
    /// A checkpoint that does not fit this model.
    pub fn restore(&mut self, from: &Checkpoint) -> Result<()> {
        let dir = &from.dir;
        load_lora(
            &dir.join("lora"),
            &self.objective.student.parameters(),
            |name| self.objective.student.rename_lora(name),
        )?;
        let file = dir.join("aligner.safetensors");
        let saved = crate::tensor::Checkpoint::open(&file, "aligner")?;
        for p in self.objective.aligner.parameters().all() {
            p.restore(&saved)?;
        }
        self.optimizer
            .restore(&dir.join("optimizer.safetensors"), from.step)?;
        self.step = from.step;
        Ok(())
    }

    /// Number of batches in an epoch.
    pub fn steps_per_epoch(&self) -> u64 {
        self.loader.steps_per_epoch()
    }

    /// Steps of the whole run.
    pub fn total_steps(&self) -> u64 {
        self.config.total_steps(self.loader.data().epoch_len())
    }

    /// Runs to the end, or to an interrupt; checkpoints, metrics and the final weights go to `run`.
    ///
    /// # Errors
    /// Bad samples, GPU faults, a loss that is not finite, files that cannot be written. Whole
    /// checkpoints stay usable.
    pub fn run(&mut self, gpu: &Gpu, run: &RunDir, observer: &mut dyn Observer) -> Result<()> {
        let total = self.total_steps();
        let mut log = Log {
            metrics: MetricsLog::open(run.metrics(), self.step)?,
            events: EventWriter::create(run.root(), self.step)?,
            total,
        };
        let mut pending: Option<Pending> = None;
        let every = self.config.train.checkpoint_every;
        let mut examples = self
            .loader
            .prefetch(self.step..total, self.config.data.workers);
        while self.step < total {
            let started = Instant::now();
            let Some(batch) = examples.take() else { break };
            let data_ms = started.elapsed().as_secs_f64() * 1e3;
            let mut batch = batch?;
            self.objective.complete(gpu, &mut batch)?;
            let mut next = self.step(gpu, &batch)?;
            next.metrics.data_ms = data_ms;
            if let Some(done) = pending.replace(next) {
                self.report(gpu, done, &mut log, observer)?;
            }
            // The step's own time: what is queued behind the late read-back of the one before.
            if let Some(p) = &mut pending {
                p.metrics.step_ms = started.elapsed().as_secs_f64() * 1e3;
            }
            let stop = observer.interrupted();
            if stop || (every > 0 && self.step.is_multiple_of(every)) || self.step == total {
                if let Some(done) = pending.take() {
                    self.report(gpu, done, &mut log, observer)?;
                }
                self.save(run)?;
            }
            if stop && self.step < total {
                return Err(Error::Interrupted);
            }
        }
        if let Some(done) = pending.take() {
            self.report(gpu, done, &mut log, observer)?;
        }
        self.write_weights(run.root())
    }

    /// Forward, backward and update of one batch; nothing is waited for.
    fn step(&mut self, gpu: &Gpu, examples: &[Example]) -> Result<Pending> {
        let (epoch, order) = self.loader.order(self.step);
        let config = &self.config;
        set_dropout_seed(Some(step_seed(config.train.seed, self.step)));
        gpu.reset_peak();
        let examples: Vec<&Example> = examples.iter().collect();
        let batch = Batch::new(gpu, &examples);
        let losses = self
            .objective
            .losses(gpu, &examples, &batch, self.weights(self.step))?;
        let gradients = match losses.total.needs_grad() {
            true => losses.total.backward(),
            false => Gradients::default(),
        };
        set_dropout_seed(None);
        let lr = config.learning_rate(epoch) as f32;
        let norm = self.optimizer.step(&gradients, lr);
        drop(gradients);
        let metrics = StepMetrics {
            step: self.step,
            epoch,
            matched_words: batch.words as u64,
            lr: f64::from(lr),
            tokens: batch.tokens as u64,
            peak_bytes: gpu.memory().peak_bytes,
            loss: 0.0,
            lm_loss: 0.0,
            attn_loss: 0.0,
            grad_norm: 0.0,
            step_ms: 0.0,
            data_ms: 0.0,
        };
        self.step += 1;
        Ok(Pending {
            metrics,
            lm_loss: losses.lm.value().read_later(),
            attn_loss: losses.attention.map(|l| l.value().read_later()),
            grad_norm: norm.map(|n| n.read_later()),
            order,
        })
    }

    /// The factors of the losses at `step`.
    fn weights(&self, step: u64) -> Weights {
        self.config.weights(step, self.total_steps())
    }

    /// Waits for a step's figures, checks and logs them.
    fn report(
        &self,
        gpu: &Gpu,
        done: Pending,
        log: &mut Log,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let first = |read: Option<PendingRead>| -> Result<f64> {
            Ok(match read {
                Some(read) => f64::from(read.wait()?[0]),
                None => 0.0,
            })
        };
        let mut metrics = done.metrics;
        metrics.lm_loss = first(Some(done.lm_loss))?;
        metrics.attn_loss = first(done.attn_loss)?;
        metrics.grad_norm = first(done.grad_norm)?;
        let weights = self.weights(metrics.step);
        metrics.loss = f64::from(weights.language) * metrics.lm_loss
            + f64::from(weights.attention) * metrics.attn_loss;
        if !(metrics.loss.is_finite() && metrics.grad_norm.is_finite()) {
            return Err(self.not_finite(gpu, &metrics, &done.order));
        }
        log.metrics.append(&metrics)?;
        log.events.scalars(metrics.step, &metrics.scalars())?;
        observer.step(&metrics, log.total);
        Ok(())
    }

    /// Repeats a bad step, whose update was skipped, to name the op at fault.
    fn not_finite(&self, gpu: &Gpu, metrics: &StepMetrics, order: &[usize]) -> Error {
        set_dropout_seed(Some(step_seed(self.config.train.seed, metrics.step)));
        let found = find_non_finite(|| {
            if let Ok(mut examples) = self.loader.examples(order)
                && self.objective.complete(gpu, &mut examples).is_ok()
            {
                let examples: Vec<&Example> = examples.iter().collect();
                let batch = Batch::new(gpu, &examples);
                // Only the watch matters; an error would have come up in the step itself.
                if let Ok(losses) =
                    self.objective
                        .losses(gpu, &examples, &batch, self.weights(metrics.step))
                    && losses.total.needs_grad()
                {
                    losses.total.backward();
                }
            }
        });
        set_dropout_seed(None);
        let bad = match metrics.loss.is_finite() {
            true => format!("the gradient norm ({})", metrics.grad_norm),
            false => format!("the loss ({})", metrics.loss),
        };
        let what = match found {
            Some(op) => format!("{bad}, first {op},"),
            None => bad,
        };
        Error::NotFinite {
            step: metrics.step,
            what,
            advice: "the weights were not updated by it and the last checkpoint is whole; \
                     lower optimizer.lr or loss.lambda, set optimizer.grad_clip, or use precision f32, \
                     then go on with --resume"
                .into(),
        }
    }

    fn save(&self, run: &RunDir) -> Result<()> {
        checkpoint::write(&run.checkpoints(), self.step, &(), |dir| {
            self.write_weights(dir)?;
            self.optimizer.save(&dir.join("optimizer.safetensors"))
        })?;
        Ok(())
    }

    /// Writes `lora/` and `aligner.safetensors` into `dir`.
    fn write_weights(&self, dir: &Path) -> Result<()> {
        let base = self.config.model.path.display().to_string();
        save_lora(
            &dir.join("lora"),
            &self.objective.student.parameters(),
            &self.lora,
            &base,
        )?;
        let aligner = dir.join("aligner.safetensors");
        self.objective
            .aligner
            .parameters()
            .save(&aligner, DType::F32)
    }

    /// Aligned maps of sample `index`'s matched words, for looking; `None` where it has none.
    ///
    /// # Errors
    /// A bad sample or a GPU fault.
    pub fn maps(&self, gpu: &Gpu, index: usize) -> Result<Option<WordSheet>> {
        let mut examples = self.loader.examples(&[index])?;
        self.objective.complete(gpu, &mut examples)?;
        self.objective.maps(gpu, &examples[0])
    }

    /// The data set.
    pub fn data(&self) -> &DataSet {
        self.loader.data()
    }
}

/// Seed of the dropout masks of step `step` (SplitMix64's finaliser).
fn step_seed(seed: u64, step: u64) -> u64 {
    let mut z = seed.wrapping_add((step + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
