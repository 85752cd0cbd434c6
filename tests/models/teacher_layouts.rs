//! The teacher's other layouts: single files under the original names, variants, and what is refused. Fixtures of
//! `tests/reference/teacher_layouts.py`.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use lavender_wgpu::diffusion::single_file::{self, Names, Part};
use lavender_wgpu::diffusion::{
    ClipTokenizer, StableDiffusion, TeacherFiles, TeacherOptions, UnetConfig, VaeConfig,
    is_diffusion,
};
use lavender_wgpu::gpu::{Gpu, GpuOptions};
use lavender_wgpu::tensor::{Checkpoint, DType, HostTensor, save_safetensors};
use serde_json::Value;

use crate::support::{gpu, reference};
use crate::teacher_fixture::{CHECKPOINTS, Expected, assert_relative};

/// As in the tests of the diffusers layout.
const RELATIVE: f32 = 1e-4;

fn json(file: &str) -> Value {
    let path = reference(&format!("teacher_layouts/{file}"));
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The table of one checkpoint: original name, component, today's name, original shape.
fn names(checkpoint: &str) -> Vec<(String, Part, String, Vec<usize>)> {
    let table = json("names.json")[checkpoint].as_object().unwrap().clone();
    let row = |(old, value): (String, Value)| {
        let (part, new, shape): (String, String, Vec<usize>) =
            serde_json::from_value(value).unwrap();
        let part = match part.as_str() {
            "text_encoder" => Part::Text,
            "vae" => Part::Vae,
            _ => Part::Unet,
        };
        (old, part, new, shape)
    };
    table.into_iter().map(row).collect()
}

fn shapes(checkpoint: &str) -> HashMap<String, Vec<usize>> {
    let rows = names(checkpoint).into_iter();
    rows.map(|(old, _, _, shape)| (old, shape)).collect()
}

/// The tensors of fixture checkpoint `name` under their original names, with what published files hold beside them.
fn single_tensors(name: &str) -> Vec<(String, HostTensor)> {
    let root = reference(&format!("teacher/{name}"));
    let open = |part: &str, stem: &str| Checkpoint::open(&root.join(part), stem).unwrap();
    let weights = "diffusion_pytorch_model";
    let text =
        open("text_encoder", "model").rename(lavender_wgpu::diffusion::clip_text::canonical_name);
    let vae = open("vae", weights).rename(lavender_wgpu::diffusion::vae::canonical_name);
    let unet = open("unet", weights);
    let mut tensors: Vec<(String, HostTensor)> = names(name)
        .into_iter()
        .map(|(old, part, new, shape)| {
            let file = match part {
                Part::Text => &text,
                Part::Vae => &vae,
                Part::Unet => &unet,
            };
            (old, HostTensor::f32(&shape, &file.values(&new).unwrap().0))
        })
        .collect();
    for extra in [
        "model_ema.decay",
        "alphas_cumprod",
        "model_ema.diffusion_modelout0weight",
    ] {
        tensors.push((extra.into(), HostTensor::f32(&[1], &[1.0])));
    }
    tensors
}

/// `dir` with the configurations and the tokenizer of `name`, without its weights.
fn configurations(name: &str, dir: &Path) {
    let root = reference(&format!("teacher/{name}"));
    for part in ["", "scheduler", "text_encoder", "tokenizer", "unet", "vae"] {
        fs::create_dir_all(dir.join(part)).unwrap();
        for entry in fs::read_dir(root.join(part)).unwrap().flatten() {
            let path = entry.path();
            if path.is_file() && path.extension().is_some_and(|e| e != "safetensors") {
                fs::copy(&path, dir.join(part).join(entry.file_name())).unwrap();
            }
        }
    }
}

/// Text states, latents and noise prediction of a loaded checkpoint against diffusers'.
fn check(what: &str, model: &StableDiffusion, expected: &Expected) {
    let chunks = model.tokenizer.chunks(&expected.texts()[0]).unwrap();
    let states = model.encode_text(&chunks.iter().collect::<Vec<_>>());
    let (values, _) = expected.get("short.text");
    let compare = |part: &str, found: &[f32], values: &[f32]| {
        assert_relative(&format!("{what}: {part}"), found, values, RELATIVE);
    };
    compare("text", &states.to_f32().unwrap(), &values);
    let latents = model.encode_images(&expected.image_tensor("pixels"));
    let (values, _) = expected.channels_last("latents");
    compare("latents", &latents.to_f32().unwrap(), &values);
    let noise = model.predict_noise(&expected.image_tensor("latents"), 0, &states, None);
    let (values, _) = expected.channels_last("short.eps0");
    compare("noise", &noise.to_f32().unwrap(), &values);
}

#[test]
fn a_single_file_computes_what_diffusers_does() {
    for name in CHECKPOINTS {
        let (dir, expected) = (tempfile::tempdir().unwrap(), Expected::open(name));
        configurations(name, dir.path());
        let path = dir.path().join("model.safetensors");
        let mut tensors = single_tensors(name);
        for bare in [false, true] {
            if bare {
                // Some files were written without this level.
                for (tensor, _) in &mut tensors {
                    *tensor = tensor.replace(".transformer.text_model.", ".transformer.");
                }
            }
            save_safetensors(&path, &tensors, None).unwrap();
            assert!(is_diffusion(&path));
            let model = StableDiffusion::load(gpu(), &path, &TeacherOptions::default()).unwrap();
            check(&format!("{name}, bare {bare}"), &model, &expected);
            let files = model.files().unwrap();
            assert!(files.contains(&path) && files.contains(&dir.path().join("unet/config.json")));
        }
    }
}

/// Everything but what shapes do not tell.
fn shape_fields(unet: &UnetConfig, vae: &VaeConfig) -> impl PartialEq + std::fmt::Debug {
    (
        (
            unet.in_channels,
            unet.out_channels,
            unet.block_out_channels.clone(),
            unet.layers_per_block.clone(),
            unet.depth.clone(),
            unet.down_attention.clone(),
            unet.up_attention.clone(),
        ),
        (unet.cross_attention_dim, unet.use_linear_projection),
        (
            vae.block_out_channels.clone(),
            vae.layers_per_block,
            vae.latent_channels,
        ),
    )
}

#[test]
fn shapes_tell_the_configuration() {
    for name in CHECKPOINTS {
        let found = shapes(name);
        let inferred = single_file::infer(&|name| found.get(name).cloned()).unwrap();
        let root = format!("teacher/{name}");
        let unet = UnetConfig::read(reference(&format!("{root}/unet/config.json"))).unwrap();
        let vae = VaeConfig::read(reference(&format!("{root}/vae/config.json"))).unwrap();
        assert_eq!(
            shape_fields(&inferred.unet, &inferred.vae),
            shape_fields(&unet, &vae)
        );
        let missing =
            single_file::infer(&|n| found.get(n).filter(|_| !n.contains("quant")).cloned());
        assert_eq!(
            missing.unwrap_err(),
            "first_stage_model.post_quant_conv.weight"
        );
    }
}

#[test]
fn every_name_of_stable_diffusion_v1_has_its_place() {
    let found = shapes("v1");
    let configs = single_file::infer(&|name| found.get(name).cloned()).unwrap();
    single_file::check_constants(&configs).unwrap();
    let (text, vae, unet) = (&configs.text, &configs.vae, &configs.unet);
    assert_eq!(
        (text.vocab_size, text.hidden_size, text.num_hidden_layers),
        (49408, 768, 12)
    );
    assert_eq!(
        (text.num_attention_heads, text.intermediate_size),
        (12, 3072)
    );
    assert_eq!(vae.block_out_channels, [128, 256, 512, 512]);
    assert_eq!((vae.layers_per_block, vae.latent_channels), (2, 4));
    assert_eq!(unet.block_out_channels, [320, 640, 1280, 1280]);
    assert_eq!(
        (&unet.layers_per_block[..], &unet.heads[..]),
        (&[2; 4][..], &[8; 4][..])
    );
    assert_eq!(unet.down_attention, [true, true, true, false]);
    assert_eq!(unet.up_attention, [false, true, true, true]);
    assert_eq!((unet.cross_attention_dim, unet.sample_size), (768, 64));
    let places = Names::new(&configs);
    let rows = names("v1");
    assert_eq!(rows.len(), 196 + 248 + 686);
    for (old, part, new, _) in rows {
        assert_eq!(places.of(&old), Some((part, new)), "{old}");
    }
    assert_eq!(places.of("model_ema.diffusion_modelout0weight"), None);
}

#[test]
fn the_embedded_tokenizer_is_clips() {
    let tokens = json("tokens.json");
    let texts: Vec<String> = serde_json::from_value(tokens["texts"].clone()).unwrap();
    let ids: Vec<Vec<u32>> = serde_json::from_value(tokens["ids"].clone()).unwrap();
    let tokenizer = ClipTokenizer::embedded(77, 49408).unwrap();
    assert!(texts.len() >= 12);
    for (text, expected) in texts.iter().zip(&ids) {
        assert_eq!(&tokenizer.chunk_of(text).unwrap().ids, expected, "{text:?}");
    }
    // A text encoder with fewer embeddings than tokens cannot be the one that this vocabulary was made for.
    let error = ClipTokenizer::embedded(77, 601).err().unwrap().to_string();
    assert!(error.contains("49408") && error.contains("601"), "{error}");
}

/// Overwrites the weights of a component with values scaled by `scale`, in `file`.
fn rewrite(component: &Path, stem: &str, file: &str, dtype: DType, scale: f32) {
    let checkpoint = Checkpoint::open(component, stem).unwrap();
    let names: Vec<String> = checkpoint.names().map(str::to_string).collect();
    let tensors: Vec<(String, HostTensor)> = names
        .into_iter()
        .map(|name| {
            let (mut values, shape) = checkpoint.values(&name).unwrap();
            values.iter_mut().for_each(|v| *v *= scale);
            (name, HostTensor::float(dtype, &shape, &values))
        })
        .collect();
    save_safetensors(&component.join(file), &tensors, None).unwrap();
}

/// A copy of fixture checkpoint `a` to change.
fn copy_of_a(dir: &Path) -> PathBuf {
    configurations("a", dir);
    for part in ["text_encoder", "unet", "vae"] {
        for entry in fs::read_dir(reference("teacher/a").join(part))
            .unwrap()
            .flatten()
        {
            fs::copy(entry.path(), dir.join(part).join(entry.file_name())).unwrap();
        }
    }
    dir.to_path_buf()
}

#[test]
fn half_precision_reads_the_fp16_variant_where_both_are_there() {
    let dir = tempfile::tempdir().unwrap();
    let (root, expected) = (copy_of_a(dir.path()), Expected::open("a"));
    let stem = "diffusion_pytorch_model";
    for (part, stem) in [("unet", stem), ("vae", stem), ("text_encoder", "model")] {
        let fp16 = format!("{stem}.fp16.safetensors");
        rewrite(&root.join(part), stem, &fp16, DType::F16, 1.0);
        // Full-precision files that give something else, to tell which were read.
        rewrite(
            &root.join(part),
            stem,
            &format!("{stem}.safetensors"),
            DType::F32,
            1.01,
        );
    }
    let files = |activations: DType| {
        let opened = TeacherFiles::open(&root, &TeacherOptions { activations }).unwrap();
        let names = opened.files().iter();
        let names = names.filter(|f| f.extension().is_some_and(|e| e == "safetensors"));
        names
            .map(|f| f.file_name().unwrap().to_str().unwrap().contains("fp16"))
            .collect::<Vec<_>>()
    };
    assert_eq!(files(DType::F16), [true; 3]);
    assert_eq!(files(DType::F32), [false; 3]);
    for (part, stem) in [("unet", stem), ("vae", stem), ("text_encoder", "model")] {
        fs::remove_file(root.join(part).join(format!("{stem}.safetensors"))).unwrap();
    }
    let model = StableDiffusion::load(gpu(), &root, &TeacherOptions::default()).unwrap();
    check("fp16 files alone", &model, &expected);
}

#[test]
fn half_precision_holds_weights_in_half_the_memory() {
    if !gpu().tier().f16 {
        return;
    }
    let held = |activations: DType| {
        let gpu = Gpu::new(&GpuOptions::default()).unwrap();
        let dir = reference("teacher/b");
        let files = TeacherFiles::open(dir, &TeacherOptions { activations }).unwrap();
        // f32 files, which f16 activations narrow.
        let model = files.load(&gpu, &TeacherOptions { activations }).unwrap();
        let bytes = gpu.memory().current_bytes;
        drop(model);
        bytes
    };
    let (half, full) = (held(DType::F16), held(DType::F32));
    // Convolutions shrink; the file's matrices have two bytes in either (bf16), and biases and norms have four.
    assert!(half < full, "{half} of {full} bytes");
}

/// The error of opening `path`.
#[track_caller]
fn refused(path: &Path, parts: &[&str]) {
    let error = match TeacherFiles::open(path, &TeacherOptions::default()) {
        Ok(_) => panic!("{} was opened", path.display()),
        Err(error) => error.to_string(),
    };
    for part in parts {
        assert!(error.contains(part), "`{error}` lacks `{part}`");
    }
}

#[test]
fn single_files_of_something_else_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let one = |name: &str, shape: &[usize]| {
        let values = vec![0.0; shape.iter().product()];
        (name.to_string(), HostTensor::f32(shape, &values))
    };
    let unet_in = "model.diffusion_model.input_blocks.0.0.weight";
    for (tensors, parts) in [
        (
            vec![one("lora_unet_down_blocks_0.lora_down.weight", &[4, 8])],
            ["LoRA", "without the model"],
        ),
        (
            vec![one("unet.down_blocks.0.attn1.to_q.lora_A.weight", &[4, 8])],
            ["LoRA", "Stable Diffusion v1"],
        ),
        (
            vec![
                one(unet_in, &[8, 4, 3, 3]),
                one("conditioner.embedders.1.model.ln_final.weight", &[8]),
            ],
            ["Stable Diffusion XL", "only"],
        ),
        (
            vec![one(
                "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
                &[8, 8],
            )],
            ["Stable Diffusion 3", "only"],
        ),
        (
            vec![
                one(unet_in, &[8, 4, 3, 3]),
                one("cond_stage_model.model.ln_final.weight", &[8]),
            ],
            ["Stable Diffusion 2", "OpenCLIP"],
        ),
        (
            vec![one(unet_in, &[8, 9, 3, 3])],
            ["inpainting", "9 input channels"],
        ),
        (
            vec![one("encoder.down.0.block.0.conv1.weight", &[8, 4, 3, 3])],
            ["a VAE alone", "only"],
        ),
        (
            vec![one("down_blocks.0.resnets.0.conv1.weight", &[8, 4, 3, 3])],
            ["a U-Net alone", "only"],
        ),
        (
            vec![one("text_model.final_layer_norm.weight", &[8])],
            ["a text encoder alone", "only"],
        ),
        (
            vec![one("model.layers.0.self_attn.q_proj.weight", &[8, 8])],
            ["another model", "model.layers.0.self_attn.q_proj.weight"],
        ),
        (
            vec![one(unet_in, &[8, 4, 3, 3])],
            ["VAE", "first_stage_model."],
        ),
        (
            vec![
                one(unet_in, &[8, 4, 3, 3]),
                one("first_stage_model.quant_conv.weight", &[8, 8, 1, 1]),
            ],
            ["text encoder", "cond_stage_model.transformer."],
        ),
        (
            vec![
                one(unet_in, &[8, 4, 3, 3]),
                one("first_stage_model.quant_conv.weight", &[8, 8, 1, 1]),
                one(
                    "cond_stage_model.transformer.text_model.final_layer_norm.bias",
                    &[8],
                ),
            ],
            ["token_embedding.weight", "missing"],
        ),
    ] {
        save_safetensors(&path, &tensors, None).unwrap();
        refused(&path, &parts);
    }
    // Whole, but with widths for which the constants of Stable Diffusion v1 cannot be right.
    save_safetensors(&path, &single_tensors("a"), None).unwrap();
    refused(&path, &["32 groups", "16 channels", "configurations"]);
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 5]).unwrap();
    refused(
        &path,
        &["model.safetensors", "not a whole safetensors", "again"],
    );
    fs::write(&path, &bytes[..4]).unwrap();
    refused(&path, &["too short"]);
    let pickled = dir.path().join("v1-5.ckpt");
    fs::write(&pickled, b"PK").unwrap();
    refused(&pickled, &["v1-5.ckpt", "from_single_file"]);
}

#[test]
fn directories_of_something_else_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let root = copy_of_a(dir.path());
    let index = root.join("model_index.json");
    let original = fs::read_to_string(&index).unwrap();
    for (class, what) in [
        ("StableDiffusionXLPipeline", "Stable Diffusion XL"),
        ("StableDiffusion3Pipeline", "Stable Diffusion 3"),
        ("StableDiffusionInpaintPipeline", "inpainting"),
        ("FluxPipeline", "FLUX"),
    ] {
        fs::write(&index, original.replace("StableDiffusionPipeline", class)).unwrap();
        refused(&root, &["_class_name", class, what]);
    }
    fs::write(&index, &original).unwrap();
    let set = |file: &str, field: &str, value: Value| {
        let path = root.join(file);
        let before = fs::read_to_string(&path).unwrap();
        let mut json: Value = serde_json::from_str(&before).unwrap();
        json[field] = value;
        fs::write(&path, json.to_string()).unwrap();
        before
    };
    for (file, field, value, parts) in [
        (
            "scheduler/scheduler_config.json",
            "prediction_type",
            Value::from("v_prediction"),
            ["Stable Diffusion 2", "v-prediction"],
        ),
        (
            "unet/config.json",
            "in_channels",
            9.into(),
            ["inpainting", "expected 4"],
        ),
        (
            "unet/config.json",
            "in_channels",
            8.into(),
            ["InstructPix2Pix", "expected 4"],
        ),
    ] {
        let before = set(file, field, value);
        refused(&root, &parts);
        fs::write(root.join(file), before).unwrap();
    }
    fs::remove_dir_all(root.join("vae")).unwrap();
    refused(&root, &["vae", "config.json"]);
    refused(
        &root.join("unet"),
        &["UNet2DConditionModel", "one component"],
    );
    refused(
        &reference("smolvlm/a"),
        &["a model of transformers", "smolvlm", "model_index.json"],
    );
    assert!(!is_diffusion(&reference("smolvlm/a")));
}
