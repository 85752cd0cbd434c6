use lavender_wgpu::ops::attention::{Division, Forward, attention_backward_with, attention_with};
use lavender_wgpu::ops::attention_tap::{AttentionTap, attention_mean_probs, attention_tap};
use lavender_wgpu::tensor::{DType, Tensor};
use rand::RngExt;

use super::attention::{Case, SPECS};
use crate::support::*;

/// Values of the tap [rows, H, columns] picked from all probabilities [B, H, T, S].
fn pick(case: &Case, probs: &[f64], rows: &[u32], columns: &[u32]) -> Vec<f64> {
    let count = columns.len() / case.batch;
    let mut picked = vec![];
    for &row in rows {
        let (b, t) = (row as usize / case.queries, row as usize % case.queries);
        for h in 0..case.heads {
            for c in 0..count {
                picked.push(match b < case.batch {
                    true => match columns[b * count + c] as usize {
                        s if s < case.keys => {
                            probs[((b * case.heads + h) * case.queries + t) * case.keys + s]
                        }
                        _ => 0.0,
                    },
                    false => 0.0,
                });
            }
        }
    }
    picked
}

#[test]
fn taps_and_their_gradients_match_f64() {
    let mut rng = rng(23);
    for dtype in float_types() {
        for (i, spec) in SPECS.into_iter().enumerate().skip(1) {
            let case = Case::new(spec, &mut rng);
            let mut draw = |shape: [usize; 3]| {
                upload(&uniform(&mut rng, shape.iter().product()), dtype, &shape)
            };
            let (q, q64) = draw(case.q_shape());
            let (k, k64) = draw(case.kv_shape());
            let (v, v64) = draw(case.kv_shape());
            let (dout, dout64) = draw(case.q_shape());
            let (shape, mask) = (case.shape(), case.mask());

            // Repeated rows and columns, and one of each past the end.
            let places = (case.batch * case.queries) as u32;
            let mut rows: Vec<u32> = (0..4 + i).map(|_| rng.random_range(0..places)).collect();
            rows.extend([rows[0], places + 3]);
            let count = 3 + 2 * i;
            let mut columns: Vec<u32> = (0..case.batch * count)
                .map(|_| rng.random_range(0..case.keys as u32))
                .collect();
            columns[1] = columns[0];
            columns[2] = u32::MAX;
            let tap = AttentionTap {
                query_rows: Tensor::from_u32(gpu(), &rows, &[rows.len()]),
                key_columns: Tensor::from_u32(gpu(), &columns, &[case.batch, count]),
            };
            let (out, lse) = attention_with(&q, &k, &v, shape, &mask, Division::Lanes);
            let probs = attention_tap(&q, &k, &lse, &tap, shape, &mask);
            assert_eq!(probs.shape(), [rows.len(), case.heads, count]);
            let expected = pick(&case, &case.probs(&q64, &k64).0, &rows, &columns);
            // f32 whatever the activations; a tiny probability's error is that of its exponent.
            assert_close(&format!("tap {spec:?}"), &probs, &expected);

            let (dprobs, dprobs64) = upload(
                &uniform(&mut rng, probs.elements()),
                DType::F32,
                probs.shape(),
            );
            for with_out in [true, false] {
                let weight = if with_out { 1.0 } else { 0.0 };
                let loss = |q: &[f64], k: &[f64], v: &[f64]| {
                    let all = case.probs(q, k).0;
                    weight * dot(&case.out(&all, v), &dout64)
                        + dot(&pick(&case, &all, &rows, &columns), &dprobs64)
                };
                for division in [Division::Lanes, Division::Tiles] {
                    let forward = Forward {
                        q: &q,
                        k: &k,
                        v: &v,
                        out: &out,
                        lse: &lse,
                    };
                    let (dq, dk, _) = attention_backward_with(
                        forward,
                        with_out.then_some(&dout),
                        &[(&tap, &probs, &dprobs)],
                        shape,
                        &mask,
                        division,
                    );
                    let what = format!("{division:?} {dtype:?} {spec:?}, output {with_out}");
                    let expected = numeric_gradient(&q64, |q| loss(q, &k64, &v64));
                    assert_close(&format!("tap dq {what}"), &dq, &expected);
                    let expected = numeric_gradient(&k64, |k| loss(&q64, k, &v64));
                    assert_close(&format!("tap dk {what}"), &dk, &expected);
                }
            }
        }
    }
}

#[test]
fn mean_probabilities_match_f64() {
    let mut rng = rng(24);
    for dtype in float_types() {
        for spec in SPECS {
            let case = Case::new(spec, &mut rng);
            let mut draw = |shape: [usize; 3]| {
                upload(&uniform(&mut rng, shape.iter().product()), dtype, &shape)
            };
            let (q, q64) = draw(case.q_shape());
            let (k, k64) = draw(case.kv_shape());
            let (shape, mask) = (case.shape(), case.mask());
            let (_, lse) = attention_with(&q, &k, &k, shape, &mask, Division::Lanes);
            let mean = attention_mean_probs(&q, &k, &lse, shape, &mask);
            assert_eq!(mean.shape(), [case.batch, case.queries, case.keys]);
            let pairs = case.queries * case.keys;
            let mut expected = vec![0.0; case.batch * pairs];
            for (i, p) in case.probs(&q64, &k64).0.iter().enumerate() {
                expected[i / (case.heads * pairs) * pairs + i % pairs] += p / case.heads as f64;
            }
            assert_close(&format!("mean {dtype:?} {spec:?}"), &mean, &expected);
        }
    }
}
