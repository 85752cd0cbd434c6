// Rotary embedding, half rotation: dimension i of a head turns with dimension i + half.
#import index::thread_index

#ifdef F16
alias Elem = f16;
#else
alias Elem = f32;
#endif

struct Params {
    pairs: u32,
    tokens: u32,
    heads: u32,
    half_dim: u32,
    // cos and sin are shared by the batch.
    shared_angles: u32,
    // −1 turns back: the backward.
    direction: f32,
}

@group(0) @binding(0) var<storage, read> x: array<Elem>;
@group(0) @binding(1) var<storage, read> cosine: array<f32>;
@group(0) @binding(2) var<storage, read> sine: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<Elem>;
var<immediate> p: Params;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let pair = thread_index(group, groups, local, 64u);
    if pair >= p.pairs {
        return;
    }
    let i = pair % p.half_dim;
    let head = pair / p.half_dim;
    var token = head / p.heads;
    if p.shared_angles != 0u {
        token %= p.tokens;
    }
    let c = cosine[token * p.half_dim + i];
    let s = sine[token * p.half_dim + i] * p.direction;
    let low = head * 2u * p.half_dim + i;
    let high = low + p.half_dim;
    let a = f32(x[low]);
    let b = f32(x[high]);
    y[low] = Elem(a * c - b * s);
    y[high] = Elem(b * c + a * s);
}
