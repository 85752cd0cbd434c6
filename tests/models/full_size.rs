//! Stable Diffusion v1.4's true size against `diffusers`, on random weights: `tests/reference/full_size.py OUTDIR`, then
//!
//! `LAVENDER_FULL_SIZE=OUTDIR cargo test --release --test models full_size -- --ignored --nocapture`

use std::path::Path;
use std::time::Instant;

use lavender_wgpu::autograd::{Var, no_grad};
use lavender_wgpu::diffusion::{
    Capture, MapLayers, Plan, StableDiffusion, TeacherFiles, TeacherOptions, Trajectory,
};
use lavender_wgpu::gpu::{Gpu, GpuOptions};
use lavender_wgpu::ops::cast::cast;
use lavender_wgpu::ops::permute::permute;
use lavender_wgpu::tensor::{Checkpoint, DType, Tensor};

/// f32: sums of up to 23,040 products (3·3·2,560) in another order, through some sixty layers one after the other;
/// measured 2e-5.
const F32: f32 = 1e-4;
/// f16 activations: 11 bits, rounded after each of those layers; measured 7e-3.
const F16: f32 = 2e-2;

/// Largest difference over the largest expected value.
fn error(found: &Tensor, expected: &[f32]) -> f32 {
    let found = found.to_f32().unwrap();
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let each = found
        .iter()
        .zip(expected)
        .map(|(a, e)| match a.is_finite() {
            true => (a - e).abs(),
            false => f32::INFINITY,
        });
    each.fold(0.0, f32::max) / largest
}

struct Run {
    gpu: Gpu,
    expected: Checkpoint,
    tolerance: f32,
    start: Instant,
}

impl Run {
    /// Channels last.
    fn input(&self, name: &str) -> Tensor {
        let (values, shape) = self.expected.values(name).unwrap();
        permute(&Tensor::from_f32(&self.gpu, &values, &shape), &[0, 2, 3, 1])
    }

    /// Prints and checks one result; time and peak are those since the last.
    fn check(&mut self, what: &str, found: &Tensor, name: &str) {
        let error = error(found, &self.expected.values(name).unwrap().0);
        println!(
            "{what:30} error {error:.1e}  {:6.1} s  peak {:5.0} MiB",
            self.start.elapsed().as_secs_f32(),
            self.gpu.memory().peak_bytes as f64 / f64::from(1 << 20)
        );
        assert!(error <= self.tolerance, "{what}: {error:e}");
        self.gpu.reset_peak();
        self.start = Instant::now();
    }
}

fn compare(model: &Path, outputs: &Path, activations: DType) {
    let (options, gpu) = (
        TeacherOptions { activations },
        Gpu::new(&GpuOptions::default()),
    );
    let gpu = gpu.unwrap();
    println!("{} {activations:?}\n{}", model.display(), gpu.tier());
    let files = TeacherFiles::open(model, &options).unwrap();
    let ddim = Trajectory::Ddim { steps: 50 };
    println!("{}", Plan::new(&gpu, &files, &options, ddim, 1).unwrap());
    let start = Instant::now();
    let model: StableDiffusion = files.load(&gpu, &options).unwrap();
    gpu.wait().unwrap();
    println!("loaded in {:.1} s", start.elapsed().as_secs_f32());
    let mut run = Run {
        gpu: gpu.clone(),
        expected: Checkpoint::open(&outputs.join("expected.safetensors"), "").unwrap(),
        tolerance: if activations == DType::F16 { F16 } else { F32 },
        start: Instant::now(),
    };
    let bytes = std::fs::read(outputs.join("expected.safetensors")).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let text = header.metadata().as_ref().unwrap()["text"].clone();
    let chunks = model.tokenizer.chunks(&text).unwrap();
    let states = model.encode_text(&[&chunks[0]]);
    run.check("text states", &states, "text");
    let pixels = run.input("pixels");
    let encoded = model.encode_images(&pixels);
    let scale = 1.0 / model.vae.config().scaling_factor;
    let mean = Var::constant(permute(&encoded, &[0, 3, 1, 2])).scale(scale);
    run.check("VAE mean, 512 px", mean.value(), "mean");
    let latents = run.input("mean");
    let quarter = Var::constant(cast(&latents, activations));
    let quarter = quarter.narrow(1, 0, 32).narrow(2, 0, 32);
    let decoded = no_grad(|| model.vae.decode(&quarter));
    run.check(
        "VAE decoded, 256 px",
        &permute(decoded.value(), &[0, 3, 1, 2]),
        "decoded",
    );
    // Given the library's text states, so that each part's error is its own.
    let (values, shape) = run.expected.values("text").unwrap();
    let states = cast(&Tensor::from_f32(&gpu, &values, &shape), activations);
    let mut capture = Capture::new(MapLayers::Daam, 64);
    let latents = run.input("latents");
    let noise = model.predict_noise(&latents, 261, &states, Some(&mut capture));
    run.check("noise prediction", &permute(&noise, &[0, 3, 1, 2]), "noise");
    let mut seen = 0;
    for (layer, _, maps) in capture.layers() {
        run.check(
            layer.trim_end_matches(".transformer_blocks.0"),
            &maps,
            &format!("map.{layer}"),
        );
        seen += 1;
    }
    // Every cross-attention but the middle's, whose maps are never used.
    assert_eq!(seen, 15);
}

fn directory() -> std::path::PathBuf {
    let dir = std::env::var_os("LAVENDER_FULL_SIZE");
    dir.expect("LAVENDER_FULL_SIZE names what tests/reference/full_size.py wrote")
        .into()
}

#[test]
#[ignore = "needs the files that tests/reference/full_size.py writes, 12 GB of memory and minutes"]
fn full_size_in_f32_from_a_directory() {
    let dir = directory();
    compare(&dir.join("sd"), &dir, DType::F32);
}

#[test]
#[ignore = "needs the files that tests/reference/full_size.py writes, 12 GB of memory and minutes"]
fn full_size_in_f16_from_a_single_file() {
    let dir = directory();
    compare(&dir.join("single.safetensors"), &dir, DType::F16);
}
