//! Arithmetic, reductions and layout on [`Var`].

use super::Var;
use crate::ops::binary::{Binary, binary, binary_backward};
use crate::ops::cast::cast;
use crate::ops::concat::concat;
use crate::ops::gather_rows::{gather_rows, scatter_add_rows};
use crate::ops::permute::{inverse_order, permute};
use crate::ops::reduce::{Reduce, reduce, reduce_backward};
use crate::ops::replace_rows::{replace_rows, replace_rows_backward};
use crate::ops::slice::{pad_slice, slice};
use crate::ops::unary::{Unary, unary, unary_backward};
use crate::tensor::{DType, Tensor};

fn scaled(x: &Tensor, scale: f32) -> Tensor {
    unary(x, Unary::Affine(scale, 0.0))
}

impl Var {
    /// An elementwise function.
    pub fn unary(&self, function: Unary) -> Var {
        let x = self.value().clone();
        let y = unary(&x, function);
        Var::from_op("unary", y, &[self], move |dy, _| {
            vec![Some(unary_backward(&x, dy, function))]
        })
    }

    /// self·scale.
    pub fn scale(&self, scale: f32) -> Var {
        let y = scaled(self.value(), scale);
        Var::from_op("scale", y, &[self], move |dy, _| {
            vec![Some(scaled(dy, scale))]
        })
    }

    /// self + shift.
    pub fn add_scalar(&self, shift: f32) -> Var {
        let y = unary(self.value(), Unary::Affine(1.0, shift));
        Var::from_op("add_scalar", y, &[self], |dy, _| vec![Some(dy.clone())])
    }

    /// x·σ(x).
    pub fn silu(&self) -> Var {
        self.unary(Unary::Silu)
    }

    /// Hyperbolic tangent.
    pub fn tanh(&self) -> Var {
        self.unary(Unary::Tanh)
    }

    /// x².
    pub fn square(&self) -> Var {
        self.unary(Unary::Square)
    }

    fn binary(&self, op: &'static str, other: &Var, function: Binary) -> Var {
        let (a, b) = (self.value().clone(), other.value().clone());
        let y = binary(&a, &b, function);
        Var::from_op(op, y, &[self, other], move |dy, needs| {
            binary_backward(&a, &b, dy, function, [needs[0], needs[1]]).to_vec()
        })
    }

    /// self + other, broadcasting.
    pub fn add(&self, other: &Var) -> Var {
        self.binary("add", other, Binary::Add)
    }

    /// self − other, broadcasting.
    pub fn sub(&self, other: &Var) -> Var {
        self.binary("sub", other, Binary::Sub)
    }

    /// self·other, broadcasting.
    pub fn mul(&self, other: &Var) -> Var {
        self.binary("mul", other, Binary::Mul)
    }

    /// self / other, broadcasting.
    pub fn div(&self, other: &Var) -> Var {
        self.binary("div", other, Binary::Div)
    }

    fn reduced(&self, op: &'static str, axes: &[usize], function: Reduce, keep: bool) -> Var {
        let (x, axes) = (self.value().clone(), axes.to_vec());
        let y = reduce(&x, &axes, function, keep);
        Var::from_op(op, y, &[self], move |dy, _| {
            vec![Some(reduce_backward(&x, dy, &axes, function))]
        })
    }

    /// Sum over `axes`, which stay as size 1 with `keep`.
    pub fn sum(&self, axes: &[usize], keep: bool) -> Var {
        self.reduced("sum", axes, Reduce::Sum, keep)
    }

    /// Mean over `axes`.
    pub fn mean(&self, axes: &[usize], keep: bool) -> Var {
        self.reduced("mean", axes, Reduce::Mean, keep)
    }

    /// Maximum over `axes`; the gradient goes to the first maximum.
    pub fn max(&self, axes: &[usize], keep: bool) -> Var {
        self.reduced("max", axes, Reduce::Max, keep)
    }

    /// Minimum over `axes`; the gradient goes to the first minimum.
    pub fn min(&self, axes: &[usize], keep: bool) -> Var {
        self.reduced("min", axes, Reduce::Min, keep)
    }

    /// Mean over everything, a scalar of shape `[1]`.
    pub fn mean_all(&self) -> Var {
        let n = self.value().elements();
        self.reshape(&[n]).mean(&[0], true)
    }

    /// Sum over everything, a scalar of shape `[1]`.
    pub fn sum_all(&self) -> Var {
        let n = self.value().elements();
        self.reshape(&[n]).sum(&[0], true)
    }

    /// The same elements under another shape.
    pub fn reshape(&self, shape: &[usize]) -> Var {
        let before = self.shape().to_vec();
        Var::from_op(
            "reshape",
            self.value().reshape(shape),
            &[self],
            move |dy, _| vec![Some(dy.reshape(&before))],
        )
    }

    /// Dimension `i` of the result is dimension `order[i]`.
    pub fn permute(&self, order: &[usize]) -> Var {
        let inverse = inverse_order(order);
        Var::from_op(
            "permute",
            permute(self.value(), order),
            &[self],
            move |dy, _| vec![Some(permute(dy, &inverse))],
        )
    }

    /// Elements `start .. start + len` of `axis`.
    pub fn narrow(&self, axis: usize, start: usize, len: usize) -> Var {
        let n = self.dim(axis);
        let y = slice(self.value(), axis, start, len);
        Var::from_op("narrow", y, &[self], move |dy, _| {
            vec![Some(pad_slice(dy, axis, start, n))]
        })
    }

    /// The inputs one after another along `axis`.
    pub fn concat(inputs: &[Var], axis: usize) -> Var {
        let values: Vec<&Tensor> = inputs.iter().map(Var::value).collect();
        let lengths: Vec<usize> = inputs.iter().map(|v| v.dim(axis)).collect();
        let parents: Vec<&Var> = inputs.iter().collect();
        Var::from_op(
            "concat",
            concat(&values, axis),
            &parents,
            move |dy, needs| {
                let mut start = 0;
                let mut part = |(&len, &needed): (&usize, &bool)| {
                    start += len;
                    needed.then(|| slice(dy, axis, start - len, len))
                };
                lengths.iter().zip(needs).map(&mut part).collect()
            },
        )
    }

    /// Rows `rows` (u32 `[R]`) of self [N, D]: [R, D].
    pub fn gather_rows(&self, rows: &Tensor) -> Var {
        let (n, rows) = (self.dim(0), rows.clone());
        let y = gather_rows(self.value(), &rows);
        Var::from_op("gather_rows", y, &[self], move |dy, _| {
            vec![Some(scatter_add_rows(dy, &rows, n))]
        })
    }

    /// self [N, D] with rows `rows` (u32 `[R]`, distinct) replaced by `source` [R, D].
    pub fn replace_rows(&self, rows: &Tensor, source: &Var) -> Var {
        let y = replace_rows(self.value(), rows, source.value());
        let rows = rows.clone();
        Var::from_op("replace_rows", y, &[self, source], move |dy, needs| {
            let (dx, dsource) = replace_rows_backward(dy, &rows);
            vec![needs[0].then_some(dx), needs[1].then_some(dsource)]
        })
    }

    /// The values as another float dtype.
    pub fn cast(&self, dtype: DType) -> Var {
        let before = self.dtype();
        if before == dtype {
            return self.clone();
        }
        Var::from_op("cast", cast(self.value(), dtype), &[self], move |dy, _| {
            vec![Some(cast(dy, before))]
        })
    }
}
