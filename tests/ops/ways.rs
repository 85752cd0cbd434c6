//! Convolutions and attention in the way that was measured: the same values, the choice kept and obeyed.

use std::path::Path;

use lavender_wgpu::gpu::{Gpu, GpuOptions, Tuned, Tuning};
use lavender_wgpu::ops::attention::{
    AttentionMask, AttentionShape, Division, attention, attention_with,
};
use lavender_wgpu::ops::conv2d::{Conv2dOptions, Force, Variant, conv2d, conv2d_with};
use lavender_wgpu::tensor::Tensor;

use crate::support::{nmse, rng, uniform};

fn open(tuning: Tuning, dir: &Path) -> Gpu {
    let options = GpuOptions {
        checked: true,
        tuning,
        cache_dir: Some(dir.to_path_buf()),
        ..GpuOptions::default()
    };
    Gpu::new(&options).expect("an adapter")
}

/// 64 channels of 16² pixels to 64, 19 MFLOP more than the least that is measured.
fn images(gpu: &Gpu) -> [Tensor; 2] {
    let mut rng = rng(5);
    let tensor = |shape: &[usize], rng: &mut _| {
        Tensor::from_f32(gpu, &uniform(rng, shape.iter().product()), shape)
    };
    [
        tensor(&[2, 16, 16, 64], &mut rng),
        tensor(&[3, 3, 64, 64], &mut rng),
    ]
}

fn convolved(gpu: &Gpu, variant: Option<Variant>) -> Vec<f32> {
    let [x, w] = images(gpu);
    let options = Conv2dOptions::new(1, 1);
    let y = match variant {
        None => conv2d(&x, &w, None, &options),
        variant => {
            let force = Force {
                variant,
                ..Force::default()
            };
            conv2d_with(&force, &x, &w, None, &options)
        }
    };
    y.to_f32().unwrap()
}

/// 200 rows to as many keys, two heads of 64.
fn attended(gpu: &Gpu, division: Option<Division>) -> Vec<f32> {
    let mut rng = rng(6);
    let [q, k, v] = [(); 3].map(|()| {
        let values = uniform(&mut rng, 200 * 128);
        Tensor::from_f32(gpu, &values, &[1, 200, 128])
    });
    let shape = AttentionShape {
        heads: 2,
        kv_heads: 2,
        scale: 0.125,
    };
    let mask = AttentionMask::default();
    let (out, _) = match division {
        None => attention(&q, &k, &v, shape, &mask),
        division => attention_with(&q, &k, &v, shape, &mask, division),
    };
    out.to_f32().unwrap()
}

fn close(actual: &[f32], expected: &[f32]) {
    let expected: Vec<f64> = expected.iter().map(|&v| v.into()).collect();
    // Two orders of some hundred f32 terms.
    assert!(nmse(actual, &expected) < 1e-11);
}

/// How many of a convolution and an attention have several ways: GPUs have one for f32 attention.
fn measured(gpu: &Gpu) -> usize {
    if gpu.tier().cpu { 2 } else { 1 }
}

#[test]
fn what_is_measured_gives_the_values_is_kept_and_measured_once() {
    let dir = tempfile::tempdir().unwrap();
    let plain = open(Tuning::Off, dir.path());
    let measuring = open(Tuning::FirstUse, dir.path());
    let expected = (convolved(&plain, None), attended(&plain, None));
    let (conv, attention) = (convolved(&measuring, None), attended(&measuring, None));
    close(&conv, &expected.0);
    close(&attention, &expected.1);
    let choices = [
        ("conv2d", &["direct", "winograd"][..]),
        ("attention", &["lanes", "tiles"]),
    ];
    for (op, ways) in &choices[..measured(&measuring)] {
        let found = measuring.tuned_of(op);
        assert_eq!(found.len(), 1, "{op}: {found:?}");
        assert!(ways.contains(&found[0].choice.as_str()), "{found:?}");
        assert!(found[0].millis > 0.0 && found[0].millis <= found[0].usual_millis);
    }
    let spent = measuring.tuning_spent();
    assert_eq!(conv, convolved(&measuring, None));
    assert_eq!(attention, attended(&measuring, None));
    assert_eq!(measuring.tuning_spent(), spent, "measured again");
    // A later run obeys.
    let later = open(Tuning::Cached, dir.path());
    assert_eq!(conv, convolved(&later, None));
    assert_eq!(attention, attended(&later, None));
    // And measures again what it is told to forget.
    assert_eq!(measuring.tuned_of("conv2d").len(), 1);
    measuring.forget_tuned("conv2d");
    assert!(measuring.tuned_of("conv2d").is_empty());
    convolved(&measuring, None);
    assert_eq!(measuring.tuned_of("conv2d").len(), 1);
}

#[test]
fn a_kept_choice_is_obeyed_and_one_that_is_none_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let measuring = open(Tuning::FirstUse, dir.path());
    convolved(&measuring, None);
    attended(&measuring, None);
    let path = std::fs::read_dir(dir.path()).unwrap().flatten();
    let path = path
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|e| e == "json"));
    let path = path.expect("a tuning cache");
    let several = measured(&measuring) == 2;
    drop(measuring);
    let kept: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    let class = |op: &str| -> Option<String> {
        let choices = kept["choices"].as_object().unwrap();
        choices.keys().find(|class| class.starts_with(op)).cloned()
    };
    let (conv, attention) = (class("conv2d").unwrap(), class("attention"));
    assert_eq!(attention.is_some(), several);
    let set = |class: &str, choice: &str| {
        let gpu = open(Tuning::Cached, dir.path());
        let tuned = Tuned {
            choice: choice.into(),
            shape: String::new(),
            millis: 1.0,
            usual_millis: 1.0,
        };
        gpu.set_tuned(class, tuned);
        gpu
    };
    for (choice, variant) in [("direct", Variant::Direct), ("winograd", Variant::Winograd)] {
        let gpu = set(&conv, choice);
        assert_eq!(
            convolved(&gpu, None),
            convolved(&gpu, Some(variant)),
            "{choice}"
        );
    }
    let usual = open(Tuning::Off, dir.path());
    let nonsense = ["", "tile 4", "../../etc/passwd"];
    for choice in nonsense {
        assert_eq!(
            convolved(&set(&conv, choice), None),
            convolved(&usual, None)
        );
    }
    let Some(attention) = attention else {
        return;
    };
    let gpu = set(&attention, "tiles");
    assert_eq!(attended(&gpu, None), attended(&gpu, Some(Division::Tiles)));
    for choice in nonsense {
        assert_eq!(
            attended(&set(&attention, choice), None),
            attended(&usual, None)
        );
    }
}
