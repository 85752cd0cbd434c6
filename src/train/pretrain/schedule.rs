//! Optimizer settings of a part of a recipe, and the update itself.

use serde::Deserialize;

use crate::autograd::Gradients;
use crate::nn::Parameter;
use crate::ops::adamw::{AdamW, adamw};
use crate::ops::grad_norm::{clip_scale, grad_norm};
use crate::tensor::{DType, Tensor};

/// `[…]` keys that every trained part has: AdamW with a linear warm-up and a cosine down to `floor`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// Updates.
    pub steps: usize,
    /// Scenes an update.
    pub batch: usize,
    /// Highest learning rate.
    pub lr: f64,
    /// AdamW's decay rates.
    pub betas: [f64; 2],
    /// Updates until the highest learning rate.
    pub warmup: usize,
    /// The last learning rate as a share of the highest.
    pub floor: f64,
    /// Global gradient norm above which gradients are scaled down.
    pub grad_clip: f64,
}

impl Schedule {
    /// Learning rate of update `step`, from 0.
    pub fn rate(&self, step: usize) -> f64 {
        let warm = ((step + 1) as f64 / self.warmup.max(1) as f64).min(1.0);
        let done = step as f64 / self.steps.max(1) as f64;
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
        self.lr * warm * (self.floor + (1.0 - self.floor) * cosine)
    }
}

/// AdamW over a model's weights.
pub(super) struct Trainer {
    schedule: Schedule,
    slots: Vec<(Parameter, Tensor, Tensor)>,
    done: usize,
}

impl Trainer {
    pub(super) fn new(schedule: &Schedule, parameters: Vec<Parameter>) -> Self {
        let zeros = |p: &Parameter| {
            let value = p.var.value();
            Tensor::zeros(value.gpu(), DType::F32, value.shape())
        };
        Self {
            schedule: schedule.clone(),
            slots: parameters
                .into_iter()
                .map(|p| (p.clone(), zeros(&p), zeros(&p)))
                .collect(),
            done: 0,
        }
    }

    /// One update with clipped gradients.
    pub(super) fn step(&mut self, gradients: &Gradients) {
        let lr = self.schedule.rate(self.done) as f32;
        self.done += 1;
        let used: Vec<_> = self
            .slots
            .iter()
            .filter_map(|slot| Some((slot, gradients.get(&slot.0.var)?)))
            .collect();
        let all: Vec<&Tensor> = used.iter().map(|(_, gradient)| *gradient).collect();
        let scale = clip_scale(&grad_norm(&all), self.schedule.grad_clip as f32);
        let settings = AdamW {
            lr,
            betas: (self.schedule.betas[0] as f32, self.schedule.betas[1] as f32),
            eps: 1e-8,
            weight_decay: 0.0,
            decoupled: true,
            step: self.done as u64,
        };
        for ((parameter, m, v), gradient) in used {
            adamw(
                parameter.var.value(),
                gradient,
                m,
                v,
                &settings,
                Some(&scale),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Schedule;

    #[test]
    fn the_rate_rises_then_falls_to_its_floor() {
        let schedule = Schedule {
            steps: 1000,
            batch: 1,
            lr: 2.0,
            betas: [0.9, 0.99],
            warmup: 10,
            floor: 0.1,
            grad_clip: 1.0,
        };
        assert!((schedule.rate(0) - 0.2).abs() < 1e-3);
        assert!((schedule.rate(9) - 2.0).abs() < 1e-2);
        assert!((schedule.rate(500) - 1.1).abs() < 1e-9);
        assert!((schedule.rate(999) - 0.2).abs() < 1e-4);
    }
}
