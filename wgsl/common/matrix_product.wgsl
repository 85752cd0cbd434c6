#define_import_path matrix_product

// A product on matrix units (matrix_units.wgsl, imported beside this): four subgroups share a square tile of the result,
// each sums FRAGMENTS² matrices. The kernel brings the operands to registers and says what becomes of the sums; from
// registers they are staged here through shared memory, as the matrices' element type.

const STEP = #{STEP}u;
const BLOCK = SIZE * FRAGMENTS;
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

struct Matrices {
    row0: Row,
    row1: Row,
#if FRAGMENTS == 4
    row2: Row,
    row3: Row,
#endif
}

fn add_products(sums: ptr<function, Matrices>, row: u32, k: u32, bv: ptr<function, Columns>) {
    (*sums).row0 = next_row((*sums).row0, a_matrix(row, k), bv);
    (*sums).row1 = next_row((*sums).row1, a_matrix(row + SIZE, k), bv);
#if FRAGMENTS == 4
    (*sums).row2 = next_row((*sums).row2, a_matrix(row + 2u * SIZE, k), bv);
    (*sums).row3 = next_row((*sums).row3, a_matrix(row + 3u * SIZE, k), bv);
#endif
}

// Adds the staged step's products to the block at `row` and `column` of the tile. `mine` is 1, or 0 in a subgroup that
// has no block: a loop that runs once or not at all stands for a branch, which the compiler takes to be different in
// each thread.
fn multiply(sums: ptr<function, Matrices>, row: u32, column: u32, mine: u32) {
    for (var k = 0u; k < STEP * mine; k += SIZE) {
        var bv: Columns;
        bv.b0 = b_matrix(k, column);
        bv.b1 = b_matrix(k, column + SIZE);
#if FRAGMENTS == 4
        bv.b2 = b_matrix(k, column + 2u * SIZE);
        bv.b3 = b_matrix(k, column + 3u * SIZE);
#endif
        add_products(sums, row, k, &bv);
    }
}

// Writes the block's first matrix where `result` reads it.
fn put(matrices: ptr<function, Matrices>, slot: u32, mine: u32) {
    let at = slot * SIZE * SIZE;
    for (var i = 0u; i < mine; i++) {
        coopStoreT((*matrices).row0.s0, &done[at], SIZE);
    }
}

fn result(slot: u32, i: u32) -> f32 {
    return done[slot * SIZE * SIZE + i];
}

// Moves the matrices that are left up after the first has been put `f` + 1 times: there is one copy of all the storing.
fn advance(matrices: ptr<function, Matrices>, f: u32) {
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
