// c = ended(activation(a·b + bias)) for GPUs: a square tile of c per workgroup, staged through
// shared memory, PER×PER results a thread. Threads interleave (row = ty + 16 i) so that shared reads
// are free of bank conflicts and stores to c are coalesced. A4, B4: the operand is read four elements at
// a time, which its strides allow; quantised weights always are.
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
    // Parts that k is split into; each writes its sum to its own slice of c.
    splits: u32,
    k_part: u32,
    has_bias: u32,
    ending: u32,
    function: u32,
    fa: f32,
    fb: f32,
}

#ifdef A4
@group(0) @binding(0) var<storage, read> a: array<vec4<AElem>>;
#else
@group(0) @binding(0) var<storage, read> a: array<AElem>;
#endif
#ifdef QUANTIZED
@group(0) @binding(1) var<storage, read> b: array<u32>;
#else
#ifdef B_BF16
#ifdef B4
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
#ifdef B4
@group(0) @binding(1) var<storage, read> b: array<vec4<BElem>>;
#else
@group(0) @binding(1) var<storage, read> b: array<BElem>;
#endif
#endif
#endif
@group(0) @binding(2) var<storage, read_write> c: array<CElem>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<storage, read> other: array<CElem>;
#ifdef QUANTIZED
@group(0) @binding(5) var<storage, read> scales: array<u32>;
#endif
var<immediate> p: Params;

const PER = #{PER}u;
const TILE = 16u * PER;
const STEP = 16u;
// One column of padding: loads along k would otherwise store to one bank.
const ROW = TILE + 1u;

var<workgroup> a_tile: array<f32, STEP * ROW>;
var<workgroup> b_tile: array<f32, STEP * ROW>;

#ifdef B4
fn load_b4(element: u32) -> vec4<f32> {
    let i = element / 4u;
#ifdef QUANTIZED
    return quad(i, b[quad_word(i)], scales[scale_word(i)]);
#else
#ifdef B_BF16
    let w = b[i];
    return bitcast<vec4<f32>>(vec4<u32>(w.x << 16u, w.x & 0xffff0000u, w.y << 16u, w.y & 0xffff0000u));
#else
    return vec4<f32>(b[i]);
#endif
#endif
}
#else
fn load_b(i: u32) -> f32 {
#ifdef B_BF16
    // bf16 is the upper half of an f32.
    let word = b[i >> 1u];
    return bitcast<f32>(select(word << 16u, word & 0xffff0000u, (i & 1u) == 1u));
#else
    return f32(b[i]);
#endif
}
#endif

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let batch = group.z / p.splits;
    let part = group.z % p.splits;
    let row0 = group.y * TILE;
    let col0 = group.x * TILE;
    let tx = local % 16u;
    let ty = local / 16u;
    let a0 = p.a_start + batch * p.a_batch;
    let b0 = p.b_start + batch * p.b_batch;
    let k_end = min(p.k, (part + 1u) * p.k_part);
    var sum: array<array<f32, PER>, PER>;
    for (var k0 = part * p.k_part; k0 < k_end; k0 += STEP) {
#ifdef A4
        for (var i = 0u; i < PER / 4u; i++) {
            let t = local + 256u * i;
#ifdef TRANS_A
            let ak = t / (TILE / 4u);
            let am = t % (TILE / 4u) * 4u;
            let a_at = a0 + (k0 + ak) * p.lda + row0 + am;
            let step = 1u;
#else
            let ak = t % (STEP / 4u) * 4u;
            let am = t / (STEP / 4u);
            let a_at = a0 + (row0 + am) * p.lda + k0 + ak;
            let step = ROW;
#endif
            var av = vec4<f32>();
            if row0 + am < p.m && k0 + ak < k_end {
                av = vec4<f32>(a[a_at / 4u]);
            }
            let to = ak * ROW + am;
            a_tile[to] = av.x;
            a_tile[to + step] = av.y;
            a_tile[to + 2u * step] = av.z;
            a_tile[to + 3u * step] = av.w;
        }
#else
        for (var i = 0u; i < PER; i++) {
            let t = local + 256u * i;
#ifdef TRANS_A
            let ak = t / TILE;
            let am = t % TILE;
            let a_at = a0 + (k0 + ak) * p.lda + row0 + am;
#else
            let ak = t % STEP;
            let am = t / STEP;
            let a_at = a0 + (row0 + am) * p.lda + k0 + ak;
#endif
            var av = 0.0;
            if row0 + am < p.m && k0 + ak < k_end {
                av = f32(a[a_at]);
            }
            a_tile[ak * ROW + am] = av;
        }
#endif
#ifdef B4
        // Stored rows of quantised weights are padded with zeros to whole fours.
        for (var i = 0u; i < PER / 4u; i++) {
            let t = local + 256u * i;
#ifdef TRANS_B
            let bk = t % (STEP / 4u) * 4u;
            let bn = t / (STEP / 4u);
            let b_at = b0 + (col0 + bn) * p.ldb + k0 + bk;
            let step = ROW;
#else
            let bk = t / (TILE / 4u);
            let bn = t % (TILE / 4u) * 4u;
            let b_at = b0 + (k0 + bk) * p.ldb + col0 + bn;
            let step = 1u;
#endif
            var bv = vec4<f32>();
            if col0 + bn < p.n && k0 + bk < k_end {
                bv = load_b4(b_at);
            }
            let to = bk * ROW + bn;
            b_tile[to] = bv.x;
            b_tile[to + step] = bv.y;
            b_tile[to + 2u * step] = bv.z;
            b_tile[to + 3u * step] = bv.w;
        }
#else
        for (var i = 0u; i < PER; i++) {
            let t = local + 256u * i;
#ifdef TRANS_B
            let bk = t % STEP;
            let bn = t / STEP;
            let b_at = b0 + (col0 + bn) * p.ldb + k0 + bk;
#else
            let bk = t / TILE;
            let bn = t % TILE;
            let b_at = b0 + (k0 + bk) * p.ldb + col0 + bn;
#endif
            var bv = 0.0;
            if col0 + bn < p.n && k0 + bk < k_end {
                bv = load_b(b_at);
            }
            b_tile[bk * ROW + bn] = bv;
        }
#endif
        workgroupBarrier();
        for (var kk = 0u; kk < STEP; kk++) {
            var av: array<f32, PER>;
            var bv: array<f32, PER>;
            for (var i = 0u; i < PER; i++) {
                av[i] = a_tile[kk * ROW + ty + 16u * i];
                bv[i] = b_tile[kk * ROW + tx + 16u * i];
            }
            for (var i = 0u; i < PER; i++) {
                for (var j = 0u; j < PER; j++) {
                    sum[i][j] = fma(av[i], bv[j], sum[i][j]);
                }
            }
        }
        workgroupBarrier();
    }
    let c0 = p.c_start + group.z * p.c_batch;
    for (var i = 0u; i < PER; i++) {
        let row = row0 + ty + 16u * i;
        for (var j = 0u; j < PER; j++) {
            let col = col0 + tx + 16u * j;
            if row < p.m && col < p.n {
                let at = c0 + row * p.ldc + col;
                var v = sum[i][j];
                if p.has_bias != 0u {
                    v += bias[p.bias_start + col];
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
