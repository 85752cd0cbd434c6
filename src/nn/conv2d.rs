//! Channels-last convolutions.

use super::loader::{Init, Loader};
use crate::autograd::{Var, enter_layer};
use crate::error::Result;
use crate::ops::conv2d::Conv2dOptions;

/// A square convolution over [batch, height, width, channels].
pub struct Conv2d {
    name: String,
    weight: Var,
    bias: Option<Var>,
    options: Conv2dOptions,
}

impl Conv2d {
    /// Loads `weight` [outputs, inputs, kernel, kernel] and, where asked, `bias` `[outputs]`;
    /// `padding` is [top, bottom, left, right].
    ///
    /// # Errors
    /// A missing tensor or another shape.
    pub fn load(
        loader: &Loader,
        [inputs, outputs, kernel]: [usize; 3],
        stride: usize,
        padding: [usize; 4],
        bias: bool,
    ) -> Result<Conv2d> {
        let init = Init::Uniform(1.0 / ((inputs * kernel * kernel) as f32).sqrt());
        Ok(Conv2d {
            name: loader.path(""),
            weight: loader.convolution("weight", [outputs, inputs, kernel, kernel], init)?,
            bias: match bias {
                true => Some(loader.vector("bias", &[outputs], Init::Zeros)?),
                false => None,
            },
            options: Conv2dOptions { stride, padding },
        })
    }

    /// x [batch, height, width, inputs] → [batch, height', width', outputs].
    pub fn forward(&self, x: &Var) -> Var {
        enter_layer(&self.name);
        x.conv2d(&self.weight, self.bias.as_ref(), self.options)
    }
}
