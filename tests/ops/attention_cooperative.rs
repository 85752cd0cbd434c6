//! Attention on matrix units, where the adapter lists them (software ones list 8×8), and what it leaves to the tiles.

use lavender_wgpu::gpu::{Gpu, GpuOptions, MatrixUnit, Scalar};
use lavender_wgpu::ops::attention::{
    AttentionMask, AttentionShape, Division, Forward, attention_backward_with, attention_with,
};
use lavender_wgpu::tensor::{DType, Tensor};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::attention::Case;
use crate::support::*;

/// The sides of f16 matrices that this adapter sums in f32.
fn sides() -> Vec<u32> {
    let unit = |&size: &u32| MatrixUnit {
        size,
        operands: Scalar::F16,
        sums: Scalar::F32,
    };
    let mut sides = vec![8, 16];
    sides.retain(|size| gpu().tier().matrix_units.contains(&unit(size)));
    sides
}

/// Tokens around the sides of matrices and tiles, each mask, plain and grouped heads.
fn random_case(head_dim: usize, rng: &mut ChaCha8Rng) -> Case {
    let mut pick = |of: &[usize]| of[rng.random_range(0..of.len())];
    let (heads, kv_heads) = [(1, 1), (2, 2), (4, 2), (3, 1)][pick(&[0, 1, 2, 3])];
    let causal = pick(&[0, 1]) == 1;
    let spec = (
        pick(&[1, 2]),
        pick(&[1, 7, 16, 33, 64, 70]),
        pick(&[2, 9, 32, 33, 77, 96]),
        heads,
        kv_heads,
        head_dim,
        causal,
        if causal { pick(&[0, 5, 40]) } else { 0 },
        pick(&[0, 1]) == 1,
    );
    Case::new(spec, rng)
}

fn check(case: &Case, size: u32, backward: bool, rng: &mut ChaCha8Rng) {
    let mut draw = |shape: [usize; 3]| {
        let values = uniform(rng, shape.iter().product());
        let values: Vec<f32> = values.iter().map(|v| 2.0 * v).collect();
        upload(&values, DType::F16, &shape)
    };
    let (q, q64) = draw(case.q_shape());
    let (k, k64) = draw(case.kv_shape());
    let (v, v64) = draw(case.kv_shape());
    let (dout, dout64) = draw(case.q_shape());
    let (shape, mask) = (case.shape(), case.mask());
    let division = Some(Division::Cooperative(size));
    let (out, lse) = attention_with(&q, &k, &v, shape, &mask, division);
    let (probs, lse64) = case.probs(&q64, &k64);
    let what = format!(
        "{size}, {} × {} tokens, {} on {} heads of {}, causal {} {}, bits {}",
        case.queries,
        case.keys,
        case.heads,
        case.kv_heads,
        case.head_dim,
        case.causal,
        case.query_offset,
        case.bits.is_some()
    );
    // Weights rounded to f16 add an NMSE of about 1e-7 to that of f16 results.
    assert_close(&format!("out {what}"), &out, &case.out(&probs, &v64));
    for (found, expected) in lse.to_f32().unwrap().iter().zip(&lse64) {
        let found = f64::from(*found);
        let close = (found - expected).abs() < 1e-4 * (1.0 + expected.abs());
        assert!(
            close || expected.is_infinite() && found < -1e29,
            "{what}: log-sum-exp {found}, expected {expected}"
        );
    }
    if !backward {
        return;
    }
    let forward = Forward {
        q: &q,
        k: &k,
        v: &v,
        out: &out,
        lse: &lse,
    };
    let (dq, dk, dv) = attention_backward_with(forward, Some(&dout), &[], shape, &mask, division);
    let expected = case.gradients([&q64, &k64, &v64], &dout64, None);
    for (name, (found, expected)) in ["dq", "dk", "dv"]
        .iter()
        .zip([dq, dk, dv].iter().zip(&expected))
    {
        // Where each row sees one key at most, scores have no gradient: no norm to compare with.
        if expected.iter().map(|x| x * x).sum::<f64>() > 1e-3 {
            assert_close(&format!("{name} {what}"), found, expected);
        }
    }
}

/// Heads that fill their last matrix, and not; each is kernels that a software driver compiles for a while.
#[test]
fn random_shapes_match_f64() {
    let mut rng = rng(211);
    for size in sides() {
        for (head_dim, backward) in [(20, true)] {
            for _ in 0..16 {
                check(&random_case(head_dim, &mut rng), size, backward, &mut rng);
            }
        }
    }
}

#[test]
fn what_units_cannot_do_is_left_to_the_tiles() {
    let gpu = Gpu::new(&GpuOptions {
        checked: true,
        profile: true,
        ..GpuOptions::default()
    })
    .expect("an adapter");
    if !gpu.tier().timestamps {
        return;
    }
    let shape = AttentionShape {
        heads: 1,
        kv_heads: 1,
        scale: 0.5,
    };
    for size in sides() {
        for (dtype, head_dim, on_units) in [
            (DType::F16, 8, true),
            (DType::F32, 8, false),
            (DType::F16, 10, false),
            (DType::F16, 164, false),
        ] {
            let q = Tensor::zeros(&gpu, dtype, &[1, 3, head_dim]);
            let (mask, asked) = (AttentionMask::default(), Some(Division::Cooperative(size)));
            attention_with(&q, &q, &q, shape, &mask, asked);
            let ran = gpu.profile();
            assert_eq!(
                ran.iter()
                    .any(|time| time.op.starts_with("attention_lse_cooperative")),
                on_units,
                "{dtype:?} {head_dim}"
            );
            assert!(ran.len() == if on_units { 2 } else { 1 }, "{head_dim}");
        }
        // One whose kernel does not compile.
        gpu.break_kernels("attention_cooperative");
        let q = Tensor::zeros(&gpu, DType::F16, &[1, 3, 12]);
        let (mask, asked) = (AttentionMask::default(), Some(Division::Cooperative(size)));
        attention_with(&q, &q, &q, shape, &mask, asked);
        // 12 channels are two matrices of 8 as 8 are, but another kernel.
        assert!(
            gpu.profile()
                .iter()
                .all(|time| !time.op.contains("cooperative"))
        );
        gpu.check().expect("the tiles took over");
    }
}
