use lavender_wgpu::gpu::{Gpu, GpuOptions};
use lavender_wgpu::ops::attention::{
    AttentionMask, AttentionShape, Division, Forward, attention_backward_with, attention_with,
};
use lavender_wgpu::ops::attention_tap::attention_mean_probs;
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

/// Plain and grouped heads, each mask, tiles missed by one, single queries and keys. Only four head
/// dimensions, since each is a set of kernels to compile: 8, one that is no multiple of 4, one past
/// a 32-wide chunk, and one past the 32 vec4 that are unrolled at once.
const SPECS: [Spec; 9] = [
    (1, 1, 1, 1, 1, 8, false, 0, false),
    (2, 5, 7, 2, 2, 10, false, 0, false),
    (1, 33, 33, 4, 2, 8, true, 0, false),
    (2, 17, 29, 3, 1, 10, true, 12, true),
    (1, 65, 9, 1, 1, 36, false, 0, true),
    (1, 3, 67, 2, 1, 8, true, 64, false),
    (1, 1, 35, 6, 2, 10, true, 34, false),
    (2, 9, 5, 2, 2, 132, false, 0, true),
    (2, 40, 6, 2, 1, 8, true, 2, true),
];

/// The cases of a dtype: f16 differs in storage only, so it takes the small heads.
pub fn specs(dtype: DType) -> impl Iterator<Item = Spec> {
    let most = if dtype == DType::F16 { 10 } else { 256 };
    SPECS.into_iter().filter(move |spec| spec.5 <= most)
}

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

    /// For each row of the probabilities: its first element in q and in out.
    fn query_at(&self, row: usize) -> usize {
        let (b, h) = (
            row / self.queries / self.heads,
            row / self.queries % self.heads,
        );
        ((b * self.queries + row % self.queries) * self.heads + h) * self.head_dim
    }

    /// For each row of the probabilities and key: its first element in k and in v.
    fn key_at(&self, row: usize, s: usize) -> usize {
        let (b, h) = (
            row / self.queries / self.heads,
            row / self.queries % self.heads,
        );
        ((b * self.keys + s) * self.kv_heads + h * self.kv_heads / self.heads) * self.head_dim
    }

    /// Output [B, T, H·D].
    pub fn out(&self, probs: &[f64], v: &[f64]) -> Vec<f64> {
        let mut out = vec![0.0; self.q_shape().iter().product()];
        for (row, p) in probs.chunks(self.keys).enumerate() {
            let to = self.query_at(row);
            for (s, p) in p.iter().enumerate() {
                let from = self.key_at(row, s);
                (0..self.head_dim).for_each(|i| out[to + i] += p * v[from + i]);
            }
        }
        out
    }

    /// dq, dk and dv of Σ dout·out + Σ dprobs·probs, with dprobs [B, H, T, S].
    pub fn gradients(
        &self,
        [q, k, v]: [&[f64]; 3],
        dout: &[f64],
        dprobs: Option<&[f64]>,
    ) -> [Vec<f64>; 3] {
        let d = self.head_dim;
        let probs = self.probs(q, k).0;
        let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
        for (row, p) in probs.chunks(self.keys).enumerate() {
            let q_at = self.query_at(row);
            let dp: Vec<f64> = (0..self.keys)
                .map(|s| {
                    let tapped = dprobs.map_or(0.0, |dprobs| dprobs[row * self.keys + s]);
                    dot(&dout[q_at..][..d], &v[self.key_at(row, s)..][..d]) + tapped
                })
                .collect();
            let mean = dot(p, &dp);
            for s in 0..self.keys {
                let k_at = self.key_at(row, s);
                let ds = p[s] * (dp[s] - mean) * f64::from(self.shape().scale);
                for i in 0..d {
                    dq[q_at + i] += ds * k[k_at + i];
                    dk[k_at + i] += ds * q[q_at + i];
                    dv[k_at + i] += p[s] * dout[q_at + i];
                }
            }
        }
        [dq, dk, dv]
    }
}

#[test]
fn the_reference_gradients_are_those_of_finite_differences() {
    let mut rng = rng(19);
    let case = Case::new((2, 3, 4, 4, 2, 3, true, 1, true), &mut rng);
    let mut draw =
        |n: usize| -> Vec<f64> { uniform(&mut rng, n).iter().map(|&v| f64::from(v)).collect() };
    let count = |shape: [usize; 3]| shape.iter().product::<usize>();
    let (q, dout) = (draw(count(case.q_shape())), draw(count(case.q_shape())));
    let (k, v) = (draw(count(case.kv_shape())), draw(count(case.kv_shape())));
    let dprobs = draw(2 * 4 * 3 * 4);
    let loss = |q: &[f64], k: &[f64], v: &[f64]| {
        let probs = case.probs(q, k).0;
        dot(&case.out(&probs, v), &dout) + dot(&probs, &dprobs)
    };
    let [dq, dk, dv] = case.gradients([&q, &k, &v], &dout, Some(&dprobs));
    for (found, expected) in [
        (dq, numeric_gradient(&q, |q| loss(q, &k, &v))),
        (dk, numeric_gradient(&k, |k| loss(&q, k, &v))),
        (dv, numeric_gradient(&v, |v| loss(&q, &k, v))),
    ] {
        let found: Vec<f32> = found.iter().map(|&x| x as f32).collect();
        assert!(nmse(&found, &expected) < 1e-12);
    }
}

#[test]
fn lanes_forward_matches_f64() {
    forward_matches_f64(Division::Lanes);
}

#[test]
fn tiles_forward_matches_f64() {
    forward_matches_f64(Division::Tiles);
}

#[test]
fn lanes_gradients_match_f64() {
    gradients_match_f64(Division::Lanes);
}

#[test]
fn tiles_gradients_match_f64() {
    gradients_match_f64(Division::Tiles);
}

fn forward_matches_f64(division: Division) {
    let mut rng = rng(20);
    for dtype in float_types() {
        for spec in specs(dtype) {
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
            let (out, lse) = attention_with(&q, &k, &v, case.shape(), &case.mask(), Some(division));
            let (probs, lse64) = case.probs(&q64, &k64);
            let what = format!("{division:?} {dtype:?} {spec:?}");
            assert_close(&what, &out, &case.out(&probs, &v64));
            assert_eq!(lse.shape(), [case.batch, case.heads, case.queries]);
            for (found, expected) in lse.to_f32().expect("readable").iter().zip(&lse64) {
                let close = (f64::from(*found) - expected).abs() < 1e-4 * (1.0 + expected.abs());
                let nothing = expected.is_infinite() && f64::from(*found) < NOTHING;
                assert!(
                    close || nothing,
                    "{what}: log-sum-exp {found}, expected {expected}"
                );
            }
        }
    }
}

fn gradients_match_f64(division: Division) {
    let mut rng = rng(21);
    for dtype in float_types() {
        for spec in specs(dtype) {
            let case = Case::new(spec, &mut rng);
            let mut draw = |shape: [usize; 3]| {
                upload(&uniform(&mut rng, shape.iter().product()), dtype, &shape)
            };
            let (q, q64) = draw(case.q_shape());
            let (k, k64) = draw(case.kv_shape());
            let (v, v64) = draw(case.kv_shape());
            let (dout, dout64) = draw(case.q_shape());
            let (shape, mask) = (case.shape(), case.mask());
            let (out, lse) = attention_with(&q, &k, &v, shape, &mask, Some(division));
            let forward = Forward {
                q: &q,
                k: &k,
                v: &v,
                out: &out,
                lse: &lse,
            };
            let (dq, dk, dv) =
                attention_backward_with(forward, Some(&dout), &[], shape, &mask, Some(division));
            let [dq64, dk64, dv64] = case.gradients([&q64, &k64, &v64], &dout64, None);
            let what = format!("{division:?} {dtype:?} {spec:?}");
            // With a single key the scores have no gradient: no norm to compare with.
            if case.keys > 1 {
                assert_close(&format!("dq {what}"), &dq, &dq64);
                assert_close(&format!("dk {what}"), &dk, &dk64);
            }
            assert_close(&format!("dv {what}"), &dv, &dv64);
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
        let (out, lse) = attention_with(&q, &k, &k, shape, &mask, Some(division));
        let forward = Forward {
            q: &q,
            k: &k,
            v: &k,
            out: &out,
            lse: &lse,
        };
        let (dq, dk, dv) =
            attention_backward_with(forward, Some(&q), &[], shape, &mask, Some(division));
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

/// Long keys are laid out head by head first; the other division reads them where they are.
#[test]
fn long_keys_give_the_same_in_both_divisions() {
    let mut rng = rng(77);
    let (batch, queries, keys, heads, kv_heads, head_dim) = (2, 20, 1400, 4, 2, 52);
    let mut random = |tokens: usize, heads: usize| {
        let shape = [batch, tokens, heads * head_dim];
        upload(
            &uniform(&mut rng, shape.iter().product()),
            DType::F32,
            &shape,
        )
        .0
    };
    let (q, k, v) = (
        random(queries, heads),
        random(keys, kv_heads),
        random(keys, kv_heads),
    );
    let shape = AttentionShape {
        heads,
        kv_heads,
        scale: 0.5,
    };
    let run =
        |division| attention_with(&q, &k, &v, shape, &AttentionMask::default(), Some(division));
    let ((lanes, lanes_lse), (tiles, tiles_lse)) = (run(Division::Lanes), run(Division::Tiles));
    for (lanes, tiles) in [(lanes, tiles), (lanes_lse, tiles_lse)] {
        let expected: Vec<f64> = tiles.to_f32().unwrap().iter().map(|&v| v.into()).collect();
        assert_close("long keys", &lanes, &expected);
    }
}

/// Without subgroups each thread loads what it needs itself.
#[test]
fn a_portable_adapter_gives_the_same_output_gradients_and_averages() {
    let portable = Gpu::new(&GpuOptions {
        portable: true,
        checked: true,
        ..GpuOptions::default()
    })
    .expect("an adapter");
    assert!(!portable.tier().subgroup);
    let mut rng = rng(78);
    for head_dim in [12, 132] {
        let [queries, keys] = [[1, 41, 2 * head_dim], [1, 38, 2 * head_dim]];
        let drawn = [queries, keys, keys, queries].map(|shape: [usize; 3]| {
            let values = uniform(&mut rng, shape.iter().product());
            (values, shape)
        });
        let run = |gpu: &Gpu| {
            let [q, k, v, dout] = drawn
                .each_ref()
                .map(|(values, shape)| Tensor::from_f32(gpu, values, shape));
            let shape = AttentionShape {
                heads: 2,
                kv_heads: 2,
                scale: 0.5,
            };
            let (mask, lanes) = (AttentionMask::causal(), Some(Division::Lanes));
            let (out, lse) = attention_with(&q, &k, &v, shape, &mask, lanes);
            let forward = Forward {
                q: &q,
                k: &k,
                v: &v,
                out: &out,
                lse: &lse,
            };
            let (dq, dk, dv) =
                attention_backward_with(forward, Some(&dout), &[], shape, &mask, lanes);
            let mean = attention_mean_probs(&q, &k, &lse, shape, &mask);
            [out, dq, dk, dv, mean]
        };
        for (ours, portable) in run(gpu()).iter().zip(&run(&portable)) {
            let expected = ours.to_f32().expect("readable");
            let expected: Vec<f64> = expected.iter().map(|&v| v.into()).collect();
            assert_close("portable", portable, &expected);
        }
    }
}
