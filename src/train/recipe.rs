//! The training recipe: one flat loop.
//!
//! Next-token loss plus λ × the mean squared error between the student's aligned word maps and the
//! teacher's; what is trained of the student, and the aligner, under one AdamW. A step's samples are computed in
//! micro-batches whose losses are weighed so that the step is that of one large batch. Data order, dropout masks and
//! initial weights depend on the seed and the step alone, so a resumed run repeats an unbroken one bit by
//! bit. Figures are read back a step late and never stall the stream; an update whose gradients are
//! not finite is skipped on the device, so the weights that the message speaks of are good ones. Where memory runs
//! out, the step begins again with half the micro-batch.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::batch::{Batch, Example};
use super::checkpoint::{self, Checkpoint};
use super::config::{Config, Precision};
use super::evaluation::{Best, evaluate, loaders};
use super::events::EventWriter;
use super::loader::Loader;
use super::memory::Estimate;
use super::metrics::{EvalMetrics, Log, MapMetrics, MetricsLog, StepMetrics};
use super::objective::{Objective, Weights, WordSheet};
use super::optimizer::Optimizer;
use super::pictures::Pictures;
use super::rundir::RunDir;
use super::trained::Trained;
use crate::autograd::{Gradients, Var, find_non_finite};
use crate::data::DataSet;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::nn::with_dropout;
use crate::ops::adamw::AdamW;
use crate::tensor::{PendingRead, Tensor};
use crate::vlm::Processor;

/// What the loop reports and asks while it runs.
pub trait Observer {
    /// A step's figures are known; `total` steps in all.
    fn step(&mut self, metrics: &StepMetrics, total: u64);
    /// Whether to stop after the current step and save.
    fn interrupted(&self) -> bool;
    /// An evaluation is done.
    fn evaluated(&mut self, _metrics: &EvalMetrics) {}
    /// Something the user should know.
    fn note(&mut self, _message: &str) {}
}

/// The trained parts with what they were trained on.
pub struct Training {
    /// Student, aligner and the losses between them and the data.
    pub objective: Objective,
    /// The memory that it was expected to take, before anything was loaded.
    pub estimate: Estimate,
    loader: Arc<Loader>,
    /// The samples that are evaluated on.
    held_out: Option<Arc<Loader>>,
    config: Config,
    trained: Trained,
    optimizer: Optimizer,
    /// The samples whose word maps are drawn.
    pictures: Pictures,
    /// Updates done.
    step: u64,
    state: State,
}

/// What a checkpoint holds beside weights and moments.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct State {
    /// Samples that are computed at once: `train.batch`, or less since memory ran out.
    micro: usize,
    best: Best,
}

/// Where a run's figures go.
struct Logs {
    metrics: MetricsLog,
    evaluations: Log<EvalMetrics>,
    maps: Log<MapMetrics>,
    events: EventWriter,
    total: u64,
}

/// What a step's micro-batches come to: losses over all of its samples, still on the device.
struct Computed {
    lm: Var,
    attention: Option<Var>,
    gradients: Gradients,
    words: usize,
    tokens: usize,
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
        let config = &config.for_plans(gpu.replays());
        let processor =
            Arc::new(Processor::open(&config.model.path)?.cut_at(config.data.max_tokens)?);
        let (loader, held_out) = loaders(config, &processor)?;
        let estimate = Estimate::new(gpu, config, &loader)?;
        let (student, trained) = Trained::load(gpu, config)?;
        let objective = Objective::new(gpu, config, student)?;
        let student = &objective.student;
        let o = &config.optimizer;
        let settings = AdamW {
            lr: o.lr as f32,
            betas: (o.betas[0] as f32, o.betas[1] as f32),
            eps: o.eps as f32,
            weight_decay: o.weight_decay as f32,
            decoupled: true,
            step: 0,
        };
        let mut optimizer =
            Optimizer::new(student.parameters().all(), settings, o.grad_clip as f32);
        let aligner = objective.aligner.parameters().all();
        optimizer.add(aligner, config.aligner_rate() as f32);
        optimizer.add(objective.parallel.all(), 1.0);
        if config.train.precision == Precision::F16 {
            optimizer.scale_loss(gpu);
        }
        Ok(Training {
            optimizer,
            objective,
            estimate,
            loader,
            held_out,
            trained,
            pictures: Pictures::default(),
            step: 0,
            state: State {
                micro: config.train.batch,
                best: Best::default(),
            },
            config: config.clone(),
        })
    }

    /// Continues from a whole checkpoint.
    ///
    /// # Errors
    /// A checkpoint that does not fit this model.
    pub fn restore(&mut self, from: &Checkpoint) -> Result<()> {
        self.trained.restore(&from.dir, &self.objective)?;
        let moments = from.dir.join("optimizer.safetensors");
        self.optimizer.restore(&moments)?;
        self.state = serde_json::from_value(from.state.clone())
            .map_err(|e| Error::file(from.dir.join(checkpoint::STATE), e.to_string()))?;
        self.step = from.step;
        Ok(())
    }

    /// Keeps the word maps of `run.pictures` samples as they are now; [`Self::run`] draws later ones beside them.
    ///
    /// # Errors
    /// A bad sample or a GPU fault.
    pub fn keep_maps(&mut self, gpu: &Gpu) -> Result<()> {
        self.pictures = Pictures::new(gpu, self, self.config.run.pictures)?;
        Ok(())
    }

    /// Updates done.
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// Number of steps in an epoch.
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
        let mut logs = Logs {
            metrics: MetricsLog::open(run.metrics(), self.step)?,
            evaluations: Log::open(run.evaluations(), self.step)?,
            maps: Log::open(run.map_figures(), self.step)?,
            events: EventWriter::create(run.root(), self.step)?,
            total,
        };
        if let Some(before) = self.pictures.before().filter(|_| self.step == 0) {
            logs.maps.append(&before)?;
        }
        let mut pending: Option<Pending> = None;
        let mut examples = self
            .loader
            .prefetch(self.step..total, self.config.data.workers);
        while self.step < total && !self.stopped_early() {
            let started = Instant::now();
            let Some(batch) = examples.take() else { break };
            let data_ms = started.elapsed().as_secs_f64() * 1e3;
            let mut next = self.step(gpu, &mut batch?, observer)?;
            next.metrics.data_ms = data_ms;
            if let Some(done) = pending.replace(next) {
                self.report(gpu, done, &mut logs, observer)?;
            }
            // The step's own time: what is queued behind the late read-back of the one before.
            if let Some(p) = &mut pending {
                p.metrics.step_ms = started.elapsed().as_secs_f64() * 1e3;
            }
            let stop = observer.interrupted();
            let (evaluating, saving, drawing) = (
                self.due(self.config.eval.every),
                self.due(self.config.train.checkpoint_every),
                self.due(self.config.run.pictures_every),
            );
            if !(stop || evaluating || saving || drawing || self.step == total) {
                continue;
            }
            if let Some(done) = pending.take() {
                self.report(gpu, done, &mut logs, observer)?;
            }
            let best =
                (evaluating || self.step == total) && self.evaluate(gpu, &mut logs, observer)?;
            if stop || saving || best || self.step == total || self.stopped_early() {
                self.save(run)?;
            }
            if drawing {
                self.draw(gpu, &run.maps_at(self.step), &mut logs)?;
            }
            if stop && self.step < total {
                self.draw(gpu, &run.maps(), &mut logs)?;
                return Err(Error::Interrupted);
            }
        }
        if self.stopped_early() && self.step < total {
            let best = self.state.best.step;
            observer.note(&format!(
                "stopped after {} of {total} steps: no evaluation since step {best} was better; that checkpoint is {}",
                self.step,
                run.checkpoints().join(format!("step-{best}")).display()
            ));
        }
        let base = &self.config.model.path;
        self.trained.publish(run.root(), &self.objective, base)?;
        self.draw(gpu, &run.maps(), &mut logs)
    }

    /// Draws the word maps as they are now, beside those that were kept.
    fn draw(&self, gpu: &Gpu, dir: &Path, logs: &mut Logs) -> Result<()> {
        let Some(figures) = self.pictures.draw(gpu, self, dir)? else {
            return Ok(());
        };
        let step = self.step;
        logs.maps.append(&MapMetrics { step, ..figures })?;
        let scalars = [
            ("maps/entropy", figures.entropy),
            ("maps/distance", figures.distance),
        ];
        logs.events.scalars(step, &scalars)
    }

    /// Whether something done every so many steps is due; never for 0.
    fn due(&self, every: u64) -> bool {
        every > 0 && self.step.is_multiple_of(every)
    }

    fn stopped_early(&self) -> bool {
        let patience = self.config.train.early_stop;
        patience > 0 && self.state.best.since >= patience
    }

    /// Forward, backward and update of one step; nothing is waited for.
    fn step(
        &mut self,
        gpu: &Gpu,
        examples: &mut [Example],
        observer: &mut dyn Observer,
    ) -> Result<Pending> {
        let (epoch, order) = self.loader.order(self.step);
        let lr = self
            .config
            .learning_rate(self.step, epoch, self.total_steps());
        gpu.reset_peak();
        let before = [gpu.dispatches(), gpu.replayed(), gpu.bind_groups()];
        let (computed, norm) = loop {
            match self.update(gpu, examples, lr as f32) {
                Err(Error::OutOfMemory { .. }) if self.state.micro > 1 => {
                    self.halve(gpu, observer);
                }
                Err(Error::OutOfMemory { .. }) if gpu.replays() => {
                    gpu.stop_replaying();
                    observer.note(&format!(
                        "step {}: out of GPU memory; going on without replaying steps, which takes less",
                        self.step
                    ));
                }
                other => break other?,
            }
        };
        tracing::debug!(
            "step {}: {} dispatches, {} of them replayed, {} new bind groups",
            self.step,
            gpu.dispatches() - before[0],
            gpu.replayed() - before[1],
            gpu.bind_groups() - before[2]
        );
        let metrics = StepMetrics {
            step: self.step,
            epoch,
            matched_words: computed.words as u64,
            lr,
            tokens: computed.tokens as u64,
            peak_bytes: gpu.memory().peak_bytes,
            ..StepMetrics::default()
        };
        self.step += 1;
        Ok(Pending {
            metrics,
            lm_loss: computed.lm.value().read_later(),
            attn_loss: computed.attention.map(|l| l.value().read_later()),
            grad_norm: norm.map(|n| n.read_later()),
            order,
        })
    }

    /// Goes on with half the micro-batch.
    fn halve(&mut self, gpu: &Gpu, observer: &mut dyn Observer) {
        gpu.trim();
        self.state.micro = self.state.micro.div_ceil(2);
        let (micro, whole) = (self.state.micro, self.config.effective_batch());
        observer.note(&format!(
            "step {}: out of GPU memory; going on with train.batch = {micro}, train.accumulate = {}: the same step of \
             {whole} samples",
            self.step,
            whole.div_ceil(micro)
        ));
    }

    /// The losses and gradients of a step's samples, and the update; gives the gradients' norm too. Out of memory,
    /// nothing is changed.
    fn update(
        &mut self,
        gpu: &Gpu,
        examples: &mut [Example],
        lr: f32,
    ) -> Result<(Computed, Option<Tensor>)> {
        self.complete(gpu, examples)?;
        let mut computed = self.compute(gpu, examples, self.step)?;
        gpu.check()?;
        let norm = self.optimizer.step(&computed.gradients, lr);
        gpu.check()?;
        computed.gradients = Gradients::default();
        Ok((computed, norm))
    }

    /// What of the examples only the student knows.
    fn complete(&self, gpu: &Gpu, examples: &mut [Example]) -> Result<()> {
        let mut parts = examples.chunks_mut(self.state.micro);
        parts.try_for_each(|part| self.objective.complete(gpu, part))
    }

    /// Forward and backward of a step's micro-batches, their losses weighed by their share of the step's labels and
    /// words.
    fn compute(&self, gpu: &Gpu, examples: &[Example], step: u64) -> Result<Computed> {
        let weights = self.config.weights(step, self.total_steps());
        let scale = self.optimizer.loss_scale();
        let labels: usize = examples.iter().map(|e| e.prepared.learned()).sum();
        let words: usize = examples.iter().map(|e| e.words.words.len()).sum();
        let mut all: Option<Computed> = None;
        for (number, part) in examples.chunks(self.state.micro).enumerate() {
            let part: Vec<&Example> = part.iter().collect();
            let batch = Batch::new(gpu, &part);
            let share = Weights {
                attention: batch.words as f32 / words.max(1) as f32,
                language: batch.label_count as f32 / labels.max(1) as f32,
                ..weights
            };
            let weighed = Weights {
                attention: weights.attention * share.attention,
                language: weights.language * share.language,
                ..weights
            };
            let seed = step_seed(self.config.train.seed, step, number as u64);
            let seed = Tensor::from_u32(gpu, &[seed as u32, (seed >> 32) as u32], &[2]);
            let (losses, gradients) = with_dropout(Some(seed), || {
                let losses = self.objective.losses(gpu, &part, &batch, weighed)?;
                let gradients = match (&scale, losses.total.needs_grad()) {
                    (_, false) => Gradients::default(),
                    (None, true) => losses.total.backward(),
                    (Some(scale), true) => {
                        Var::backward_with(&[(losses.total.clone(), scale.clone())])
                    }
                };
                Result::Ok((losses, gradients))
            })?;
            let next = Computed {
                lm: part_of(losses.lm, share.language),
                attention: losses.attention.map(|l| part_of(l, share.attention)),
                gradients,
                words: batch.words,
                tokens: batch.tokens,
            };
            all = Some(match all {
                None => next,
                Some(before) => before.with(next),
            });
        }
        all.ok_or_else(|| Error::Input(format!("step {step} has no samples")))
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
        logs: &mut Logs,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let read = |read: Option<PendingRead>| read.map_or(Ok(vec![0.0]), PendingRead::wait);
        let mut metrics = done.metrics;
        metrics.lm_loss = f64::from(read(Some(done.lm_loss))?[0]);
        metrics.attn_loss = f64::from(read(done.attn_loss)?[0]);
        let norm = read(done.grad_norm)?;
        metrics.grad_norm = f64::from(norm[0]);
        metrics.loss_scale = norm.get(1).map(|&scale| f64::from(scale));
        let weights = self.weights(metrics.step);
        metrics.loss = f64::from(weights.language) * metrics.lm_loss
            + f64::from(weights.attention) * metrics.attn_loss;
        // Gradients that overflow f16 under a large factor are the factor's fault, which is halved by now.
        metrics.skipped = metrics.loss.is_finite()
            && !metrics.grad_norm.is_finite()
            && metrics.loss_scale.is_some_and(|scale| scale > 1.0);
        if metrics.skipped {
            metrics.grad_norm = 0.0;
        }
        if !(metrics.loss.is_finite() && metrics.grad_norm.is_finite()) {
            return Err(self.not_finite(gpu, &metrics, &done.order));
        }
        logs.metrics.append(&metrics)?;
        logs.events.scalars(metrics.step, &metrics.scalars())?;
        observer.step(&metrics, logs.total);
        Ok(())
    }

    /// Repeats a bad step, whose update was skipped, to name the op at fault.
    fn not_finite(&self, gpu: &Gpu, metrics: &StepMetrics, order: &[usize]) -> Error {
        let found = find_non_finite(|| {
            // Only the watch matters; an error would have come up in the step itself.
            if let Ok(mut examples) = self.loader.examples(order)
                && self.complete(gpu, &mut examples).is_ok()
            {
                let _ = self.compute(gpu, &examples, metrics.step);
            }
        });
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

    /// Losses on the held-out samples, logged; whether they are the best so far.
    fn evaluate(
        &mut self,
        gpu: &Gpu,
        logs: &mut Logs,
        observer: &mut dyn Observer,
    ) -> Result<bool> {
        let Some(loader) = self.held_out.clone() else {
            return Ok(false);
        };
        let lambda = self.config.loss.lambda;
        let mut metrics = loop {
            match evaluate(gpu, &self.objective, &loader, self.state.micro, lambda) {
                Err(Error::OutOfMemory { .. }) if self.state.micro > 1 => {
                    self.halve(gpu, observer);
                }
                other => break other?,
            }
        };
        metrics.step = self.step;
        self.state.best.update(&mut metrics);
        logs.evaluations.append(&metrics)?;
        let scalars = [
            ("eval/loss", metrics.loss),
            ("eval/lm_loss", metrics.lm_loss),
            ("eval/attn_loss", metrics.attn_loss),
        ];
        logs.events.scalars(metrics.step, &scalars)?;
        observer.evaluated(&metrics);
        Ok(metrics.best)
    }

    fn save(&self, run: &RunDir) -> Result<()> {
        let root = run.checkpoints();
        checkpoint::write(&root, self.step, &self.state, |dir| {
            let base = &self.config.model.path;
            self.trained.save(dir, &self.objective, base)?;
            self.optimizer.save(&dir.join("optimizer.safetensors"))
        })?;
        let best = self.state.best.loss.map(|_| self.state.best.step);
        checkpoint::prune(&root, self.config.train.keep, best)
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

    /// The data set, without held-out samples.
    pub fn data(&self) -> &DataSet {
        self.loader.data()
    }
}

impl Computed {
    /// The sums of two micro-batches.
    fn with(mut self, next: Computed) -> Computed {
        self.gradients.merge(next.gradients);
        Computed {
            lm: self.lm.add(&next.lm),
            attention: match (self.attention, next.attention) {
                (Some(a), Some(b)) => Some(a.add(&b)),
                (a, b) => a.or(b),
            },
            gradients: self.gradients,
            words: self.words + next.words,
            tokens: self.tokens + next.tokens,
        }
    }
}

/// A micro-batch's part of a step's loss, off the tape.
fn part_of(loss: Var, share: f32) -> Var {
    match share == 1.0 {
        true => loss.detach(),
        false => loss.detach().scale(share),
    }
}

/// Seed of the dropout masks of a micro-batch of step `step` (SplitMix64's finaliser).
fn step_seed(seed: u64, step: u64, micro: u64) -> u64 {
    let mut z = seed
        .wrapping_add((step + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
        .wrapping_add(micro.wrapping_mul(0xd1b5_4a32_d192_ed03));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
