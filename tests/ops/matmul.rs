use lavender_wgpu::gpu::{Gpu, GpuOptions};
use lavender_wgpu::ops::matmul::{Ending, MatmulOptions, Variant, matmul, matmul_with};
use lavender_wgpu::ops::unary::Unary;
use lavender_wgpu::tensor::{DType, Tensor};
use rand::RngExt;

use crate::support::*;

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

#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub batch: usize,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub trans_a: bool,
    pub trans_b: bool,
    pub a_batched: bool,
    pub b_batched: bool,
    pub a: DType,
    pub b: DType,
}

impl Case {
    fn operand(
        &self,
        rng: &mut rand_chacha::ChaCha8Rng,
        dtype: DType,
        batched: bool,
        [rows, columns]: [usize; 2],
        transposed: bool,
    ) -> (Tensor, Vec<f64>) {
        let batch = if batched { self.batch } else { 1 };
        let mut shape = if transposed {
            vec![columns, rows]
        } else {
            vec![rows, columns]
        };
        if batched {
            shape.insert(0, batch);
        }
        let (t, held) = upload(&uniform(rng, batch * rows * columns), dtype, &shape);
        // The reference works on [batch, rows, columns].
        let mut plain = Vec::with_capacity(self.batch * rows * columns);
        for i in 0..self.batch {
            let matrix = &held[if batched { i * rows * columns } else { 0 }..];
            for r in 0..rows {
                for c in 0..columns {
                    plain.push(
                        matrix[if transposed {
                            c * rows + r
                        } else {
                            r * columns + c
                        }],
                    );
                }
            }
        }
        (t, plain)
    }
}

fn product(case: &Case, a: &[f64], b: &[f64]) -> Vec<f64> {
    let Case { batch, m, n, k, .. } = *case;
    let mut c = vec![0.0; batch * m * n];
    for i in 0..batch {
        for r in 0..m {
            for x in 0..k {
                let v = a[(i * m + r) * k + x];
                for s in 0..n {
                    c[(i * m + r) * n + s] += v * b[(i * k + x) * n + s];
                }
            }
        }
    }
    c
}

pub fn check(variant: Option<Variant>, case: Case, rng: &mut rand_chacha::ChaCha8Rng) {
    let Case {
        m,
        n,
        k,
        trans_a,
        trans_b,
        ..
    } = case;
    let (a, a_held) = case.operand(rng, case.a, case.a_batched, [m, k], trans_a);
    let (b, b_held) = case.operand(rng, case.b, case.b_batched, [k, n], trans_b);
    let mut expected = product(&case, &a_held, &b_held);
    let (bias, bias_held) = upload(&uniform(rng, n), DType::F32, &[n]);
    let epilogue = rng.random_range(0..6);
    let mut options = MatmulOptions {
        trans_a,
        trans_b,
        ..MatmulOptions::default()
    };
    if epilogue >= 1 {
        options.bias = Some(&bias);
        for (i, v) in expected.iter_mut().enumerate() {
            *v += bias_held[i % n];
        }
    }
    if (2..=4).contains(&epilogue) {
        options.activation = Some(Unary::Silu);
        for v in &mut expected {
            *v /= 1.0 + (-*v).exp();
        }
    }
    let shape: Vec<usize> = if case.a_batched || case.b_batched {
        vec![case.batch, m, n]
    } else {
        vec![m, n]
    };
    let (other, other_held) = upload(&uniform(rng, expected.len()), case.a, &shape);
    if epilogue == 3 || epilogue == 5 {
        options.ending = Some(Ending::Residual(&other));
        for (v, r) in expected.iter_mut().zip(&other_held) {
            *v += r;
        }
    }
    if epilogue == 4 {
        options.ending = Some(Ending::Gate(&other));
        for (v, g) in expected.iter_mut().zip(&other_held) {
            *v *= g / (1.0 + (-g).exp());
        }
    }
    let c = matmul_with(variant, &a, &b, &options);
    assert_eq!(c.shape(), shape);
    assert_eq!(c.dtype(), case.a);
    assert_close(
        &format!("{variant:?} {case:?} epilogue {epilogue}"),
        &c,
        &expected,
    );
}

/// Sizes around the tile edges, primes and ones.
const SIZES: [usize; 12] = [1, 2, 3, 7, 8, 16, 17, 31, 33, 63, 65, 131];

fn fuzz(variant: Option<Variant>, seed: u64, rounds: usize) {
    let mut rng = rng(seed);
    let floats = float_types();
    for _ in 0..rounds {
        let size = |rng: &mut rand_chacha::ChaCha8Rng| SIZES[rng.random_range(0..SIZES.len())];
        let (a_batched, b_batched) =
            [(false, false), (true, false), (false, true), (true, true)][rng.random_range(0..4)];
        let batch = if a_batched || b_batched {
            rng.random_range(1..4)
        } else {
            1
        };
        let case = Case {
            batch,
            m: size(&mut rng),
            n: size(&mut rng),
            k: size(&mut rng),
            trans_a: rng.random(),
            trans_b: rng.random(),
            a_batched,
            b_batched,
            a: floats[rng.random_range(0..floats.len())],
            b: [floats[rng.random_range(0..floats.len())], DType::Bf16][rng.random_range(0..2)],
        };
        check(variant, case, &mut rng);
    }
}

#[test]
fn odd_shapes_match_f64_in_every_variant() {
    for (i, variant) in VARIANTS.into_iter().enumerate() {
        fuzz(variant, 10 + i as u64, 24);
    }
}

#[test]
fn a_long_sum_into_a_small_result_is_split_and_exact() {
    let mut rng = rng(3);
    for variant in VARIANTS {
        let case = Case {
            batch: 1,
            m: 5,
            n: 9,
            k: 4099,
            trans_a: true,
            trans_b: false,
            a_batched: false,
            b_batched: false,
            a: DType::F32,
            b: DType::F32,
        };
        check(variant, case, &mut rng);
    }
}

/// 17 panels of 32 columns, which CPU drivers pass over in fours.
#[test]
fn many_panels_match_f64() {
    let mut rng = rng(4);
    for (a_batched, trans_a) in [(false, false), (true, false), (false, true)] {
        let case = Case {
            batch: if a_batched { 2 } else { 1 },
            m: 37,
            n: 523,
            k: 1024,
            trans_a,
            trans_b: false,
            a_batched,
            b_batched: false,
            a: DType::F32,
            b: DType::F32,
        };
        check(None, case, &mut rng);
        check(Some(Variant::Rows), case, &mut rng);
    }
}

/// Workgroups of 16 rows and of 32, the last of them partly outside; k with and without a last half step.
#[test]
fn short_and_tall_tiles_match_f64_at_their_edges() {
    let mut rng = rng(8);
    for (m, k) in [
        (17, 36),
        (31, 40),
        (33, 68),
        (63, 44),
        (157, 72),
        (303, 100),
    ] {
        for (trans_a, trans_b) in [(false, false), (false, true), (true, false)] {
            let case = Case {
                batch: 2,
                m,
                n: 41,
                k,
                trans_a,
                trans_b,
                a_batched: true,
                b_batched: false,
                a: DType::F32,
                b: DType::F32,
            };
            check(Some(Variant::Rows), case, &mut rng);
        }
    }
}

/// Sums of few terms, which CPU drivers do with all of b's lines for 32 columns held: runs of 128 rows and their ends, lines
/// of c that are whole vec4s and others.
#[test]
fn few_terms_match_f64() {
    let mut rng = rng(9);
    let floats = float_types();
    for round in 0..24 {
        let mut pick = |of: &[usize]| of[rng.random_range(0..of.len())];
        let [a_batched, b_batched] = [pick(&[0, 1]) == 1, pick(&[0, 1]) == 1];
        let case = Case {
            batch: if a_batched || b_batched { 2 } else { 1 },
            m: pick(&[32, 34, 36, 128, 134, 258]),
            n: pick(&[4, 36, 64, 41]),
            k: pick(&[3, 4, 16, 36, 64, 96, 97]),
            trans_a: false,
            trans_b: round % 2 == 0,
            a_batched,
            b_batched,
            a: floats[pick(&[0, 0, 1]) % floats.len()],
            b: [DType::F32, DType::Bf16][pick(&[0, 0, 1])],
        };
        check(Some(Variant::Rows), case, &mut rng);
    }
}

/// At most 16 columns, which CPU drivers do as the rows of the transposed product, short sums and ones in parts.
#[test]
fn few_columns_match_f64() {
    let mut rng = rng(10);
    for round in 0..24 {
        let mut pick = |of: &[usize]| of[rng.random_range(0..of.len())];
        let [a_batched, b_batched] = [pick(&[0, 1]) == 1, pick(&[0, 1]) == 1];
        let case = Case {
            batch: if a_batched || b_batched { 2 } else { 1 },
            m: pick(&[64, 67, 132]),
            n: pick(&[4, 8, 12, 16, 14]),
            k: pick(&[4, 16, 36, 300, 1028, 41]),
            trans_a: round % 3 == 0,
            trans_b: round % 3 == 1,
            a_batched,
            b_batched,
            a: DType::F32,
            b: DType::F32,
        };
        check(Some(Variant::Rows), case, &mut rng);
    }
}

#[test]
fn the_output_dtype_can_differ() {
    if !gpu().tier().f16 {
        return;
    }
    let (a, a_held) = upload(&uniform(&mut rng(5), 6 * 40), DType::F16, &[6, 40]);
    let (b, b_held) = upload(&uniform(&mut rng(6), 40 * 3), DType::F16, &[40, 3]);
    let options = MatmulOptions {
        output: Some(DType::F32),
        ..MatmulOptions::default()
    };
    let c = matmul(&a, &b, &options);
    let expected: Vec<f64> = (0..18)
        .map(|i| {
            (0..40)
                .map(|x| a_held[i / 3 * 40 + x] * b_held[x * 3 + i % 3])
                .sum()
        })
        .collect();
    assert_eq!(c.dtype(), DType::F32);
    assert_close("f16 to f32", &c, &expected);
}

#[test]
fn operands_over_the_binding_limit_are_cut() {
    let limit = gpu().tier().max_binding as usize;
    if limit > 1 << 28 {
        // Only adapters with a small limit (software ones: 128 MiB) can be tested quickly.
        return;
    }
    let (inner, long) = (1024, limit / 4096 + 1030);
    let pattern = |i: usize| ((i * 2_654_435_761) >> 7 & 0xff) as f32 / 128.0 - 1.0;
    let large: Vec<f32> = (0..inner * long).map(pattern).collect();
    let b = Tensor::from_f32(gpu(), &large, &[long, inner]);
    assert!(b.bytes() > gpu().tier().max_binding);
    let small: Vec<f32> = uniform(&mut rng(8), 2 * long);
    // b transposed: cut over n.
    let a = Tensor::from_f32(gpu(), &small[..2 * inner], &[2, inner]);
    let options = MatmulOptions {
        trans_b: true,
        ..MatmulOptions::default()
    };
    let c = matmul(&a, &b, &options);
    let dot = |r: usize, n: usize| -> f64 {
        (0..inner)
            .map(|k| f64::from(small[r * inner + k]) * f64::from(large[n * inner + k]))
            .sum()
    };
    let expected: Vec<f64> = (0..2 * long).map(|i| dot(i / long, i % long)).collect();
    assert_close("over n", &c, &expected);
    // b plain: cut over k.
    let a = Tensor::from_f32(gpu(), &small, &[2, long]);
    let c = matmul(&a, &b, &MatmulOptions::default());
    let mut expected = vec![0.0; 2 * inner];
    for k in 0..long {
        for i in 0..2 * inner {
            expected[i] +=
                f64::from(small[i / inner * long + k]) * f64::from(large[k * inner + i % inner]);
        }
    }
    assert_close("over k", &c, &expected);
    // A large left side: cut over m, the result with it.
    let a = b;
    let b = Tensor::from_f32(gpu(), &small[..inner], &[inner, 1]);
    let c = matmul(&a, &b, &MatmulOptions::default());
    let expected: Vec<f64> = (0..long).map(|n| dot(0, n)).collect();
    assert_close("over m", &c, &expected);
}

/// An adapter may lack subgroups and f16: the kernels that serve then give the same.
#[test]
fn a_portable_adapter_gives_the_same_products() {
    let portable = Gpu::new(&GpuOptions {
        portable: true,
        checked: true,
        ..GpuOptions::default()
    })
    .expect("an adapter");
    assert!(!portable.tier().subgroup && !portable.tier().f16);
    let mut rng = rng(97);
    for (m, n, k) in [(33, 65, 130), (16, 32, 64), (300, 40, 52)] {
        let (a, b) = (uniform(&mut rng, m * k), uniform(&mut rng, n * k));
        let product = |gpu: &Gpu| {
            let (a, b) = (
                Tensor::from_f32(gpu, &a, &[m, k]),
                Tensor::from_f32(gpu, &b, &[n, k]),
            );
            let options = MatmulOptions {
                trans_b: true,
                ..MatmulOptions::default()
            };
            matmul(&a, &b, &options)
        };
        let expected = product(gpu()).to_f32().expect("readable");
        let expected: Vec<f64> = expected.iter().map(|&v| v.into()).collect();
        assert_close("portable", &product(&portable), &expected);
    }
}
