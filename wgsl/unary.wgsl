// y = f(x), or dx = dy * f'(x) with BACKWARD; four elements a thread.
#import activation::{activation, activation_slope}
#import index::thread_index

#ifdef F16
alias Elem4 = vec4<f16>;
#else
alias Elem4 = vec4<f32>;
#endif

struct Params {
    elements: u32,
    function: u32,
    a: f32,
    b: f32,
}

@group(0) @binding(0) var<storage, read> x: array<Elem4>;
@group(0) @binding(1) var<storage, read_write> y: array<Elem4>;
#ifdef BACKWARD
@group(0) @binding(2) var<storage, read> dy: array<Elem4>;
#endif
var<immediate> p: Params;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = thread_index(group, groups, local, 64u);
    if i * 4u >= p.elements {
        return;
    }
    let v = vec4<f32>(x[i]);
    var r: vec4<f32>;
    for (var c = 0u; c < 4u; c++) {
#ifdef BACKWARD
        r[c] = activation_slope(p.function, p.a, p.b, v[c]) * f32(dy[i][c]);
#else
        r[c] = activation(p.function, p.a, p.b, v[c]);
#endif
    }
    y[i] = Elem4(r);
}
