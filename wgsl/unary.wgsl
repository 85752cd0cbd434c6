// y = f(x), or dx = dy * f'(x) with BACKWARD. FUNCTION numbers `Unary`.
#import activation::{activation, activation_slope}
#import index::{group_index, share}

#ifdef F16
alias Elem4 = vec4<f16>;
#else
alias Elem4 = vec4<f32>;
#endif

struct Params {
    vectors: u32,
    chunk: u32,
    a: f32,
    b: f32,
}

@group(0) @binding(0) var<storage, read> x: array<Elem4>;
@group(0) @binding(1) var<storage, read_write> y: array<Elem4>;
#ifdef BACKWARD
@group(0) @binding(2) var<storage, read> dy: array<Elem4>;
#endif
var<immediate> p: Params;

@compute @workgroup_size(#{WG})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let own = share(group_index(group, groups), p.chunk, p.vectors);
    for (var i = own.x + local; i < own.y; i += #{WG}u) {
        let v = vec4<f32>(x[i]);
#ifdef BACKWARD
        let d = vec4<f32>(dy[i]);
#endif
        var r: vec4<f32>;
        for (var c = 0u; c < 4u; c++) {
#ifdef BACKWARD
            r[c] = activation_slope(#{FUNCTION}u, p.a, p.b, v[c]) * d[c];
#else
            r[c] = activation(#{FUNCTION}u, p.a, p.b, v[c]);
#endif
        }
        y[i] = Elem4(r);
    }
}
