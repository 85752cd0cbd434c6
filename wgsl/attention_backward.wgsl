// Flash attention backward for CPU drivers. With P = exp(scale q·k − lse) and dS = P (dO·v − delta):
// PASS 1: dQ = scale Σ dS k, query rows in the lanes, keys the same for all;
// PASS 2: dK = scale Σ dS q and dV = Σ P dO, keys in the lanes, query rows the same for all.
// Query rows in the order of attention.wgsl. lse and delta f32 [B, H, T].
#import attention_mask::{Params, visible_keys, first_query}
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
// Rows (PASS 1) or keys (PASS 2) a thread.
const ROWS: u32 = #{ROWS}u;
alias Held = array<vec4<f32>, LOADS>;
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
    let lane = local % LANES;
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
        var keys: Held;
        var values: Held;
        for (var l = 0u; l < LOADS; l++) {
            keys[l] = k4(origin[l], (l * LANES + lane) % VECTORS);
            values[l] = v4(origin[l], (l * LANES + lane) % VECTORS);
        }
        var score: array<array<f32, STEP>, ROWS>;
        var dscore: array<array<f32, STEP>, ROWS>;
        for (var r = 0u; r < ROWS; r++) {
            for (var j = 0u; j < STEP; j++) {
                score[r][j] = -row_lse[r];
                dscore[r][j] = -row_delta[r];
            }
        }
        for (var b = 0u; b < BLOCKS; b++) {
            for (var d = 0u; d < BLOCK; d++) {
                for (var j = 0u; j < STEP; j++) {
                    let i = j * VECTORS + b * BLOCK + d;
                    let x = from_lane(keys[i / LANES], i % LANES);
                    let z = from_lane(values[i / LANES], i % LANES);
                    for (var r = 0u; r < ROWS; r++) {
                        score[r][j] += dot(x, query[b][d][r]);
                        dscore[r][j] += dot(z, upstream[b][d][r]);
                    }
                }
            }
        }
        for (var r = 0u; r < ROWS; r++) {
            for (var j = 0u; j < STEP; j++) {
                let seen = key + j < visible[r] && (mask[j] & bits[r]) != 0u;
                dscore[r][j] *= select(0.0, exp(score[r][j]), seen);
            }
        }
        for (var b = 0u; b < BLOCKS; b++) {
            for (var d = 0u; d < BLOCK; d++) {
                for (var j = 0u; j < STEP; j++) {
                    let i = j * VECTORS + b * BLOCK + d;
                    let x = from_lane(keys[i / LANES], i % LANES);
                    for (var r = 0u; r < ROWS; r++) {
                        gradient[b][d][r] += x * dscore[r][j];
                    }
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
    let lane = local % LANES;
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
    for (var row = start; row < rows; row += STEP) {
        var at: array<u32, STEP>;
        var visible: array<u32, STEP>;
        var mask: array<u32, STEP>;
        var score: array<array<f32, STEP>, ROWS>;
        var dscore: array<array<f32, STEP>, ROWS>;
        for (var j = 0u; j < STEP; j++) {
            let index = min(row + j, rows - 1u);
            let token = index / shared_heads;
            let head = group.y * shared_heads + index % shared_heads;
            at[j] = ((group.z * p.queries + token) * p.heads + head) * D;
            // The row past the end sees nothing.
            visible[j] = select(0u, visible_keys(p, token), row + j < rows);
            mask[j] = 0xffffffffu;
            if p.has_query_bits != 0u {
                mask[j] = query_bits[group.z * p.queries + token];
            }
            let place = (group.z * p.heads + head) * p.queries + token;
            for (var r = 0u; r < ROWS; r++) {
                score[r][j] = -lse[place];
                dscore[r][j] = -delta[place];
            }
        }
        let origin = origins(at, lane);
        var queries: Held;
        var upstream: Held;
        for (var l = 0u; l < LOADS; l++) {
            queries[l] = q4(origin[l], (l * LANES + lane) % VECTORS);
            upstream[l] = do4(origin[l], (l * LANES + lane) % VECTORS);
        }
        for (var b = 0u; b < BLOCKS; b++) {
            for (var d = 0u; d < BLOCK; d++) {
                for (var j = 0u; j < STEP; j++) {
                    let i = j * VECTORS + b * BLOCK + d;
                    let x = from_lane(queries[i / LANES], i % LANES);
                    let g = from_lane(upstream[i / LANES], i % LANES);
                    for (var r = 0u; r < ROWS; r++) {
                        score[r][j] += dot(x, key[b][d][r]);
                        dscore[r][j] += dot(g, value[b][d][r]);
                    }
                }
            }
        }
        for (var r = 0u; r < ROWS; r++) {
            for (var j = 0u; j < STEP; j++) {
                let seen = keys[r] < visible[j] && (mask[j] & bits[r]) != 0u;
                score[r][j] = select(0.0, exp(score[r][j]), seen);
                dscore[r][j] *= score[r][j];
            }
        }
        for (var b = 0u; b < BLOCKS; b++) {
            for (var d = 0u; d < BLOCK; d++) {
                for (var j = 0u; j < STEP; j++) {
                    let i = j * VECTORS + b * BLOCK + d;
                    let x = from_lane(queries[i / LANES], i % LANES);
                    let g = from_lane(upstream[i / LANES], i % LANES);
                    for (var r = 0u; r < ROWS; r++) {
                        dkey[b][d][r] += x * dscore[r][j];
                        dvalue[b][d][r] += g * score[r][j];
                    }
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
