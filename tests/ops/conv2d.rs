use lavender_wgpu::gpu::{Gpu, GpuOptions, MatrixUnit, Scalar};
use lavender_wgpu::ops::conv2d::{
    Conv2dOptions, Force, Variant, conv2d_grad_input_with, conv2d_grad_weight_with, conv2d_with,
};
use lavender_wgpu::ops::matmul::Cooperative;
use lavender_wgpu::tensor::{DType, Tensor};
use rand::RngExt;

use crate::support::*;

/// Every kernel family, the one that the tier chooses, and images cut into bands of a few rows.
fn forces() -> Vec<Force> {
    let mut forces = Vec::new();
    for variant in [
        None,
        Some(Variant::Tile(4)),
        Some(Variant::Tile(8)),
        Some(Variant::Rows),
    ] {
        forces.push(Force {
            variant,
            band_bytes: None,
        });
    }
    for variant in [Some(Variant::Tile(4)), Some(Variant::Rows)] {
        forces.push(Force {
            variant,
            band_bytes: Some(1500),
        });
    }
    forces
}

#[derive(Debug, Clone, Copy)]
struct Case {
    x: [usize; 4],
    kernel: [usize; 2],
    out: usize,
    options: Conv2dOptions,
    dtype: DType,
    weight: DType,
}

/// Calls `f(x index, w index, y index)` for every product that the convolution adds up.
fn each(case: &Case, mut f: impl FnMut(usize, usize, usize)) -> [usize; 4] {
    let [batch, h, w, ci] = case.x;
    let [kh, kw] = case.kernel;
    let [top, bottom, left, right] = case.options.padding;
    let s = case.options.stride;
    let (oh, ow) = (
        (h + top + bottom - kh) / s + 1,
        (w + left + right - kw) / s + 1,
    );
    for b in 0..batch {
        for (oy, ox) in (0..oh).flat_map(|y| (0..ow).map(move |x| (y, x))) {
            for (ky, kx) in (0..kh).flat_map(|y| (0..kw).map(move |x| (y, x))) {
                let (y, x) = (oy * s + ky, ox * s + kx);
                if y < top || x < left || y - top >= h || x - left >= w {
                    continue;
                }
                let pixel = ((b * h + y - top) * w + x - left) * ci;
                let result = ((b * oh + oy) * ow + ox) * case.out;
                for c in 0..ci {
                    for o in 0..case.out {
                        f(
                            pixel + c,
                            ((ky * kw + kx) * ci + c) * case.out + o,
                            result + o,
                        );
                    }
                }
            }
        }
    }
    [batch, oh, ow, case.out]
}

fn check(force: &Force, case: Case, rng: &mut rand_chacha::ChaCha8Rng) {
    let ([kh, kw], ci, co) = (case.kernel, case.x[3], case.out);
    let weight_shape = [kh, kw, ci, co];
    let count = |shape: &[usize]| shape.iter().product::<usize>();
    let (x, x_held) = upload(&uniform(rng, count(&case.x)), case.dtype, &case.x);
    let (w, w_held) = upload(
        &uniform(rng, count(&weight_shape)),
        case.weight,
        &weight_shape,
    );
    let (bias, bias_held) = upload(&uniform(rng, co), DType::F32, &[co]);
    let shape = each(&case, |_, _, _| ());
    let (dy, dy_held) = upload(&uniform(rng, count(&shape)), case.dtype, &shape);
    let with_bias = rng.random::<bool>();
    let mut y: Vec<f64> = (0..count(&shape))
        .map(|i| if with_bias { bias_held[i % co] } else { 0.0 })
        .collect();
    let mut dx = vec![0.0; x_held.len()];
    let mut dw = vec![0.0; w_held.len()];
    each(&case, |i, j, k| {
        y[k] += x_held[i] * w_held[j];
        dx[i] += dy_held[k] * w_held[j];
        dw[j] += dy_held[k] * x_held[i];
    });
    let what = format!("{force:?} {case:?}");
    let o = &case.options;
    let actual = conv2d_with(force, &x, &w, with_bias.then_some(&bias), o);
    assert_eq!(actual.shape(), shape);
    assert_close(&format!("{what} forward"), &actual, &y);
    let actual = conv2d_grad_input_with(force, &dy, &w, &case.x, o);
    assert_close(&format!("{what} grad_input"), &actual, &dx);
    let actual = conv2d_grad_weight_with(force, &x, &dy, kh, kw, o);
    assert_eq!(actual.shape(), weight_shape);
    assert_close(&format!("{what} grad_weight"), &actual, &dw);
}

fn fuzz(force: &Force, seed: u64, rounds: usize) {
    let mut rng = rng(seed);
    let floats = float_types();
    let channels = [1, 3, 4, 5, 8, 17, 20, 33, 36];
    for _ in 0..rounds {
        let mut pick = |n: usize| rng.random_range(0..n);
        let kernel = [[1, 1], [3, 3], [3, 3], [2, 3], [5, 4]][pick(5)];
        let padding = [[0; 4], [1; 4], [0, 1, 0, 1], [2, 0, 1, 3]][pick(4)];
        let case = Case {
            x: [
                1 + pick(2),
                kernel[0] + pick(9),
                kernel[1] + pick(7),
                channels[pick(9)],
            ],
            kernel,
            out: channels[pick(9)],
            options: Conv2dOptions {
                stride: 1 + pick(2),
                padding,
            },
            dtype: floats[pick(floats.len())],
            weight: [floats[pick(floats.len())], DType::Bf16][pick(2)],
        };
        check(force, case, &mut rng);
    }
}

#[test]
fn odd_shapes_match_f64_in_every_variant() {
    for (i, force) in forces().into_iter().enumerate() {
        fuzz(&force, 20 + i as u64, 12);
    }
}

#[test]
fn matrix_units_do_what_they_can_and_leave_the_rest() {
    let options = GpuOptions {
        profile: true,
        ..GpuOptions::default()
    };
    let gpu = Gpu::new(&options).expect("an adapter");
    let unit = MatrixUnit {
        size: 8,
        operands: Scalar::F16,
        sums: Scalar::F32,
    };
    if !gpu.tier().timestamps || !gpu.tier().matrix_units.contains(&unit) {
        return;
    }
    let force = Force {
        variant: Some(Variant::Cooperative(Cooperative {
            size: 8,
            fragments: 2,
        })),
        band_bytes: None,
    };
    for (channels, dtype, on_units) in [
        (8, DType::F16, true),
        (6, DType::F16, false),
        (8, DType::F32, false),
    ] {
        let x = Tensor::zeros(&gpu, dtype, &[1, 5, 5, channels]);
        let w = Tensor::zeros(&gpu, dtype, &[3, 3, channels, 8]);
        conv2d_with(&force, &x, &w, None, &Conv2dOptions::new(1, 1));
        let op = gpu.profile().remove(0).op;
        assert_eq!(
            op.starts_with("conv2d_cooperative"),
            on_units,
            "{channels} {dtype:?}: {op}"
        );
    }
}

/// Where the adapter has the units (software ones have 8×8); shapes around the sides of fragments, blocks and tiles, and
/// channels that they do not do.
#[test]
fn matrix_units_match_f64() {
    let mut rng = rng(40);
    for (size, fragments, weight) in [
        (8, 2, DType::Bf16),
        (8, 4, DType::F16),
        (16, 2, DType::F16),
        (16, 4, DType::Bf16),
    ] {
        let unit = MatrixUnit {
            size,
            operands: Scalar::F16,
            sums: Scalar::F32,
        };
        if !gpu().tier().matrix_units.contains(&unit) {
            continue;
        }
        let variant = Some(Variant::Cooperative(Cooperative { size, fragments }));
        for round in 0..10 {
            let mut pick = |of: &[usize]| of[rng.random_range(0..of.len())];
            let case = Case {
                x: [
                    pick(&[1, 2]),
                    pick(&[3, 7, 12]),
                    pick(&[4, 9, 16]),
                    pick(&[4, 8, 20, 36, 5]),
                ],
                kernel: [[3, 3], [1, 1], [2, 3]][pick(&[0, 0, 1, 2])],
                out: pick(&[4, 12, 32, 68]),
                options: Conv2dOptions {
                    stride: pick(&[1, 1, 2]),
                    padding: [[1; 4], [0, 1, 0, 1]][pick(&[0, 1])],
                },
                dtype: DType::F16,
                weight,
            };
            let band_bytes = (round % 3 == 0).then_some(1500);
            check(
                &Force {
                    variant,
                    band_bytes,
                },
                case,
                &mut rng,
            );
        }
    }
}

#[test]
fn a_weight_gradient_over_many_pixels_is_split_and_exact() {
    let mut rng = rng(4);
    // With few output channels its rows are theirs on drivers that run on the CPU.
    for (force, (ci, co)) in forces()
        .into_iter()
        .zip([(3, 4), (36, 2)].into_iter().cycle())
    {
        let case = Case {
            x: [1, 61, 67, ci],
            kernel: [3, 3],
            out: co,
            options: Conv2dOptions::new(1, 1),
            dtype: DType::F32,
            weight: DType::F32,
        };
        check(&force, case, &mut rng);
    }
}

/// More lines of all images than a dispatch has workgroups along a dimension.
#[test]
fn a_weight_gradient_over_many_images_is_cut() {
    const IMAGES: usize = 8000;
    for (ci, co) in [(4, 4), (36, 2)] {
        let ones = |c: usize| {
            let shape = [IMAGES, 3, 4, c];
            Tensor::from_f32(gpu(), &vec![1.0; shape.iter().product()], &shape)
        };
        let options = Conv2dOptions::new(1, 1);
        let dw = conv2d_grad_weight_with(&Force::default(), &ones(ci), &ones(co), 3, 3, &options);
        // How many of the 3 × 4 pixels each tap sees.
        let expected: Vec<f32> = [2, 3, 2]
            .into_iter()
            .flat_map(|rows| [3, 4, 3].map(|columns| (IMAGES * rows * columns) as f32))
            .flat_map(|count| vec![count; ci * co])
            .collect();
        assert_eq!(dw.to_f32().unwrap(), expected);
    }
}

/// Tiles that end past the image, any padding, turned weights, bands; channels that it does not do go to the others.
#[test]
fn winograd_matches_f64() {
    let mut rng = rng(50);
    let floats = float_types();
    for round in 0..24 {
        let mut pick = |of: &[usize]| of[rng.random_range(0..of.len())];
        let case = Case {
            x: [
                pick(&[1, 2]),
                pick(&[3, 4, 6, 9, 13]),
                pick(&[3, 5, 8, 11]),
                pick(&[4, 8, 20, 36, 5]),
            ],
            kernel: [3, 3],
            out: pick(&[4, 12, 32, 68]),
            options: Conv2dOptions {
                stride: pick(&[1, 1, 1, 2]),
                padding: [[0; 4], [1; 4], [0, 1, 0, 1], [2, 0, 1, 3]][pick(&[0, 1, 2, 3])],
            },
            dtype: floats[pick(&[0, 1]) % floats.len()],
            weight: [DType::F32, DType::Bf16, floats[floats.len() - 1]][pick(&[0, 1, 2])],
        };
        let force = Force {
            variant: Some(Variant::Winograd),
            band_bytes: (round % 3 == 0).then_some(1500),
        };
        check(&force, case, &mut rng);
    }
}

/// Any padding and kernel, several images, bands, f16 and channels that it does not do; alike for gradients, which go to the
/// tier's own.
#[test]
fn few_output_channels_match_f64() {
    let mut rng = rng(60);
    let floats = float_types();
    for round in 0..24 {
        let mut pick = |of: &[usize]| of[rng.random_range(0..of.len())];
        let case = Case {
            x: [
                pick(&[1, 2]),
                pick(&[3, 4, 6, 9]),
                pick(&[4, 5, 8, 11]),
                pick(&[4, 8, 20, 68, 5]),
            ],
            kernel: [[3, 3], [2, 3], [3, 1]][pick(&[0, 1, 2])],
            out: pick(&[1, 2, 3, 4, 7]),
            options: Conv2dOptions {
                stride: pick(&[1, 1, 1, 2]),
                padding: [[0; 4], [1; 4], [0, 1, 0, 1], [2, 0, 1, 3]][pick(&[0, 1, 2, 3])],
            },
            dtype: floats[pick(&[0, 1]) % floats.len()],
            weight: [DType::F32, DType::Bf16, floats[floats.len() - 1]][pick(&[0, 1, 2])],
        };
        let force = Force {
            variant: [Some(Variant::Narrow), None][pick(&[0, 0, 1])],
            band_bytes: (round % 3 == 0).then_some(1500),
        };
        check(&force, case, &mut rng);
    }
}

/// Sums of up to 96 terms over pixels of images whose lines, of 8 pixels or more and of fewer, turn in the midst of eight rows.
#[test]
fn few_input_channels_match_f64() {
    let mut rng = rng(61);
    let floats = float_types();
    for round in 0..24 {
        let mut pick = |of: &[usize]| of[rng.random_range(0..of.len())];
        let case = Case {
            x: [
                pick(&[1, 3]),
                pick(&[3, 5, 12, 19]),
                pick(&[6, 9, 10, 17, 33]),
                pick(&[1, 3, 4, 8]),
            ],
            kernel: [[3, 3], [2, 3], [1, 1]][pick(&[0, 1, 2])],
            out: pick(&[4, 8, 20, 36, 5]),
            options: Conv2dOptions {
                stride: pick(&[1, 1, 2]),
                padding: [[0; 4], [1; 4], [0, 1, 0, 1]][pick(&[0, 1, 2])],
            },
            dtype: floats[pick(&[0, 1]) % floats.len()],
            weight: DType::F32,
        };
        let force = Force {
            variant: Some(Variant::Rows),
            band_bytes: (round % 3 == 0).then_some(1500),
        };
        check(&force, case, &mut rng);
    }
}

/// The basis change costs a few bits: in f32 with the U-Net's channels 1e-6 of the largest value (a direct sum: 3e-7). The
/// weight is large enough to go to its points in slices.
#[test]
fn winograd_is_nearly_as_exact_as_a_direct_sum() {
    let mut rng = rng(51);
    let (x_shape, w_shape) = ([1, 8, 8, 320], [3, 3, 320, 416]);
    let x = Tensor::from_f32(gpu(), &uniform(&mut rng, 8 * 8 * 320), &x_shape);
    let w = Tensor::from_f32(gpu(), &uniform(&mut rng, 9 * 320 * 416), &w_shape);
    let run = |variant: Variant| {
        let force = Force {
            variant: Some(variant),
            band_bytes: None,
        };
        let y = conv2d_with(&force, &x, &w, None, &Conv2dOptions::new(1, 1));
        y.to_f32().expect("readable")
    };
    let [fast, direct] = [Variant::Winograd, Variant::Tile(4)].map(run);
    let largest = direct.iter().fold(0f32, |m, v| m.max(v.abs()));
    let differs = fast.iter().zip(&direct).map(|(a, b)| (a - b).abs());
    let error = differs.fold(0f32, f32::max) / largest;
    assert!(error > 0.0 && error < 5e-6, "{error:e} of the largest");
}
