//! The U-Net's transformer over pixels: self-attention, cross-attention to the text, gated MLP.

use super::maps::Capture;
use super::resnet::conv1x1;
use crate::Result;
use crate::autograd::{self, Var};
use crate::nn::{Conv2d, GroupNorm, LayerNorm, Linear, Loader};
use crate::ops::attention::{AttentionMask, AttentionShape};
use crate::ops::attention_tap::AttentionTap;
use crate::tensor::Tensor;

/// Shape of one [`Transformer2d`].
#[derive(Clone, Copy, Debug)]
pub struct TransformerShape {
    /// Channels of the feature map.
    pub channels: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width of the text states.
    pub cross_dim: usize,
    /// Transformer blocks in it; 1 in Stable Diffusion v1.
    pub depth: usize,
    /// Groups of the group norm before it.
    pub groups: usize,
    /// The projections in and out are linear layers (Stable Diffusion v2) instead of 1×1 convolutions.
    pub linear: bool,
}

/// What a cross-attention is to give beside its output.
#[derive(Clone, Copy)]
enum Wanted {
    Nothing,
    Values,
    Tape,
}

/// Its probabilities f32 `[batch, pixels, tokens]`, mean over heads.
enum Probs {
    Nothing,
    Values(Tensor),
    Tape(Var),
}

/// `Transformer2DModel`: group norm, projection, blocks, projection, residual.
pub struct Transformer2d {
    norm: GroupNorm,
    proj_in: Projection,
    blocks: Vec<Block>,
    proj_out: Projection,
    /// Its name in the checkpoint, under which its maps are captured.
    name: String,
}

impl Transformer2d {
    /// Loads the transformer whose tensors are under `l`; `name` is its name in the checkpoint.
    pub fn load(l: &Loader, name: &str, shape: TransformerShape) -> Result<Self> {
        let blocks = l.sub("transformer_blocks");
        Ok(Transformer2d {
            // Transformer2DModel fixes this ε, whatever the config's `norm_eps`.
            norm: GroupNorm::load(&l.sub("norm"), shape.groups, shape.channels, 1e-6)?,
            proj_in: Projection::load(&l.sub("proj_in"), shape)?,
            blocks: (0..shape.depth)
                .map(|i| Block::load(&blocks.sub(i), shape))
                .collect::<Result<_>>()?,
            proj_out: Projection::load(&l.sub("proj_out"), shape)?,
            name: name.to_string(),
        })
    }

    /// `x` `[batch, height, width, channels]`, `text` `[batch, tokens, cross_dim]`.
    pub fn forward(&self, x: &Var, text: &Var, mut capture: Option<&mut Capture>) -> Var {
        let (height, width) = (x.shape()[1], x.shape()[2]);
        let mut h = self.proj_in.forward(&self.norm.forward(x));
        let map_shape = h.shape().to_vec();
        h = h.reshape(&[map_shape[0], height * width, map_shape[3]]);
        for (i, block) in self.blocks.iter().enumerate() {
            let name = format!("{}.transformer_blocks.{i}", self.name);
            let wanted = match &capture {
                Some(c) if c.wants(&name, height) && c.keeps_tape() => Wanted::Tape,
                Some(c) if c.wants(&name, height) => Wanted::Values,
                _ => Wanted::Nothing,
            };
            let (out, probs) = block.forward(&h, text, wanted);
            match (&mut capture, probs) {
                (Some(capture), Probs::Values(probs)) => capture.add(&name, height, width, probs),
                (Some(capture), Probs::Tape(probs)) => capture.keep(probs),
                _ => {}
            }
            h = out;
        }
        x.add(&self.proj_out.forward(&h.reshape(&map_shape)))
    }
}

/// The transformer's projections: 1×1 convolutions, or linear layers over the same channels.
enum Projection {
    Conv(Conv2d),
    Linear(Linear),
}

impl Projection {
    fn load(l: &Loader, shape: TransformerShape) -> Result<Self> {
        let c = shape.channels;
        Ok(if shape.linear {
            Projection::Linear(Linear::load(l, c, c, true)?)
        } else {
            Projection::Conv(conv1x1(l, c, c)?)
        })
    }

    fn forward(&self, x: &Var) -> Var {
        match self {
            Projection::Conv(conv) => conv.forward(x),
            Projection::Linear(linear) => linear.forward(x),
        }
    }
}

/// `BasicTransformerBlock`, pre-norm.
struct Block {
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    ff: GatedMlp,
}

impl Block {
    fn load(l: &Loader, shape: TransformerShape) -> Result<Self> {
        let c = shape.channels;
        let norm = |name: &str| LayerNorm::load(&l.sub(name), c, 1e-5);
        Ok(Block {
            norm1: norm("norm1")?,
            attn1: Attention::load(&l.sub("attn1"), c, c, shape.heads)?,
            norm2: norm("norm2")?,
            attn2: Attention::load(&l.sub("attn2"), c, shape.cross_dim, shape.heads)?,
            norm3: norm("norm3")?,
            ff: GatedMlp::load(&l.sub("ff"), c)?,
        })
    }

    /// `x` `[batch, pixels, channels]`; with `wanted` also the cross-attention's mean probabilities.
    fn forward(&self, x: &Var, text: &Var, wanted: Wanted) -> (Var, Probs) {
        let h = self.norm1.forward(x);
        let x = self.attn1.forward_onto(&h, &h, x);
        let h = self.norm2.forward(&x);
        let (x, probs) = match wanted {
            Wanted::Nothing => (self.attn2.forward_onto(&h, text, &x), Probs::Nothing),
            Wanted::Values => {
                let (x, probs) = self.attn2.captured_onto(&h, text, &x);
                (x, Probs::Values(probs))
            }
            Wanted::Tape => {
                let (x, probs) = self.attn2.tapped_onto(&h, text, &x);
                (x, Probs::Tape(probs))
            }
        };
        (self.ff.forward_onto(&self.norm3.forward(&x), &x), probs)
    }
}

/// Multi-head attention of pixels to a context: no bias on the way in, one on the way out.
struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    shape: AttentionShape,
}

impl Attention {
    fn load(l: &Loader, channels: usize, context: usize, heads: usize) -> Result<Self> {
        Ok(Attention {
            to_q: Linear::load(&l.sub("to_q"), channels, channels, false)?,
            to_k: Linear::load(&l.sub("to_k"), context, channels, false)?,
            to_v: Linear::load(&l.sub("to_v"), context, channels, false)?,
            to_out: Linear::load(&l.sub("to_out.0"), channels, channels, true)?,
            shape: AttentionShape {
                heads,
                kv_heads: heads,
                scale: ((channels / heads) as f32).powf(-0.5),
            },
        })
    }

    /// What `x` reads from `context`, added to `onto`.
    fn forward_onto(&self, x: &Var, context: &Var, onto: &Var) -> Var {
        let h = autograd::attention(
            &self.to_q.forward(x),
            &self.to_k.forward(context),
            &self.to_v.forward(context),
            self.shape,
            &AttentionMask::default(),
        );
        self.to_out.forward_onto(&h, onto)
    }

    /// With the probabilities f32 `[batch, pixels, tokens]`, mean over heads, on the tape.
    fn tapped_onto(&self, x: &Var, context: &Var, onto: &Var) -> (Var, Var) {
        let (batch, pixels, tokens) = (x.dim(0), x.dim(1), context.dim(1));
        let gpu = x.value().gpu();
        let rows: Vec<u32> = (0..(batch * pixels) as u32).collect();
        let columns: Vec<u32> = (0..batch).flat_map(|_| 0..tokens as u32).collect();
        let tap = AttentionTap {
            query_rows: Tensor::from_u32(gpu, &rows, &[batch * pixels]),
            key_columns: Tensor::from_u32(gpu, &columns, &[batch, tokens]),
        };
        let (h, probs) = autograd::attention_tapped(
            &self.to_q.forward(x),
            &self.to_k.forward(context),
            &self.to_v.forward(context),
            self.shape,
            &AttentionMask::default(),
            &tap,
        );
        let mean = probs.mean(&[1], false).reshape(&[batch, pixels, tokens]);
        (self.to_out.forward_onto(&h, onto), mean)
    }

    /// With the probabilities' mean over heads, f32 `[batch, pixels, tokens]`, read from q, k and the log-sum-exp.
    fn captured_onto(&self, x: &Var, context: &Var, onto: &Var) -> (Var, Tensor) {
        let (h, probs) = autograd::attention_captured(
            &self.to_q.forward(x),
            &self.to_k.forward(context),
            &self.to_v.forward(context),
            self.shape,
            &AttentionMask::default(),
        );
        (self.to_out.forward_onto(&h, onto), probs)
    }
}

/// `FeedForward` with GEGLU (Shazeer 2020): hidden · GELU(gate), both from one projection, expansion 4.
struct GatedMlp {
    proj: Linear,
    out: Linear,
}

impl GatedMlp {
    fn load(l: &Loader, channels: usize) -> Result<Self> {
        let inner = 4 * channels;
        Ok(GatedMlp {
            proj: Linear::load(&l.sub("net.0.proj"), channels, 2 * inner, true)?,
            out: Linear::load(&l.sub("net.2"), inner, channels, true)?,
        })
    }

    fn forward_onto(&self, x: &Var, onto: &Var) -> Var {
        self.out.forward_onto(&self.proj.forward(x).geglu(), onto)
    }
}
