// Layer norm and (with RMS) RMS norm over the last dimension; statistics in f32. STAGE:
// 0: y = x̂ w + b, x̂ = (x − mean) rstd; a workgroup a row.
// 1: dx = rstd (g − mean(g) − x̂ mean(g x̂)), g = dy w; a workgroup a row; keeps (mean, rstd).
// 2: Σ dy x̂ and Σ dy over a chunk of rows; a thread a column: [chunks, 2, width].
// 3: sums of [chunks, columns] over the chunks.
#import index::{group_index, thread_index}
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
    has_weight: u32,
    has_bias: u32,
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
@group(0) @binding(3) var<storage, read_write> dx: array<Stored>;
@group(0) @binding(4) var<storage, read_write> statistics: array<vec2<f32>>;
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
// Mean and reciprocal standard deviation of the row at `base`.
fn row_statistics(base: u32, local: u32) -> vec2<f32> {
    var mean = 0.0;
#ifndef RMS
    var sum = V(0.0);
    for (var i = local; i < p.width; i += #{WG}u) {
        sum += V(x[base + i]);
    }
    mean = row_sum(total(sum), local) / p.elements;
#endif
    var squares = V(0.0);
    for (var i = local; i < p.width; i += #{WG}u) {
        let centred = V(x[base + i]) - mean;
        squares += centred * centred;
    }
    let variance = row_sum(total(squares), local) / p.elements;
    return vec2<f32>(mean, 1.0 / sqrt(variance + p.eps));
}

@compute @workgroup_size(#{WG})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let row = group_index(group, groups);
    if row >= p.rows {
        return;
    }
    let base = row * p.width;
    let s = row_statistics(base, local);
#if STAGE == 0
    for (var i = local; i < p.width; i += #{WG}u) {
        var v = (V(x[base + i]) - s.x) * s.y;
        if p.has_weight != 0u {
            v *= weight[i];
        }
        if p.has_bias != 0u {
            v += bias[i];
        }
        y[base + i] = Stored(v);
    }
#else
    var along = V(0.0);
    var sum = V(0.0);
    for (var i = local; i < p.width; i += #{WG}u) {
        var g = V(dy[base + i]);
        if p.has_weight != 0u {
            g *= weight[i];
        }
        along += g * (V(x[base + i]) - s.x) * s.y;
        sum += g;
    }
    let mean_along = row_sum(total(along), local) / p.elements;
    var mean_g = 0.0;
#ifndef RMS
    mean_g = row_sum(total(sum), local) / p.elements;
#endif
    for (var i = local; i < p.width; i += #{WG}u) {
        var g = V(dy[base + i]);
        if p.has_weight != 0u {
            g *= weight[i];
        }
        let normed = (V(x[base + i]) - s.x) * s.y;
        dx[base + i] = Stored(s.y * (g - mean_g - normed * mean_along));
    }
    if local == 0u {
        statistics[row] = s;
    }
#endif
}
#endif

#if STAGE == 2
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let column = group.x * 64u + local;
    let chunk = group.y;
    if column >= p.width {
        return;
    }
    var along = V(0.0);
    var sum = V(0.0);
    let end = min(p.rows, (chunk + 1u) * p.chunk);
    for (var row = chunk * p.chunk; row < end; row++) {
        let s = statistics[row];
        let g = V(dy[row * p.width + column]);
        along += g * (V(x[row * p.width + column]) - s.x) * s.y;
        sum += g;
    }
    partial_sums[(chunk * 2u) * p.width + column] = along;
    partial_sums[(chunk * 2u + 1u) * p.width + column] = sum;
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
