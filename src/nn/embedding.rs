//! Token and position embeddings.

use super::linear::Linear;
use super::loader::{Init, Loader};
use crate::autograd::Var;
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// A table of vectors.
pub struct Embedding {
    weight: Var,
    activations: DType,
}

impl Embedding {
    /// Loads `weight` [vocabulary, dim].
    ///
    /// # Errors
    /// A missing tensor or another shape.
    pub fn load(loader: &Loader, vocabulary: usize, dim: usize) -> Result<Embedding> {
        Ok(Embedding {
            weight: loader.matrix("weight", &[vocabulary, dim], Init::Normal(0.02))?,
            activations: loader.activations(),
        })
    }

    /// Vectors of ids u32 [..]: [.., dim].
    pub fn forward(&self, ids: &Tensor) -> Var {
        Var::embedding(&self.weight, ids, self.activations)
    }

    /// A bias-free output projection that shares this table.
    pub fn tied_projection(&self) -> Linear {
        Linear::from_weights(self.weight.clone(), None)
    }
}
