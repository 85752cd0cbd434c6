//! Where layers get their weights from: a checkpoint, or a seeded initialisation.

use std::cell::RefCell;
use std::rc::Rc;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::freeze::Freeze;
use super::lora::LoraConfig;
use super::parameters::{Kind, Layout, Parameter, Parameters, from_checkpoint};
use crate::autograd::Var;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::ops::cast::cast;
use crate::ops::permute::permute;
use crate::tensor::{Checkpoint, DType, Quantization, QuantizedMatrix, Tensor, elements};

/// How to load a model's weights.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Make every weight a leaf with a gradient, held in f32.
    pub trainable: bool,
    /// What is left frozen all the same, weights and LoRA factors.
    pub freeze: Freeze,
    /// Put LoRA factors beside the matching linear layers.
    pub lora: Option<LoraConfig>,
    /// Dtype of the activations: f32 or f16. With f16, frozen f32 matrices are held as f16 too.
    pub activations: DType,
    /// Hold the weights of linear layers in 8 or 4 bits, which freezes them: see [`Loader::quantization`].
    pub quantize: Option<Quantization>,
    /// Seed of random initialisation and dropout.
    pub seed: u64,
}

impl Default for LoadOptions {
    fn default() -> Self {
        LoadOptions {
            trainable: false,
            freeze: Freeze::default(),
            lora: None,
            activations: DType::F32,
            quantize: None,
            seed: 0,
        }
    }
}

/// Initial values where there is no checkpoint.
#[derive(Clone, Copy, Debug)]
pub enum Init {
    /// All zero.
    Zeros,
    /// All one.
    Ones,
    /// All this.
    Constant(f32),
    /// Uniform in ±bound.
    Uniform(f32),
    /// Normal with this standard deviation.
    Normal(f32),
}

struct Shared {
    gpu: Gpu,
    checkpoint: Option<Checkpoint>,
    options: LoadOptions,
    parameters: Parameters,
    rng: RefCell<ChaCha8Rng>,
}

/// Hands out the weights under a name prefix.
#[derive(Clone)]
pub struct Loader {
    shared: Rc<Shared>,
    prefix: String,
}

impl Loader {
    /// Reads from `checkpoint`.
    pub fn new(gpu: &Gpu, checkpoint: Checkpoint, options: LoadOptions) -> Loader {
        Loader::make(gpu, Some(checkpoint), options)
    }

    /// Initialises every weight from the options' seed, as PyTorch initialises its layers.
    pub fn random(gpu: &Gpu, options: LoadOptions) -> Loader {
        Loader::make(gpu, None, options)
    }

    fn make(gpu: &Gpu, checkpoint: Option<Checkpoint>, options: LoadOptions) -> Loader {
        Loader {
            shared: Rc::new(Shared {
                gpu: gpu.clone(),
                checkpoint,
                rng: RefCell::new(ChaCha8Rng::seed_from_u64(options.seed)),
                options,
                parameters: Parameters::default(),
            }),
            prefix: String::new(),
        }
    }

    /// The loader for names under `name`.
    pub fn sub(&self, name: impl std::fmt::Display) -> Loader {
        Loader {
            shared: self.shared.clone(),
            prefix: self.path(&name.to_string()),
        }
    }

    /// Full checkpoint name of `name` under this prefix (the prefix itself for an empty one).
    pub fn path(&self, name: &str) -> String {
        match (self.prefix.is_empty(), name.is_empty()) {
            (true, _) => name.to_string(),
            (_, true) => self.prefix.clone(),
            _ => format!("{}.{name}", self.prefix),
        }
    }

    /// The GPU that the weights go to.
    pub fn gpu(&self) -> &Gpu {
        &self.shared.gpu
    }

    /// The loading options.
    pub fn options(&self) -> &LoadOptions {
        &self.shared.options
    }

    /// Dtype of activations.
    pub fn activations(&self) -> DType {
        self.shared.options.activations
    }

    /// Every trainable tensor handed out so far, by any loader of this family.
    pub fn parameters(&self) -> Parameters {
        self.shared.parameters.clone()
    }

    /// Whether the checkpoint has `name` under this prefix; always true without a checkpoint.
    pub fn has(&self, name: &str) -> bool {
        let checkpoint = self.shared.checkpoint.as_ref();
        checkpoint.is_none_or(|c| c.contains(&self.path(name)))
    }

    fn random_values(&self, count: usize, init: Init) -> Vec<f32> {
        let mut rng = self.shared.rng.borrow_mut();
        let mut uniform = || rng.random_range(f32::EPSILON..1.0f32);
        (0..count)
            .map(|_| match init {
                Init::Zeros => 0.0,
                Init::Ones => 1.0,
                Init::Constant(value) => value,
                Init::Uniform(bound) => (2.0 * uniform() - 1.0) * bound,
                Init::Normal(std) => {
                    // Box–Muller.
                    let (u, v) = (uniform(), uniform());
                    std * (-2.0 * u.ln()).sqrt() * (std::f32::consts::TAU * v).cos()
                }
            })
            .collect()
    }

    /// A tensor that stays in f32: norms, biases, embeddings of positions, gates.
    ///
    /// # Errors
    /// A missing tensor or another shape, naming file, tensor, found and expected.
    pub fn vector(&self, name: &str, shape: &[usize], init: Init) -> Result<Var> {
        let full = self.path(name);
        let value = match &self.shared.checkpoint {
            Some(checkpoint) => checkpoint.tensor_f32(self.gpu(), &full, shape)?,
            None => {
                let values = self.random_values(elements(shape), init);
                Tensor::from_f32(self.gpu(), &values, shape)
            }
        };
        Ok(self.register(full, value, Layout::Plain))
    }

    /// A matrix used as an operand of products or as an embedding table: kept in the file's dtype
    /// while frozen (f16 with f16 activations), f32 while trained.
    ///
    /// # Errors
    /// As [`Loader::vector`].
    pub fn matrix(&self, name: &str, shape: &[usize], init: Init) -> Result<Var> {
        let (checkpoint, options) = (&self.shared.checkpoint, &self.shared.options);
        let full = self.path(name);
        let (Some(checkpoint), false) = (checkpoint, self.trains(&full)) else {
            return self.vector(name, shape, init);
        };
        let mut value = checkpoint.tensor(self.gpu(), &full, shape)?;
        if options.activations == DType::F16 && value.dtype() == DType::F32 {
            value = cast(&value, DType::F16);
        }
        Ok(Var::constant(value))
    }

    /// How the linear layer at this prefix holds its weight: as the options say, but the output projection `lm_head`
    /// as the file does, as bitsandbytes and PEFT leave it. Embeddings, also tied ones, norms, biases, convolutions
    /// and gates are no linear layers; those of the vision tower and of the connector are.
    pub fn quantization(&self) -> Option<Quantization> {
        let head = self.prefix.rsplit('.').next() == Some("lm_head");
        self.shared.options.quantize.filter(|_| !head)
    }

    /// A frozen matrix [outputs, inputs], quantised on the CPU while it is read.
    ///
    /// # Errors
    /// As [`Loader::vector`]; options that would train it; weights that are not finite.
    pub fn quantized(
        &self,
        name: &str,
        shape: [usize; 2],
        init: Init,
        kind: Quantization,
    ) -> Result<QuantizedMatrix> {
        let full = self.path(name);
        if self.trains(&full) {
            return Err(Error::Config(format!(
                "model.quantize: `{full}` would be trained, but quantised weights are frozen;                  train a LoRA adapter beside them, or set model.quantize = \"none\""
            )));
        }
        let Some(checkpoint) = &self.shared.checkpoint else {
            let values = self.random_values(elements(&shape), init);
            let made = QuantizedMatrix::from_f32(self.gpu(), &values, shape, kind);
            return Ok(made.expect("initial values are finite"));
        };
        let (bytes, dtype) = checkpoint.bytes_of(&full, &shape)?;
        QuantizedMatrix::from_bytes(self.gpu(), bytes, dtype, shape, kind).ok_or_else(|| {
            let message = "has values that are not finite, which have no scale; \
                           repair the checkpoint, or set model.quantize = \"none\"";
            Error::tensor(checkpoint.path(), &full, message)
        })
    }

    /// A convolution weight, stored [out, in, height, width], held [height, width, in, out].
    ///
    /// # Errors
    /// As [`Loader::vector`].
    pub fn convolution(&self, name: &str, shape: [usize; 4], init: Init) -> Result<Var> {
        let [co, ci, kh, kw] = shape;
        let full = self.path(name);
        let options = &self.shared.options;
        let values = match &self.shared.checkpoint {
            Some(checkpoint) if !options.trainable && self.gpu().tier().f16 => {
                // On the device: a billion values one by one take half a minute.
                let stored = checkpoint.tensor(self.gpu(), &full, &shape)?;
                let held = permute(&stored, &[2, 3, 1, 0]);
                return Ok(Var::constant(cast(&held, options.activations)));
            }
            Some(checkpoint) => checkpoint.values_of(&full, &shape)?,
            None => self.random_values(elements(&shape), init),
        };
        let held = from_checkpoint(&values, shape);
        let dtype = match self.trains(&full) {
            true => DType::F32,
            false => options.activations,
        };
        let value = Tensor::from_bytes(self.gpu(), &dtype.narrow(&held), dtype, &[kh, kw, ci, co]);
        Ok(self.register(full, value, Layout::Convolution))
    }

    /// Whether the weight `name` is a leaf with a gradient.
    fn trains(&self, name: &str) -> bool {
        let options = &self.shared.options;
        options.trainable && !options.freeze.matches(name)
    }

    fn register(&self, name: String, value: Tensor, layout: Layout) -> Var {
        if !self.trains(&name) {
            return Var::constant(value);
        }
        let var = Var::parameter(value);
        self.shared.parameters.push(Parameter {
            name,
            var: var.clone(),
            layout,
            kind: Kind::Base,
        });
        var
    }

    /// A new LoRA factor `<this prefix>.<name>` with random initial values.
    pub(super) fn lora_factor(&self, name: &str, shape: &[usize], init: Init) -> Var {
        let values = self.random_values(elements(shape), init);
        self.lora_parameter(name, Tensor::from_f32(self.gpu(), &values, shape))
    }

    /// A new tensor of a LoRA adapter, `<this prefix>.<name>`.
    pub(super) fn lora_parameter(&self, name: &str, value: Tensor) -> Var {
        let var = Var::parameter(value);
        self.shared.parameters.push(Parameter {
            name: self.path(name),
            var: var.clone(),
            layout: Layout::Plain,
            kind: Kind::Lora,
        });
        var
    }
}
