// dx [outer, length, inner] = dy [outer, inner] at the saved index, zero elsewhere.
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

@group(0) @binding(0) var<storage, read> dy: array<Elem>;
@group(0) @binding(1) var<storage, read> index: array<u32>;
@group(0) @binding(2) var<storage, read_write> dx: array<Elem>;
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
    let i = t % p.inner;
    let rest = t / p.inner;
    let j = rest / p.length * p.inner + i;
    dx[t] = select(Elem(0.0), dy[j], index[j] == rest % p.length);
}
