// Flash attention on matrix units: weights of the tile's rows are made from the scores (common/attention_units.wgsl), and
// those rows are summed over them on the units. A weight is final when it is made, for the log-sum-exps are known
// (attention_lse_cooperative.wgsl): no sum, whose elements WGSL cannot reach, has to be rescaled.
//
//                    own rows   weights                         sum
//                    queries    P = exp(scale q·k − lse)        out = Σ P v
// DSCORES            queries    dS = P (dO·v − delta)           dQ = scale Σ dS k
// OF_KEYS, DSCORES   keys       dS                              dK = scale Σ dS q
// OF_KEYS            keys       P                               dV = Σ P dO
//
// Scores and sums are f32; weights are rounded to f16 before they are multiplied. All but the first are BACKWARD.
#import attention_mask::{Params, NOTHING, visible_keys, first_query, row_visible, query_head, key_head, row_at}
#import matrix_units::{AMatrix, BLOCKS, BMatrix, Columns, Elem, FRAGMENTS, PAD, Row, SIZE, Sum, THREADS, next_row}
#import attention_units::{D, DOUT, EACH, Fours, HIGH, K, LINE, OTHERS, PER_ROW, Q, ROWS, SCORES_LINE, V, bits_of_key, load, read_own, row_bits, score, scores, stage, tile}

@group(0) @binding(0) var<storage, read> q: array<vec4<f16>>;
@group(0) @binding(1) var<storage, read> k: array<vec4<f16>>;
@group(0) @binding(2) var<storage, read> query_bits: array<u32>;
@group(0) @binding(3) var<storage, read> key_bits: array<u32>;
@group(0) @binding(4) var<storage, read> lse: array<f32>;
@group(0) @binding(5) var<storage, read> v: array<vec4<f16>>;
@group(0) @binding(6) var<storage, read_write> result: array<vec4<f16>>;
#ifdef BACKWARD
@group(0) @binding(7) var<storage, read> dout: array<vec4<f16>>;
@group(0) @binding(8) var<storage, read> delta: array<f32>;
#endif
var<immediate> p: Params;

const WEIGHTS_LINE = OTHERS + PAD;
// P is multiplied and summed as 1024 P: small probabilities stay normal numbers in f16.
const FACTOR = 1024.0;
const LOG_FACTOR = 6.931471805599453;

var<workgroup> weights: array<Elem, ROWS * WEIGHTS_LINE>;
// Of the tile's rows.
var<workgroup> tile_bits: array<u32, OTHERS>;
#ifdef OF_KEYS
var<workgroup> tile_visible: array<u32, OTHERS>;
var<workgroup> tile_lse: array<f32, OTHERS>;
var<workgroup> tile_delta: array<f32, OTHERS>;
#endif

// Scores are OWN · OTHER, gradients of probabilities OWN_D · OTHER_D.
#ifdef OF_KEYS
const OWN = K;
const OWN_D = V;
const OTHER = Q;
const OTHER_D = DOUT;
#else
const OWN = Q;
const OWN_D = DOUT;
const OTHER = K;
const OTHER_D = V;
#endif
// What the tile holds first, and what is summed.
#ifdef DSCORES
const FIRST = OTHER_D;
const SUMMED = OTHER;
#else
const FIRST = OTHER;
const SUMMED = OTHER_D;
#endif

fn stored(which: u32, i: u32) -> vec4<Elem> {
    if which == Q {
        return q[i];
    }
    if which == K {
        return k[i];
    }
#ifdef BACKWARD
    if which == DOUT {
        return dout[i];
    }
#endif
    return v[i];
}

// What a thread knows of its own row.
struct OwnRow {
    index: u32,
    exists: bool,
    bits: u32,
    visible: u32,
    lse: f32,
    delta: f32,
}

fn own_row(group: vec3<u32>, index: u32, here: bool) -> OwnRow {
#ifdef OF_KEYS
    return OwnRow(index, here && index < p.keys, bits_of_key(group.z, index), 0u, 0.0, 0.0);
#else
    let rows = p.queries * (p.heads / p.kv_heads);
    let at = row_at(p, group.z, group.y, min(index, rows - 1u));
    var row = OwnRow(index, here && index < rows, row_bits(group.z, index), row_visible(p, index), lse[at], 0.0);
#ifdef DSCORES
    row.delta = delta[at];
#endif
    return row;
#endif
}

fn note_tile(group: vec3<u32>, first: u32, local: u32) {
    if local < OTHERS {
        let other = first + local;
#ifdef OF_KEYS
        tile_bits[local] = row_bits(group.z, other);
        tile_visible[local] = row_visible(p, other);
        let at = row_at(p, group.z, group.y, min(other, p.queries * (p.heads / p.kv_heads) - 1u));
        tile_lse[local] = lse[at];
        tile_delta[local] = delta[at];
#else
        tile_bits[local] = bits_of_key(group.z, other);
#endif
    }
}

// A thread's weights of its row; dprobs are what it holds of OWN_D · OTHER_D.
fn weigh(row: OwnRow, dprobs: ptr<function, array<f32, EACH>>, first: u32, line: u32, x: u32) {
    for (var i = 0u; i < EACH; i++) {
        let j = x + PER_ROW * i;
#ifdef OF_KEYS
        let seen = row.index < tile_visible[j] && (row.bits & tile_bits[j]) != 0u;
        let row_lse = tile_lse[j];
        let row_delta = tile_delta[j];
#else
        let seen = first + j < row.visible && (row.bits & tile_bits[j]) != 0u;
        let row_lse = row.lse;
        let row_delta = row.delta;
#endif
        let power = scores[line * SCORES_LINE + j] * p.scale - row_lse;
#ifdef DSCORES
        let weight = exp(power) * ((*dprobs)[i] - row_delta);
#else
        let weight = exp(power + LOG_FACTOR);
#endif
        weights[line * WEIGHTS_LINE + j] = Elem(select(0.0, weight, seen));
    }
}

// A subgroup's sums, laid out as its own rows are.
alias Sums1 = Sum;
struct Sums2 { x: Sums1, y: Sums1 }
struct Sums4 { x: Sums2, y: Sums2 }
struct Sums8 { x: Sums4, y: Sums4 }
struct Sums16 { x: Sums8, y: Sums8 }
struct Sums { x: Sums#{HIGH}, y: Sums#{LOW} }

// Adds weights · rows of the tile, their channels from `at` on.
fn add1(sums: Sums1, w: AMatrix, at: u32) -> Sums1 {
    return coopMultiplyAdd(w, coopLoadT<BMatrix>(&tile[at], LINE), sums);
}
fn add2(s: Sums2, w: AMatrix, at: u32) -> Sums2 { return Sums2(add1(s.x, w, at), add1(s.y, w, at + SIZE)); }
fn add4(s: Sums4, w: AMatrix, at: u32) -> Sums4 { return Sums4(add2(s.x, w, at), add2(s.y, w, at + 2u * SIZE)); }
fn add8(s: Sums8, w: AMatrix, at: u32) -> Sums8 { return Sums8(add4(s.x, w, at), add4(s.y, w, at + 4u * SIZE)); }
fn add16(s: Sums16, w: AMatrix, at: u32) -> Sums16 { return Sums16(add8(s.x, w, at), add8(s.y, w, at + 8u * SIZE)); }

fn add(sums: ptr<function, Sums>, line: u32, mine: u32) {
    for (var j = 0u; j < OTHERS * mine; j += SIZE) {
        let first = line * WEIGHTS_LINE + j;
        let w = coopLoadT<AMatrix>(&weights[first], WEIGHTS_LINE);
        (*sums).x = add#{HIGH}((*sums).x, w, j * LINE);
        (*sums).y = add#{LOW}((*sums).y, w, j * LINE + HIGH * SIZE);
    }
}

// Where a subgroup's sums go: those of the `chunk`th FRAGMENTS columns, into lines of `scores` from `line` on.
struct Shown {
    chunk: u32,
    line: u32,
    mine: u32,
}

fn show1(sums: Sums1, column: u32, to: Shown) {
    let at = to.line * SCORES_LINE + column % FRAGMENTS * SIZE;
    for (var i = 0u; i < select(0u, to.mine, column / FRAGMENTS == to.chunk); i++) {
        coopStoreT(sums, &scores[at], SCORES_LINE);
    }
}
fn show2(sums: Sums2, column: u32, to: Shown) {
    show1(sums.x, column, to);
    show1(sums.y, column + 1u, to);
}
fn show4(sums: Sums4, column: u32, to: Shown) {
    show2(sums.x, column, to);
    show2(sums.y, column + 2u, to);
}
fn show8(sums: Sums8, column: u32, to: Shown) {
    show4(sums.x, column, to);
    show4(sums.y, column + 4u, to);
}
fn show16(sums: Sums16, column: u32, to: Shown) {
    show8(sums.x, column, to);
    show8(sums.y, column + 8u, to);
}

// Writes the sums, one chunk of columns after the other.
fn store(sums: ptr<function, Sums>, group: vec3<u32>, row: OwnRow, subgroup_line: u32, mine: u32, line: u32, x: u32) {
#ifdef DSCORES
    let factor = p.scale;
#else
    let factor = 1.0 / FACTOR;
#endif
#ifdef OF_KEYS
    let head = key_head(p, group.z, group.y, row.index);
#else
    let head = query_head(p, group.z, group.y, row.index);
#endif
    for (var chunk = 0u; chunk * OTHERS < D; chunk++) {
        let to = Shown(chunk, subgroup_line, mine);
        show#{HIGH}((*sums).x, 0u, to);
        show#{LOW}((*sums).y, HIGH, to);
        workgroupBarrier();
        for (var i = x; i < OTHERS / 4u; i += PER_ROW) {
            let d = chunk * (OTHERS / 4u) + i;
            if row.exists && 4u * d < D {
                let at = line * SCORES_LINE + 4u * i;
                let four = vec4<f32>(scores[at], scores[at + 1u], scores[at + 2u], scores[at + 3u]);
                result[head * (D / 4u) + d] = vec4<Elem>(four * factor);
            }
        }
        workgroupBarrier();
    }
}

@compute @workgroup_size(#{THREADS})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
) {
    let shared_heads = p.heads / p.kv_heads;
    let rows = p.queries * shared_heads;
    let line = local / PER_ROW;
    let x = local % PER_ROW;
    for (var round = 0u; round < BLOCKS; round += subgroups) {
        let first = group.x * ROWS + round * SIZE;
        let strips = min(subgroups, BLOCKS - round);
        let mine = select(0u, 1u, subgroup < strips);
        let strip = subgroup * SIZE;
        let row = own_row(group, first + line, line < strips * SIZE);
#ifdef OF_KEYS
        // Rows before the first that sees this workgroup's first key see none of its keys.
        let start = first_query(p, first) * shared_heads;
        let end = rows;
#else
        // No row of this workgroup sees a key past its last row's.
        let start = 0u;
        let end = visible_keys(p, (min(first + ROWS, rows) - 1u) / shared_heads);
#endif
        var own = read_own(OWN, group, first, local, strip, mine);
#ifdef DSCORES
        var own_d = read_own(OWN_D, group, first, local, strip, mine);
#endif
        var dprobs: array<f32, EACH>;
        var sums = Sums();
        var next: Fours;
        load(&next, FIRST, group, start, local);
        for (var other = start; other < end; other += OTHERS) {
            stage(&next, local);
            workgroupBarrier();
            load(&next, SUMMED, group, other, local);
            note_tile(group, other, local);
#ifdef DSCORES
            score(&own_d, strip, mine);
            workgroupBarrier();
            for (var i = 0u; i < EACH; i++) {
                dprobs[i] = scores[line * SCORES_LINE + x + PER_ROW * i];
            }
#else
            score(&own, strip, mine);
            workgroupBarrier();
            weigh(row, &dprobs, other, line, x);
#endif
            stage(&next, local);
            workgroupBarrier();
            load(&next, FIRST, group, other + OTHERS, local);
#ifdef DSCORES
            score(&own, strip, mine);
            workgroupBarrier();
            weigh(row, &dprobs, other, line, x);
            workgroupBarrier();
#endif
            add(&sums, strip, mine);
            workgroupBarrier();
        }
        store(&sums, group, row, strip, mine, line, x);
    }
}
