use lavender_wgpu::error::Error;
use lavender_wgpu::gpu::{Gpu, GpuOptions};
use lavender_wgpu::ops::unary::{Unary, unary};
use lavender_wgpu::tensor::{DType, Tensor};

fn limited(max_bytes: Option<u64>) -> Gpu {
    let options = GpuOptions {
        checked: true,
        max_bytes,
        ..GpuOptions::default()
    };
    Gpu::new(&options).expect("adapter")
}

#[test]
fn running_out_of_memory_is_an_error_at_the_step_boundary() {
    let limit = 1 << 20;
    let gpu = limited(Some(limit));
    let kept = Tensor::from_f32(&gpu, &[3.0; 1000], &[1000]);
    gpu.check().expect("that fits");
    let large = Tensor::zeros(&gpu, DType::F32, &[1 << 20]);
    let y = unary(&large, Unary::Relu);
    assert_eq!(y.shape(), [1 << 20]);
    match gpu.check() {
        Err(Error::OutOfMemory {
            requested,
            in_use,
            limit: Some(bound),
        }) => {
            assert!(requested >= 4 << 20, "{requested}");
            assert!((4000..limit).contains(&in_use), "{in_use}");
            assert_eq!(bound, limit);
        }
        other => panic!("{other:?}"),
    }
    drop((large, y));
    // Reported once; what fits works on, and what was there is intact.
    gpu.check().expect("reported already");
    assert_eq!(
        unary(&kept, Unary::Square).to_f32().expect("works on"),
        vec![9.0; 1000]
    );
}

#[test]
fn free_buffers_are_given_back_before_memory_is_said_to_be_out() {
    let gpu = limited(Some(1 << 20));
    for size in [30_000usize, 60_000, 100_000, 150_000, 200_000] {
        let x = Tensor::zeros(&gpu, DType::F32, &[size]);
        gpu.check().unwrap_or_else(|e| panic!("{size}: {e}"));
        drop(x);
    }
    assert!(gpu.memory().reserved_bytes <= 1 << 20);
}

#[test]
fn the_message_says_how_much_and_what_to_do() {
    let gpu = limited(Some(4096));
    Tensor::zeros(&gpu, DType::F32, &[10_000]);
    let message = gpu.check().expect_err("over the limit").to_string();
    assert!(
        message.contains("limit 4096 bytes") && message.contains("smaller"),
        "{message}"
    );
}

#[test]
fn faults_stick_until_reported_and_nothing_runs_meanwhile() {
    let gpu = limited(Some(1 << 20));
    let x = Tensor::from_f32(&gpu, &[1.0; 8], &[8]);
    Tensor::zeros(&gpu, DType::F32, &[1 << 22]);
    // With the fault pending neither writes nor dispatches take place…
    x.write_f32(&[5.0; 8]);
    // … and a read reports it instead of giving stale values.
    match x.to_f32() {
        Err(Error::OutOfMemory { .. }) => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(x.to_f32().expect("reported already"), [1.0; 8]);
}

#[test]
fn a_tensor_that_never_got_memory_stays_an_error() {
    let gpu = limited(Some(1 << 20));
    let large = Tensor::zeros(&gpu, DType::F32, &[1 << 22]);
    gpu.check().expect_err("out of memory");
    let y = unary(&large.narrow(0, 64), Unary::Relu);
    let whole = unary(&large, Unary::Relu);
    gpu.flush();
    assert!(whole.to_f32().is_err(), "no values can come of it");
    drop(y);
}

#[test]
fn a_binding_over_the_limit_is_refused_with_both_sizes() {
    let gpu = limited(None);
    let limit = gpu.tier().max_binding;
    if limit > 256 << 20 {
        // Large adapters bind gigabytes: too much to allocate in a test.
        return;
    }
    let n = limit as usize / 4 + 64;
    let x = Tensor::empty(&gpu, DType::F32, &[n]);
    unary(&x, Unary::Relu);
    match gpu.check() {
        Err(Error::BindingTooLarge {
            op,
            bytes,
            limit: found,
        }) => {
            assert_eq!((op.as_str(), bytes, found), ("unary", 4 * n as u64, limit));
        }
        other => panic!("{other:?}"),
    }
    // A part of it binds.
    let part = unary(&x.narrow(0, 1024), Unary::Affine(0.0, 2.0));
    assert_eq!(part.to_f32().expect("fits"), vec![2.0; 1024]);
}
