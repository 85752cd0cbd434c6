// y = x / (1 - p) where a hash of (seed ^ stream, index) reaches the threshold, else 0.
#import index::{group_index, share}

#ifdef F16
alias Elem4 = vec4<f16>;
#else
alias Elem4 = vec4<f32>;
#endif

struct Params {
    vectors: u32,
    chunk: u32,
    stream_low: u32,
    stream_high: u32,
    threshold: u32,
    scale: f32,
}

@group(0) @binding(0) var<storage, read> x: array<Elem4>;
@group(0) @binding(1) var<storage, read> seed: array<u32>;
@group(0) @binding(2) var<storage, read_write> y: array<Elem4>;
var<immediate> p: Params;

// PCG as a hash (Jarzynski and Olano 2020), on four words at once.
fn pcg(input: vec4<u32>) -> vec4<u32> {
    let state = input * 747796405u + 2891336453u;
    let word = ((state >> ((state >> vec4<u32>(28u)) + 4u)) ^ state) * 277803737u;
    return (word >> vec4<u32>(22u)) ^ word;
}

@compute @workgroup_size(#{WG})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let low = vec4<u32>(seed[0] ^ p.stream_low);
    let high = vec4<u32>(seed[1] ^ p.stream_high);
    let own = share(group_index(group, groups), p.chunk, p.vectors);
    for (var i = own.x + local; i < own.y; i += #{WG}u) {
        let index = vec4<u32>(4u * i) + vec4<u32>(0u, 1u, 2u, 3u);
        let bits = pcg(pcg(pcg(index) ^ low) ^ high);
        y[i] = Elem4(select(vec4<f32>(0.0), vec4<f32>(x[i]) * p.scale, bits >= vec4<u32>(p.threshold)));
    }
}
