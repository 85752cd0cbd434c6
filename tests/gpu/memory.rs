use lavender_wgpu::gpu::{Gpu, GpuOptions};
use lavender_wgpu::ops::unary::{Unary, unary};
use lavender_wgpu::tensor::{DType, Tensor};

fn own_gpu() -> Gpu {
    let options = GpuOptions {
        checked: true,
        ..GpuOptions::default()
    };
    Gpu::new(&options).expect("adapter")
}

#[test]
fn current_peak_and_reserved_bytes_follow_the_tensors() {
    let gpu = own_gpu();
    assert_eq!(gpu.memory().current_bytes, 0);
    let bytes = 1000 * 4;
    let a = Tensor::empty(&gpu, DType::F32, &[1000]);
    let one = gpu.memory();
    assert!((bytes..2 * bytes).contains(&one.current_bytes), "{one:?}");
    assert_eq!(
        (one.peak_bytes, one.reserved_bytes),
        (one.current_bytes, one.current_bytes)
    );
    let b = Tensor::empty(&gpu, DType::F32, &[1000]);
    assert_eq!(gpu.memory().current_bytes, 2 * one.current_bytes);
    // Clones and views share the storage.
    let views = (a.clone(), a.reshape(&[10, 100]));
    assert_eq!(gpu.memory().current_bytes, 2 * one.current_bytes);
    drop(a);
    assert_eq!(
        gpu.memory().current_bytes,
        2 * one.current_bytes,
        "views keep it"
    );
    drop(views);
    let after = gpu.memory();
    assert_eq!(after.current_bytes, one.current_bytes);
    assert_eq!(after.peak_bytes, 2 * one.current_bytes);
    assert_eq!(
        after.reserved_bytes,
        2 * one.current_bytes,
        "freed buffers stay in the pool"
    );
    let c = Tensor::empty(&gpu, DType::F32, &[990]);
    assert_eq!(
        gpu.memory().reserved_bytes,
        after.reserved_bytes,
        "the free one is used again"
    );
    gpu.reset_peak();
    assert_eq!(gpu.memory().peak_bytes, 2 * one.current_bytes);
    drop((b, c));
    gpu.reset_peak();
    gpu.trim();
    let end = gpu.memory();
    assert_eq!(
        (end.current_bytes, end.peak_bytes, end.reserved_bytes),
        (0, 0, 0)
    );
}

#[test]
fn reused_storage_never_shows_through_pending_work() {
    // Many short-lived tensors share one pooled buffer while the work is still only recorded.
    let gpu = own_gpu();
    let mut sums = Vec::new();
    for i in 0..200 {
        let x = Tensor::from_f32(&gpu, &[i as f32; 64], &[64]);
        let y = unary(&unary(&x, Unary::Affine(2.0, 1.0)), Unary::Square);
        if i % 20 == 0 {
            sums.push((i, y));
        }
    }
    for (i, y) in sums {
        let expected = (2.0 * i as f32 + 1.0).powi(2);
        assert_eq!(y.to_f32().expect("readable"), vec![expected; 64]);
    }
    assert!(
        gpu.memory().reserved_bytes < 100 * 512,
        "{:?}",
        gpu.memory()
    );
}

#[test]
fn a_read_keeps_the_values_of_its_moment() {
    let gpu = own_gpu();
    let x = Tensor::from_f32(&gpu, &[1.0, 2.0, 3.0], &[3]);
    let early = x.read_later();
    x.write_f32(&[4.0, 5.0, 6.0]);
    let late = x.read_later();
    assert_eq!(late.wait().expect("late"), [4.0, 5.0, 6.0]);
    assert_eq!(early.wait().expect("early"), [1.0, 2.0, 3.0]);
}

#[test]
fn profiling_times_every_op_by_name() {
    let options = GpuOptions {
        profile: true,
        ..GpuOptions::default()
    };
    let gpu = Gpu::new(&options).expect("adapter");
    let x = Tensor::zeros(&gpu, DType::F32, &[1 << 16]);
    for _ in 0..3 {
        unary(&x, Unary::Silu);
    }
    let times = gpu.profile();
    if !gpu.tier().timestamps {
        assert!(times.is_empty());
        return;
    }
    assert_eq!(times.len(), 1, "{times:?}");
    // What tells its variants apart comes after the name.
    let name = times[0].op.split(' ').next();
    assert_eq!((name, times[0].count), (Some("unary"), 3), "{times:?}");
    assert!(gpu.profile().is_empty(), "taken once");
}

#[test]
fn profiling_without_timestamps_times_nothing_and_changes_nothing() {
    let options = GpuOptions {
        profile: true,
        portable: true,
        ..GpuOptions::default()
    };
    let gpu = Gpu::new(&options).expect("adapter");
    let x = Tensor::from_f32(&gpu, &[3.0; 8], &[8]);
    let y = unary(&x, Unary::Square).to_f32().expect("readable");
    assert_eq!(y, [9.0; 8]);
    assert!(gpu.profile().is_empty());
}
