// y = x[.., ..n] gelu(x[.., n..]), or with BACKWARD the gradient of x. A thread walks rows in one column (or four).
#import activation::{activation, activation_slope}
#import index::column_and_row

#ifdef VEC4
alias V = vec4<f32>;
#ifdef F16
alias Stored = vec4<f16>;
#else
alias Stored = vec4<f32>;
#endif
#else
alias V = f32;
#ifdef F16
alias Stored = f16;
#else
alias Stored = f32;
#endif
#endif

struct Params {
    rows: u32,
    // Elements of a row of y, in units of V.
    width: u32,
    chunk: u32,
}

@group(0) @binding(0) var<storage, read> x: array<Stored>;
#ifdef BACKWARD
@group(0) @binding(1) var<storage, read> dy: array<Stored>;
@group(0) @binding(2) var<storage, read_write> dx: array<Stored>;
#else
@group(0) @binding(1) var<storage, read_write> y: array<Stored>;
#endif
var<immediate> p: Params;

// GELU with the error function, as `Unary::GeluErf`.
const GELU: u32 = 3u;

fn gelu(v: V) -> V {
#ifdef VEC4
    return V(gelu1(v.x), gelu1(v.y), gelu1(v.z), gelu1(v.w));
#else
    return gelu1(v);
#endif
}

fn gelu1(v: f32) -> f32 {
    return activation(GELU, 0.0, 0.0, v);
}

#ifdef BACKWARD
fn slope(v: V) -> V {
#ifdef VEC4
    return V(slope1(v.x), slope1(v.y), slope1(v.z), slope1(v.w));
#else
    return slope1(v);
#endif
}

fn slope1(v: f32) -> f32 {
    return activation_slope(GELU, 0.0, 0.0, v);
}
#endif

@compute @workgroup_size(#{WG})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let place = column_and_row(group, local, #{LANES}u, #{WG}u, p.chunk);
    if place.x >= p.width {
        return;
    }
    let end = min(place.y + p.chunk, p.rows);
    for (var row = place.y; row < end; row++) {
        let at = row * p.width + place.x;
        let first = row * p.width + at;
        let hidden = V(x[first]);
        let gate = V(x[first + p.width]);
#ifdef BACKWARD
        let d = V(dy[at]);
        dx[first] = Stored(d * gelu(gate));
        dx[first + p.width] = Stored(d * hidden * slope(gate));
#else
        y[at] = Stored(hidden * gelu(gate));
#endif
    }
}
