//! Which layer gives the first value that is not finite.

use image::RgbImage;

use super::pipeline::StableDiffusion;
use crate::Result;
use crate::autograd::{Var, find_non_finite, no_grad};
use crate::ops::cast::cast;
use crate::tensor::DType;

/// Noise levels at which the U-Net is looked at, in thousandths of the training timesteps.
const LEVELS: [usize; 5] = [0, 250, 500, 750, 999];

impl StableDiffusion {
    /// Where the first NaN or infinity comes up when `image` and `text` are worked on, and what to do: for a message.
    ///
    /// Looks at every intermediate result of the text encoder, of the VAE's encoder and of the U-Net at five noise
    /// levels, and reads each back: for a run that has failed. `None` where all are finite.
    ///
    /// # Errors
    /// A text that cannot be tokenised, what the GPU reports.
    pub fn diagnose(&self, image: &RgbImage, text: &str) -> Result<Option<String>> {
        let ids = self.tokenizer.chunks(text)?;
        let mut states = None;
        let found = find_non_finite(|| {
            states = Some(self.encode_text(&ids.iter().take(1).collect::<Vec<_>>()));
        });
        self.gpu().check()?;
        let Some(states) = states.filter(|_| found.is_none()) else {
            return Ok(found.map(|at| self.advice("the text encoder", &at)));
        };
        let pixels = self.prepare_image(image);
        let mut latents = None;
        let found = find_non_finite(|| latents = Some(self.encode_images(&pixels)));
        self.gpu().check()?;
        let Some(latents) = latents.filter(|_| found.is_none()) else {
            return Ok(found.map(|at| self.advice("the VAE's encoder", &at)));
        };
        let noise = super::ddim::gaussian(0, latents.elements());
        let noise = crate::tensor::Tensor::from_f32(self.gpu(), &noise, latents.shape());
        for level in LEVELS {
            let timestep = level * self.schedule.train_timesteps() / 1000;
            let x = self.schedule.add_noise(&latents, &noise, timestep);
            let found = find_non_finite(|| {
                no_grad(|| {
                    let x = Var::constant(cast(&x, self.activations()));
                    let states = Var::constant(states.clone());
                    self.unet.forward(&x, &[timestep], &states, None);
                });
            });
            self.gpu().check()?;
            if let Some(at) = found {
                let part = format!("the U-Net at timestep {timestep}");
                return Ok(Some(self.advice(&part, &at)));
            }
        }
        Ok(None)
    }

    fn advice(&self, part: &str, at: &str) -> String {
        let advice = match self.activations() {
            DType::F16 => {
                "values over 65504 do not fit half precision, use `--precision f32` for this model"
            }
            _ => "the checkpoint's weights are damaged or not trained to their end",
        };
        format!("{part} gives values that are not finite, first in {at}; {advice}")
    }
}
