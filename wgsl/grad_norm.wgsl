// Partial sums of squares of one tensor: part t takes vectors t, t + parts, …
#import index::thread_index

#ifdef F16
alias Elem4 = vec4<f16>;
#else
alias Elem4 = vec4<f32>;
#endif

struct Params {
    elements: u32,
    parts: u32,
    start: u32,
}

@group(0) @binding(0) var<storage, read> x: array<Elem4>;
@group(0) @binding(1) var<storage, read_write> partial: array<f32>;
var<immediate> p: Params;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = thread_index(group, groups, local, 64u);
    if t >= p.parts {
        return;
    }
    let whole = p.elements / 4u;
    var sum = vec4<f32>(0.0);
    for (var i = t; i < whole; i += p.parts) {
        let v = vec4<f32>(x[i]);
        sum += v * v;
    }
    if whole % p.parts == t {
        for (var c = 0u; c < p.elements % 4u; c++) {
            let v = f32(x[whole][c]);
            sum[c] += v * v;
        }
    }
    partial[p.start + t] = (sum.x + sum.y) + (sum.z + sum.w);
}
