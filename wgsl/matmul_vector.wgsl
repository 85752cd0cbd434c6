// c = ended(activation(a·bᵀ + bias)) for few rows of a: b is read once, along its rows. LANES
// threads share a row of b: 1 on drivers that run on the CPU, 32 (coalesced, added through shared
// memory) on GPUs.
#import activation::{activation, ended}
#ifdef QUANTIZED
#import quantized::{quad, quad_word, scale_word}
#endif

#ifdef A_F16
alias AElem4 = vec4<f16>;
#else
alias AElem4 = vec4<f32>;
#endif
#ifdef C_F16
alias CElem = f16;
#else
alias CElem = f32;
#endif

struct Params {
    m: u32,
    n: u32,
    // In vec4s, as all that tells of a and b.
    k: u32,
    ldb: u32,
    a_start: u32,
    b_start: u32,
    ldc: u32,
    c_start: u32,
    bias_start: u32,
    has_bias: u32,
    ending: u32,
    function: u32,
    fa: f32,
    fb: f32,
}

@group(0) @binding(0) var<storage, read> a: array<AElem4>;
#ifdef QUANTIZED
@group(0) @binding(1) var<storage, read> b: array<u32>;
@group(0) @binding(5) var<storage, read> scales: array<u32>;
#else
#ifdef B_BF16
@group(0) @binding(1) var<storage, read> b: array<vec2<u32>>;
#else
#ifdef B_F16
@group(0) @binding(1) var<storage, read> b: array<vec4<f16>>;
#else
@group(0) @binding(1) var<storage, read> b: array<vec4<f32>>;
#endif
#endif
#endif
@group(0) @binding(2) var<storage, read_write> c: array<CElem>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<storage, read> other: array<CElem>;
var<immediate> p: Params;

const ROWS = #{ROWS}u;
const LANES = #{LANES}u;
const COLUMNS = 8u;

#if LANES != 1
var<workgroup> partial: array<f32, ROWS * COLUMNS * LANES>;
#endif

fn load_b(i: u32) -> vec4<f32> {
#ifdef QUANTIZED
    return quad(i, b[quad_word(i)], scales[scale_word(i)]);
#else
#ifdef B_BF16
    let v = b[i];
    return bitcast<vec4<f32>>(vec4<u32>(v.x << 16u, v.x & 0xffff0000u, v.y << 16u, v.y & 0xffff0000u));
#else
    return vec4<f32>(b[i]);
#endif
#endif
}

fn store(row: u32, col: u32, sum: f32) {
    if row >= p.m || col >= p.n {
        return;
    }
    let at = p.c_start + row * p.ldc + col;
    var v = sum;
    if p.has_bias != 0u {
        v += bias[p.bias_start + col];
    }
    v = activation(p.function, p.fa, p.fb, v);
    if p.ending != 0u {
        v = ended(p.ending, f32(other[at]), v, f32(CElem(v)));
    }
    c[at] = CElem(v);
}

@compute @workgroup_size(#{THREADS})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let slot = local / LANES;
    let lane = local % LANES;
    let col = (group.y * groups.x + group.x) * COLUMNS + slot;
    let b0 = p.b_start + min(col, p.n - 1u) * p.ldb;
    var sum: array<f32, ROWS>;
    for (var k = lane; k < p.k; k += LANES) {
        let bv = load_b(b0 + k);
        for (var r = 0u; r < ROWS; r++) {
            // Rows past the end repeat the last one; they are not stored.
            sum[r] += dot(vec4<f32>(a[p.a_start + min(r, p.m - 1u) * p.k + k]), bv);
        }
    }
#if LANES == 1
    for (var r = 0u; r < ROWS; r++) {
        store(r, col, sum[r]);
    }
#else
    for (var r = 0u; r < ROWS; r++) {
        partial[(r * COLUMNS + slot) * LANES + lane] = sum[r];
    }
    workgroupBarrier();
    // One thread a result adds its lanes in order.
    if local < ROWS * COLUMNS {
        var total = 0.0;
        for (var i = 0u; i < LANES; i++) {
            total += partial[local * LANES + i];
        }
        store(local / COLUMNS, (group.y * groups.x + group.x) * COLUMNS + local % COLUMNS, total);
    }
#endif
}
