// Mean over heads of the attention probabilities, f32 [B, T, S], from q, k and the log-sum-exp;
// a thread a query row, its heads one after another, keys uniform over the workgroup.
#import attention_mask::{Params, visible_keys}

#ifdef F16
alias Elem = f16;
alias Elem4 = vec4<f16>;
#else
alias Elem = f32;
alias Elem4 = vec4<f32>;
#endif
#ifdef VEC4
alias Stored = Elem4;
#else
alias Stored = Elem;
#endif

const D: u32 = #{D}u;
const BLOCKS: u32 = #{BLOCKS}u;
const BLOCK: u32 = #{BLOCK}u;

@group(0) @binding(0) var<storage, read> q: array<Stored>;
@group(0) @binding(1) var<storage, read> k: array<Stored>;
@group(0) @binding(2) var<storage, read> query_bits: array<u32>;
@group(0) @binding(3) var<storage, read> key_bits: array<u32>;
@group(0) @binding(4) var<storage, read> lse: array<f32>;
@group(0) @binding(5) var<storage, read_write> mean: array<f32>;
var<immediate> p: Params;

#ifdef VEC4
fn q4(base: u32, d: u32) -> vec4<f32> {
    if 4u * d >= D {
        return vec4<f32>(0.0);
    }
    return vec4<f32>(q[base / 4u + d]);
}
fn k4(base: u32, d: u32) -> vec4<f32> {
    if 4u * d >= D {
        return vec4<f32>(0.0);
    }
    return vec4<f32>(k[base / 4u + d]);
}
#else
fn q4(base: u32, d: u32) -> vec4<f32> {
    var x = vec4<f32>(0.0);
    for (var i = 0u; i < 4u; i++) {
        if 4u * d + i < D {
            x[i] = f32(q[base + 4u * d + i]);
        }
    }
    return x;
}
fn k4(base: u32, d: u32) -> vec4<f32> {
    var x = vec4<f32>(0.0);
    for (var i = 0u; i < 4u; i++) {
        if 4u * d + i < D {
            x[i] = f32(k[base + 4u * d + i]);
        }
    }
    return x;
}
#endif

@compute @workgroup_size(#{WG})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let b = group.y;
    let token = group.x * #{WG}u + local;
    let row = b * p.queries + min(token, p.queries - 1u);
    let visible = visible_keys(p, row - b * p.queries);
    var bits = 0xffffffffu;
    if p.has_query_bits != 0u {
        bits = query_bits[row];
    }
    let share = 1.0 / f32(p.heads);
    var query: array<array<vec4<f32>, BLOCK>, BLOCKS>;
    for (var head = 0u; head < p.heads; head++) {
        for (var i = 0u; i < BLOCKS; i++) {
            for (var d = 0u; d < BLOCK; d++) {
                query[i][d] = q4((row * p.heads + head) * D, i * BLOCK + d) * p.scale;
            }
        }
        let shift = lse[(b * p.heads + head) * p.queries + (row - b * p.queries)];
        let kv_head = head / (p.heads / p.kv_heads);
        for (var key = 0u; key < p.keys; key++) {
            let base = ((b * p.keys + key) * p.kv_heads + kv_head) * D;
            var score = 0.0;
            for (var i = 0u; i < BLOCKS; i++) {
                for (var d = 0u; d < BLOCK; d++) {
                    score += dot(query[i][d], k4(base, i * BLOCK + d));
                }
            }
            var key_mask = bits;
            if p.has_key_bits != 0u {
                key_mask &= key_bits[b * p.keys + key];
            }
            let seen = key < visible && key_mask != 0u;
            if token < p.queries {
                let at = row * p.keys + key;
                let before = select(mean[at], 0.0, head == 0u);
                mean[at] = before + select(0.0, exp(score - shift) * share, seen);
            }
        }
    }
}
