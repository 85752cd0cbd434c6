// delta f32 [B, H, T] = Σ_d dout · out of each query row and head; a thread each.
#import attention_mask::Params
#import index::thread_index

#ifdef F16
alias Elem = f16;
#else
alias Elem = f32;
#endif
#ifdef VEC4
#ifdef F16
alias Stored = vec4<f16>;
#else
alias Stored = vec4<f32>;
#endif
const WIDTH: u32 = #{D}u / 4u;
#else
alias Stored = Elem;
const WIDTH: u32 = #{D}u;
#endif

@group(0) @binding(0) var<storage, read> out: array<Stored>;
@group(0) @binding(1) var<storage, read> dout: array<Stored>;
@group(0) @binding(2) var<storage, read_write> delta: array<f32>;
var<immediate> p: Params;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = thread_index(group, groups, local, 64u);
    if i >= p.batch * p.queries * p.heads {
        return;
    }
    var sum = 0.0;
    for (var d = 0u; d < WIDTH; d++) {
#ifdef VEC4
        sum += dot(vec4<f32>(out[i * WIDTH + d]), vec4<f32>(dout[i * WIDTH + d]));
#else
        sum += f32(out[i * WIDTH + d]) * f32(dout[i * WIDTH + d]);
#endif
    }
    let token = i / p.heads;
    let b = token / p.queries;
    delta[(b * p.heads + i % p.heads) * p.queries + token % p.queries] = sum;
}
