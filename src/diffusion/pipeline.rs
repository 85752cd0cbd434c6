//! A whole Stable Diffusion checkpoint, and its trajectories on which word maps are recorded.

use std::path::PathBuf;

use image::RgbImage;

use super::clip_text::ClipText;
use super::clip_tokenizer::{ClipTokenizer, TextChunk};
use super::ddim::{NoiseSchedule, gaussian};
use super::maps::{Capture, MapLayers, TokenMaps};
use super::null_text::{NullText, NullTextOptions};
use super::unet::Unet;
use super::vae::Vae;
use crate::autograd::{Var, no_grad};
use crate::gpu::Gpu;
use crate::ops::cast::cast;
use crate::ops::concat::concat;
use crate::ops::gather_rows::gather_rows;
use crate::ops::unary::{Unary, unary};
use crate::tensor::{DType, Tensor};
use crate::vlm::processor::resize::{Filter, resize};
use crate::{Error, Result};

/// The path of noise levels along which maps are recorded: `--mode` and `--steps`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trajectory {
    /// DDIM inversion with so many steps, recording at each; no randomness.
    Ddim {
        /// Steps N; timestep i · (1000 / N) for i below N.
        steps: usize,
    },
    /// One forward at each of a few timesteps on q(x_t | x₀), recording at each.
    Noised {
        /// Timesteps, spread evenly over 1 … 600.
        steps: usize,
    },
    /// DDIM inversion, null-text inversion back down it, recording on the way down.
    NullText {
        /// Steps N of either way.
        steps: usize,
    },
}

impl Trajectory {
    /// Steps of the inversion where none are given.
    pub const DDIM_STEPS: usize = 50;
    /// Timesteps of the `noised` mode where none are given.
    pub const NOISED_STEPS: usize = 5;

    /// Parses `--mode` and an optional `--steps`. Errors: an unknown mode, a step count that the schedule cannot make.
    pub fn parse(mode: &str, steps: Option<usize>) -> Result<Self> {
        let trajectory = match mode {
            "ddim" => Trajectory::Ddim {
                steps: steps.unwrap_or(Self::DDIM_STEPS),
            },
            "noised" => Trajectory::Noised {
                steps: steps.unwrap_or(Self::NOISED_STEPS),
            },
            "null-text" => Trajectory::NullText {
                steps: steps.unwrap_or(Self::DDIM_STEPS),
            },
            other => {
                return Err(Error::Config(format!(
                    "--mode: found \"{other}\", expected \"null-text\", \"ddim\" or \"noised\""
                )));
            }
        };
        if !(1..=1000).contains(&trajectory.steps()) {
            return Err(Error::Config(format!(
                "--steps: found {}, expected 1 to 1000",
                trajectory.steps()
            )));
        }
        Ok(trajectory)
    }

    /// `"null-text"`, `"ddim"` or `"noised"`.
    pub fn mode(&self) -> &'static str {
        match self {
            Trajectory::NullText { .. } => "null-text",
            Trajectory::Ddim { .. } => "ddim",
            Trajectory::Noised { .. } => "noised",
        }
    }

    /// N of `--steps`.
    pub fn steps(&self) -> usize {
        match *self {
            Trajectory::Ddim { steps }
            | Trajectory::Noised { steps }
            | Trajectory::NullText { steps } => steps,
        }
    }

    /// How often a run tells its progress: null-text goes up the steps and down again.
    pub fn progress(&self) -> usize {
        match *self {
            Trajectory::NullText { steps } => 2 * steps,
            _ => self.steps(),
        }
    }
}

/// What one run over a trajectory leaves.
pub struct TrajectoryRun {
    /// The first noise prediction, f32 `[batch, height, width, channels]`.
    pub first_noise: Tensor,
    /// The latents after the last step (inverted), or at the last noise level.
    pub latents: Tensor,
    /// The maps that were recorded.
    pub capture: Capture,
    /// The way back down, of [`Trajectory::NullText`].
    pub null_text: Option<NullText>,
}

/// Token maps of a batch, and what they were read from.
pub struct Recorded {
    /// One a sample.
    pub tokens: Vec<TokenMaps>,
    /// Each sample's first place among the chunks.
    pub first_chunk: Vec<usize>,
    /// Text states of every chunk, `[chunks, context, width]`.
    pub text: Tensor,
    /// The first noise prediction of every chunk, f32 `[chunks, height, width, channels]`.
    pub first_noise: Tensor,
    /// The latents at the end of every chunk's trajectory: inverted, or at the last noise level.
    pub latents: Tensor,
    /// What null-text inversion came back to, of [`Trajectory::NullText`].
    pub reconstructed: Option<Tensor>,
    /// The optimised embeddings in the order of sampling, f32 `[chunks, steps, context, width]`, of the same.
    pub null_text: Option<Tensor>,
}

/// Tokenizer, text encoder, VAE, U-Net and noise schedule of one checkpoint.
pub struct StableDiffusion {
    /// The directory or file it was loaded from.
    pub path: PathBuf,
    /// Text to ids.
    pub tokenizer: ClipTokenizer,
    /// Ids to states.
    pub text_encoder: ClipText,
    /// Pixels to latents and back.
    pub vae: Vae,
    /// The noise predictor.
    pub unet: Unet,
    /// ᾱ over timesteps.
    pub schedule: NoiseSchedule,
    /// Most texts that run through the U-Net at once.
    pub batch: usize,
    pub(super) files: Vec<PathBuf>,
    pub(super) gpu: Gpu,
    pub(super) activations: DType,
}

impl StableDiffusion {
    /// Side of the latents.
    pub fn latent_side(&self) -> usize {
        self.unet.config().sample_size
    }

    /// Side in pixels of the images it takes: `unet.sample_size` × 2^(VAE levels − 1).
    pub fn image_side(&self) -> usize {
        self.latent_side() * self.vae.config().factor()
    }

    /// The part of an image that the model sees, at its size: cropped to the square in the middle, resized with a
    /// Lanczos filter as `diffusers`' image processor does.
    pub fn resized(&self, image: &RgbImage) -> RgbImage {
        let side = self.image_side() as u32;
        resize(&centre_square(image), side, side, Filter::Lanczos)
    }

    /// An image as the VAE takes it, f32 in −1…1 `[1, side, side, 3]`: [`StableDiffusion::resized`].
    pub fn prepare_image(&self, image: &RgbImage) -> Tensor {
        let side = self.image_side();
        let resized = self.resized(image);
        let values: Vec<f32> = resized
            .iter()
            .map(|&v| f32::from(v) / 127.5 - 1.0)
            .collect();
        Tensor::from_f32(&self.gpu, &values, &[1, side, side, 3])
    }

    /// Latents (mean × scaling factor) f32 `[batch, height, width, channels]` of images f32 in −1…1
    /// `[batch, side, side, 3]`.
    pub fn encode_images(&self, images: &Tensor) -> Tensor {
        // The VAE takes the most memory of all: the U-Net's plans begin anew behind it.
        self.unet.forget_plans();
        no_grad(|| {
            let mean = self.vae.encode(&self.activation(images)).mean;
            let mean = cast(mean.value(), DType::F32);
            unary(&mean, Unary::Affine(self.vae.config().scaling_factor, 0.0))
        })
    }

    /// Text states `[chunks, context, width]` of tokenised chunks, in the activations' dtype.
    pub fn encode_text(&self, chunks: &[&TextChunk]) -> Tensor {
        let ids: Vec<u32> = chunks.iter().flat_map(|c| c.ids.iter().copied()).collect();
        let context = ids.len() / chunks.len();
        let ids = Tensor::from_u32(&self.gpu, &ids, &[chunks.len(), context]);
        no_grad(|| self.text_encoder.forward(&ids).value().clone())
    }

    /// The noise in f32 latents at a timestep, f32; `text` one state a sample.
    pub fn predict_noise(
        &self,
        latents: &Tensor,
        timestep: usize,
        text: &Tensor,
        capture: Option<&mut Capture>,
    ) -> Tensor {
        no_grad(|| {
            let timesteps = vec![timestep; latents.dim(0)];
            let text = Var::constant(text.clone());
            let x = self.activation(latents);
            let noise = self.unet.predict(&x, &timesteps, &text, capture);
            cast(noise.value(), DType::F32)
        })
    }

    /// Runs a trajectory from clean `latents` `[batch, height, width, channels]` with `text`
    /// `[batch, context, width]`, recording the maps of `layers`.
    ///
    /// `seeds`, one a sample, fix the noise of [`Trajectory::Noised`], so that a sample's maps do not depend on which
    /// others share its batch. `on_step` is told after each step and may stop the run by an error.
    ///
    /// # Errors
    /// What the GPU reports at a step's boundary.
    pub fn run(
        &self,
        latents: &Tensor,
        text: &Tensor,
        trajectory: Trajectory,
        layers: MapLayers,
        seeds: &[u64],
        mut on_step: impl FnMut(usize) -> Result<()>,
    ) -> Result<TrajectoryRun> {
        let mut capture = Capture::new(layers, latents.dim(1));
        let (first_noise, latents, null_text) = match trajectory {
            Trajectory::Ddim { steps } => {
                let maps = Some(&mut capture);
                let (noise, mut pivots) = self.invert(latents, text, steps, maps, on_step)?;
                (noise, pivots.swap_remove(steps), None)
            }
            Trajectory::NullText { steps } => {
                let (noise, pivots) = self.invert(latents, text, steps, None, &mut on_step)?;
                let options = NullTextOptions::default();
                let maps = Some(&mut capture);
                let down = |step| on_step(steps + step);
                let found = self.null_text(&pivots, text, &options, maps, down)?;
                (noise, pivots[steps].clone(), Some(found))
            }
            Trajectory::Noised { steps } => {
                let each = latents.elements() / latents.dim(0);
                let noise: Vec<f32> = seeds.iter().flat_map(|&s| gaussian(s, each)).collect();
                let noise = Tensor::from_f32(&self.gpu, &noise, latents.shape());
                let (mut first, mut x) = (None, latents.clone());
                for (i, &t) in self.schedule.noised_timesteps(steps).iter().enumerate() {
                    x = self.schedule.add_noise(latents, &noise, t);
                    let predicted = self.predict_noise(&x, t, text, Some(&mut capture));
                    first.get_or_insert(predicted);
                    self.gpu.check()?;
                    on_step(i)?;
                }
                (first.expect("a trajectory has at least one step"), x, None)
            }
        };
        Ok(TrajectoryRun {
            first_noise,
            latents,
            capture,
            null_text,
        })
    }

    /// DDIM inversion with the text alone, without guidance: the first noise prediction, and the `steps` + 1 latents
    /// from the clean ones to the noisiest, each f32.
    ///
    /// # Errors
    /// What the GPU reports at a step's boundary.
    pub fn invert(
        &self,
        latents: &Tensor,
        text: &Tensor,
        steps: usize,
        mut capture: Option<&mut Capture>,
        mut on_step: impl FnMut(usize) -> Result<()>,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let mut pivots = vec![latents.clone()];
        let mut first = None;
        let stride = (self.schedule.train_timesteps() / steps) as isize;
        for (i, &t) in self.schedule.timesteps(steps).iter().enumerate() {
            let x = &pivots[i];
            let noise = self.predict_noise(x, t, text, capture.as_deref_mut());
            let t = t as isize;
            pivots.push(self.schedule.step(x, &noise, t - stride, t));
            first.get_or_insert(noise);
            self.gpu.check()?;
            on_step(i)?;
        }
        let first = first.expect("a trajectory has at least one step");
        Ok((first, pivots))
    }

    /// Token maps of each text on its image: `latents` `[samples, …]` and one list of chunks a sample.
    ///
    /// The chunks of all samples run in passes of at most [`StableDiffusion::batch`], so that long texts take time and
    /// not memory. Errors as [`StableDiffusion::run`].
    pub fn token_maps(
        &self,
        latents: &Tensor,
        texts: &[Vec<TextChunk>],
        trajectory: Trajectory,
        layers: MapLayers,
        seeds: &[u64],
        mut on_step: impl FnMut(usize) -> Result<()>,
    ) -> Result<Recorded> {
        let chunks: Vec<(usize, &TextChunk)> = texts
            .iter()
            .enumerate()
            .flat_map(|(sample, chunks)| chunks.iter().map(move |chunk| (sample, chunk)))
            .collect();
        let mut tokens = vec![TokenMaps::default(); texts.len()];
        let (mut states, mut runs) = (Vec::new(), Vec::new());
        for pass in chunks.chunks(self.batch) {
            let text = self.encode_text(&pass.iter().map(|(_, chunk)| *chunk).collect::<Vec<_>>());
            let owner: Vec<usize> = pass.iter().map(|(sample, _)| *sample).collect();
            let own_seeds: Vec<u64> = owner.iter().map(|&sample| seeds[sample]).collect();
            let repeated = repeat_samples(latents, &owner);
            let run = self.run(
                &repeated,
                &text,
                trajectory,
                layers,
                &own_seeds,
                &mut on_step,
            )?;
            let maps = run.capture.aggregate()?.to_f32()?;
            for ((sample, chunk), maps) in pass.iter().zip(maps.chunks(maps.len() / pass.len())) {
                tokens[*sample].push(&chunk.offsets, maps);
            }
            states.push(text);
            runs.push(run);
        }
        let joined = |each: &dyn Fn(&TrajectoryRun) -> Option<Tensor>| -> Option<Tensor> {
            let parts: Vec<Tensor> = runs.iter().map(each).collect::<Option<_>>()?;
            Some(concat(&parts.iter().collect::<Vec<_>>(), 0))
        };
        // [chunks, context, width] of each step → [chunks, steps, context, width].
        let embeddings = |found: &NullText| {
            let each = |e: &Tensor| e.reshape(&[e.dim(0), 1, e.dim(1), e.dim(2)]);
            let each: Vec<Tensor> = found.embeddings.iter().map(each).collect();
            concat(&each.iter().collect::<Vec<_>>(), 1)
        };
        let first_chunk = texts
            .iter()
            .scan(0, |next, chunks| {
                Some(std::mem::replace(next, *next + chunks.len()))
            })
            .collect();
        let missing = || Error::Input("no text to map".into());
        Ok(Recorded {
            tokens,
            first_chunk,
            text: concat(&states.iter().collect::<Vec<_>>(), 0),
            first_noise: joined(&|run| Some(run.first_noise.clone())).ok_or_else(missing)?,
            latents: joined(&|run| Some(run.latents.clone())).ok_or_else(missing)?,
            reconstructed: joined(&|run| Some(run.null_text.as_ref()?.latents.clone())),
            null_text: joined(&|run| run.null_text.as_ref().map(embeddings)),
        })
    }

    /// How often [`StableDiffusion::token_maps`] tells its progress on these texts.
    pub fn progress(&self, texts: &[Vec<TextChunk>], trajectory: Trajectory) -> usize {
        let chunks: usize = texts.iter().map(Vec::len).sum();
        chunks.div_ceil(self.batch) * trajectory.progress()
    }

    /// The GPU that it was loaded to.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Dtype of its activations.
    pub fn activations(&self) -> DType {
        self.activations
    }

    fn activation(&self, x: &Tensor) -> Var {
        Var::constant(cast(x, self.activations))
    }
}

/// The largest square in the middle of an image.
pub fn centre_square(image: &RgbImage) -> RgbImage {
    let (width, height) = image.dimensions();
    let side = width.min(height);
    image::imageops::crop_imm(image, (width - side) / 2, (height - side) / 2, side, side).to_image()
}

/// `x` `[samples, …]` with sample `owner[i]` at place i.
pub fn repeat_samples(x: &Tensor, owner: &[usize]) -> Tensor {
    if owner.iter().copied().eq(0..x.dim(0)) {
        return x.clone();
    }
    let flat = x.reshape(&[x.dim(0), x.elements() / x.dim(0)]);
    let rows: Vec<u32> = owner.iter().map(|&s| s as u32).collect();
    let rows = Tensor::from_u32(x.gpu(), &rows, &[rows.len()]);
    let mut shape = x.shape().to_vec();
    shape[0] = owner.len();
    gather_rows(&flat, &rows).reshape(&shape)
}
