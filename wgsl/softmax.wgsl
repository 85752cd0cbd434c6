// y = softmax(x) over the last dimension, or dx = y (dy − Σ y dy) with BACKWARD; a workgroup
// a row. With HELD a thread keeps its HELD vectors of a row in registers; WHOLE rows are HELD · WG wide.
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

#ifdef HELD
var<private> held: array<V, #{HELD}>;
#ifdef BACKWARD
var<private> held_dy: array<V, #{HELD}>;
#endif
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
    for (var k = 0u; k < steps(); k++) {
        let i = k * #{WG}u + local;
        if inside(i) {
            let value = V(y[base + i]);
            let slope = V(dy[base + i]);
#ifdef HELD
            held[k] = value;
            held_dy[k] = slope;
#endif
            products += value * slope;
        }
    }
    let mean = row_sum(total(products), local);
    for (var k = 0u; k < steps(); k++) {
        let i = k * #{WG}u + local;
        if inside(i) {
#ifdef HELD
            dx[base + i] = Stored(held[k] * (held_dy[k] - mean));
#else
            dx[base + i] = Stored(V(y[base + i]) * (V(dy[base + i]) - mean));
#endif
        }
    }
#else
    var top = V(-3.4e38);
    for (var k = 0u; k < steps(); k++) {
        let i = k * #{WG}u + local;
        if inside(i) {
            let value = V(x[base + i]);
#ifdef HELD
            held[k] = value;
#endif
            top = max(top, value);
        }
    }
    let peak = row_max(largest(top), local);
    var sums = V(0.0);
    for (var k = 0u; k < steps(); k++) {
        let i = k * #{WG}u + local;
        if inside(i) {
#ifdef HELD
            let power = exp(held[k] - peak);
            held[k] = power;
#else
            let power = exp(V(x[base + i]) - peak);
#endif
            sums += power;
        }
    }
    let inverse = 1.0 / row_sum(total(sums), local);
    for (var k = 0u; k < steps(); k++) {
        let i = k * #{WG}u + local;
        if inside(i) {
#ifdef HELD
            y[base + i] = Stored(held[k] * inverse);
#else
            y[base + i] = Stored(exp(V(x[base + i]) - peak) * inverse);
#endif
        }
    }
#endif
}
