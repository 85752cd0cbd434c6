//! AdamW over a model's trainable tensors, with global-norm clipping and a loss scale for f16.

use std::path::Path;

use crate::autograd::Gradients;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::nn::Parameter;
use crate::ops::adamw::{AdamW, Update, adamw_all};
use crate::ops::grad_norm::{clip_scale, grad_norm};
use crate::ops::loss_scale::unscale;
use crate::tensor::{Checkpoint, DType, HostTensor, Tensor, save_safetensors};

/// The loss scale that f16 runs begin with.
const FIRST_SCALE: f32 = 65536.0;
/// Good updates in a row that double it.
const GROWTH_INTERVAL: u32 = 2000;

/// First and second moments of one tensor.
struct Slot {
    parameter: Parameter,
    m: Tensor,
    v: Tensor,
    /// Its learning rate over the step's.
    rate: f32,
    /// Updates that it had a gradient for.
    steps: u64,
}

/// AdamW (Loshchilov & Hutter, 2019) with PyTorch's update; state in f32.
pub struct Optimizer {
    slots: Vec<Slot>,
    settings: AdamW,
    grad_clip: f32,
    /// f32 `[2]`: the loss's factor and the good updates since it last changed. It lives on the device, so that an
    /// overflow counts from the very next step on.
    scale: Option<Tensor>,
}

impl Optimizer {
    /// Zero moments for `parameters`; `settings.step` is ignored. Gradients are scaled down to the
    /// global norm `grad_clip`, 0 for no clipping.
    pub fn new(parameters: Vec<Parameter>, settings: AdamW, grad_clip: f32) -> Optimizer {
        let mut optimizer = Optimizer {
            slots: Vec::new(),
            settings,
            grad_clip,
            scale: None,
        };
        optimizer.add(parameters, 1.0);
        optimizer
    }

    /// More parameters, whose learning rate is `rate` times the step's.
    pub fn add(&mut self, parameters: Vec<Parameter>, rate: f32) {
        let slot = |parameter: Parameter| {
            let value = parameter.var.value();
            let zeros = || Tensor::zeros(value.gpu(), DType::F32, value.shape());
            Slot {
                m: zeros(),
                v: zeros(),
                parameter,
                rate,
                steps: 0,
            }
        };
        self.slots.extend(parameters.into_iter().map(slot));
    }

    /// Expects gradients of the loss times [`Optimizer::loss_scale`] from here on.
    pub fn scale_loss(&mut self, gpu: &Gpu) {
        self.scale = Some(Tensor::from_f32(gpu, &[FIRST_SCALE, 0.0], &[2]));
    }

    /// The factor of the loss in the coming backward, f32 `[1]`; `None` for 1. Halved by every update whose gradients
    /// are not finite (but never below 1), doubled after 2000 good ones in a row.
    pub fn loss_scale(&self) -> Option<Tensor> {
        self.scale.as_ref().map(|scale| scale.narrow(0, 1))
    }

    /// Updates every tensor that has a gradient at learning rate `lr`; returns the gradients' global norm before
    /// clipping, f32 `[1]`, with a loss scale f32 `[2]`, the scale that they had beside it; `None` when there was no
    /// gradient.
    ///
    /// An update with a norm that is not finite is skipped on the device, so the weights stay good; it still counts
    /// in the moments' bias correction. Nothing is updated where memory has run out: all that the update needs is
    /// allocated before its first dispatch.
    pub fn step(&mut self, gradients: &Gradients, lr: f32) -> Option<Tensor> {
        let mut pairs: Vec<(&mut Slot, &Tensor)> = self
            .slots
            .iter_mut()
            .filter_map(|slot| {
                let gradient = gradients.get(&slot.parameter.var)?;
                Some((slot, gradient))
            })
            .collect();
        let (_, first) = pairs.first()?;
        let gpu = first.gpu().clone();
        let norm = grad_norm(&pairs.iter().map(|(_, g)| *g).collect::<Vec<_>>());
        let most = match self.grad_clip > 0.0 {
            true => self.grad_clip,
            false => f32::MAX,
        };
        let (norm, factor) = match &self.scale {
            Some(scale) => unscale(&norm, scale, most, GROWTH_INTERVAL),
            None => {
                let factor = clip_scale(&norm, most);
                (norm, factor)
            }
        };
        if gpu.failing() {
            return Some(norm);
        }
        // Those of one rate and count of updates go together.
        for (slot, _) in &mut pairs {
            slot.steps += 1;
        }
        pairs.sort_by_key(|(slot, _)| (slot.steps, slot.rate.to_bits()));
        for alike in pairs.chunk_by(|(a, _), (b, _)| (a.steps, a.rate) == (b.steps, b.rate)) {
            let settings = AdamW {
                lr: lr * alike[0].0.rate,
                step: alike[0].0.steps,
                ..self.settings
            };
            let updates: Vec<Update> = alike
                .iter()
                .map(|(slot, grad)| Update {
                    param: slot.parameter.var.value(),
                    grad,
                    m: &slot.m,
                    v: &slot.v,
                })
                .collect();
            adamw_all(&updates, &settings, Some(&factor));
        }
        Some(norm)
    }

    /// Writes the moments, each tensor's number of updates and the loss scale to `path`.
    ///
    /// # Errors
    /// A GPU error while reading back, or a file that cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut tensors = Vec::new();
        for slot in &self.slots {
            for (kind, tensor) in [("m", &slot.m), ("v", &slot.v)] {
                let values = HostTensor::f32(tensor.shape(), &tensor.to_f32()?);
                tensors.push((format!("{kind}.{}", slot.parameter.name), values));
            }
        }
        let steps: Vec<u32> = self.slots.iter().map(|slot| slot.steps as u32).collect();
        tensors.push(("steps".into(), HostTensor::u32(&[steps.len()], &steps)));
        if let Some(scale) = &self.scale {
            let values = HostTensor::f32(scale.shape(), &scale.to_f32()?);
            tensors.push(("loss_scale".into(), values));
        }
        save_safetensors(path, &tensors, None)
    }

    /// Reads what [`Optimizer::save`] wrote.
    ///
    /// # Errors
    /// A missing tensor or another shape.
    pub fn restore(&mut self, path: &Path) -> Result<()> {
        let file = Checkpoint::open(path, "optimizer")?;
        for slot in &self.slots {
            for (kind, tensor) in [("m", &slot.m), ("v", &slot.v)] {
                let name = format!("{kind}.{}", slot.parameter.name);
                tensor.write_f32(&file.values_of(&name, tensor.shape())?);
            }
        }
        let (steps, _) = file.values_u32("steps")?;
        for (slot, steps) in self.slots.iter_mut().zip(steps) {
            slot.steps = u64::from(steps);
        }
        if let Some(scale) = &self.scale {
            scale.write_f32(&file.values_of("loss_scale", scale.shape())?);
        }
        Ok(())
    }
}
