//! Products, convolutions, norms and losses on [`Var`].

use super::var::{Earlier, recording};
use super::{Gradients, Var};
use crate::ops::binary::{Binary, binary, broadcast_to};
use crate::ops::cast::cast;
use crate::ops::conv2d::{Conv2dOptions, conv2d, conv2d_grad_input, conv2d_grad_weight};
use crate::ops::cross_entropy::{CrossEntropy, cross_entropy, cross_entropy_backward};
use crate::ops::embedding::{embedding, embedding_backward};
use crate::ops::geglu::{geglu, geglu_backward};
use crate::ops::group_norm::{GroupNorm, group_norm, group_norm_backward};
use crate::ops::layer_norm::{layer_norm, layer_norm_backward};
use crate::ops::linear_cross_entropy::{LinearCrossEntropy, linear_cross_entropy};
use crate::ops::matmul::{Ending, MatmulOptions, matmul, matmul_quantized};
use crate::ops::reduce::{Reduce, reduce, reduce_as};
use crate::ops::resize_bilinear::{resize_bilinear, resize_bilinear_backward};
use crate::ops::rms_norm::{rms_norm, rms_norm_backward};
use crate::ops::rotary::{rotary, rotary_backward, rotary_pair, rotary_pair_backward};
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
        self.linear_onto(weight, bias, None)
    }

    /// [`Var::linear`] + `onto` [.., out] where given, in one kernel.
    pub fn linear_onto(&self, weight: &Var, bias: Option<&Var>, onto: Option<&Var>) -> Var {
        let (x, w) = (self.value().clone(), weight.value().clone());
        let y = matmul(&x, &w, &linear_options(bias, onto));
        let has_bias = bias.is_some();
        let added = bias.into_iter().chain(onto);
        let parents: Vec<&Var> = [self, weight].into_iter().chain(added).collect();
        Var::from_accumulating_op("linear", y, &parents, move |dy, needs, earlier| {
            let dx = needs[0].then(|| {
                let earlier = earlier[0].take();
                matmul(dy, &w, &on_top_of(earlier.as_ref()))
            });
            let dw = needs[1].then(|| grad_right(&x, dy, &w, true));
            let mut grads = vec![dx, dw];
            grads.extend(added_gradients(has_bias, dy, &needs[2..]));
            grads
        })
    }

    /// [`swiglu`] of `gate` [.., out] and [`Var::linear`]; one kernel where nothing needs a gradient.
    pub fn linear_gated(&self, weight: &Var, bias: Option<&Var>, gate: &Var) -> Var {
        let inputs = [self, weight, gate];
        if recording() && inputs.into_iter().chain(bias).any(Var::needs_grad) {
            return swiglu(gate, &self.linear(weight, bias));
        }
        let options = gated_options(bias, gate);
        let y = matmul(self.value(), weight.value(), &options);
        Var::from_op("linear_gated", y, &[], |_, _| Vec::new())
    }

    /// [`Var::linear_gated`] with a quantised weight, which is frozen.
    pub fn linear_quantized_gated(
        &self,
        weight: &QuantizedMatrix,
        bias: Option<&Var>,
        gate: &Var,
    ) -> Var {
        if recording() && [self, gate].into_iter().chain(bias).any(Var::needs_grad) {
            return swiglu(gate, &self.linear_quantized(weight, bias, None));
        }
        let y = matmul_quantized(self.value(), weight, &gated_options(bias, gate));
        Var::from_op("linear_gated", y, &[], |_, _| Vec::new())
    }

    /// onto + scale · (self · aᵀ) · bᵀ, a [rank, in], b [out, rank]: a low-rank update of a linear layer's output `onto`
    /// [.., out]. The scale goes into the narrow products.
    pub fn low_rank_onto(&self, a: &Var, b: &Var, scale: f32, onto: &Var) -> Var {
        let (x, [av, bv]) = (self.value().clone(), [a, b].map(|v| v.value().clone()));
        let scaled = Some(Unary::Affine(scale, 0.0));
        let down = MatmulOptions {
            trans_b: true,
            activation: scaled,
            ..Default::default()
        };
        let inner = matmul(&x, &av, &down);
        let y = matmul(&inner, &bv, &linear_options(None, Some(onto)));
        let parents = [self, a, b, onto];
        Var::from_accumulating_op("low_rank", y, &parents, move |dy, needs, earlier| {
            let back = MatmulOptions {
                activation: scaled,
                ..Default::default()
            };
            let dinner = matmul(dy, &bv, &back);
            let dx = needs[0].then(|| {
                let earlier = earlier[0].take();
                matmul(&dinner, &av, &on_top_of(earlier.as_ref()))
            });
            let da = needs[1].then(|| grad_right(&x, &dinner, &av, true));
            let db = needs[2].then(|| grad_right(&inner, dy, &bv, true));
            vec![dx, da, db, needs[3].then(|| dy.clone())]
        })
    }

    /// [`Var::linear_onto`] with a quantised weight, which is frozen.
    pub fn linear_quantized(
        &self,
        weight: &QuantizedMatrix,
        bias: Option<&Var>,
        onto: Option<&Var>,
    ) -> Var {
        let w = weight.clone();
        let y = matmul_quantized(self.value(), &w, &linear_options(bias, onto));
        let has_bias = bias.is_some();
        let parents: Vec<&Var> = [self].into_iter().chain(bias).chain(onto).collect();
        Var::from_accumulating_op(
            "linear_quantized",
            y,
            &parents,
            move |dy, needs, earlier| {
                let dx = needs[0].then(|| {
                    let earlier = earlier[0].take();
                    matmul_quantized(dy, &w, &on_top_of(earlier.as_ref()))
                });
                let mut grads = vec![dx];
                grads.extend(added_gradients(has_bias, dy, &needs[1..]));
                grads
            },
        )
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
        let parents = [self, weight, bias];
        Var::from_accumulating_op("layer_norm", y, &parents, move |dy, needs, earlier| {
            let (onto, affine) = (earlier[0].take(), needs[1] || needs[2]);
            let g = layer_norm_backward(&x, Some(&w), dy, onto.as_ref(), eps, affine);
            vec![Some(g.dx), g.dweight, g.dbias]
        })
    }

    /// Root-mean-square norm over the last dimension; weight f32 `[last]`.
    pub fn rms_norm(&self, weight: &Var, eps: f32) -> Var {
        let (x, w) = (self.value().clone(), weight.value().clone());
        let y = rms_norm(&x, Some(&w), eps);
        Var::from_accumulating_op("rms_norm", y, &[self, weight], move |dy, needs, earlier| {
            let onto = earlier[0].take();
            let g = rms_norm_backward(&x, Some(&w), dy, onto.as_ref(), eps, needs[1]);
            vec![Some(g.dx), g.dweight]
        })
    }

    /// Group norm over channels-last self [B, .., C]; weight, bias f32 `[C]`.
    pub fn group_norm(&self, groups: usize, weight: &Var, bias: &Var, eps: f32) -> Var {
        self.normed_by_group(groups, Some([weight, bias]), eps, false)
    }

    /// x·σ(x) of [`Var::group_norm`].
    pub fn group_norm_silu(&self, groups: usize, weight: &Var, bias: &Var, eps: f32) -> Var {
        self.normed_by_group(groups, Some([weight, bias]), eps, true)
    }

    /// Instance norm without affine over channels-last self [B, .., C] (biased variance).
    pub fn instance_norm(&self, eps: f32) -> Var {
        self.normed_by_group(self.value().last_dim(), None, eps, false)
    }

    fn normed_by_group(
        &self,
        groups: usize,
        affine: Option<[&Var; 2]>,
        eps: f32,
        silu: bool,
    ) -> Var {
        let x = self.value().clone();
        let values = affine.map(|vars| vars.map(|v| v.value().clone()));
        fn norm(
            values: &Option<[Tensor; 2]>,
            groups: usize,
            eps: f32,
            silu: bool,
        ) -> GroupNorm<'_> {
            GroupNorm {
                groups,
                weight: values.as_ref().map(|v| &v[0]),
                bias: values.as_ref().map(|v| &v[1]),
                eps,
                silu,
            }
        }
        let (y, statistics) = group_norm(&x, &norm(&values, groups, eps, silu));
        let parents: Vec<&Var> = [self]
            .into_iter()
            .chain(affine.into_iter().flatten())
            .collect();
        Var::from_accumulating_op("group_norm", y, &parents, move |dy, needs, earlier| {
            let onto = earlier[0].take();
            let wanted = needs[1..].contains(&true);
            let norm = norm(&values, groups, eps, silu);
            let g = group_norm_backward(&x, &statistics, dy, onto.as_ref(), &norm, wanted);
            let mut grads = vec![Some(g.dx), g.dweight, g.dbias];
            grads.truncate(needs.len());
            grads
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

    /// GEGLU of self [.., 2·N]: the first half times GELU of the second, [.., N].
    pub fn geglu(&self) -> Var {
        let x = self.value().clone();
        Var::from_op("geglu", geglu(&x), &[self], move |dy, _| {
            vec![Some(geglu_backward(&x, dy))]
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
        let y = rotary(self.value(), [&cos, &sin], heads);
        Var::from_op("rotary", y, &[self], move |dy, _| {
            vec![Some(rotary_backward(dy, [&cos, &sin], heads))]
        })
    }

    /// [`Var::rotary`] of queries and keys, each with its number of heads, in one kernel.
    pub fn rotary_pair(x: [&Var; 2], cos: &Tensor, sin: &Tensor, heads: [usize; 2]) -> [Var; 2] {
        let (cos, sin) = (cos.clone(), sin.clone());
        let y = rotary_pair(x.map(Var::value), [&cos, &sin], heads);
        let backward =
            move |dy: &[Option<Tensor>], _: &[bool], _: &mut Earlier, _: &mut Gradients| {
                let angles = [&cos, &sin];
                match dy {
                    [Some(dq), Some(dk)] => rotary_pair_backward([dq, dk], angles, heads)
                        .map(Some)
                        .to_vec(),
                    _ => {
                        let back = |(dy, heads): (&Option<Tensor>, usize)| {
                            dy.as_ref().map(|dy| rotary_backward(dy, angles, heads))
                        };
                        dy.iter().zip(heads).map(back).collect()
                    }
                }
            };
        let mut turned =
            Var::from_multi_op("rotary", y.to_vec(), &x, false, Box::new(backward)).into_iter();
        std::array::from_fn(|_| turned.next().expect("one output each"))
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

/// How a linear layer multiplies: x·wᵀ + bias + onto.
fn linear_options<'a>(bias: Option<&'a Var>, onto: Option<&'a Var>) -> MatmulOptions<'a> {
    MatmulOptions {
        trans_b: true,
        bias: bias.map(Var::value),
        ending: onto.map(|onto| Ending::Residual(onto.value())),
        ..Default::default()
    }
}

/// How a linear layer multiplies whose output's gate is known: silu(gate)·(x·wᵀ + bias).
fn gated_options<'a>(bias: Option<&'a Var>, gate: &'a Var) -> MatmulOptions<'a> {
    MatmulOptions {
        ending: Some(Ending::Gate(gate.value())),
        ..linear_options(bias, None)
    }
}

/// A product added to what its place has already.
fn on_top_of(earlier: Option<&Tensor>) -> MatmulOptions<'_> {
    MatmulOptions {
        ending: earlier.map(Ending::Residual),
        ..Default::default()
    }
}

/// Gradients of what a linear layer adds to its product: the bias where it has one, then the rest.
fn added_gradients(has_bias: bool, dy: &Tensor, needs: &[bool]) -> Vec<Option<Tensor>> {
    let gradient = |(i, &needed): (usize, &bool)| {
        needed.then(|| match has_bias && i == 0 {
            true => sum_rows(dy),
            false => dy.clone(),
        })
    };
    needs.iter().enumerate().map(gradient).collect()
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
