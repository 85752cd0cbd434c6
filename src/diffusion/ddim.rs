//! The noise schedule, and DDIM steps up (inversion) and down (sampling) it.
//!
//! Song, Meng, Ermon: *Denoising Diffusion Implicit Models*, 2020, equation 12 without noise.

use std::path::Path;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::config::ConfigFile;
use crate::Result;
use crate::ops::binary::{Binary, binary};
use crate::ops::cast::cast;
use crate::ops::unary::{Unary, unary};
use crate::tensor::{DType, Tensor};

/// What `scheduler/scheduler_config.json` says about the noise schedule; the class of the file's sampler is irrelevant.
#[derive(Clone, Debug)]
pub struct SchedulerConfig {
    /// First β.
    pub beta_start: f64,
    /// Last β.
    pub beta_end: f64,
    /// β rise with the square of a straight line (`scaled_linear`), or along one (`linear`).
    pub scaled_linear: bool,
    /// Timesteps the model was trained on, 1000.
    pub train_timesteps: usize,
    /// Added to the timesteps of a sampler that paints; 1 in Stable Diffusion v1. The inversion does without.
    pub steps_offset: usize,
}

impl Default for SchedulerConfig {
    /// Stable Diffusion v1's.
    fn default() -> Self {
        SchedulerConfig {
            beta_start: 0.00085,
            beta_end: 0.012,
            scaled_linear: true,
            train_timesteps: 1000,
            steps_offset: 1,
        }
    }
}

impl SchedulerConfig {
    /// Reads a `scheduler_config.json`. Errors: an unsupported schedule or a prediction other than the noise.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let file = ConfigFile::read(path)?;
        let default = SchedulerConfig::default();
        file.only("prediction_type", &["epsilon".to_string()])?;
        file.only(
            "beta_schedule",
            &["scaled_linear".to_string(), "linear".to_string()],
        )?;
        file.absent("trained_betas")?;
        file.absent("rescale_betas_zero_snr")?;
        let config = SchedulerConfig {
            beta_start: file.or("beta_start", default.beta_start)?,
            beta_end: file.or("beta_end", default.beta_end)?,
            scaled_linear: file.or("beta_schedule", "scaled_linear".to_string())?
                == "scaled_linear",
            train_timesteps: file.or("num_train_timesteps", default.train_timesteps)?,
            steps_offset: file.or("steps_offset", 0)?,
        };
        if config.train_timesteps < 2 {
            return Err(file.error("num_train_timesteps", "expected at least 2"));
        }
        for (field, beta) in [
            ("beta_start", config.beta_start),
            ("beta_end", config.beta_end),
        ] {
            if !(beta > 0.0 && beta < 1.0) {
                return Err(file.error(field, format!("found {beta}, expected between 0 and 1")));
            }
        }
        Ok(config)
    }
}

/// ᾱ of every training timestep, and the steps between them.
#[derive(Clone, Debug)]
pub struct NoiseSchedule {
    alpha_bars: Vec<f64>,
    steps_offset: usize,
}

impl NoiseSchedule {
    /// The cumulative products of 1 − β.
    ///
    /// β is rounded to f32 as `diffusers` stores it; the product is in f64.
    pub fn new(config: &SchedulerConfig) -> Self {
        let last = (config.train_timesteps - 1) as f64;
        let (from, to) = if config.scaled_linear {
            (config.beta_start.sqrt(), config.beta_end.sqrt())
        } else {
            (config.beta_start, config.beta_end)
        };
        let alpha_bars = (0..config.train_timesteps)
            .scan(1.0, |product, i| {
                let line = from + (to - from) * i as f64 / last;
                let beta = if config.scaled_linear {
                    line * line
                } else {
                    line
                };
                *product *= 1.0 - f64::from(beta as f32);
                Some(*product)
            })
            .collect();
        NoiseSchedule {
            alpha_bars,
            steps_offset: config.steps_offset,
        }
    }

    /// ᾱ at a timestep; before the first it is ᾱ\[0\] (`set_alpha_to_one = false`).
    ///
    /// Panics past the last training timestep.
    pub fn alpha_bar(&self, timestep: isize) -> f64 {
        self.alpha_bars[timestep.max(0) as usize]
    }

    /// Timesteps the model was trained on.
    pub fn train_timesteps(&self) -> usize {
        self.alpha_bars.len()
    }

    /// What a sampler that paints adds to its timesteps.
    pub fn steps_offset(&self) -> usize {
        self.steps_offset
    }

    /// The `steps` timesteps of a trajectory from the lowest up: leading spacing without offset, t = i · (1000 / N).
    ///
    /// Panics unless 1 ≤ `steps` ≤ the training timesteps.
    pub fn timesteps(&self, steps: usize) -> Vec<usize> {
        assert!(steps >= 1 && steps <= self.train_timesteps());
        let stride = self.train_timesteps() / steps;
        (0..steps).map(|i| i * stride).collect()
    }

    /// Timesteps of the `noised` mode: `count` of them, evenly from 1 to 600 of 1000.
    pub fn noised_timesteps(&self, count: usize) -> Vec<usize> {
        let last = self.train_timesteps() * 3 / 5;
        (0..count)
            .map(|i| {
                if count == 1 {
                    last / 2
                } else {
                    1 + i * (last - 1) / (count - 1)
                }
            })
            .collect()
    }

    /// Moves `x` from noise level ᾱ\[`from`\] to ᾱ\[`to`\] along the predicted noise: x₀ from `from`, then noised to `to`.
    ///
    /// Upwards this is a step of the inversion, downwards one of sampling. `x` and `noise` f32 of one shape.
    pub fn step(&self, x: &Tensor, noise: &Tensor, from: isize, to: isize) -> Tensor {
        let (keep, add) = self.coefficients(from, to);
        blend(x, keep, noise, add)
    }

    /// What [`NoiseSchedule::step`] multiplies `x` and the noise with.
    pub fn coefficients(&self, from: isize, to: isize) -> (f64, f64) {
        let (before, after) = (self.alpha_bar(from), self.alpha_bar(to));
        // √ᾱ' · (x − √(1−ᾱ)·ε) / √ᾱ + √(1−ᾱ')·ε, collected by x and ε.
        let keep = (after / before).sqrt();
        (keep, (1.0 - after).sqrt() - keep * (1.0 - before).sqrt())
    }

    /// q(x_t | x₀): `latents` with `noise` added to the level of `timestep`. Both f32 of one shape.
    pub fn add_noise(&self, latents: &Tensor, noise: &Tensor, timestep: usize) -> Tensor {
        let bar = self.alpha_bar(timestep as isize);
        blend(latents, bar.sqrt(), noise, (1.0 - bar).sqrt())
    }
}

/// a · `x` + b · `y` in f32.
fn blend(x: &Tensor, a: f64, y: &Tensor, b: f64) -> Tensor {
    let scaled = |t: &Tensor, by: f64| unary(&cast(t, DType::F32), Unary::Affine(by as f32, 0.0));
    binary(&scaled(x, a), &scaled(y, b), Binary::Add)
}

/// `count` standard normal values, the same on every machine for one seed (ChaCha8, Box–Muller in f64).
pub fn gaussian(seed: u64, count: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut values = Vec::with_capacity(count + 1);
    while values.len() < count {
        let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
        let angle = std::f64::consts::TAU * rng.random::<f64>();
        values.push((radius * angle.cos()) as f32);
        values.push((radius * angle.sin()) as f32);
    }
    values.truncate(count);
    values
}
