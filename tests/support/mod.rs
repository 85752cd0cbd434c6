//! Shared by the test binaries: one GPU, random data, the error metric, fixtures.
#![allow(dead_code)]

use std::path::PathBuf;
use std::sync::{Arc, LazyLock, Mutex};

use lavender_wgpu::gpu::{Gpu, GpuOptions};
use lavender_wgpu::tensor::{DType, Tensor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

static GPU: LazyLock<Gpu> = LazyLock::new(|| {
    let options = GpuOptions {
        checked: true,
        ..GpuOptions::default()
    };
    Gpu::new(&options).expect("tests need an adapter: run them through `make test`")
});

/// The test binary's GPU, with shader bounds checks on.
pub fn gpu() -> &'static Gpu {
    &GPU
}

/// A seeded generator.
pub fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// `n` values uniform in [-1, 1).
pub fn uniform(rng: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-1.0f32..1.0)).collect()
}

/// Uploads `values` as `dtype` and returns the tensor with the values it really holds.
pub fn upload(values: &[f32], dtype: DType, shape: &[usize]) -> (Tensor, Vec<f64>) {
    let bytes = dtype.narrow(values);
    let held = dtype.widen(&bytes).iter().map(|&v| f64::from(v)).collect();
    (Tensor::from_bytes(gpu(), &bytes, dtype, shape), held)
}

/// Normalised mean squared error: Σ(a−b)² / Σb².
pub fn nmse(actual: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(actual.len(), expected.len(), "lengths differ");
    let error: f64 = actual
        .iter()
        .zip(expected)
        .map(|(&a, &e)| (f64::from(a) - e).powi(2))
        .sum();
    let norm: f64 = expected.iter().map(|e| e * e).sum();
    error / norm.max(1e-30)
}

/// NMSE allowed against an f64 reference: rounding of f32 sums, or of f16 storage.
pub fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 1e-9,
        _ => 1e-5,
    }
}

/// Asserts that `actual` holds `expected` to the tolerance of its dtype.
#[track_caller]
pub fn assert_close(what: &str, actual: &Tensor, expected: &[f64]) {
    let error = nmse(&actual.to_f32().expect("readable"), expected);
    let allowed = tolerance(actual.dtype());
    assert!(error <= allowed, "{what}: NMSE {error:e} > {allowed:e}");
}

/// Activation dtypes this adapter has.
pub fn float_types() -> Vec<DType> {
    if gpu().tier().f16 {
        vec![DType::F32, DType::F16]
    } else {
        vec![DType::F32]
    }
}

/// A file or directory of `tests/reference`.
pub fn reference(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/reference")
        .join(path)
}

/// Gradient of `loss` at `x` by central differences in f64 (error about 1e-9 of the values here).
pub fn numeric_gradient(x: &[f64], loss: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let mut at = x.to_vec();
    (0..x.len())
        .map(|i| {
            let h = 1e-5;
            at[i] = x[i] + h;
            let above = loss(&at);
            at[i] = x[i] - h;
            let below = loss(&at);
            at[i] = x[i];
            (above - below) / (2.0 * h)
        })
        .collect()
}

/// Σ a·b.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// What is logged on the way, errors and warnings.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The warnings that `work` logs on this thread.
pub fn warnings(work: impl FnOnce()) -> String {
    let log = Log::default();
    let to = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_ansi(false)
        .with_writer(move || to.clone())
        .finish();
    tracing::subscriber::with_default(subscriber, work);
    String::from_utf8(log.0.lock().unwrap().clone()).unwrap()
}
