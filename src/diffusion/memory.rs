//! How much GPU memory a run will take, from shapes alone, before anything is loaded.

use std::fmt;
use std::path::Path;

use super::checkpoint::{TeacherFiles, TeacherOptions};
use super::pipeline::{StableDiffusion, Trajectory};
use super::unet::UnetConfig;
use crate::gpu::{Gpu, size_class};
use crate::tensor::{Checkpoint, DType};
use crate::{Error, Result};

/// Activations of the VAE that are alive at once where it is widest, measured at full size: a ResNet's input, its
/// normalised copies, the convolution's result, and a padded f32 copy that drivers on the CPU make.
const VAE_ALIVE: u64 = 7;
/// Smallest tile of the VAE, in latents: below it, tiles are mostly overlap.
const SMALLEST_TILE: usize = 16;

/// Bytes of a run's parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// The text encoder's weights.
    pub text: u64,
    /// The VAE's weights.
    pub vae: u64,
    /// The U-Net's weights.
    pub unet: u64,
    /// Activations of one sample in the U-Net: with its gradient for null-text inversion.
    pub sample: u64,
    /// Activations of one image in the VAE's encoder, whole.
    pub encode: u64,
}

impl Needs {
    /// What `files` need with these activations along this trajectory.
    pub fn new(files: &TeacherFiles, activations: DType, trajectory: Trajectory) -> Self {
        let [text, vae, unet] = files.parts().map(|part| weights(part, activations));
        let element = activations.bytes() as u64;
        let (forward, backward) = unet_elements(&files.configs.unet);
        let elements = match trajectory {
            Trajectory::NullText { .. } => backward,
            _ => forward,
        };
        // The inversion's latents, f32, are kept for the way down.
        let side = files.configs.unet.sample_size;
        let pivots = 4 * (trajectory.steps() * side * side * files.configs.unet.in_channels) as u64;
        Needs {
            text,
            vae,
            unet,
            sample: element * elements as u64 + pivots,
            encode: encode_bytes(files, activations, side),
        }
    }

    /// The most that is held at once with so many samples in a batch and `encode` bytes in the VAE.
    pub fn peak(&self, batch: usize, encode: u64) -> u64 {
        self.weights() + encode.max(batch as u64 * self.sample)
    }

    fn weights(&self) -> u64 {
        self.text + self.vae + self.unet
    }
}

/// How a run fits the memory there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Samples of a batch.
    pub batch: usize,
    /// Side in latents of the VAE's tiles, where it does not fit whole; for [`super::Vae::tile`].
    pub tile: Option<usize>,
    /// What its parts take.
    pub needs: Needs,
    /// Bytes in the VAE's encoder, in tiles if they are used.
    pub encode: u64,
    /// The memory there is: `--max-memory` or the adapter's; `None` where neither is known.
    pub room: Option<u64>,
}

impl Plan {
    /// Fits a run of at most `batch` samples at once into the GPU's memory: by a smaller batch, then by tiles for the
    /// VAE.
    ///
    /// # Errors
    /// It fits in no way; says which setting would make it fit.
    pub fn new(
        gpu: &Gpu,
        files: &TeacherFiles,
        options: &TeacherOptions,
        trajectory: Trajectory,
        batch: usize,
    ) -> Result<Self> {
        let needs = Needs::new(files, options.activations, trajectory);
        let side = files.configs.unet.sample_size;
        let room = gpu.room();
        let most = room.unwrap_or(u64::MAX);
        let mut plan = Plan {
            batch: batch.max(1),
            tile: None,
            encode: needs.encode,
            needs,
            room,
        };
        while plan.batch > 1 && needs.peak(plan.batch, 0) > most {
            plan.batch -= 1;
        }
        let tiles = (SMALLEST_TILE..side).rev().step_by(4);
        let mut tiles = tiles
            .map(|tile| tile / 4 * 4)
            .filter(|&t| t >= SMALLEST_TILE);
        while needs.peak(0, plan.encode) > most {
            let Some(tile) = tiles.next() else { break };
            plan.tile = Some(tile);
            plan.encode = encode_bytes(files, options.activations, tile);
        }
        if plan.peak() <= most {
            return Ok(plan);
        }
        let advice = advice(
            files,
            options,
            trajectory,
            most,
            gpu.tier().f16,
            plan.peak(),
        );
        Err(Error::Config(format!(
            "out of GPU memory before it began: {plan}; {advice}"
        )))
    }

    /// The most that is held at once.
    pub fn peak(&self) -> u64 {
        self.needs.peak(self.batch, self.encode)
    }
}

impl StableDiffusion {
    /// Loads `path` with the plan that fits the GPU's memory: of as many texts at once as the model holds well, or fewer.
    ///
    /// # Errors
    /// As [`TeacherFiles::open`], [`Plan::new`] and [`TeacherFiles::load`], in this order.
    pub fn load_planned(
        gpu: &Gpu,
        path: impl AsRef<Path>,
        options: &TeacherOptions,
        trajectory: Trajectory,
    ) -> Result<(Self, Plan)> {
        let files = TeacherFiles::open(path, options)?;
        let batch = files.configs.unet.batch();
        let plan = Plan::new(gpu, &files, options, trajectory, batch)?;
        let mut model = files.load(gpu, options)?;
        model.vae.tile = plan.tile;
        model.batch = plan.batch;
        Ok((model, plan))
    }
}

/// Which setting would make a run of one sample fit.
fn advice(
    files: &TeacherFiles,
    options: &TeacherOptions,
    trajectory: Trajectory,
    most: u64,
    f16: bool,
    peak: u64,
) -> String {
    let fits = |activations: DType, trajectory: Trajectory| {
        let needs = Needs::new(files, activations, trajectory);
        let side = SMALLEST_TILE.min(files.configs.unet.sample_size);
        needs.peak(1, encode_bytes(files, activations, side)) <= most
    };
    let ddim = Trajectory::Ddim {
        steps: trajectory.steps(),
    };
    let half = f16 && options.activations != DType::F16;
    if half && fits(DType::F16, trajectory) {
        return "`--precision f16` would fit".into();
    }
    if fits(options.activations, ddim) {
        return "`--mode ddim` would fit".into();
    }
    if half && fits(DType::F16, ddim) {
        return "`--precision f16 --mode ddim` would fit".into();
    }
    format!(
        "it takes {} (`--max-memory`), or a smaller model",
        mib(peak)
    )
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let needs = &self.needs;
        write!(
            f,
            "memory: text encoder {}, VAE {}, U-Net {}, activations {} (batch {}), encoding {}{}: at most {}",
            mib(needs.text),
            mib(needs.vae),
            mib(needs.unet),
            mib(self.batch as u64 * needs.sample),
            self.batch,
            mib(self.encode),
            self.tile
                .map(|tile| format!(" (in tiles of {tile})"))
                .unwrap_or_default(),
            mib(self.peak()),
        )?;
        match self.room {
            Some(room) => write!(f, " of {}", mib(room)),
            None => write!(f, "; this adapter does not tell how much it has"),
        }
    }
}

fn mib(bytes: u64) -> String {
    format!("{:.0} MiB", bytes as f64 / (1u64 << 20) as f64)
}

/// Bytes of a component's weights on the GPU: matrices and tables as stored or narrower, convolutions in the
/// activations' type, vectors in f32.
fn weights(part: &Checkpoint, activations: DType) -> u64 {
    let bytes = |name: &str| {
        let shape = part.shape(name).unwrap_or_default();
        let stored = part.element_bytes(name).unwrap_or(4);
        let element = match shape.len() {
            2 => stored
                .min(4)
                .min(if activations == DType::F16 { 2 } else { 4 }),
            4 => activations.bytes(),
            _ => 4,
        };
        size_class((shape.iter().product::<usize>() * element) as u64)
    };
    part.names().map(bytes).sum()
}

/// Activations of one image of `side` latents in the VAE's encoder.
fn encode_bytes(files: &TeacherFiles, activations: DType, side: usize) -> u64 {
    let elements = files.configs.vae.encoder_elements() * side * side;
    VAE_ALIVE * (elements * activations.bytes()) as u64
}

/// Elements of one sample's activations in the U-Net: in a forward, and in a forward and backward to the text that
/// computes every block again.
fn unet_elements(config: &UnetConfig) -> (usize, usize) {
    let pixels = |level: usize| (config.sample_size >> level).pow(2);
    let last = config.block_out_channels.len() - 1;
    let mut skips = 2 * pixels(0) * config.block_out_channels[0];
    let mut widest = 0;
    for (i, &channels) in config.block_out_channels.iter().enumerate() {
        skips += config.layers_per_block[i] * pixels(i) * channels;
        if i < last {
            skips += pixels(i + 1) * channels;
        }
        let attention = config.down_attention[i] || config.up_attention[last - i];
        // A gated MLP holds its input, both halves of its projection apart and together, and their product: some 30
        // times the feature map. The rest is what drivers on the CPU copy, measured at full size.
        let alive = if attention { 48 } else { 20 };
        widest = widest.max(alive * pixels(i) * channels);
    }
    (skips + widest, 4 * (skips + widest))
}
