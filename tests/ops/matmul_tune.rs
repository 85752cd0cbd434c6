//! Tuning: measured choices are obeyed and give the same products; what is not measured is noted.

use std::path::Path;

use lavender_wgpu::Error;
use lavender_wgpu::gpu::{Gpu, GpuOptions, Tuned, Tuning};
use lavender_wgpu::ops::matmul::{MatmulOptions, Shape, matmul, tune};
use lavender_wgpu::ops::unary::{Unary, unary};
use lavender_wgpu::tensor::{DType, Tensor};

use crate::support::*;

const SIZES: [usize; 3] = [130, 100, 160];

fn open(tuning: Tuning, dir: &Path) -> Gpu {
    open_within(None, tuning, dir)
}

fn open_within(max_bytes: Option<u64>, tuning: Tuning, dir: &Path) -> Gpu {
    Gpu::new(&GpuOptions {
        checked: true,
        profile: true,
        max_bytes,
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
    let measuring = open(Tuning::FirstUse, dir.path());
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

/// The class's choice as the cache on disk has it.
fn kept(dir: &Path) -> Option<Tuned> {
    open(Tuning::Cached, dir).tuned(&shape().class())
}

#[test]
fn what_first_use_finds_is_obeyed_and_on_disk_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(Tuning::FirstUse, dir.path());
    let c = product(&first).to_f32().unwrap();
    let found = first.tuned(&shape().class()).expect("measured");
    // Not the milliseconds: JSON may change their last bit.
    let same_choice = |other: Option<Tuned>| other.expect("kept").choice == found.choice;
    assert!(same_choice(kept(dir.path())));
    assert_eq!(first.tuning_spent().classes, 1);
    let second = open(Tuning::FirstUse, dir.path());
    assert!(same(&product(&second), &c));
    assert!(same_choice(second.tuned(&shape().class())));
    assert_eq!(second.tuning_spent().classes, 0);
}

#[test]
fn the_first_run_to_keep_a_class_is_obeyed_by_one_that_measured_it_too() {
    let dir = tempfile::tempdir().unwrap();
    let late = open(Tuning::FirstUse, dir.path());
    let early = open(Tuning::Cached, dir.path());
    early.set_tuned(&shape().class(), tuned("tile 8 split 2"));
    early.save_tuning().expect("written");
    let expected = product(&early).to_f32().unwrap();
    assert!(!same(&product(gpu()), &expected), "bits tell nothing here");
    assert!(same(&product(&late), &expected));
    drop(late);
    assert_eq!(kept(dir.path()), Some(tuned("tile 8 split 2")));
}

#[test]
fn nothing_is_measured_that_cannot_be_kept() {
    let dir = tempfile::tempdir().unwrap();
    // A file where the folder would be.
    let path = dir.path().join("cache");
    std::fs::write(&path, "").unwrap();
    let usual = product(gpu()).to_f32().unwrap();
    let log = warnings(|| {
        let gpu = open(Tuning::FirstUse, &path);
        assert!(same(&product(&gpu), &usual));
        assert!(same(&product(&gpu), &usual));
        assert_eq!(gpu.tuned(&shape().class()), None);
        assert_eq!(gpu.tuning_spent().classes, 0);
        assert_eq!(gpu.tuning_anew(), None);
    });
    assert_eq!(log.matches("not measured").count(), 1, "{log}");
    assert!(log.contains(path.to_str().unwrap()), "{log}");
}

#[test]
fn running_out_of_memory_while_measuring_harms_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let off = open(Tuning::Off, dir.path());
    let usual = product(&off).to_f32().unwrap();
    // Room for the product, but not for its operands twice.
    let room = off.memory().reserved_bytes;
    let log = warnings(|| {
        let gpu = open_within(Some(room), Tuning::FirstUse, dir.path());
        let c = product(&gpu);
        gpu.check().expect("no fault is left");
        assert!(same(&c, &usual));
        drop(c);
        assert!(same(&product(&gpu), &usual));
        assert_eq!(gpu.tuned(&shape().class()), None);
        let spent = gpu.tuning_spent();
        assert_eq!((spent.classes, spent.failed), (0, 1));
    });
    assert_eq!(log.matches("not measured").count(), 1, "{log}");
    assert!(log.contains("memory"), "{log}");
    assert_eq!(kept(dir.path()), None);
    // With room it is measured, and what that took is given back: no more is held than where the choice was only read.
    let reserved = |tuning| {
        let gpu = open(tuning, dir.path());
        product(&gpu);
        assert!(gpu.tuned(&shape().class()).is_some());
        gpu.memory().reserved_bytes
    };
    let (held, plain) = (reserved(Tuning::FirstUse), reserved(Tuning::Cached));
    assert!(held <= plain + (64 << 10), "{held} bytes, {plain} without");
}

#[test]
fn an_error_from_before_is_neither_lost_nor_decides() {
    let dir = tempfile::tempdir().unwrap();
    let gpu = open_within(Some(4 << 20), Tuning::FirstUse, dir.path());
    let large = Tensor::zeros(&gpu, DType::F32, &[4 << 20]);
    product(&gpu);
    assert_eq!(gpu.tuning_spent().failed, 0);
    assert!(matches!(gpu.check(), Err(Error::OutOfMemory { .. })));
    drop(large);
    product(&gpu);
    assert_eq!(gpu.tuning_spent().classes, 1);
    gpu.check().expect("measured");
}

#[test]
fn a_profile_tells_nothing_of_measuring() {
    let dir = tempfile::tempdir().unwrap();
    let gpu = open(Tuning::FirstUse, dir.path());
    if !gpu.tier().timestamps {
        return;
    }
    unary(&Tensor::zeros(&gpu, DType::F32, &[8]), Unary::Relu);
    product(&gpu);
    assert_eq!(gpu.tuning_spent().classes, 1);
    let times = gpu.profile();
    let count = |op: &str| -> u64 {
        let ran = times.iter().filter(|time| time.op.starts_with(op));
        ran.map(|time| time.count).sum()
    };
    assert_eq!(count("unary"), 1, "{times:?}");
    assert!(count("matmul") <= 4, "{times:?}");
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
