//! Normalisation layers; weights and statistics in f32.

use super::loader::{Init, Loader};
use crate::autograd::{Var, enter_layer};
use crate::error::Result;

/// Layer norm over the last dimension.
pub struct LayerNorm {
    name: String,
    weight: Var,
    bias: Var,
    eps: f32,
}

impl LayerNorm {
    /// Loads `weight` and `bias` `[dim]`.
    ///
    /// # Errors
    /// A missing tensor or another shape.
    pub fn load(loader: &Loader, dim: usize, eps: f64) -> Result<LayerNorm> {
        Ok(LayerNorm {
            name: loader.path(""),
            weight: loader.vector("weight", &[dim], Init::Ones)?,
            bias: loader.vector("bias", &[dim], Init::Zeros)?,
            eps: eps as f32,
        })
    }

    /// Normalises x [.., dim].
    pub fn forward(&self, x: &Var) -> Var {
        enter_layer(&self.name);
        x.layer_norm(&self.weight, &self.bias, self.eps)
    }
}

/// Root-mean-square norm over the last dimension.
pub struct RmsNorm {
    name: String,
    weight: Var,
    eps: f32,
}

impl RmsNorm {
    /// Loads `weight` `[dim]`.
    ///
    /// # Errors
    /// A missing tensor or another shape.
    pub fn load(loader: &Loader, dim: usize, eps: f64) -> Result<RmsNorm> {
        Ok(RmsNorm {
            name: loader.path(""),
            weight: loader.vector("weight", &[dim], Init::Ones)?,
            eps: eps as f32,
        })
    }

    /// Normalises x [.., dim].
    pub fn forward(&self, x: &Var) -> Var {
        enter_layer(&self.name);
        x.rms_norm(&self.weight, self.eps)
    }
}

/// Group norm over channels-last tensors.
pub struct GroupNorm {
    name: String,
    groups: usize,
    weight: Var,
    bias: Var,
    eps: f32,
}

impl GroupNorm {
    /// Loads `weight` and `bias` `[channels]`.
    ///
    /// # Errors
    /// A missing tensor or another shape.
    pub fn load(loader: &Loader, groups: usize, channels: usize, eps: f64) -> Result<GroupNorm> {
        Ok(GroupNorm {
            name: loader.path(""),
            groups,
            weight: loader.vector("weight", &[channels], Init::Ones)?,
            bias: loader.vector("bias", &[channels], Init::Zeros)?,
            eps: eps as f32,
        })
    }

    /// Normalises x [batch, .., channels].
    pub fn forward(&self, x: &Var) -> Var {
        enter_layer(&self.name);
        x.group_norm(self.groups, &self.weight, &self.bias, self.eps)
    }

    /// x·σ(x) of what [`GroupNorm::forward`] gives.
    pub fn forward_silu(&self, x: &Var) -> Var {
        enter_layer(&self.name);
        x.group_norm_silu(self.groups, &self.weight, &self.bias, self.eps)
    }
}
