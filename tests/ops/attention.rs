use lavender_wgpu::ops::attention::{
    AttentionMask, AttentionShape, Division, Forward, attention_backward_with, attention_with,
};
use lavender_wgpu::tensor::{DType, Tensor};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::support::*;

/// A log-sum-exp at or below this is of a row that sees no key.
const NOTHING: f64 = -1e29;

/// One attention on the CPU in f64, with random inputs.
pub struct Case {
    pub batch: usize,
    pub queries: usize,
    pub keys: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub causal: bool,
    pub query_offset: usize,
    pub bits: Option<(Vec<u32>, Vec<u32>)>,
}

/// (batch, queries, keys, heads, kv_heads, head_dim, causal, query_offset, bits)
type Spec = (usize, usize, usize, usize, usize, usize, bool, usize, bool);

/// Head dimensions that are and are not a multiple of 4, grouped and plain heads, each mask, tiles
/// missed by one, single queries and keys.
pub const SPECS: [Spec; 9] = [
    (1, 1, 1, 1, 1, 8, false, 0, false),
    (2, 5, 7, 2, 2, 10, false, 0, false),
    (1, 33, 33, 4, 2, 16, true, 0, false),
    (2, 17, 29, 3, 1, 20, true, 12, true),
    (1, 65, 9, 1, 1, 40, false, 0, true),
    (1, 3, 67, 2, 1, 72, true, 64, false),
    (1, 1, 35, 6, 2, 64, true, 34, false),
    (2, 9, 5, 1, 1, 160, false, 0, true),
    (1, 4, 6, 1, 1, 256, true, 2, false),
];

impl Case {
    pub fn new(spec: Spec, rng: &mut ChaCha8Rng) -> Case {
        let (batch, queries, keys, heads, kv_heads, head_dim, causal, query_offset, bits) = spec;
        let mut draw = |n: usize| {
            (0..n)
                .map(|_| rng.random_range(0..8u32))
                .collect::<Vec<_>>()
        };
        Case {
            batch,
            queries,
            keys,
            heads,
            kv_heads,
            head_dim,
            causal,
            query_offset,
            bits: bits.then(|| (draw(batch * queries), draw(batch * keys))),
        }
    }

    pub fn shape(&self) -> AttentionShape {
        AttentionShape {
            heads: self.heads,
            kv_heads: self.kv_heads,
            scale: 1.5 / (self.head_dim as f32).sqrt(),
        }
    }

    pub fn mask(&self) -> AttentionMask {
        let bits = |values: &[u32]| {
            Tensor::from_u32(gpu(), values, &[self.batch, values.len() / self.batch])
        };
        AttentionMask {
            causal: self.causal,
            query_offset: self.query_offset,
            query_bits: self.bits.as_ref().map(|b| bits(&b.0)),
            key_bits: self.bits.as_ref().map(|b| bits(&b.1)),
        }
    }

    pub fn q_shape(&self) -> [usize; 3] {
        [self.batch, self.queries, self.heads * self.head_dim]
    }

    pub fn kv_shape(&self) -> [usize; 3] {
        [self.batch, self.keys, self.kv_heads * self.head_dim]
    }

    fn seen(&self, b: usize, t: usize, s: usize) -> bool {
        let place = !self.causal || s <= t + self.query_offset;
        let bits =
            |(q, k): &(Vec<u32>, Vec<u32>)| q[b * self.queries + t] & k[b * self.keys + s] != 0;
        place && self.bits.as_ref().is_none_or(bits)
    }

    /// Probabilities [B, H, T, S] and log-sum-exps [B, H, T].
    pub fn probs(&self, q: &[f64], k: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let d = self.head_dim;
        let (mut probs, mut lse) = (vec![], vec![]);
        for b in 0..self.batch {
            for h in 0..self.heads {
                for t in 0..self.queries {
                    let q = &q[((b * self.queries + t) * self.heads + h) * d..][..d];
                    let kv_head = h * self.kv_heads / self.heads;
                    let scores: Vec<Option<f64>> = (0..self.keys)
                        .map(|s| {
                            let k = &k[((b * self.keys + s) * self.kv_heads + kv_head) * d..][..d];
                            self.seen(b, t, s)
                                .then(|| dot(q, k) * f64::from(self.shape().scale))
                        })
                        .collect();
                    let sum: f64 = scores.iter().flatten().map(|s| s.exp()).sum();
                    lse.push(if sum > 0.0 {
                        sum.ln()
                    } else {
                        f64::NEG_INFINITY
                    });
                    probs.extend(scores.iter().map(|s| s.map_or(0.0, |s| s.exp() / sum)));
                }
            }
        }
        (probs, lse)
    }

    /// Output [B, T, H·D].
    pub fn out(&self, probs: &[f64], v: &[f64]) -> Vec<f64> {
        let d = self.head_dim;
        let mut out = vec![0.0; self.q_shape().iter().product()];
        for (row, p) in probs.chunks(self.keys).enumerate() {
            let (b, h, t) = (
                row / self.queries / self.heads,
                row / self.queries % self.heads,
                row % self.queries,
            );
            let to = ((b * self.queries + t) * self.heads + h) * d;
            for (s, p) in p.iter().enumerate() {
                let kv_head = h * self.kv_heads / self.heads;
                let from = ((b * self.keys + s) * self.kv_heads + kv_head) * d;
                (0..d).for_each(|i| out[to + i] += p * v[from + i]);
            }
        }
        out
    }
}

#[test]
fn forward_matches_f64() {
    for division in [Division::Lanes, Division::Tiles] {
        let mut rng = rng(20);
        for dtype in float_types() {
            for spec in SPECS {
                let case = Case::new(spec, &mut rng);
                let mut draw = |shape: [usize; 3]| {
                    let values = uniform(&mut rng, shape.iter().product());
                    upload(
                        &values.iter().map(|v| 2.0 * v).collect::<Vec<_>>(),
                        dtype,
                        &shape,
                    )
                };
                let (q, q64) = draw(case.q_shape());
                let (k, k64) = draw(case.kv_shape());
                let (v, v64) = draw(case.kv_shape());
                let (out, lse) = attention_with(&q, &k, &v, case.shape(), &case.mask(), division);
                let (probs, lse64) = case.probs(&q64, &k64);
                let what = format!("{division:?} {dtype:?} {spec:?}");
                assert_close(&what, &out, &case.out(&probs, &v64));
                assert_eq!(lse.shape(), [case.batch, case.heads, case.queries]);
                for (found, expected) in lse.to_f32().expect("readable").iter().zip(&lse64) {
                    let close =
                        (f64::from(*found) - expected).abs() < 1e-4 * (1.0 + expected.abs());
                    let nothing = expected.is_infinite() && f64::from(*found) < NOTHING;
                    assert!(
                        close || nothing,
                        "{what}: log-sum-exp {found}, expected {expected}"
                    );
                }
            }
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    for division in [Division::Lanes, Division::Tiles] {
        let mut rng = rng(21);
        for dtype in float_types() {
            for spec in SPECS {
                let case = Case::new(spec, &mut rng);
                let mut draw = |shape: [usize; 3]| {
                    upload(&uniform(&mut rng, shape.iter().product()), dtype, &shape)
                };
                let (q, q64) = draw(case.q_shape());
                let (k, k64) = draw(case.kv_shape());
                let (v, v64) = draw(case.kv_shape());
                let (dout, dout64) = draw(case.q_shape());
                let (shape, mask) = (case.shape(), case.mask());
                let (out, lse) = attention_with(&q, &k, &v, shape, &mask, division);
                let forward = Forward {
                    q: &q,
                    k: &k,
                    v: &v,
                    out: &out,
                    lse: &lse,
                };
                let (dq, dk, dv) =
                    attention_backward_with(forward, Some(&dout), &[], shape, &mask, division);
                let loss = |q: &[f64], k: &[f64], v: &[f64]| {
                    dot(&case.out(&case.probs(q, k).0, v), &dout64)
                };
                let what = format!("{division:?} {dtype:?} {spec:?}");
                if case.keys > 1 {
                    let expected = numeric_gradient(&q64, |q| loss(q, &k64, &v64));
                    assert_close(&format!("dq {what}"), &dq, &expected);
                    let expected = numeric_gradient(&k64, |k| loss(&q64, k, &v64));
                    assert_close(&format!("dk {what}"), &dk, &expected);
                }
                let expected = numeric_gradient(&v64, |v| loss(&q64, &k64, v));
                assert_close(&format!("dv {what}"), &dv, &expected);
            }
        }
    }
}

#[test]
fn rows_that_see_nothing_give_zeros_and_no_gradient() {
    let mut rng = rng(22);
    for division in [Division::Lanes, Division::Tiles] {
        let shape = AttentionShape {
            heads: 1,
            kv_heads: 1,
            scale: 0.5,
        };
        let (q, _) = upload(&uniform(&mut rng, 3 * 8), DType::F32, &[1, 3, 8]);
        let (k, _) = upload(&uniform(&mut rng, 5 * 8), DType::F32, &[1, 5, 8]);
        let mask = AttentionMask {
            query_bits: Some(Tensor::from_u32(gpu(), &[1, 0, 2], &[1, 3])),
            key_bits: Some(Tensor::from_u32(gpu(), &[1, 1, 0, 1, 1], &[1, 5])),
            ..AttentionMask::default()
        };
        let (out, lse) = attention_with(&q, &k, &k, shape, &mask, division);
        let forward = Forward {
            q: &q,
            k: &k,
            v: &k,
            out: &out,
            lse: &lse,
        };
        let (dq, dk, dv) = attention_backward_with(forward, Some(&q), &[], shape, &mask, division);
        let values = |t: &Tensor| t.to_f32().expect("readable");
        for zeros in [
            &values(&out)[8..],
            &values(&dq)[8..],
            &values(&dk)[16..24],
            &values(&dv)[16..24],
        ] {
            assert!(zeros.iter().all(|&x| x == 0.0), "{division:?}: {zeros:?}");
        }
        assert!(values(&out)[..8].iter().all(|&x| x != 0.0));
        assert!(values(&lse)[1..].iter().all(|&x| f64::from(x) < NOTHING));
    }
}
