"""Gradients of single ops in the middle of a graph, by PyTorch in float64.

Versions: torch 2.15.0.
Run:      python tests/reference/autograd.py      (writes tests/reference/autograd/)

Each case is out = op(inputs) and loss = sum(w * out) with random w, so that a dropped or transposed upstream
gradient shows. Images and convolution kernels are stored channels-last ([B,H,W,C], [kh,kw,Ci,Co]).

ops.safetensors   f32: `<case>.in.<name>`, `<case>.w`, `<case>.out`, `<case>.grad.<name>`;
                  cases with an attention tap also `<case>.probs` and `<case>.w_probs`
ops.json          per case: the op's options and integer inputs (labels, bits, rows, columns)
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

OUT = Path(__file__).resolve().parent / "autograd"
torch.set_num_threads(1)
torch.manual_seed(20)
tensors, options = {}, {}


def rand(*shape, scale=1.0):
    """Normal values that float32 holds exactly, as float64."""
    return (scale * torch.randn(*shape)).float().double()


def case(name, op, inputs, **opts):
    """Runs `op(*inputs)` and stores inputs, output, upstream weights and gradients."""
    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    result = op(*leaves.values())
    out, probs = result if isinstance(result, tuple) else (result, None)
    w = rand(*out.shape)
    loss = (w * out).sum()
    if probs is not None:
        w_probs = rand(*probs.shape)
        loss = loss + (w_probs * probs).sum()
        tensors[f"{name}.probs"], tensors[f"{name}.w_probs"] = probs, w_probs
    loss.backward()
    tensors[f"{name}.w"], tensors[f"{name}.out"] = w, out
    for k, v in leaves.items():
        tensors[f"{name}.in.{k}"], tensors[f"{name}.grad.{k}"] = v, v.grad
    options[name] = opts


def nchw(x):
    return x.permute(0, 3, 1, 2)


def nhwc(x):
    return x.permute(0, 2, 3, 1)


def oihw(w):
    return w.permute(3, 2, 0, 1)


# ---- matmul -------------------------------------------------------------------------------------------------
case("matmul", lambda a, b: a @ b, dict(a=rand(2, 5, 7), b=rand(7, 9)))
case("matmul_t", lambda a, b: a @ b.T, dict(a=rand(5, 7), b=rand(3, 7)))
case("matmul_batched", lambda a, b: a @ b, dict(a=rand(3, 4, 6), b=rand(3, 6, 5)))
case("matmul_epilogue", lambda a, b, bias, residual: F.gelu(a @ b.T + bias) + residual,
     dict(a=rand(11, 6), b=rand(10, 6, scale=0.5), bias=rand(10), residual=rand(11, 10)), activation="gelu_erf")

# ---- convolution --------------------------------------------------------------------------------------------
def conv(stride, padding, bias=True):
    def op(x, kernel, b=None):
        left_right_top_bottom = (padding[1], padding[3], padding[0], padding[2])
        return nhwc(F.conv2d(F.pad(nchw(x), left_right_top_bottom), oihw(kernel), b, stride=stride))
    return op

# padding is [top, left, bottom, right] in `conv` and in ops.json
for name, kernel, stride, padding, bias in [
    ("conv3x3", 3, 1, [1, 1, 1, 1], True), ("conv3x3_stride2", 3, 2, [1, 1, 1, 1], True),
    ("conv3x3_stride2_right", 3, 2, [0, 0, 1, 1], True), ("conv1x1", 1, 1, [0, 0, 0, 0], False),
]:
    inputs = dict(x=rand(2, 7, 5, 3), kernel=rand(kernel, kernel, 3, 4, scale=0.4))
    if bias:
        inputs["b"] = rand(4)
    case(name, conv(stride, padding), inputs, stride=stride, padding_top_left_bottom_right=padding)

# ---- norms --------------------------------------------------------------------------------------------------
case("layer_norm", lambda x, weight, bias: F.layer_norm(x, (13,), weight, bias, 1e-5),
     dict(x=rand(3, 5, 13) + 0.5, weight=rand(13), bias=rand(13)), eps=1e-5)
case("rms_norm", lambda x, weight: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight,
     dict(x=rand(3, 5, 13), weight=rand(13)), eps=1e-6)
case("group_norm", lambda x, weight, bias: nhwc(F.group_norm(nchw(x), 3, weight, bias, 1e-5)),
     dict(x=rand(2, 5, 3, 12) + 0.3, weight=rand(12), bias=rand(12)), groups=3, eps=1e-5)
case("instance_norm", lambda x: nhwc(F.instance_norm(nchw(x), eps=1e-5)), dict(x=rand(2, 6, 5, 3)), eps=1e-5)

# ---- softmax and cross-entropy ------------------------------------------------------------------------------
case("softmax", lambda x: x.softmax(-1), dict(x=rand(3, 2, 17, scale=2)))
labels = [3, -100, 0, 18, -100, 7, 7]
case("cross_entropy", lambda logits: F.cross_entropy(logits, torch.tensor(labels), ignore_index=-100)[None],
     dict(logits=rand(7, 19, scale=2)), labels=labels, ignore=-100, reduction="mean")

# ---- activations --------------------------------------------------------------------------------------------
x = rand(4, 23, scale=3)
for name, f in {
    "silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "gelu_erf": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "relu": F.relu, "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1), "tanh": torch.tanh, "sigmoid": torch.sigmoid,
}.items():
    case(name, f, dict(x=x), **({"slope": 0.1} if name == "leaky_relu" else {}))
case("swiglu", lambda gate, up: F.silu(gate) * up, dict(gate=rand(5, 11, scale=2), up=rand(5, 11)))

# ---- broadcast arithmetic and reductions --------------------------------------------------------------------
case("add_broadcast", lambda a, b: a + b, dict(a=rand(3, 1, 5), b=rand(4, 5)))
case("mul_broadcast", lambda a, b: a * b, dict(a=rand(3, 4, 5), b=rand(4, 1)))
case("div_broadcast", lambda a, b: a / b, dict(a=rand(3, 4, 5), b=rand(5).abs() + 0.5))
for name, f in {
    "sum_middle": lambda x: x.sum(1), "mean_last": lambda x: x.mean(-1, keepdim=True), "mean_two": lambda x: x.mean((0, 2)),
    "max_last": lambda x: x.amax(-1), "max_first": lambda x: x.amax(0), "min_last": lambda x: x.amin(-1),
}.items():
    case(name, f, dict(x=rand(3, 6, 7)))

def min_max(x):
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    return (x - low) / (high - low + 1e-6)

case("min_max", min_max, dict(x=rand(4, 33)), eps=1e-6)

# ---- rotary -------------------------------------------------------------------------------------------------
def rotary(heads, tokens, dim):
    freq = 1.0 / (100.0 ** (torch.arange(0, dim, 2) / dim))
    angle = (torch.arange(tokens)[:, None] * freq).float()
    cos, sin = angle.cos().float(), angle.sin().float()
    tensors["rotary.cos"], tensors["rotary.sin"] = cos[None], sin[None]  # [1, tokens, dim/2]
    c, s = (torch.cat([v, v], -1).double()[None, :, None] for v in (cos, sin))
    def op(x):
        y = x.reshape(x.shape[0], tokens, heads, dim)
        half = torch.cat([-y[..., dim // 2:], y[..., : dim // 2]], -1)
        return (y * c + half * s).reshape(x.shape)
    return op

case("rotary", rotary(3, 6, 8), dict(x=rand(2, 6, 24)), heads=3)

# ---- resampling ---------------------------------------------------------------------------------------------
case("resize_up", lambda x: nhwc(F.interpolate(nchw(x), (11, 8), mode="bilinear", align_corners=False)),
     dict(x=rand(2, 4, 5, 3)), size=[11, 8])
case("resize_down", lambda x: nhwc(F.interpolate(nchw(x), (4, 3), mode="bilinear", align_corners=False)),
     dict(x=rand(1, 9, 7, 2)), size=[4, 3])
case("upsample_nearest", lambda x: nhwc(F.interpolate(nchw(x), scale_factor=2, mode="nearest")), dict(x=rand(2, 3, 5, 2)))

# ---- gathers ------------------------------------------------------------------------------------------------
ids = [4, 0, 4, 2, 6, 4]
case("embedding", lambda table: table[torch.tensor(ids)], dict(table=rand(7, 5)), ids=ids)
case("concat", lambda a, b: torch.cat([a, b], 1), dict(a=rand(2, 3, 4), b=rand(2, 5, 4)), axis=1)
case("permute", lambda x: x.permute(2, 0, 1), dict(x=rand(3, 4, 5)), axes=[2, 0, 1])

# ---- attention ----------------------------------------------------------------------------------------------
def attention(heads, kv_heads, causal=False, query_bits=None, key_bits=None, rows=None, columns=None, offset=0):
    """q [B,T,heads*D], k and v [B,S,kv_heads*D]; pair (t,s) allowed iff causal ok and bits meet."""
    def op(q, k, v):
        b, t, s = q.shape[0], q.shape[1], k.shape[1]
        d = q.shape[2] // heads
        qh = q.reshape(b, t, heads, d).transpose(1, 2)
        kh, vh = (z.reshape(b, s, kv_heads, d).transpose(1, 2).repeat_interleave(heads // kv_heads, 1) for z in (k, v))
        scores = qh @ kh.transpose(2, 3) * d**-0.5
        allow = torch.ones(b, 1, t, s, dtype=torch.bool)
        if causal:
            allow &= torch.arange(s)[None] <= torch.arange(t)[:, None] + offset
        if key_bits is not None:
            qb = torch.full((b, t), -1) if query_bits is None else torch.tensor(query_bits)
            allow &= ((qb[:, :, None] & torch.tensor(key_bits)[:, None, :]) != 0)[:, None]
        p = scores.masked_fill(~allow, float("-inf")).softmax(-1)
        out = (p @ vh).transpose(1, 2).reshape(b, t, heads * d)
        if rows is None:
            return out
        picked = [p[r // t, :, r % t][:, torch.tensor(columns[r // t])] for r in rows]
        return out, torch.stack(picked)  # [rows, heads, columns]
    return op

def qkv(b, t, s, heads, kv_heads, d):
    return dict(q=rand(b, t, heads * d), k=rand(b, s, kv_heads * d), v=rand(b, s, kv_heads * d))

for name, shape, opts in [
    ("attention", (2, 5, 5, 2, 2, 8), {}),
    ("attention_causal", (2, 9, 9, 2, 2, 8), dict(causal=True)),
    ("attention_causal_offset", (1, 3, 8, 2, 1, 8), dict(causal=True, offset=5)),
    ("attention_padding", (2, 6, 6, 2, 2, 8), dict(causal=True, key_bits=[[1] * 6, [1, 1, 1, 1, 0, 0]])),
    ("attention_gqa", (2, 7, 7, 6, 2, 8), dict(causal=True)),
    ("attention_cross", (2, 4, 11, 4, 2, 16), {}),
    # padded queries (bit 1) and padded keys (bit 2) do not meet; every other pair does
    ("attention_bits", (1, 6, 6, 2, 2, 8), dict(query_bits=[[3, 3, 1, 3, 1, 1]], key_bits=[[3, 3, 2, 3, 2, 2]])),
    ("attention_tap_causal", (2, 8, 8, 4, 2, 8), dict(causal=True, rows=[5, 7, 6, 13, 15], columns=[[1, 2, 3, 4], [0, 1, 2, 3]])),
    ("attention_tap_cross", (2, 5, 12, 4, 4, 8), dict(
        query_bits=[[1, 1, 3, 3, 3]] * 2, key_bits=[[2] * 6 + [1] * 6, [1] * 9 + [2] * 3],
        rows=[2, 4, 4, 8], columns=[[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]])),
]:
    case(name, attention(shape[3], shape[4], **opts), qkv(*shape), heads=shape[3], kv_heads=shape[4],
         scale=shape[5] ** -0.5, **opts)

OUT.mkdir(exist_ok=True)
stored = {k: v.detach().float().contiguous() for k, v in tensors.items()}
assert all(torch.isfinite(v).all() for v in stored.values())
save_file(stored, OUT / "ops.safetensors")
(OUT / "ops.json").write_text(json.dumps(options, indent=1))
print(len(options), "cases,", sum(f.stat().st_size for f in OUT.iterdir()), "bytes")
