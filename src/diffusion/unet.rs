//! The noise predictor, as `diffusers`' `UNet2DConditionModel` in Stable Diffusion v1 (and v2's linear projections).
//!
//! Rombach et al.: *High-Resolution Image Synthesis with Latent Diffusion Models*, 2022.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::Path;
use std::rc::Rc;

use super::config::ConfigFile;
use super::maps::{Capture, Layer};
use super::resnet::{ResnetBlock, Upsample, conv3x3, downsample};
use super::transformer::{Transformer2d, TransformerShape};
use crate::Result;
use crate::autograd::{Replayed, Var, checkpoint};
use crate::nn::{Conv2d, GroupNorm, Linear, Loader};
use crate::ops::cast::cast;
use crate::tensor::Tensor;

/// The fields of `unet/config.json` that shape the model.
#[derive(Clone, Debug)]
pub struct UnetConfig {
    /// Side of the latents it was trained on.
    pub sample_size: usize,
    /// Channels of the latents.
    pub in_channels: usize,
    /// Channels of the noise prediction.
    pub out_channels: usize,
    /// Channels of each level.
    pub block_out_channels: Vec<usize>,
    /// ResNets of each level on the way down; one more on the way up.
    pub layers_per_block: Vec<usize>,
    /// Heads of each level's attention (the file calls it `attention_head_dim`).
    pub heads: Vec<usize>,
    /// Transformer blocks of each level.
    pub depth: Vec<usize>,
    /// Which levels attend to the text on the way down.
    pub down_attention: Vec<bool>,
    /// Which levels attend to the text on the way up, from the deepest.
    pub up_attention: Vec<bool>,
    /// Width of the text states.
    pub cross_attention_dim: usize,
    /// Groups of every group norm.
    pub norm_num_groups: usize,
    /// ε of the ResNets' group norms.
    pub norm_eps: f64,
    /// Cosines before sines in the timestep embedding.
    pub flip_sin_to_cos: bool,
    /// Shift of the timestep embedding's frequencies.
    pub freq_shift: f32,
    /// Padding of the convolutions between levels.
    pub downsample_padding: usize,
    /// Linear projections around the transformers.
    pub use_linear_projection: bool,
}

impl UnetConfig {
    /// Reads a `config.json`. Errors: a missing or ill-typed field, or a variant of the model that is not supported.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let file = ConfigFile::read(path)?;
        let text = |s: &str| s.to_string();
        file.only("_class_name", &[text("UNet2DConditionModel")])?;
        file.only("act_fn", &[text("silu"), text("swish")])?;
        file.only("mid_block_type", &[text("UNetMidBlock2DCrossAttn")])?;
        file.only("resnet_time_scale_shift", &[text("default")])?;
        file.only("time_embedding_type", &[text("positional")])?;
        file.only("attention_type", &[text("default")])?;
        file.only("conv_in_kernel", &[3])?;
        file.only("conv_out_kernel", &[3])?;
        file.only("mid_block_scale_factor", &[1.0])?;
        file.only("resnet_out_scale_factor", &[1.0])?;
        for field in [
            "center_input_sample",
            "only_cross_attention",
            "mid_block_only_cross_attention",
            "dual_cross_attention",
            "class_embed_type",
            "num_class_embeds",
            "addition_embed_type",
            "encoder_hid_dim",
            "encoder_hid_dim_type",
            "time_embedding_dim",
            "time_embedding_act_fn",
            "timestep_post_act",
            "time_cond_proj_dim",
            "cross_attention_norm",
            "reverse_transformer_layers_per_block",
            "resnet_skip_time_act",
            "num_attention_heads",
        ] {
            file.absent(field)?;
        }
        let block_out_channels: Vec<usize> = file.required("block_out_channels")?;
        let levels = block_out_channels.len();
        if levels == 0 {
            return Err(file.error("block_out_channels", "found no level"));
        }
        let attention = |field: &str, plain: &str, cross: &str| -> Result<Vec<bool>> {
            let names: Vec<String> = file.required(field)?;
            if names.len() != levels {
                return Err(file.error(
                    field,
                    format!(
                        "found {} blocks, expected {levels}, one a level",
                        names.len()
                    ),
                ));
            }
            names
                .iter()
                .map(|name| match name.as_str() {
                    n if n == cross => Ok(true),
                    n if n == plain => Ok(false),
                    other => Err(file.error(
                        field,
                        format!("found \"{other}\", expected \"{cross}\" or \"{plain}\""),
                    )),
                })
                .collect()
        };
        let config = UnetConfig {
            sample_size: file.required("sample_size")?,
            in_channels: file.or("in_channels", 4)?,
            out_channels: file.or("out_channels", 4)?,
            layers_per_block: file.per_level("layers_per_block", levels, 2)?,
            heads: file.per_level("attention_head_dim", levels, 8)?,
            depth: file.per_level("transformer_layers_per_block", levels, 1)?,
            down_attention: attention("down_block_types", "DownBlock2D", "CrossAttnDownBlock2D")?,
            up_attention: attention("up_block_types", "UpBlock2D", "CrossAttnUpBlock2D")?,
            cross_attention_dim: file.required("cross_attention_dim")?,
            norm_num_groups: file.or("norm_num_groups", 32)?,
            norm_eps: file.or("norm_eps", 1e-5)?,
            flip_sin_to_cos: file.or("flip_sin_to_cos", true)?,
            freq_shift: file.or("freq_shift", 0.0)?,
            downsample_padding: file.or("downsample_padding", 1)?,
            use_linear_projection: file.or("use_linear_projection", false)?,
            block_out_channels,
        };
        let halvings = 1 << (levels - 1);
        if config.sample_size == 0 || !config.sample_size.is_multiple_of(halvings) {
            return Err(file.error(
                "sample_size",
                format!(
                    "found {}, expected a multiple of {halvings} for {levels} levels",
                    config.sample_size
                ),
            ));
        }
        for (&channels, &heads) in config.block_out_channels.iter().zip(&config.heads) {
            file.divides("norm_num_groups", config.norm_num_groups, channels)?;
            file.divides("attention_head_dim", heads, channels)?;
        }
        if !config.block_out_channels[0].is_multiple_of(2) {
            return Err(file.error("block_out_channels", "the first must be even"));
        }
        if config.layers_per_block.contains(&0) {
            return Err(file.error("layers_per_block", "found 0, expected at least 1"));
        }
        Ok(config)
    }

    /// Samples at once that use a GPU well: two of Stable Diffusion v1's, more of a smaller model's.
    pub fn batch(&self) -> usize {
        (2 * 64 * 64 / (self.sample_size * self.sample_size)).clamp(1, 32)
    }

    fn transformer(&self, level: usize) -> TransformerShape {
        TransformerShape {
            channels: self.block_out_channels[level],
            heads: self.heads[level],
            cross_dim: self.cross_attention_dim,
            depth: self.depth[level],
            groups: self.norm_num_groups,
            linear: self.use_linear_projection,
        }
    }
}

/// The U-Net.
pub struct Unet {
    config: UnetConfig,
    linear_1: Linear,
    linear_2: Linear,
    conv_in: Conv2d,
    down_blocks: Vec<DownBlock>,
    mid_block: MidBlock,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
    plans: Replayed,
    /// The layers that each kind of capture reads, in their order, by its key.
    captured: RefCell<HashMap<Vec<usize>, Vec<Layer>>>,
}

impl Unet {
    /// Loads the model from a checkpoint with today's tensor names.
    pub fn load(config: &UnetConfig, l: &Loader) -> Result<Self> {
        let channels = &config.block_out_channels;
        let (first, last, levels) = (channels[0], channels[channels.len() - 1], channels.len());
        let time = 4 * first;
        let block = Common { config, time };
        let down = l.sub("down_blocks");
        let down_blocks = (0..levels)
            .map(|i| block.down(&down.sub(i), i))
            .collect::<Result<_>>()?;
        // What the way down leaves for the way up: conv_in's output, every ResNet's, every downsampler's.
        let mut skips = vec![first];
        for (i, &c) in channels.iter().enumerate() {
            skips.extend(vec![
                c;
                config.layers_per_block[i] + usize::from(i + 1 < levels)
            ]);
        }
        let up = l.sub("up_blocks");
        let mut below = last;
        let mut up_blocks = Vec::with_capacity(levels);
        for i in 0..levels {
            up_blocks.push(block.up(&up.sub(i), i, below, &mut skips)?);
            below = channels[levels - 1 - i];
        }
        Ok(Unet {
            linear_1: Linear::load(&l.sub("time_embedding.linear_1"), first, time, true)?,
            linear_2: Linear::load(&l.sub("time_embedding.linear_2"), time, time, true)?,
            conv_in: conv3x3(&l.sub("conv_in"), config.in_channels, first)?,
            down_blocks,
            mid_block: block.mid(&l.sub("mid_block"))?,
            up_blocks,
            conv_norm_out: GroupNorm::load(
                &l.sub("conv_norm_out"),
                config.norm_num_groups,
                first,
                config.norm_eps,
            )?,
            conv_out: conv3x3(&l.sub("conv_out"), first, config.out_channels)?,
            plans: Replayed::new(l.gpu()),
            captured: RefCell::default(),
            config: config.clone(),
        })
    }

    /// The configuration it was loaded with.
    pub fn config(&self) -> &UnetConfig {
        &self.config
    }

    /// [`Unet::forward`] that keeps each layer's input alone on the tape and runs the layer again in the backward:
    /// less memory for a gradient with respect to the text or the latents.
    pub fn forward_recomputed(&self, x: &Var, timesteps: &[usize], text: &Var) -> Var {
        let embedding = self.timestep_embedding(x.value(), timesteps);
        self.run(x, &embedding, text, Pass::Recompute)
    }

    /// The noise in `x` `[batch, height, width, in_channels]` at one timestep per sample, given the text states
    /// `[batch, tokens, cross_attention_dim]`.
    ///
    /// Height and width must be multiples of 2^(levels − 1). With a [`Capture`], the cross-attention maps that it
    /// wants are added to it; they carry no gradient.
    pub fn forward(
        &self,
        x: &Var,
        timesteps: &[usize],
        text: &Var,
        capture: Option<&mut Capture>,
    ) -> Var {
        let embedding = self.timestep_embedding(x.value(), timesteps);
        self.run(x, &embedding, text, Pass::Once(capture))
    }

    /// [`Unet::forward`] off the tape; passes over one shape are replayed where the GPU was opened so.
    pub fn predict(
        &self,
        x: &Var,
        timesteps: &[usize],
        text: &Var,
        capture: Option<&mut Capture>,
    ) -> Var {
        let embedding = self.timestep_embedding(x.value(), timesteps);
        let own = capture.as_ref().map_or(Vec::new(), |c| c.key());
        let inputs = [x.clone(), embedding, text.clone()];
        let empty = capture.as_ref().map(|c| c.emptied());
        let mut outputs = self.plans.call_no_grad(&own, &inputs, |inputs| {
            let mut capture = empty.as_ref().map(Capture::emptied);
            let pass = Pass::Once(capture.as_mut());
            let noise = self.run(&inputs[0], &inputs[1], &inputs[2], pass);
            let maps = capture.map(Capture::into_layers).unwrap_or_default();
            let (layers, maps): (_, Vec<Tensor>) = maps.into_iter().unzip();
            self.captured.borrow_mut().insert(own.clone(), layers);
            let maps = maps.into_iter().map(Var::constant);
            [noise].into_iter().chain(maps).collect()
        });
        let noise = outputs.remove(0);
        if let (Some(capture), Some(layers)) = (capture, self.captured.borrow().get(&own)) {
            for ((name, side), maps) in layers.iter().zip(&outputs) {
                capture.add(name, *side, *side, maps.value().clone());
            }
        }
        noise
    }

    /// Drops what [`Unet::predict`] keeps between passes.
    pub fn forget_plans(&self) {
        self.plans.forget();
    }

    /// The noise in `x`, given the timesteps' embedding.
    fn run(&self, x: &Var, embedding: &Var, text: &Var, mut pass: Pass) -> Var {
        let time = self
            .linear_2
            .forward(&self.linear_1.forward(embedding).silu());
        let mut h = self.conv_in.forward(x);
        let mut skips = vec![h.clone()];
        for block in &self.down_blocks {
            h = block.forward(&h, &time, text, &mut pass, &mut skips);
        }
        h = self.mid_block.forward(&h, &time, text, &mut pass);
        for block in &self.up_blocks {
            h = block.forward(&h, &time, text, &mut pass, &mut skips);
        }
        self.conv_out.forward(&self.conv_norm_out.forward_silu(&h))
    }

    /// Sinusoids of the timesteps, `[batch, block_out_channels[0]]`, in f32 arithmetic as `diffusers` does it.
    fn timestep_embedding(&self, like: &Tensor, timesteps: &[usize]) -> Var {
        assert_eq!(
            timesteps.len(),
            like.dim(0),
            "unet: one timestep per sample"
        );
        let half = self.config.block_out_channels[0] / 2;
        let step = -10000f32.ln();
        let frequencies: Vec<f32> = (0..half)
            .map(|i| (step * i as f32 / (half as f32 - self.config.freq_shift)).exp())
            .collect();
        let mut values = Vec::with_capacity(timesteps.len() * 2 * half);
        for &t in timesteps {
            let angles = frequencies.iter().map(|f| t as f32 * f);
            let (sines, cosines): (Vec<f32>, Vec<f32>) = angles.map(f32::sin_cos).unzip();
            if self.config.flip_sin_to_cos {
                values.extend(cosines.iter().chain(&sines));
            } else {
                values.extend(sines.iter().chain(&cosines));
            }
        }
        let embedding = Tensor::from_f32(like.gpu(), &values, &[timesteps.len(), 2 * half]);
        Var::constant(cast(&embedding, like.dtype()))
    }
}

/// What every block's loading needs.
struct Common<'a> {
    config: &'a UnetConfig,
    time: usize,
}

impl Common<'_> {
    fn resnet(&self, l: &Loader, cin: usize, cout: usize) -> Result<Rc<ResnetBlock>> {
        let c = self.config;
        ResnetBlock::load(l, cin, cout, Some(self.time), c.norm_num_groups, c.norm_eps).map(Rc::new)
    }

    fn transformer(&self, l: &Loader, name: &str, level: usize) -> Result<Rc<Transformer2d>> {
        Transformer2d::load(l, name, self.config.transformer(level)).map(Rc::new)
    }

    fn down(&self, l: &Loader, level: usize) -> Result<DownBlock> {
        let c = self.config;
        let cout = c.block_out_channels[level];
        let cin = c.block_out_channels[level.saturating_sub(1)];
        let (resnets, attentions) = (l.sub("resnets"), l.sub("attentions"));
        let mut block = DownBlock {
            resnets: vec![],
            attentions: vec![],
            downsampler: None,
        };
        for j in 0..c.layers_per_block[level] {
            let from = if j == 0 { cin } else { cout };
            block
                .resnets
                .push(self.resnet(&resnets.sub(j), from, cout)?);
            if c.down_attention[level] {
                let name = format!("down_blocks.{level}.attentions.{j}");
                let transformer = self.transformer(&attentions.sub(j), &name, level)?;
                block.attentions.push(transformer);
            }
        }
        if level + 1 < c.block_out_channels.len() {
            let padding = [c.downsample_padding; 4];
            block.downsampler = Some(downsample(&l.sub("downsamplers.0"), cout, padding)?);
        }
        Ok(block)
    }

    fn mid(&self, l: &Loader) -> Result<MidBlock> {
        let level = self.config.block_out_channels.len() - 1;
        let c = self.config.block_out_channels[level];
        Ok(MidBlock {
            resnet_0: self.resnet(&l.sub("resnets.0"), c, c)?,
            attention: self.transformer(&l.sub("attentions.0"), "mid_block.attentions.0", level)?,
            resnet_1: self.resnet(&l.sub("resnets.1"), c, c)?,
        })
    }

    /// Up block `i` (0 is the deepest), fed by `below` channels; takes its skips' widths off `skips`.
    fn up(&self, l: &Loader, i: usize, below: usize, skips: &mut Vec<usize>) -> Result<UpBlock> {
        let c = self.config;
        let level = c.block_out_channels.len() - 1 - i;
        let cout = c.block_out_channels[level];
        let (resnets, attentions) = (l.sub("resnets"), l.sub("attentions"));
        let mut block = UpBlock {
            resnets: vec![],
            attentions: vec![],
            upsampler: None,
        };
        for j in 0..=c.layers_per_block[level] {
            let skip = skips.pop().expect("one skip per ResNet on the way up");
            let from = if j == 0 { below } else { cout };
            block
                .resnets
                .push(self.resnet(&resnets.sub(j), from + skip, cout)?);
            if c.up_attention[i] {
                let name = format!("up_blocks.{i}.attentions.{j}");
                let transformer = self.transformer(&attentions.sub(j), &name, level)?;
                block.attentions.push(transformer);
            }
        }
        if level > 0 {
            block.upsampler = Some(Upsample::load(&l.sub("upsamplers.0"), cout)?);
        }
        Ok(block)
    }
}

/// How a forward treats its layers.
enum Pass<'a> {
    /// As they are, with the maps that the capture wants.
    Once(Option<&'a mut Capture>),
    /// Run again in the backward where a gradient flows through them.
    Recompute,
}

impl Pass<'_> {
    fn resnet(&self, block: &Rc<ResnetBlock>, x: &Var, time: &Var) -> Var {
        match self {
            Pass::Recompute if x.needs_grad() => {
                let (block, time) = (block.clone(), time.clone());
                checkpoint(std::slice::from_ref(x), move |x| {
                    vec![block.forward(&x[0], Some(&time))]
                })
                .remove(0)
            }
            _ => block.forward(x, Some(time)),
        }
    }

    fn transformer(&mut self, block: &Rc<Transformer2d>, x: &Var, text: &Var) -> Var {
        match self {
            Pass::Recompute if x.needs_grad() || text.needs_grad() => {
                let block = block.clone();
                let inputs = [x.clone(), text.clone()];
                checkpoint(&inputs, move |v| vec![block.forward(&v[0], &v[1], None)]).remove(0)
            }
            Pass::Recompute => block.forward(x, text, None),
            Pass::Once(capture) => block.forward(x, text, capture.as_deref_mut()),
        }
    }
}

/// `DownBlock2D` or `CrossAttnDownBlock2D`.
struct DownBlock {
    resnets: Vec<Rc<ResnetBlock>>,
    attentions: Vec<Rc<Transformer2d>>,
    downsampler: Option<Conv2d>,
}

impl DownBlock {
    fn forward(
        &self,
        x: &Var,
        time: &Var,
        text: &Var,
        pass: &mut Pass,
        skips: &mut Vec<Var>,
    ) -> Var {
        let mut h = x.clone();
        for (j, resnet) in self.resnets.iter().enumerate() {
            h = pass.resnet(resnet, &h, time);
            if let Some(attention) = self.attentions.get(j) {
                h = pass.transformer(attention, &h, text);
            }
            skips.push(h.clone());
        }
        if let Some(downsampler) = &self.downsampler {
            h = downsampler.forward(&h);
            skips.push(h.clone());
        }
        h
    }
}

/// `UNetMidBlock2DCrossAttn`.
struct MidBlock {
    resnet_0: Rc<ResnetBlock>,
    attention: Rc<Transformer2d>,
    resnet_1: Rc<ResnetBlock>,
}

impl MidBlock {
    fn forward(&self, x: &Var, time: &Var, text: &Var, pass: &mut Pass) -> Var {
        let h = pass.resnet(&self.resnet_0, x, time);
        let h = pass.transformer(&self.attention, &h, text);
        pass.resnet(&self.resnet_1, &h, time)
    }
}

/// `UpBlock2D` or `CrossAttnUpBlock2D`.
struct UpBlock {
    resnets: Vec<Rc<ResnetBlock>>,
    attentions: Vec<Rc<Transformer2d>>,
    upsampler: Option<Upsample>,
}

impl UpBlock {
    fn forward(
        &self,
        x: &Var,
        time: &Var,
        text: &Var,
        pass: &mut Pass,
        skips: &mut Vec<Var>,
    ) -> Var {
        let mut h = x.clone();
        for (j, resnet) in self.resnets.iter().enumerate() {
            let skip = skips.pop().expect("one skip per ResNet on the way up");
            h = pass.resnet(resnet, &Var::concat(&[h, skip], 3), time);
            if let Some(attention) = self.attentions.get(j) {
                h = pass.transformer(attention, &h, text);
            }
        }
        match &self.upsampler {
            Some(upsampler) => upsampler.forward(&h),
            None => h,
        }
    }
}
