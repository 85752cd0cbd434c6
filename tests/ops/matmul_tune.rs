//! Tuning: measured choices are obeyed and give the same products; what is not measured is noted.

use std::path::Path;

use lavender_wgpu::gpu::{Gpu, GpuOptions, Tuned, Tuning};
use lavender_wgpu::ops::matmul::{MatmulOptions, Shape, matmul, tune};
use lavender_wgpu::tensor::{DType, Tensor};

use crate::support::*;

const SIZES: [usize; 3] = [130, 100, 160];

fn open(tuning: Tuning, dir: &Path) -> Gpu {
    Gpu::new(&GpuOptions {
        checked: true,
        profile: true,
        tuning,
        cache_dir: Some(dir.to_path_buf()),
        ..GpuOptions::default()
    })
    .expect("an adapter")
}

fn shape() -> Shape {
    Shape::float(SIZES, [false, true], DType::F32, DType::F32)
}

fn product(gpu: &Gpu) -> Tensor {
    let [m, n, k] = SIZES;
    let mut rng = rng(51);
    let a = Tensor::from_f32(gpu, &uniform(&mut rng, m * k), &[m, k]);
    let b = Tensor::from_f32(gpu, &uniform(&mut rng, n * k), &[n, k]);
    let options = MatmulOptions {
        trans_b: true,
        ..MatmulOptions::default()
    };
    matmul(&a, &b, &options)
}

/// Bit for bit.
fn same(c: &Tensor, expected: &[f32]) -> bool {
    c.to_f32().unwrap() == expected
}

fn kernels(gpu: &Gpu) -> Vec<String> {
    gpu.profile().into_iter().map(|time| time.op).collect()
}

fn tuned(choice: &str) -> Tuned {
    Tuned {
        choice: choice.into(),
        shape: shape().to_string(),
        millis: 1.0,
        usual_millis: 1.0,
    }
}

#[test]
fn a_tuned_choice_is_obeyed_and_gives_the_same_product() {
    let dir = tempfile::tempdir().unwrap();
    let usual = product(gpu()).to_f32().unwrap();
    let expected: Vec<f64> = usual.iter().map(|&v| v.into()).collect();
    for (choice, kernel) in [
        ("tile 4", "matmul_tile PER=4"),
        ("tile 8 split 2", "matmul_reduce"),
        ("rows", "matmul_rows"),
    ] {
        let gpu = open(Tuning::Cached, dir.path());
        gpu.set_tuned(&shape().class(), tuned(choice));
        let c = product(&gpu);
        assert_close(choice, &c, &expected);
        let ran = kernels(&gpu);
        assert!(
            !gpu.tier().timestamps || ran.iter().any(|op| op.starts_with(kernel)),
            "{choice}: {ran:?}"
        );
        gpu.save_tuning().expect("written");
        // And by the next run, from the cache: bit for bit.
        let again = product(&open(Tuning::Cached, dir.path()));
        assert!(same(&again, &c.to_f32().unwrap()), "{choice}: next run");
        // But not by one that is not tuned.
        let off = product(&open(Tuning::Off, dir.path()));
        assert!(same(&off, &usual), "{choice}: untuned run");
    }
}

#[test]
fn a_choice_that_cannot_do_the_product_gives_way() {
    let dir = tempfile::tempdir().unwrap();
    let usual = product(gpu()).to_f32().unwrap();
    // Rows of a: far too many; f32 on f16's units; words of no meaning.
    for choice in ["vector 1", "cooperative 16 4", "rm -rf", ""] {
        let gpu = open(Tuning::Cached, dir.path());
        gpu.set_tuned(&shape().class(), tuned(choice));
        assert!(same(&product(&gpu), &usual), "{choice}");
    }
}

#[test]
fn what_a_run_meets_is_noted_and_measured_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    let cached = open(Tuning::Cached, dir.path());
    product(&cached);
    assert_eq!(cached.tuning_shapes(), [shape().to_string()]);
    assert_eq!(cached.tuned(&shape().class()), None);
    drop(cached);
    let measuring = open(Tuning::Measure, dir.path());
    assert_eq!(measuring.tuning_shapes(), [shape().to_string()]);
    let expected = product(gpu()).to_f32().unwrap();
    let expected: Vec<f64> = expected.iter().map(|&v| v.into()).collect();
    assert_close("measured", &product(&measuring), &expected);
    let found = measuring.tuned(&shape().class()).expect("measured");
    assert!(
        found.millis > 0.0 && found.millis <= found.usual_millis,
        "{found:?}"
    );
    let dispatched = measuring.dispatches();
    product(&measuring);
    assert!(measuring.dispatches() - dispatched < 8, "measured again");
}

#[test]
fn every_type_can_be_measured() {
    let gpu = gpu();
    let mut shapes = vec!["1x70x60x128 nn f32 bf16 f32", "2x40x60x52 tn f32 f32 f32"];
    shapes.push("1x4x256x256 nt f32 q4 f32");
    if gpu.tier().f16 {
        shapes.extend(["1x70x60x50 nt f16 f16 f32", "1x70x64x128 nn f16 q8 f16"]);
    }
    for shape in shapes {
        let tuned = tune(gpu, &shape.parse().unwrap()).unwrap_or_else(|e| panic!("{shape}: {e}"));
        assert_eq!(tuned.shape, shape);
        assert!(tuned.millis > 0.0 && tuned.millis.is_finite(), "{tuned:?}");
    }
}
