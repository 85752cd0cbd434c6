// y = softmax(x) over the last dimension, or dx = y (dy − Σ y dy) with BACKWARD; a workgroup a row.
#import index::group_index
#import row_reduce::{row_max, row_sum}

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
fn largest(v: V) -> f32 {
    return max(max(v.x, v.y), max(v.z, v.w));
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
fn largest(v: V) -> f32 {
    return v;
}
#endif

struct Params {
    rows: u32,
    // Elements of a row, in units of V.
    width: u32,
}

#ifdef BACKWARD
@group(0) @binding(0) var<storage, read> y: array<Stored>;
@group(0) @binding(1) var<storage, read> dy: array<Stored>;
@group(0) @binding(2) var<storage, read_write> dx: array<Stored>;
#else
@group(0) @binding(0) var<storage, read> x: array<Stored>;
@group(0) @binding(1) var<storage, read_write> y: array<Stored>;
#endif
var<immediate> p: Params;

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
#ifdef BACKWARD
    var products = V(0.0);
    for (var i = local; i < p.width; i += #{WG}u) {
        products += V(y[base + i]) * V(dy[base + i]);
    }
    let mean = row_sum(total(products), local);
    for (var i = local; i < p.width; i += #{WG}u) {
        dx[base + i] = Stored(V(y[base + i]) * (V(dy[base + i]) - mean));
    }
#else
    var top = V(-3.4e38);
    for (var i = local; i < p.width; i += #{WG}u) {
        top = max(top, V(x[base + i]));
    }
    let peak = row_max(largest(top), local);
    var sums = V(0.0);
    for (var i = local; i < p.width; i += #{WG}u) {
        sums += exp(V(x[base + i]) - peak);
    }
    let inverse = 1.0 / row_sum(total(sums), local);
    for (var i = local; i < p.width; i += #{WG}u) {
        y[base + i] = Stored(exp(V(x[base + i]) - peak) * inverse);
    }
#endif
}
