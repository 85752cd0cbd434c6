// Layer norm and (with RMS) RMS norm over the last dimension; statistics in f32. STAGE:
// 0: y = x̂ w + b, x̂ = (x − mean) rstd.
// 1: dx = rstd (g − mean(g) − x̂ mean(g x̂)), g = dy w, added to `earlier` with ONTO. With SUMS also Σ dy x̂ and Σ dy over
//    the workgroup's rows, [workgroups, 2, width]; without HELD each row's mean and rstd.
// 2: Σ dy x̂ and Σ dy over a chunk of rows from those; a thread a column: [chunks, 2, width].
// 3: sums of [chunks, columns] over the chunks.
// In 0 and 1 a workgroup takes a row, with SEVERAL `chunk` of them: for SUMS, or for KEPT, which keeps weight and bias in
// registers, as CPU drivers pay as much to load them as to load the row. With HELD a thread keeps its HELD vectors of a
// row in registers, else it reads them again; WHOLE rows are HELD · WG wide.
#import index::{group_index, share, thread_index}
#if STAGE < 2
#import row_reduce::row_sum
#endif

#ifdef VEC4
alias V = vec4<f32>;
#ifdef F16
alias Stored = vec4<f16>;
#else
alias Stored = vec4<f32>;
#endif
fn total(v: V) -> f32 {
    return (v.x + v.y) + (v.z + v.w);
}
#else
alias V = f32;
#ifdef F16
alias Stored = f16;
#else
alias Stored = f32;
#endif
fn total(v: V) -> f32 {
    return v;
}
#endif

struct Params {
    rows: u32,
    // Elements of a row, in units of V.
    width: u32,
    elements: f32,
    eps: f32,
    chunk: u32,
    chunks: u32,
}
var<immediate> p: Params;

#if STAGE == 0
@group(0) @binding(0) var<storage, read> x: array<Stored>;
@group(0) @binding(1) var<storage, read> weight: array<V>;
@group(0) @binding(2) var<storage, read> bias: array<V>;
@group(0) @binding(3) var<storage, read_write> y: array<Stored>;
#endif
#if STAGE == 1
@group(0) @binding(0) var<storage, read> x: array<Stored>;
@group(0) @binding(1) var<storage, read> weight: array<V>;
@group(0) @binding(2) var<storage, read> dy: array<Stored>;
@group(0) @binding(3) var<storage, read> earlier: array<Stored>;
@group(0) @binding(4) var<storage, read_write> dx: array<Stored>;
#ifdef SUMS
@group(0) @binding(5) var<storage, read_write> partial_sums: array<V>;
#endif
#ifndef HELD
@group(0) @binding(5) var<storage, read_write> statistics: array<vec2<f32>>;
#endif
#endif
#if STAGE == 2
@group(0) @binding(0) var<storage, read> x: array<Stored>;
@group(0) @binding(1) var<storage, read> dy: array<Stored>;
@group(0) @binding(2) var<storage, read> statistics: array<vec2<f32>>;
@group(0) @binding(3) var<storage, read_write> partial_sums: array<V>;
#endif
#if STAGE == 3
@group(0) @binding(0) var<storage, read> partial_sums: array<V>;
@group(0) @binding(1) var<storage, read_write> sums: array<V>;
#endif

#if STAGE < 2
#ifdef HELD
var<private> held_x: array<V, #{HELD}>;
#if STAGE == 1
var<private> held_g: array<V, #{HELD}>;
#endif
#endif
#ifdef KEPT
var<private> kept_weight: array<V, #{HELD}>;
var<private> kept_bias: array<V, #{HELD}>;
#endif
#ifdef SUMS
var<private> sum_along: array<V, #{HELD}>;
var<private> sum_dy: array<V, #{HELD}>;
#endif

// Vectors of a row that a thread has, the last perhaps outside.
fn steps() -> u32 {
#ifdef HELD
    return #{HELD}u;
#else
    return (p.width + #{WG}u - 1u) / #{WG}u;
#endif
}

fn inside(i: u32) -> bool {
#ifdef WHOLE
    return true;
#else
    return i < p.width;
#endif
}

fn x_at(at: u32, k: u32) -> V {
#ifdef HELD
    return held_x[k];
#else
    return V(x[at]);
#endif
}

#if STAGE == 1
// dy w, read.
fn slope(at: u32, i: u32, k: u32) -> V {
#ifdef KEPT
    return V(dy[at]) * kept_weight[k];
#else
#ifdef WEIGHT
    return V(dy[at]) * weight[i];
#else
    return V(dy[at]);
#endif
#endif
}

fn g_at(at: u32, i: u32, k: u32) -> V {
#ifdef HELD
    return held_g[k];
#else
    return slope(at, i, k);
#endif
}
#endif

// What is known of a row: mean, reciprocal standard deviation, means of g and of g x̂.
struct Row {
    mean: f32,
    rstd: f32,
    g: f32,
    along: f32,
}

// Everything is summed in the loop that reads it first: CPU drivers spill what is held, and read it back.
fn row_of(base: u32, local: u32) -> Row {
    var sum = V(0.0);
    var squares = V(0.0);
    var sum_g = V(0.0);
    var along = V(0.0);
    for (var k = 0u; k < steps(); k++) {
        let i = k * #{WG}u + local;
        if inside(i) {
            let v = V(x[base + i]);
#ifdef HELD
            held_x[k] = v;
#endif
#ifdef RMS
            squares += v * v;
#else
            sum += v;
#endif
#if STAGE == 1
            let g = slope(base + i, i, k);
#ifdef HELD
            held_g[k] = g;
#endif
#ifdef RMS
            along += g * v;
#else
            sum_g += g;
#endif
#endif
        }
    }
    var row = Row();
#ifndef RMS
    row.mean = row_sum(total(sum), local) / p.elements;
    for (var k = 0u; k < steps(); k++) {
        let i = k * #{WG}u + local;
        if inside(i) {
            let centred = x_at(base + i, k) - row.mean;
            squares += centred * centred;
#if STAGE == 1
            along += g_at(base + i, i, k) * centred;
#endif
        }
    }
#endif
    row.rstd = 1.0 / sqrt(row_sum(total(squares), local) / p.elements + p.eps);
#if STAGE == 1
    row.along = row.rstd * row_sum(total(along), local) / p.elements;
#ifndef RMS
    row.g = row_sum(total(sum_g), local) / p.elements;
#endif
#endif
    return row;
}

fn finish(index: u32, local: u32) {
    let base = index * p.width;
    let row = row_of(base, local);
    for (var k = 0u; k < steps(); k++) {
        let i = k * #{WG}u + local;
        if inside(i) {
            let normed = (x_at(base + i, k) - row.mean) * row.rstd;
#if STAGE == 0
            var result = normed;
#ifdef KEPT
            result = result * kept_weight[k] + kept_bias[k];
#else
#ifdef WEIGHT
            result *= weight[i];
#endif
#ifdef BIAS
            result += bias[i];
#endif
#endif
            y[base + i] = Stored(result);
#else
#ifdef SUMS
            let slope = V(dy[base + i]);
            sum_along[k] += slope * normed;
            sum_dy[k] += slope;
#endif
            var result = row.rstd * (g_at(base + i, i, k) - row.g - normed * row.along);
#ifdef ONTO
            result += V(earlier[base + i]);
#endif
            dx[base + i] = Stored(result);
#endif
        }
    }
#if STAGE == 1
#ifndef HELD
    if local == 0u {
        statistics[index] = vec2<f32>(row.mean, row.rstd);
    }
#endif
#endif
}

@compute @workgroup_size(#{WG})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let index = group_index(group, groups);
#ifdef SEVERAL
    let own = share(index, p.chunk, p.rows);
    if own.x >= own.y {
        return;
    }
    for (var k = 0u; k < #{HELD}u; k++) {
#ifdef SUMS
        sum_along[k] = V(0.0);
        sum_dy[k] = V(0.0);
#endif
#ifdef KEPT
        let i = k * #{WG}u + local;
        kept_weight[k] = V(1.0);
        kept_bias[k] = V(0.0);
        if inside(i) {
#ifdef WEIGHT
            kept_weight[k] = weight[i];
#endif
#ifdef BIAS
            kept_bias[k] = bias[i];
#endif
        }
#endif
    }
    for (var row = own.x; row < own.y; row++) {
        finish(row, local);
    }
#ifdef SUMS
    for (var k = 0u; k < #{HELD}u; k++) {
        let i = k * #{WG}u + local;
        if inside(i) {
            partial_sums[index * 2u * p.width + i] = sum_along[k];
            partial_sums[(index * 2u + 1u) * p.width + i] = sum_dy[k];
        }
    }
#endif
#else
    if index < p.rows {
        finish(index, local);
    }
#endif
}
#endif

#if STAGE == 2
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let column = group.x * 64u + local;
    if column >= p.width {
        return;
    }
    var along = V(0.0);
    var sum = V(0.0);
    let own = share(group.y, p.chunk, p.rows);
    for (var row = own.x; row < own.y; row++) {
        let s = statistics[row];
        let g = V(dy[row * p.width + column]);
        along += g * (V(x[row * p.width + column]) - s.x) * s.y;
        sum += g;
    }
    partial_sums[(group.y * 2u) * p.width + column] = along;
    partial_sums[(group.y * 2u + 1u) * p.width + column] = sum;
}
#endif

#if STAGE == 3
@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let column = thread_index(group, groups, local, 64u);
    if column >= p.width {
        return;
    }
    var sum = V(0.0);
    for (var chunk = 0u; chunk < p.chunks; chunk++) {
        sum += partial_sums[chunk * p.width + column];
    }
    sums[column] = sum;
}
#endif
