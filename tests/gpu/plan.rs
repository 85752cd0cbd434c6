//! Plans: what a replay does again, and what becomes of the memory.

use lavender_wgpu::gpu::{Arena, Gpu, GpuOptions, Plan};
use lavender_wgpu::ops::binary::{Binary, binary};
use lavender_wgpu::ops::unary::{Unary, unary};
use lavender_wgpu::tensor::{DType, Place, Tensor};

fn open(max_bytes: Option<u64>) -> Gpu {
    let options = GpuOptions {
        max_bytes,
        checked: true,
        ..GpuOptions::default()
    };
    Gpu::new(&options).expect("adapter")
}

/// 3 · (x + 1)² through an upload, a clear and a copy, with its input and its result.
fn planned(gpu: &Gpu, arena: &Arena, n: usize) -> (Place, Place, Plan) {
    let (x, _) = gpu.plan(arena, || Tensor::zeros(gpu, DType::F32, &[n]));
    let (y, plan) = gpu.plan(arena, || {
        let threes = Tensor::from_f32(gpu, &vec![3.0; n], &[n]);
        let sum = unary(&x, Unary::Affine(1.0, 1.0));
        let square = binary(&sum, &sum, Binary::Mul).duplicate();
        let zeros = Tensor::zeros(gpu, DType::F32, &[n]);
        binary(&binary(&square, &threes, Binary::Mul), &zeros, Binary::Add)
    });
    (x.place(), y.place(), plan.expect("no fault"))
}

#[test]
fn a_replay_computes_from_what_its_places_hold_now() {
    let gpu = open(None);
    let arena = Arena::new(&gpu);
    let (x, y, plan) = planned(&gpu, &arena, 1000);
    // Made, not yet replayed: x was zeros.
    assert_eq!(y.copy().to_f32().unwrap(), vec![3.0; 1000]);
    let (made, memory) = (gpu.bind_groups(), gpu.memory());
    for value in [1.0f32, -3.0, 0.5] {
        x.fill(&Tensor::from_f32(&gpu, &vec![value; 1000], &[1000]));
        // What others do meanwhile has other buffers.
        let other = unary(&Tensor::zeros(&gpu, DType::F32, &[1000]), Unary::Exp);
        gpu.replay(&plan);
        let expected = 3.0 * (value + 1.0).powi(2);
        assert_eq!(y.copy().to_f32().unwrap(), vec![expected; 1000]);
        assert_eq!(other.to_f32().unwrap(), vec![1.0; 1000]);
    }
    // One bind group for each of the ops beside the plan and none for it.
    assert!(gpu.bind_groups() - made <= 3);
    assert!(gpu.memory().current_bytes <= memory.current_bytes);
    drop((arena, plan));
    assert_eq!(gpu.memory().current_bytes, 0);
}

#[test]
fn plans_of_one_arena_share_its_memory() {
    let gpu = open(None);
    let arena = Arena::new(&gpu);
    let first = planned(&gpu, &arena, 4000);
    let held = gpu.memory().current_bytes;
    let second = planned(&gpu, &arena, 4000);
    assert_eq!(gpu.memory().current_bytes, held);
    for (x, y, plan) in [&first, &second, &first] {
        x.fill(&Tensor::from_f32(&gpu, &[1.0; 4000], &[4000]));
        gpu.replay(plan);
        assert_eq!(y.copy().to_f32().unwrap(), [12.0; 4000]);
    }
}

#[test]
fn memory_of_an_arena_that_nobody_holds_is_given_up_before_an_error() {
    let gpu = open(Some(8 << 20));
    let (held, idle) = (Arena::new(&gpu), Arena::new(&gpu));
    let hold = held.hold();
    planned(&gpu, &held, 60_000);
    planned(&gpu, &idle, 160_000);
    let before = gpu.memory().current_bytes;
    assert!((4 << 20..8 << 20).contains(&before), "{before}");
    let large = Tensor::zeros(&gpu, DType::F32, &[1 << 20]);
    gpu.check().expect("the idle arena made room");
    assert!(idle.given_up() && !held.given_up());
    drop(large);
    // What is not there at all is an error still.
    drop(hold);
    drop(Tensor::zeros(&gpu, DType::F32, &[3 << 20]));
    assert!(gpu.check().is_err());
    // A plan that a fault cut short is none.
    let arena = Arena::new(&gpu);
    let (_, plan) = gpu.plan(&arena, || Tensor::zeros(&gpu, DType::F32, &[3 << 20]));
    assert!(plan.is_none() && gpu.check().is_err());
    assert!(gpu.plan(&arena, || ()).1.is_some_and(|p| p.is_empty()));
}

#[test]
fn what_another_thread_does_is_no_part_of_a_plan() {
    let gpu = open(None);
    let arena = Arena::new(&gpu);
    let (_, plan) = gpu.plan(&arena, || {
        std::thread::scope(|scope| {
            let other = scope.spawn(|| {
                assert!(!gpu.planning());
                let x = Tensor::from_f32(&gpu, &[2.0], &[1]);
                unary(&x, Unary::Exp).to_f32()
            });
            let read = other.join().expect("the other thread");
            assert!((read.expect("readable")[0] - 2f32.exp()).abs() < 1e-5);
        });
        unary(&Tensor::zeros(&gpu, DType::F32, &[8]), Unary::Exp)
    });
    // A clear and a dispatch.
    assert_eq!(plan.expect("no fault").len(), 2);
}
