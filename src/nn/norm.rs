//! Normalisation layers; weights and statistics in f32.

use super::loader::{Init, Loader};
use crate::autograd::Var;
use crate::error::Result;

/// Layer norm over the last dimension.
pub struct LayerNorm {
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
            weight: loader.vector("weight", &[dim], Init::Ones)?,
            bias: loader.vector("bias", &[dim], Init::Zeros)?,
            eps: eps as f32,
        })
    }

    /// Normalises x [.., dim].
    pub fn forward(&self, x: &Var) -> Var {
        x.layer_norm(&self.weight, &self.bias, self.eps)
    }
}

/// Root-mean-square norm over the last dimension.
pub struct RmsNorm {
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
            weight: loader.vector("weight", &[dim], Init::Ones)?,
            eps: eps as f32,
        })
    }

    /// Normalises x [.., dim].
    pub fn forward(&self, x: &Var) -> Var {
        x.rms_norm(&self.weight, self.eps)
    }
}

/// Group norm over channels-last tensors.
pub struct GroupNorm {
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
            groups,
            weight: loader.vector("weight", &[channels], Init::Ones)?,
            bias: loader.vector("bias", &[channels], Init::Zeros)?,
            eps: eps as f32,
        })
    }

    /// Normalises x [batch, .., channels].
    pub fn forward(&self, x: &Var) -> Var {
        x.group_norm(self.groups, &self.weight, &self.bias, self.eps)
    }
}
