//! Null-text inversion: an unconditional embedding per timestep that makes guided sampling give the image back.
//!
//! Mokady et al.: *Null-text Inversion for Editing Real Images using Guided Diffusion Models*, 2023. The trajectory of
//! the DDIM inversion is the pivot; going back down it with guidance, the embedding of the empty text is optimised at
//! each timestep until the step lands on the pivot.

use super::maps::Capture;
use super::pipeline::{StableDiffusion, repeat_samples};
use crate::autograd::Var;
use crate::ops::adamw::{AdamW, adamw};
use crate::ops::binary::{Binary, binary};
use crate::ops::cast::cast;
use crate::ops::concat::concat;
use crate::ops::reduce::{Reduce, reduce};
use crate::ops::unary::{Unary, unary};
use crate::tensor::{DType, Tensor};
use crate::{Error, Result};

/// Factor on the latents' error before it is sent back through the U-Net, so that gradients of the last steps, whose
/// error is some 1e-3, keep their digits in half precision. Adam's update does not depend on it.
const GRADIENT_SCALE: f32 = 64.0;

/// How the embeddings are optimised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NullTextOptions {
    /// Classifier-free guidance of the way down.
    pub guidance: f32,
    /// Most Adam updates at a timestep.
    pub updates: usize,
    /// Learning rate at the first timestep; at the i-th it is this × (1 − i/100).
    pub learning_rate: f32,
    /// A sample is done with timestep i once its loss is below this + 2e-5 · i.
    pub tolerance: f32,
}

impl Default for NullTextOptions {
    /// The paper's code: guidance 7.5, 10 updates, 1e-2, 1e-5.
    fn default() -> Self {
        NullTextOptions {
            guidance: 7.5,
            updates: 10,
            learning_rate: 1e-2,
            tolerance: 1e-5,
        }
    }
}

/// What null-text inversion leaves.
pub struct NullText {
    /// The optimised embedding of each timestep in the order of sampling, f32 `[batch, context, width]`.
    pub embeddings: Vec<Tensor>,
    /// The latents that guided sampling with them gives, f32 `[batch, height, width, channels]`.
    pub latents: Tensor,
    /// Each timestep's loss before its last update, one a sample.
    pub losses: Vec<Vec<f32>>,
}

impl StableDiffusion {
    /// Optimises the null text along `pivots`, the `steps` + 1 latents of a DDIM inversion from clean to noised, each
    /// f32 `[batch, height, width, channels]`; `text` `[batch, context, width]`.
    ///
    /// With a `capture`, the conditional branch's maps are recorded at each timestep: the latents there are those
    /// that sampling with the optimised embeddings passes through. `on_step` is told after each timestep and may stop it.
    ///
    /// # Errors
    /// What the GPU reports; a loss that is not finite.
    pub fn null_text(
        &self,
        pivots: &[Tensor],
        text: &Tensor,
        options: &NullTextOptions,
        mut capture: Option<&mut Capture>,
        mut on_step: impl FnMut(usize) -> Result<()>,
    ) -> Result<NullText> {
        let steps = pivots.len() - 1;
        let timesteps = self.schedule.timesteps(steps);
        let stride = self.schedule.train_timesteps() / steps;
        let batch = text.dim(0);
        let empty = cast(
            &self.encode_text(&[&self.tokenizer.chunk_of("")?]),
            DType::F32,
        );
        let mut null = repeat_samples(&empty, &vec![0; batch]);
        let mut x = pivots[steps].clone();
        let mut result = NullText {
            embeddings: Vec::with_capacity(steps),
            latents: x.clone(),
            losses: Vec::with_capacity(steps),
        };
        for (i, &timestep) in timesteps.iter().rev().enumerate() {
            let conditional = self.predict_noise(&x, timestep, text, capture.as_deref_mut());
            let step = Step {
                model: self,
                options,
                number: i,
                timestep,
                to: timestep as isize - stride as isize,
            };
            let target = &pivots[steps - 1 - i];
            let (optimised, losses) = step.optimise(&null, &x, &conditional, target)?;
            null = optimised;
            let unconditional = self.predict_noise(&x, timestep, &self.text_of(&null), None);
            let noise = guided(&unconditional, &conditional, options.guidance);
            x = self.schedule.step(&x, &noise, timestep as isize, step.to);
            result.embeddings.push(null.clone());
            result.losses.push(losses);
            self.gpu().check()?;
            on_step(i)?;
        }
        result.latents = x;
        Ok(result)
    }

    /// A text state in the activations' dtype.
    fn text_of(&self, state: &Tensor) -> Tensor {
        cast(state, self.activations())
    }
}

/// Unconditional + guidance · (conditional − unconditional); Ho and Salimans 2022.
pub fn guided(unconditional: &Tensor, conditional: &Tensor, guidance: f32) -> Tensor {
    let difference = binary(conditional, unconditional, Binary::Sub);
    let scaled = unary(&difference, Unary::Affine(guidance, 0.0));
    binary(unconditional, &scaled, Binary::Add)
}

/// One timestep's optimisation.
struct Step<'a> {
    model: &'a StableDiffusion,
    options: &'a NullTextOptions,
    /// i, counted from the noisiest timestep.
    number: usize,
    timestep: usize,
    /// The noise level that the step goes to.
    to: isize,
}

/// The samples of a batch whose embedding still moves, and Adam's state for them.
struct Active {
    /// Their places in the batch.
    samples: Vec<usize>,
    null: Tensor,
    m: Tensor,
    v: Tensor,
}

impl Step<'_> {
    /// The embeddings that bring `x` closest to `target`, starting from `null`, and each sample's last loss.
    fn optimise(
        &self,
        null: &Tensor,
        x: &Tensor,
        conditional: &Tensor,
        target: &Tensor,
    ) -> Result<(Tensor, Vec<f32>)> {
        let batch = null.dim(0);
        let zeros = || Tensor::zeros(null.gpu(), DType::F32, null.shape());
        let mut active = Active {
            samples: (0..batch).collect(),
            // A copy: Adam updates it in place.
            null: unary(null, Unary::Affine(1.0, 0.0)),
            m: zeros(),
            v: zeros(),
        };
        let mut done: Vec<Option<Tensor>> = vec![None; batch];
        let mut losses = vec![0.0; batch];
        let lr = self.options.learning_rate * (1.0 - self.number as f32 / 100.0).max(0.0);
        let enough = self.options.tolerance + 2e-5 * self.number as f32;
        for update in 0..self.options.updates {
            let of = |all: &Tensor| repeat_samples(all, &active.samples);
            let (grad, loss) = self.gradient(&active.null, &of(x), &of(conditional), &of(target));
            let settings = AdamW {
                lr,
                betas: (0.9, 0.999),
                eps: 1e-8,
                weight_decay: 0.0,
                decoupled: false,
                step: update as u64 + 1,
            };
            adamw(&active.null, &grad, &active.m, &active.v, &settings, None);
            let loss = loss.to_f32()?;
            if let Some(bad) = loss.iter().find(|l| !l.is_finite()) {
                return Err(Error::Input(format!(
                    "null-text inversion: the loss at timestep {} is {bad}; with `--precision f16` try f32",
                    self.timestep
                )));
            }
            let mut kept = Vec::new();
            for (place, (&sample, &loss)) in active.samples.iter().zip(&loss).enumerate() {
                losses[sample] = loss;
                if loss < enough {
                    done[sample] = Some(repeat_samples(&active.null, &[place]));
                } else {
                    kept.push(place);
                }
            }
            active = Active {
                samples: kept.iter().map(|&place| active.samples[place]).collect(),
                null: repeat_samples(&active.null, &kept),
                m: repeat_samples(&active.m, &kept),
                v: repeat_samples(&active.v, &kept),
            };
            if active.samples.is_empty() {
                break;
            }
        }
        for (place, &sample) in active.samples.iter().enumerate() {
            done[sample] = Some(repeat_samples(&active.null, &[place]));
        }
        let done: Vec<Tensor> = done.into_iter().flatten().collect();
        Ok((concat(&done.iter().collect::<Vec<_>>(), 0), losses))
    }

    /// The gradient of each sample's loss, the mean squared distance of the guided step from `target`, with respect
    /// to its embedding in `null`, and the losses f32 `[batch]`.
    fn gradient(
        &self,
        null: &Tensor,
        x: &Tensor,
        conditional: &Tensor,
        target: &Tensor,
    ) -> (Tensor, Tensor) {
        let (model, guidance) = (self.model, self.options.guidance);
        let (from, batch) = (self.timestep as isize, x.dim(0));
        let leaf = Var::parameter(null.clone());
        let text = leaf.cast(model.activations());
        let input = Var::constant(cast(x, model.activations()));
        let predicted = model
            .unet
            .forward_recomputed(&input, &vec![self.timestep; batch], &text);
        let noise = guided(&cast(predicted.value(), DType::F32), conditional, guidance);
        let reached = model.schedule.step(x, &noise, from, self.to);
        let error = binary(&reached, target, Binary::Sub);
        let each = error.elements() / batch;
        let flat = error.reshape(&[batch, each]);
        let loss = reduce(
            &binary(&flat, &flat, Binary::Mul),
            &[1],
            Reduce::Mean,
            false,
        );
        // d loss / d predicted = 2/n · error · ∂step/∂noise · (1 − guidance); the constants wait until after the U-Net.
        let upstream = cast(
            &unary(&error, Unary::Affine(GRADIENT_SCALE, 0.0)),
            predicted.dtype(),
        );
        let (_, of_noise) = model.schedule.coefficients(from, self.to);
        let rest = 2.0 / each as f64 * of_noise * f64::from(1.0 - guidance);
        let mut grads = Var::backward_with(&[(predicted, upstream)]);
        let grad = grads
            .take(&leaf)
            .expect("every U-Net of this kind attends to its text");
        let rest = (rest / f64::from(GRADIENT_SCALE)) as f32;
        (unary(&grad, Unary::Affine(rest, 0.0)), loss)
    }
}
