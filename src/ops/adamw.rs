//! Adam and AdamW, one update in place, as `torch.optim` computes it.

use super::{THREADS, dispatch, linear_groups};
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

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    elements: u32,
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
}

fn kernel(scaled: bool) -> Kernel {
    Kernel::new("adamw").flag("SCALED", scaled)
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
    for t in [param, grad, m, v] {
        assert!(
            t.dtype() == DType::F32 && t.elements() == param.elements(),
            "adamw: {param:?}, {grad:?}, {m:?} and {v:?}"
        );
    }
    let (beta1, beta2) = (f64::from(settings.betas.0), f64::from(settings.betas.1));
    let (lr, decay) = (f64::from(settings.lr), f64::from(settings.weight_decay));
    let power = |beta: f64| 1.0 - beta.powf(settings.step as f64);
    let params = Params {
        elements: param.elements() as u32,
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
    };
    let mut tensors = vec![param, grad, m, v];
    tensors.extend(grad_scale);
    dispatch(
        &kernel(grad_scale.is_some()),
        &tensors,
        &params,
        linear_groups(param.elements(), THREADS),
    );
}

/// All kernels of this op.
pub fn variants() -> Vec<Kernel> {
    vec![kernel(false), kernel(true)]
}
