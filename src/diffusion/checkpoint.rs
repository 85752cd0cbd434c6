//! Which files make a Stable Diffusion checkpoint, and loading it from them.

use std::path::{Path, PathBuf};

use super::clip_text::{self, ClipText, ClipTextConfig};
use super::clip_tokenizer::ClipTokenizer;
use super::config::ConfigFile;
use super::ddim::{NoiseSchedule, SchedulerConfig};
use super::pipeline::StableDiffusion;
use super::unet::{Unet, UnetConfig};
use super::vae::{self, Vae, VaeConfig};
use crate::gpu::Gpu;
use crate::nn::{LoadOptions, Loader};
use crate::tensor::{Checkpoint, DType};
use crate::{Error, Result};

/// How to load a teacher.
#[derive(Clone, Copy, Debug)]
pub struct TeacherOptions {
    /// Dtype of the activations, f32 or f16; latents and maps stay f32.
    pub activations: DType,
}

impl Default for TeacherOptions {
    fn default() -> Self {
        TeacherOptions {
            activations: DType::F32,
        }
    }
}

impl StableDiffusion {
    /// Loads a directory in the layout of `diffusers`, frozen.
    ///
    /// # Errors
    /// A pickled or single-file checkpoint (with the command that converts it), another pipeline than Stable
    /// Diffusion v1, any file, field or tensor that is missing or does not fit.
    pub fn load(gpu: &Gpu, dir: impl AsRef<Path>, options: &TeacherOptions) -> Result<Self> {
        let dir = dir.as_ref();
        check_layout(dir)?;
        let text_config = ClipTextConfig::read(dir.join("text_encoder/config.json"))?;
        let vae_config = VaeConfig::read(dir.join("vae/config.json"))?;
        let unet_path = dir.join("unet/config.json");
        let unet_config = UnetConfig::read(&unet_path)?;
        for (field, found, expected, of) in [
            (
                "cross_attention_dim",
                unet_config.cross_attention_dim,
                text_config.hidden_size,
                "the text encoder's `hidden_size`",
            ),
            (
                "in_channels",
                unet_config.in_channels,
                vae_config.latent_channels,
                "the VAE's `latent_channels`",
            ),
            (
                "out_channels",
                unet_config.out_channels,
                vae_config.latent_channels,
                "the VAE's `latent_channels`",
            ),
        ] {
            if found != expected {
                return Err(Error::file(
                    &unet_path,
                    format!("field `{field}`: found {found}, expected {expected}, {of}"),
                ));
            }
        }
        let scheduler = SchedulerConfig::read(dir.join("scheduler/scheduler_config.json"))?;
        let loader = |part: &str, stem: &str, rename: fn(&str) -> String| -> Result<Loader> {
            let folder = dir.join(part);
            refuse_pickles(dir, &folder)?;
            let checkpoint = Checkpoint::open(&folder, stem)?.rename(rename);
            let options = LoadOptions {
                activations: options.activations,
                ..LoadOptions::default()
            };
            Ok(Loader::new(gpu, checkpoint, options))
        };
        let weights = "diffusion_pytorch_model";
        Ok(StableDiffusion {
            path: dir.to_path_buf(),
            tokenizer: ClipTokenizer::load(
                &dir.join("tokenizer"),
                text_config.max_position_embeddings,
                text_config.vocab_size,
            )?,
            text_encoder: ClipText::load(
                &text_config,
                &loader("text_encoder", "model", clip_text::canonical_name)?,
            )?,
            vae: Vae::load(&vae_config, &loader("vae", weights, vae::canonical_name)?)?,
            unet: Unet::load(&unet_config, &loader("unet", weights, str::to_string)?)?,
            schedule: NoiseSchedule::new(&scheduler),
            gpu: gpu.clone(),
            activations: options.activations,
        })
    }

    /// The files that decide its maps, in a fixed order: weights, configurations and tokenizer.
    ///
    /// # Errors
    /// A directory that cannot be listed.
    pub fn files(&self) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for part in ["scheduler", "text_encoder", "tokenizer", "unet", "vae"] {
            let folder = self.path.join(part);
            let entries = std::fs::read_dir(&folder).map_err(|e| Error::io(&folder, e))?;
            files.extend(entries.flatten().map(|entry| entry.path()).filter(|path| {
                path.extension()
                    .is_some_and(|e| e == "json" || e == "txt" || e == "safetensors")
            }));
        }
        files.sort();
        Ok(files)
    }
}

/// Whether `path` looks like a diffusion model rather than a language model: it has a `model_index.json`.
pub fn is_diffusion(path: &Path) -> bool {
    path.join("model_index.json").is_file()
}

/// Refuses what is not a Stable Diffusion v1 directory, saying what it is.
fn check_layout(dir: &Path) -> Result<()> {
    if dir.is_file() {
        return Err(Error::file(
            dir,
            format!(
                "a single-file checkpoint, expected a directory as diffusers writes it; convert it: \
                 python -c \"from diffusers import StableDiffusionPipeline as P; \
                 P.from_single_file('{}').save_pretrained('{}')\"",
                dir.display(),
                dir.with_extension("").display(),
            ),
        ));
    }
    let index = dir.join("model_index.json");
    if !index.is_file() {
        return Err(Error::file(
            dir,
            "no model_index.json, expected a directory as diffusers writes it \
             (model_index.json, unet/, vae/, text_encoder/, tokenizer/, scheduler/)",
        ));
    }
    let file = ConfigFile::read(&index)?;
    for (part, class) in [
        ("unet", "UNet2DConditionModel"),
        ("vae", "AutoencoderKL"),
        ("text_encoder", "CLIPTextModel"),
    ] {
        let found: Vec<Option<String>> = file.required(part)?;
        if found.last() != Some(&Some(class.to_string())) {
            return Err(file.error(
                part,
                format!("found {found:?}, expected {class}: only Stable Diffusion v1 is supported"),
            ));
        }
    }
    for part in ["text_encoder_2", "transformer"] {
        file.absent(part)?;
    }
    Ok(())
}

/// Refuses a component whose weights are pickled.
fn refuse_pickles(dir: &Path, folder: &Path) -> Result<()> {
    let files = std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))?;
    let names: Vec<PathBuf> = files.flatten().map(|entry| entry.path()).collect();
    let is = |path: &&PathBuf, extensions: &[&str]| {
        path.extension()
            .is_some_and(|e| extensions.iter().any(|x| e.eq_ignore_ascii_case(x)))
    };
    if names.iter().any(|n| is(&n, &["safetensors"])) {
        return Ok(());
    }
    match names.iter().find(|n| is(n, &["bin", "ckpt", "pt", "pth"])) {
        Some(pickled) => Err(Error::file(
            pickled,
            format!(
                "a pickled checkpoint can run code when opened and is not read; convert it: \
                 python -c \"from diffusers import StableDiffusionPipeline as P; \
                 P.from_pretrained('{0}').save_pretrained('{0}-safetensors', safe_serialization=True)\"",
                dir.display()
            ),
        )),
        None => Ok(()),
    }
}
