#define_import_path attention_units

// Scores of attention on matrix units (attention_mask.wgsl and matrix_units.wgsl, imported beside this): a workgroup has
// ROWS rows of its own, each of its subgroups SIZE of them in registers, and takes the other side's rows tile by tile
// through shared memory. Heads of D channels, in whole fours, are HEAD wide there, with zeros beyond D.
//
// The kernel says with `stored` what tensors there are. Layouts as in attention.wgsl and attention_backward.wgsl.

const D = #{D}u;
// A head is HIGH + LOW matrices wide: two powers of two, so that few lines name them all.
const HIGH = #{HIGH}u;
const HEAD = (HIGH + #{LOW}u) * SIZE;
const ROWS = BLOCKS * SIZE;
// Rows of the other side in a tile.
const OTHERS = FRAGMENTS * SIZE;
// Lines in shared memory.
const LINE = HEAD + PAD;
const SCORES_LINE = OTHERS + 4u;
// Fours of a tile, and how many of them a thread brings.
const FOURS = OTHERS * HEAD / 4u;
const LOADS = (FOURS + THREADS - 1u) / THREADS;
// Threads that have to do with the scores of a row, and how many of those each has: every PER_ROWth.
const PER_ROW = THREADS / ROWS;
const EACH = OTHERS / PER_ROW;

var<workgroup> tile: array<Elem, OTHERS * LINE>;
var<workgroup> scores: array<f32, ROWS * SCORES_LINE>;

const Q = 0u;
const K = 1u;
const V = 2u;
const DOUT = 3u;

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

alias Fours = array<vec4<Elem>, LOADS>;

// A thread's part of a tile of rows from `first` on, zeros past their end and beyond D.
fn load(to: ptr<function, Fours>, which: u32, group: vec3<u32>, first: u32, local: u32) {
    let queries = which == Q || which == DOUT;
    let end = select(p.keys, p.queries * (p.heads / p.kv_heads), queries);
    for (var i = 0u; i < LOADS; i++) {
        let t = local + THREADS * i;
        let row = first + t / (HEAD / 4u);
        let d = t % (HEAD / 4u);
        var four = vec4<Elem>();
        if t < FOURS && row < end && 4u * d < D {
            let head = select(key_head(p, group.z, group.y, row), query_head(p, group.z, group.y, row), queries);
            four = stored(which, head * (D / 4u) + d);
        }
        (*to)[i] = four;
    }
}

fn stage(fours: ptr<function, Fours>, local: u32) {
    for (var i = 0u; i < LOADS; i++) {
        let t = local + THREADS * i;
        if t < FOURS {
            let at = t / (HEAD / 4u) * LINE + t % (HEAD / 4u) * 4u;
            let four = (*fours)[i];
            tile[at] = four.x;
            tile[at + 1u] = four.y;
            tile[at + 2u] = four.z;
            tile[at + 3u] = four.w;
        }
    }
}

// A subgroup's own rows, matrices side by side. Written out, for a matrix that is indexed by a variable may leave the
// registers; of several the left half comes first.
alias Own1 = AMatrix;
struct Own2 { x: Own1, y: Own1 }
struct Own4 { x: Own2, y: Own2 }
struct Own8 { x: Own4, y: Own4 }
struct Own16 { x: Own8, y: Own8 }
struct Own { x: Own#{HIGH}, y: Own#{LOW} }

fn own1(at: u32) -> Own1 {
    return coopLoadT<AMatrix>(&tile[at], LINE);
}
fn own2(at: u32) -> Own2 { return Own2(own1(at), own1(at + SIZE)); }
fn own4(at: u32) -> Own4 { return Own4(own2(at), own2(at + 2u * SIZE)); }
fn own8(at: u32) -> Own8 { return Own8(own4(at), own4(at + 4u * SIZE)); }
fn own16(at: u32) -> Own16 { return Own16(own8(at), own8(at + 8u * SIZE)); }

// Lines `line` to `line` + SIZE of the ROWS from `first` on, brought to registers through the tile. `mine` is 1, or 0 in a
// subgroup that has no rows: a loop that runs once or not at all stands for a branch, which the compiler takes to be
// different in each thread.
fn read_own(which: u32, group: vec3<u32>, first: u32, local: u32, line: u32, mine: u32) -> Own {
    var own = Own();
    var fours: Fours;
    for (var part = 0u; part < ROWS; part += OTHERS) {
        load(&fours, which, group, first + part, local);
        stage(&fours, local);
        workgroupBarrier();
        let at = line % OTHERS * LINE;
        for (var i = 0u; i < select(0u, mine, line / OTHERS * OTHERS == part); i++) {
            own = Own(own#{HIGH}(at), own#{LOW}(at + HIGH * SIZE));
        }
        workgroupBarrier();
    }
    return own;
}

// Adds own · othersᵀ over the channels from `d` on to a row of scores.
fn score1(row: Row, own: Own1, d: u32) -> Row {
    var others: Columns;
    others.b0 = coopLoad<BMatrix>(&tile[d], LINE);
    let at1 = SIZE * LINE + d;
    others.b1 = coopLoad<BMatrix>(&tile[at1], LINE);
#if FRAGMENTS == 4
    let at2 = 2u * SIZE * LINE + d;
    others.b2 = coopLoad<BMatrix>(&tile[at2], LINE);
    let at3 = 3u * SIZE * LINE + d;
    others.b3 = coopLoad<BMatrix>(&tile[at3], LINE);
#endif
    return next_row(row, own, &others);
}
fn score2(row: Row, own: Own2, d: u32) -> Row { return score1(score1(row, own.x, d), own.y, d + SIZE); }
fn score4(row: Row, own: Own4, d: u32) -> Row { return score2(score2(row, own.x, d), own.y, d + 2u * SIZE); }
fn score8(row: Row, own: Own8, d: u32) -> Row { return score4(score4(row, own.x, d), own.y, d + 4u * SIZE); }
fn score16(row: Row, own: Own16, d: u32) -> Row { return score8(score8(row, own.x, d), own.y, d + 8u * SIZE); }

// Products of the subgroup's rows with the tile's, into `scores` from line `line` on.
fn score(own: ptr<function, Own>, line: u32, mine: u32) {
    for (var i = 0u; i < mine; i++) {
        let row = score#{LOW}(score#{HIGH}(Row(), (*own).x, 0u), (*own).y, HIGH * SIZE);
        let at0 = line * SCORES_LINE;
        coopStoreT(row.s0, &scores[at0], SCORES_LINE);
        let at1 = at0 + SIZE;
        coopStoreT(row.s1, &scores[at1], SCORES_LINE);
#if FRAGMENTS == 4
        let at2 = at0 + 2u * SIZE;
        coopStoreT(row.s2, &scores[at2], SCORES_LINE);
        let at3 = at0 + 3u * SIZE;
        coopStoreT(row.s3, &scores[at3], SCORES_LINE);
#endif
    }
}
