use lavender_wgpu::gpu::{Gpu, GpuOptions};
use lavender_wgpu::ops::adamw::{AdamW, Update, adamw, adamw_all};
use lavender_wgpu::ops::grad_norm::{clip_scale, grad_norm};
use lavender_wgpu::ops::unary::{Unary, unary};
use lavender_wgpu::tensor::{DType, Tensor};

use crate::support::*;

/// `torch.optim.AdamW` / `Adam`, single-tensor form, in f64.
fn reference(p: &mut [f64], g: &[f64], m: &mut [f64], v: &mut [f64], s: &AdamW, scale: f64) {
    let (b1, b2) = (f64::from(s.betas.0), f64::from(s.betas.1));
    let (lr, eps, decay) = (f64::from(s.lr), f64::from(s.eps), f64::from(s.weight_decay));
    let t = s.step as i32;
    for i in 0..p.len() {
        let mut g = g[i] * scale;
        if s.decoupled {
            p[i] *= 1.0 - lr * decay;
        } else {
            g += decay * p[i];
        }
        m[i] = b1 * m[i] + (1.0 - b1) * g;
        v[i] = b2 * v[i] + (1.0 - b2) * g * g;
        let denominator = v[i].sqrt() / (1.0 - b2.powi(t)).sqrt() + eps;
        p[i] -= lr / (1.0 - b1.powi(t)) * m[i] / denominator;
    }
}

#[test]
fn several_steps_match_the_torch_formula() {
    let mut rng = rng(121);
    let n = 1031;
    for (decoupled, weight_decay, scale) in [
        (true, 0.1, None),
        (true, 0.0, Some(0.25f32)),
        (false, 0.01, None),
    ] {
        let start = uniform(&mut rng, n);
        let (param, mut p) = upload(&start, DType::F32, &[n]);
        let (m, mut hm) = upload(&vec![0.0; n], DType::F32, &[n]);
        let (v, mut hv) = upload(&vec![0.0; n], DType::F32, &[n]);
        for step in 1..=12 {
            let settings = AdamW {
                lr: 1e-2 / step as f32,
                betas: (0.9, 0.95),
                eps: 1e-8,
                weight_decay,
                decoupled,
                step,
            };
            // Gradients over five orders of magnitude: eps matters for the small ones.
            let values: Vec<f32> = uniform(&mut rng, n)
                .iter()
                .enumerate()
                .map(|(i, g)| g * 10f32.powi(-((i % 6) as i32)))
                .collect();
            let (grad, g) = upload(&values, DType::F32, &[n]);
            let device_scale = scale.map(|s| Tensor::from_f32(gpu(), &[s], &[1]));
            adamw(&param, &grad, &m, &v, &settings, device_scale.as_ref());
            reference(
                &mut p,
                &g,
                &mut hm,
                &mut hv,
                &settings,
                f64::from(scale.unwrap_or(1.0)),
            );
        }
        assert_close("param", &param, &p);
        assert_close("m", &m, &hm);
        assert_close("v", &v, &hv);
        // The change itself, not only the parameter that it is small against.
        let moved: Vec<f32> = param
            .to_f32()
            .unwrap()
            .iter()
            .zip(&start)
            .map(|(a, b)| a - b)
            .collect();
        let expected: Vec<f64> = p
            .iter()
            .zip(&start)
            .map(|(a, &b)| a - f64::from(b))
            .collect();
        // Rounding of f32 parameters near 1 over moves near 0.01: (6e-8 / 1e-2)² and 12 steps.
        let error = nmse(&moved, &expected);
        assert!(error < 1e-8, "moves: NMSE {error:e}");
    }
}

#[test]
fn a_norm_that_is_not_finite_leaves_weights_and_moments_alone() {
    let tensor = |v: f32| Tensor::from_f32(gpu(), &[v; 5], &[5]);
    for bad in [f32::NAN, f32::INFINITY] {
        let (weight, m, v) = (tensor(1.0), tensor(0.5), tensor(0.25));
        let gradient = tensor(bad);
        let scale = clip_scale(&grad_norm(&[&gradient]), 1.0);
        let settings = AdamW {
            lr: 0.1,
            betas: (0.9, 0.999),
            eps: 1e-8,
            weight_decay: 0.01,
            decoupled: true,
            step: 3,
        };
        adamw(&weight, &gradient, &m, &v, &settings, Some(&scale));
        assert_eq!(weight.to_f32().unwrap(), [1.0; 5]);
        assert_eq!(m.to_f32().unwrap(), [0.5; 5]);
        assert_eq!(v.to_f32().unwrap(), [0.25; 5]);
    }
}

#[test]
fn tensors_updated_together_get_the_digits_of_those_updated_alone() {
    let mut rng = rng(122);
    let settings = AdamW {
        lr: 1e-2,
        betas: (0.9, 0.95),
        eps: 1e-8,
        weight_decay: 0.1,
        decoupled: true,
        step: 2,
    };
    // Tails of every length, one tensor of many workgroups, and more than one dispatch takes.
    let sizes = [1, 2, 3, 4, 5, 64, 1031, 40_003, 7, 9, 300];
    let mut set = || -> Vec<[Tensor; 4]> {
        let mut tensor = |n: usize| upload(&uniform(&mut rng, n), DType::F32, &[n]).0;
        // Second moments are squares.
        let squares = |t: Tensor| unary(&t, Unary::Square);
        sizes
            .iter()
            .map(|&n| [tensor(n), tensor(n), tensor(n), squares(tensor(n))])
            .collect()
    };
    let together = set();
    let alone: Vec<[Tensor; 4]> = together
        .iter()
        .map(|tensors| tensors.each_ref().map(Tensor::duplicate))
        .collect();
    let scale = Tensor::from_f32(gpu(), &[0.5], &[1]);
    let updates: Vec<Update> = together
        .iter()
        .map(|[param, grad, m, v]| Update { param, grad, m, v })
        .collect();
    adamw_all(&updates, &settings, Some(&scale));
    for ([w, g, m, v], changed) in alone.iter().zip(&together) {
        adamw(w, g, m, v, &settings, Some(&scale));
        for (one, other) in [w, g, m, v].into_iter().zip(changed) {
            let bits = |t: &Tensor| -> Vec<u32> {
                t.to_f32().unwrap().iter().map(|x| x.to_bits()).collect()
            };
            assert_eq!(bits(one), bits(other), "{w:?}");
        }
    }
}

#[test]
fn many_small_tensors_take_few_dispatches() {
    // A GPU of its own: the other tests dispatch meanwhile.
    let own = Gpu::new(&GpuOptions::default()).expect("an adapter");
    let zeros = |n: usize| Tensor::zeros(&own, DType::F32, &[n]);
    let sets: Vec<[Tensor; 4]> = (1..=20).map(|n| [n; 4].map(zeros)).collect();
    let updates: Vec<Update> = sets
        .iter()
        .map(|[param, grad, m, v]| Update { param, grad, m, v })
        .collect();
    let settings = AdamW {
        lr: 1e-2,
        betas: (0.9, 0.95),
        eps: 1e-8,
        weight_decay: 0.1,
        decoupled: true,
        step: 1,
    };
    let before = own.dispatches();
    adamw_all(&updates, &settings, None);
    let after = own.dispatches();
    let gradients: Vec<&Tensor> = sets.iter().map(|set| &set[1]).collect();
    grad_norm(&gradients);
    let bindings = own.tier().storage_buffers as u64;
    let at_once = |each: u64, others: u64| ((bindings - others) / each).clamp(1, 8);
    assert_eq!(after - before, 20u64.div_ceil(at_once(4, 1)));
    // Its sum and root are two more.
    let norm = own.dispatches() - after;
    assert_eq!(norm, 20u64.div_ceil(at_once(1, 1)) + 2);
    own.check().expect("no fault");
}
