//! The tape itself: accumulation, constants, several roots, dtypes, how long activations live.

use lavender_wgpu::autograd::{Gradients, Var, find_non_finite, no_grad, swiglu};
use lavender_wgpu::gpu::{Gpu, GpuOptions};
use lavender_wgpu::tensor::{DType, Tensor};

use crate::support::*;

fn leaf(values: &[f32]) -> Var {
    Var::parameter(Tensor::from_f32(gpu(), values, &[values.len()]))
}

fn read(grads: &Gradients, leaf: &Var) -> Vec<f32> {
    grads
        .get(leaf)
        .expect("a gradient")
        .to_f32()
        .expect("readable")
}

#[test]
fn gradients_of_every_use_add_up() {
    let x = leaf(&[1.0, -2.0, 3.0]);
    // x² + 3x, and x again through both: d/dx = 2x + 3 + (2x)(2) at y = x²: total below.
    let square = x.square();
    let y = square.add(&x.scale(3.0)).add(&square.scale(2.0));
    let grads = y.sum_all().backward();
    assert_eq!(read(&grads, &x), [9.0, -9.0, 21.0]);
}

#[test]
fn gradients_flow_only_where_needed() {
    let (x, frozen) = (
        leaf(&[1.0, 2.0]),
        Var::constant(Tensor::from_f32(gpu(), &[3.0, 4.0], &[2])),
    );
    assert!(
        !frozen.mul(&frozen).needs_grad(),
        "constants make constants"
    );
    let cut = x.square().detach();
    assert!(!cut.needs_grad());
    let loss = x.mul(&frozen).add(&cut).sum_all();
    let grads = loss.backward();
    assert_eq!(
        read(&grads, &x),
        [3.0, 4.0],
        "nothing through the detached branch"
    );
    assert!(grads.get(&frozen).is_none());
    let outside = no_grad(|| x.square());
    assert!(!outside.needs_grad());
    assert!(x.square().needs_grad(), "recording goes on afterwards");
    let unused = leaf(&[5.0]);
    assert!(grads.get(&unused).is_none());
}

#[test]
fn several_roots_and_upstream_gradients() {
    let x = leaf(&[1.0, 2.0]);
    let (a, b) = (x.square(), x.scale(3.0));
    let upstream = |v: &[f32]| Tensor::from_f32(gpu(), v, &[2]);
    let grads = Var::backward_with(&[(a, upstream(&[1.0, 10.0])), (b, upstream(&[100.0, 0.0]))]);
    assert_eq!(read(&grads, &x), [302.0, 40.0]);
}

#[test]
fn accumulation_over_micro_batches_is_the_sum() {
    let x = leaf(&[1.0, -1.0]);
    let mut all = x.square().sum_all().backward();
    all.merge(x.scale(5.0).sum_all().backward());
    assert_eq!(read(&all, &x), [7.0, 3.0]);
    assert!(all.take(&x).is_some());
    assert!(all.get(&x).is_none());
}

#[test]
fn two_backwards_give_the_same_bits() {
    let run = || {
        let mut rng = rng(5);
        let x = Var::parameter(Tensor::from_f32(
            gpu(),
            &uniform(&mut rng, 33 * 20),
            &[33, 20],
        ));
        let w = Var::parameter(Tensor::from_f32(
            gpu(),
            &uniform(&mut rng, 17 * 20),
            &[17, 20],
        ));
        let rows = Tensor::from_u32(gpu(), &[3, 3, 8, 31, 3], &[5]);
        let y = x.linear(&w, None).softmax().gather_rows(&rows);
        let grads = y.square().sum_all().backward();
        [read(&grads, &x), read(&grads, &w)]
            .map(|g| g.iter().map(|v| v.to_bits()).collect::<Vec<_>>())
    };
    assert_eq!(run(), run());
}

#[test]
#[should_panic(expected = "backward of")]
fn only_scalars_start_a_backward() {
    leaf(&[1.0, 2.0]).square().backward();
}

#[test]
#[should_panic(expected = "backward ran twice")]
fn a_tape_runs_once() {
    let x = leaf(&[1.0]);
    let y = x.square();
    let z = y.scale(2.0);
    y.backward();
    z.backward();
}

#[test]
fn gradients_have_the_dtype_of_their_leaf() {
    if !gpu().tier().f16 {
        return;
    }
    let mut rng = rng(6);
    let (x, hx) = upload(&uniform(&mut rng, 6 * 8), DType::F16, &[6, 8]);
    let (w, _) = upload(&uniform(&mut rng, 4 * 8), DType::F32, &[4, 8]);
    let (b, _) = upload(&uniform(&mut rng, 4), DType::F32, &[4]);
    let (x, w, b) = (Var::parameter(x), Var::parameter(w), Var::parameter(b));
    let y = x.linear(&w, Some(&b));
    assert_eq!(y.dtype(), DType::F16);
    let grads = y.cast(DType::F32).sum_all().backward();
    for (name, leaf) in [("x", &x), ("w", &w), ("b", &b)] {
        assert_eq!(grads.get(leaf).expect(name).dtype(), leaf.dtype(), "{name}");
    }
    let dw: Vec<f64> = (0..32)
        .map(|i| (0..6).map(|r| hx[r * 8 + i % 8]).sum())
        .collect();
    // Products of f16 values in f32: exact to f16's tolerance whatever the accumulator holds.
    let error = nmse(&read(&grads, &w), &dw);
    assert!(error <= tolerance(DType::F16), "{error:e}");
    assert_eq!(read(&grads, &b), [6.0; 4]);
}

#[test]
fn activations_are_freed_as_the_backward_passes() {
    let gpu = Gpu::new(&GpuOptions::default()).expect("adapter");
    let x = Var::parameter(Tensor::zeros(&gpu, DType::F32, &[1 << 16]));
    let before = gpu.memory().current_bytes;
    let one = (1u64 << 16) * 4;
    let mut y = x.clone();
    for _ in 0..16 {
        y = y.square();
    }
    let forward = gpu.memory().current_bytes - before;
    assert!(
        forward >= 15 * one,
        "the tape holds its activations: {forward}"
    );
    gpu.reset_peak();
    let loss = y.sum_all();
    drop(y);
    let grads = loss.backward();
    let stats = gpu.memory();
    assert!(stats.peak_bytes - before < forward + 5 * one, "{stats:?}");
    assert!(grads.get(&x).is_some());
    drop((loss, grads));
    assert_eq!(gpu.memory().current_bytes, before, "nothing stays behind");
}

#[test]
fn a_long_tape_does_not_overflow_the_stack() {
    let x = leaf(&[1.0]);
    let mut y = x.clone();
    for _ in 0..20_000 {
        y = y.reshape(&[1]);
    }
    drop(y);
}

#[test]
fn the_first_bad_op_is_named() {
    let x = leaf(&[1.0, 0.0]);
    let found = find_non_finite(|| {
        // Not the logarithm of 0: some drivers have a finite one.
        let y = x.scale(1e30);
        let _ = y.square().scale(0.5).sum_all();
    });
    let found = found.expect("the square of 1e30 is over f32's range");
    assert!(found.contains("unary") && found.contains("[2]"), "{found}");
    assert!(find_non_finite(|| drop(x.square())).is_none());
    // 0 · 1e30 · 1e30 is finite, its slope is not.
    let zero = leaf(&[0.0]);
    let found = find_non_finite(|| {
        let y = zero.scale(1e30).scale(1e30).sum_all();
        drop(y.backward());
    });
    let found = found.expect("a slope over f32's range");
    assert!(found.contains("the backward of scale"), "{found}");
}

#[test]
fn a_gated_layer_gives_the_same_with_and_without_a_tape() {
    let gpu = Gpu::new(&GpuOptions::default()).expect("adapter");
    for dtype in float_types() {
        for rows in [1, 3, 20] {
            let mut rng = rng(rows as u64);
            let mut random = |shape: [usize; 2]| {
                let values = uniform(&mut rng, shape[0] * shape[1]);
                Tensor::from_bytes(&gpu, &dtype.narrow(&values), dtype, &shape)
            };
            let [x, gate] = [random([rows, 64]), random([rows, 40])].map(Var::constant);
            let weight = Var::parameter(random([40, 64]));
            let run = || {
                let before = gpu.dispatches();
                let y = x.linear_gated(&weight, None, &gate);
                (y, gpu.dispatches() - before)
            };
            let ((recorded, two), (alone, one)) = (run(), no_grad(run));
            assert!(recorded.needs_grad() && !alone.needs_grad());
            let expected = recorded.value().to_f32().unwrap();
            let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
            assert_close("gated", alone.value(), &expected);
            assert!(
                rows > 8 || (one, two) == (1, 2),
                "{rows} rows: {one}, {two}"
            );
            let expected = swiglu(&gate, &x.linear(&weight, None));
            assert!(recorded.value().to_f32().unwrap() == expected.value().to_f32().unwrap());
        }
    }
}
