// Flash attention for GPUs: tiles of 32 query rows × 32 keys in shared memory, 64 threads, each
// with 4 × 4 scores of a tile. PASS:
// 0: forward: out and the log-sum-exp; a workgroup 32 query rows, keys tile by tile.
// 1: dQ = scale Σ dS k, dS = P (dO·v − delta), P = exp(scale q·k − lse); likewise.
// 2: dK = scale Σ dS q and dV = Σ P dO; a workgroup 32 keys, query rows tile by tile.
// Layouts, and the order of query rows, as in attention.wgsl and attention_backward.wgsl.
#import attention_mask::{Params, NOTHING, visible_keys, first_query, row_visible, query_head, key_head, row_at}

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
const TILE: u32 = 32u;
// A head is read in chunks of 32 elements: 8 vec4.
const CHUNKS: u32 = (D + 31u) / 32u;
// Row lengths in shared memory: one more than a chunk or a tile, against bank conflicts.
const CHUNK_STEP: u32 = 9u;
const TILE_STEP: u32 = 33u;
// A thread's part of a head of its 4 rows: one vec4 of each chunk.
alias Head = array<array<vec4<f32>, 4>, CHUNKS>;

@group(0) @binding(0) var<storage, read> q: array<Stored>;
@group(0) @binding(1) var<storage, read> k: array<Stored>;
@group(0) @binding(2) var<storage, read> v: array<Stored>;
@group(0) @binding(3) var<storage, read> query_bits: array<u32>;
@group(0) @binding(4) var<storage, read> key_bits: array<u32>;
#if PASS == 0
@group(0) @binding(5) var<storage, read_write> out: array<Stored>;
@group(0) @binding(6) var<storage, read_write> lse: array<f32>;
#else
@group(0) @binding(5) var<storage, read> dout: array<Stored>;
@group(0) @binding(6) var<storage, read> lse: array<f32>;
@group(0) @binding(7) var<storage, read> delta: array<f32>;
@group(0) @binding(8) var<storage, read_write> out: array<Stored>;
#endif
#if PASS == 2
@group(0) @binding(9) var<storage, read_write> out_v: array<Stored>;
#endif
var<immediate> p: Params;

// A chunk of the workgroup's own 32 rows, a chunk of the other 32, and the tile of P or dS.
var<workgroup> own: array<vec4<f32>, 288>;
var<workgroup> other: array<vec4<f32>, 288>;
var<workgroup> weights: array<f32, 1056>;
#if PASS == 0
var<workgroup> partial: array<f32, 256>;
#endif

// First element of a query row's head, and of a key's head.
fn query_at(b: u32, kv_head: u32, row: u32) -> u32 {
    return query_head(p, b, kv_head, row) * D;
}
fn key_at(b: u32, kv_head: u32, key: u32) -> u32 {
    return key_head(p, b, kv_head, key) * D;
}

// Mask bits of a row and of a key.
fn row_bits(b: u32, row: u32) -> u32 {
    let token = min(row / (p.heads / p.kv_heads), p.queries - 1u);
    if p.has_query_bits != 0u {
        return query_bits[b * p.queries + token];
    }
    return 0xffffffffu;
}
fn bits_of_key(b: u32, key: u32) -> u32 {
    if p.has_key_bits != 0u {
        return key_bits[b * p.keys + min(key, p.keys - 1u)];
    }
    return 0xffffffffu;
}

const Q: u32 = 0u;
const K: u32 = 1u;
const V: u32 = 2u;
const DOUT: u32 = 3u;

fn stored(which: u32, i: u32) -> Stored {
    if which == Q {
        return q[i];
    }
    if which == K {
        return k[i];
    }
#if PASS > 0
    if which == DOUT {
        return dout[i];
    }
#endif
    return v[i];
}

// Elements 4d .. 4d + 4 of the head of `row` in q, k, v or dout; zeros past the ends.
fn fetch(which: u32, b: u32, kv_head: u32, row: u32, d: u32) -> vec4<f32> {
    let queries = which == Q || which == DOUT;
    let end = select(p.keys, p.queries * (p.heads / p.kv_heads), queries);
    if row >= end || 4u * d >= D {
        return vec4<f32>(0.0);
    }
    var base: u32;
    if queries {
        base = query_at(b, kv_head, row);
    } else {
        base = key_at(b, kv_head, row);
    }
#ifdef VEC4
    return vec4<f32>(stored(which, base / 4u + d));
#else
    var x = vec4<f32>(0.0);
    for (var i = 0u; i < 4u; i++) {
        if 4u * d + i < D {
            x[i] = f32(stored(which, base + 4u * d + i));
        }
    }
    return x;
#endif
}

// Chunk c of 32 rows from `first` on, into shared memory.
fn load_own(which: u32, group: vec3<u32>, first: u32, c: u32, local: u32) {
    for (var i = local; i < 256u; i += 64u) {
        own[i / 8u * CHUNK_STEP + i % 8u] = fetch(which, group.z, group.y, first + i / 8u, c * 8u + i % 8u);
    }
}
fn load_other(which: u32, group: vec3<u32>, first: u32, c: u32, local: u32) {
    for (var i = local; i < 256u; i += 64u) {
        other[i / 8u * CHUNK_STEP + i % 8u] = fetch(which, group.z, group.y, first + i / 8u, c * 8u + i % 8u);
    }
}

// Dot products of 4 own with 4 other rows: own row y + 8i in element i, other x + 8j in component j.
fn tile_product(
    own_which: u32,
    own_first: u32,
    other_which: u32,
    other_first: u32,
    group: vec3<u32>,
    local: u32,
) -> array<vec4<f32>, 4> {
    let x = local % 8u;
    let y = local / 8u;
    var sums: array<vec4<f32>, 4>;
    for (var i = 0u; i < 4u; i++) {
        sums[i] = vec4<f32>(0.0);
    }
    for (var c = 0u; c < CHUNKS; c++) {
        workgroupBarrier();
        load_own(own_which, group, own_first, c, local);
        load_other(other_which, group, other_first, c, local);
        workgroupBarrier();
        for (var d = 0u; d < 8u; d++) {
            let r0 = other[x * CHUNK_STEP + d];
            let r1 = other[(x + 8u) * CHUNK_STEP + d];
            let r2 = other[(x + 16u) * CHUNK_STEP + d];
            let r3 = other[(x + 24u) * CHUNK_STEP + d];
            for (var i = 0u; i < 4u; i++) {
                let l = own[(y + 8u * i) * CHUNK_STEP + d];
                sums[i] += vec4<f32>(dot(l, r0), dot(l, r1), dot(l, r2), dot(l, r3));
            }
        }
    }
    return sums;
}

fn store_weights(values: array<vec4<f32>, 4>, local: u32) {
    for (var i = 0u; i < 4u; i++) {
        for (var j = 0u; j < 4u; j++) {
            weights[(local / 8u + 8u * i) * TILE_STEP + local % 8u + 8u * j] = values[i][j];
        }
    }
}

// Adds weights · the other rows to a thread's part of its 4 rows.
fn add_weighted(
    sums: ptr<function, Head>,
    which: u32,
    first: u32,
    group: vec3<u32>,
    local: u32,
) {
    let x = local % 8u;
    let y = local / 8u;
    for (var c = 0u; c < CHUNKS; c++) {
        workgroupBarrier();
        load_other(which, group, first, c, local);
        workgroupBarrier();
        for (var j = 0u; j < TILE; j++) {
            let r = other[j * CHUNK_STEP + x];
            for (var i = 0u; i < 4u; i++) {
                (*sums)[c][i] += weights[(y + 8u * i) * TILE_STEP + j] * r;
            }
        }
    }
}

fn cleared() -> Head {
    var sums: Head;
    for (var c = 0u; c < CHUNKS; c++) {
        for (var i = 0u; i < 4u; i++) {
            sums[c][i] = vec4<f32>(0.0);
        }
    }
    return sums;
}

fn store(base: u32, d: u32, x: vec4<f32>) {
#ifdef VEC4
    if 4u * d < D {
        out[base / 4u + d] = Elem4(x);
    }
#else
    for (var i = 0u; i < 4u; i++) {
        if 4u * d + i < D {
            out[base + 4u * d + i] = Elem(x[i]);
        }
    }
#endif
}

#if PASS < 2
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let shared_heads = p.heads / p.kv_heads;
    let rows = p.queries * shared_heads;
    let first = group.x * TILE;
    let x = local % 8u;
    let y = local / 8u;
    var visible: array<u32, 4>;
    var bits: array<u32, 4>;
    for (var i = 0u; i < 4u; i++) {
        visible[i] = row_visible(p, first + y + 8u * i);
        bits[i] = row_bits(group.z, first + y + 8u * i);
    }
    var sums = cleared();
#if PASS == 0
    var peak: array<f32, 4>;
    var sum: array<f32, 4>;
    for (var i = 0u; i < 4u; i++) {
        peak[i] = NOTHING;
        sum[i] = 0.0;
    }
#else
    var row_lse: array<f32, 4>;
    var row_delta: array<f32, 4>;
    for (var i = 0u; i < 4u; i++) {
        let at = row_at(p, group.z, group.y, min(first + y + 8u * i, rows - 1u));
        row_lse[i] = lse[at];
        row_delta[i] = delta[at];
    }
#endif

    // No row of this workgroup sees a key past its last row's.
    let end = visible_keys(p, (min(first + TILE, rows) - 1u) / shared_heads);
    for (var key = 0u; key < end; key += TILE) {
        var tile = tile_product(Q, first, K, key, group, local);
        let places = vec4<u32>(key + x) + vec4<u32>(0u, 8u, 16u, 24u);
        let key_mask = vec4<u32>(
            bits_of_key(group.z, places.x),
            bits_of_key(group.z, places.y),
            bits_of_key(group.z, places.z),
            bits_of_key(group.z, places.w),
        );
        var seen: array<vec4<bool>, 4>;
        for (var i = 0u; i < 4u; i++) {
            seen[i] = (places < vec4<u32>(visible[i])) & ((key_mask & vec4<u32>(bits[i])) != vec4<u32>(0u));
            tile[i] = select(vec4<f32>(NOTHING), tile[i] * p.scale, seen[i]);
        }
#if PASS == 0
        for (var i = 0u; i < 4u; i++) {
            let s = tile[i];
            partial[(y + 8u * i) * 8u + x] = max(max(s.x, s.y), max(s.z, s.w));
        }
        workgroupBarrier();
        for (var i = 0u; i < 4u; i++) {
            var next = peak[i];
            for (var j = 0u; j < 8u; j++) {
                next = max(next, partial[(y + 8u * i) * 8u + j]);
            }
            let old = exp(peak[i] - next);
            peak[i] = next;
            let w = select(vec4<f32>(0.0), exp(tile[i] - next), seen[i]);
            tile[i] = w;
            sum[i] = sum[i] * old + (w.x + w.y) + (w.z + w.w);
            for (var c = 0u; c < CHUNKS; c++) {
                sums[c][i] *= old;
            }
        }
        store_weights(tile, local);
        add_weighted(&sums, V, key, group, local);
#else
        let dp = tile_product(DOUT, first, V, key, group, local);
        for (var i = 0u; i < 4u; i++) {
            let weight = select(vec4<f32>(0.0), exp(tile[i] - row_lse[i]), seen[i]);
            tile[i] = weight * (dp[i] - row_delta[i]);
        }
        store_weights(tile, local);
        add_weighted(&sums, K, key, group, local);
#endif
    }

#if PASS == 0
    // Each thread has summed its own keys only.
    workgroupBarrier();
    for (var i = 0u; i < 4u; i++) {
        partial[(y + 8u * i) * 8u + x] = sum[i];
    }
    workgroupBarrier();
    for (var i = 0u; i < 4u; i++) {
        var total = 0.0;
        for (var j = 0u; j < 8u; j++) {
            total += partial[(y + 8u * i) * 8u + j];
        }
        sum[i] = total;
    }
#endif
    for (var i = 0u; i < 4u; i++) {
        let row = first + y + 8u * i;
        if row < rows {
#if PASS == 0
            // A row that sees no key: zeros, and NOTHING as its log-sum-exp.
            let factor = select(0.0, 1.0 / sum[i], sum[i] > 0.0);
            if x == 0u {
                let at = row_at(p, group.z, group.y, row);
                lse[at] = select(NOTHING, peak[i] + log(sum[i]), sum[i] > 0.0);
            }
#else
            let factor = p.scale;
#endif
            for (var c = 0u; c < CHUNKS; c++) {
                store(query_at(group.z, group.y, row), c * 8u + x, sums[c][i] * factor);
            }
        }
    }
}
#else
fn store_v(base: u32, d: u32, x: vec4<f32>) {
#ifdef VEC4
    if 4u * d < D {
        out_v[base / 4u + d] = Elem4(x);
    }
#else
    for (var i = 0u; i < 4u; i++) {
        if 4u * d + i < D {
            out_v[base + 4u * d + i] = Elem(x[i]);
        }
    }
#endif
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let shared_heads = p.heads / p.kv_heads;
    let rows = p.queries * shared_heads;
    let first = group.x * TILE;
    let x = local % 8u;
    let y = local / 8u;
    var bits: array<u32, 4>;
    for (var i = 0u; i < 4u; i++) {
        bits[i] = bits_of_key(group.z, first + y + 8u * i);
    }
    var dkey = cleared();
    var dvalue = cleared();

    // Rows before the first that sees this workgroup's first key see none of its keys.
    for (var row = first_query(p, first) * shared_heads; row < rows; row += TILE) {
        var tile = tile_product(K, first, Q, row, group, local);
        var dscore = tile_product(V, first, DOUT, row, group, local);
        for (var j = 0u; j < 4u; j++) {
            let other_row = row + x + 8u * j;
            let at = row_at(p, group.z, group.y, min(other_row, rows - 1u));
            let visible = row_visible(p, other_row);
            let mask = row_bits(group.z, other_row);
            for (var i = 0u; i < 4u; i++) {
                let seen = first + y + 8u * i < visible && (mask & bits[i]) != 0u;
                let weight = select(0.0, exp(tile[i][j] * p.scale - lse[at]), seen);
                tile[i][j] = weight;
                dscore[i][j] = weight * (dscore[i][j] - delta[at]);
            }
        }
        store_weights(tile, local);
        add_weighted(&dvalue, DOUT, row, group, local);
        // Everyone has read P before dS takes its place.
        workgroupBarrier();
        store_weights(dscore, local);
        add_weighted(&dkey, Q, row, group, local);
    }

    for (var i = 0u; i < 4u; i++) {
        let key = first + y + 8u * i;
        if key < p.keys {
            let base = key_at(group.z, group.y, key);
            for (var c = 0u; c < CHUNKS; c++) {
                store(base, c * 8u + x, dkey[c][i] * p.scale);
                store_v(base, c * 8u + x, dvalue[c][i]);
            }
        }
    }
}
#endif
