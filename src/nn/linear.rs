//! Linear layers.

use super::loader::{Init, Loader};
use super::lora::Lora;
use crate::autograd::{Var, enter_layer, swiglu};
use crate::error::Result;
use crate::ops::cast::cast;
use crate::tensor::{DType, QuantizedMatrix, Tensor};

/// W [outputs, inputs].
enum Weight {
    Float(Var),
    /// Frozen.
    Quantized(QuantizedMatrix),
}

impl Weight {
    /// Squared lengths of the rows, f32 `[outputs]`.
    fn squares(&self) -> Result<Tensor> {
        let weight = match self {
            Weight::Float(weight) => cast(weight.value(), DType::F32),
            Weight::Quantized(weight) => {
                Tensor::from_f32(weight.gpu(), &weight.to_f32()?, &weight.shape())
            }
        };
        let weight = Var::constant(weight);
        Ok(weight.square().sum(&[1], false).value().clone())
    }
}

/// y = x Wᵀ + b, with LoRA factors where the loader's configuration asks for them.
pub struct Linear {
    name: String,
    weight: Weight,
    bias: Option<Var>,
    lora: Option<Box<Lora>>,
}

impl Linear {
    /// Loads `weight` [outputs, inputs] and, where asked, `bias` `[outputs]`; quantised where
    /// [`Loader::quantization`] says so.
    ///
    /// # Errors
    /// A missing tensor or another shape; a weight that cannot be quantised.
    pub fn load(loader: &Loader, inputs: usize, outputs: usize, bias: bool) -> Result<Linear> {
        // PyTorch's default initialisation.
        let init = Init::Uniform(1.0 / (inputs as f32).sqrt());
        let weight = match loader.quantization() {
            Some(kind) => {
                Weight::Quantized(loader.quantized("weight", [outputs, inputs], init, kind)?)
            }
            None => Weight::Float(loader.matrix("weight", &[outputs, inputs], init)?),
        };
        Ok(Linear {
            name: loader.path(""),
            lora: Lora::load(loader, inputs, outputs, || weight.squares())?.map(Box::new),
            weight,
            bias: match bias {
                true => Some(loader.vector("bias", &[outputs], Init::Zeros)?),
                false => None,
            },
        })
    }

    /// A layer around weights at hand (tied embeddings).
    pub fn from_weights(weight: Var, bias: Option<Var>) -> Linear {
        Linear {
            name: "tied projection".into(),
            weight: Weight::Float(weight),
            bias,
            lora: None,
        }
    }

    /// Mean cross-entropy of the outputs with `labels` u32 `[N]`, as [`Var::cross_entropy`]: x [N, inputs] → `[1]`.
    pub fn cross_entropy(&self, x: &Var, labels: &Tensor, count: usize) -> Var {
        match (&self.weight, &self.bias, &self.lora) {
            (Weight::Float(weight), None, None) => {
                enter_layer(&self.name);
                x.linear_cross_entropy(weight, labels, count)
            }
            _ => self.forward(x).cross_entropy(labels, count),
        }
    }

    /// x [.., inputs] → [.., outputs].
    pub fn forward(&self, x: &Var) -> Var {
        self.added(x, None)
    }

    /// x [.., inputs] → `onto` [.., outputs] + what [`Linear::forward`] gives: the end of a residual branch.
    pub fn forward_onto(&self, x: &Var, onto: &Var) -> Var {
        self.added(x, Some(onto))
    }

    /// silu(gate) · what [`Linear::forward`] gives, `gate` [.., outputs]: a SwiGLU's other half.
    pub fn forward_gated(&self, x: &Var, gate: &Var) -> Var {
        let bias = self.bias.as_ref();
        match (&self.weight, &self.lora) {
            (_, Some(_)) => swiglu(gate, &self.forward(x)),
            (Weight::Float(weight), None) => {
                enter_layer(&self.name);
                x.linear_gated(weight, bias, gate)
            }
            (Weight::Quantized(weight), None) => {
                enter_layer(&self.name);
                x.linear_quantized_gated(weight, bias, gate)
            }
        }
    }

    fn added(&self, x: &Var, onto: Option<&Var>) -> Var {
        enter_layer(&self.name);
        let product = |x: &Var, bias: Option<&Var>, onto: Option<&Var>| match &self.weight {
            Weight::Float(weight) => x.linear_onto(weight, bias, onto),
            Weight::Quantized(weight) => x.linear_quantized(weight, bias, onto),
        };
        let y = product(x, self.bias.as_ref(), onto);
        match &self.lora {
            Some(lora) => lora.forward_onto(x, &y, |x| product(x, None, None)),
            None => y,
        }
    }
}
