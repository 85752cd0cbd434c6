// Mean over heads of the attention probabilities, f32 [B, T, S], from q, k and the log-sum-exp;
// a thread ROWS query rows, their heads one after another, STEP keys a step, the same for the workgroup.
#import attention_mask::{Params, visible_keys}
#import attention_lanes::{STEP, BLOCKS, BLOCK, VECTORS, LOADS}
#import lanes::{LANES, from_lane}

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
const ROWS: u32 = #{ROWS}u;

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
    let lane = local % LANES;
    let b = group.y;
    var tokens: array<u32, ROWS>;
    var rows: array<u32, ROWS>;
    var visible: array<u32, ROWS>;
    var bits: array<u32, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
        tokens[r] = (group.x * ROWS + r) * #{WG}u + local;
        // Tokens past the end repeat the last one; they are not stored.
        let token = min(tokens[r], p.queries - 1u);
        rows[r] = b * p.queries + token;
        visible[r] = visible_keys(p, token);
        bits[r] = 0xffffffffu;
        if p.has_query_bits != 0u {
            bits[r] = query_bits[rows[r]];
        }
    }
    let share = 1.0 / f32(p.heads);
    var query: array<array<array<vec4<f32>, ROWS>, BLOCK>, BLOCKS>;
    for (var head = 0u; head < p.heads; head++) {
        var shift: array<f32, ROWS>;
        for (var r = 0u; r < ROWS; r++) {
            for (var i = 0u; i < BLOCKS; i++) {
                for (var d = 0u; d < BLOCK; d++) {
                    query[i][d][r] = q4((rows[r] * p.heads + head) * D, i * BLOCK + d) * p.scale;
                }
            }
            shift[r] = lse[(b * p.heads + head) * p.queries + (rows[r] - b * p.queries)];
        }
        let kv_head = head / (p.heads / p.kv_heads);
        for (var key = 0u; key < p.keys; key += STEP) {
            var held: array<vec4<f32>, LOADS>;
            for (var l = 0u; l < LOADS; l++) {
                let i = l * LANES + lane;
                let place = min(key + i / VECTORS, p.keys - 1u);
                held[l] = k4(((b * p.keys + place) * p.kv_heads + kv_head) * D, i % VECTORS);
            }
            var score: array<array<f32, STEP>, ROWS>;
            for (var i = 0u; i < BLOCKS; i++) {
                for (var d = 0u; d < BLOCK; d++) {
                    for (var j = 0u; j < STEP; j++) {
                        let v = j * VECTORS + i * BLOCK + d;
                        let x = from_lane(held[v / LANES], v % LANES);
                        for (var r = 0u; r < ROWS; r++) {
                            score[r][j] += dot(x, query[i][d][r]);
                        }
                    }
                }
            }
            for (var j = 0u; j < STEP; j++) {
                let place = min(key + j, p.keys - 1u);
                var mask = 0xffffffffu;
                if p.has_key_bits != 0u {
                    mask = key_bits[b * p.keys + place];
                }
                for (var r = 0u; r < ROWS; r++) {
                    if tokens[r] < p.queries && key + j < p.keys {
                        let seen = place < visible[r] && (mask & bits[r]) != 0u;
                        let at = rows[r] * p.keys + place;
                        let before = select(mean[at], 0.0, head == 0u);
                        mean[at] = before + select(0.0, exp(score[r][j] - shift[r]) * share, seen);
                    }
                }
            }
        }
    }
}
