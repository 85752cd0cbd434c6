//! The autoencoder between pixels and latents, as `diffusers`' `AutoencoderKL`.

use std::path::Path;

use super::config::ConfigFile;
use super::resnet::{ResnetBlock, Upsample, conv1x1, conv3x3, downsample};
use crate::Result;
use crate::autograd::{self, Var};
use crate::nn::{Conv2d, GroupNorm, Linear, Loader};
use crate::ops::attention::{AttentionMask, AttentionShape};

/// ε of every group norm in the VAE; not in its config.
const NORM_EPS: f64 = 1e-6;
/// The widest head that the attention kernels take; Stable Diffusion's VAE has one head of 512.
const WIDEST_HEAD: usize = 256;

/// The fields of `vae/config.json` that shape the model.
#[derive(Clone, Debug)]
pub struct VaeConfig {
    /// Channels of each level, finest first.
    pub block_out_channels: Vec<usize>,
    /// ResNets of a level in the encoder; one more in the decoder.
    pub layers_per_block: usize,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Groups of every group norm.
    pub norm_num_groups: usize,
    /// Factor from the encoder's mean to the U-Net's latents.
    pub scaling_factor: f32,
}

impl VaeConfig {
    /// Reads a `config.json`. Errors: a missing or ill-typed field, or a variant that is not supported.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let file = ConfigFile::read(path)?;
        let text = |s: &str| s.to_string();
        file.only("_class_name", &[text("AutoencoderKL")])?;
        file.only("act_fn", &[text("silu"), text("swish")])?;
        file.only("in_channels", &[3])?;
        file.only("out_channels", &[3])?;
        file.only("use_quant_conv", &[true])?;
        file.only("use_post_quant_conv", &[true])?;
        file.only("mid_block_add_attention", &[true])?;
        for field in ["shift_factor", "latents_mean", "latents_std"] {
            file.absent(field)?;
        }
        let block_out_channels: Vec<usize> = file.required("block_out_channels")?;
        if block_out_channels.is_empty() {
            return Err(file.error("block_out_channels", "found no level"));
        }
        for (field, block) in [
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ] {
            let blocks: Vec<String> =
                file.or(field, vec![text(block); block_out_channels.len()])?;
            if blocks != vec![block; block_out_channels.len()] {
                return Err(file.error(
                    field,
                    format!("found {blocks:?}, expected \"{block}\" for each level"),
                ));
            }
        }
        let config = VaeConfig {
            layers_per_block: file.or("layers_per_block", 1)?,
            latent_channels: file.or("latent_channels", 4)?,
            norm_num_groups: file.or("norm_num_groups", 32)?,
            scaling_factor: file.or("scaling_factor", 0.18215)?,
            block_out_channels,
        };
        for &channels in &config.block_out_channels {
            file.divides("norm_num_groups", config.norm_num_groups, channels)?;
        }
        if config.scaling_factor <= 0.0 {
            return Err(file.error("scaling_factor", "expected more than 0"));
        }
        Ok(config)
    }

    /// Pixels of an image's side per latent: 2^(levels − 1).
    pub fn factor(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }
}

/// Today's tensor name for one of the names that the attention in the middle had before (`query`, `proj_attn`, …).
pub fn canonical_name(name: &str) -> String {
    if !name.contains("mid_block.attentions.") {
        return name.to_string();
    }
    let mut parts: Vec<&str> = name.split('.').collect();
    let part = parts.len() - 2;
    parts[part] = match parts[part] {
        "query" => "to_q",
        "key" => "to_k",
        "value" => "to_v",
        "proj_attn" => "to_out.0",
        other => other,
    };
    parts.join(".")
}

/// Mean and log-variance of the latents' Gaussian, `[batch, height, width, latent_channels]` each, unscaled.
pub struct Moments {
    /// The mean.
    pub mean: Var,
    /// The logarithm of the variance.
    pub logvar: Var,
}

/// The autoencoder.
pub struct Vae {
    /// Side in latents of the tiles that larger images are worked on in; without one, images are whole where the
    /// adapter can bind their activations (see [`super::vae_tiling`]).
    pub tile: Option<usize>,
    config: VaeConfig,
    encoder: Encoder,
    quant_conv: Conv2d,
    post_quant_conv: Conv2d,
    decoder: Decoder,
}

impl Vae {
    /// Loads encoder and decoder; the checkpoint's names must have gone through [`canonical_name`].
    pub fn load(config: &VaeConfig, l: &Loader) -> Result<Self> {
        let latent = config.latent_channels;
        Ok(Vae {
            encoder: Encoder::load(config, &l.sub("encoder"))?,
            quant_conv: conv1x1(&l.sub("quant_conv"), 2 * latent, 2 * latent)?,
            post_quant_conv: conv1x1(&l.sub("post_quant_conv"), latent, latent)?,
            decoder: Decoder::load(config, &l.sub("decoder"))?,
            config: config.clone(),
            tile: None,
        })
    }

    /// The configuration it was loaded with.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// Moments of images `[batch, height, width, 3]` in −1…1; sides must be multiples of [`VaeConfig::factor`].
    ///
    /// In tiles where [`Vae::tile`] or the adapter's binding limit asks for them.
    pub fn encode(&self, images: &Var) -> Moments {
        let factor = self.config.factor();
        let sides = [images.dim(1) / factor, images.dim(2) / factor];
        let moments =
            self.in_pieces(
                images,
                sides,
                self.config.encoder_elements(),
                |x, tile| match tile {
                    Some(tile) => self.encode_tiled(x, tile),
                    None => self.encode_whole(x),
                },
            );
        let latent = self.config.latent_channels;
        Moments {
            mean: moments.narrow(3, 0, latent),
            logvar: moments.narrow(3, latent, latent),
        }
    }

    /// Images in −1…1 (not clamped) from unscaled latents `[batch, height, width, latent_channels]`; tiles as in
    /// [`Vae::encode`].
    pub fn decode(&self, latents: &Var) -> Var {
        let sides = [latents.dim(1), latents.dim(2)];
        self.in_pieces(
            latents,
            sides,
            self.config.decoder_elements(),
            |x, tile| match tile {
                Some(tile) => self.decode_tiled(x, tile),
                None => self.decode_whole(x),
            },
        )
    }

    /// Mean and log-variance side by side, of whole images.
    pub(super) fn encode_whole(&self, images: &Var) -> Var {
        self.quant_conv.forward(&self.encoder.forward(images))
    }

    /// Whole images.
    pub(super) fn decode_whole(&self, latents: &Var) -> Var {
        self.decoder.forward(&self.post_quant_conv.forward(latents))
    }
}

struct Encoder {
    conv_in: Conv2d,
    down_blocks: Vec<(Vec<ResnetBlock>, Option<Conv2d>)>,
    mid_block: MidBlock,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Encoder {
    fn load(config: &VaeConfig, l: &Loader) -> Result<Self> {
        let (channels, groups) = (&config.block_out_channels, config.norm_num_groups);
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let down = l.sub("down_blocks");
        let mut down_blocks = Vec::new();
        for (i, &cout) in channels.iter().enumerate() {
            let block = down.sub(i);
            let cin = channels[i.saturating_sub(1)];
            let resnets = resnets(&block, config.layers_per_block, cin, cout, groups)?;
            let downsampler = (i + 1 < channels.len())
                .then(|| downsample(&block.sub("downsamplers.0"), cout, [0, 1, 0, 1]))
                .transpose()?;
            down_blocks.push((resnets, downsampler));
        }
        Ok(Encoder {
            conv_in: conv3x3(&l.sub("conv_in"), 3, first)?,
            down_blocks,
            mid_block: MidBlock::load(&l.sub("mid_block"), last, groups)?,
            conv_norm_out: GroupNorm::load(&l.sub("conv_norm_out"), groups, last, NORM_EPS)?,
            conv_out: conv3x3(&l.sub("conv_out"), last, 2 * config.latent_channels)?,
        })
    }

    fn forward(&self, x: &Var) -> Var {
        let mut h = self.conv_in.forward(x);
        for (resnets, downsampler) in &self.down_blocks {
            for resnet in resnets {
                h = resnet.forward(&h, None);
            }
            if let Some(downsampler) = downsampler {
                h = downsampler.forward(&h);
            }
        }
        h = self.mid_block.forward(&h);
        self.conv_out.forward(&self.conv_norm_out.forward_silu(&h))
    }
}

struct Decoder {
    conv_in: Conv2d,
    mid_block: MidBlock,
    up_blocks: Vec<(Vec<ResnetBlock>, Option<Upsample>)>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Decoder {
    fn load(config: &VaeConfig, l: &Loader) -> Result<Self> {
        let groups = config.norm_num_groups;
        let channels: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let up = l.sub("up_blocks");
        let mut up_blocks = Vec::new();
        for (i, &cout) in channels.iter().enumerate() {
            let block = up.sub(i);
            let cin = channels[i.saturating_sub(1)];
            let resnets = resnets(&block, config.layers_per_block + 1, cin, cout, groups)?;
            let upsampler = (i + 1 < channels.len())
                .then(|| Upsample::load(&block.sub("upsamplers.0"), cout))
                .transpose()?;
            up_blocks.push((resnets, upsampler));
        }
        Ok(Decoder {
            conv_in: conv3x3(&l.sub("conv_in"), config.latent_channels, first)?,
            mid_block: MidBlock::load(&l.sub("mid_block"), first, groups)?,
            up_blocks,
            conv_norm_out: GroupNorm::load(&l.sub("conv_norm_out"), groups, last, NORM_EPS)?,
            conv_out: conv3x3(&l.sub("conv_out"), last, 3)?,
        })
    }

    fn forward(&self, z: &Var) -> Var {
        let mut h = self.mid_block.forward(&self.conv_in.forward(z));
        for (resnets, upsampler) in &self.up_blocks {
            for resnet in resnets {
                h = resnet.forward(&h, None);
            }
            if let Some(upsampler) = upsampler {
                h = upsampler.forward(&h);
            }
        }
        self.conv_out.forward(&self.conv_norm_out.forward_silu(&h))
    }
}

/// `count` ResNets under `resnets`, the first from `cin` channels.
fn resnets(
    l: &Loader,
    count: usize,
    cin: usize,
    cout: usize,
    groups: usize,
) -> Result<Vec<ResnetBlock>> {
    let list = l.sub("resnets");
    (0..count)
        .map(|j| {
            let from = if j == 0 { cin } else { cout };
            ResnetBlock::load(&list.sub(j), from, cout, None, groups, NORM_EPS)
        })
        .collect()
}

/// `UNetMidBlock2D`: ResNet, attention over pixels, ResNet.
struct MidBlock {
    resnet_0: ResnetBlock,
    attention: PixelAttention,
    resnet_1: ResnetBlock,
}

impl MidBlock {
    fn load(l: &Loader, channels: usize, groups: usize) -> Result<Self> {
        let resnet = |name: &str| {
            ResnetBlock::load(&l.sub(name), channels, channels, None, groups, NORM_EPS)
        };
        Ok(MidBlock {
            resnet_0: resnet("resnets.0")?,
            attention: PixelAttention::load(&l.sub("attentions.0"), channels, groups)?,
            resnet_1: resnet("resnets.1")?,
        })
    }

    fn forward(&self, x: &Var) -> Var {
        let h = self.resnet_0.forward(x, None);
        self.resnet_1.forward(&self.attention.forward(&h), None)
    }
}

/// Self-attention of all pixels with one head as wide as the feature map.
struct PixelAttention {
    group_norm: GroupNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    channels: usize,
}

impl PixelAttention {
    fn load(l: &Loader, channels: usize, groups: usize) -> Result<Self> {
        let square = |name: &str| Linear::load(&l.sub(name), channels, channels, true);
        Ok(PixelAttention {
            group_norm: GroupNorm::load(&l.sub("group_norm"), groups, channels, NORM_EPS)?,
            to_q: square("to_q")?,
            to_k: square("to_k")?,
            to_v: square("to_v")?,
            to_out: square("to_out.0")?,
            channels,
        })
    }

    /// `[batch, height, width, channels]`.
    fn forward(&self, x: &Var) -> Var {
        let shape = x.shape().to_vec();
        let h = self
            .group_norm
            .forward(x)
            .reshape(&[shape[0], shape[1] * shape[2], self.channels]);
        let (q, k, v) = (
            self.to_q.forward(&h),
            self.to_k.forward(&h),
            self.to_v.forward(&h),
        );
        let scale = (self.channels as f32).powf(-0.5);
        let h = if self.channels <= WIDEST_HEAD {
            let shape = AttentionShape {
                heads: 1,
                kv_heads: 1,
                scale,
            };
            autograd::attention(&q, &k, &v, shape, &AttentionMask::default())
        } else {
            // One head of one image at a time fits: 4096² scores are 64 MiB in f32.
            q.matmul_t(&k).scale(scale).softmax().matmul(&v)
        };
        let flat = x.reshape(h.shape());
        self.to_out.forward_onto(&h, &flat).reshape(&shape)
    }
}
