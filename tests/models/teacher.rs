//! The diffusion teacher against `diffusers` and `transformers`: fixtures of `tests/reference/teacher.py`.

use lavender_wgpu::align::targets::word_maps;
use lavender_wgpu::align::words::Case;
use lavender_wgpu::autograd::Var;
use lavender_wgpu::diffusion::{
    Capture, ClipText, ClipTextConfig, MapLayers, StableDiffusion, TeacherOptions, TextChunk,
    Trajectory, Unet, UnetConfig, Vae, VaeConfig, clip_text, vae,
};
use lavender_wgpu::gpu::{Gpu, GpuOptions, Replay};
use lavender_wgpu::nn::{LoadOptions, Loader};
use lavender_wgpu::ops::permute::permute;
use lavender_wgpu::tensor::{Checkpoint, DType, Tensor};

use crate::support::{gpu, reference, rng, uniform};
use crate::teacher_fixture::{CHECKPOINTS, Expected, assert_relative};

/// The models agree with the libraries to this, relative to the largest value: rounding of f32 sums in another order
/// through some thirty layers.
const RELATIVE: f32 = 1e-4;

fn load(name: &str) -> StableDiffusion {
    let dir = reference(&format!("teacher/{name}"));
    StableDiffusion::load(gpu(), dir, &TeacherOptions::default()).unwrap()
}

fn chunks(model: &StableDiffusion, text: &str) -> Vec<TextChunk> {
    model.tokenizer.chunks(text).unwrap()
}

#[test]
fn text_states_are_those_of_transformers() {
    for name in CHECKPOINTS {
        let (model, expected) = (load(name), Expected::open(name));
        for (text, which) in expected.texts().iter().zip(["short", "long"]) {
            let chunks = chunks(&model, text);
            let states = model.encode_text(&chunks.iter().collect::<Vec<_>>());
            let (values, shape) = expected.get(&format!("{which}.text"));
            assert_eq!(states.shape(), shape);
            assert_relative(
                &format!("{name} {which}"),
                &states.to_f32().unwrap(),
                &values,
                RELATIVE,
            );
        }
    }
}

#[test]
fn the_vae_encodes_and_decodes_as_diffusers_does() {
    let image = image::open(reference("teacher/image.png"))
        .unwrap()
        .to_rgb8();
    for name in CHECKPOINTS {
        let (model, expected) = (load(name), Expected::open(name));
        let pixels = model.prepare_image(&image);
        let (values, shape) = expected.channels_last("pixels");
        assert_eq!(pixels.shape(), shape);
        assert_relative("pixels", &pixels.to_f32().unwrap(), &values, 1e-6);
        let latents = model.encode_images(&pixels);
        let (values, shape) = expected.channels_last("latents");
        assert_eq!(latents.shape(), shape);
        assert_relative(
            &format!("{name} latents"),
            &latents.to_f32().unwrap(),
            &values,
            RELATIVE,
        );
        let unscaled = Var::constant(expected.image_tensor("latents"))
            .scale(1.0 / model.vae.config().scaling_factor);
        let decoded = model.vae.decode(&unscaled);
        let (values, _) = expected.channels_last("decoded");
        assert_relative(
            &format!("{name} decoded"),
            &decoded.value().to_f32().unwrap(),
            &values,
            RELATIVE,
        );
    }
}

/// Runs a trajectory on the fixture's own latents and compares noise, latents, layer maps and word maps.
fn check_inversion(name: &str, which: &str, steps: usize) {
    let (model, expected) = (load(name), Expected::open(name));
    let text = &expected.texts()[usize::from(which == "long")];
    let chunks = chunks(&model, text);
    let states = model.encode_text(&chunks.iter().collect::<Vec<_>>());
    let latents = expected.image_tensor("latents");
    let owner = vec![0; chunks.len()];
    let repeated = lavender_wgpu::diffusion::pipeline::repeat_samples(&latents, &owner);
    let trajectory = Trajectory::Ddim { steps };
    let layers = MapLayers::HalfAndQuarter;
    let run = model
        .run(
            &repeated,
            &states,
            trajectory,
            layers,
            &owner_seeds(&owner),
            |_| Ok(()),
        )
        .unwrap();
    let what = |part: &str| format!("{name} {which} {steps} steps: {part}");
    let (values, _) = expected.channels_last(&format!("{which}.eps0"));
    assert_relative(
        &what("eps0"),
        &run.first_noise.to_f32().unwrap(),
        &values,
        RELATIVE,
    );
    let (values, _) = expected.channels_last(&format!("{which}.{steps}.inverted"));
    assert_relative(
        &what("inverted latents"),
        &run.latents.to_f32().unwrap(),
        &values,
        RELATIVE,
    );
    let mut seen = 0;
    for (layer, _, maps) in run.capture.layers() {
        assert!(!layer.starts_with("mid_block"), "{layer} is never recorded");
        let key = format!("{which}.{steps}.layer.{layer}");
        if expected.tensors.contains(&key) {
            assert_relative(
                &what(layer),
                &maps.to_f32().unwrap(),
                &expected.get(&key).0,
                RELATIVE,
            );
            seen += 1;
        }
    }
    assert!(
        which == "long" || steps != 4 || seen >= 6,
        "{seen} layers compared"
    );
    let maps = model
        .token_maps(&latents, &[chunks], trajectory, layers, &[0], |_| Ok(()))
        .unwrap();
    let found = word_maps(text, Case::Lower, &maps.tokens[0]);
    let words: Vec<&str> = found.words.iter().map(|w| w.text.as_str()).collect();
    assert_eq!(words, expected.strings(&format!("{which}.words")));
    let raw = expected.get(&format!("{which}.{steps}.raw")).0;
    assert_relative(&what("raw"), &found.raw, &raw, RELATIVE);
    let key = format!("{which}.{steps}.maps");
    if expected.tensors.contains(&key) {
        // Stretched to 0…1, a map's error grows by its largest value over its range: up to some ten times here.
        assert_relative(
            &what("maps"),
            &found.maps,
            &expected.get(&key).0,
            10.0 * RELATIVE,
        );
    }
}

fn owner_seeds(owner: &[usize]) -> Vec<u64> {
    owner.iter().map(|_| 0).collect()
}

#[test]
fn inversion_and_word_maps_of_a() {
    check_inversion("a", "short", 4);
}

#[test]
fn inversion_and_word_maps_of_a_in_ten_steps() {
    check_inversion("a", "short", 10);
}

#[test]
fn inversion_and_word_maps_of_b() {
    check_inversion("b", "short", 4);
}

#[test]
fn inversion_and_word_maps_of_a_text_in_chunks() {
    check_inversion("a", "long", 4);
    check_inversion("b", "long", 4);
}

#[test]
fn noise_is_added_and_predicted_as_diffusers_does() {
    for name in CHECKPOINTS {
        let (model, expected) = (load(name), Expected::open(name));
        let text = &expected.texts()[0];
        let chunks = chunks(&model, text);
        let states = model.encode_text(&chunks.iter().collect::<Vec<_>>());
        let (latents, noise) = (
            expected.image_tensor("latents"),
            expected.image_tensor("noise"),
        );
        let mut capture = Capture::new(MapLayers::HalfAndQuarter, latents.dim(1));
        for t in [1, 300] {
            let x = model.schedule.add_noise(&latents, &noise, t);
            let predicted = model.predict_noise(&x, t, &states, Some(&mut capture));
            let (values, _) = expected.channels_last(&format!("noised.eps{t}"));
            assert_relative(
                &format!("{name} t {t}"),
                &predicted.to_f32().unwrap(),
                &values,
                RELATIVE,
            );
        }
        let mut maps = lavender_wgpu::diffusion::TokenMaps::default();
        maps.push(
            &chunks[0].offsets,
            &capture.aggregate().unwrap().to_f32().unwrap(),
        );
        let found = word_maps(text, Case::Lower, &maps);
        assert_relative(name, &found.raw, &expected.get("noised.raw").0, RELATIVE);
    }
}

#[test]
fn replayed_passes_are_the_passes_bit_by_bit() {
    let [own, plain] = [Replay::On, Replay::Off].map(|replay| {
        let options = GpuOptions {
            replay,
            ..GpuOptions::default()
        };
        Gpu::new(&options).unwrap()
    });
    let dir = reference(&format!("teacher/{}", CHECKPOINTS[0]));
    let predictions = |gpu: &Gpu| {
        let model = StableDiffusion::load(gpu, &dir, &TeacherOptions::default()).unwrap();
        let side = model.latent_side();
        let states = model.encode_text(&chunks(&model, "a red ball").iter().collect::<Vec<_>>());
        let latents = |seed| {
            let values = uniform(&mut rng(seed), side * side * 4);
            Tensor::from_f32(gpu, &values, &[1, side, side, 4])
        };
        let mut capture = Capture::new(MapLayers::HalfAndQuarter, side);
        let (held, mut predicted) = (gpu.memory().current_bytes, Vec::new());
        for (seed, timestep) in [(1, 10), (2, 300), (3, 700)] {
            let x = latents(seed);
            for capture in [Some(&mut capture), None] {
                let noise = model.predict_noise(&x, timestep, &states, capture);
                predicted.push(noise.to_f32().unwrap());
            }
        }
        predicted.push(capture.aggregate().unwrap().to_f32().unwrap());
        let kept = gpu.memory().current_bytes;
        drop(capture);
        // Nothing of the plans is in the VAE's way.
        model.decode_latents(&latents(4)).unwrap();
        (predicted, kept, gpu.memory().current_bytes == held)
    };
    let (replayed, kept, released) = predictions(&own);
    assert!(released && kept > own.memory().current_bytes);
    assert!(3 * own.replayed() > own.dispatches());
    assert_eq!(replayed, predictions(&plain).0);
}

#[test]
fn a_samples_noised_maps_do_not_depend_on_its_batch() {
    let (model, expected) = (load("b"), Expected::open("b"));
    let text = &expected.texts()[0];
    let latents = expected.image_tensor("latents");
    let pair = lavender_wgpu::diffusion::pipeline::repeat_samples(&latents, &[0, 0]);
    let trajectory = Trajectory::Noised { steps: 2 };
    let maps = |latents: &Tensor, seeds: &[u64]| {
        let texts = vec![chunks(&model, text); seeds.len()];
        model
            .token_maps(
                latents,
                &texts,
                trajectory,
                MapLayers::HalfAndQuarter,
                seeds,
                |_| Ok(()),
            )
            .unwrap()
            .tokens
    };
    let (alone, together) = (maps(&latents, &[7]), maps(&pair, &[5, 7]));
    for (a, b) in alone[0].maps.iter().zip(&together[1].maps) {
        assert_relative("alone and in a batch", a, b, 1e-5);
    }
    assert_ne!(
        together[0].maps, together[1].maps,
        "another seed gives another map"
    );
}

fn trainable(name: &str, part: &str, stem: &str, rename: fn(&str) -> String) -> Loader {
    let folder = reference(&format!("teacher/{name}/{part}"));
    let checkpoint = Checkpoint::open(&folder, stem).unwrap().rename(rename);
    let options = LoadOptions {
        trainable: true,
        ..LoadOptions::default()
    };
    Loader::new(gpu(), checkpoint, options)
}

/// d Σ(output · weight), as the fixture takes it.
fn weighted_sum(output: &Var, weight: Tensor) -> Var {
    output.mul(&Var::constant(weight)).sum_all()
}

#[test]
fn gradients_through_the_vae_are_pytorchs() {
    for name in CHECKPOINTS {
        let expected = Expected::open(name);
        let config =
            VaeConfig::read(reference(&format!("teacher/{name}/vae/config.json"))).unwrap();
        let loader = trainable(name, "vae", "diffusion_pytorch_model", vae::canonical_name);
        let model = Vae::load(&config, &loader).unwrap();
        let pixels = Var::parameter(expected.image_tensor("pixels"));
        let latents = model.encode(&pixels).mean.scale(config.scaling_factor);
        let loss = weighted_sum(&latents, expected.image_tensor("latents.weight"));
        let grads = loss.backward();
        let (values, _) = expected.channels_last("pixels.grad");
        let found = grads.get(&pixels).unwrap().to_f32().unwrap();
        assert_relative(&format!("{name} encoder"), &found, &values, RELATIVE);
        let latents = Var::parameter(expected.image_tensor("latents"));
        let decoded = model.decode(&latents.scale(1.0 / config.scaling_factor));
        let loss = weighted_sum(&decoded, expected.image_tensor("decoded.weight"));
        let (values, _) = expected.channels_last("decoded.grad");
        let found = loss.backward().get(&latents).unwrap().to_f32().unwrap();
        assert_relative(&format!("{name} decoder"), &found, &values, RELATIVE);
    }
}

#[test]
fn gradients_through_the_unet_and_the_text_encoder_are_pytorchs() {
    for name in CHECKPOINTS {
        let expected = Expected::open(name);
        let root = format!("teacher/{name}");
        let config = UnetConfig::read(reference(&format!("{root}/unet/config.json"))).unwrap();
        let weights = trainable(name, "unet", "diffusion_pytorch_model", str::to_string);
        let unet = Unet::load(&config, &weights).unwrap();
        let config =
            ClipTextConfig::read(reference(&format!("{root}/text_encoder/config.json"))).unwrap();
        let text_weights = trainable(name, "text_encoder", "model", clip_text::canonical_name);
        let encoder = ClipText::load(&config, &text_weights).unwrap();
        let ids = Tensor::from_u32(gpu(), &expected.ids("short.ids"), &[1, 77]);
        let states = encoder.forward(&ids);
        let latents = Var::parameter(expected.image_tensor("latents"));
        let noise = unet.forward(&latents, &[250], &states, None);
        let grads = weighted_sum(&noise, expected.image_tensor("eps.weight")).backward();
        let found = grads.get(&latents).unwrap().to_f32().unwrap();
        assert_relative(
            "latents",
            &found,
            &expected.channels_last("grad.latents").0,
            RELATIVE,
        );
        let mut compared = 0;
        for (key, weights, prefix) in [
            ("conv_in.weight", &weights, "grad.unet."),
            ("time_embedding.linear_1.weight", &weights, "grad.unet."),
            ("mid_block.resnets.0.conv1.weight", &weights, "grad.unet."),
            (
                "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
                &weights,
                "grad.unet.",
            ),
            ("embeddings.token_embedding.weight", &text_weights, ""),
        ] {
            let parameters = weights.parameters().all();
            let parameter = &parameters.iter().find(|p| p.name == key).unwrap().var;
            let (mut values, shape) = match prefix {
                "" => expected.get("grad.text_encoder.token_embedding"),
                _ => expected.get(&format!("{prefix}{key}")),
            };
            let grad = grads.get(parameter).unwrap();
            if let [co, ci, kh, kw] = shape[..] {
                // [co, ci, kh, kw] as the file has it; ours is [kh, kw, ci, co].
                let grad = permute(grad, &[3, 2, 0, 1]).to_f32().unwrap();
                assert_eq!(values.len(), co * ci * kh * kw);
                assert_relative(key, &grad, &values, RELATIVE);
            } else {
                values.truncate(shape.iter().product());
                assert_relative(key, &grad.to_f32().unwrap(), &values, RELATIVE);
            }
            compared += 1;
        }
        assert_eq!(compared, 5);
    }
}

#[test]
fn f16_activations_stay_close_to_f32() {
    if !gpu().tier().f16 {
        return;
    }
    let expected = Expected::open("a");
    let dir = reference("teacher/a");
    let options = TeacherOptions {
        activations: DType::F16,
    };
    let model = StableDiffusion::load(gpu(), dir, &options).unwrap();
    let chunks = chunks(&model, &expected.texts()[0]);
    let states = model.encode_text(&[&chunks[0]]);
    let noise = model.predict_noise(&expected.image_tensor("latents"), 0, &states, None);
    let (values, _) = expected.channels_last("short.eps0");
    // Half precision keeps 11 bits; some thirty layers add up.
    assert_relative("eps0", &noise.to_f32().unwrap(), &values, 2e-2);
}
