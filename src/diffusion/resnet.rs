//! Residual blocks and the resampling between levels, shared by the U-Net and the VAE.

use crate::Result;
use crate::autograd::Var;
use crate::nn::{Conv2d, GroupNorm, Linear, Loader};

/// `ResnetBlock2D`: two 3×3 convolutions behind group norms, the timestep added between them.
pub struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
}

impl ResnetBlock {
    /// Loads a block of `cin` to `cout` channels; `time` is the width of the timestep embedding, none in a VAE.
    pub fn load(
        l: &Loader,
        cin: usize,
        cout: usize,
        time: Option<usize>,
        groups: usize,
        eps: f64,
    ) -> Result<Self> {
        Ok(ResnetBlock {
            norm1: GroupNorm::load(&l.sub("norm1"), groups, cin, eps)?,
            conv1: conv3x3(&l.sub("conv1"), cin, cout)?,
            time_emb_proj: time
                .map(|width| Linear::load(&l.sub("time_emb_proj"), width, cout, true))
                .transpose()?,
            norm2: GroupNorm::load(&l.sub("norm2"), groups, cout, eps)?,
            conv2: conv3x3(&l.sub("conv2"), cout, cout)?,
            conv_shortcut: (cin != cout)
                .then(|| conv1x1(&l.sub("conv_shortcut"), cin, cout))
                .transpose()?,
        })
    }

    /// `x` `[batch, height, width, cin]`, `time` `[batch, width]` where the block was loaded with one.
    pub fn forward(&self, x: &Var, time: Option<&Var>) -> Var {
        let mut h = self.conv1.forward(&self.norm1.forward_silu(x));
        if let (Some(proj), Some(time)) = (&self.time_emb_proj, time) {
            let t = proj.forward(&time.silu());
            let shape = [t.shape()[0], 1, 1, t.shape()[1]];
            h = h.add(&t.reshape(&shape));
        }
        let h = self.conv2.forward(&self.norm2.forward_silu(&h));
        match &self.conv_shortcut {
            Some(shortcut) => shortcut.forward(x).add(&h),
            None => x.add(&h),
        }
    }
}

/// Nearest ×2, then a 3×3 convolution (`Upsample2D`, tensors under `conv`).
pub struct Upsample {
    conv: Conv2d,
}

impl Upsample {
    /// Loads the convolution of `channels` to `channels`.
    pub fn load(l: &Loader, channels: usize) -> Result<Self> {
        Ok(Upsample {
            conv: conv3x3(&l.sub("conv"), channels, channels)?,
        })
    }

    /// `[batch, height, width, channels]` to twice the height and width.
    pub fn forward(&self, x: &Var) -> Var {
        self.conv.forward(&x.upsample_nearest2x())
    }
}

/// A 3×3 convolution with stride 2 (`Downsample2D`, tensors under `conv`).
///
/// `padding` is `[top, bottom, left, right]`: 1 all round in the U-Net, 1 at the bottom and right alone in the VAE.
pub fn downsample(l: &Loader, channels: usize, padding: [usize; 4]) -> Result<Conv2d> {
    Conv2d::load(&l.sub("conv"), [channels, channels, 3], 2, padding, true)
}

/// A 3×3 convolution of stride 1 that keeps the size.
pub fn conv3x3(l: &Loader, cin: usize, cout: usize) -> Result<Conv2d> {
    Conv2d::load(l, [cin, cout, 3], 1, [1; 4], true)
}

/// A 1×1 convolution with bias.
pub fn conv1x1(l: &Loader, cin: usize, cout: usize) -> Result<Conv2d> {
    Conv2d::load(l, [cin, cout, 1], 1, [0; 4], true)
}
