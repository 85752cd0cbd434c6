// c = activation(a·b + bias) + residual on matrix units: four subgroups share a square tile of c, each sums FRAGMENTS²
// cooperative matrices of SIZE². Operands are staged through shared memory as the matrices' element type; the next
// step's are on their way to registers while this one's are multiplied.
//
// How many subgroups the driver makes of the workgroup is its own affair (AMD's have 32 or 64 threads): where there
// are fewer than four blocks need, the tile is done in rounds; where there are more, the rest only helps to load.
#import activation::activation
#ifdef QUANTIZED
#import quantized::{quad, quad_word, scale_word}
#endif

// A row of shared memory ends with 16 bytes that no one reads: rows start in different banks.
#ifdef HALF
alias Elem = f16;
const PAD = 8u;
#else
alias Elem = f32;
const PAD = 4u;
#endif
#if SIZE == 16
alias AMatrix = coop_mat16x16<Elem, A>;
alias BMatrix = coop_mat16x16<Elem, B>;
alias Sum = coop_mat16x16<f32, C>;
#else
alias AMatrix = coop_mat8x8<Elem, A>;
alias BMatrix = coop_mat8x8<Elem, B>;
alias Sum = coop_mat8x8<f32, C>;
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
    has_residual: u32,
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
@group(0) @binding(4) var<storage, read> residual: array<CElem>;
var<immediate> p: Params;

const SIZE = #{SIZE}u;
const FRAGMENTS = #{FRAGMENTS}u;
const STEP = #{STEP}u;
const THREADS = #{THREADS}u;
const BLOCK = SIZE * FRAGMENTS;
const BLOCKS = 4u;
const TILE = 2u * BLOCK;
// Fours of elements that a thread brings at each step, of each operand.
const LOADS = TILE * STEP / 4u / THREADS;
// A line of either operand in shared memory runs as it does in storage: along k, or across it where transposed.
#ifdef TRANS_A
const A_LINE = TILE;
#else
const A_LINE = STEP;
#endif
#ifdef TRANS_B
const B_LINE = STEP;
#else
const B_LINE = TILE;
#endif
const A_ROW = A_LINE + PAD;
const B_ROW = B_LINE + PAD;

var<workgroup> a_tile: array<Elem, TILE * STEP / A_LINE * A_ROW>;
var<workgroup> b_tile: array<Elem, TILE * STEP / B_LINE * B_ROW>;
// A matrix of each subgroup on its way to c.
var<workgroup> done: array<f32, BLOCKS * SIZE * SIZE>;

struct Quads {
    a: array<vec4<Elem>, LOADS>,
    b: array<vec4<Elem>, LOADS>,
}

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

fn stage(held: ptr<function, Quads>, local: u32) {
    for (var i = 0u; i < LOADS; i++) {
        let t = local + THREADS * i;
        let a_to = t / (A_LINE / 4u) * A_ROW + t % (A_LINE / 4u) * 4u;
        let b_to = t / (B_LINE / 4u) * B_ROW + t % (B_LINE / 4u) * 4u;
        let av = (*held).a[i];
        let bv = (*held).b[i];
        a_tile[a_to] = av.x;
        a_tile[a_to + 1u] = av.y;
        a_tile[a_to + 2u] = av.z;
        a_tile[a_to + 3u] = av.w;
        b_tile[b_to] = bv.x;
        b_tile[b_to + 1u] = bv.y;
        b_tile[b_to + 2u] = bv.z;
        b_tile[b_to + 3u] = bv.w;
    }
}

fn a_matrix(row: u32, k: u32) -> AMatrix {
#ifdef TRANS_A
    let at = k * A_ROW + row;
    return coopLoad<AMatrix>(&a_tile[at], A_ROW);
#else
    let at = row * A_ROW + k;
    return coopLoadT<AMatrix>(&a_tile[at], A_ROW);
#endif
}

fn b_matrix(k: u32, column: u32) -> BMatrix {
#ifdef TRANS_B
    let at = column * B_ROW + k;
    return coopLoad<BMatrix>(&b_tile[at], B_ROW);
#else
    let at = k * B_ROW + column;
    return coopLoadT<BMatrix>(&b_tile[at], B_ROW);
#endif
}

// A row of matrices; written out, for a matrix that is indexed by a variable may leave the registers.
struct Row {
    s0: Sum,
    s1: Sum,
#if FRAGMENTS == 4
    s2: Sum,
    s3: Sum,
#endif
}

struct Matrices {
    row0: Row,
    row1: Row,
#if FRAGMENTS == 4
    row2: Row,
    row3: Row,
#endif
}

struct Columns {
    b0: BMatrix,
    b1: BMatrix,
#if FRAGMENTS == 4
    b2: BMatrix,
    b3: BMatrix,
#endif
}

fn next_row(row: Row, av: AMatrix, bv: ptr<function, Columns>) -> Row {
    var next: Row;
    next.s0 = coopMultiplyAdd(av, (*bv).b0, row.s0);
    next.s1 = coopMultiplyAdd(av, (*bv).b1, row.s1);
#if FRAGMENTS == 4
    next.s2 = coopMultiplyAdd(av, (*bv).b2, row.s2);
    next.s3 = coopMultiplyAdd(av, (*bv).b3, row.s3);
#endif
    return next;
}

fn add_products(sums: ptr<function, Matrices>, row: u32, k: u32, bv: ptr<function, Columns>) {
    (*sums).row0 = next_row((*sums).row0, a_matrix(row, k), bv);
    (*sums).row1 = next_row((*sums).row1, a_matrix(row + SIZE, k), bv);
#if FRAGMENTS == 4
    (*sums).row2 = next_row((*sums).row2, a_matrix(row + 2u * SIZE, k), bv);
    (*sums).row3 = next_row((*sums).row3, a_matrix(row + 3u * SIZE, k), bv);
#endif
}

// Where a subgroup's results go, and which of its threads this is.
struct Place {
    c: u32,
    row: u32,
    column: u32,
    // 1, or 0 in a subgroup that has no block. A loop that runs once or not at all stands for a branch, which the
    // compiler takes to be different in each thread.
    mine: u32,
    slot: u32,
    lane: u32,
    lanes: u32,
}

// The block's matrices one after the other, those that are left moving up: there is one copy of all this.
fn store(matrices: ptr<function, Matrices>, to: Place) {
    let slot = to.slot * SIZE * SIZE;
    for (var f = 0u; f < FRAGMENTS * FRAGMENTS; f++) {
        for (var i = 0u; i < to.mine; i++) {
            coopStoreT((*matrices).row0.s0, &done[slot], SIZE);
        }
        workgroupBarrier();
        for (var i = to.lane; i < SIZE * SIZE * to.mine; i += to.lanes) {
            let y = to.row + f / FRAGMENTS * SIZE + i / SIZE;
            let x = to.column + f % FRAGMENTS * SIZE + i % SIZE;
            if y < p.m && x < p.n {
                let at = to.c + y * p.ldc + x;
                var v = done[slot + i];
                if p.has_bias != 0u {
                    v += bias[p.bias_start + x];
                }
                v = activation(p.function, p.fa, p.fb, v);
                if p.has_residual != 0u {
                    v += f32(residual[at]);
                }
                c[at] = CElem(v);
            }
        }
        workgroupBarrier();
        (*matrices).row0.s0 = (*matrices).row0.s1;
#if FRAGMENTS == 4
        (*matrices).row0.s1 = (*matrices).row0.s2;
        (*matrices).row0.s2 = (*matrices).row0.s3;
#endif
        if f % FRAGMENTS == FRAGMENTS - 1u {
            (*matrices).row0 = (*matrices).row1;
#if FRAGMENTS == 4
            (*matrices).row1 = (*matrices).row2;
            (*matrices).row2 = (*matrices).row3;
#endif
        }
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
            for (var k = 0u; k < STEP * mine; k += SIZE) {
                var bv: Columns;
                bv.b0 = b_matrix(k, column);
                bv.b1 = b_matrix(k, column + SIZE);
#if FRAGMENTS == 4
                bv.b2 = b_matrix(k, column + 2u * SIZE);
                bv.b3 = b_matrix(k, column + 3u * SIZE);
#endif
                add_products(&sums, row, k, &bv);
            }
            workgroupBarrier();
        }
        let to = Place(p.c_start + group.z * p.c_batch, corner.x + row, corner.y + column, mine, subgroup, lane, lanes);
        store(&sums, to);
    }
}
