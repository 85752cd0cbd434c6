// Flash attention forward for CPU drivers: query rows in the lanes of a workgroup, ROWS of them a
// thread, so that every key and value address is uniform; no shared memory, no barrier.
// The query heads that share a key/value head are rows side by side: row = token · group + head.
// q, out [B, T, H·D], k, v [B, S, Hkv·D], lse f32 [B, H, T].
#import attention_mask::{Params, NOTHING, visible_keys}

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
// A head is BLOCKS × BLOCK vec4s, so that each loop is short enough to be unrolled by the driver.
const BLOCKS: u32 = #{BLOCKS}u;
const BLOCK: u32 = #{BLOCK}u;
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
    let shared_heads = p.heads / p.kv_heads;
    let rows = p.queries * shared_heads;
    let first = group.x * ROWS * #{WG}u;
    let kv_base = group.z * p.keys * p.kv_heads * D + group.y * D;
    let kv_step = p.kv_heads * D;

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
    for (var key = 0u; key < end; key += 4u) {
        let last_key = p.keys - 1u;
        let k0 = kv_base + key * kv_step;
        let k1 = kv_base + min(key + 1u, last_key) * kv_step;
        let k2 = kv_base + min(key + 2u, last_key) * kv_step;
        let k3 = kv_base + min(key + 3u, last_key) * kv_step;
        var score: array<vec4<f32>, ROWS>;
        for (var r = 0u; r < ROWS; r++) {
            score[r] = vec4<f32>(0.0);
        }
        for (var b = 0u; b < BLOCKS; b++) {
            for (var d = 0u; d < BLOCK; d++) {
                let x0 = k4(k0, b * BLOCK + d);
                let x1 = k4(k1, b * BLOCK + d);
                let x2 = k4(k2, b * BLOCK + d);
                let x3 = k4(k3, b * BLOCK + d);
                for (var r = 0u; r < ROWS; r++) {
                    let y = query[b][d][r];
                    score[r] += vec4<f32>(dot(x0, y), dot(x1, y), dot(x2, y), dot(x3, y));
                }
            }
        }
        var tile_bits = vec4<u32>(0xffffffffu);
        if p.has_key_bits != 0u {
            let base = group.z * p.keys;
            tile_bits = vec4<u32>(
                key_bits[base + key],
                key_bits[base + min(key + 1u, last_key)],
                key_bits[base + min(key + 2u, last_key)],
                key_bits[base + min(key + 3u, last_key)],
            );
        }
        let places = vec4<u32>(key) + vec4<u32>(0u, 1u, 2u, 3u);
        var old: array<f32, ROWS>;
        for (var r = 0u; r < ROWS; r++) {
            let seen = (places < vec4<u32>(visible[r]))
                & ((tile_bits & vec4<u32>(bits[r])) != vec4<u32>(0u));
            let s = select(vec4<f32>(NOTHING), score[r], seen);
            let next = max(peak[r], max(max(s.x, s.y), max(s.z, s.w)));
            old[r] = exp(peak[r] - next);
            peak[r] = next;
            score[r] = select(vec4<f32>(0.0), exp(s - next), seen);
            sum[r] = sum[r] * old[r] + (score[r].x + score[r].y) + (score[r].z + score[r].w);
        }
        for (var b = 0u; b < BLOCKS; b++) {
            for (var d = 0u; d < BLOCK; d++) {
                let x0 = v4(k0, b * BLOCK + d);
                let x1 = v4(k1, b * BLOCK + d);
                let x2 = v4(k2, b * BLOCK + d);
                let x3 = v4(k3, b * BLOCK + d);
                for (var r = 0u; r < ROWS; r++) {
                    let s = score[r];
                    sum_of_values[b][d][r] = sum_of_values[b][d][r] * old[r]
                        + ((x0 * s.x + x1 * s.y) + (x2 * s.z + x3 * s.w));
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
