// Chosen rows × columns of the attention probabilities, and what their gradient adds. PASS:
// 0: probs[r, h, c] = exp(scale q·k − lse), 0 where masked; a thread a column, keys in registers.
// 1: delta[b, h, t] += Σ_c dprobs · probs of the rows r that tap token t.
// 2: dq[row] += scale Σ_c probs dprobs k; a workgroup a tapped row and head.
// 3: dk[column] += scale Σ_r probs dprobs q; a workgroup a tapped column and key/value head.
// A row or column named more than once is summed by its first mention, so no two threads add to
// one element. Rows and columns past the end tap nothing: probabilities 0.
#import attention_mask::{Params, visible_keys}
#import index::thread_index

#ifdef F16
alias Elem = f16;
alias Elem4 = vec4<f16>;
#else
alias Elem = f32;
alias Elem4 = vec4<f32>;
#endif

const D: u32 = #{D}u;

var<immediate> p: Params;
@group(0) @binding(0) var<storage, read> query_rows: array<u32>;
@group(0) @binding(1) var<storage, read> key_columns: array<u32>;
#if PASS == 0
#ifdef VEC4
alias Stored = Elem4;
#else
alias Stored = Elem;
#endif
const BLOCKS: u32 = #{BLOCKS}u;
const BLOCK: u32 = #{BLOCK}u;

@group(0) @binding(2) var<storage, read> q: array<Stored>;
@group(0) @binding(3) var<storage, read> k: array<Stored>;
@group(0) @binding(4) var<storage, read> query_bits: array<u32>;
@group(0) @binding(5) var<storage, read> key_bits: array<u32>;
@group(0) @binding(6) var<storage, read> lse: array<f32>;
@group(0) @binding(7) var<storage, read_write> probs: array<f32>;

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
    let head = group.y;
    let b = group.z;
    let column = group.x * #{WG}u + local;
    let wanted = key_columns[b * p.columns + min(column, p.columns - 1u)];
    let place = min(wanted, p.keys - 1u);
    let base = ((b * p.keys + place) * p.kv_heads + head / (p.heads / p.kv_heads)) * D;
    var bits = 0xffffffffu;
    if p.has_key_bits != 0u {
        bits = key_bits[b * p.keys + place];
    }
    var key: array<array<vec4<f32>, BLOCK>, BLOCKS>;
    for (var i = 0u; i < BLOCKS; i++) {
        for (var d = 0u; d < BLOCK; d++) {
            key[i][d] = k4(base, i * BLOCK + d) * p.scale;
        }
    }
    for (var r = 0u; r < p.rows; r++) {
        let row = query_rows[r];
        let valid = row < p.batch * p.queries;
        // Rows of other samples are other workgroups'; the first sample's also write the zeros.
        if select(0u, row / p.queries, valid) != b {
            continue;
        }
        let at = select(0u, row, valid);
        let token = at % p.queries;
        let query = (at * p.heads + head) * D;
        var score = 0.0;
        for (var i = 0u; i < BLOCKS; i++) {
            for (var d = 0u; d < BLOCK; d++) {
                score += dot(key[i][d], q4(query, i * BLOCK + d));
            }
        }
        var row_bits = bits;
        if p.has_query_bits != 0u {
            row_bits &= query_bits[at];
        }
        let seen = valid && wanted < visible_keys(p, token) && row_bits != 0u;
        if column < p.columns {
            let shift = lse[(b * p.heads + head) * p.queries + token];
            probs[(r * p.heads + head) * p.columns + column] = select(0.0, exp(score - shift), seen);
        }
    }
}
#else
@group(0) @binding(2) var<storage, read> probs: array<f32>;
@group(0) @binding(3) var<storage, read> dprobs: array<f32>;
#endif

#if PASS == 1
@group(0) @binding(4) var<storage, read_write> delta: array<f32>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = thread_index(group, groups, local, 64u);
    if i >= p.batch * p.queries * p.heads {
        return;
    }
    let head = i / p.queries % p.heads;
    let row = i / (p.heads * p.queries) * p.queries + i % p.queries;
    var sum = 0.0;
    for (var r = 0u; r < p.rows; r++) {
        if query_rows[r] == row {
            let base = (r * p.heads + head) * p.columns;
            for (var c = 0u; c < p.columns; c++) {
                sum += probs[base + c] * dprobs[base + c];
            }
        }
    }
    delta[i] += sum;
}
#endif

#if PASS == 2
@group(0) @binding(4) var<storage, read> k: array<Elem>;
@group(0) @binding(5) var<storage, read_write> dq: array<Elem>;

@compute @workgroup_size(#{WG})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let first = group.x;
    let head = group.y;
    let row = query_rows[first];
    if row >= p.batch * p.queries {
        return;
    }
    for (var r = 0u; r < first; r++) {
        if query_rows[r] == row {
            return;
        }
    }
    let b = row / p.queries;
    let kv_head = head / (p.heads / p.kv_heads);
    for (var d = local; d < D; d += #{WG}u) {
        var sum = 0.0;
        for (var r = first; r < p.rows; r++) {
            if query_rows[r] == row {
                let base = (r * p.heads + head) * p.columns;
                for (var c = 0u; c < p.columns; c++) {
                    let column = key_columns[b * p.columns + c];
                    if column < p.keys {
                        let weight = probs[base + c] * dprobs[base + c];
                        sum += weight * f32(k[((b * p.keys + column) * p.kv_heads + kv_head) * D + d]);
                    }
                }
            }
        }
        let at = (row * p.heads + head) * D + d;
        dq[at] = Elem(f32(dq[at]) + p.scale * sum);
    }
}
#endif

#if PASS == 3
@group(0) @binding(4) var<storage, read> q: array<Elem>;
@group(0) @binding(5) var<storage, read_write> dk: array<Elem>;

@compute @workgroup_size(#{WG})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let first = group.x;
    let kv_head = group.y;
    let b = group.z;
    let column = key_columns[b * p.columns + first];
    if column >= p.keys {
        return;
    }
    for (var c = 0u; c < first; c++) {
        if key_columns[b * p.columns + c] == column {
            return;
        }
    }
    let shared_heads = p.heads / p.kv_heads;
    for (var d = local; d < D; d += #{WG}u) {
        var sum = 0.0;
        for (var c = first; c < p.columns; c++) {
            if key_columns[b * p.columns + c] == column {
                for (var r = 0u; r < p.rows; r++) {
                    let row = query_rows[r];
                    if row < p.batch * p.queries && row / p.queries == b {
                        for (var g = 0u; g < shared_heads; g++) {
                            let head = kv_head * shared_heads + g;
                            let at = (r * p.heads + head) * p.columns + c;
                            sum += probs[at] * dprobs[at] * f32(q[(row * p.heads + head) * D + d]);
                        }
                    }
                }
            }
        }
        let at = ((b * p.keys + column) * p.kv_heads + kv_head) * D + d;
        dk[at] = Elem(f32(dk[at]) + p.scale * sum);
    }
}
#endif
