//! The quantised right operand: its format, and every kernel family against f64 with the dequantised weights.

use lavender_wgpu::ops::matmul::{
    Ending, MatmulOptions, Variant, matmul_quantized, matmul_quantized_with,
};
use lavender_wgpu::ops::unary::Unary;
use lavender_wgpu::tensor::{DType, Quantization, QuantizedMatrix, Tensor};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::support::*;

const KINDS: [Quantization; 2] = [Quantization::Q8, Quantization::Q4];

/// Every kernel family, and the one that the tier chooses.
const VARIANTS: [Option<Variant>; 7] = [
    None,
    Some(Variant::Tile(4)),
    Some(Variant::Tile(8)),
    Some(Variant::Rows),
    Some(Variant::Vector(1)),
    Some(Variant::Vector(32)),
    Some(Variant::Subgroup),
];

/// Normal values of deviation 0.02, as trained weights are.
fn normal(rng: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    let mut uniform = || rng.random_range(f32::EPSILON..1.0f32);
    (0..n)
        .map(|_| {
            let (u, v) = (uniform(), uniform());
            0.02 * (-2.0 * u.ln()).sqrt() * (std::f32::consts::TAU * v).cos()
        })
        .collect()
}

fn quantized(values: &[f32], shape: [usize; 2], kind: Quantization) -> QuantizedMatrix {
    QuantizedMatrix::from_f32(gpu(), values, shape, kind).expect("finite")
}

fn doubles(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

#[test]
fn weights_survive_as_well_as_their_bits_allow() {
    // Normal weights in groups of 64: 3.6e-5 and 8.1e-3 expected, and a last group of one has no error but the scale's.
    for (kind, allowed) in [(Quantization::Q8, 3.8e-5), (Quantization::Q4, 8.4e-3)] {
        for shape in [[96, 576], [301, 65], [7, 1000]] {
            let values = normal(&mut rng(1), shape[0] * shape[1]);
            let held = quantized(&values, shape, kind);
            let error = nmse(&held.to_f32().unwrap(), &doubles(&values));
            assert!(error < allowed, "{kind:?} {shape:?}: NMSE {error:e}");
            assert_eq!(held.bytes(), kind.bytes(shape[0], shape[1]));
        }
    }
    assert_eq!(Quantization::Q8.bytes(3, 65), 3 * 2 * 66);
    assert_eq!(Quantization::Q4.bytes(3, 64), 3 * 34);
}

#[test]
fn integers_and_scales_lie_as_documented() {
    // Magnitudes whose scale is a power of two: everything is exact.
    let mut values = vec![0.0f32; 2 * 66];
    (values[0], values[1], values[2], values[63], values[64]) = (127.0, -1.0, 64.0, -126.0, -63.5);
    let held = quantized(&values, [2, 66], Quantization::Q8);
    assert_eq!(held.to_f32().unwrap(), values);
    let words = held.words().to_u32().unwrap();
    assert_eq!(words.len(), 2 * 2 * 16);
    assert_eq!(
        (words[0], words[15], words[16]),
        (0x0040_ff7f, 0x8200_0000, 0x81)
    );
    assert_eq!(held.scales().to_f32().unwrap(), [1.0, 0.5, 0.0, 0.0]);

    let mut values = vec![0.0f32; 3 * 9];
    (values[0], values[1], values[7], values[8], values[9]) = (-8.0, 7.0, 3.0, -1.0, 2.0);
    let held = quantized(&values, [3, 9], Quantization::Q4);
    assert_eq!(held.to_f32().unwrap(), values);
    let words = held.words().to_u32().unwrap();
    assert_eq!(words.len(), 3 * 8);
    assert_eq!((words[0], words[1]), (0x3000_0078, 0xf));
    // The largest magnitude of a group becomes −8, so a scale may be negative.
    assert_eq!(held.scales().to_f32().unwrap(), [1.0, -0.25, 0.0]);
}

#[test]
fn every_stored_type_quantises_alike_and_not_finite_is_refused() {
    let shape = [5, 130];
    let values = uniform(&mut rng(2), 650);
    for kind in KINDS {
        for dtype in [DType::F16, DType::Bf16] {
            let bytes = dtype.narrow(&values);
            let direct = QuantizedMatrix::from_bytes(gpu(), &bytes, dtype, shape, kind).unwrap();
            let widened = quantized(&dtype.widen(&bytes), shape, kind);
            assert_eq!(
                direct.words().to_u32().unwrap(),
                widened.words().to_u32().unwrap()
            );
        }
        for bad in [f32::NAN, f32::INFINITY] {
            let mut values = values.clone();
            values[649] = bad;
            assert!(QuantizedMatrix::from_f32(gpu(), &values, shape, kind).is_none());
        }
        // Below what a scale can express: zero, not an infinity.
        let tiny = quantized(&vec![1e-40; 650], shape, kind);
        assert!(tiny.to_f32().unwrap().iter().all(|&v| v == 0.0));
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub batch: Option<usize>,
    pub m: usize,
    pub outputs: usize,
    pub inputs: usize,
    /// a · wᵀ, else a · w.
    pub trans_b: bool,
    pub a: DType,
    pub kind: Quantization,
    pub epilogue: usize,
}

pub fn check(variant: Option<Variant>, case: Case, rng: &mut ChaCha8Rng) {
    let Case {
        m,
        outputs,
        inputs,
        trans_b,
        ..
    } = case;
    let (k, n) = match trans_b {
        true => (inputs, outputs),
        false => (outputs, inputs),
    };
    let w = quantized(
        &uniform(rng, outputs * inputs),
        [outputs, inputs],
        case.kind,
    );
    let held = w.to_f32().unwrap();
    let lead = case.batch.map(|b| vec![b]).unwrap_or_default();
    let rows = m * case.batch.unwrap_or(1);
    let (a, a_held) = upload(
        &uniform(rng, rows * k),
        case.a,
        &[&lead[..], &[m, k]].concat(),
    );
    let weight = |x: usize, c: usize| match trans_b {
        true => f64::from(held[c * inputs + x]),
        false => f64::from(held[x * inputs + c]),
    };
    let mut expected = vec![0.0; rows * n];
    for r in 0..rows {
        for x in 0..k {
            let v = a_held[r * k + x];
            for (c, sum) in expected[r * n..(r + 1) * n].iter_mut().enumerate() {
                *sum += v * weight(x, c);
            }
        }
    }
    let mut options = MatmulOptions {
        trans_b,
        ..MatmulOptions::default()
    };
    let (bias, bias_held) = upload(&uniform(rng, n), DType::F32, &[n]);
    if case.epilogue >= 1 {
        options.bias = Some(&bias);
        for (i, v) in expected.iter_mut().enumerate() {
            *v += bias_held[i % n];
        }
    }
    if case.epilogue >= 2 {
        options.activation = Some(Unary::Silu);
        for v in &mut expected {
            *v /= 1.0 + (-*v).exp();
        }
    }
    let shape = [&lead[..], &[m, n]].concat();
    let (other, other_held) = upload(&uniform(rng, expected.len()), case.a, &shape);
    if case.epilogue == 3 {
        options.ending = Some(Ending::Residual(&other));
        for (v, r) in expected.iter_mut().zip(&other_held) {
            *v += r;
        }
    }
    if case.epilogue == 4 {
        options.ending = Some(Ending::Gate(&other));
        for (v, g) in expected.iter_mut().zip(&other_held) {
            *v *= g / (1.0 + (-g).exp());
        }
    }
    let c = matmul_quantized_with(variant, &a, &w, &options);
    assert_eq!((c.shape(), c.dtype()), (&shape[..], case.a));
    assert_close(&format!("{variant:?} {case:?}"), &c, &expected);
}

/// Sizes around quads, groups and tiles, primes and ones.
const SIZES: [usize; 14] = [1, 2, 3, 4, 7, 8, 17, 31, 63, 64, 65, 127, 129, 196];

#[test]
fn odd_shapes_match_f64_in_every_variant() {
    let floats = float_types();
    for (i, variant) in VARIANTS.into_iter().enumerate() {
        let mut rng = rng(40 + i as u64);
        for round in 0..32 {
            let pick = |rng: &mut ChaCha8Rng, from: &[usize]| from[rng.random_range(0..from.len())];
            let case = Case {
                batch: [None, None, Some(1), Some(3)][rng.random_range(0..4)],
                m: pick(&mut rng, if round % 2 == 0 { &SIZES } else { &SIZES[..6] }),
                outputs: pick(&mut rng, &SIZES),
                inputs: pick(&mut rng, &SIZES),
                // The vector kernels do only one of the two.
                trans_b: matches!(variant, Some(Variant::Vector(_))) || rng.random(),
                a: floats[rng.random_range(0..floats.len())],
                kind: KINDS[round / 2 % 2],
                epilogue: rng.random_range(0..5),
            };
            check(variant, case, &mut rng);
        }
    }
}

#[test]
fn a_long_sum_into_a_small_result_is_split_and_exact() {
    for variant in VARIANTS {
        for (kind, trans_b) in [(KINDS[0], true), (KINDS[1], false)] {
            let (outputs, inputs) = if trans_b { (9, 4099) } else { (4099, 9) };
            let case = Case {
                batch: None,
                m: 11,
                outputs,
                inputs,
                trans_b,
                a: DType::F32,
                kind,
                epilogue: 1,
            };
            check(variant, case, &mut rng(60));
        }
    }
}

#[test]
fn a_weight_whose_panels_exceed_their_limit_is_cut() {
    // On a CPU driver the panels of this one take 69 MiB, more than is unpacked at once.
    let (outputs, inputs) = (1031, 17_000);
    let values = uniform(&mut rng(7), outputs * inputs);
    for kind in KINDS {
        let w = quantized(&values, [outputs, inputs], kind);
        let held = w.to_f32().unwrap();
        let (x, dy) = (
            uniform(&mut rng(8), 9 * inputs),
            uniform(&mut rng(9), 9 * outputs),
        );
        let y = matmul_quantized(
            &Tensor::from_f32(gpu(), &x, &[9, inputs]),
            &w,
            &MatmulOptions {
                trans_b: true,
                ..Default::default()
            },
        );
        let dx = matmul_quantized(
            &Tensor::from_f32(gpu(), &dy, &[9, outputs]),
            &w,
            &MatmulOptions::default(),
        );
        let (mut expected_y, mut expected_dx) = (vec![0.0; 9 * outputs], vec![0.0; 9 * inputs]);
        // Three rows tell as much as nine.
        for r in [0, 4, 8] {
            for o in 0..outputs {
                let row = &held[o * inputs..(o + 1) * inputs];
                let g = f64::from(dy[r * outputs + o]);
                for (c, &w) in row.iter().enumerate() {
                    expected_y[r * outputs + o] += f64::from(x[r * inputs + c]) * f64::from(w);
                    expected_dx[r * inputs + c] += g * f64::from(w);
                }
            }
        }
        let rows = |t: &Tensor, width: usize| {
            let mut values = t.to_f32().unwrap();
            for r in [1, 2, 3, 5, 6, 7] {
                values[r * width..(r + 1) * width].fill(0.0);
            }
            values
        };
        for (what, actual, expected) in [
            ("y", rows(&y, outputs), expected_y),
            ("dx", rows(&dx, inputs), expected_dx),
        ] {
            let error = nmse(&actual, &expected);
            assert!(error <= tolerance(DType::F32), "{kind:?} {what}: {error:e}");
        }
    }
}
