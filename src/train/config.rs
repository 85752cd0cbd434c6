//! A run's configuration: TOML tables, each key documented here with its default; `config/default.toml` documents them
//! for users.
//!
//! Paths are relative to the working directory. An unknown key is refused with the nearest known one. `--set
//! table.key=value` changes a key after the file was read; the resolved configuration is written into the run.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::objective::Weights;
use crate::align::filter::WordRules;
use crate::align::options::{
    Aggregate, Aggregation, AlignerActivation, AlignerKind, AlignerNorm, ControlTargets, Flow,
    LambdaSchedule, Layers, LossKind, OverLayers, Parallel, WordFilter, WordSource,
};
use crate::align::words::Case;

mod attention;
mod changes;
mod data;
mod parse;
mod quantize;
mod template;
mod training;

pub use changes::Difference;
pub use data::{Data, MixturePart, WithoutTargets};
pub use quantize::Quantize;
pub use template::TEMPLATE;
pub use training::{Eval, Mode, Optimizer, Precision, Train};

/// Stands for the embedded mini models and data in `model.path`, `data.path` and `data.diffusion`.
pub const EMBEDDED: &str = "mini";

/// Factor of the language loss while the aligner warms up.
const WARMUP_FACTOR: f32 = 1e-7;

/// The whole configuration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The model that is fine-tuned.
    pub model: Model,
    /// What it is trained on.
    pub data: Data,
    /// Which words count.
    pub words: Words,
    /// Which attention is aligned.
    pub attention: Attention,
    /// How `attention.aggregate = "flow"` joins layers.
    pub flow: Flow,
    /// The network between the model's maps and the targets.
    pub aligner: Aligner,
    /// The two losses.
    pub loss: Loss,
    /// The LoRA adapter.
    pub lora: Lora,
    /// The optimizer.
    pub optimizer: Optimizer,
    /// The length and the manner of training.
    pub train: Train,
    /// Runs to compare with, in which something of the method is taken away.
    pub control: Control,
    /// Evaluation on the way.
    pub eval: Eval,
    /// Weights to start from.
    pub init: Init,
    /// Where results go.
    pub run: Run,
}

/// `[model]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Model {
    /// Directory in transformers layout; default [`EMBEDDED`].
    pub path: PathBuf,
    /// Bits that its frozen linear weights are held in, `none`, `q8` or `q4` (QLoRA); default `none`.
    pub quantize: Quantize,
}

/// `[words]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Words {
    /// Which words of the model are matched; default `labels`.
    pub source: WordSource,
    /// How they are compared; default `lower`.
    pub case: Case,
    /// Which parts of speech count (English); default `all`.
    pub filter: WordFilter,
    /// Whether English stop-words are left out; default false.
    pub drop_stop_words: bool,
}

/// `[attention]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Attention {
    /// How maps of layers and heads become one; default `learned`.
    pub aggregate: Aggregate,
    /// Which layers; default `all`.
    pub layers: Layers,
    /// What `learned` does over layers after the aligner; default `mean`.
    pub over_layers: OverLayers,
    /// A second attention beside each layer's own, `none`, `map`, `diff` or `diff-output`; default `none`.
    pub parallel: Parallel,
    /// Whether the detached maps of a self-attention student get the picture's attention to the words added, which is
    /// then taught in their place; default false.
    pub mirror: bool,
}

/// `[aligner]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Aligner {
    /// Default `conv`.
    pub kind: AlignerKind,
    /// Hidden channels; default 32.
    pub hidden: usize,
    /// Default `instance`.
    pub norm: AlignerNorm,
    /// Default `relu6`.
    pub activation: AlignerActivation,
}

/// `[loss]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Loss {
    /// Weight of the attention loss; default 10. 0 is the autoregressive baseline.
    pub lambda: f64,
    /// How λ changes; default `constant`.
    pub schedule: LambdaSchedule,
    /// f of the exponential and the inverse schedule; default 1.
    pub decay: f64,
    /// Distance between maps and targets, `mse`, `kl` or `cosine`; default `mse`.
    pub kind: LossKind,
    /// First steps that train on attention alone (the language loss is scaled by 1e-7); default 0.
    pub aligner_warmup_steps: u64,
    /// Whether the student stands still in these steps and the aligner alone learns; default false.
    pub warmup_frozen: bool,
    /// Whether the language loss then rises with a straight line to the last step; default false.
    pub lm_ramp: bool,
}

/// `[lora]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Lora {
    /// Rank; default 8.
    pub r: usize,
    /// Scale numerator, α of α/r; default 32.
    pub alpha: f64,
    /// Default 0.05.
    pub dropout: f64,
    /// Suffixes of the linear layers that are adapted; default `q_proj` and `v_proj`.
    pub target_modules: Vec<String>,
    /// Suffixes of those that are not, though they match; default none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exclude_modules: Vec<String>,
    /// Whether the scale is α/√r instead of α/r (rsLoRA); default false.
    pub use_rslora: bool,
    /// Whether the lengths of the adapted weights' rows are learned too (DoRA); default false.
    pub use_dora: bool,
}

/// `[control]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Control {
    /// What stands in for the targets, `own`, `shuffled` or `uniform`; default `own`.
    pub targets: ControlTargets,
    /// Whether the aligner alone is trained; default false.
    pub aligner_only: bool,
}

/// `[init]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Init {
    /// PEFT directory of a LoRA adapter; default new weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<PathBuf>,
    /// `aligner.safetensors`; default new weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aligner: Option<PathBuf>,
    /// `parallel.safetensors`; default new weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parallel: Option<PathBuf>,
}

/// `[run]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Run {
    /// Run directory; default the first free one of `runs/001`, `runs/002` …
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dir: Option<PathBuf>,
    /// Samples whose word maps are drawn, 0 for none; default 6.
    pub pictures: usize,
    /// Steps between drawings of them, 0 for one at the end only; default 0.
    pub pictures_every: u64,
}

/// Every key, for messages about unknown ones.
pub const KEYS: &[&str] = &[
    "model.path",
    "model.quantize",
    "data.path",
    "data.images",
    "data.targets",
    "data.diffusion",
    "data.shuffle",
    "data.without_targets",
    "data.max_tokens",
    "data.workers",
    "data.mixture",
    "words.source",
    "words.case",
    "words.filter",
    "words.drop_stop_words",
    "attention.aggregate",
    "attention.layers",
    "attention.over_layers",
    "attention.parallel",
    "attention.mirror",
    "flow.sum",
    "flow.head_weights",
    "flow.token_weight",
    "aligner.kind",
    "aligner.hidden",
    "aligner.norm",
    "aligner.activation",
    "loss.lambda",
    "loss.schedule",
    "loss.decay",
    "loss.kind",
    "loss.aligner_warmup_steps",
    "loss.warmup_frozen",
    "loss.lm_ramp",
    "lora.r",
    "lora.alpha",
    "lora.dropout",
    "lora.target_modules",
    "lora.exclude_modules",
    "lora.use_rslora",
    "lora.use_dora",
    "optimizer.lr",
    "optimizer.betas",
    "optimizer.eps",
    "optimizer.weight_decay",
    "optimizer.aligner_lr",
    "optimizer.schedule",
    "optimizer.warmup_steps",
    "optimizer.gamma",
    "optimizer.grad_clip",
    "train.mode",
    "train.freeze",
    "train.batch",
    "train.accumulate",
    "train.checkpoint_activations",
    "train.bucket",
    "train.steps",
    "train.epochs",
    "train.seed",
    "train.precision",
    "train.checkpoint_every",
    "control.targets",
    "control.aligner_only",
    "train.keep",
    "train.early_stop",
    "eval.path",
    "eval.images",
    "eval.targets",
    "eval.share",
    "eval.every",
    "init.lora",
    "init.aligner",
    "init.parallel",
    "run.dir",
    "run.pictures",
    "run.pictures_every",
];

impl Default for Model {
    fn default() -> Self {
        Self {
            path: EMBEDDED.into(),
            quantize: Quantize::None,
        }
    }
}

impl Default for Aligner {
    fn default() -> Self {
        Self {
            kind: AlignerKind::default(),
            hidden: 32,
            norm: AlignerNorm::default(),
            activation: AlignerActivation::default(),
        }
    }
}

impl Default for Loss {
    fn default() -> Self {
        Self {
            lambda: 10.0,
            schedule: LambdaSchedule::default(),
            decay: 1.0,
            kind: LossKind::default(),
            aligner_warmup_steps: 0,
            warmup_frozen: false,
            lm_ramp: false,
        }
    }
}

impl Default for Lora {
    fn default() -> Self {
        Self {
            r: 8,
            alpha: 32.0,
            dropout: 0.05,
            target_modules: vec!["q_proj".into(), "v_proj".into()],
            exclude_modules: Vec::new(),
            use_rslora: false,
            use_dora: false,
        }
    }
}

impl Default for Run {
    fn default() -> Self {
        Self {
            dir: None,
            pictures: 6,
            pictures_every: 0,
        }
    }
}

impl Config {
    /// Steps of the run on a data set of `samples`: `train.steps`, else whole epochs (an epoch's last, smaller batch
    /// is a step).
    pub fn total_steps(&self, samples: usize) -> u64 {
        match (self.train.steps, self.train.epochs) {
            (Some(steps), _) => steps,
            (None, epochs) => epochs.unwrap_or(3) * self.steps_per_epoch(samples),
        }
    }

    /// Steps of one pass over `samples`.
    pub fn steps_per_epoch(&self, samples: usize) -> u64 {
        samples.div_ceil(self.effective_batch()) as u64
    }

    /// λ at `step` of `total`, by `loss.schedule`.
    pub fn lambda(&self, step: u64, total: u64) -> f64 {
        let done = step as f64 / total.max(1) as f64;
        match self.loss.schedule {
            LambdaSchedule::Constant => self.loss.lambda,
            LambdaSchedule::Exponential => self.loss.lambda * (-self.loss.decay * done).exp(),
            LambdaSchedule::Inverse => self.loss.lambda / (1.0 + self.loss.decay * done),
        }
    }

    /// The factors of the two losses at `step` of `total`.
    pub fn weights(&self, step: u64, total: u64) -> Weights {
        let first = self.loss.aligner_warmup_steps;
        let warming = step < first;
        let language = match (warming, self.loss.lm_ramp) {
            (true, _) => WARMUP_FACTOR,
            (false, true) => (step - first) as f32 / total.saturating_sub(first).max(1) as f32,
            (false, false) => 1.0,
        };
        Weights {
            attention: self.lambda(step, total) as f32,
            language,
            frozen: self.control.aligner_only || warming && self.loss.warmup_frozen,
        }
    }

    /// How maps of layers and heads become one.
    pub fn aggregation(&self) -> Aggregation {
        Aggregation {
            rule: self.attention.aggregate,
            over_layers: self.attention.over_layers,
            flow: self.flow,
        }
    }

    /// How words are found and matched.
    pub fn word_rules(&self) -> WordRules {
        WordRules {
            source: self.words.source,
            case: self.words.case,
            filter: self.words.filter,
            drop_stop_words: self.words.drop_stop_words,
            control: self.control.targets,
        }
    }

    /// What types cannot say: the key and what is wrong with it.
    fn check(&self) -> Result<(), (&'static str, String)> {
        let positive = |key, value: f64| range(key, value, value > 0.0, "a number above 0");
        let not_negative = |key, value: f64| range(key, value, value >= 0.0, "a number from 0");
        let share = |key, v: f64| {
            range(
                key,
                v,
                (0.0..1.0).contains(&v),
                "a number from 0 to below 1",
            )
        };
        let at_least_one = |key, value: u64| range(key, value as f64, value >= 1, "at least 1");
        self.data.check()?;
        self.check_training()?;
        self.check_attention()?;
        at_least_one("aligner.hidden", self.aligner.hidden as u64)?;
        not_negative("loss.lambda", self.loss.lambda)?;
        not_negative("loss.decay", self.loss.decay)?;
        at_least_one("lora.r", self.lora.r as u64)?;
        positive("lora.alpha", self.lora.alpha)?;
        share("lora.dropout", self.lora.dropout)?;
        if self.lora.target_modules.is_empty() {
            return Err((
                "lora.target_modules",
                "found an empty list, expected names of layers".into(),
            ));
        }
        positive("optimizer.lr", self.optimizer.lr)?;
        share("optimizer.betas", self.optimizer.betas[0])?;
        share("optimizer.betas", self.optimizer.betas[1])?;
        positive("optimizer.eps", self.optimizer.eps)?;
        not_negative("optimizer.weight_decay", self.optimizer.weight_decay)?;
        positive("optimizer.gamma", self.optimizer.gamma)?;
        not_negative("optimizer.grad_clip", self.optimizer.grad_clip)?;
        at_least_one("train.batch", self.train.batch as u64)?;
        if let Some(steps) = self.train.steps {
            at_least_one("train.steps", steps)?;
            if self.train.epochs.is_some() {
                return Err((
                    "train.epochs",
                    "found beside `train.steps`, expected one of the two".into(),
                ));
            }
        }
        at_least_one("train.epochs", self.train.epochs.unwrap_or(1))?;
        if self.aligner.kind == AlignerKind::None && !self.aggregation().stands_alone() {
            return Err((
                "aligner.kind",
                "found `none`, expected an aligner: only max-max, mean-mean and flow give one map without it".into(),
            ));
        }
        if self.words.source == WordSource::Predicted && self.control.targets != ControlTargets::Own
        {
            return Err((
                "control.targets",
                "found beside `words.source` \"predicted\", expected \"own\": controls know the words of labels alone".into(),
            ));
        }
        if self.control.aligner_only && self.loss.lambda == 0.0 {
            return Err((
                "control.aligner_only",
                "found true beside `loss.lambda` 0: nothing would be trained".into(),
            ));
        }
        Ok(())
    }
}

fn range(
    key: &'static str,
    value: f64,
    good: bool,
    expected: &str,
) -> Result<(), (&'static str, String)> {
    if good && value.is_finite() {
        Ok(())
    } else {
        Err((key, format!("found {value}, expected {expected}")))
    }
}
