// x changed in place, four elements a thread; the last vector keeps what lies past the end.
// MODE: 0 x = value, 1 x *= value, 2 x *= other[0], 3 x += value * other.
#import index::{group_index, share}

#ifdef X16
alias Elem4 = vec4<f16>;
#else
alias Elem4 = vec4<f32>;
#endif
#ifdef OTHER16
alias Other4 = vec4<f16>;
#else
alias Other4 = vec4<f32>;
#endif

struct Params {
    vectors: u32,
    chunk: u32,
    elements: u32,
    value: f32,
}

@group(0) @binding(0) var<storage, read_write> x: array<Elem4>;
#if MODE == 2
@group(0) @binding(1) var<storage, read> other: array<f32>;
#else if MODE == 3
@group(0) @binding(1) var<storage, read> other: array<Other4>;
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
        let old = x[i];
#if MODE == 0
        let result = vec4<f32>(p.value);
#else if MODE == 1
        let result = vec4<f32>(old) * p.value;
#else if MODE == 2
        let result = vec4<f32>(old) * other[0];
#else
        let result = vec4<f32>(old) + p.value * vec4<f32>(other[i]);
#endif
        let inside = vec4<u32>(4u * i) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(p.elements);
        x[i] = select(old, Elem4(result), inside);
    }
}
