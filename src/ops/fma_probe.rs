//! How many multiply-adds an adapter can do: the yardstick of the benches.

use super::dispatch_work;
use crate::error::Result;
use crate::gpu::{Gpu, Kernel};
use crate::tensor::{DType, Tensor};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    rounds: u32,
    factor: f32,
}

/// f32 FLOP/s that the adapter reaches on multiply-adds in registers; takes about 0.2 s.
///
/// # Errors
/// Any GPU error on the way.
pub fn fma_probe(gpu: &Gpu) -> Result<f64> {
    let out = Tensor::empty(gpu, DType::F32, &[1 << 18]);
    let threads = out.elements() / 4;
    let run = |rounds: u32| -> Result<f64> {
        // 16 vec4s, four multiply-adds each.
        let flops = threads as u64 * u64::from(rounds) * 16 * 4 * 4 * 2;
        let params = Params {
            rounds,
            factor: 0.5,
        };
        gpu.wait()?;
        let start = std::time::Instant::now();
        let groups = [(threads / 64) as u32, 1, 1];
        dispatch_work(&Kernel::new("fma_probe"), &[&out], &params, groups, flops);
        gpu.wait()?;
        Ok(flops as f64 / start.elapsed().as_secs_f64())
    };
    // The first run compiles and tells how many rounds take about 0.1 s.
    run(1)?;
    let slow = run(4)?;
    let rounds = (slow * 0.1 / (threads as f64 * 512.0)).clamp(4.0, 65_536.0) as u32;
    Ok(run(rounds)?.max(run(rounds)?))
}

/// All kernels of this file.
pub fn variants() -> Vec<Kernel> {
    vec![Kernel::new("fma_probe")]
}
