// y = x in another element type, four elements a thread.
// FROM and TO: 0 f32, 1 f16, 2 bf16 (two to a u32), 3 u32, 4 i32.
#import index::{group_index, share}

#if FROM == 0
alias In = vec4<f32>;
#else if FROM == 1
alias In = vec4<f16>;
#else if FROM == 2
alias In = vec2<u32>;
#else if FROM == 3
alias In = vec4<u32>;
#else
alias In = vec4<i32>;
#endif

#if TO == 0
alias Out = vec4<f32>;
#else if TO == 1
alias Out = vec4<f16>;
#else if TO == 2
alias Out = vec2<u32>;
#else if TO == 3
alias Out = vec4<u32>;
#else
alias Out = vec4<i32>;
#endif

struct Params {
    vectors: u32,
    chunk: u32,
}

@group(0) @binding(0) var<storage, read> x: array<In>;
@group(0) @binding(1) var<storage, read_write> y: array<Out>;
var<immediate> p: Params;

// Upper half of an f32, to nearest even; a NaN stays one.
fn bf16_bits(v: f32) -> u32 {
    let bits = bitcast<u32>(v);
    let rounded = (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
    return select(rounded, 0x7fc0u, (bits & 0x7fffffffu) > 0x7f800000u);
}

@compute @workgroup_size(#{WG})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let own = share(group_index(group, groups), p.chunk, p.vectors);
    for (var i = own.x + local; i < own.y; i += #{WG}u) {
        let raw = x[i];
#if FROM == 2
        let v = bitcast<vec4<f32>>(vec4<u32>(raw.x << 16u, raw.x & 0xffff0000u, raw.y << 16u, raw.y & 0xffff0000u));
#else if FROM > 2
        let v = raw;
#else
        let v = vec4<f32>(raw);
#endif
#if TO == 2
        let f = vec4<f32>(v);
        y[i] = vec2<u32>(bf16_bits(f.x) | (bf16_bits(f.y) << 16u), bf16_bits(f.z) | (bf16_bits(f.w) << 16u));
#else
        y[i] = Out(v);
#endif
    }
}
