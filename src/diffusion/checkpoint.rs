//! Which files make a Stable Diffusion checkpoint, and loading it from them: a directory as `diffusers` writes it, or
//! one file as the model was first published.

use std::path::{Path, PathBuf};

use super::clip_text::{self, ClipText, ClipTextConfig};
use super::clip_tokenizer::ClipTokenizer;
use super::config::ConfigFile;
use super::ddim::{NoiseSchedule, SchedulerConfig};
use super::pipeline::StableDiffusion;
use super::single_file::{self, Components, Configs};
use super::unet::{Unet, UnetConfig};
use super::vae::{self, Vae, VaeConfig};
use crate::gpu::Gpu;
use crate::nn::{LoadOptions, Loader};
use crate::tensor::{Checkpoint, DType};
use crate::{Error, Result};

/// What is supported, for messages.
const SUPPORTED: &str = "only Stable Diffusion v1 and its fine-tunes (and v2 without v-prediction, in diffusers layout) \
                         are supported";

/// How to load a teacher.
#[derive(Clone, Copy, Debug)]
pub struct TeacherOptions {
    /// Dtype of the activations, f32 or f16; latents and maps stay f32.
    ///
    /// With f16 every matrix and convolution is held in 16 bits, and of a directory with both variants the `fp16` files
    /// are read.
    pub activations: DType,
}

impl Default for TeacherOptions {
    fn default() -> Self {
        TeacherOptions {
            activations: DType::F32,
        }
    }
}

/// A checkpoint whose files are opened and checked, with nothing on the GPU yet.
pub struct TeacherFiles {
    /// The directory or file it was opened from.
    pub path: PathBuf,
    /// Shapes of its components.
    pub configs: Configs,
    scheduler: SchedulerConfig,
    tokenizer: ClipTokenizer,
    components: Components,
    /// Every file that was read.
    files: Vec<PathBuf>,
}

impl TeacherFiles {
    /// Opens a directory in the layout of `diffusers`, or a `.safetensors` file in the original one.
    ///
    /// A single file takes its configurations and its tokenizer from a `diffusers` directory around it; without one
    /// they are inferred from the shapes, with Stable Diffusion v1's constants, and the tokenizer is CLIP's own.
    ///
    /// # Errors
    /// A pickled checkpoint (with the command that converts it), another model than Stable Diffusion v1 (saying which),
    /// any file or field that is missing or does not fit.
    pub fn open(path: impl AsRef<Path>, options: &TeacherOptions) -> Result<Self> {
        let path = path.as_ref();
        match path.is_file() {
            true => Self::single(path),
            false => Self::directory(path, options.activations == DType::F16),
        }
    }

    fn directory(dir: &Path, half: bool) -> Result<Self> {
        check_directory(dir)?;
        let (configs, scheduler) = read_configs(dir)?;
        let open = |part: &str, stem: &str| -> Result<Checkpoint> {
            let folder = dir.join(part);
            refuse_pickles(dir, &folder)?;
            Checkpoint::open_variant(&folder, stem, half)
        };
        let weights = "diffusion_pytorch_model";
        let components = Components {
            text: open("text_encoder", "model")?.rename(clip_text::canonical_name),
            vae: open("vae", weights)?.rename(vae::canonical_name),
            unet: open("unet", weights)?,
        };
        let mut files = side_files(dir)?;
        for part in [&components.text, &components.vae, &components.unet] {
            files.extend(part.files().map(Path::to_path_buf));
        }
        files.sort();
        Ok(TeacherFiles {
            path: dir.to_path_buf(),
            tokenizer: ClipTokenizer::load(
                &dir.join("tokenizer"),
                configs.text.max_position_embeddings,
                configs.text.vocab_size,
            )?,
            configs,
            scheduler,
            components,
            files,
        })
    }

    fn single(path: &Path) -> Result<Self> {
        refuse_pickled_file(path)?;
        let file = Checkpoint::open(path, "")?;
        if let Some(what) = single_file::unsupported(&file) {
            return Err(Error::file(path, format!("found {what}; {SUPPORTED}")));
        }
        let around = match path.parent() {
            Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
            Some(parent) => parent,
            None => Path::new("."),
        };
        let mut files = vec![path.to_path_buf()];
        let (configs, scheduler) = if around.join("model_index.json").is_file() {
            check_directory(around)?;
            files.extend(side_files(around)?);
            read_configs(around)?
        } else {
            let shapes = |name: &str| file.shape(name).map(<[usize]>::to_vec);
            let configs = single_file::infer(&shapes)
                .map_err(|name| Error::tensor(path, name, "missing or of another rank"))?;
            check_fit(path, &configs)?;
            single_file::check_constants(&configs).map_err(|what| {
                let advice = "put the file into the directory of its configurations (model_index.json, unet/, …)";
                Error::file(path, format!("{what}; {advice}"))
            })?;
            (configs, SchedulerConfig::default())
        };
        let (context, vocabulary) = (
            configs.text.max_position_embeddings,
            configs.text.vocab_size,
        );
        let tokenizer = around.join("tokenizer");
        let tokenizer = match tokenizer.is_dir() {
            true => ClipTokenizer::load(&tokenizer, context, vocabulary)?,
            false => ClipTokenizer::embedded(context, vocabulary)?,
        };
        Ok(TeacherFiles {
            path: path.to_path_buf(),
            components: single_file::split(&file, &configs),
            configs,
            scheduler,
            tokenizer,
            files,
        })
    }

    /// Text encoder, VAE and U-Net.
    pub(super) fn parts(&self) -> [&Checkpoint; 3] {
        let parts = &self.components;
        [&parts.text, &parts.vae, &parts.unet]
    }

    /// Every file that was opened: weights, configurations and tokenizer.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Puts the weights on the GPU, frozen.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape.
    pub fn load(self, gpu: &Gpu, options: &TeacherOptions) -> Result<StableDiffusion> {
        let loader = |part: &Checkpoint| {
            let options = LoadOptions {
                activations: options.activations,
                ..LoadOptions::default()
            };
            Loader::new(gpu, part.clone(), options)
        };
        let (configs, parts) = (&self.configs, &self.components);
        Ok(StableDiffusion {
            text_encoder: ClipText::load(&configs.text, &loader(&parts.text))?,
            vae: Vae::load(&configs.vae, &loader(&parts.vae))?,
            unet: Unet::load(&configs.unet, &loader(&parts.unet))?,
            schedule: NoiseSchedule::new(&self.scheduler),
            batch: configs.unet.batch(),
            path: self.path,
            tokenizer: self.tokenizer,
            files: self.files,
            gpu: gpu.clone(),
            activations: options.activations,
        })
    }
}

impl StableDiffusion {
    /// Loads a directory in the layout of `diffusers` or a single file, frozen: [`TeacherFiles::open`] and
    /// [`TeacherFiles::load`], whose errors it has.
    pub fn load(gpu: &Gpu, path: impl AsRef<Path>, options: &TeacherOptions) -> Result<Self> {
        TeacherFiles::open(path, options)?.load(gpu, options)
    }

    /// The files that decide its maps, in a fixed order: weights, configurations and tokenizer.
    ///
    /// # Errors
    /// None today; a directory that cannot be listed, once.
    pub fn files(&self) -> Result<Vec<PathBuf>> {
        Ok(self.files.clone())
    }
}

/// Configurations and tokenizer files of a directory in `diffusers` layout, sorted.
fn side_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for part in ["scheduler", "text_encoder", "tokenizer", "unet", "vae"] {
        let folder = dir.join(part);
        let entries = std::fs::read_dir(&folder).map_err(|e| Error::io(&folder, e))?;
        let kept = |path: &PathBuf| path.extension().is_some_and(|e| e == "json" || e == "txt");
        files.extend(entries.flatten().map(|entry| entry.path()).filter(kept));
    }
    files.sort();
    Ok(files)
}

/// The configurations under a directory in `diffusers` layout.
fn read_configs(dir: &Path) -> Result<(Configs, SchedulerConfig)> {
    let unet_path = dir.join("unet/config.json");
    let configs = Configs {
        text: ClipTextConfig::read(dir.join("text_encoder/config.json"))?,
        vae: VaeConfig::read(dir.join("vae/config.json"))?,
        unet: UnetConfig::read(&unet_path)?,
    };
    check_fit(&unet_path, &configs)?;
    let scheduler = dir.join("scheduler/scheduler_config.json");
    let file = ConfigFile::read(&scheduler)?;
    if file.optional::<String>("prediction_type")?.as_deref() == Some("v_prediction") {
        return Err(file.error(
            "prediction_type",
            format!("found \"v_prediction\" (Stable Diffusion 2 with v-prediction), expected \"epsilon\": {SUPPORTED}"),
        ));
    }
    Ok((configs, SchedulerConfig::read(scheduler)?))
}

/// Refuses components that do not fit each other, naming a field of the U-Net at `path`.
fn check_fit(path: &Path, configs: &Configs) -> Result<()> {
    let (unet, latent) = (&configs.unet, configs.vae.latent_channels);
    let of_vae = "the VAE's `latent_channels`";
    for (field, found, expected, of) in [
        (
            "cross_attention_dim",
            unet.cross_attention_dim,
            configs.text.hidden_size,
            "the text encoder's `hidden_size`",
        ),
        ("in_channels", unet.in_channels, latent, of_vae),
        ("out_channels", unet.out_channels, latent, of_vae),
    ] {
        if found != expected {
            let what = match single_file::extra_inputs(found) {
                Some(what) if field == "in_channels" => format!(": {what}; {SUPPORTED}"),
                _ => String::new(),
            };
            return Err(Error::file(
                path,
                format!("field `{field}`: found {found}, expected {expected}, {of}{what}"),
            ));
        }
    }
    Ok(())
}

/// Whether `path` looks like a diffusion model rather than a language model: a directory with a `model_index.json`, or
/// a file with a U-Net under its original names.
pub fn is_diffusion(path: &Path) -> bool {
    if path.is_file() {
        return Checkpoint::open(path, "").is_ok_and(|file| {
            file.names()
                .any(|name| name.starts_with("model.diffusion_model."))
        });
    }
    path.join("model_index.json").is_file()
}

/// Refuses what is not a directory of Stable Diffusion, saying what it is.
fn check_directory(dir: &Path) -> Result<()> {
    let index = dir.join("model_index.json");
    if !index.is_file() {
        return Err(Error::file(
            dir,
            format!(
                "{}no model_index.json, expected a directory as diffusers writes it \
                 (model_index.json, unet/, vae/, text_encoder/, tokenizer/, scheduler/) or a single .safetensors file",
                other_directory(dir)
                    .map(|what| format!("{what}: "))
                    .unwrap_or_default()
            ),
        ));
    }
    let file = ConfigFile::read(&index)?;
    let class: String = file.or("_class_name", String::new())?;
    if let Some(what) = other_pipeline(&class) {
        return Err(file.error(
            "_class_name",
            format!("found \"{class}\", {what}; {SUPPORTED}"),
        ));
    }
    for (part, class) in [
        ("unet", "UNet2DConditionModel"),
        ("vae", "AutoencoderKL"),
        ("text_encoder", "CLIPTextModel"),
    ] {
        let found: Vec<Option<String>> = file.required(part)?;
        if found.last() != Some(&Some(class.to_string())) {
            return Err(file.error(
                part,
                format!("found {found:?}, expected {class}: {SUPPORTED}"),
            ));
        }
    }
    for part in ["text_encoder_2", "transformer"] {
        file.absent(part)?;
    }
    Ok(())
}

/// Which other model a pipeline's class is of.
fn other_pipeline(class: &str) -> Option<&'static str> {
    [
        ("StableDiffusionXL", "Stable Diffusion XL"),
        ("StableDiffusion3", "Stable Diffusion 3"),
        ("Flux", "FLUX"),
        ("InstructPix2Pix", "an InstructPix2Pix model"),
        ("Inpaint", "an inpainting model"),
        ("Upscale", "an upscaler"),
        ("Depth2Img", "a depth-conditioned model"),
        ("ControlNet", "a ControlNet pipeline"),
        ("Kandinsky", "Kandinsky"),
        ("PixArt", "PixArt"),
    ]
    .into_iter()
    .find(|(part, _)| class.contains(part))
    .map(|(_, what)| what)
}

/// What a directory without a `model_index.json` is, where its `config.json` tells.
fn other_directory(dir: &Path) -> Option<String> {
    if dir.join("adapter_config.json").is_file() {
        return Some("LoRA factors alone, without the model that they belong to".into());
    }
    let file = ConfigFile::read(dir.join("config.json")).ok()?;
    let text = |field: &str| file.optional::<String>(field).ok().flatten();
    match text("_class_name") {
        Some(class) => Some(format!(
            "one component ({class}); give the directory above it"
        )),
        None => text("model_type").map(|kind| format!("a model of transformers (`{kind}`)")),
    }
}

/// Refuses a single file that is pickled.
fn refuse_pickled_file(path: &Path) -> Result<()> {
    if !is_pickled(path) {
        return Ok(());
    }
    Err(Error::file(
        path,
        format!(
            "a pickled checkpoint can run code when opened and is not read; convert it: \
             python -c \"from diffusers import StableDiffusionPipeline as P; \
             P.from_single_file('{}').save_pretrained('{}')\"",
            path.display(),
            path.with_extension("").display(),
        ),
    ))
}

fn is_pickled(path: &Path) -> bool {
    let pickles = ["bin", "ckpt", "pt", "pth"];
    path.extension()
        .is_some_and(|e| pickles.iter().any(|x| e.eq_ignore_ascii_case(x)))
}

/// Refuses a component whose weights are pickled.
fn refuse_pickles(dir: &Path, folder: &Path) -> Result<()> {
    let files = std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))?;
    let names: Vec<PathBuf> = files.flatten().map(|entry| entry.path()).collect();
    let safe = |path: &PathBuf| path.extension().is_some_and(|e| e == "safetensors");
    match names.iter().find(|path| is_pickled(path)) {
        Some(pickled) if !names.iter().any(safe) => Err(Error::file(
            pickled,
            format!(
                "a pickled checkpoint can run code when opened and is not read; convert it: \
                 python -c \"from diffusers import StableDiffusionPipeline as P; \
                 P.from_pretrained('{0}').save_pretrained('{0}-safetensors', safe_serialization=True)\"",
                dir.display()
            ),
        )),
        _ => Ok(()),
    }
}
