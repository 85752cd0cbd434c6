// Flash attention backward for CPU drivers. With P = exp(scale q·k − lse) and dS = P (dO·v − delta):
// PASS 1: dQ = scale Σ dS k, query rows in the lanes, keys uniform;
// PASS 2: dK = scale Σ dS q and dV = Σ P dO, keys in the lanes, query rows uniform.
// Query rows in the order of attention.wgsl. lse and delta f32 [B, H, T].
#import attention_mask::{Params, visible_keys, first_query}

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
// Rows (PASS 1) or keys (PASS 2) a thread.
const ROWS: u32 = #{ROWS}u;
const BLOCKS: u32 = #{BLOCKS}u;
const BLOCK: u32 = #{BLOCK}u;
alias Head = array<array<array<vec4<f32>, ROWS>, BLOCK>, BLOCKS>;

@group(0) @binding(0) var<storage, read> q: array<Stored>;
@group(0) @binding(1) var<storage, read> k: array<Stored>;
@group(0) @binding(2) var<storage, read> v: array<Stored>;
@group(0) @binding(3) var<storage, read> query_bits: array<u32>;
@group(0) @binding(4) var<storage, read> key_bits: array<u32>;
@group(0) @binding(5) var<storage, read> dout: array<Stored>;
@group(0) @binding(6) var<storage, read> lse: array<f32>;
@group(0) @binding(7) var<storage, read> delta: array<f32>;
#if PASS == 1
@group(0) @binding(8) var<storage, read_write> dq: array<Stored>;
#else
@group(0) @binding(8) var<storage, read_write> dk: array<Stored>;
@group(0) @binding(9) var<storage, read_write> dv: array<Stored>;
#endif
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
fn do4(base: u32, d: u32) -> vec4<f32> {
    if 4u * d >= D {
        return vec4<f32>(0.0);
    }
    return vec4<f32>(dout[base / 4u + d]);
}
#if PASS == 1
fn store_dq(base: u32, d: u32, x: vec4<f32>) {
    if 4u * d < D {
        dq[base / 4u + d] = Elem4(x);
    }
}
#else
fn store_dk(base: u32, d: u32, x: vec4<f32>) {
    if 4u * d < D {
        dk[base / 4u + d] = Elem4(x);
    }
}
fn store_dv(base: u32, d: u32, x: vec4<f32>) {
    if 4u * d < D {
        dv[base / 4u + d] = Elem4(x);
    }
}
#endif
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
fn do4(base: u32, d: u32) -> vec4<f32> {
    var x = vec4<f32>(0.0);
    for (var i = 0u; i < 4u; i++) {
        if 4u * d + i < D {
            x[i] = f32(dout[base + 4u * d + i]);
        }
    }
    return x;
}
#if PASS == 1
fn store_dq(base: u32, d: u32, x: vec4<f32>) {
    for (var i = 0u; i < 4u; i++) {
        if 4u * d + i < D {
            dq[base + 4u * d + i] = Elem(x[i]);
        }
    }
}
#else
fn store_dk(base: u32, d: u32, x: vec4<f32>) {
    for (var i = 0u; i < 4u; i++) {
        if 4u * d + i < D {
            dk[base + 4u * d + i] = Elem(x[i]);
        }
    }
}
fn store_dv(base: u32, d: u32, x: vec4<f32>) {
    for (var i = 0u; i < 4u; i++) {
        if 4u * d + i < D {
            dv[base + 4u * d + i] = Elem(x[i]);
        }
    }
}
#endif
#endif

#if PASS == 1
@compute @workgroup_size(#{WG})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let shared_heads = p.heads / p.kv_heads;
    let rows = p.queries * shared_heads;
    let first = group.x * ROWS * #{WG}u;
    let kv_base = group.z * p.keys * p.kv_heads * D + group.y * D;
    let kv_step = p.kv_heads * D;

    var bases: array<u32, ROWS>;
    var visible: array<u32, ROWS>;
    var bits: array<u32, ROWS>;
    var row_lse: array<f32, ROWS>;
    var row_delta: array<f32, ROWS>;
    var query: Head;
    var upstream: Head;
    var gradient: Head;
    for (var r = 0u; r < ROWS; r++) {
        let row = min(first + r * #{WG}u + local, rows - 1u);
        let token = row / shared_heads;
        let head = group.y * shared_heads + row % shared_heads;
        bases[r] = ((group.z * p.queries + token) * p.heads + head) * D;
        visible[r] = visible_keys(p, token);
        bits[r] = 0xffffffffu;
        if p.has_query_bits != 0u {
            bits[r] = query_bits[group.z * p.queries + token];
        }
        let at = (group.z * p.heads + head) * p.queries + token;
        row_lse[r] = lse[at];
        row_delta[r] = delta[at];
    }
    for (var b = 0u; b < BLOCKS; b++) {
        for (var d = 0u; d < BLOCK; d++) {
            for (var r = 0u; r < ROWS; r++) {
                query[b][d][r] = q4(bases[r], b * BLOCK + d) * p.scale;
                upstream[b][d][r] = do4(bases[r], b * BLOCK + d);
                gradient[b][d][r] = vec4<f32>(0.0);
            }
        }
    }

    let last_token = min(first + ROWS * #{WG}u, rows) - 1u;
    let end = visible_keys(p, last_token / shared_heads);
    for (var key = 0u; key < end; key += 4u) {
        let last_key = p.keys - 1u;
        let k0 = kv_base + key * kv_step;
        let k1 = kv_base + min(key + 1u, last_key) * kv_step;
        let k2 = kv_base + min(key + 2u, last_key) * kv_step;
        let k3 = kv_base + min(key + 3u, last_key) * kv_step;
        var score: array<vec4<f32>, ROWS>;
        var dscore: array<vec4<f32>, ROWS>;
        for (var r = 0u; r < ROWS; r++) {
            score[r] = vec4<f32>(0.0);
            dscore[r] = vec4<f32>(-row_delta[r]);
        }
        for (var b = 0u; b < BLOCKS; b++) {
            for (var d = 0u; d < BLOCK; d++) {
                let x0 = k4(k0, b * BLOCK + d);
                let x1 = k4(k1, b * BLOCK + d);
                let x2 = k4(k2, b * BLOCK + d);
                let x3 = k4(k3, b * BLOCK + d);
                let z0 = v4(k0, b * BLOCK + d);
                let z1 = v4(k1, b * BLOCK + d);
                let z2 = v4(k2, b * BLOCK + d);
                let z3 = v4(k3, b * BLOCK + d);
                for (var r = 0u; r < ROWS; r++) {
                    let y = query[b][d][r];
                    score[r] += vec4<f32>(dot(x0, y), dot(x1, y), dot(x2, y), dot(x3, y));
                    let g = upstream[b][d][r];
                    dscore[r] += vec4<f32>(dot(z0, g), dot(z1, g), dot(z2, g), dot(z3, g));
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
        for (var r = 0u; r < ROWS; r++) {
            let seen = (places < vec4<u32>(visible[r]))
                & ((tile_bits & vec4<u32>(bits[r])) != vec4<u32>(0u));
            dscore[r] *= select(vec4<f32>(0.0), exp(score[r] - row_lse[r]), seen);
        }
        for (var b = 0u; b < BLOCKS; b++) {
            for (var d = 0u; d < BLOCK; d++) {
                let x0 = k4(k0, b * BLOCK + d);
                let x1 = k4(k1, b * BLOCK + d);
                let x2 = k4(k2, b * BLOCK + d);
                let x3 = k4(k3, b * BLOCK + d);
                for (var r = 0u; r < ROWS; r++) {
                    let s = dscore[r];
                    gradient[b][d][r] += (x0 * s.x + x1 * s.y) + (x2 * s.z + x3 * s.w);
                }
            }
        }
    }

    for (var r = 0u; r < ROWS; r++) {
        if first + r * #{WG}u + local < rows {
            for (var b = 0u; b < BLOCKS; b++) {
                for (var d = 0u; d < BLOCK; d++) {
                    store_dq(bases[r], b * BLOCK + d, gradient[b][d][r] * p.scale);
                }
            }
        }
    }
}
#else
@compute @workgroup_size(#{WG})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let shared_heads = p.heads / p.kv_heads;
    let rows = p.queries * shared_heads;
    let first = group.x * ROWS * #{WG}u;

    var keys: array<u32, ROWS>;
    var bases: array<u32, ROWS>;
    var bits: array<u32, ROWS>;
    var key: Head;
    var value: Head;
    var dkey: Head;
    var dvalue: Head;
    for (var r = 0u; r < ROWS; r++) {
        keys[r] = min(first + r * #{WG}u + local, p.keys - 1u);
        bases[r] = ((group.z * p.keys + keys[r]) * p.kv_heads + group.y) * D;
        bits[r] = 0xffffffffu;
        if p.has_key_bits != 0u {
            bits[r] = key_bits[group.z * p.keys + keys[r]];
        }
    }
    for (var b = 0u; b < BLOCKS; b++) {
        for (var d = 0u; d < BLOCK; d++) {
            for (var r = 0u; r < ROWS; r++) {
                key[b][d][r] = k4(bases[r], b * BLOCK + d) * p.scale;
                value[b][d][r] = v4(bases[r], b * BLOCK + d);
                dkey[b][d][r] = vec4<f32>(0.0);
                dvalue[b][d][r] = vec4<f32>(0.0);
            }
        }
    }

    // Rows before the first that sees this workgroup's first key see none of its keys.
    let start = first_query(p, first) * shared_heads;
    for (var row = start; row < rows; row += 2u) {
        var at: array<u32, 2>;
        var visible: array<u32, 2>;
        var query_mask: array<u32, 2>;
        var row_lse: array<f32, 2>;
        var row_delta: array<f32, 2>;
        for (var j = 0u; j < 2u; j++) {
            let index = min(row + j, rows - 1u);
            let token = index / shared_heads;
            let head = group.y * shared_heads + index % shared_heads;
            at[j] = ((group.z * p.queries + token) * p.heads + head) * D;
            // The row past the end sees nothing.
            visible[j] = select(0u, visible_keys(p, token), row + j < rows);
            query_mask[j] = 0xffffffffu;
            if p.has_query_bits != 0u {
                query_mask[j] = query_bits[group.z * p.queries + token];
            }
            let place = (group.z * p.heads + head) * p.queries + token;
            row_lse[j] = lse[place];
            row_delta[j] = delta[place];
        }
        var score: array<vec2<f32>, ROWS>;
        var dscore: array<vec2<f32>, ROWS>;
        for (var r = 0u; r < ROWS; r++) {
            score[r] = vec2<f32>(0.0);
            dscore[r] = vec2<f32>(-row_delta[0], -row_delta[1]);
        }
        for (var b = 0u; b < BLOCKS; b++) {
            for (var d = 0u; d < BLOCK; d++) {
                let x0 = q4(at[0], b * BLOCK + d);
                let x1 = q4(at[1], b * BLOCK + d);
                let g0 = do4(at[0], b * BLOCK + d);
                let g1 = do4(at[1], b * BLOCK + d);
                for (var r = 0u; r < ROWS; r++) {
                    let y = key[b][d][r];
                    score[r] += vec2<f32>(dot(x0, y), dot(x1, y));
                    let z = value[b][d][r];
                    dscore[r] += vec2<f32>(dot(g0, z), dot(g1, z));
                }
            }
        }
        for (var r = 0u; r < ROWS; r++) {
            let seen = (vec2<u32>(keys[r]) < vec2<u32>(visible[0], visible[1]))
                & ((vec2<u32>(query_mask[0], query_mask[1]) & vec2<u32>(bits[r])) != vec2<u32>(0u));
            let shifted = exp(score[r] - vec2<f32>(row_lse[0], row_lse[1]));
            score[r] = select(vec2<f32>(0.0), shifted, seen);
            dscore[r] *= score[r];
        }
        for (var b = 0u; b < BLOCKS; b++) {
            for (var d = 0u; d < BLOCK; d++) {
                let x0 = q4(at[0], b * BLOCK + d);
                let x1 = q4(at[1], b * BLOCK + d);
                let g0 = do4(at[0], b * BLOCK + d);
                let g1 = do4(at[1], b * BLOCK + d);
                for (var r = 0u; r < ROWS; r++) {
                    dkey[b][d][r] += x0 * dscore[r].x + x1 * dscore[r].y;
                    dvalue[b][d][r] += g0 * score[r].x + g1 * score[r].y;
                }
            }
        }
    }

    for (var r = 0u; r < ROWS; r++) {
        if first + r * #{WG}u + local < p.keys {
            for (var b = 0u; b < BLOCKS; b++) {
                for (var d = 0u; d < BLOCK; d++) {
                    store_dk(bases[r], b * BLOCK + d, dkey[b][d][r] * p.scale);
                    store_dv(bases[r], b * BLOCK + d, dvalue[b][d][r]);
                }
            }
        }
    }
}
#endif
