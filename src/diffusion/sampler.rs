//! Painting: from noise down to an image by DDIM or PNDM, with classifier-free guidance.

use std::fmt;
use std::str::FromStr;

use image::RgbImage;

use super::ddim::NoiseSchedule;
use super::null_text::guided;
use super::pipeline::{StableDiffusion, repeat_samples};
use crate::autograd::{Var, no_grad};
use crate::ops::binary::{Binary, binary};
use crate::ops::cast::cast;
use crate::ops::concat::concat;
use crate::ops::unary::{Unary, unary};
use crate::tensor::{DType, Tensor};
use crate::{Error, Result};

/// How each step uses the noise predictions so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sampler {
    /// The last prediction alone; Song et al. 2020.
    Ddim,
    /// A linear multistep rule over the last four; Liu et al. 2022, without Runge–Kutta steps, as Stable Diffusion v1
    /// is published with.
    #[default]
    Pndm,
}

impl FromStr for Sampler {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        match name {
            "ddim" => Ok(Sampler::Ddim),
            "pndm" => Ok(Sampler::Pndm),
            _ => Err(format!("found `{name}`, expected ddim or pndm")),
        }
    }
}

impl fmt::Display for Sampler {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Sampler::Ddim => "ddim",
            Sampler::Pndm => "pndm",
        })
    }
}

/// How to paint.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// Steps down the noise levels; PNDM takes one U-Net evaluation more.
    pub steps: usize,
    /// Weight of the text; 1 is no guidance.
    pub guidance: f32,
    /// The multistep rule.
    pub sampler: Sampler,
    /// Text to stay away from, empty for none.
    pub negative: String,
}

impl Default for GenerateOptions {
    /// 50 steps of PNDM, guidance 7.5.
    fn default() -> Self {
        GenerateOptions {
            steps: 50,
            guidance: 7.5,
            sampler: Sampler::default(),
            negative: String::new(),
        }
    }
}

/// One move down the noise levels: where the U-Net looks, and from which level to which the latents go.
struct Move {
    timestep: usize,
    from: isize,
    to: isize,
}

impl Sampler {
    /// The moves of `steps` steps, leading spacing, shifted up by the scheduler's `offset`.
    fn moves(self, schedule: &NoiseSchedule, steps: usize, offset: usize) -> Vec<Move> {
        let stride = (schedule.train_timesteps() / steps) as isize;
        let last = schedule.train_timesteps() - 1;
        let mut moves: Vec<Move> = schedule
            .timesteps(steps)
            .iter()
            .rev()
            .map(|&t| {
                let timestep = (t + offset).min(last);
                Move {
                    timestep,
                    from: timestep as isize,
                    to: timestep as isize - stride,
                }
            })
            .collect();
        if self == Sampler::Pndm && steps > 1 {
            // The first move is done twice: the second time with the mean of the predictions at both of its ends.
            let again = Move {
                timestep: moves[1].timestep,
                from: moves[0].from,
                to: moves[0].to,
            };
            moves.insert(1, again);
        }
        moves
    }

    /// The prediction to step with, from all so far, the latest last.
    fn combine(self, predictions: &[Tensor]) -> Tensor {
        let weights: &[f64] = match (self, predictions.len()) {
            (Sampler::Ddim, _) | (_, 1) => &[1.0],
            (_, 2) => &[1.5, -0.5],
            (_, 3) => &[23.0 / 12.0, -16.0 / 12.0, 5.0 / 12.0],
            _ => &[55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0],
        };
        let weighted = |(x, &by): (&Tensor, &f64)| unary(x, Unary::Affine(by as f32, 0.0));
        predictions
            .iter()
            .rev()
            .zip(weights)
            .map(weighted)
            .reduce(|sum, x| binary(&sum, &x, Binary::Add))
            .expect("a prediction was made")
    }
}

impl StableDiffusion {
    /// The clean latents that `noise`, f32 `[batch, height, width, channels]`, becomes with `prompts`, one a sample.
    ///
    /// A prompt longer than the context is cut. `on_step` is told after each of [`StableDiffusion::moves`] steps and
    /// may stop it by an error.
    ///
    /// # Errors
    /// Steps out of 1 to the training timesteps; a prompt that cannot be tokenised; what the GPU reports.
    pub fn generate(
        &self,
        noise: &Tensor,
        prompts: &[&str],
        options: &GenerateOptions,
        mut on_step: impl FnMut(usize) -> Result<()>,
    ) -> Result<Tensor> {
        let most = self.schedule.train_timesteps();
        if !(1..=most).contains(&options.steps) {
            return Err(Error::Config(format!(
                "--steps: found {}, expected 1 to {most}",
                options.steps
            )));
        }
        let chunk = |text: &&str| self.tokenizer.chunk_of(text);
        let chunks = prompts.iter().map(chunk).collect::<Result<Vec<_>>>()?;
        let text = self.encode_text(&chunks.iter().collect::<Vec<_>>());
        let negative = self.encode_text(&[&self.tokenizer.chunk_of(&options.negative)?]);
        let negative = repeat_samples(&negative, &vec![0; prompts.len()]);
        let offset = self.schedule.steps_offset();
        let mut x = noise.clone();
        let mut start = x.clone();
        let mut predictions: Vec<Tensor> = Vec::new();
        for (i, step) in options
            .sampler
            .moves(&self.schedule, options.steps, offset)
            .iter()
            .enumerate()
        {
            let predicted =
                self.guided_noise(&x, step.timestep, &text, &negative, options.guidance);
            let again = options.sampler == Sampler::Pndm && i == 1;
            let used = if again {
                let sum = binary(&predictions[0], &predicted, Binary::Add);
                x = start.clone();
                unary(&sum, Unary::Affine(0.5, 0.0))
            } else {
                start = x.clone();
                if predictions.len() == 4 {
                    predictions.remove(0);
                }
                predictions.push(predicted);
                options.sampler.combine(&predictions)
            };
            x = self.schedule.step(&x, &used, step.from, step.to);
            self.gpu().check()?;
            on_step(i)?;
        }
        Ok(x)
    }

    /// The clean latents that DDIM with guidance against the empty text finds from `inverted`, the end of an
    /// inversion of `steps` steps with `text` `[batch, context, width]`.
    ///
    /// # Errors
    /// What the GPU reports.
    pub fn sample_back(
        &self,
        inverted: &Tensor,
        text: &Tensor,
        steps: usize,
        guidance: f32,
    ) -> Result<Tensor> {
        let negative = self.encode_text(&[&self.tokenizer.chunk_of("")?]);
        let negative = repeat_samples(&negative, &vec![0; text.dim(0)]);
        let mut x = inverted.clone();
        for step in Sampler::Ddim.moves(&self.schedule, steps, 0) {
            let noise = self.guided_noise(&x, step.timestep, text, &negative, guidance);
            x = self.schedule.step(&x, &noise, step.from, step.to);
            self.gpu().check()?;
        }
        Ok(x)
    }

    /// U-Net evaluations that [`StableDiffusion::generate`] takes.
    pub fn moves(&self, options: &GenerateOptions) -> usize {
        options.steps + usize::from(options.sampler == Sampler::Pndm && options.steps > 1)
    }

    /// The noise with guidance; both branches run as one batch.
    fn guided_noise(
        &self,
        x: &Tensor,
        timestep: usize,
        text: &Tensor,
        negative: &Tensor,
        guidance: f32,
    ) -> Tensor {
        if guidance == 1.0 {
            return self.predict_noise(x, timestep, text, None);
        }
        let both = self.predict_noise(
            &concat(&[x, x], 0),
            timestep,
            &concat(&[negative, text], 0),
            None,
        );
        let batch = x.dim(0);
        let half = |from| crate::ops::slice::slice(&both, 0, from, batch);
        guided(&half(0), &half(batch), guidance)
    }

    /// The images of latents (mean × scaling factor) f32 `[batch, height, width, channels]`.
    ///
    /// # Errors
    /// What the GPU reports.
    pub fn decode_latents(&self, latents: &Tensor) -> Result<Vec<RgbImage>> {
        self.unet.forget_plans();
        let unscaled = unary(
            latents,
            Unary::Affine(1.0 / self.vae.config().scaling_factor, 0.0),
        );
        let pixels = no_grad(|| {
            let input = Var::constant(cast(&unscaled, self.activations()));
            cast(self.vae.decode(&input).value(), DType::F32)
        });
        let (height, width) = (pixels.dim(1) as u32, pixels.dim(2) as u32);
        let each = (height * width * 3) as usize;
        let to_byte = |v: &f32| ((v / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round() as u8;
        let images = pixels.to_f32()?;
        Ok(images
            .chunks_exact(each)
            .filter_map(|image| {
                RgbImage::from_raw(width, height, image.iter().map(to_byte).collect())
            })
            .collect())
    }
}
