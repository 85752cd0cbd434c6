//! Gradients of every function in the middle of a graph against finite differences of the same graph.

use lavender_wgpu::autograd::{Var, no_grad, swiglu};
use lavender_wgpu::ops::conv2d::Conv2dOptions;
use lavender_wgpu::ops::cross_entropy::IGNORE;
use lavender_wgpu::ops::unary::Unary;
use lavender_wgpu::tensor::{DType, Tensor, elements};
use rand::seq::SliceRandom;

use crate::support::*;

/// Central differences in f32: rounding 1e-7/h against truncation h²; h = 1e-2 leaves about 1e-5 of
/// the gradient, 1e-10 squared, and cancellation in small entries a few orders more. A gradient that
/// lost a term is off by 1e-2 and above.
const ALLOWED: f64 = 2e-6;
const STEP: f32 = 1e-2;

/// Compares gradients of Σ w∘f(g(leaves)) + its skip path with finite differences, leaf by leaf.
///
/// Before `f` each leaf passes an affine map, and the first input is used a second time beside `f`, so
/// that upstream gradients and their accumulation both matter.
pub fn check(what: &str, leaves: &[(&[usize], Vec<f32>)], f: impl Fn(&[Var]) -> Var) {
    let graph = |values: &[Tensor], trainable: bool| -> (Vec<Var>, Var) {
        let leaves: Vec<Var> = values
            .iter()
            .map(|t| {
                if trainable {
                    Var::parameter(t.clone())
                } else {
                    Var::constant(t.clone())
                }
            })
            .collect();
        let inputs: Vec<Var> = leaves
            .iter()
            .map(|v| v.scale(0.5).add_scalar(0.1))
            .collect();
        let y = f(&inputs);
        let weights = uniform(
            &mut rng(elements(y.shape()) as u64 + 900),
            elements(y.shape()),
        );
        let w = Var::constant(Tensor::from_f32(gpu(), &weights, y.shape()));
        let skip = inputs[0].square().mean_all();
        (leaves, y.mul(&w).sum_all().add(&skip))
    };
    let tensors: Vec<Tensor> = leaves
        .iter()
        .map(|(shape, v)| Tensor::from_f32(gpu(), v, shape))
        .collect();
    let (vars, loss) = graph(&tensors, true);
    let grads = loss.backward();
    for (k, (shape, values)) in leaves.iter().enumerate() {
        let grad = grads
            .get(&vars[k])
            .unwrap_or_else(|| panic!("{what}: no gradient of leaf {k}"));
        assert_eq!(grad.shape(), *shape, "{what}: leaf {k}");
        // All evaluations are recorded first, then read.
        let pending: Vec<_> = (0..values.len())
            .map(|i| {
                [STEP, -STEP].map(|h| {
                    let mut moved = values.clone();
                    moved[i] += h;
                    let mut at = tensors.clone();
                    at[k] = Tensor::from_f32(gpu(), &moved, shape);
                    no_grad(|| graph(&at, false).1).value().read_later()
                })
            })
            .collect();
        let expected: Vec<f64> = pending
            .into_iter()
            .map(|[above, below]| {
                let [a, b] =
                    [above, below].map(|read| f64::from(read.wait().expect("readable")[0]));
                (a - b) / (2.0 * f64::from(STEP))
            })
            .collect();
        let error = nmse(&grad.to_f32().expect("readable"), &expected);
        assert!(
            error <= ALLOWED,
            "{what}: gradient of leaf {k}: NMSE {error:e}"
        );
    }
}

pub fn random(seed: u64, shape: &'static [usize]) -> (&'static [usize], Vec<f32>) {
    (shape, uniform(&mut rng(seed), elements(shape)))
}

/// Distinct values at least 0.1 apart, so that no step changes which one is largest.
fn spread(seed: u64, shape: &'static [usize]) -> (&'static [usize], Vec<f32>) {
    let mut values: Vec<f32> = (0..elements(shape)).map(|i| i as f32 * 0.1 - 1.0).collect();
    values.shuffle(&mut rng(seed));
    (shape, values)
}

#[test]
fn elementwise() {
    for function in [
        Unary::Silu,
        Unary::GeluTanh,
        Unary::GeluErf,
        Unary::QuickGelu,
        Unary::Tanh,
        Unary::Sigmoid,
        Unary::Exp,
        Unary::Square,
        Unary::Affine(-1.5, 0.5),
    ] {
        check(&format!("{function:?}"), &[random(1, &[3, 5])], |v| {
            v[0].unary(function)
        });
    }
    // Kinked or restricted: kept at a distance from 0.
    let away: Vec<f32> = [-1.9, -1.1, 0.7, 1.4, 2.0, 0.4].to_vec();
    for function in [Unary::Relu, Unary::Relu6, Unary::LeakyRelu(0.2)] {
        check(&format!("{function:?}"), &[(&[6], away.clone())], |v| {
            v[0].unary(function)
        });
    }
    for function in [Unary::Log, Unary::Sqrt] {
        check(&format!("{function:?}"), &[random(2, &[7])], |v| {
            v[0].add_scalar(1.5).unary(function)
        });
    }
    check("silu", &[random(3, &[5])], |v| v[0].silu());
    check("tanh", &[random(3, &[5])], |v| v[0].tanh());
    check("square", &[random(3, &[5])], |v| v[0].square());
    check("swiglu", &[random(4, &[3, 5]), random(5, &[3, 5])], |v| {
        swiglu(&v[0], &v[1])
    });
}

#[test]
fn broadcast_arithmetic() {
    let (a, b) = (random(11, &[2, 3, 4]), random(12, &[3, 1]));
    check("add", &[a.clone(), b.clone()], |v| v[0].add(&v[1]));
    check("sub", &[a.clone(), b.clone()], |v| v[0].sub(&v[1]));
    check("mul", &[a.clone(), b.clone()], |v| v[0].mul(&v[1]));
    check("mul by itself", std::slice::from_ref(&a), |v| {
        v[0].mul(&v[0])
    });
    check("div", &[a.clone(), b.clone()], |v| {
        v[0].div(&v[1].add_scalar(1.5))
    });
    check("scalar", &[random(13, &[1]), a], |v| v[0].mul(&v[1]));
}

#[test]
fn reductions() {
    let x = spread(21, &[3, 4, 5]);
    for axes in [&[0usize][..], &[1], &[2], &[0, 2], &[1, 2], &[0, 1, 2]] {
        for keep in [false, true] {
            check(&format!("sum {axes:?}"), std::slice::from_ref(&x), |v| {
                v[0].sum(axes, keep).tanh()
            });
        }
        check(&format!("mean {axes:?}"), std::slice::from_ref(&x), |v| {
            v[0].mean(axes, false).tanh()
        });
        check(&format!("max {axes:?}"), std::slice::from_ref(&x), |v| {
            v[0].max(axes, true).tanh()
        });
        check(&format!("min {axes:?}"), std::slice::from_ref(&x), |v| {
            v[0].min(axes, false).tanh()
        });
    }
    check("mean_all", std::slice::from_ref(&x), |v| {
        v[0].square().mean_all()
    });
    check("sum_all", &[x], |v| v[0].square().sum_all().scale(0.1));
}

#[test]
fn layout() {
    check("reshape", &[random(31, &[3, 4])], |v| {
        v[0].square().reshape(&[2, 6])
    });
    check("permute", &[random(32, &[2, 3, 4])], |v| {
        v[0].square().permute(&[2, 0, 1])
    });
    check("narrow", &[random(33, &[3, 5])], |v| {
        v[0].narrow(1, 1, 3).square()
    });
    let parts = [
        random(34, &[2, 1, 3]),
        random(35, &[2, 4, 3]),
        random(36, &[2, 2, 3]),
    ];
    check("concat", &parts, |v| Var::concat(v, 1).square());
    check("concat of one twice", &[random(37, &[2, 3])], |v| {
        Var::concat(&[v[0].clone(), v[0].square()], 0)
    });
    let rows = Tensor::from_u32(gpu(), &[3, 0, 3, 1], &[4]);
    check("gather_rows", &[random(38, &[5, 3])], |v| {
        v[0].gather_rows(&rows).square()
    });
    let rows = Tensor::from_u32(gpu(), &[4, 1], &[2]);
    check(
        "replace_rows",
        &[random(39, &[5, 3]), random(40, &[2, 3])],
        |v| v[0].replace_rows(&rows, &v[1]).square(),
    );
}

#[test]
fn products() {
    check("matmul", &[random(41, &[3, 4]), random(42, &[4, 5])], |v| {
        v[0].matmul(&v[1])
    });
    check(
        "matmul shared",
        &[random(43, &[2, 3, 4]), random(44, &[4, 2])],
        |v| v[0].matmul(&v[1]),
    );
    check(
        "matmul batched",
        &[random(45, &[2, 3, 4]), random(46, &[2, 4, 2])],
        |v| v[0].matmul(&v[1]),
    );
    check(
        "matmul_t",
        &[random(47, &[3, 4]), random(48, &[5, 4])],
        |v| v[0].matmul_t(&v[1]),
    );
    check(
        "matmul_t batched",
        &[random(49, &[2, 3, 4]), random(50, &[2, 5, 4])],
        |v| v[0].matmul_t(&v[1]),
    );
    let (x, w, b) = (
        random(51, &[2, 3, 4]),
        random(52, &[5, 4]),
        random(53, &[5]),
    );
    check("linear", &[x.clone(), w.clone()], |v| {
        v[0].linear(&v[1], None)
    });
    check("linear with bias", &[x, w, b], |v| {
        v[0].linear(&v[1], Some(&v[2])).tanh()
    });
    let (x, kernel, b) = (
        random(54, &[1, 5, 4, 2]),
        random(55, &[3, 3, 2, 3]),
        random(56, &[3]),
    );
    for options in [
        Conv2dOptions {
            stride: 1,
            padding: [1; 4],
        },
        Conv2dOptions {
            stride: 2,
            padding: [1; 4],
        },
        Conv2dOptions {
            stride: 2,
            padding: [0, 1, 0, 1],
        },
    ] {
        check(
            &format!("conv2d {options:?}"),
            &[x.clone(), kernel.clone(), b.clone()],
            |v| v[0].conv2d(&v[1], Some(&v[2]), options).tanh(),
        );
    }
    check(
        "conv2d 1×1",
        &[random(57, &[2, 3, 2, 4]), random(58, &[1, 1, 4, 3])],
        |v| {
            v[0].conv2d(
                &v[1],
                None,
                Conv2dOptions {
                    stride: 1,
                    padding: [0; 4],
                },
            )
        },
    );
}

#[test]
fn norms() {
    let (x, w, b) = (random(61, &[2, 3, 6]), random(62, &[6]), random(63, &[6]));
    let all = [x.clone(), w.clone(), b];
    check("layer_norm", &all, |v| v[0].layer_norm(&v[1], &v[2], 1e-2));
    check("rms_norm", &all[..2], |v| v[0].rms_norm(&v[1], 1e-2));
    check("group_norm", &all, |v| {
        v[0].group_norm(3, &v[1], &v[2], 1e-2)
    });
    check("group_norm_silu", &all, |v| {
        v[0].group_norm_silu(3, &v[1], &v[2], 1e-2)
    });
    check("instance_norm", &[x], |v| v[0].instance_norm(1e-2));
}

/// Where a value has several uses, some backwards add to what is there: as the first of them, in between, and as the last.
#[test]
fn gradients_add_up_in_the_kernels_that_make_them() {
    let (x, w, b) = (random(64, &[2, 3, 8]), random(65, &[8]), random(66, &[8]));
    let all = [x.clone(), w, b];
    check("layer norm and residual", &all, |v| {
        let normed = v[0].layer_norm(&v[1], &v[2], 1e-2);
        v[0].add(&normed.tanh()).square()
    });
    check("rms norm between two uses", &all[..2], |v| {
        let first = v[0].tanh();
        let normed = v[0].rms_norm(&v[1], 1e-2).square();
        first.add(&normed).add(&v[0].square())
    });
    check("group norm and residual", &all, |v| {
        let normed = v[0].group_norm_silu(2, &v[1], &v[2], 1e-2);
        v[0].add(&normed.tanh()).square()
    });
    let weights = [
        x,
        random(67, &[8, 8]),
        random(68, &[8, 8]),
        random(69, &[3, 8]),
        random(70, &[8, 3]),
    ];
    check(
        "three projections of one value, onto another",
        &weights[..3],
        |v| {
            let (q, k) = (v[0].linear(&v[1], None), v[0].linear(&v[2], None));
            q.mul(&k).linear_onto(&v[1], None, Some(&v[0])).tanh()
        },
    );
    check("a low-rank update of a projection", &weights, |v| {
        let y = v[0].linear(&v[1], None);
        let y = v[0].low_rank_onto(&v[3], &v[4], 0.7, &y);
        y.tanh().linear(&v[2], None)
    });
}

#[test]
fn softmax_and_loss() {
    check("softmax", &[random(71, &[3, 7])], |v| {
        v[0].scale(3.0).softmax()
    });
    let labels = Tensor::from_u32(gpu(), &[4, IGNORE, 0, 2], &[4]);
    check("cross_entropy", &[random(72, &[4, 5])], |v| {
        v[0].scale(3.0).cross_entropy(&labels, 3).square()
    });
    let ids = Tensor::from_u32(gpu(), &[2, 0, 2, 5], &[2, 2]);
    check("embedding", &[random(73, &[6, 3])], |v| {
        Var::embedding(&v[0], &ids, DType::F32).square()
    });
}

#[test]
fn positions_and_images() {
    let angles: Vec<f32> = (0..12).map(|i| 0.3 * i as f32).collect();
    let table = |f: fn(f32) -> f32| {
        let values: Vec<f32> = angles.iter().map(|&a| f(a)).collect();
        Tensor::from_f32(gpu(), &values, &[1, 3, 4])
    };
    let (cos, sin) = (table(f32::cos), table(f32::sin));
    check("rotary", &[random(81, &[2, 3, 16])], |v| {
        v[0].rotary(&cos, &sin, 2).square()
    });
    let both = [random(84, &[2, 3, 16]), random(85, &[2, 3, 8])];
    check("rotary_pair", &both, |v| {
        let turned = Var::rotary_pair([&v[0], &v[1]], &cos, &sin, [2, 1]);
        Var::concat(&turned, 2).square()
    });
    // Keys that nothing reads.
    check("rotary_pair, queries alone", &both[..1], |v| {
        let keys = v[0].narrow(2, 0, 8);
        let [q, _] = Var::rotary_pair([&v[0], &keys], &cos, &sin, [2, 1]);
        q.square()
    });
    check("geglu", &[random(86, &[3, 10])], |v| v[0].geglu().square());
    check("upsample_nearest2x", &[random(82, &[2, 2, 3, 2])], |v| {
        v[0].upsample_nearest2x().square()
    });
    for (h, w) in [(5, 7), (2, 2), (4, 3)] {
        check(
            &format!("resize_bilinear {h}×{w}"),
            &[random(83, &[1, 4, 3, 2])],
            |v| v[0].resize_bilinear(h, w).square(),
        );
    }
}
