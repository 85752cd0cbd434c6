//! The teacher in little memory: the VAE in tiles, the plan made before loading, and the layer that overflows.

use std::fs;
use std::path::PathBuf;

use image::RgbImage;
use lavender_wgpu::autograd::Var;
use lavender_wgpu::diffusion::vae_tiling::even_tile;
use lavender_wgpu::diffusion::{
    MapLayers, Plan, StableDiffusion, TeacherFiles, TeacherOptions, Trajectory,
};
use lavender_wgpu::gpu::{Gpu, GpuOptions};
use lavender_wgpu::tensor::{Checkpoint, DType, HostTensor, Tensor, save_safetensors};

use crate::support::{gpu, reference};
use crate::teacher_fixture::assert_relative;

const HALF: TeacherOptions = TeacherOptions {
    activations: DType::F16,
};

/// A tensor `[batch, channels, height, width]` of the tiling fixture with its channels last.
fn tiled(name: &str) -> (Vec<f32>, [usize; 4]) {
    let path = reference("teacher_layouts/tiled.safetensors");
    let (values, shape) = Checkpoint::open(&path, "").unwrap().values(name).unwrap();
    let [b, c, h, w] = shape[..] else {
        panic!("{name}: {shape:?}")
    };
    let pixels = (0..b).flat_map(|i| (0..h * w).map(move |pixel| (i, pixel)));
    let last = pixels.flat_map(|(i, pixel)| (0..c).map(move |k| (i * c + k) * h * w + pixel));
    (last.map(|at| values[at]).collect(), [b, h, w, c])
}

fn var(name: &str) -> Var {
    let (values, shape) = tiled(name);
    Var::constant(Tensor::from_f32(gpu(), &values, &shape))
}

#[test]
fn the_vae_in_tiles_is_diffusers() {
    let dir = reference("teacher/a");
    let mut model = StableDiffusion::load(gpu(), dir, &TeacherOptions::default()).unwrap();
    let compare = |what: &str, found: &Var, expected: &str| {
        let (values, shape) = tiled(expected);
        assert_eq!(found.shape(), shape, "{what}");
        // Rounding of f32 sums in another order, as in the untiled tests.
        assert_relative(what, &found.value().to_f32().unwrap(), &values, 1e-4);
    };
    // Tiles of 12 latents: a step of 9 cuts 28 × 24 into 4 × 3, the last of them short.
    let latents = var("latents");
    model.vae.tile = Some(12);
    compare("mean", &model.vae.encode(&var("pixels")).mean, "mean");
    compare("decoded", &model.vae.decode(&latents), "decoded");
    // What fits is whole: tiles no smaller than the image change nothing, and without a tile nothing is cut.
    let whole = |model: &StableDiffusion| model.vae.decode(&latents).value().to_f32().unwrap();
    model.vae.tile = None;
    let plain = whole(&model);
    model.vae.tile = Some(28);
    assert_eq!(whole(&model), plain);
    let (tiles, _) = tiled("decoded");
    let each = plain.iter().zip(&tiles).map(|(a, b)| (a - b).abs());
    let difference = each.fold(0.0, f32::max);
    assert!(
        difference > 0.1,
        "tiles are normalised by themselves: {difference}"
    );
}

#[test]
fn tiles_are_as_even_as_their_number_allows() {
    // 64 latents in tiles of at most 45: 2 × 2, for which a step of 33 is enough.
    assert_eq!(even_tile(64, 45), 44);
    assert_eq!(even_tile(64, 60), 44);
    assert_eq!(even_tile(64, 30), 24);
    for most in 4..80 {
        let tile = even_tile(64, most);
        assert!(tile.is_multiple_of(4) && tile <= most, "{most}: {tile}");
    }
}

fn own_gpu(max_bytes: Option<u64>) -> Gpu {
    let options = GpuOptions {
        max_bytes,
        ..GpuOptions::default()
    };
    Gpu::new(&options).unwrap()
}

/// Peak of loading checkpoint `name` and making maps of a batch of two, and the plan for it.
fn measured(name: &str, options: &TeacherOptions, trajectory: Trajectory) -> (u64, Plan) {
    let gpu = own_gpu(None);
    let files = TeacherFiles::open(reference(&format!("teacher/{name}")), options).unwrap();
    let plan = Plan::new(&gpu, &files, options, trajectory, 2).unwrap();
    let model = files.load(&gpu, options).unwrap();
    let image = image::open(reference("teacher/image.png"))
        .unwrap()
        .to_rgb8();
    let pixels = model.prepare_image(&image);
    let latents = model.encode_images(&pixels);
    let pair = lavender_wgpu::diffusion::pipeline::repeat_samples(&latents, &[0, 0]);
    let texts = vec![model.tokenizer.chunks("a red circle").unwrap(); 2];
    let layers = MapLayers::default();
    model
        .token_maps(&pair, &texts, trajectory, layers, &[0, 1], |_| Ok(()))
        .unwrap();
    (gpu.memory().peak_bytes, plan)
}

#[test]
fn the_plan_is_near_what_is_measured() {
    let mut all = vec![TeacherOptions::default()];
    all.extend(gpu().tier().f16.then_some(HALF));
    for options in all {
        let (peak, plan) = measured("a", &options, Trajectory::Ddim { steps: 2 });
        assert_eq!((plan.batch, plan.tile), (2, None));
        // A tiny model's peak is mostly small buffers that the plan does not count; a real one's is weights.
        let ratio = plan.peak() as f64 / peak as f64;
        println!("{options:?}: planned {} measured {peak}", plan.peak());
        assert!((0.5..2.0).contains(&ratio), "{plan}; measured {peak}");
        assert!(plan.to_string().contains("U-Net"), "{plan}");
    }
}

#[test]
fn a_plan_takes_smaller_batches_then_tiles_then_says_what_would_fit() {
    let options = TeacherOptions::default();
    let files = TeacherFiles::open(reference("teacher/a"), &options).unwrap();
    let null_text = Trajectory::NullText { steps: 4 };
    let plan = |max: Option<u64>, trajectory: Trajectory, batch: usize| {
        Plan::new(&own_gpu(max), &files, &options, trajectory, batch)
    };
    let free = plan(None, null_text, 8).unwrap();
    assert_eq!((free.batch, free.tile), (8, None));
    let less = plan(Some(free.peak() - 1), null_text, 8).unwrap();
    assert!(
        less.batch < 8 && less.batch > 0 && less.peak() < free.peak(),
        "{less}"
    );
    // Room for the weights and one sample alone.
    let needs = free.needs;
    let one = needs.text + needs.vae + needs.unet + needs.sample;
    assert_eq!(plan(Some(one), null_text, 8).unwrap().batch, 1);
    let error = plan(Some(one - 1), null_text, 8).unwrap_err().to_string();
    assert!(
        error.contains("out of GPU memory") && error.contains("would fit"),
        "{error}"
    );
    let error = plan(Some(1000), null_text, 1).unwrap_err().to_string();
    assert!(error.contains("--max-memory"), "{error}");
}

/// A copy of checkpoint `a` with one tensor of a component multiplied.
fn scaled(dir: &std::path::Path, part: &str, stem: &str, tensor: &str, by: f32) -> PathBuf {
    let source = reference("teacher/a");
    for part in ["", "scheduler", "text_encoder", "tokenizer", "unet", "vae"] {
        fs::create_dir_all(dir.join(part)).unwrap();
        for entry in fs::read_dir(source.join(part)).unwrap().flatten() {
            if entry.path().is_file() {
                fs::copy(entry.path(), dir.join(part).join(entry.file_name())).unwrap();
            }
        }
    }
    let checkpoint = Checkpoint::open(&source.join(part), stem).unwrap();
    let tensors: Vec<(String, HostTensor)> = checkpoint
        .names()
        .map(|name| {
            let (mut values, shape) = checkpoint.values(name).unwrap();
            if name == tensor {
                values.iter_mut().for_each(|v| *v *= by);
            }
            (name.to_string(), HostTensor::f32(&shape, &values))
        })
        .collect();
    assert!(checkpoint.contains(tensor), "{tensor}");
    let file = dir.join(part).join(format!("{stem}.safetensors"));
    save_safetensors(&file, &tensors, None).unwrap();
    dir.to_path_buf()
}

#[test]
fn a_layer_that_overflows_half_precision_is_named() {
    if !gpu().tier().f16 {
        return;
    }
    let image = RgbImage::from_fn(32, 32, |x, y| {
        image::Rgb([(x * 8) as u8, (y * 8) as u8, 99])
    });
    let weights = "diffusion_pytorch_model";
    let diagnose = |dir: &std::path::Path, options: &TeacherOptions| {
        let model = StableDiffusion::load(gpu(), dir, options).unwrap();
        model.diagnose(&image, "a red circle").unwrap()
    };
    assert_eq!(diagnose(&reference("teacher/a"), &HALF), None);
    for (part, stem, layer, parts) in [
        (
            "unet",
            weights,
            "up_blocks.1.attentions.1.proj_out",
            ["U-Net", "`up_blocks.1.attentions.1.proj_out`"],
        ),
        (
            "vae",
            weights,
            "encoder.mid_block.resnets.0.conv1",
            ["VAE", "`encoder.mid_block.resnets.0.conv1`"],
        ),
        (
            "text_encoder",
            "model",
            "text_model.encoder.layers.1.mlp.fc2",
            ["text encoder", "`encoder.layers.1.mlp.fc2`"],
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        // Weights of about 0.1 stay below half precision's 65,504, their products do not.
        let dir = scaled(dir.path(), part, stem, &format!("{layer}.weight"), 1.5e5);
        let found = diagnose(&dir, &HALF).unwrap_or_else(|| panic!("{layer}: nothing found"));
        for part in parts.into_iter().chain(["`--precision f32`"]) {
            assert!(found.contains(part), "`{found}` lacks `{part}`");
        }
        if part == "vae" {
            assert_eq!(diagnose(&dir, &TeacherOptions::default()), None, "in f32");
        }
    }
}
