//! Activation checkpointing changes what is kept, never a bit of the result.

use lavender_wgpu::autograd::{Gradients, Var, checkpoint};
use lavender_wgpu::gpu::{Gpu, GpuOptions};
use lavender_wgpu::tensor::{DType, Tensor};

use crate::support::*;

/// A block with weights inside and two outputs: the hidden states and a tap of its probabilities.
#[derive(Clone)]
struct Block {
    weight: Var,
    gain: Var,
}

impl Block {
    fn new(gpu: &Gpu, seed: u64, width: usize) -> Block {
        let mut rng = rng(seed);
        let weight = uniform(&mut rng, width * width);
        Block {
            weight: Var::parameter(Tensor::from_f32(gpu, &weight, &[width, width])),
            gain: Var::parameter(Tensor::from_f32(gpu, &uniform(&mut rng, width), &[width])),
        }
    }

    fn forward(&self, x: &Var) -> (Var, Var) {
        let hidden = x.rms_norm(&self.gain, 1e-5).linear(&self.weight, None);
        let probs = hidden.matmul_t(x).softmax();
        let rows = Tensor::from_u32(x.value().gpu(), &[1, 4, 2], &[3]);
        (
            probs.matmul(&hidden).silu().add(x),
            probs.gather_rows(&rows),
        )
    }
}

fn bits(grads: &Gradients, leaf: &Var) -> Vec<u32> {
    let grad = grads.get(leaf).expect("a gradient");
    grad.to_f32()
        .expect("readable")
        .iter()
        .map(|v| v.to_bits())
        .collect()
}

/// Runs three blocks; returns loss and gradients of the input and of each block's weights, as bits.
fn run(checkpointed: bool, input_needs_grad: bool) -> Vec<Vec<u32>> {
    let (tokens, width) = (7, 6);
    let blocks: Vec<Block> = (0..3).map(|i| Block::new(gpu(), 100 + i, width)).collect();
    let mut rng = rng(99);
    let x = Tensor::from_f32(gpu(), &uniform(&mut rng, tokens * width), &[tokens, width]);
    let x = if input_needs_grad {
        Var::parameter(x)
    } else {
        Var::constant(x)
    };
    let target = Var::constant(Tensor::from_f32(
        gpu(),
        &uniform(&mut rng, 3 * tokens),
        &[3, tokens],
    ));
    let mut hidden = x.clone();
    let mut loss: Option<Var> = None;
    for block in &blocks {
        let tap;
        (hidden, tap) = if checkpointed {
            let inner = block.clone();
            let mut outputs = checkpoint(std::slice::from_ref(&hidden), move |inputs| {
                let (h, tap) = inner.forward(&inputs[0]);
                vec![h, tap]
            });
            let tap = outputs.remove(1);
            (outputs.remove(0), tap)
        } else {
            block.forward(&hidden)
        };
        let part = tap.sub(&target).square().mean_all();
        loss = Some(match loss {
            Some(loss) => loss.add(&part),
            None => part,
        });
    }
    // The last hidden states count too, or the last block's values would get no gradient.
    let loss = loss.expect("blocks").add(&hidden.square().mean_all());
    let value = loss.scalar().expect("readable").to_bits();
    let grads = loss.backward();
    let mut all = vec![vec![value]];
    if input_needs_grad {
        all.push(bits(&grads, &x));
    }
    for block in &blocks {
        all.extend([bits(&grads, &block.weight), bits(&grads, &block.gain)]);
    }
    all
}

#[test]
fn taps_and_leaves_inside_keep_their_gradients_bit_for_bit() {
    for input_needs_grad in [true, false] {
        assert_eq!(run(false, input_needs_grad), run(true, input_needs_grad));
    }
}

#[test]
fn a_tap_alone_reaches_the_leaves() {
    // The hidden output is dropped: only the tap carries a gradient.
    let gradient = |checkpointed: bool| {
        let block = Block::new(gpu(), 7, 6);
        let x = Var::constant(Tensor::from_f32(gpu(), &uniform(&mut rng(8), 42), &[7, 6]));
        let inner = block.clone();
        let f = move |inputs: &[Var]| {
            let (h, tap) = inner.forward(&inputs[0]);
            vec![h, tap]
        };
        let outputs = if checkpointed {
            checkpoint(&[x], f)
        } else {
            f(&[x])
        };
        let grads = outputs[1].square().sum_all().backward();
        bits(&grads, &block.weight)
    };
    let plain = gradient(false);
    assert!(plain.iter().any(|&b| f32::from_bits(b).abs() > 1e-4));
    assert_eq!(plain, gradient(true));
}

#[test]
fn checkpoints_nest() {
    let gradient = |checkpointed: bool| {
        let (first, second) = (Block::new(gpu(), 17, 6), Block::new(gpu(), 18, 6));
        let x = Var::parameter(Tensor::from_f32(gpu(), &uniform(&mut rng(19), 42), &[7, 6]));
        let (a, b) = (first.clone(), second.clone());
        let both = move |inputs: &[Var]| {
            let b = b.clone();
            let h = a.forward(&inputs[0]).0;
            let f = move |inputs: &[Var]| vec![b.forward(&inputs[0]).0];
            if checkpointed {
                checkpoint(&[h], f)
            } else {
                f(&[h])
            }
        };
        let inputs = std::slice::from_ref(&x);
        let y = if checkpointed {
            checkpoint(inputs, both)
        } else {
            both(inputs)
        };
        let grads = y[0].square().sum_all().backward();
        [
            bits(&grads, &x),
            bits(&grads, &first.weight),
            bits(&grads, &second.gain),
        ]
    };
    assert_eq!(gradient(false), gradient(true));
}

#[test]
fn less_is_kept_between_forward_and_backward() {
    let held = |checkpointed: bool| {
        let gpu = Gpu::new(&GpuOptions::default()).expect("adapter");
        let x = Var::parameter(Tensor::zeros(&gpu, DType::F32, &[1 << 14]));
        let before = gpu.memory().current_bytes;
        let f = |inputs: &[Var]| {
            let mut y = inputs[0].clone();
            for _ in 0..8 {
                y = y.silu();
            }
            vec![y]
        };
        let inputs = std::slice::from_ref(&x);
        let y = if checkpointed {
            checkpoint(inputs, f)
        } else {
            f(inputs)
        };
        let held = gpu.memory().current_bytes - before;
        drop(y);
        held
    };
    let (plain, checkpointed) = (held(false), held(true));
    assert!(
        4 * checkpointed < plain,
        "{checkpointed} bytes against {plain}"
    );
}
