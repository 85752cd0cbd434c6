//! Null-text inversion, painting and the other aggregates against `diffusers`: fixtures of
//! `tests/reference/teacher.py`.

use lavender_wgpu::align::targets::word_maps;
use lavender_wgpu::align::words::Case;
use lavender_wgpu::autograd::Var;
use lavender_wgpu::diffusion::{
    Capture, GenerateOptions, MapLayers, NullTextOptions, Sampler, StableDiffusion, TeacherOptions,
    TokenMaps, Trajectory,
};
use lavender_wgpu::tensor::{DType, Tensor};

use crate::support::{gpu, reference};
use crate::teacher_fixture::{CHECKPOINTS, Expected, assert_relative};

/// As for a single forward; the embeddings move by the sign of their gradient at first, so they agree as well.
const RELATIVE: f32 = 1e-4;

fn load(name: &str, activations: DType) -> StableDiffusion {
    let options = TeacherOptions { activations };
    StableDiffusion::load(gpu(), reference(&format!("teacher/{name}")), &options).unwrap()
}

fn three_updates() -> NullTextOptions {
    NullTextOptions {
        updates: 3,
        ..NullTextOptions::default()
    }
}

#[test]
fn null_text_inversion_is_that_of_the_reference() {
    for name in CHECKPOINTS {
        let (model, expected) = (load(name, DType::F32), Expected::open(name));
        let text = &expected.texts()[0];
        let chunks = model.tokenizer.chunks(text).unwrap();
        let states = model.encode_text(&chunks.iter().collect::<Vec<_>>());
        let latents = expected.image_tensor("latents");
        let (_, pivots) = model
            .invert(&latents, &states, 2, None, |_| Ok(()))
            .unwrap();
        let mut capture = Capture::new(MapLayers::HalfAndQuarter, latents.dim(1));
        let mut told = Vec::new();
        let found = model
            .null_text(
                &pivots,
                &states,
                &three_updates(),
                Some(&mut capture),
                |step| {
                    told.push(step);
                    Ok(())
                },
            )
            .unwrap();
        assert_eq!(told, [0, 1]);
        let (embeddings, shape) = expected.get("null.embeddings");
        let mine: Vec<f32> = found
            .embeddings
            .iter()
            .flat_map(|e| e.to_f32().unwrap())
            .collect();
        assert_eq!(found.embeddings[0].shape()[1..], shape[1..]);
        assert_relative(name, &mine, &embeddings, RELATIVE);
        let losses: Vec<f32> = found.losses.concat();
        assert_relative(name, &losses, &expected.get("null.losses").0, RELATIVE);
        let reached = found.latents.to_f32().unwrap();
        let (values, _) = expected.channels_last("null.latents");
        assert_relative(name, &reached, &values, RELATIVE);
        let mut maps = TokenMaps::default();
        maps.push(
            &chunks[0].offsets,
            &capture.aggregate().unwrap().to_f32().unwrap(),
        );
        let found = word_maps(text, Case::Lower, &maps);
        assert_relative(name, &found.raw, &expected.get("null.raw").0, RELATIVE);
    }
}

#[test]
fn a_sample_that_is_done_stops_while_the_others_go_on() {
    let (model, expected) = (load("a", DType::F32), Expected::open("a"));
    let chunk = model.tokenizer.chunk_of(&expected.texts()[0]).unwrap();
    let (one, two) = (
        model.encode_text(&[&chunk]),
        model.encode_text(&[&chunk, &chunk]),
    );
    let latents = expected.image_tensor("latents");
    // The second sample is easier: its latents are a tenth, and so is its distance.
    let small: Vec<f32> = latents.to_f32().unwrap().iter().map(|v| 0.1 * v).collect();
    let small = Tensor::from_f32(gpu(), &small, latents.shape());
    let both = lavender_wgpu::ops::concat::concat(&[&latents, &small], 0);
    let run = |latents: &Tensor, text: &Tensor, tolerance: f32| {
        let (_, pivots) = model.invert(latents, text, 2, None, |_| Ok(())).unwrap();
        let options = NullTextOptions {
            tolerance,
            ..three_updates()
        };
        model
            .null_text(&pivots, text, &options, None, |_| Ok(()))
            .unwrap()
    };
    let losses = run(&both, &two, 0.0).losses;
    // Between the two samples' losses at the first timestep.
    let tolerance = 0.5 * (losses[0][0] + losses[0][1]);
    let (low, high) = (
        losses[0][0].min(losses[0][1]),
        losses[0][0].max(losses[0][1]),
    );
    assert!(low < 0.9 * high, "{losses:?}");
    let together = run(&both, &two, tolerance);
    for (i, alone) in [&latents, &small].into_iter().enumerate() {
        let alone = run(alone, &one, tolerance);
        for (step, (a, b)) in alone
            .embeddings
            .iter()
            .zip(&together.embeddings)
            .enumerate()
        {
            let b = b.to_f32().unwrap();
            let each = b.len() / 2;
            let what = format!("sample {i}, timestep {step}");
            // Another batch adds in another order.
            assert_relative(
                &what,
                &a.to_f32().unwrap(),
                &b[i * each..(i + 1) * each],
                1e-4,
            );
        }
    }
}

#[test]
fn null_text_comes_closer_than_plain_guidance() {
    let (model, expected) = (load("a", DType::F32), Expected::open("a"));
    let chunk = model.tokenizer.chunk_of(&expected.texts()[0]).unwrap();
    let text = model.encode_text(&[&chunk]);
    let latents = expected.image_tensor("latents");
    let (_, pivots) = model.invert(&latents, &text, 4, None, |_| Ok(())).unwrap();
    let distance = |updates: usize| {
        let options = NullTextOptions {
            updates,
            ..NullTextOptions::default()
        };
        let found = model
            .null_text(&pivots, &text, &options, None, |_| Ok(()))
            .unwrap();
        let (a, b) = (found.latents.to_f32().unwrap(), latents.to_f32().unwrap());
        a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum::<f32>()
    };
    let (plain, optimised) = (distance(0), distance(10));
    assert!(optimised < 0.8 * plain, "{optimised} after {plain}");
}

#[test]
fn recomputing_layers_changes_no_gradient() {
    for name in CHECKPOINTS {
        let (model, expected) = (load(name, DType::F32), Expected::open(name));
        let latents = Var::constant(expected.image_tensor("latents"));
        let (values, shape) = expected.get("short.text");
        let weight = expected.image_tensor("eps.weight");
        let gradient = |recompute: bool| {
            let text = Var::parameter(Tensor::from_f32(gpu(), &values, &shape));
            let noise = match recompute {
                true => model.unet.forward_recomputed(&latents, &[250], &text),
                false => model.unet.forward(&latents, &[250], &text, None),
            };
            let grads = Var::backward_with(&[(noise, weight.clone())]);
            grads.get(&text).unwrap().to_f32().unwrap()
        };
        let kept = gradient(false);
        assert_relative(name, &kept, &expected.get("grad.text").0, RELATIVE);
        // The same kernels, but gradients of skip connections add up in another order.
        assert_relative(name, &gradient(true), &kept, 1e-6);
    }
}

#[test]
fn painting_is_that_of_diffusers() {
    for name in CHECKPOINTS {
        let (model, expected) = (load(name, DType::F32), Expected::open(name));
        let noise = expected.image_tensor("noise");
        for (sampler, steps) in [(Sampler::Ddim, 4), (Sampler::Pndm, 6)] {
            let options = GenerateOptions {
                steps,
                sampler,
                ..GenerateOptions::default()
            };
            let mut told = 0;
            let painted = model
                .generate(&noise, &[&expected.texts()[0]], &options, |_| {
                    told += 1;
                    Ok(())
                })
                .unwrap();
            assert_eq!(told, model.moves(&options));
            let (values, _) = expected.channels_last(&format!("paint.{sampler}"));
            let what = format!("{name} {sampler}");
            // Guidance of 7.5 multiplies each step's rounding.
            assert_relative(&what, &painted.to_f32().unwrap(), &values, 5.0 * RELATIVE);
        }
        let images = model.decode_latents(&noise).unwrap();
        assert_eq!(images[0].width() as usize, model.image_side());
    }
}

#[test]
fn daam_maps_are_those_of_the_reference() {
    for name in CHECKPOINTS {
        let (model, expected) = (load(name, DType::F32), Expected::open(name));
        let text = &expected.texts()[0];
        let chunks = model.tokenizer.chunks(text).unwrap();
        let states = model.encode_text(&chunks.iter().collect::<Vec<_>>());
        let (latents, noise) = (
            expected.image_tensor("latents"),
            expected.image_tensor("noise"),
        );
        let mut capture = Capture::new(MapLayers::Daam, latents.dim(1));
        for t in [1, 300] {
            let x = model.schedule.add_noise(&latents, &noise, t);
            model.predict_noise(&x, t, &states, Some(&mut capture));
        }
        let mut maps = TokenMaps::default();
        maps.push(
            &chunks[0].offsets,
            &capture.aggregate().unwrap().to_f32().unwrap(),
        );
        let found = word_maps(text, Case::Lower, &maps);
        assert_relative(name, &found.raw, &expected.get("noised.daam").0, RELATIVE);
    }
}

#[test]
fn null_text_in_f16_stays_close_to_f32() {
    if !gpu().tier().f16 {
        return;
    }
    let (model, expected) = (load("a", DType::F16), Expected::open("a"));
    let chunks = model.tokenizer.chunks(&expected.texts()[0]).unwrap();
    let states = model.encode_text(&[&chunks[0]]);
    let latents = expected.image_tensor("latents");
    let run = model
        .run(
            &latents,
            &states,
            Trajectory::NullText { steps: 2 },
            MapLayers::HalfAndQuarter,
            &[0],
            |_| Ok(()),
        )
        .unwrap();
    let reached = run.null_text.unwrap().latents.to_f32().unwrap();
    assert!(reached.iter().all(|v| v.is_finite()));
    let (values, shape) = expected.get("short.text");
    let text = Var::parameter(Tensor::from_f32(gpu(), &values, &shape));
    let half = |t: Tensor| lavender_wgpu::ops::cast::cast(&t, DType::F16);
    let noise = model.unet.forward_recomputed(
        &Var::constant(half(latents)),
        &[250],
        &text.cast(DType::F16),
    );
    let weight = half(expected.image_tensor("eps.weight"));
    let grads = Var::backward_with(&[(noise, weight)]);
    let found = grads.get(&text).unwrap().to_f32().unwrap();
    // Half precision keeps 11 bits; some sixty layers forward and backward add up.
    assert_relative("gradient", &found, &expected.get("grad.text").0, 2e-2);
}

#[test]
fn long_texts_run_in_passes_that_change_no_map() {
    let mut model = load("b", DType::F32);
    let expected = Expected::open("b");
    let texts: Vec<_> = expected
        .texts()
        .iter()
        .map(|text| model.tokenizer.chunks(text).unwrap())
        .collect();
    let chunks: usize = texts.iter().map(Vec::len).sum();
    assert!(chunks > 2);
    let latents = expected.image_tensor("latents");
    let pair = lavender_wgpu::diffusion::pipeline::repeat_samples(&latents, &[0, 0]);
    let mut maps = |batch: usize| {
        model.batch = batch;
        let (mut told, trajectory) = (0, Trajectory::Ddim { steps: 2 });
        let layers = MapLayers::HalfAndQuarter;
        let recorded = model
            .token_maps(&pair, &texts, trajectory, layers, &[0, 0], |_| {
                told += 1;
                Ok(())
            })
            .unwrap();
        assert_eq!(told, model.progress(&texts, trajectory));
        assert_eq!(told, 2 * chunks.div_ceil(batch));
        assert_eq!(recorded.latents.dim(0), chunks);
        recorded.tokens
    };
    let (together, apart) = (maps(32), maps(2));
    for (a, b) in together.iter().zip(&apart) {
        assert_eq!(a.offsets, b.offsets);
        // Another batch adds in another order.
        assert_relative("maps", &b.maps.concat(), &a.maps.concat(), 1e-5);
    }
}

#[test]
fn the_fused_capture_is_the_mean_of_the_stored_matrices() {
    for name in CHECKPOINTS {
        let (model, expected) = (load(name, DType::F32), Expected::open(name));
        let latents = Var::constant(expected.image_tensor("latents"));
        let (values, shape) = expected.get("short.text");
        let text = Var::constant(Tensor::from_f32(gpu(), &values, &shape));
        let side = latents.dim(1);
        let mut fused = Capture::new(MapLayers::HalfAndQuarter, side);
        model
            .unet
            .forward(&latents, &[250], &text, Some(&mut fused));
        // Every head's whole matrix, then their mean.
        let mut stored = Capture::on_tape(MapLayers::HalfAndQuarter, side);
        model
            .unet
            .forward(&latents, &[250], &text, Some(&mut stored));
        let stored = stored.kept();
        assert_eq!(stored.len(), fused.layers().count());
        for ((layer, _, mean), whole) in fused.layers().zip(&stored) {
            let whole = whole.value().to_f32().unwrap();
            assert_relative(layer, &mean.to_f32().unwrap(), &whole, 1e-5);
        }
    }
}
