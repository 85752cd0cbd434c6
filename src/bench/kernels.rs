//! Every hot op at the shapes that the models have.

use serde::{Deserialize, Serialize};

use super::{Peak, Timing, time};
use crate::error::Result;
use crate::gpu::{Gpu, Tier};
use crate::ops::adamw::{AdamW, adamw};
use crate::ops::attention::{
    AttentionMask, AttentionShape, Forward, attention, attention_backward,
};
use crate::ops::binary::{Binary, binary};
use crate::ops::conv2d::{Conv2dOptions, conv2d, conv2d_grad_input, conv2d_grad_weight};
use crate::ops::cross_entropy::{cross_entropy, cross_entropy_backward};
use crate::ops::group_norm::{GroupNorm, group_norm, group_norm_backward};
use crate::ops::layer_norm::{layer_norm, layer_norm_backward};
use crate::ops::linear_cross_entropy::linear_cross_entropy;
use crate::ops::matmul::{MatmulOptions, matmul, matmul_quantized};
use crate::ops::rms_norm::{rms_norm, rms_norm_backward};
use crate::ops::rotary::rotary;
use crate::ops::softmax::softmax;
use crate::ops::swiglu::{swiglu, swiglu_backward};
use crate::ops::unary::{Unary, unary};
use crate::tensor::{DType, Quantization, QuantizedMatrix, Tensor};

/// An op's time at one shape.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KernelTime {
    /// Op and shape.
    pub name: String,
    /// How long.
    #[serde(flatten)]
    pub timing: Timing,
    /// Floating-point operations a second, 10⁹.
    pub gflops: f64,
    /// Bytes of operands and results, each counted once, a second, 10⁹.
    pub gbs: f64,
    /// Of the adapter's peak: of multiply-adds for products, of copies for the rest.
    pub share: f64,
    /// PyTorch statements that do the same: set-up, and what is timed.
    pub pytorch: Option<[String; 2]>,
}

/// What bounds an op.
#[derive(Clone, Copy, PartialEq)]
enum Bound {
    Compute,
    Memory,
}

type Timed = Box<dyn FnMut()>;

/// An op at one shape.
pub struct Case {
    /// Op and shape.
    pub name: String,
    flops: f64,
    bytes: f64,
    bound: Bound,
    /// Uploads the operands and returns what is timed.
    setup: Box<dyn Fn(&Gpu) -> Timed>,
    pytorch: Option<[String; 2]>,
}

impl Case {
    /// Does the op once.
    ///
    /// # Errors
    /// Any GPU error.
    pub fn once(&self, gpu: &Gpu) -> Result<()> {
        (self.setup)(gpu)();
        gpu.wait()
    }

    /// Times the op on `gpu` for about `seconds`.
    ///
    /// # Errors
    /// Any GPU error.
    pub fn run(&self, gpu: &Gpu, peak: &Peak, seconds: f64) -> Result<KernelTime> {
        let timing = time(gpu, seconds, &mut (self.setup)(gpu))?;
        let rate = |amount: f64| amount / timing.median_ms * 1e-6;
        let (gflops, gbs) = (rate(self.flops), rate(self.bytes));
        Ok(KernelTime {
            name: self.name.clone(),
            timing,
            gflops,
            gbs,
            share: match self.bound {
                Bound::Compute => gflops / peak.gflops,
                Bound::Memory => gbs / peak.gbs,
            },
            pytorch: self.pytorch.clone(),
        })
    }

    fn pytorch(mut self, setup: impl Into<String>, timed: impl Into<String>) -> Case {
        self.pytorch = Some([setup.into(), timed.into()]);
        self
    }
}

/// Values between -0.5 and 0.5 as `dtype`.
fn tensor(gpu: &Gpu, dtype: DType, shape: &[usize]) -> Tensor {
    let n: usize = shape.iter().product();
    let values: Vec<f32> = (0..n).map(|i| (i % 251) as f32 / 251.0 - 0.5).collect();
    Tensor::from_bytes(gpu, &dtype.narrow(&values), dtype, shape)
}

fn name_of(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "f16",
        DType::Bf16 => "bf16",
        _ => "f32",
    }
}

fn marks(trans: [bool; 2]) -> [&'static str; 2] {
    trans.map(|t| if t { "ᵀ" } else { "" })
}

/// a [m, k] · b [k, n], activations in `a`'s dtype.
fn product(m: usize, n: usize, k: usize, dtypes: [DType; 2], trans: [bool; 2]) -> Case {
    let [da, db] = dtypes;
    let [ta, tb] = trans;
    let [ma, mb] = marks(trans);
    let shape = |t: bool, rows: usize, columns: usize| match t {
        true => [columns, rows],
        false => [rows, columns],
    };
    let (sa, sb) = (shape(ta, m, k), shape(tb, k, n));
    let dt = |mark: &str| if mark.is_empty() { "" } else { ".T" };
    let vector = m <= 8;
    Case {
        name: format!(
            "matmul {m}×{n}×{k} a{ma} {} b{mb} {}",
            name_of(da),
            name_of(db)
        ),
        flops: 2.0 * (m * n * k) as f64,
        bytes: (da.bytes() * m * (k + n) + db.bytes() * n * k) as f64,
        bound: if vector {
            Bound::Memory
        } else {
            Bound::Compute
        },
        setup: Box::new(move |gpu| {
            let (a, b) = (tensor(gpu, da, &sa), tensor(gpu, db, &sb));
            Box::new(move || {
                let options = MatmulOptions {
                    trans_a: ta,
                    trans_b: tb,
                    ..MatmulOptions::default()
                };
                matmul(&a, &b, &options);
            })
        }),
        pytorch: None,
    }
    .pytorch(
        format!(
            "a=torch.rand(({},{}){}); b=torch.rand(({},{}){})",
            sa[0],
            sa[1],
            torch_dtype(da),
            sb[0],
            sb[1],
            torch_dtype(da)
        ),
        format!("a{}@b{}", dt(ma), dt(mb)),
    )
}

/// The argument that makes PyTorch's operands of `dtype`; it has no product of mixed ones.
fn torch_dtype(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => ",dtype=torch.float16",
        _ => "",
    }
}

/// A linear layer's product with its weight [outputs, inputs] quantised: x·wᵀ, or the gradient dy·w.
fn quantized(m: usize, outputs: usize, inputs: usize, kind: Quantization, tb: bool) -> Case {
    let (n, k) = if tb {
        (outputs, inputs)
    } else {
        (inputs, outputs)
    };
    let float = product(m, n, k, [DType::F32; 2], [false, tb]);
    Case {
        name: format!(
            "matmul {m}×{n}×{k} a f32 b{} {kind:?}",
            marks([false, tb])[1]
        ),
        bytes: (4 * m * (k + n)) as f64 + kind.bytes(outputs, inputs) as f64,
        setup: Box::new(move |gpu| {
            let a = tensor(gpu, DType::F32, &[m, k]);
            let values: Vec<f32> = (0..n * k).map(|i| (i % 251) as f32 / 251.0 - 0.5).collect();
            let w = QuantizedMatrix::from_f32(gpu, &values, [outputs, inputs], kind)
                .expect("finite values");
            Box::new(move || {
                let options = MatmulOptions {
                    trans_b: tb,
                    ..MatmulOptions::default()
                };
                matmul_quantized(&a, &w, &options);
            })
        }),
        ..float
    }
}

/// Which pass of a convolution or an attention.
#[derive(Clone, Copy, PartialEq)]
enum Pass {
    Forward,
    Input,
    Weight,
}

fn convolution(pass: Pass, side: usize, ci: usize, co: usize, stride: usize) -> Case {
    let out = side.div_ceil(stride);
    let (label, statement) = match pass {
        Pass::Forward => ("forward", format!("F.conv2d(x,w,None,{stride},1)")),
        Pass::Input => (
            "d input",
            format!("torch.nn.grad.conv2d_input(x.shape,w,dy,{stride},1)"),
        ),
        Pass::Weight => (
            "d weight",
            format!("torch.nn.grad.conv2d_weight(x,w.shape,dy,{stride},1)"),
        ),
    };
    Case {
        name: format!("conv2d 3×3 {label} {side}² {ci}→{co} /{stride}"),
        flops: 2.0 * (out * out * ci * co * 9) as f64,
        bytes: 4.0 * (side * side * ci + 9 * ci * co + out * out * co) as f64,
        bound: Bound::Compute,
        setup: Box::new(move |gpu| {
            let x = tensor(gpu, DType::F32, &[1, side, side, ci]);
            let w = tensor(gpu, DType::F32, &[3, 3, ci, co]);
            let dy = tensor(gpu, DType::F32, &[1, out, out, co]);
            Box::new(move || {
                let options = Conv2dOptions::new(stride, 1);
                match pass {
                    Pass::Forward => conv2d(&x, &w, None, &options),
                    Pass::Input => conv2d_grad_input(&dy, &w, x.shape(), &options),
                    Pass::Weight => conv2d_grad_weight(&x, &dy, 3, 3, &options),
                };
            })
        }),
        pytorch: None,
    }
    .pytorch(
        format!(
            "cl=torch.channels_last; x=torch.rand(1,{ci},{side},{side}).to(memory_format=cl); \
             w=torch.rand({co},{ci},3,3).to(memory_format=cl); \
             dy=torch.rand(1,{co},{out},{out}).to(memory_format=cl)"
        ),
        statement,
    )
}

/// Whose attention.
#[derive(Clone, Copy)]
struct Attention {
    of: &'static str,
    queries: usize,
    keys: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    causal: bool,
}

fn flash(a: Attention, backward: bool) -> Case {
    let Attention {
        of,
        queries: t,
        keys: s,
        heads: h,
        kv_heads: hkv,
        head_dim: d,
        causal,
    } = a;
    // Forward: q·kᵀ and p·v. Backward: both again, dp, dq, dk, dv are five products.
    let products = if backward { 5.0 } else { 2.0 };
    let half = if causal { 0.5 } else { 1.0 };
    let call = format!(
        "F.scaled_dot_product_attention(q,k,v,is_causal={},enable_gqa=True)",
        if causal { "True" } else { "False" }
    );
    let grad = if backward { "True" } else { "False" };
    Case {
        name: format!(
            "attention {} {of} {t}×{s}, {h} heads of {d}",
            if backward { "backward" } else { "forward" }
        ),
        flops: products * half * 2.0 * (h * t * s * d) as f64,
        bytes: 4.0 * (2 * t * h * d + 2 * s * hkv * d) as f64 * if backward { 2.0 } else { 1.0 },
        bound: Bound::Compute,
        setup: Box::new(move |gpu| {
            let f = DType::F32;
            let (q, k) = (
                tensor(gpu, f, &[1, t, h * d]),
                tensor(gpu, f, &[1, s, hkv * d]),
            );
            let (v, dy) = (
                tensor(gpu, f, &[1, s, hkv * d]),
                tensor(gpu, f, &[1, t, h * d]),
            );
            let shape = AttentionShape {
                heads: h,
                kv_heads: hkv,
                scale: 1.0 / (d as f32).sqrt(),
            };
            let mask = AttentionMask {
                causal,
                ..AttentionMask::default()
            };
            let (out, lse) = attention(&q, &k, &v, shape, &mask);
            Box::new(move || {
                if !backward {
                    attention(&q, &k, &v, shape, &mask);
                    return;
                }
                let forward = Forward {
                    q: &q,
                    k: &k,
                    v: &v,
                    out: &out,
                    lse: &lse,
                };
                attention_backward(forward, Some(&dy), &[], shape, &mask);
            })
        }),
        pytorch: None,
    }
    .pytorch(
        format!(
            "r=lambda n,l:torch.rand(1,n,l,{d}).requires_grad_({grad}); q=r({h},{t}); k=r({hkv},{s}); v=r({hkv},{s}); \
             y={call}; dy=torch.rand(1,{h},{t},{d})"
        ),
        match backward {
            true => "torch.autograd.grad(y,(q,k,v),dy,retain_graph=True)".to_string(),
            false => call.clone(),
        },
    )
}

/// An op bound by memory: `count` tensors of `shape` are read or written once.
fn streaming(
    name: &str,
    shape: &[usize],
    count: usize,
    setup: impl Fn(&Gpu, &[usize]) -> Timed + 'static,
) -> Case {
    let elements: usize = shape.iter().product();
    let owned = shape.to_vec();
    let sizes: Vec<String> = shape.iter().map(usize::to_string).collect();
    Case {
        name: format!("{name} {}", sizes.join("×")),
        flops: elements as f64,
        bytes: (4 * elements * count) as f64,
        bound: Bound::Memory,
        setup: Box::new(move |gpu| setup(gpu, &owned)),
        pytorch: None,
    }
}

fn groups_of_32<'a>(weight: &'a Tensor, bias: &'a Tensor) -> GroupNorm<'a> {
    GroupNorm {
        groups: 32,
        weight: Some(weight),
        bias: Some(bias),
        eps: 1e-5,
        silu: false,
    }
}

/// Ops bound by memory, at the shapes of SmolVLM-256M with 1,200 tokens and of the U-Net.
fn memory_bound() -> Vec<Case> {
    let f = DType::F32;
    let x = move |gpu: &Gpu, shape: &[usize]| tensor(gpu, f, shape);
    let text = [1200, 576];
    let inner = [1200, 1536];
    let mut cases = vec![
        streaming("add", &[4096, 640], 3, move |gpu, s| {
            let (a, b) = (x(gpu, s), x(gpu, s));
            Box::new(move || drop(binary(&a, &b, Binary::Add)))
        }),
        streaming("copy", &[4096, 640], 2, move |gpu, s| {
            let a = x(gpu, s);
            Box::new(move || drop(unary(&a, Unary::Affine(1.0, 0.0))))
        }),
        streaming("add of a row", &[4096, 640], 2, move |gpu, s| {
            let (a, b) = (x(gpu, s), x(gpu, &s[1..]));
            Box::new(move || drop(binary(&a, &b, Binary::Add)))
        }),
        streaming("silu", &[4096, 640], 2, move |gpu, s| {
            let a = x(gpu, s);
            Box::new(move || drop(unary(&a, Unary::Silu)))
        }),
        streaming("swiglu", &inner, 3, move |gpu, s| {
            let (a, b) = (x(gpu, s), x(gpu, s));
            Box::new(move || drop(swiglu(&a, &b)))
        }),
        streaming("swiglu backward", &inner, 5, move |gpu, s| {
            let (a, b, dy) = (x(gpu, s), x(gpu, s), x(gpu, s));
            Box::new(move || drop(swiglu_backward(&a, &b, &dy)))
        }),
        streaming("rms_norm", &text, 2, move |gpu, s| {
            let (a, w) = (x(gpu, s), x(gpu, &s[1..]));
            Box::new(move || drop(rms_norm(&a, Some(&w), 1e-5)))
        }),
        streaming("rms_norm backward", &text, 3, move |gpu, s| {
            let (a, w, dy) = (x(gpu, s), x(gpu, &s[1..]), x(gpu, s));
            Box::new(move || drop(rms_norm_backward(&a, Some(&w), &dy, None, 1e-5, false)))
        }),
        streaming("layer_norm", &[1024, 768], 2, move |gpu, s| {
            let (a, w, b) = (x(gpu, s), x(gpu, &s[1..]), x(gpu, &s[1..]));
            Box::new(move || drop(layer_norm(&a, Some(&w), Some(&b), 1e-5)))
        }),
        streaming("layer_norm backward", &[1024, 768], 3, move |gpu, s| {
            let (a, w, dy) = (x(gpu, s), x(gpu, &s[1..]), x(gpu, s));
            Box::new(move || drop(layer_norm_backward(&a, Some(&w), &dy, None, 1e-5, false)))
        }),
        streaming("group_norm", &[1, 64, 64, 320], 2, move |gpu, s| {
            let (a, w, b) = (x(gpu, s), x(gpu, &s[3..]), x(gpu, &s[3..]));
            Box::new(move || drop(group_norm(&a, &groups_of_32(&w, &b))))
        }),
        streaming(
            "group_norm backward",
            &[1, 64, 64, 320],
            3,
            move |gpu, s| {
                let (a, dy) = (x(gpu, s), x(gpu, s));
                let (w, b) = (x(gpu, &s[3..]), x(gpu, &s[3..]));
                let (_, statistics) = group_norm(&a, &groups_of_32(&w, &b));
                Box::new(move || {
                    let norm = groups_of_32(&w, &b);
                    drop(group_norm_backward(
                        &a,
                        &statistics,
                        &dy,
                        None,
                        &norm,
                        false,
                    ))
                })
            },
        ),
        streaming("softmax", &[4096, 77], 2, move |gpu, s| {
            let a = x(gpu, s);
            Box::new(move || drop(softmax(&a)))
        }),
        streaming("rotary", &[1, 1200, 576], 2, move |gpu, s| {
            let (a, c) = (x(gpu, s), x(gpu, &[1, 1200, 32]));
            let sine = x(gpu, &[1, 1200, 32]);
            Box::new(move || drop(rotary(&a, [&c, &sine], 9)))
        }),
        streaming("cross_entropy", &[64, 49_280], 1, move |gpu, s| {
            let (a, labels) = (x(gpu, s), Tensor::from_u32(gpu, &[7; 64], &[64]));
            Box::new(move || drop(cross_entropy(&a, &labels)))
        }),
        streaming("cross_entropy backward", &[64, 49_280], 2, move |gpu, s| {
            let (a, labels) = (x(gpu, s), Tensor::from_u32(gpu, &[7; 64], &[64]));
            let (lse, up) = (x(gpu, &[64]), x(gpu, &[64]));
            Box::new(move || drop(cross_entropy_backward(&a, &labels, &lse, &up)))
        }),
        streaming("adamw", &[1536, 576], 7, move |gpu, s| {
            let (w, g) = (x(gpu, s), x(gpu, s));
            let zeros = || Tensor::zeros(gpu, f, s);
            let (m, v) = (zeros(), zeros());
            let settings = AdamW {
                lr: 1e-4,
                betas: (0.9, 0.999),
                eps: 1e-8,
                weight_decay: 0.0,
                decoupled: true,
                step: 1,
            };
            Box::new(move || adamw(&w, &g, &m, &v, &settings, None))
        }),
    ];
    let (rows, inputs, words) = (64, 576, 49_280);
    cases.push(Case {
        name: format!("linear_cross_entropy with gradient {rows}×{inputs}→{words}"),
        flops: 4.0 * (rows * inputs * words) as f64,
        bytes: 4.0 * (2 * rows * inputs + words * inputs) as f64,
        bound: Bound::Compute,
        setup: Box::new(move |gpu| {
            let (a, w) = (x(gpu, &[rows, inputs]), x(gpu, &[words, inputs]));
            let labels = Tensor::from_u32(gpu, &[7; 64], &[rows]);
            Box::new(move || {
                linear_cross_entropy(&a, &w, &labels, 1.0 / 64.0, [true, false]);
            })
        }),
        pytorch: None,
    });
    cases
}

/// All cases, in the order that they are printed in; those in f16 where the adapter has it, the largest on GPUs alone.
pub fn cases(tier: &Tier) -> Vec<Case> {
    let f = DType::F32;
    let mut cases = Vec::new();
    if !tier.cpu {
        cases.push(product(4096, 4096, 4096, [f; 2], [false; 2]));
    }
    // Odd sizes beside the even ones that they are compared with: a machine's clock may change from one second to the next.
    for n in [256, 505, 512, 513, 519, 1017, 1024, 1025, 1031, 2048] {
        cases.push(product(n, n, n, [f; 2], [false; 2]));
    }
    if tier.f16 {
        for n in [512, 1024, 2048, 4096] {
            cases.push(product(n, n, n, [DType::F16; 2], [false; 2]));
        }
    }
    for (m, n, k) in [
        (1, 4096, 1024),
        (8, 4096, 1024),
        (77, 768, 768),
        (4096, 320, 320),
        (300, 1536, 576),
        // The two halves of a LoRA adapter.
        (300, 16, 576),
        (300, 576, 16),
    ] {
        cases.push(product(m, n, k, [f; 2], [false, true]));
    }
    // The gradients of its inner activations and of its second half.
    cases.push(product(300, 16, 576, [f; 2], [false, false]));
    cases.push(product(576, 16, 300, [f; 2], [true, false]));
    for (m, n, k) in [(300, 1536, 576), (1, 4096, 1024)] {
        cases.push(product(m, n, k, [f, DType::Bf16], [false, true]));
    }
    cases.push(product(300, 576, 1536, [f; 2], [false; 2]));
    cases.push(product(1536, 576, 300, [f; 2], [true, false]));
    cases.push(product(8, 576, 300, [f; 2], [true, false]));
    for kind in [Quantization::Q8, Quantization::Q4] {
        cases.push(quantized(1, 4096, 1024, kind, true));
        for trans_b in [true, false] {
            cases.push(quantized(300, 1536, 576, kind, trans_b));
        }
    }
    for pass in [Pass::Forward, Pass::Input, Pass::Weight] {
        for (side, ci, co, stride) in [
            (64, 320, 320, 1),
            (32, 640, 640, 1),
            (16, 1280, 1280, 1),
            (64, 320, 4, 1),
            (64, 320, 320, 2),
            (32, 32, 32, 1),
        ] {
            cases.push(convolution(pass, side, ci, co, stride));
        }
    }
    let sd = |of, queries, keys, head_dim| Attention {
        of,
        queries,
        keys,
        heads: 8,
        kv_heads: 8,
        head_dim,
        causal: false,
    };
    let smolvlm = |of, tokens, heads, kv_heads, causal| Attention {
        of,
        queries: tokens,
        keys: tokens,
        heads,
        kv_heads,
        head_dim: 64,
        causal,
    };
    for attention in [
        sd("U-Net self", 4096, 4096, 40),
        sd("U-Net text", 4096, 77, 40),
        sd("U-Net self", 1024, 1024, 80),
        smolvlm("SmolVLM text", 1200, 9, 3, true),
        smolvlm("SmolVLM vision", 1024, 12, 12, false),
    ] {
        cases.extend([false, true].map(|backward| flash(attention, backward)));
    }
    cases.extend(memory_bound());
    cases
}
