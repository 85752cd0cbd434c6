//! The trainable tensors of a model by checkpoint name.

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

use crate::autograd::Var;
use crate::error::Result;
use crate::tensor::{Checkpoint, DType, HostTensor, Tensor, save_safetensors};

/// How a tensor lies in memory against how the checkpoint stores it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// As stored.
    Plain,
    /// Stored [out, in, height, width], held [height, width, in, out].
    Convolution,
}

/// What a trainable tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A weight of the model itself.
    Base,
    /// A low-rank factor beside a frozen weight.
    Lora,
}

/// One trainable tensor.
#[derive(Clone)]
pub struct Parameter {
    /// Its name in the checkpoint (for LoRA: `<module>.lora_A.weight`).
    pub name: String,
    /// The leaf on the tape.
    pub var: Var,
    /// Memory layout.
    pub layout: Layout,
    /// Base weight or LoRA factor.
    pub kind: Kind,
}

impl Parameter {
    /// The weight as the checkpoint stores it, with its shape there; waits for the device.
    ///
    /// # Errors
    /// A GPU error while reading back.
    pub fn values(&self) -> Result<(Vec<f32>, Vec<usize>)> {
        let values = self.var.value().to_f32()?;
        Ok(match self.layout {
            Layout::Plain => (values, self.var.shape().to_vec()),
            Layout::Convolution => to_checkpoint(&values, self.var.value()),
        })
    }

    /// Overwrites the weight with the tensor of its name in `checkpoint`, stored as the layout says.
    ///
    /// # Errors
    /// A missing tensor or another shape.
    pub fn restore(&self, checkpoint: &Checkpoint) -> Result<()> {
        let value = self.var.value();
        let held = match self.layout {
            Layout::Plain => checkpoint.values_of(&self.name, value.shape())?,
            Layout::Convolution => {
                let [kh, kw, ci, co] = *value.shape() else {
                    panic!("a convolution weight has four dimensions: {value:?}")
                };
                let shape = [co, ci, kh, kw];
                from_checkpoint(&checkpoint.values_of(&self.name, &shape)?, shape)
            }
        };
        value.write_f32(&held);
        Ok(())
    }
}

/// The trainable tensors of a model, in the order they were made; clones share the list.
#[derive(Clone, Default)]
pub struct Parameters(Rc<RefCell<Vec<Parameter>>>);

impl Parameters {
    /// Adds one.
    pub fn push(&self, parameter: Parameter) {
        self.0.borrow_mut().push(parameter);
    }

    /// All of them.
    pub fn all(&self) -> Vec<Parameter> {
        self.0.borrow().clone()
    }

    /// Number of scalar weights.
    pub fn elements(&self) -> usize {
        let all = self.0.borrow();
        all.iter().map(|p| p.var.value().elements()).sum()
    }

    /// Writes the base weights to `path` as the checkpoint stores them, in `dtype`.
    ///
    /// # Errors
    /// A GPU error while reading back, or a file that cannot be written.
    pub fn save(&self, path: &Path, dtype: DType) -> Result<()> {
        let mut tensors = Vec::new();
        for p in self.0.borrow().iter().filter(|p| p.kind == Kind::Base) {
            let (values, shape) = p.values()?;
            tensors.push((p.name.clone(), HostTensor::float(dtype, &shape, &values)));
        }
        let metadata = [("format".to_string(), "pt".to_string())];
        save_safetensors(path, &tensors, Some(metadata.into()))
    }
}

/// [kh, kw, in, out] values as [out, in, kh, kw].
fn to_checkpoint(values: &[f32], tensor: &Tensor) -> (Vec<f32>, Vec<usize>) {
    let [kh, kw, ci, co] = *tensor.shape() else {
        panic!("a convolution weight has four dimensions: {tensor:?}")
    };
    let mut out = vec![0.0; values.len()];
    for (i, &v) in values.iter().enumerate() {
        let (o, i) = (i % co, i / co);
        let (c, i) = (i % ci, i / ci);
        out[((o * ci + c) * kh + i / kw) * kw + i % kw] = v;
    }
    (out, vec![co, ci, kh, kw])
}

/// [out, in, kh, kw] values as [kh, kw, in, out].
pub(super) fn from_checkpoint(values: &[f32], shape: [usize; 4]) -> Vec<f32> {
    let [co, ci, kh, kw] = shape;
    let mut out = vec![0.0; values.len()];
    for (i, &v) in values.iter().enumerate() {
        let (x, i) = (i % kw, i / kw);
        let (y, i) = (i % kh, i / kh);
        let (c, o) = (i % ci, i / ci);
        out[((y * kw + x) * ci + c) * co + o] = v;
    }
    out
}
