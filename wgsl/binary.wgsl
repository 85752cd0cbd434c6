// y = op(a, b) with broadcasting: strides are 0 where an operand is broadcast. OP numbers `Binary`.
// With A_REPEATS or B_REPEATS that of the innermost dimension is. Dimensions are innermost first; with VEC4 a thread makes four neighbours of the innermost one.
#ifdef COLUMNS
#import index::column_and_row
#else
#import index::{group_index, share}
#endif

#ifdef VEC4
const LENGTH: u32 = 4u;
alias V = vec4<f32>;
#ifdef A16
alias ElemA = vec4<f16>;
#else
alias ElemA = vec4<f32>;
#endif
#ifdef B16
alias ElemB = vec4<f16>;
#else
alias ElemB = vec4<f32>;
#endif
#else
const LENGTH: u32 = 1u;
alias V = f32;
#ifdef A16
alias ElemA = f16;
#else
alias ElemA = f32;
#endif
#ifdef B16
alias ElemB = f16;
#else
alias ElemB = f32;
#endif
#endif

struct Params {
    vectors: u32,
    chunk: u32,
    d0: u32, d1: u32, d2: u32, d3: u32, d4: u32, d5: u32,
    a0: u32, a1: u32, a2: u32, a3: u32, a4: u32, a5: u32,
    b0: u32, b1: u32, b2: u32, b3: u32, b4: u32, b5: u32,
}

@group(0) @binding(0) var<storage, read> a: array<ElemA>;
@group(0) @binding(1) var<storage, read> b: array<ElemB>;
@group(0) @binding(2) var<storage, read_write> y: array<ElemA>;
var<immediate> p: Params;

fn load_a(i: u32) -> V {
#ifndef VEC4
    return V(a[i]);
#else ifdef A_REPEATS
    return V(f32(a[i >> 2u][i & 3u]));
#else
    return V(a[i >> 2u]);
#endif
}

fn load_b(i: u32) -> V {
#ifndef VEC4
    return V(b[i]);
#else ifdef B_REPEATS
    return V(f32(b[i >> 2u][i & 3u]));
#else
    return V(b[i >> 2u]);
#endif
}

fn apply(u: V, v: V) -> V {
#if OP == 0
    return u + v;
#else if OP == 1
    return u - v;
#else if OP == 2
    return u * v;
#else if OP == 3
    return u / v;
#else if OP == 4
    return max(u, v);
#else if OP == 5
    return min(u, v);
#else if OP == 7
    return u;
#else
    return select(select(V(0.0), V(0.5), u == v), V(1.0), u > v);
#endif
}

#ifdef COLUMNS
// Rank 2: a thread walks down a column, so that nothing is divided. A_STAYS, B_STAYS: that operand is a row for all rows.
@compute @workgroup_size(#{WG})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let width = p.d0 / LENGTH;
    let at = column_and_row(group, local, #{LANES}u, #{WG}u, p.chunk);
    if at.x >= width {
        return;
    }
    let end = min(at.y + p.chunk, p.d1);
    var ia = at.x * LENGTH * p.a0 + at.y * p.a1;
    var ib = at.x * LENGTH * p.b0 + at.y * p.b1;
#ifdef A_STAYS
    let u = load_a(ia);
#endif
#ifdef B_STAYS
    let v = load_b(ib);
#endif
    // Added, as CPU drivers multiply integers slowly.
    var to = at.y * width + at.x;
    for (var row = at.y; row < end; row++) {
#ifndef A_STAYS
        let u = load_a(ia);
        ia += p.a1;
#endif
#ifndef B_STAYS
        let v = load_b(ib);
        ib += p.b1;
#endif
        y[to] = ElemA(apply(u, v));
        to += width;
    }
}
#else
fn element(t: u32) {
    var i = t * LENGTH;
    var ia = 0u;
    var ib = 0u;
#if RANK > 1
    var c = i % p.d0;
    i = i / p.d0;
    ia = c * p.a0;
    ib = c * p.b0;
#if RANK > 2
    c = i % p.d1;
    i = i / p.d1;
    ia += c * p.a1;
    ib += c * p.b1;
#endif
#if RANK > 3
    c = i % p.d2;
    i = i / p.d2;
    ia += c * p.a2;
    ib += c * p.b2;
    c = i % p.d3;
    i = i / p.d3;
    ia += c * p.a3;
    ib += c * p.b3;
    c = i % p.d4;
    i = i / p.d4;
    ia += c * p.a4;
    ib += c * p.b4;
#endif
#endif
#if RANK == 1
    ia = i * p.a0;
    ib = i * p.b0;
#else if RANK == 2
    ia += i * p.a1;
    ib += i * p.b1;
#else if RANK == 3
    ia += i * p.a2;
    ib += i * p.b2;
#else
    ia += i * p.a5;
    ib += i * p.b5;
#endif
    y[t] = ElemA(apply(load_a(ia), load_b(ib)));
}

@compute @workgroup_size(#{WG})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let own = share(group_index(group, groups), p.chunk, p.vectors);
    for (var t = own.x + local; t < own.y; t += #{WG}u) {
        element(t);
    }
}
#endif
