//! The mini teacher: a VAE on pixels, then U-Net and text encoder together on noise prediction.
//!
//! Three things differ from training a large model, so that words come to matter within a thousand steps: a grounding
//! loss asks each caption word's cross-attention to fall on its object in the training scenes; the latents are scaled down, which moves the noise level at which an object can be made out but its colour and
//! shape cannot into the middle of the schedule; and the U-Net starts as the identity (it predicts its input as
//! the noise, nearly right at such levels), so that training starts at what is left to say.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::schedule::{Schedule, Trainer};
use super::{Figure, Losses, Scenes, Watch, copy_layout};
use crate::autograd::{Var, no_grad};
use crate::data::scenes::{Dice, Mask, SIDE, Scene, Split};
use crate::diffusion::clip_text::{ClipText, ClipTextConfig};
use crate::diffusion::clip_tokenizer::ClipTokenizer;
use crate::diffusion::ddim::{NoiseSchedule, SchedulerConfig};
use crate::diffusion::unet::{Unet, UnetConfig};
use crate::diffusion::vae::{Vae, VaeConfig};
use crate::diffusion::{
    Capture, MapLayers, StableDiffusion, TeacherOptions, TextChunk, Trajectory,
};
use crate::gpu::Gpu;
use crate::nn::{LoadOptions, Loader, Parameter};
use crate::ops::unary::Unary;
use crate::tensor::{DType, Tensor};
use crate::vlm::processor::resize::{Filter, resize};
use crate::{Error, Result, files};

/// A recipe of `kind = "teacher"`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TeacherRecipe {
    /// Directory with the configuration files, in diffusers layout.
    pub layout: PathBuf,
    /// Seed of initial weights, order and noise.
    pub seed: u64,
    /// The data.
    pub scenes: Scenes,
    /// The VAE's training.
    pub vae: VaePart,
    /// The U-Net's and text encoder's training.
    pub unet: UnetPart,
    /// How the result is measured.
    pub measure: Measure,
}

/// `[vae]`
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VaePart {
    /// Length and learning rate.
    pub schedule: Schedule,
    /// Weight of the Kullback-Leibler divergence from a standard normal, beside the mean squared error.
    pub kl_weight: f64,
}

/// `[unet]`
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnetPart {
    /// Length and learning rate.
    pub schedule: Schedule,
    /// Standard deviation of the scaled latents; `scaling_factor` in `vae/config.json` is set to give it.
    pub latent_std: f64,
    /// Timesteps are drawn uniformly below this.
    pub timesteps: usize,
    /// A sample's squared error is weighted by ((1 − ᾱ) / ᾱ) to this power: 0 is the plain loss, 1 weighs the
    /// error of the clean latents.
    pub weight_power: f64,
    /// Standard deviation of the initial token embeddings.
    pub token_std: f64,
    /// Factor on the initial query and key weights of the cross-attention.
    pub query_key_gain: f64,
    /// Weight of the grounding loss: (1 − the share of a caption word's attention that falls on its object)²,
    /// mean over words and over the layers that make maps (TokenCompose, Wang et al. 2023). 0: none.
    pub grounding: f64,
}

/// `[measure]`
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measure {
    /// `"ddim"`, `"noised"` or `"null-text"`.
    pub mode: String,
    /// Steps of the trajectory.
    pub steps: usize,
    /// `"16+32"` (the default), `"16"` or `"daam"`.
    #[serde(default = "default_layers")]
    pub layers: String,
}

fn default_layers() -> String {
    MapLayers::default().name().into()
}

/// The names of a model's three trained files.
const FILES: [(&str, &str); 3] = [
    ("vae", "diffusion_pytorch_model.safetensors"),
    ("unet", "diffusion_pytorch_model.safetensors"),
    ("text_encoder", "model.safetensors"),
];

impl TeacherRecipe {
    pub(super) fn run(&self, gpu: &Gpu, out: &Path, watch: &mut dyn Watch) -> Result<Vec<Figure>> {
        let file = |part: &str| self.layout.join(part).join("config.json");
        let vae_config = VaeConfig::read(file("vae"))?;
        let unet_config = UnetConfig::read(file("unet"))?;
        let text_config = ClipTextConfig::read(file("text_encoder"))?;
        let scheduler = SchedulerConfig::read(self.layout.join("scheduler/scheduler_config.json"))?;
        let tokenizer = ClipTokenizer::load(
            &self.layout.join("tokenizer"),
            text_config.max_position_embeddings,
            text_config.vocab_size,
        )?;
        let scenes: Vec<Scene> = self.scenes.training().iter().collect();
        let side = unet_config.sample_size * vae_config.factor();
        let pictures: Vec<Vec<f32>> = scenes.iter().map(|scene| pixels(scene, side)).collect();

        let loader = |seed| {
            let options = LoadOptions {
                trainable: true,
                seed,
                ..LoadOptions::default()
            };
            Loader::random(gpu, options)
        };
        let vae_loader = loader(self.seed);
        let vae = Vae::load(&vae_config, &vae_loader)?;
        self.train_vae(gpu, &vae, &vae_loader, &pictures, side, watch)?;
        let latents = self.latents(gpu, &vae, &pictures, side)?;

        let (unet_loader, text_loader) = (loader(self.seed + 1), loader(self.seed + 2));
        let unet = Unet::load(&unet_config, &unet_loader)?;
        let text = ClipText::load(&text_config, &text_loader)?;
        self.prepare_weights(&unet_config, &unet_loader, &text_loader)?;
        let mut parameters = unet_loader.parameters().all();
        parameters.extend(text_loader.parameters().all());
        let task = Denoising {
            recipe: self,
            gpu,
            unet: &unet,
            text: &text,
            tokenizer: &tokenizer,
            noise: NoiseSchedule::new(&scheduler),
            scenes: &scenes,
            latents: &latents,
            shape: [unet_config.sample_size, unet_config.in_channels],
        };
        task.train(parameters, watch)?;

        copy_layout(&self.layout, out)?;
        let loaders = [vae_loader, unet_loader, text_loader];
        for ((part, name), loader) in FILES.iter().zip(loaders) {
            loader
                .parameters()
                .save(&out.join(part).join(name), DType::F16)?;
        }
        set_scaling_factor(&out.join("vae/config.json"), latents.scaling)?;
        self.measure(gpu, out)
    }

    fn train_vae(
        &self,
        gpu: &Gpu,
        vae: &Vae,
        loader: &Loader,
        pictures: &[Vec<f32>],
        side: usize,
        watch: &mut dyn Watch,
    ) -> Result<()> {
        let schedule = &self.vae.schedule;
        let mut trainer = Trainer::new(schedule, loader.parameters().all());
        let mut losses = Losses::new("VAE", schedule.steps, watch);
        let mut dice = Dice::new(self.seed, Split::Train, 1 << 32);
        for step in 0..schedule.steps {
            let batch: Vec<f32> = (0..schedule.batch)
                .flat_map(|_| pictures[dice.below(pictures.len())].iter().copied())
                .collect();
            let images = Tensor::from_f32(gpu, &batch, &[schedule.batch, side, side, 3]);
            let images = Var::constant(images);
            let moments = vae.encode(&images);
            let (mean, logvar) = (&moments.mean, &moments.logvar);
            let noise: Vec<f32> = (0..mean.value().elements())
                .map(|_| dice.normal())
                .collect();
            let noise = Var::constant(Tensor::from_f32(gpu, &noise, mean.shape()));
            let deviation = logvar.scale(0.5).unary(Unary::Exp);
            let decoded = vae.decode(&mean.add(&deviation.mul(&noise)));
            let error = decoded.sub(&images).square().mean_all();
            let divergence = mean
                .square()
                .add(&logvar.unary(Unary::Exp))
                .sub(logvar)
                .add_scalar(-1.0)
                .mean_all();
            let loss = error.add(&divergence.scale(0.5 * self.vae.kl_weight as f32));
            trainer.step(&loss.backward());
            losses.push(gpu, step as u64, error.value().read_later())?;
        }
        losses.finish()
    }

    /// The scaled latents of every picture.
    fn latents(&self, gpu: &Gpu, vae: &Vae, pictures: &[Vec<f32>], side: usize) -> Result<Latents> {
        let mut values = Vec::new();
        for chunk in pictures.chunks(32) {
            let batch: Vec<f32> = chunk.concat();
            let images = Tensor::from_f32(gpu, &batch, &[chunk.len(), side, side, 3]);
            let mean = no_grad(|| vae.encode(&Var::constant(images)).mean);
            values.extend(mean.value().to_f32()?);
        }
        let count = values.len() as f64;
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / count;
        let spread = values.iter().map(|&v| (f64::from(v) - mean).powi(2));
        let deviation = (spread.sum::<f64>() / count).sqrt();
        // Five digits, so that the figure in the file is the one trained with.
        let scaling = (self.unet.latent_std / deviation * 1e5).round() / 1e5;
        for value in &mut values {
            *value *= scaling as f32;
        }
        Ok(Latents {
            each: values.len() / pictures.len(),
            values,
            scaling,
        })
    }

    /// Changes initial weights as the recipe asks.
    fn prepare_weights(&self, config: &UnetConfig, unet: &Loader, text: &Loader) -> Result<()> {
        let mut dice = Dice::new(self.seed, Split::Train, 3 << 32);
        for parameter in text.parameters().all() {
            if parameter.name.ends_with("token_embedding.weight") {
                let std = self.unet.token_std as f32;
                let count = parameter.var.value().elements();
                let values: Vec<f32> = (0..count).map(|_| std * dice.normal()).collect();
                parameter.var.value().write_f32(&values);
            }
        }
        let gain = self.unet.query_key_gain as f32;
        for parameter in unet.parameters().all() {
            let is = |name: &str| parameter.name.ends_with(name);
            if is("attn2.to_q.weight") || is("attn2.to_k.weight") {
                let values = parameter.var.value().to_f32()?;
                let values: Vec<f32> = values.iter().map(|v| v * gain).collect();
                parameter.var.value().write_f32(&values);
            }
        }
        start_as_identity(config, &unet.parameters().all())
    }

    /// Opens the written model and plays the pointing game on held-out scenes.
    pub(super) fn measure(&self, gpu: &Gpu, dir: &Path) -> Result<Vec<Figure>> {
        let options = TeacherOptions {
            activations: DType::F32,
        };
        let model = StableDiffusion::load(gpu, dir, &options)?;
        let trajectory = Trajectory::parse(&self.measure.mode, Some(self.measure.steps))?;
        let layers = MapLayers::parse(&self.measure.layers)?;
        let scenes: Vec<Scene> = self.scenes.held_out().iter().collect();
        pointing(&model, trajectory, layers, &scenes)
    }
}

/// The pointing game: the share of caption words whose map is greatest inside the word's object, in all and by how
/// the object was named, with the chance level beside it.
pub fn pointing(
    model: &StableDiffusion,
    trajectory: Trajectory,
    layers: MapLayers,
    scenes: &[Scene],
) -> Result<Vec<Figure>> {
    // Hits and words: all, shape words, colour words, shape alone, colour alone.
    let mut counts = [(0usize, 0usize); 5];
    let mut area = 0.0;
    for (number, chunk) in scenes.chunks(16).enumerate() {
        let images: Vec<Tensor> = chunk
            .iter()
            .map(|scene| model.encode_images(&model.prepare_image(&scene.image)))
            .collect();
        let latents = crate::ops::concat::concat(&images.iter().collect::<Vec<_>>(), 0);
        let texts: Vec<Vec<TextChunk>> = chunk
            .iter()
            .map(|scene| model.tokenizer.chunks(&scene.caption))
            .collect::<Result<_>>()?;
        let seeds: Vec<u64> = (0..chunk.len()).map(|i| (number * 16 + i) as u64).collect();
        let recorded =
            model.token_maps(&latents, &texts, trajectory, layers, &seeds, |_| Ok(()))?;
        for (scene, tokens) in chunk.iter().zip(&recorded.tokens) {
            let words = scene.word_masks();
            for (word, mask) in &words {
                area += f64::from(mask.area());
                let map = word_map(&scene.caption, word, tokens)?;
                let hit = usize::from(mask.is_hit_by(&map));
                let is_shape = crate::data::scenes::Shape::ALL
                    .iter()
                    .any(|shape| shape.word() == word);
                let alone = words.iter().filter(|(_, other)| other == mask).count() == 1;
                let kinds = [
                    true,
                    is_shape,
                    !is_shape,
                    is_shape && alone,
                    !is_shape && alone,
                ];
                for (count, _) in counts.iter_mut().zip(kinds).filter(|(_, is)| *is) {
                    count.0 += hit;
                    count.1 += 1;
                }
            }
        }
    }
    let share = |(hits, words): (usize, usize)| hits as f64 / words.max(1) as f64;
    let names = [
        "pointing game",
        "pointing game, shape words",
        "pointing game, colour words",
        "pointing game, objects named by shape alone",
        "pointing game, objects named by colour alone",
    ];
    let mut figures: Vec<Figure> = names
        .iter()
        .zip(counts)
        .map(|(name, count)| Figure::new(*name, share(count)))
        .collect();
    figures.push(Figure::new(
        "chance (mean mask area)",
        area / counts[0].1.max(1) as f64,
    ));
    figures.push(Figure::new("words", counts[0].1 as f64));
    Ok(figures)
}

/// The mean map of the tokens of `word`, which a caption holds once.
fn word_map(caption: &str, word: &str, tokens: &crate::diffusion::TokenMaps) -> Result<Vec<f32>> {
    let inside = word_tokens(caption, word, &tokens.offsets)?;
    let weight = 1.0 / inside.len().max(1) as f32;
    let weights: Vec<(usize, f32)> = inside.into_iter().map(|i| (i, weight)).collect();
    Ok(tokens.weighted(&weights))
}

/// Indices of the tokens of `word`, by their spans in the caption.
fn word_tokens(caption: &str, word: &str, offsets: &[(usize, usize)]) -> Result<Vec<usize>> {
    // Captions are ASCII: bytes are characters.
    let start = caption
        .match_indices(word)
        .map(|(at, _)| at)
        .find(|&at| {
            let edge = |c: Option<char>| c.is_none_or(|c| !c.is_alphanumeric());
            edge(caption[..at].chars().next_back())
                && edge(caption[at + word.len()..].chars().next())
        })
        .ok_or_else(|| Error::Input(format!("no word `{word}` in {caption:?}")))?;
    Ok((0..offsets.len())
        .filter(|&i| {
            let (from, to) = offsets[i];
            from >= start && to <= start + word.len() && from < to
        })
        .collect())
}

/// Latents of all training scenes on the host.
struct Latents {
    /// `[scenes, height, width, channels]`, scaled.
    values: Vec<f32>,
    /// Values of one scene.
    each: usize,
    scaling: f64,
}

/// What the second part trains and on what.
struct Denoising<'a> {
    recipe: &'a TeacherRecipe,
    gpu: &'a Gpu,
    unet: &'a Unet,
    text: &'a ClipText,
    tokenizer: &'a ClipTokenizer,
    noise: NoiseSchedule,
    scenes: &'a [Scene],
    latents: &'a Latents,
    /// Side and channels of the latents.
    shape: [usize; 2],
}

impl Denoising<'_> {
    fn train(&self, parameters: Vec<Parameter>, watch: &mut dyn Watch) -> Result<()> {
        let part = &self.recipe.unet;
        let (batch, steps) = (part.schedule.batch, part.schedule.steps);
        let mut trainer = Trainer::new(&part.schedule, parameters);
        let mut losses = Losses::new("noise prediction", steps, watch);
        let mut dice = Dice::new(self.recipe.seed, Split::Train, 2 << 32);
        let [side, channels] = self.shape;
        let shape = [batch, side, side, channels];
        for step in 0..steps {
            let mut ids = Vec::new();
            let mut regions = Vec::new();
            let mut timesteps = Vec::new();
            let (mut noised, mut noise, mut roots) = (Vec::new(), Vec::new(), Vec::new());
            for place in 0..batch {
                let number = dice.below(self.scenes.len());
                // A picture is described anew each time.
                let variant = (step * batch + place) as u64;
                let (caption, words) = self.scenes[number].recaptioned(self.recipe.seed, variant);
                regions.push(self.regions(&caption, &words)?);
                ids.extend(self.tokenizer.chunk_of(&caption)?.ids);
                let timestep = dice.below(part.timesteps);
                let bar = self.noise.alpha_bar(timestep as isize);
                timesteps.push(timestep);
                roots.push(((1.0 - bar) / bar).powf(0.5 * part.weight_power) as f32);
                let clean = &self.latents.values[number * self.latents.each..][..self.latents.each];
                for &value in clean {
                    let draw = dice.normal();
                    noise.push(draw);
                    noised.push(bar.sqrt() as f32 * value + (1.0 - bar).sqrt() as f32 * draw);
                }
            }
            let ids = Tensor::from_u32(self.gpu, &ids, &[batch, ids.len() / batch]);
            let x = Var::constant(Tensor::from_f32(self.gpu, &noised, &shape));
            let noise = Var::constant(Tensor::from_f32(self.gpu, &noise, &shape));
            let roots = Var::constant(Tensor::from_f32(self.gpu, &roots, &[batch, 1, 1, 1]));
            let text = self.text.forward(&ids);
            let mut capture = Capture::on_tape(MapLayers::default(), side);
            let hook = (part.grounding > 0.0).then_some(&mut capture);
            let predicted = self.unet.forward(&x, &timesteps, &text, hook);
            let loss = predicted.sub(&noise).mul(&roots).square().mean_all();
            let total = match self.grounding(capture, &regions) {
                Some(grounding) => loss.add(&grounding.scale(part.grounding as f32)),
                None => loss.clone(),
            };
            trainer.step(&total.backward());
            losses.push(self.gpu, step as u64, loss.value().read_later())?;
        }
        losses.finish()
    }

    /// A caption's words: their tokens' weights and their objects' masks.
    fn regions(&self, caption: &str, words: &[(String, Mask)]) -> Result<Vec<Region>> {
        let chunk = self.tokenizer.chunks(caption)?.swap_remove(0);
        words
            .iter()
            .map(|(word, mask)| {
                Ok(Region {
                    // Offsets start after BOS.
                    tokens: word_tokens(caption, word, &chunk.offsets)?
                        .iter()
                        .map(|t| t + 1)
                        .collect(),
                    mask: mask.clone(),
                })
            })
            .collect()
    }

    /// (1 − Σ_mask A / Σ A)², mean over the batch's words and the captured layers.
    fn grounding(&self, capture: Capture, regions: &[Vec<Region>]) -> Option<Var> {
        let words: usize = regions.iter().map(Vec::len).sum();
        let layers = capture.kept();
        let constant = |values: &[f32], shape: &[usize]| {
            Var::constant(Tensor::from_f32(self.gpu, values, shape))
        };
        let mut sum: Option<Var> = None;
        for probs in &layers {
            let [batch, pixels, tokens] = *probs.shape() else {
                unreachable!("captured maps are [batch, pixels, tokens]")
            };
            // Every word picks its sample's tokens: attention [words, pixels] = pick [words, batch·tokens] · probs.
            let mut pick = vec![0.0; words * batch * tokens];
            let mut masks = Vec::with_capacity(words * pixels);
            let all = regions
                .iter()
                .enumerate()
                .flat_map(|(b, r)| r.iter().map(move |r| (b, r)));
            for (word, (b, region)) in all.enumerate() {
                for &token in &region.tokens {
                    pick[(word * batch + b) * tokens + token] = 1.0;
                }
                masks.extend(region.mask.averaged(pixels.isqrt()));
            }
            let by_token = probs.permute(&[0, 2, 1]).reshape(&[batch * tokens, pixels]);
            let attention = constant(&pick, &[words, batch * tokens]).matmul(&by_token);
            let inside = attention
                .mul(&constant(&masks, &[words, pixels]))
                .sum(&[1], false);
            let share = inside.div(&attention.sum(&[1], false).add_scalar(1e-8));
            let loss = share.scale(-1.0).add_scalar(1.0).square().mean_all();
            sum = Some(match sum {
                Some(sum) => sum.add(&loss),
                None => loss,
            });
        }
        sum.map(|sum| sum.scale(1.0 / layers.len() as f32))
    }
}

/// A caption word on the teacher's side.
struct Region {
    /// Indices of its tokens.
    tokens: Vec<usize>,
    mask: Mask,
}

/// A scene as the VAE takes it: resized, in −1…1, channels last.
fn pixels(scene: &Scene, side: usize) -> Vec<f32> {
    let image = match side == SIDE {
        true => scene.image.clone(),
        false => resize(&scene.image, side as u32, side as u32, Filter::Lanczos),
    };
    image.iter().map(|&v| f32::from(v) / 127.5 - 1.0).collect()
}

/// Sets initial weights so that the U-Net predicts its (group-normalised) input as the noise.
///
/// The first convolution copies the latents x to its first channels and −x to the next; the skip connection carries
/// them to the last ResNet, whose shortcut passes them on and whose second convolution starts at zero; the last
/// convolution takes silu(x) − silu(−x) = x.
fn start_as_identity(config: &UnetConfig, parameters: &[Parameter]) -> Result<()> {
    let (latent, first) = (config.in_channels, config.block_out_channels[0]);
    if first < 2 * latent {
        return Err(Error::Config(format!(
            "unet `block_out_channels` starts with {first}, expected at least {}: twice the latent channels",
            2 * latent
        )));
    }
    let up = format!(
        "up_blocks.{}.resnets.{}",
        config.block_out_channels.len() - 1,
        config.layers_per_block[0]
    );
    let change = |name: String, f: &dyn Fn(&mut [f32], &[usize])| -> Result<()> {
        let parameter = parameters
            .iter()
            .find(|parameter| parameter.name == name)
            .ok_or_else(|| Error::Config(format!("the U-Net has no tensor `{name}`")))?;
        let value = parameter.var.value();
        let mut values = value.to_f32()?;
        f(&mut values, value.shape());
        value.write_f32(&values);
        Ok(())
    };
    let zero = |values: &mut [f32], _: &[usize]| values.fill(0.0);
    // Convolution weights lie [kernel, kernel, in, out].
    change("conv_in.weight".into(), &|values, shape| {
        let outputs = shape[3];
        for (i, value) in values.iter_mut().enumerate() {
            let (output, input, tap) = (i % outputs, i / outputs % latent, i / outputs / latent);
            if output < 2 * latent {
                let sign = if output < latent { 1.0 } else { -1.0 };
                let is_copy = tap == 4 && output % latent == input;
                *value = if is_copy { sign } else { 0.0 };
            }
        }
    })?;
    change("conv_in.bias".into(), &zero)?;
    change(format!("{up}.conv2.weight"), &zero)?;
    change(format!("{up}.conv2.bias"), &zero)?;
    change(format!("{up}.conv_shortcut.weight"), &|values, shape| {
        let (inputs, outputs) = (shape[2], shape[3]);
        for (i, value) in values.iter_mut().enumerate() {
            let (output, input) = (i % outputs, i / outputs);
            if output < 2 * latent {
                *value = f32::from(u8::from(input == inputs - first + output));
            }
        }
    })?;
    change(format!("{up}.conv_shortcut.bias"), &zero)?;
    change("conv_out.weight".into(), &|values, shape| {
        let outputs = shape[3];
        for (i, value) in values.iter_mut().enumerate() {
            let (output, input, tap) = (i % outputs, i / outputs % first, i / outputs / first);
            *value = match tap == 4 {
                true if input == output => 1.0,
                true if input == output + latent => -1.0,
                _ => 0.0,
            };
        }
    })?;
    change("conv_out.bias".into(), &zero)
}

/// Writes `scaling_factor` into a VAE's configuration file.
fn set_scaling_factor(path: &Path, value: f64) -> Result<()> {
    let text = files::read_text(path)?;
    let mut json: serde_json::Value =
        serde_json::from_str(&text).map_err(|e| Error::file(path, e.to_string()))?;
    json["scaling_factor"] = value.into();
    let text = serde_json::to_string_pretty(&json).map_err(|e| Error::file(path, e.to_string()))?;
    files::write_bytes(path, format!("{text}\n").as_bytes())
}
