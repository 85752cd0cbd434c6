// c = ended(activation(a·b + bias)) in registers alone: a subgroup sums 8 rows by 4 columns a thread, b's columns
// read by the threads that own them, a's elements by one thread each and handed round. No shared memory, no barrier,
// so subgroups of any size from 8 on share the workgroup's blocks among them.
#import activation::{activation, ended}
#ifdef QUANTIZED
#import quantized::{quad, quad_word, scale_word}
#endif

#ifdef A_F16
alias AElem = f16;
#else
alias AElem = f32;
#endif
#ifdef C_F16
alias CElem = f16;
#else
alias CElem = f32;
#endif

// As in matmul_tile.
struct Params {
    m: u32,
    n: u32,
    k: u32,
    lda: u32,
    ldb: u32,
    ldc: u32,
    a_batch: u32,
    b_batch: u32,
    c_batch: u32,
    a_start: u32,
    b_start: u32,
    c_start: u32,
    bias_start: u32,
    splits: u32,
    k_part: u32,
    has_bias: u32,
    ending: u32,
    function: u32,
    fa: f32,
    fb: f32,
}

// QUADS: a and b are read four elements at a time, which their strides allow.
#ifdef QUADS
@group(0) @binding(0) var<storage, read> a: array<vec4<AElem>>;
#else
@group(0) @binding(0) var<storage, read> a: array<AElem>;
#endif
#ifdef QUANTIZED
@group(0) @binding(1) var<storage, read> b: array<u32>;
@group(0) @binding(5) var<storage, read> scales: array<u32>;
#else
#ifdef B_BF16
#ifdef QUADS
@group(0) @binding(1) var<storage, read> b: array<vec2<u32>>;
#else
@group(0) @binding(1) var<storage, read> b: array<u32>;
#endif
#else
#ifdef B_F16
alias BElem = f16;
#else
alias BElem = f32;
#endif
#ifdef QUADS
@group(0) @binding(1) var<storage, read> b: array<vec4<BElem>>;
#else
@group(0) @binding(1) var<storage, read> b: array<BElem>;
#endif
#endif
#endif
@group(0) @binding(2) var<storage, read_write> c: array<CElem>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<storage, read> other: array<CElem>;
var<immediate> p: Params;

const ROWS = 8u;
const BLOCKS = 4u;
// Columns of a workgroup: four for each thread of the largest subgroup.
const WIDTH = #{WIDTH}u;

// Four elements from `at` on, of which `count` are in the matrix.
fn load_a(at: u32, count: u32) -> vec4<f32> {
    var v = vec4<f32>();
#ifdef QUADS
    if count > 0u {
        v = vec4<f32>(a[at / 4u]);
    }
#else
    for (var i = 0u; i < min(count, 4u); i++) {
        v[i] = f32(a[at + i]);
    }
#endif
    return v;
}

fn load_b(at: u32, count: u32) -> vec4<f32> {
    var v = vec4<f32>();
#ifdef QUANTIZED
    // Stored rows are padded with zeros to whole fours.
    if count > 0u {
        let i = at / 4u;
        v = quad(i, b[quad_word(i)], scales[scale_word(i)]);
    }
#else
#ifdef QUADS
    if count > 0u {
#ifdef B_BF16
        let w = b[at / 4u];
        v = bitcast<vec4<f32>>(vec4<u32>(w.x << 16u, w.x & 0xffff0000u, w.y << 16u, w.y & 0xffff0000u));
#else
        v = vec4<f32>(b[at / 4u]);
#endif
    }
#else
    for (var i = 0u; i < min(count, 4u); i++) {
#ifdef B_BF16
        let word = b[(at + i) >> 1u];
        v[i] = bitcast<f32>(select(word << 16u, word & 0xffff0000u, ((at + i) & 1u) == 1u));
#else
        v[i] = f32(b[at + i]);
#endif
    }
#endif
#endif
    return v;
}

// Four terms to the sums of a row: av runs along k, the columns' elements at each of its steps are given.
fn terms(sum: vec4<f32>, av: vec4<f32>, bv: mat4x4<f32>) -> vec4<f32> {
    let two = fma(vec4<f32>(av.y), bv[1], fma(vec4<f32>(av.x), bv[0], sum));
    return fma(vec4<f32>(av.w), bv[3], fma(vec4<f32>(av.z), bv[2], two));
}

@compute @workgroup_size(#{THREADS})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
    @builtin(subgroup_invocation_id) lane: u32,
    @builtin(subgroup_size) lanes: u32,
) {
    let batch = group.z / p.splits;
    let part = group.z % p.splits;
    let a0 = p.a_start + batch * p.a_batch;
    let b0 = p.b_start + batch * p.b_batch;
    let c0 = p.c_start + group.z * p.c_batch;
    let k_end = min(p.k, (part + 1u) * p.k_part);
    // Blocks of rows side by side: their subgroups read the same columns at about the same time.
    for (var block = subgroup; block < BLOCKS * WIDTH / (4u * lanes); block += subgroups) {
        let row0 = (group.y * BLOCKS + block % BLOCKS) * ROWS;
        let col0 = group.x * WIDTH + block / BLOCKS * 4u * lanes;
        // The thread's row of a; past the end the last again, and not stored.
        let a_row = min(row0 + lane % ROWS, p.m - 1u);
#ifdef TRANS_B
        // Columns lie apart by the subgroup's width, each read along k.
        let col = col0 + lane;
        let across = lanes;
#else
        let col = col0 + 4u * lane;
        let across = 1u;
#endif
        var sum: array<vec4<f32>, ROWS>;
        for (var k = part * p.k_part; k < k_end; k += 4u) {
            let left = k_end - k;
#ifdef TRANS_A
            var av = vec4<f32>();
            for (var i = 0u; i < min(left, 4u); i++) {
                let at = a0 + (k + i) * p.lda + a_row;
#ifdef QUADS
                av[i] = f32(a[at / 4u][at % 4u]);
#else
                av[i] = f32(a[at]);
#endif
            }
#else
            let av = load_a(a0 + a_row * p.lda + k, left);
#endif
            var bv: mat4x4<f32>;
#ifdef TRANS_B
            for (var j = 0u; j < 4u; j++) {
                bv[j] = load_b(b0 + min(col + j * across, p.n - 1u) * p.ldb + k, left);
            }
            bv = transpose(bv);
#else
            for (var i = 0u; i < 4u; i++) {
                if i < left && col < p.n {
                    bv[i] = load_b(b0 + (k + i) * p.ldb + col, p.n - col);
                }
            }
#endif
            sum[0] = terms(sum[0], subgroupBroadcast(av, 0u), bv);
            sum[1] = terms(sum[1], subgroupBroadcast(av, 1u), bv);
            sum[2] = terms(sum[2], subgroupBroadcast(av, 2u), bv);
            sum[3] = terms(sum[3], subgroupBroadcast(av, 3u), bv);
            sum[4] = terms(sum[4], subgroupBroadcast(av, 4u), bv);
            sum[5] = terms(sum[5], subgroupBroadcast(av, 5u), bv);
            sum[6] = terms(sum[6], subgroupBroadcast(av, 6u), bv);
            sum[7] = terms(sum[7], subgroupBroadcast(av, 7u), bv);
        }
        for (var r = 0u; r < ROWS; r++) {
            for (var j = 0u; j < 4u; j++) {
                let x = col + j * across;
                if row0 + r < p.m && x < p.n {
                    let at = c0 + (row0 + r) * p.ldc + x;
                    var v = sum[r][j];
                    if p.has_bias != 0u {
                        v += bias[p.bias_start + x];
                    }
                    v = activation(p.function, p.fa, p.fb, v);
                    if p.ending != 0u {
                        v = ended(p.ending, f32(other[at]), v, f32(CElem(v)));
                    }
                    c[at] = CElem(v);
                }
            }
        }
    }
}
