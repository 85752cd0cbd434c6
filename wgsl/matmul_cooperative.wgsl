// c = ended(activation(a·b + bias)) on matrix units (wgsl/common/matrix_product.wgsl). The next step's operands are on
// their way to registers while this one's are multiplied.
#import activation::{activation, ended}
#import matrix_units::{BLOCKS, Elem, FRAGMENTS, SIZE, THREADS}
#import matrix_product::{A_LINE, B_LINE, BLOCK, LOADS, Matrices, Quads, STEP, TILE, advance, multiply, put, result, stage}
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

// How many of four elements from `at` on lie before `end`, if their line lies in the matrix.
fn within(line: bool, at: u32, end: u32) -> u32 {
    return select(0u, min(end - min(at, end), 4u), line);
}

fn load_a(at: u32, count: u32) -> vec4<Elem> {
    var v = vec4<Elem>();
#ifdef QUADS
    if count > 0u {
        v = vec4<Elem>(a[at / 4u]);
    }
#else
    for (var i = 0u; i < count; i++) {
        v[i] = Elem(a[at + i]);
    }
#endif
    return v;
}

fn load_b(at: u32, count: u32) -> vec4<Elem> {
    var v = vec4<Elem>();
#ifdef QUANTIZED
    // Stored rows are padded with zeros to whole fours.
    if count > 0u {
        let i = at / 4u;
        v = vec4<Elem>(quad(i, b[quad_word(i)], scales[scale_word(i)]));
    }
#else
#ifdef QUADS
    if count > 0u {
#ifdef B_BF16
        let w = b[at / 4u];
        v = vec4<Elem>(bitcast<vec4<f32>>(vec4<u32>(w.x << 16u, w.x & 0xffff0000u, w.y << 16u, w.y & 0xffff0000u)));
#else
        v = vec4<Elem>(b[at / 4u]);
#endif
    }
#else
    for (var i = 0u; i < count; i++) {
#ifdef B_BF16
        let word = b[(at + i) >> 1u];
        v[i] = Elem(bitcast<f32>(select(word << 16u, word & 0xffff0000u, ((at + i) & 1u) == 1u)));
#else
        v[i] = Elem(b[at + i]);
#endif
    }
#endif
#endif
    return v;
}

// A thread's part of both operands at k0, zeros beyond their edges.
fn load(to: ptr<function, Quads>, start: vec2<u32>, corner: vec2<u32>, k0: u32, k_end: u32, local: u32) {
    for (var i = 0u; i < LOADS; i++) {
        let t = local + THREADS * i;
        let a_line = t / (A_LINE / 4u);
        let a_along = t % (A_LINE / 4u) * 4u;
#ifdef TRANS_A
        let a_at = start.x + (k0 + a_line) * p.lda + corner.x + a_along;
        (*to).a[i] = load_a(a_at, within(k0 + a_line < k_end, corner.x + a_along, p.m));
#else
        let a_at = start.x + (corner.x + a_line) * p.lda + k0 + a_along;
        (*to).a[i] = load_a(a_at, within(corner.x + a_line < p.m, k0 + a_along, k_end));
#endif
        let b_line = t / (B_LINE / 4u);
        let b_along = t % (B_LINE / 4u) * 4u;
#ifdef TRANS_B
        let b_at = start.y + (corner.y + b_line) * p.ldb + k0 + b_along;
        (*to).b[i] = load_b(b_at, within(corner.y + b_line < p.n, k0 + b_along, k_end));
#else
        let b_at = start.y + (k0 + b_line) * p.ldb + corner.y + b_along;
        (*to).b[i] = load_b(b_at, within(k0 + b_line < k_end, corner.y + b_along, p.n));
#endif
    }
}

// Where a subgroup's results go, and which of its threads this is.
struct Place {
    c: u32,
    row: u32,
    column: u32,
    // 1, or 0 in a subgroup that has no block.
    mine: u32,
    slot: u32,
    lane: u32,
    lanes: u32,
}

// The block's matrices one after the other.
fn store(matrices: ptr<function, Matrices>, to: Place) {
    for (var f = 0u; f < FRAGMENTS * FRAGMENTS; f++) {
        put(matrices, to.slot, to.mine);
        workgroupBarrier();
        for (var i = to.lane; i < SIZE * SIZE * to.mine; i += to.lanes) {
            let y = to.row + f / FRAGMENTS * SIZE + i / SIZE;
            let x = to.column + f % FRAGMENTS * SIZE + i % SIZE;
            if y < p.m && x < p.n {
                let at = to.c + y * p.ldc + x;
                var v = result(to.slot, i);
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
        workgroupBarrier();
        advance(matrices, f);
    }
}

@compute @workgroup_size(#{THREADS})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
    @builtin(subgroup_invocation_id) lane: u32,
    @builtin(subgroup_size) lanes: u32,
) {
    let batch = group.z / p.splits;
    let part = group.z % p.splits;
    let start = vec2<u32>(p.a_start + batch * p.a_batch, p.b_start + batch * p.b_batch);
    let corner = group.yx * TILE;
    let k_end = min(p.k, (part + 1u) * p.k_part);
    for (var first = 0u; first < BLOCKS; first += subgroups) {
        let block = first + subgroup;
        let mine = select(0u, 1u, block < BLOCKS);
        let row = block / 2u * BLOCK;
        let column = block % 2u * BLOCK;
        var sums = Matrices();
        var next: Quads;
        load(&next, start, corner, part * p.k_part, k_end, local);
        for (var k0 = part * p.k_part; k0 < k_end; k0 += STEP) {
            stage(&next, local);
            workgroupBarrier();
            load(&next, start, corner, k0 + STEP, k_end, local);
            multiply(&sums, row, column, mine);
            workgroupBarrier();
        }
        let to = Place(p.c_start + group.z * p.c_batch, corner.x + row, corner.y + column, mine, subgroup, lane, lanes);
        store(&sums, to);
    }
}
