//! Stable Diffusion v1.4's U-Net at its true size, with random weights: the time of one noise prediction.

use serde::{Deserialize, Serialize};

use super::{Timing, time};
use crate::autograd::{Var, no_grad};
use crate::diffusion::{Capture, MapLayers, Unet, UnetConfig};
use crate::error::Result;
use crate::gpu::Gpu;
use crate::nn::{LoadOptions, Loader};
use crate::tensor::{DType, Tensor};

/// Multiply-adds of a pass over 64² latents, times two: 402 GMAC.
const FLOPS_64: f64 = 804e9;

/// The U-Net's time at one size.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UnetTime {
    /// Side of the latents.
    pub side: usize,
    /// Samples at once.
    pub batch: usize,
    /// `f32` or `f16`.
    pub dtype: String,
    /// Whether cross-attention maps were captured.
    pub capture: bool,
    /// How long.
    #[serde(flatten)]
    pub timing: Timing,
    /// Most bytes held by our allocator.
    pub peak_bytes: u64,
}

impl UnetTime {
    /// 10⁹ operations a second, where they are known.
    pub fn gflops(&self) -> Option<f64> {
        (self.side == 64).then(|| self.batch as f64 * FLOPS_64 / self.timing.median_ms * 1e-6)
    }
}

/// `unet/config.json` of Stable Diffusion v1.4.
fn config() -> UnetConfig {
    UnetConfig {
        sample_size: 64,
        in_channels: 4,
        out_channels: 4,
        block_out_channels: vec![320, 640, 1280, 1280],
        layers_per_block: vec![2; 4],
        heads: vec![8; 4],
        depth: vec![1; 4],
        down_attention: vec![true, true, true, false],
        up_attention: vec![false, true, true, true],
        cross_attention_dim: 768,
        norm_num_groups: 32,
        norm_eps: 1e-5,
        flip_sin_to_cos: true,
        freq_shift: 0.0,
        downsample_padding: 1,
        use_linear_projection: false,
    }
}

/// Times the U-Net over latents of each of `sides`, with and without capture.
///
/// # Errors
/// Any GPU error.
pub fn run(
    gpu: &Gpu,
    dtype: DType,
    sides: &[usize],
    batch: usize,
    seconds: f64,
    mut each: impl FnMut(&UnetTime),
) -> Result<Vec<UnetTime>> {
    let options = LoadOptions {
        activations: dtype,
        ..LoadOptions::default()
    };
    let unet = Unet::load(&config(), &Loader::random(gpu, options))?;
    gpu.wait()?;
    let values =
        |n: usize| -> Vec<f32> { (0..n).map(|i| (i % 251) as f32 / 125.5 - 1.0).collect() };
    let tensor = |shape: &[usize]| {
        let n = shape.iter().product();
        Var::constant(Tensor::from_bytes(
            gpu,
            &dtype.narrow(&values(n)),
            dtype,
            shape,
        ))
    };
    let text = tensor(&[batch, 77, 768]);
    let timesteps = vec![261; batch];
    let mut times = Vec::new();
    for &side in sides {
        let x = tensor(&[batch, side, side, 4]);
        for capture in [false, true] {
            gpu.reset_peak();
            let mut pass = || {
                no_grad(|| match capture {
                    true => {
                        let mut maps = Capture::new(MapLayers::default(), side);
                        unet.predict(&x, &timesteps, &text, Some(&mut maps));
                    }
                    false => drop(unet.predict(&x, &timesteps, &text, None)),
                });
            };
            let timed = UnetTime {
                side,
                batch,
                dtype: if dtype == DType::F16 { "f16" } else { "f32" }.into(),
                capture,
                timing: time(gpu, seconds, &mut pass)?,
                peak_bytes: gpu.memory().peak_bytes,
            };
            each(&timed);
            times.push(timed);
        }
    }
    Ok(times)
}
