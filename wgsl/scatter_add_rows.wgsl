// dx[row] = sum of dy over the row's list (see row_lists.wgsl), in ascending order.
#import index::thread_index

#ifdef VEC4
alias V = vec4<f32>;
#ifdef F16
alias Elem = vec4<f16>;
#else
alias Elem = vec4<f32>;
#endif
#else
alias V = f32;
#ifdef F16
alias Elem = f16;
#else
alias Elem = f32;
#endif
#endif

struct Params {
    threads: u32,
    width: u32,
    limit: u32,
}

@group(0) @binding(0) var<storage, read> dy: array<Elem>;
@group(0) @binding(1) var<storage, read> first: array<u32>;
@group(0) @binding(2) var<storage, read> next: array<u32>;
@group(0) @binding(3) var<storage, read_write> dx: array<Elem>;
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
    let column = t % p.width;
    var sum = V(0.0);
    var r = first[t / p.width];
    while r < p.limit {
        sum += V(dy[r * p.width + column]);
        r = next[r];
    }
    dx[t] = Elem(sum);
}
