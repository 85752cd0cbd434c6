//! Times Stable Diffusion v1.4's size on the adapter at hand, on the files that `tests/reference/full_size.py OUTDIR`
//! writes: `LAVENDER_FULL_SIZE=OUTDIR cargo bench --bench teacher -- [--side 32] [--steps 3] [--f16]
//! [--null-text]`.
//!
//! Prints one U-Net forward with and without capture, `ddim` over N steps against N forwards and the encoders, and the
//! peak of our allocator; with `--null-text`, one update of that instead. With `LAVENDER_PYTHON` set to a Python that has diffusers, also the ratio to it on this
//! machine's CPU (all cores, or `LAVENDER_THREADS`).

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use lavender_wgpu::diffusion::{
    Capture, MapLayers, NullTextOptions, Plan, StableDiffusion, TeacherFiles, TeacherOptions,
    Trajectory,
};
use lavender_wgpu::gpu::{Gpu, GpuOptions};
use lavender_wgpu::tensor::{DType, Tensor};

/// The value of `--name VALUE`.
fn number(name: &str, default: usize) -> usize {
    let args: Vec<String> = std::env::args().collect();
    let at = args.iter().position(|a| a == name);
    let value = at.and_then(|i| args.get(i + 1)?.parse().ok());
    value.unwrap_or(default)
}

fn flag(name: &str) -> bool {
    std::env::args().any(|a| a == name)
}

/// The best seconds of `runs` runs.
fn seconds(gpu: &Gpu, runs: usize, mut f: impl FnMut()) -> f64 {
    let mut best = f64::MAX;
    for _ in 0..runs {
        let start = Instant::now();
        f();
        gpu.wait().expect("the run succeeds");
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

/// diffusers' seconds for a U-Net forward and for the encoder, one thread a core.
fn diffusers(root: &Path, side: usize, threads: usize) -> Option<[f64; 2]> {
    let python = std::env::var_os("LAVENDER_PYTHON")?;
    let script = format!(
        "import sys,time,torch\n\
         from diffusers import AutoencoderKL,UNet2DConditionModel\n\
         torch.set_num_threads({threads})\n\
         def t(f):\n f(); best=9e9\n for _ in range(2):\n  s=time.perf_counter(); f(); best=min(best,time.perf_counter()-s)\n print(best)\n\
         with torch.no_grad():\n \
          u=UNet2DConditionModel.from_pretrained(sys.argv[1]+'/unet',torch_dtype=torch.float32)\n \
          x=torch.rand(1,4,{side},{side}); e=torch.rand(1,77,768)\n \
          t(lambda: u(x,261,encoder_hidden_states=e)); del u\n \
          v=AutoencoderKL.from_pretrained(sys.argv[1]+'/vae',torch_dtype=torch.float32)\n \
          p=torch.rand(1,3,8*{side},8*{side}); t(lambda: v.encode(p))\n"
    );
    let output = Command::new(python)
        .args(["-c", &script])
        .arg(root)
        .env_remove("LD_LIBRARY_PATH")
        .env("OMP_NUM_THREADS", threads.to_string())
        .output()
        .ok()?;
    if !output.status.success() {
        eprintln!("{}", String::from_utf8_lossy(&output.stderr));
        return None;
    }
    let text = String::from_utf8(output.stdout).ok()?;
    let mut lines = text.lines().map(|line| line.parse().ok());
    Some([lines.next()??, lines.next()??])
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn main() {
    let Some(dir) = std::env::var_os("LAVENDER_FULL_SIZE").map(PathBuf::from) else {
        println!("LAVENDER_FULL_SIZE is not set: nothing to time");
        return;
    };
    let root = dir.join("sd");
    let (side, steps) = (number("--side", 64), number("--steps", 3));
    let gpu = Gpu::new(&GpuOptions {
        adapter: std::env::var("LAVENDER_ADAPTER").ok(),
        ..GpuOptions::default()
    })
    .expect("an adapter");
    let options = TeacherOptions {
        activations: if flag("--f16") {
            DType::F16
        } else {
            DType::F32
        },
    };
    let trajectory = Trajectory::Ddim { steps };
    println!("{}", gpu.tier());
    let files = TeacherFiles::open(&root, &options).expect("files of full_size.py");
    println!(
        "{}",
        Plan::new(&gpu, &files, &options, trajectory, 1).expect("it fits")
    );
    let model: StableDiffusion = files.load(&gpu, &options).expect("it loads");
    gpu.wait().expect("it loads");
    println!(
        "weights {:.0} MiB; latents {side}², {:?}, {steps} steps",
        mib(gpu.memory().current_bytes),
        options.activations
    );
    let values: Vec<f32> = (0..(8 * side).pow(2) * 3)
        .map(|i| (i % 251) as f32 / 125.5 - 1.0)
        .collect();
    let pixels = Tensor::from_f32(&gpu, &values, &[1, 8 * side, 8 * side, 3]);
    let chunks = model
        .tokenizer
        .chunks("a red circle above two blue squares")
        .expect("a text");
    let (mut text, mut latents) = (None, None);
    gpu.reset_peak();
    let encoders = seconds(&gpu, 1, || {
        text = Some(model.encode_text(&[&chunks[0]]));
        latents = Some(model.encode_images(&pixels));
    });
    let (text, latents) = (text.expect("states"), latents.expect("latents"));
    let peak_encoders = gpu.memory().peak_bytes;
    println!(
        "encoders {encoders:.2} s, peak {:.0} MiB",
        mib(peak_encoders)
    );
    if flag("--null-text") {
        return null_text(&model, &latents, &text);
    }
    gpu.reset_peak();
    let forward = seconds(&gpu, 2, || {
        model.predict_noise(&latents, 261, &text, None);
    });
    let captured = seconds(&gpu, 2, || {
        let mut capture = Capture::new(MapLayers::default(), side);
        model.predict_noise(&latents, 261, &text, Some(&mut capture));
    });
    println!(
        "U-Net forward {forward:.2} s, with capture {captured:.2} s ({:.3} of it), peak {:.0} MiB",
        captured / forward,
        mib(gpu.memory().peak_bytes)
    );
    gpu.reset_peak();
    let texts = [chunks.clone()];
    let whole = seconds(&gpu, 1, || {
        let latents = model.encode_images(&pixels);
        let layers = MapLayers::default();
        model
            .token_maps(&latents, &texts, trajectory, layers, &[0], |_| Ok(()))
            .expect("the trajectory runs");
    });
    println!(
        "ddim {whole:.2} s: {:.3} of {steps} forwards and the encoders, peak {:.0} MiB",
        whole / (steps as f64 * forward + encoders),
        mib(gpu.memory().peak_bytes)
    );
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = std::env::var("LAVENDER_THREADS").ok();
    let threads = threads.and_then(|v| v.parse().ok()).unwrap_or(cores);
    if let Some([unet, vae]) = diffusers(&root, side, threads) {
        println!(
            "diffusers on the CPU, {threads} threads, f32: U-Net {unet:.2} s, encoder {vae:.2} s; \
             ours at {:.3} and {:.3} of its speed",
            unet / forward,
            vae / encoders
        );
    }
}

/// One timestep of null-text inversion with one update: of its five U-Net passes one is a backward, and that one holds
/// the most.
fn null_text(model: &StableDiffusion, latents: &Tensor, text: &Tensor) {
    let gpu = model.gpu();
    let mut pivots = Vec::new();
    let forward = seconds(gpu, 1, || {
        let inverted = model.invert(latents, text, 1, None, |_| Ok(()));
        pivots = inverted.expect("the inversion runs").1;
    });
    gpu.reset_peak();
    let options = NullTextOptions {
        updates: 1,
        ..NullTextOptions::default()
    };
    let time = seconds(gpu, 1, || {
        model
            .null_text(&pivots, text, &options, None, |_| Ok(()))
            .expect("it runs");
    });
    println!(
        "U-Net forward {forward:.2} s; null-text, one timestep of one update {time:.2} s ({:.2} forwards), peak {:.0} MiB",
        time / forward,
        mib(gpu.memory().peak_bytes)
    );
}
