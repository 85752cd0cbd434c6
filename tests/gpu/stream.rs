//! The command stream: what a step that repeats an earlier one finds ready.

use lavender_wgpu::autograd::Var;
use lavender_wgpu::gpu::{Gpu, GpuOptions};
use lavender_wgpu::ops::adamw::{AdamW, adamw};
use lavender_wgpu::tensor::{DType, Tensor};

/// A two-layer perceptron's weights and moments.
struct Model {
    weights: [Tensor; 2],
    moments: [[Tensor; 2]; 2],
}

impl Model {
    fn new(gpu: &Gpu) -> Model {
        let moments = || [(); 2].map(|()| Tensor::zeros(gpu, DType::F32, &[64, 64]));
        Model {
            weights: [0.01, -0.02].map(|v| Tensor::from_f32(gpu, &[v; 64 * 64], &[64, 64])),
            moments: [moments(), moments()],
        }
    }

    /// Forward, backward and update on `rows` rows; the loss read back.
    fn step(&self, gpu: &Gpu, rows: usize, number: u64) -> f32 {
        let x = Var::constant(Tensor::from_f32(gpu, &vec![0.5; rows * 64], &[rows, 64]));
        let [a, b] = self.weights.each_ref().map(|w| Var::parameter(w.clone()));
        let hidden = x.linear(&a, None).silu();
        let loss = hidden.linear(&b, None).square().mean_all();
        let gradients = loss.backward();
        let settings = AdamW {
            lr: 1e-3,
            betas: (0.9, 0.999),
            eps: 1e-8,
            weight_decay: 0.0,
            decoupled: true,
            step: number,
        };
        for (leaf, [m, v]) in [a, b].iter().zip(&self.moments) {
            let gradient = gradients.get(leaf).expect("a gradient of every leaf");
            adamw(leaf.value(), gradient, m, v, &settings, None);
        }
        loss.value().to_f32().expect("readable")[0]
    }
}

#[test]
fn a_step_that_repeats_an_earlier_one_makes_no_buffer_and_no_bind_group() {
    let gpu = Gpu::new(&GpuOptions::default()).expect("adapter");
    let model = Model::new(&gpu);
    model.step(&gpu, 108, 1);
    model.step(&gpu, 108, 2);
    let (made, memory, dispatched) = (gpu.bind_groups(), gpu.memory(), gpu.dispatches());
    let losses: Vec<f32> = (3..8).map(|n| model.step(&gpu, 108, n)).collect();
    assert!(losses.is_sorted_by(|a, b| a > b), "it trains: {losses:?}");
    assert!(gpu.dispatches() >= dispatched + 5 * 8);
    assert_eq!(gpu.bind_groups(), made);
    assert_eq!(gpu.memory().reserved_bytes, memory.reserved_bytes);
    // 100 rows take buffers of the same size classes.
    model.step(&gpu, 100, 8);
    assert_eq!(gpu.bind_groups(), made);
    assert_eq!(gpu.memory().reserved_bytes, memory.reserved_bytes);
    // Far fewer rows do not.
    model.step(&gpu, 8, 9);
    assert!(gpu.bind_groups() > made);
}
