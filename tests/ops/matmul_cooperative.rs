//! The product on matrix units, where the adapter lists them (software ones list 8×8), and what happens where it does
//! not, or where its kernel does not compile.

use lavender_wgpu::gpu::{Gpu, GpuOptions, MatrixUnit, Scalar};
use lavender_wgpu::ops::matmul::{Cooperative, MatmulOptions, Variant, matmul_with};
use lavender_wgpu::tensor::{DType, Quantization, Tensor};
use rand::RngExt;

use crate::matmul::{Case, check};
use crate::matmul_quantized;
use crate::support::*;

/// The shapes that this adapter's units allow with f16 operands and f32 sums.
fn shapes() -> Vec<Cooperative> {
    let mut shapes = Vec::new();
    for size in [8, 16] {
        let unit = MatrixUnit {
            size,
            operands: Scalar::F16,
            sums: Scalar::F32,
        };
        if gpu().tier().matrix_units.contains(&unit) {
            shapes.extend([2, 4].map(|fragments| Cooperative { size, fragments }));
        }
    }
    shapes
}

/// A GPU of its own that notes which kernels ran.
fn watched() -> Gpu {
    Gpu::new(&GpuOptions {
        checked: true,
        profile: true,
        ..GpuOptions::default()
    })
    .expect("an adapter")
}

fn ran(gpu: &Gpu, kernel: &str) -> bool {
    let named = |op: &str| op.split(' ').next() == Some(kernel);
    gpu.profile().iter().any(|time| named(&time.op))
}

/// Few shapes of kernel, each of which a software driver compiles for a second, at many shapes of matrices.
#[test]
fn odd_shapes_match_f64() {
    let (half, brain) = (DType::F16, DType::Bf16);
    // Transposes, b, whether lines are whole fours, and fragments.
    let kernels = [
        (false, false, half, true, 2),
        (true, true, brain, true, 2),
        (false, true, half, false, 2),
        (true, false, brain, false, 2),
        (false, true, half, true, 4),
        (true, false, half, false, 4),
    ];
    let mut rng = rng(41);
    for shape in shapes() {
        for (trans_a, trans_b, b, fours, _) in
            kernels.into_iter().filter(|k| k.4 == shape.fragments)
        {
            for _ in 0..12 {
                // Around the sides of fragments, blocks and tiles.
                let sizes: &[usize] = match fours {
                    true => &[4, 8, 16, 28, 32, 36, 64, 100, 132],
                    false => &[1, 7, 9, 17, 31, 33, 65, 67, 131],
                };
                let mut size = || sizes[rng.random_range(0..sizes.len())];
                let (m, n, k) = (size(), size(), size());
                let (a_batched, b_batched) =
                    [(false, false), (true, false), (false, true), (true, true)]
                        [rng.random_range(0..4)];
                let case = Case {
                    batch: if a_batched || b_batched { 2 } else { 1 },
                    m,
                    n,
                    k,
                    trans_a,
                    trans_b,
                    a_batched,
                    b_batched,
                    a: half,
                    // Uniform values in bf16 are f16 values too, but for the tiny ones.
                    b,
                };
                check(Some(Variant::Cooperative(shape)), case, &mut rng);
            }
        }
    }
}

#[test]
fn a_long_sum_is_split() {
    let mut rng = rng(42);
    for shape in shapes().into_iter().filter(|s| s.fragments == 2) {
        let case = Case {
            batch: 1,
            m: 12,
            n: 20,
            k: 4096,
            trans_a: true,
            trans_b: true,
            a_batched: false,
            b_batched: false,
            a: DType::F16,
            b: DType::F16,
        };
        check(Some(Variant::Cooperative(shape)), case, &mut rng);
    }
}

#[test]
fn quantised_weights_match_f64() {
    let mut rng = rng(43);
    for shape in shapes().into_iter().filter(|s| s.fragments == 2) {
        for round in 0..8 {
            let (kind, trans_b, inputs) = match round % 2 {
                0 => (Quantization::Q8, true, 132),
                _ => (Quantization::Q4, false, 65),
            };
            let case = matmul_quantized::Case {
                batch: None,
                m: [9, 33, 70][round % 3],
                outputs: [65, 131][rng.random_range(0..2)],
                inputs,
                trans_b,
                a: DType::F16,
                kind,
                epilogue: round % 5,
            };
            matmul_quantized::check(Some(Variant::Cooperative(shape)), case, &mut rng);
        }
    }
}

/// [m, k]·[n, k]ᵀ of the same values in f16.
fn product(gpu: &Gpu, variant: Option<Variant>, dtypes: [DType; 2]) -> Tensor {
    let (m, n, k) = (70, 90, 100);
    let mut rng = rng(44);
    let mut operand = |rows: usize, dtype: DType| {
        let values = DType::F16.widen(&DType::F16.narrow(&uniform(&mut rng, rows * k)));
        Tensor::from_bytes(gpu, &dtype.narrow(&values), dtype, &[rows, k])
    };
    let (a, b) = (operand(m, dtypes[0]), operand(n, dtypes[1]));
    let options = MatmulOptions {
        trans_b: true,
        ..MatmulOptions::default()
    };
    matmul_with(variant, &a, &b, &options)
}

fn expected() -> Vec<f64> {
    let c = product(gpu(), None, [DType::F32; 2]);
    c.to_f32().unwrap().iter().map(|&v| v.into()).collect()
}

#[test]
fn it_runs_where_it_is_asked_for_and_f32_is_never_rounded() {
    let gpu = watched();
    for shape in shapes().into_iter().filter(|s| s.fragments == 2) {
        let asked = Some(Variant::Cooperative(shape));
        let c = product(&gpu, asked, [DType::F16; 2]);
        assert!(
            !gpu.tier().timestamps || ran(&gpu, "matmul_cooperative"),
            "{shape:?}"
        );
        assert_close("f16", &c, &expected());
        for dtypes in [
            [DType::F32; 2],
            [DType::F32, DType::F16],
            [DType::F16, DType::F32],
        ] {
            let full = MatrixUnit {
                size: shape.size,
                operands: Scalar::F32,
                sums: Scalar::F32,
            };
            let c = product(&gpu, asked, dtypes);
            let units = &gpu.tier().matrix_units;
            assert!(
                units.contains(&full) || !ran(&gpu, "matmul_cooperative"),
                "{dtypes:?}"
            );
            assert_close("not f16", &c, &expected());
        }
    }
}

#[test]
fn a_kernel_that_does_not_compile_gives_way() {
    for file in ["matmul_cooperative", "matmul_rows", "matmul_tile"] {
        let gpu = watched();
        gpu.break_kernels(file);
        let mut variants = vec![None, Some(Variant::Tile(4))];
        variants.extend(shapes().first().map(|&s| Some(Variant::Cooperative(s))));
        for variant in variants {
            let c = product(
                &gpu,
                variant,
                [if gpu.tier().f16 {
                    DType::F16
                } else {
                    DType::F32
                }; 2],
            );
            gpu.check()
                .unwrap_or_else(|e| panic!("{file} {variant:?}: {e}"));
            assert_close(&format!("{file} {variant:?}"), &c, &expected());
            assert!(!ran(&gpu, file), "{file} {variant:?}");
        }
    }
    // Where nothing is left, the error says what did not compile.
    let gpu = watched();
    for file in ["matmul_cooperative", "matmul_rows", "matmul_tile"] {
        gpu.break_kernels(file);
    }
    product(&gpu, None, [DType::F32; 2]);
    let error = gpu.check().expect_err("no kernel compiles").to_string();
    assert!(error.contains("matmul_"), "{error}");
}
