// y = silu(gate) * up, or the gradients towards both with BACKWARD.
#import index::{group_index, share}

#ifdef F16
alias Elem4 = vec4<f16>;
#else
alias Elem4 = vec4<f32>;
#endif

struct Params {
    vectors: u32,
    chunk: u32,
}

@group(0) @binding(0) var<storage, read> gate: array<Elem4>;
@group(0) @binding(1) var<storage, read> up: array<Elem4>;
#ifdef BACKWARD
@group(0) @binding(2) var<storage, read> dy: array<Elem4>;
@group(0) @binding(3) var<storage, read_write> dgate: array<Elem4>;
@group(0) @binding(4) var<storage, read_write> dup: array<Elem4>;
#else
@group(0) @binding(2) var<storage, read_write> y: array<Elem4>;
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
        let g = vec4<f32>(gate[i]);
        let u = vec4<f32>(up[i]);
        let s = 1.0 / (1.0 + exp(-g));
#ifdef BACKWARD
        let d = vec4<f32>(dy[i]);
        dgate[i] = Elem4(d * u * s * (1.0 + g * (1.0 - s)));
        dup[i] = Elem4(d * g * s);
#else
        y[i] = Elem4(g * s * u);
#endif
    }
}
