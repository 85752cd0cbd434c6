//! Attention on the tape: against PyTorch, taps and their gradients, taps under checkpointing.

use lavender_wgpu::autograd::{
    Gradients, Var, attention, attention_captured, attention_tapped, checkpoint,
};
use lavender_wgpu::ops::attention::{AttentionMask, AttentionShape};
use lavender_wgpu::ops::attention_tap::AttentionTap;
use lavender_wgpu::tensor::Tensor;
use serde_json::Value;

use crate::differences::{check, random};
use crate::pytorch::{Fixture, usizes};
use crate::support::*;

/// A list of lists of integers as u32 [outer, inner].
fn table(value: &Value) -> Option<Tensor> {
    let rows = value.as_array()?;
    let values: Vec<u32> = rows.iter().flat_map(usizes).map(|v| v as u32).collect();
    Some(Tensor::from_u32(
        gpu(),
        &values,
        &[rows.len(), values.len() / rows.len()],
    ))
}

#[test]
fn values_and_gradients_match_pytorch() {
    let mut fixture = Fixture::open();
    let cases: Vec<String> = fixture
        .options
        .as_object()
        .expect("an object")
        .keys()
        .filter(|name| name.starts_with("attention"))
        .cloned()
        .collect();
    assert!(cases.len() >= 9, "{cases:?}");
    for case in cases {
        let options = fixture.options[&case].clone();
        let size = |name: &str| options[name].as_u64().expect("a size") as usize;
        let shape = AttentionShape {
            heads: size("heads"),
            kv_heads: size("kv_heads"),
            scale: options["scale"].as_f64().expect("a scale") as f32,
        };
        let mask = AttentionMask {
            causal: options["causal"].as_bool().unwrap_or(false),
            query_offset: options["offset"].as_u64().unwrap_or(0) as usize,
            query_bits: table(&options["query_bits"]),
            key_bits: table(&options["key_bits"]),
        };
        let tap = table(&options["columns"]).map(|key_columns| {
            let rows: Vec<u32> = usizes(&options["rows"]).iter().map(|&r| r as u32).collect();
            AttentionTap {
                query_rows: Tensor::from_u32(gpu(), &rows, &[rows.len()]),
                key_columns,
            }
        });
        fixture.run_all(&case, &["q", "k", "v"], |x| match &tap {
            None => vec![("out", "w", attention(&x[0], &x[1], &x[2], shape, &mask))],
            Some(tap) => {
                let (out, probs) = attention_tapped(&x[0], &x[1], &x[2], shape, &mask, tap);
                vec![("out", "w", out), ("probs", "w_probs", probs)]
            }
        });
    }
}

fn shape() -> AttentionShape {
    AttentionShape {
        heads: 4,
        kv_heads: 2,
        scale: 0.4,
    }
}

/// Rows of both samples, one of them twice, and other columns in each sample.
fn tap() -> AttentionTap {
    AttentionTap {
        query_rows: Tensor::from_u32(gpu(), &[2, 4, 7, 7], &[4]),
        key_columns: Tensor::from_u32(gpu(), &[0, 2, 1, 3, 0, 2], &[2, 3]),
    }
}

#[test]
fn tapped_attention_matches_finite_differences() {
    let leaves = [
        random(1, &[2, 4, 32]),
        random(2, &[2, 4, 16]),
        random(3, &[2, 4, 16]),
    ];
    let both = |v: &[Var]| {
        attention_tapped(
            &v[0],
            &v[1],
            &v[2],
            shape(),
            &AttentionMask::causal(),
            &tap(),
        )
    };
    check("attention", &leaves, |v| {
        attention(&v[0], &v[1], &v[2], shape(), &AttentionMask::default()).square()
    });
    check("probabilities alone", &leaves[..2], |v| {
        let values = Var::constant(v[1].value().clone());
        attention_tapped(
            &v[0],
            &v[1],
            &values,
            shape(),
            &AttentionMask::causal(),
            &tap(),
        )
        .1
        .square()
    });
    check("output and probabilities", &leaves, |v| {
        let (out, probs) = both(v);
        let (n, m) = (out.value().elements(), probs.value().elements());
        Var::concat(&[out.reshape(&[n]), probs.reshape(&[m])], 0).square()
    });
}

#[test]
fn captured_means_agree_with_taps_of_every_pair() {
    let mut rng = rng(4);
    let (b, t, s) = (2, 4, 5);
    let q = Var::constant(Tensor::from_f32(
        gpu(),
        &uniform(&mut rng, b * t * 32),
        &[b, t, 32],
    ));
    let k = Var::constant(Tensor::from_f32(
        gpu(),
        &uniform(&mut rng, b * s * 16),
        &[b, s, 16],
    ));
    let v = Var::constant(Tensor::from_f32(
        gpu(),
        &uniform(&mut rng, b * s * 16),
        &[b, s, 16],
    ));
    let rows: Vec<u32> = (0..(b * t) as u32).collect();
    let columns: Vec<u32> = (0..b).flat_map(|_| 0..s as u32).collect();
    let every = AttentionTap {
        query_rows: Tensor::from_u32(gpu(), &rows, &[b * t]),
        key_columns: Tensor::from_u32(gpu(), &columns, &[b, s]),
    };
    let mask = AttentionMask::default();
    let (out, probs) = attention_tapped(&q, &k, &v, shape(), &mask, &every);
    let (captured_out, means) = attention_captured(&q, &k, &v, shape(), &mask);
    assert_eq!(means.shape(), [b, t, s]);
    assert_close("out", captured_out.value(), &to_f64(out.value()));
    assert_close("means", &means, &to_f64(probs.mean(&[1], false).value()));
    // Every row of every head sums to one.
    let sums = probs.sum(&[2], false).value().to_f32().expect("readable");
    assert!(sums.iter().all(|s| (s - 1.0).abs() < 1e-5), "{sums:?}");
}

fn to_f64(t: &Tensor) -> Vec<f64> {
    t.to_f32()
        .expect("readable")
        .into_iter()
        .map(f64::from)
        .collect()
}

#[test]
fn taps_under_checkpointing_keep_their_gradients_bit_for_bit() {
    let run = |checkpointed: bool| -> Vec<Vec<u32>> {
        let mut rng = rng(5);
        let mut leaf = |shape: &[usize]| {
            let n = shape.iter().product();
            Var::parameter(Tensor::from_f32(gpu(), &uniform(&mut rng, n), shape))
        };
        let (x, wq, wk) = (leaf(&[2, 4, 12]), leaf(&[32, 12]), leaf(&[16, 12]));
        let (q_weight, k_weight) = (wq.clone(), wk.clone());
        let f = move |inputs: &[Var]| {
            let (q, k) = (
                inputs[0].linear(&q_weight, None),
                inputs[0].linear(&k_weight, None),
            );
            let (out, probs) =
                attention_tapped(&q, &k, &k, shape(), &AttentionMask::causal(), &tap());
            vec![out, probs]
        };
        let inputs = std::slice::from_ref(&x);
        let y = if checkpointed {
            checkpoint(inputs, f)
        } else {
            f(inputs)
        };
        let loss = y[0].square().mean_all().add(&y[1].silu().sum_all());
        let grads = loss.backward();
        [&x, &wq, &wk].map(|leaf| bits(&grads, leaf)).to_vec()
    };
    assert_eq!(run(false), run(true));
}

fn bits(grads: &Gradients, leaf: &Var) -> Vec<u32> {
    let grad = grads.get(leaf).expect("a gradient");
    grad.to_f32()
        .expect("readable")
        .iter()
        .map(|v| v.to_bits())
        .collect()
}
