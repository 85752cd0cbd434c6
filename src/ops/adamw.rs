//! Adam and AdamW, one update in place, as `torch.optim` computes it.

use super::sets::{SETS, ends, filled, sets};
use super::{dispatch, grid, line};
use crate::gpu::Kernel;
use crate::tensor::{DType, Tensor};

/// Settings of one update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f32,
    /// Decay of the first and second moment.
    pub betas: (f32, f32),
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Weight decay.
    pub weight_decay: f32,
    /// `true`: AdamW, which shrinks the weight itself; `false`: Adam, which adds it to the gradient.
    pub decoupled: bool,
    /// Number of this update, from 1.
    pub step: u64,
}

/// Tensors of one parameter, all f32 and of one element count.
#[derive(Clone, Copy)]
pub struct Update<'a> {
    /// Updated in place.
    pub param: &'a Tensor,
    /// The gradient.
    pub grad: &'a Tensor,
    /// First moment, updated in place.
    pub m: &'a Tensor,
    /// Second moment, updated in place.
    pub v: &'a Tensor,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    elements: [u32; SETS],
    /// Workgroup behind each tensor's last.
    ends: [u32; SETS],
    chunk: u32,
    beta1: f32,
    beta2: f32,
    one_minus_beta1: f32,
    one_minus_beta2: f32,
    eps: f32,
    /// lr / (1 − β₁ᵗ).
    step_size: f32,
    /// 1 / √(1 − β₂ᵗ).
    root_correction: f32,
    /// 1 − lr·λ for AdamW, else 1.
    shrink: f32,
    /// λ for Adam, else 0.
    l2: f32,
    /// To the multiple of 16 bytes that the kernel takes.
    unused: [u32; 2],
}

fn kernel(sets: usize, scaled: bool, threads: u32) -> Kernel {
    Kernel::new("adamw")
        .def("SETS", sets as i32)
        .flag("SCALED", scaled)
        .def("SCALE", 4 * sets as i32)
        .def("WG", threads as i32)
}

/// Updates `param`, `m` and `v` in place (all f32, `grad` too).
///
/// `grad_scale`, f32 `[1]`, multiplies the gradient first (clipping by the global norm); where it is
/// NaN or infinite nothing is updated.
pub fn adamw(
    param: &Tensor,
    grad: &Tensor,
    m: &Tensor,
    v: &Tensor,
    settings: &AdamW,
    grad_scale: Option<&Tensor>,
) {
    adamw_all(&[Update { param, grad, m, v }], settings, grad_scale);
}

/// [`adamw`] of several parameters with one setting, up to eight in a dispatch, as the adapter's bindings allow.
pub fn adamw_all(updates: &[Update], settings: &AdamW, grad_scale: Option<&Tensor>) {
    let (beta1, beta2) = (f64::from(settings.betas.0), f64::from(settings.betas.1));
    let (lr, decay) = (f64::from(settings.lr), f64::from(settings.weight_decay));
    let power = |beta: f64| 1.0 - beta.powf(settings.step as f64);
    let common = Params {
        elements: [0; SETS],
        ends: [0; SETS],
        chunk: 0,
        beta1: beta1 as f32,
        beta2: beta2 as f32,
        one_minus_beta1: (1.0 - beta1) as f32,
        one_minus_beta2: (1.0 - beta2) as f32,
        eps: settings.eps,
        step_size: (lr / power(beta1)) as f32,
        root_correction: (1.0 / power(beta2).sqrt()) as f32,
        shrink: if settings.decoupled {
            (1.0 - lr * decay) as f32
        } else {
            1.0
        },
        l2: if settings.decoupled {
            0.0
        } else {
            settings.weight_decay
        },
        unused: [0; 2],
    };
    let Some(first) = updates.first() else {
        return;
    };
    let gpu = first.param.gpu();
    for updates in updates.chunks(sets(gpu, 4, 1)) {
        let mut tensors = Vec::new();
        for &Update { param, grad, m, v } in updates {
            for t in [param, grad, m, v] {
                assert!(
                    t.dtype() == DType::F32 && t.elements() == param.elements(),
                    "adamw: {param:?}, {grad:?}, {m:?} and {v:?}"
                );
            }
            tensors.extend([param, grad, m, v]);
        }
        tensors.extend(grad_scale);
        let vectors = |update: &Update| update.param.elements().div_ceil(4);
        let cut = line(gpu, updates.iter().map(vectors).sum());
        let parts = |update: &Update| vectors(update).div_ceil(cut.chunk as usize);
        let ends = ends(updates.iter().map(parts));
        let elements = updates.iter().map(|u| u.param.elements() as u32);
        let params = Params {
            elements: filled(elements, 0),
            ends,
            chunk: cut.chunk,
            ..common
        };
        let kernel = kernel(updates.len(), grad_scale.is_some(), cut.threads);
        dispatch(&kernel, &tensors, &params, grid(ends[SETS - 1] as usize));
    }
}

/// All kernels of this op.
pub fn variants() -> Vec<Kernel> {
    let mut all = Vec::new();
    for sets in 1..=SETS {
        all.push(kernel(sets, true, 8));
    }
    all.extend([kernel(1, false, 8), kernel(SETS, false, 64)]);
    all
}
