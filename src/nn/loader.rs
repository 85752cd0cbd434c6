//! Where layers get their weights from: a checkpoint, or a seeded initialisation.

use std::cell::RefCell;
use std::rc::Rc;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::lora::LoraConfig;
use super::parameters::{Kind, Layout, Parameter, Parameters, from_checkpoint};
use crate::autograd::Var;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::ops::cast::cast;
use crate::ops::permute::permute;
use crate::tensor::{Checkpoint, DType, Tensor, elements};

/// How to load a model's weights.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Make every weight a leaf with a gradient, held in f32.
    pub trainable: bool,
    /// Put LoRA factors beside the matching linear layers.
    pub lora: Option<LoraConfig>,
    /// Dtype of the activations: f32 or f16. With f16, frozen f32 matrices are held as f16 too.
    pub activations: DType,
    /// Seed of random initialisation and dropout.
    pub seed: u64,
}

impl Default for LoadOptions {
    fn default() -> Self {
        LoadOptions {
            trainable: false,
            lora: None,
            activations: DType::F32,
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
        let (Some(checkpoint), false) = (checkpoint, options.trainable) else {
            return self.vector(name, shape, init);
        };
        let full = self.path(name);
        let mut value = checkpoint.tensor(self.gpu(), &full, shape)?;
        if options.activations == DType::F16 && value.dtype() == DType::F32 {
            value = cast(&value, DType::F16);
        }
        Ok(Var::constant(value))
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
        let dtype = match options.trainable {
            true => DType::F32,
            false => options.activations,
        };
        let value = Tensor::from_bytes(self.gpu(), &dtype.narrow(&held), dtype, &[kh, kw, ci, co]);
        Ok(self.register(full, value, Layout::Convolution))
    }

    fn register(&self, name: String, value: Tensor, layout: Layout) -> Var {
        if !self.shared.options.trainable {
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
        let var = Var::parameter(Tensor::from_f32(self.gpu(), &values, shape));
        self.shared.parameters.push(Parameter {
            name: self.path(name),
            var: var.clone(),
            layout: Layout::Plain,
            kind: Kind::Lora,
        });
        var
    }
}
