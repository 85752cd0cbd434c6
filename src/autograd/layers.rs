//! Products, convolutions, norms and losses on [`Var`].

use super::Var;
use super::var::recording;
use crate::ops::binary::{Binary, binary, broadcast_to};
use crate::ops::cast::cast;
use crate::ops::conv2d::{Conv2dOptions, conv2d, conv2d_grad_input, conv2d_grad_weight};
use crate::ops::cross_entropy::{CrossEntropy, cross_entropy, cross_entropy_backward};
use crate::ops::embedding::{embedding, embedding_backward};
use crate::ops::group_norm::{group_norm, group_norm_backward};
use crate::ops::layer_norm::{layer_norm, layer_norm_backward};
use crate::ops::linear_cross_entropy::{LinearCrossEntropy, linear_cross_entropy};
use crate::ops::matmul::{MatmulOptions, matmul, matmul_quantized};
use crate::ops::reduce::{Reduce, reduce, reduce_as};
use crate::ops::resize_bilinear::{resize_bilinear, resize_bilinear_backward};
use crate::ops::rms_norm::{rms_norm, rms_norm_backward};
use crate::ops::rotary::{rotary, rotary_backward};
use crate::ops::softmax::{softmax, softmax_backward};
use crate::ops::swiglu::{swiglu as swiglu_op, swiglu_backward};
use crate::ops::unary::{Unary, unary};
use crate::ops::upsample_nearest2x::{upsample_nearest2x, upsample_nearest2x_backward};
use crate::tensor::{DType, QuantizedMatrix, Tensor};

/// Sum over all but the last dimension, as f32 [last].
fn sum_rows(x: &Tensor) -> Tensor {
    let n = x.last_dim();
    let rows = x.reshape(&[x.elements() / n, n]);
    reduce_as(&rows, &[0], Reduce::Sum, false, DType::F32)
}

impl Var {
    /// self [.., M, K] · other [.., K, N], an unbatched `other` shared by all batches.
    pub fn matmul(&self, other: &Var) -> Var {
        self.product(other, false)
    }

    /// self [.., M, K] · otherᵀ, other [.., N, K].
    pub fn matmul_t(&self, other: &Var) -> Var {
        self.product(other, true)
    }

    fn product(&self, other: &Var, trans_b: bool) -> Var {
        let (a, b) = (self.value().clone(), other.value().clone());
        let y = matmul(
            &a,
            &b,
            &MatmulOptions {
                trans_b,
                ..Default::default()
            },
        );
        Var::from_op("matmul", y, &[self, other], move |dy, needs| {
            let da = needs[0].then(|| {
                let options = MatmulOptions {
                    trans_b: !trans_b,
                    ..Default::default()
                };
                matmul(dy, &b, &options)
            });
            let db = needs[1].then(|| grad_right(&a, dy, &b, trans_b));
            vec![da, db]
        })
    }

    /// self [.., in] · weightᵀ + bias, weight [out, in], bias f32 `[out]`.
    pub fn linear(&self, weight: &Var, bias: Option<&Var>) -> Var {
        let (x, w) = (self.value().clone(), weight.value().clone());
        let options = MatmulOptions {
            trans_b: true,
            bias: bias.map(Var::value),
            ..Default::default()
        };
        let y = matmul(&x, &w, &options);
        let parents: Vec<&Var> = [self, weight].into_iter().chain(bias).collect();
        Var::from_op("linear", y, &parents, move |dy, needs| {
            let dx = needs[0].then(|| matmul(dy, &w, &MatmulOptions::default()));
            let dw = needs[1].then(|| grad_right(&x, dy, &w, true));
            let mut grads = vec![dx, dw];
            if let Some(&needed) = needs.get(2) {
                grads.push(needed.then(|| sum_rows(dy)));
            }
            grads
        })
    }

    /// [`Var::linear`] with a quantised weight, which is frozen.
    pub fn linear_quantized(&self, weight: &QuantizedMatrix, bias: Option<&Var>) -> Var {
        let w = weight.clone();
        let options = MatmulOptions {
            trans_b: true,
            bias: bias.map(Var::value),
            ..Default::default()
        };
        let y = matmul_quantized(self.value(), &w, &options);
        let parents: Vec<&Var> = [self].into_iter().chain(bias).collect();
        Var::from_op("linear_quantized", y, &parents, move |dy, needs| {
            let dx = needs[0].then(|| matmul_quantized(dy, &w, &MatmulOptions::default()));
            let mut grads = vec![dx];
            if let Some(&needed) = needs.get(1) {
                grads.push(needed.then(|| sum_rows(dy)));
            }
            grads
        })
    }

    /// Channels-last convolution: self [B, H, W, Ci], weight [kh, kw, Ci, Co], bias f32 `[Co]`.
    pub fn conv2d(&self, weight: &Var, bias: Option<&Var>, options: Conv2dOptions) -> Var {
        let (x, w) = (self.value().clone(), weight.value().clone());
        let y = conv2d(&x, &w, bias.map(Var::value), &options);
        let parents: Vec<&Var> = [self, weight].into_iter().chain(bias).collect();
        Var::from_op("conv2d", y, &parents, move |dy, needs| {
            let dx = needs[0].then(|| conv2d_grad_input(dy, &w, x.shape(), &options));
            let dw = needs[1].then(|| conv2d_grad_weight(&x, dy, w.dim(0), w.dim(1), &options));
            let mut grads = vec![dx, dw];
            if let Some(&needed) = needs.get(2) {
                grads.push(needed.then(|| sum_rows(dy)));
            }
            grads
        })
    }

    /// Layer norm over the last dimension; weight, bias f32 `[last]`.
    pub fn layer_norm(&self, weight: &Var, bias: &Var, eps: f32) -> Var {
        let (x, w) = (self.value().clone(), weight.value().clone());
        let y = layer_norm(&x, Some(&w), Some(bias.value()), eps);
        Var::from_op("layer_norm", y, &[self, weight, bias], move |dy, needs| {
            let g = layer_norm_backward(&x, Some(&w), dy, eps, needs[1] || needs[2]);
            vec![Some(g.dx), g.dweight, g.dbias]
        })
    }

    /// Root-mean-square norm over the last dimension; weight f32 `[last]`.
    pub fn rms_norm(&self, weight: &Var, eps: f32) -> Var {
        let (x, w) = (self.value().clone(), weight.value().clone());
        let y = rms_norm(&x, Some(&w), eps);
        Var::from_op("rms_norm", y, &[self, weight], move |dy, needs| {
            let g = rms_norm_backward(&x, Some(&w), dy, eps, needs[1]);
            vec![Some(g.dx), g.dweight]
        })
    }

    /// Group norm over channels-last self [B, .., C]; weight, bias f32 `[C]`.
    pub fn group_norm(&self, groups: usize, weight: &Var, bias: &Var, eps: f32) -> Var {
        let (x, w) = (self.value().clone(), weight.value().clone());
        let y = group_norm(&x, groups, Some(&w), Some(bias.value()), eps);
        Var::from_op("group_norm", y, &[self, weight, bias], move |dy, needs| {
            let affine = needs[1] || needs[2];
            let g = group_norm_backward(&x, groups, Some(&w), dy, eps, affine);
            vec![Some(g.dx), g.dweight, g.dbias]
        })
    }

    /// Instance norm without affine over channels-last self [B, .., C] (biased variance).
    pub fn instance_norm(&self, eps: f32) -> Var {
        let x = self.value().clone();
        let channels = x.last_dim();
        let y = group_norm(&x, channels, None, None, eps);
        Var::from_op("instance_norm", y, &[self], move |dy, _| {
            vec![Some(
                group_norm_backward(&x, channels, None, dy, eps, false).dx,
            )]
        })
    }

    /// Softmax over the last dimension.
    pub fn softmax(&self) -> Var {
        let y = softmax(self.value());
        let saved = y.clone();
        Var::from_op("softmax", y, &[self], move |dy, _| {
            vec![Some(softmax_backward(&saved, dy))]
        })
    }

    /// Rows of `table` [V, D] for ids u32 [..]: [.., D], in the table's dtype or `dtype`.
    pub fn embedding(table: &Var, ids: &Tensor, dtype: DType) -> Var {
        let (vocabulary, ids) = (table.dim(0), ids.clone());
        let y = embedding(table.value(), &ids, dtype);
        Var::from_op("embedding", y, &[table], move |dy, _| {
            vec![Some(embedding_backward(dy, &ids, vocabulary))]
        })
    }

    /// Rotary position embedding of self [B, T, heads·D] by half rotation; cos, sin f32 [B or 1, T, D/2].
    pub fn rotary(&self, cos: &Tensor, sin: &Tensor, heads: usize) -> Var {
        let (cos, sin) = (cos.clone(), sin.clone());
        let y = rotary(self.value(), &cos, &sin, heads);
        Var::from_op("rotary", y, &[self], move |dy, _| {
            vec![Some(rotary_backward(dy, &cos, &sin, heads))]
        })
    }

    /// Nearest-neighbour doubling of self [B, H, W, C].
    pub fn upsample_nearest2x(&self) -> Var {
        let y = upsample_nearest2x(self.value());
        Var::from_op("upsample_nearest2x", y, &[self], |dy, _| {
            vec![Some(upsample_nearest2x_backward(dy))]
        })
    }

    /// Bilinear resize of self [N, H, W, C], half-pixel centres, no antialiasing.
    pub fn resize_bilinear(&self, height: usize, width: usize) -> Var {
        let (h, w) = (self.dim(1), self.dim(2));
        if (h, w) == (height, width) {
            return self.clone();
        }
        let y = resize_bilinear(self.value(), height, width);
        Var::from_op("resize_bilinear", y, &[self], move |dy, _| {
            vec![Some(resize_bilinear_backward(dy, h, w))]
        })
    }

    /// Mean next-token loss of logits [N, V] over the rows whose label is not
    /// [`crate::ops::cross_entropy::IGNORE`]; labels u32 `[N]`, `count` of them counted. A scalar `[1]`.
    pub fn cross_entropy(&self, labels: &Tensor, count: usize) -> Var {
        let (logits, labels) = (self.value().clone(), labels.clone());
        let CrossEntropy { loss, lse } = cross_entropy(&logits, &labels);
        let scale = 1.0 / count.max(1) as f32;
        let sum = reduce(&loss, &[0], Reduce::Sum, true);
        let mean = unary(&sum, Unary::Affine(scale, 0.0));
        Var::from_op("cross_entropy", mean, &[self], move |dy, _| {
            let upstream = broadcast_to(&unary(dy, Unary::Affine(scale, 0.0)), loss.shape());
            vec![Some(cross_entropy_backward(
                &logits, &labels, &lse, &upstream,
            ))]
        })
    }

    /// [`Var::cross_entropy`] of the logits self · weightᵀ, which are never all stored: self [N, in], weight
    /// [vocabulary, in]. The gradients are computed with the loss.
    pub fn linear_cross_entropy(&self, weight: &Var, labels: &Tensor, count: usize) -> Var {
        let needs = [self, weight].map(|v| recording() && v.needs_grad());
        let factor = 1.0 / count.max(1) as f32;
        let LinearCrossEntropy { loss, dx, dw } =
            linear_cross_entropy(self.value(), weight.value(), labels, factor, needs);
        let dtypes = [self.dtype(), grad_dtype(weight.value())];
        Var::from_op(
            "linear_cross_entropy",
            loss,
            &[self, weight],
            move |dy, _| {
                let scaled = |(g, dtype): (Option<Tensor>, _)| {
                    g.map(|g| cast(&binary(&g, dy, Binary::Mul), dtype))
                };
                [dx, dw].into_iter().zip(dtypes).map(scaled).collect()
            },
        )
    }
}

/// Gradient of the right operand: aᵀ·dy, or dyᵀ·a where it was transposed; batches that shared an
/// unbatched operand are summed.
fn grad_right(a: &Tensor, dy: &Tensor, b: &Tensor, trans_b: bool) -> Tensor {
    let options = MatmulOptions {
        trans_a: true,
        output: Some(grad_dtype(b)),
        ..Default::default()
    };
    let flat = |t: &Tensor| t.reshape(&[t.elements() / t.last_dim(), t.last_dim()]);
    let (a, dy) = match b.rank() == 2 {
        true => (flat(a), flat(dy)),
        false => (a.clone(), dy.clone()),
    };
    match trans_b {
        true => matmul(&dy, &a, &options),
        false => matmul(&a, &dy, &options),
    }
}

/// The dtype of a weight's gradient: trainable weights get f32.
fn grad_dtype(weight: &Tensor) -> DType {
    match weight.dtype() {
        DType::F16 => DType::F16,
        _ => DType::F32,
    }
}

/// silu(gate)·up.
pub fn swiglu(gate: &Var, up: &Var) -> Var {
    let (g, u) = (gate.value().clone(), up.value().clone());
    Var::from_op("swiglu", swiglu_op(&g, &u), &[gate, up], move |dy, _| {
        let (dg, du) = swiglu_backward(&g, &u, dy);
        vec![Some(dg), Some(du)]
    })
}
