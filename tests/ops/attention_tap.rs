use lavender_wgpu::ops::attention::{Forward, attention, attention_backward};
use lavender_wgpu::ops::attention_tap::{AttentionTap, attention_mean_probs, attention_tap};
use lavender_wgpu::tensor::{DType, Tensor};
use rand::RngExt;

use super::attention::{Case, specs};
use crate::support::*;

/// For each element of the tap [rows, H, columns]: its place among all probabilities [B, H, T, S].
fn places(case: &Case, rows: &[u32], columns: &[u32]) -> Vec<Option<usize>> {
    let count = columns.len() / case.batch;
    let mut places = vec![];
    for &row in rows {
        let (b, t) = (row as usize / case.queries, row as usize % case.queries);
        for h in 0..case.heads {
            places.extend((0..count).map(|c| {
                let s = *columns.get(b * count + c)? as usize;
                let row = (b * case.heads + h) * case.queries + t;
                (b < case.batch && s < case.keys).then_some(row * case.keys + s)
            }));
        }
    }
    places
}

/// The tap's gradient, added up where it was read.
fn spread(case: &Case, dprobs: &[f64], rows: &[u32], columns: &[u32]) -> Vec<f64> {
    let mut all = vec![0.0; case.batch * case.heads * case.queries * case.keys];
    for (gradient, place) in dprobs.iter().zip(places(case, rows, columns)) {
        if let Some(place) = place {
            all[place] += gradient;
        }
    }
    all
}

#[test]
fn taps_and_their_gradients_match_f64() {
    let mut rng = rng(23);
    for dtype in float_types() {
        for (i, spec) in specs(dtype).enumerate().skip(1) {
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
            let end = (case.batch * case.queries) as u32;
            let mut rows: Vec<u32> = (0..4 + i).map(|_| rng.random_range(0..end)).collect();
            rows.extend([rows[0], end + 3]);
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
            let (out, lse) = attention(&q, &k, &v, shape, &mask);
            let probs = attention_tap(&q, &k, &lse, &tap, shape, &mask);
            assert_eq!(probs.shape(), [rows.len(), case.heads, count]);
            let all = case.probs(&q64, &k64).0;
            let expected: Vec<f64> = places(&case, &rows, &columns)
                .iter()
                .map(|place| place.map_or(0.0, |i| all[i]))
                .collect();
            // f32 whatever the activations; a tiny probability's error is that of its exponent.
            assert_close(&format!("tap {spec:?}"), &probs, &expected);

            let (dprobs, dprobs64) = upload(
                &uniform(&mut rng, probs.elements()),
                DType::F32,
                probs.shape(),
            );
            let zeros = vec![0.0; dout64.len()];
            for with_out in [true, false] {
                let upstream = if with_out { &dout64 } else { &zeros };
                let spread = spread(&case, &dprobs64, &rows, &columns);
                let [dq64, dk64, _] = case.gradients([&q64, &k64, &v64], upstream, Some(&spread));
                let forward = Forward {
                    q: &q,
                    k: &k,
                    v: &v,
                    out: &out,
                    lse: &lse,
                };
                let tapped = [(&tap, &probs, &dprobs)];
                let dout = with_out.then_some(&dout);
                let (dq, dk, _) = attention_backward(forward, dout, &tapped, shape, &mask);
                let what = format!("{dtype:?} {spec:?}, output {with_out}");
                assert_close(&format!("tap dq {what}"), &dq, &dq64);
                assert_close(&format!("tap dk {what}"), &dk, &dk64);
            }
        }
    }
}

#[test]
fn mean_probabilities_match_f64() {
    let mut rng = rng(24);
    for dtype in float_types() {
        for spec in specs(dtype) {
            let case = Case::new(spec, &mut rng);
            let mut draw = |shape: [usize; 3]| {
                upload(&uniform(&mut rng, shape.iter().product()), dtype, &shape)
            };
            let (q, q64) = draw(case.q_shape());
            let (k, k64) = draw(case.kv_shape());
            let (shape, mask) = (case.shape(), case.mask());
            let (_, lse) = attention(&q, &k, &k, shape, &mask);
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
