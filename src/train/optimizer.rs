//! AdamW over a model's trainable tensors, with global-norm clipping.

use std::path::Path;

use crate::autograd::Gradients;
use crate::error::Result;
use crate::nn::Parameter;
use crate::ops::adamw::{AdamW, adamw};
use crate::ops::grad_norm::{clip_scale, grad_norm};
use crate::tensor::{Checkpoint, DType, HostTensor, Tensor, save_safetensors};

/// First and second moments of one tensor.
struct Slot {
    parameter: Parameter,
    m: Tensor,
    v: Tensor,
}

/// AdamW (Loshchilov & Hutter, 2019) with PyTorch's update; state in f32.
pub struct Optimizer {
    slots: Vec<Slot>,
    settings: AdamW,
    grad_clip: f32,
    steps: u64,
}

impl Optimizer {
    /// Zero moments for `parameters`; `settings.step` is ignored. Gradients are scaled down to the
    /// global norm `grad_clip`, 0 for no clipping.
    pub fn new(parameters: Vec<Parameter>, settings: AdamW, grad_clip: f32) -> Optimizer {
        let slot = |parameter: Parameter| {
            let value = parameter.var.value();
            let zeros = || Tensor::zeros(value.gpu(), DType::F32, value.shape());
            Slot {
                m: zeros(),
                v: zeros(),
                parameter,
            }
        };
        Optimizer {
            slots: parameters.into_iter().map(slot).collect(),
            settings,
            grad_clip,
            steps: 0,
        }
    }

    /// Updates every tensor that has a gradient at learning rate `lr`; returns the gradients' global
    /// norm before clipping, f32 `[1]`, or `None` when there was no gradient.
    ///
    /// An update with a norm that is not finite is skipped on the device, so the weights stay good.
    pub fn step(&mut self, gradients: &Gradients, lr: f32) -> Option<Tensor> {
        self.steps += 1;
        let pairs: Vec<(&Slot, &Tensor)> = self
            .slots
            .iter()
            .filter_map(|slot| Some((slot, gradients.get(&slot.parameter.var)?)))
            .collect();
        if pairs.is_empty() {
            return None;
        }
        let norm = grad_norm(&pairs.iter().map(|(_, g)| *g).collect::<Vec<_>>());
        let most = match self.grad_clip > 0.0 {
            true => self.grad_clip,
            false => f32::MAX,
        };
        let scale = clip_scale(&norm, most);
        let settings = AdamW {
            lr,
            step: self.steps,
            ..self.settings
        };
        for (slot, gradient) in pairs {
            let weight = slot.parameter.var.value();
            adamw(weight, gradient, &slot.m, &slot.v, &settings, Some(&scale));
        }
        Some(norm)
    }

    /// Writes the moments to `path`.
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
        let metadata = [("step".to_string(), self.steps.to_string())];
        save_safetensors(path, &tensors, Some(metadata.into()))
    }

    /// Reads the moments that [`Optimizer::save`] wrote after `steps` updates.
    ///
    /// # Errors
    /// A missing tensor or another shape.
    pub fn restore(&mut self, path: &Path, steps: u64) -> Result<()> {
        let file = Checkpoint::open(path, "optimizer")?;
        for slot in &self.slots {
            for (kind, tensor) in [("m", &slot.m), ("v", &slot.v)] {
                let name = format!("{kind}.{}", slot.parameter.name);
                tensor.write_f32(&file.values_of(&name, tensor.shape())?);
            }
        }
        self.steps = steps;
        Ok(())
    }
}
