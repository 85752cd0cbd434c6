// Keeps the lowest tag of the tensors that hold a NaN or an infinity.
#import index::{group_index, share}

#ifdef F16
alias Elem4 = vec4<f16>;
#else
alias Elem4 = vec4<f32>;
#endif

struct Params {
    vectors: u32,
    chunk: u32,
    elements: u32,
    tag: u32,
}

@group(0) @binding(0) var<storage, read> x: array<Elem4>;
@group(0) @binding(1) var<storage, read_write> flag: array<atomic<u32>>;
var<immediate> p: Params;

@compute @workgroup_size(#{WG})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let own = share(group_index(group, groups), p.chunk, p.vectors);
    for (var i = own.x + local; i < own.y; i += #{WG}u) {
        // By bits: compilers may assume that arithmetic meets no NaN.
        let exponent = bitcast<vec4<u32>>(vec4<f32>(x[i])) & vec4<u32>(0x7f800000u);
        let inside = vec4<u32>(4u * i) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(p.elements);
        if any((exponent == vec4<u32>(0x7f800000u)) & inside) {
            atomicMin(&flag[0], p.tag);
        }
    }
}
