// x [outer, length, inner] -> y [outer, splits, inner]: thread (o, s, i) reduces elements s, s + splits, …
// VEC4 reads four neighbours; with ROW they belong to one row (inner is 1) and are joined at the end.
// OP: 0 sum, 1 max, 2 min.
#import index::thread_index

#ifdef VEC4
alias V = vec4<f32>;
#ifdef IN16
alias ElemIn = vec4<f16>;
#else
alias ElemIn = vec4<f32>;
#endif
#else
alias V = f32;
#ifdef IN16
alias ElemIn = f16;
#else
alias ElemIn = f32;
#endif
#endif

#ifdef ROW
#ifdef OUT16
alias ElemOut = f16;
#else
alias ElemOut = f32;
#endif
#else ifdef VEC4
#ifdef OUT16
alias ElemOut = vec4<f16>;
#else
alias ElemOut = vec4<f32>;
#endif
#else
#ifdef OUT16
alias ElemOut = f16;
#else
alias ElemOut = f32;
#endif
#endif

struct Params {
    threads: u32,
    length: u32,
    inner: u32,
    splits: u32,
    scale: f32,
}

@group(0) @binding(0) var<storage, read> x: array<ElemIn>;
@group(0) @binding(1) var<storage, read_write> y: array<ElemOut>;
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
    let s = rest % p.splits;
    let o = rest / p.splits;
    let start = o * p.length * p.inner + i;
    var r = V(x[start + s * p.inner]);
    for (var k = s + p.splits; k < p.length; k += p.splits) {
        let v = V(x[start + k * p.inner]);
#if OP == 0
        r += v;
#else if OP == 1
        r = max(r, v);
#else
        r = min(r, v);
#endif
    }
    r = r * p.scale;
#ifdef ROW
#if OP == 0
    y[t] = ElemOut((r.x + r.y) + (r.z + r.w));
#else if OP == 1
    y[t] = ElemOut(max(max(r.x, r.y), max(r.z, r.w)));
#else
    y[t] = ElemOut(min(min(r.x, r.y), min(r.z, r.w)));
#endif
#else
    y[t] = ElemOut(r);
#endif
}
