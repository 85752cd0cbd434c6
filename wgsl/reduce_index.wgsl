// x [outer, length, inner] -> index u32 [outer, inner] of the first maximum (OP 1) or minimum (OP 2).
#import index::thread_index

#ifdef F16
alias Elem = f16;
#else
alias Elem = f32;
#endif

struct Params {
    threads: u32,
    length: u32,
    inner: u32,
}

@group(0) @binding(0) var<storage, read> x: array<Elem>;
@group(0) @binding(1) var<storage, read_write> index: array<u32>;
var<immediate> p: Params;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = thread_index(group, groups, local, 64u);
    if t >= p.threads {
        return;
    }
    let start = t / p.inner * p.length * p.inner + t % p.inner;
    var best = x[start];
    var at = 0u;
    for (var k = 1u; k < p.length; k++) {
        let v = x[start + k * p.inner];
#if OP == 1
        if v > best {
#else
        if v < best {
#endif
            best = v;
            at = k;
        }
    }
    index[t] = at;
}
