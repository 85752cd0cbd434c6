//! Training steps of SmolVLM-256M's shape and of its language model alone, with random weights.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::{Timing, again, process_cpu_seconds, thread_cpu_seconds};
use crate::align::aligner::{Aligner, AlignerShape};
use crate::align::loss::{aligned, attention_loss};
use crate::align::maps::{SampleWords, word_maps};
use crate::align::options::{Aggregation, AlignerActivation, AlignerKind, AlignerNorm, LossKind};
use crate::align::store::SIDE;
use crate::align::words::WordTokens;
use crate::autograd::Var;
use crate::error::Result;
use crate::gpu::{Gpu, GpuOptions};
use crate::nn::{LoadOptions, Loader, LoraConfig};
use crate::ops::adamw::AdamW;
use crate::ops::attention_tap::AttentionTap;
use crate::ops::unary::Unary;
use crate::tensor::{DType, Tensor};
use crate::train::optimizer::Optimizer;
use crate::vlm::{Grid, Idefics3, Idefics3Config, Idefics3Input, Rope, SiglipConfig, Tiles};

/// What is trained on what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Setting {
    /// SmolLM2-135M's shape, every weight, text alone.
    TextFull,
    /// SmolLM2-135M's shape, LoRA on q and v, text alone.
    TextLora,
    /// SmolVLM-256M's shape with one tile, LoRA on q and v, vision too.
    Lora,
    /// The same with the attention loss on six words.
    Lavender,
}

impl Setting {
    /// All of them.
    pub const ALL: [Setting; 4] = [
        Setting::TextFull,
        Setting::TextLora,
        Setting::Lora,
        Setting::Lavender,
    ];

    /// What a table calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::TextFull => "SmolLM2-135M, full",
            Self::TextLora => "SmolLM2-135M, LoRA",
            Self::Lora => "SmolVLM-256M, LoRA, λ = 0",
            Self::Lavender => "SmolVLM-256M, LoRA, Lavender",
        }
    }

    fn pictures(self) -> bool {
        matches!(self, Self::Lora | Self::Lavender)
    }
}

/// A training step's time.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StepTime {
    /// What was trained.
    pub setting: Setting,
    /// Tokens of the sequence, image tokens counted.
    pub tokens: usize,
    /// How long: forward, backward and update, the losses read back.
    #[serde(flatten)]
    pub timing: Timing,
    /// Tokens a second.
    pub tokens_per_second: f64,
    /// Most bytes held by our allocator.
    pub peak_bytes: u64,
    /// Dispatches of a step.
    pub dispatches: u64,
    /// Those of them that were replayed.
    #[serde(default)]
    pub replayed: u64,
    /// Bind groups that a step had to make: none once a step repeats an earlier one.
    #[serde(default)]
    pub bind_groups: u64,
    /// CPU milliseconds of the thread that records a step, where the system tells.
    pub recording_ms: Option<f64>,
    /// Device milliseconds within kernels, from timestamps of another run of the same steps; `None` without timestamps.
    pub kernel_ms: Option<f64>,
    /// The part of a step of that run in which no kernel ran; a little is the timestamps' own.
    #[serde(default)]
    pub outside: Option<f64>,
}

/// Words whose maps are aligned.
const WORDS: usize = 6;
/// Text tokens of a sample, the answer's at the end.
const TEXT: usize = 128;
/// Tokens of the answer.
const ANSWER: usize = 32;

/// `config.json` of SmolVLM-256M-Instruct; its language model is SmolLM2-135M.
fn config() -> Result<Idefics3Config> {
    let rope = serde_json::json!({ "rope_theta": 100_000.0 });
    Ok(Idefics3Config {
        vision: SiglipConfig {
            hidden: 768,
            intermediate: 3072,
            layers: 12,
            heads: 12,
            image_size: 512,
            patch: 16,
            activation: Unary::GeluTanh,
            eps: 1e-6,
        },
        scale_factor: 4,
        image_token: 49_190,
        vocabulary: 49_280,
        hidden: 576,
        layers: 30,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        intermediate: 1536,
        eps: 1e-5,
        rope: Rope::parse(&rope, "text_config", 64, "SmolVLM-256M".as_ref())?,
        max_positions: 8192,
        tied: true,
        eos: Vec::new(),
    })
}

/// A model with what it is trained on.
struct Run {
    gpu: Gpu,
    setting: Setting,
    model: Idefics3,
    aligner: Aligner,
    optimizer: Optimizer,
    ids: Vec<u32>,
    images: Vec<Tiles>,
    places: Vec<usize>,
    rows: Tensor,
    labels: Tensor,
    words: SampleWords,
    tap: AttentionTap,
    targets: Var,
}

impl Run {
    fn new(gpu: &Gpu, setting: Setting, dtype: DType) -> Result<Run> {
        let config = config()?;
        let lora = LoraConfig {
            r: 8,
            alpha: 32.0,
            dropout: 0.05,
            target_modules: ["q_proj", "v_proj"].map(String::from).to_vec(),
            ..LoraConfig::default()
        };
        let full = setting == Setting::TextFull;
        let options = LoadOptions {
            trainable: full,
            lora: (!full).then_some(lora),
            activations: dtype,
            ..LoadOptions::default()
        };
        let loader = Loader::random(gpu, options);
        let model = Idefics3::load(&config, &loader)?;
        let shape = AlignerShape {
            kind: AlignerKind::Conv,
            channels: config.heads,
            hidden: 32,
            norm: AlignerNorm::Instance,
            activation: AlignerActivation::Relu6,
        };
        let aligner = Aligner::new(gpu, shape, 1)?;
        let settings = AdamW {
            lr: 1e-4,
            betas: (0.9, 0.999),
            eps: 1e-8,
            weight_decay: 0.0,
            decoupled: true,
            step: 0,
        };
        let mut optimizer = Optimizer::new(loader.parameters().all(), settings, 1.0);
        optimizer.add(aligner.parameters().all(), 1.0);
        let side = config.vision.image_size / config.vision.patch / config.scale_factor;
        let image_tokens = if setting.pictures() { side * side } else { 0 };
        let tokens = TEXT + image_tokens;
        let ids: Vec<u32> = (0..tokens)
            .map(|t| match t {
                t if (4..4 + image_tokens).contains(&t) => config.image_token,
                t => (37 * t % 40_000) as u32,
            })
            .collect();
        let images = match setting.pictures() {
            true => vec![Tiles {
                pixels: vec![0.1; 3 * config.vision.image_size.pow(2)],
                grid: (0, 0),
                side: config.vision.image_size,
            }],
            false => Vec::new(),
        };
        let places: Vec<usize> = (4..4 + image_tokens).collect();
        let learned: Vec<u32> = (tokens - ANSWER - 1..tokens - 1)
            .map(|t| t as u32)
            .collect();
        let labels: Vec<u32> = learned.iter().map(|&t| ids[t as usize + 1]).collect();
        let words: Vec<WordTokens> = (0..WORDS)
            .map(|w| WordTokens {
                text: format!("word{w}"),
                occurrences: vec![vec![tokens - ANSWER + 4 * w]],
            })
            .collect();
        let words = SampleWords::new(&words);
        let rows: Vec<u32> = words.rows.iter().map(|&t| t as u32).collect();
        let columns: Vec<u32> = places.iter().map(|&t| t as u32).collect();
        Ok(Run {
            tap: AttentionTap {
                query_rows: Tensor::from_u32(gpu, &rows, &[rows.len()]),
                key_columns: Tensor::from_u32(gpu, &columns, &[1, columns.len()]),
            },
            targets: Var::constant(Tensor::from_f32(
                gpu,
                &vec![0.5; WORDS * SIDE * SIDE],
                &[WORDS, SIDE * SIDE],
            )),
            rows: Tensor::from_u32(gpu, &learned, &[learned.len()]),
            labels: Tensor::from_u32(gpu, &labels, &[labels.len()]),
            gpu: gpu.clone(),
            setting,
            model,
            aligner,
            optimizer,
            ids,
            images,
            places,
            words,
        })
    }

    /// One step: forward, both losses, backward, update; the losses are read back.
    fn step(&mut self) -> Result<()> {
        let input = Idefics3Input {
            ids: &self.ids,
            images: &self.images,
            image_positions: &self.places,
        };
        let layers: Vec<usize> = match self.setting {
            Setting::Lavender => (0..self.model.config().layers).collect(),
            _ => Vec::new(),
        };
        let tap = (!layers.is_empty()).then_some(&self.tap);
        let (hidden, taps) = self.model.forward(&[input], &layers, tap);
        let hidden = hidden.reshape(&[self.ids.len(), hidden.dim(2)]);
        let hidden = hidden.gather_rows(&self.rows);
        let lm = self.model.next_token_loss(&hidden, &self.labels, ANSWER);
        let mut loss = lm.clone();
        if !taps.is_empty() {
            let side = (self.places.len() as f64).sqrt() as usize;
            let grid = Grid {
                height: side,
                width: side,
            };
            let samples = [(&self.words, grid)];
            let maps: Vec<Var> = taps
                .iter()
                .filter_map(|tap| word_maps(&self.gpu, tap, &samples))
                .collect();
            let maps = aligned(&maps, &[WORDS], &Aggregation::default(), &self.aligner);
            let attention = attention_loss(&maps, &self.targets, LossKind::Mse);
            loss = loss.add(&attention.scale(10.0));
        }
        let gradients = loss.backward();
        self.optimizer.step(&gradients, 1e-4);
        lm.scalar().map(drop)
    }
}

/// Times steps of `setting` for about `seconds`.
///
/// # Errors
/// Any GPU error.
pub fn run(
    gpu: &Gpu,
    options: &GpuOptions,
    setting: Setting,
    dtype: DType,
    seconds: f64,
) -> Result<StepTime> {
    let mut run = Run::new(gpu, setting, dtype)?;
    let start = Instant::now();
    run.step()?;
    let first_ms = start.elapsed().as_secs_f64() * 1e3;
    gpu.reset_peak();
    let (dispatched, bound, cpu) = (gpu.dispatches(), gpu.bind_groups(), thread_cpu_seconds());
    let replayed = gpu.replayed();
    let all_cpu = process_cpu_seconds();
    let (begin, mut times) = (Instant::now(), Vec::new());
    while again(begin.elapsed().as_secs_f64(), seconds, times.len()) {
        let start = Instant::now();
        run.step()?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let steps = times.len();
    let each = |(before, after): (f64, f64)| (after - before) * 1e3 / steps as f64;
    let recording_ms = cpu.zip(thread_cpu_seconds()).map(each);
    let all_cpu = all_cpu.zip(process_cpu_seconds()).map(each);
    let dispatches = (gpu.dispatches() - dispatched) / steps as u64;
    let replayed = (gpu.replayed() - replayed) / steps as u64;
    let bind_groups = (gpu.bind_groups() - bound) / steps as u64;
    let peak_bytes = gpu.memory().peak_bytes;
    let tokens = run.ids.len();
    drop(run);
    times.sort_by(f64::total_cmp);
    let median_ms = times[steps / 2];
    let within = match gpu.tier().timestamps {
        true => Some(within_kernels(options, setting, dtype, seconds)?),
        false => None,
    };
    Ok(StepTime {
        setting,
        tokens,
        timing: Timing {
            median_ms,
            best_ms: times[0],
            runs: steps,
            first_ms,
            cpu_ms: all_cpu,
        },
        tokens_per_second: tokens as f64 / median_ms * 1e3,
        peak_bytes,
        dispatches,
        replayed,
        bind_groups,
        recording_ms,
        kernel_ms: within.map(|w| w.kernel_ms),
        outside: within.map(|w| w.outside),
    })
}

/// Time within kernels, of the median step.
#[derive(Clone, Copy)]
struct Within {
    kernel_ms: f64,
    outside: f64,
}

/// Steps on a second handle that takes timestamps: what a step's kernels take, and the part of the same step that is left.
fn within_kernels(
    options: &GpuOptions,
    setting: Setting,
    dtype: DType,
    seconds: f64,
) -> Result<Within> {
    let gpu = Gpu::new(&GpuOptions {
        profile: true,
        ..options.clone()
    })?;
    let mut run = Run::new(&gpu, setting, dtype)?;
    run.step()?;
    gpu.profile();
    let (begin, mut steps) = (Instant::now(), Vec::new());
    while again(begin.elapsed().as_secs_f64(), seconds, steps.len()) {
        let start = Instant::now();
        run.step()?;
        let step_ms = start.elapsed().as_secs_f64() * 1e3;
        let kernel_ms: f64 = gpu.profile().iter().map(|op| op.millis).sum();
        steps.push(Within {
            kernel_ms,
            outside: (1.0 - kernel_ms / step_ms).max(0.0),
        });
    }
    steps.sort_by(|a, b| a.outside.total_cmp(&b.outside));
    Ok(steps[steps.len() / 2])
}
