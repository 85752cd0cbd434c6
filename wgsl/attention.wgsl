// Flash attention forward for CPU drivers: query rows in the lanes of a workgroup, ROWS of them a
// thread, keys and values the same for all of them; no shared memory, no barrier.
// The query heads that share a key/value head are rows side by side: row = token · group + head.
// q, out [B, T, H·D], k, v [B, S, Hkv·D], or with HEADS_APART [B, Hkv, S, D], lse f32 [B, H, T].
#import attention_mask::{Params, NOTHING, visible_keys}
#import attention_lanes::{STEP, BLOCKS, BLOCK, VECTORS, LOADS, origins}
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
alias Held = array<vec4<f32>, LOADS>;
alias Head = array<array<array<vec4<f32>, ROWS>, BLOCK>, BLOCKS>;

@group(0) @binding(0) var<storage, read> q: array<Stored>;
@group(0) @binding(1) var<storage, read> k: array<Stored>;
@group(0) @binding(2) var<storage, read> v: array<Stored>;
@group(0) @binding(3) var<storage, read> query_bits: array<u32>;
@group(0) @binding(4) var<storage, read> key_bits: array<u32>;
@group(0) @binding(5) var<storage, read_write> out: array<Stored>;
@group(0) @binding(6) var<storage, read_write> lse: array<f32>;
var<immediate> p: Params;

// Elements 4d .. 4d + 4 of the head that starts at element `base`; zeros past its end.
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
fn v4(base: u32, d: u32) -> vec4<f32> {
    if 4u * d >= D {
        return vec4<f32>(0.0);
    }
    return vec4<f32>(v[base / 4u + d]);
}
fn store(base: u32, d: u32, x: vec4<f32>) {
    if 4u * d < D {
        out[base / 4u + d] = Elem4(x);
    }
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
fn v4(base: u32, d: u32) -> vec4<f32> {
    var x = vec4<f32>(0.0);
    for (var i = 0u; i < 4u; i++) {
        if 4u * d + i < D {
            x[i] = f32(v[base + 4u * d + i]);
        }
    }
    return x;
}
fn store(base: u32, d: u32, x: vec4<f32>) {
    for (var i = 0u; i < 4u; i++) {
        if 4u * d + i < D {
            out[base + 4u * d + i] = Elem(x[i]);
        }
    }
}
#endif

@compute @workgroup_size(#{WG})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let lane = local % LANES;
    let shared_heads = p.heads / p.kv_heads;
    let rows = p.queries * shared_heads;
    let first = group.x * ROWS * #{WG}u;
#ifdef HEADS_APART
    let kv_base = (group.z * p.kv_heads + group.y) * p.keys * D;
    let kv_step = D;
#else
    let kv_base = group.z * p.keys * p.kv_heads * D + group.y * D;
    let kv_step = p.kv_heads * D;
#endif

    var tokens: array<u32, ROWS>;
    var bases: array<u32, ROWS>;
    var visible: array<u32, ROWS>;
    var bits: array<u32, ROWS>;
    var query: Head;
    var sum_of_values: Head;
    var peak: array<f32, ROWS>;
    var sum: array<f32, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
        let row = min(first + r * #{WG}u + local, rows - 1u);
        tokens[r] = row / shared_heads;
        let head = group.y * shared_heads + row % shared_heads;
        bases[r] = ((group.z * p.queries + tokens[r]) * p.heads + head) * D;
        visible[r] = visible_keys(p, tokens[r]);
        bits[r] = 0xffffffffu;
        if p.has_query_bits != 0u {
            bits[r] = query_bits[group.z * p.queries + tokens[r]];
        }
        peak[r] = NOTHING;
        sum[r] = 0.0;
    }
    for (var b = 0u; b < BLOCKS; b++) {
        for (var d = 0u; d < BLOCK; d++) {
            for (var r = 0u; r < ROWS; r++) {
                query[b][d][r] = q4(bases[r], b * BLOCK + d) * p.scale;
                sum_of_values[b][d][r] = vec4<f32>(0.0);
            }
        }
    }

    // No row of this workgroup sees a key past its last row's.
    let last_token = min(first + ROWS * #{WG}u, rows) - 1u;
    let end = visible_keys(p, last_token / shared_heads);
    for (var key = 0u; key < end; key += STEP) {
        var at: array<u32, STEP>;
        var mask: array<u32, STEP>;
        for (var j = 0u; j < STEP; j++) {
            let place = min(key + j, p.keys - 1u);
            at[j] = kv_base + place * kv_step;
            mask[j] = 0xffffffffu;
            if p.has_key_bits != 0u {
                mask[j] = key_bits[group.z * p.keys + place];
            }
        }
        let origin = origins(at, lane);
        var held: Held;
        for (var l = 0u; l < LOADS; l++) {
            held[l] = k4(origin[l], (l * LANES + lane) % VECTORS);
        }
        var score: array<array<f32, STEP>, ROWS>;
        for (var r = 0u; r < ROWS; r++) {
            for (var j = 0u; j < STEP; j++) {
                score[r][j] = 0.0;
            }
        }
        for (var b = 0u; b < BLOCKS; b++) {
            for (var d = 0u; d < BLOCK; d++) {
                for (var j = 0u; j < STEP; j++) {
                    let i = j * VECTORS + b * BLOCK + d;
                    let x = from_lane(held[i / LANES], i % LANES);
                    for (var r = 0u; r < ROWS; r++) {
                        score[r][j] += dot(x, query[b][d][r]);
                    }
                }
            }
        }
        var old: array<f32, ROWS>;
        for (var r = 0u; r < ROWS; r++) {
            var next = peak[r];
            for (var j = 0u; j < STEP; j++) {
                if key + j >= visible[r] || (mask[j] & bits[r]) == 0u {
                    score[r][j] = NOTHING;
                }
                next = max(next, score[r][j]);
            }
            old[r] = exp(peak[r] - next);
            peak[r] = next;
            sum[r] *= old[r];
            for (var j = 0u; j < STEP; j++) {
                // Not exp(NOTHING − next): that is 1 while the row has seen no key.
                score[r][j] = select(exp(score[r][j] - next), 0.0, score[r][j] == NOTHING);
                sum[r] += score[r][j];
            }
        }
        for (var l = 0u; l < LOADS; l++) {
            held[l] = v4(origin[l], (l * LANES + lane) % VECTORS);
        }
        for (var b = 0u; b < BLOCKS; b++) {
            for (var d = 0u; d < BLOCK; d++) {
                var step: array<vec4<f32>, ROWS>;
                for (var r = 0u; r < ROWS; r++) {
                    step[r] = sum_of_values[b][d][r] * old[r];
                }
                for (var j = 0u; j < STEP; j++) {
                    let i = j * VECTORS + b * BLOCK + d;
                    let x = from_lane(held[i / LANES], i % LANES);
                    for (var r = 0u; r < ROWS; r++) {
                        step[r] += x * score[r][j];
                    }
                }
                for (var r = 0u; r < ROWS; r++) {
                    sum_of_values[b][d][r] = step[r];
                }
            }
        }
    }

    for (var r = 0u; r < ROWS; r++) {
        let row = first + r * #{WG}u + local;
        if row < rows {
            // A row that sees no key: zeros, and NOTHING as its log-sum-exp.
            let inverse = select(0.0, 1.0 / sum[r], sum[r] > 0.0);
            for (var b = 0u; b < BLOCKS; b++) {
                for (var d = 0u; d < BLOCK; d++) {
                    store(bases[r], b * BLOCK + d, sum_of_values[b][d][r] * inverse);
                }
            }
            let head = group.y * shared_heads + row % shared_heads;
            let at = (group.z * p.heads + head) * p.queries + tokens[r];
            lse[at] = select(NOTHING, peak[r] + log(sum[r]), sum[r] > 0.0);
        }
    }
}
