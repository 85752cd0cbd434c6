// y[rows[r]] = source[r] in place, or zeros with ZERO; a row index past the end is skipped.
#import index::thread_index

// Any element type is moved as bits: u32 for four bytes, f16 for two.
#ifdef F16
#ifdef VEC4
alias Word = vec4<f16>;
#else
alias Word = f16;
#endif
#else
#ifdef VEC4
alias Word = vec4<u32>;
#else
alias Word = u32;
#endif
#endif

struct Params {
    threads: u32,
    width: u32,
    limit: u32,
}

@group(0) @binding(0) var<storage, read_write> y: array<Word>;
@group(0) @binding(1) var<storage, read> rows: array<u32>;
#ifndef ZERO
@group(0) @binding(2) var<storage, read> source: array<Word>;
#endif
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
    let row = rows[t / p.width];
    if row >= p.limit {
        return;
    }
#ifdef ZERO
    y[row * p.width + t % p.width] = Word();
#else
    y[row * p.width + t % p.width] = source[t];
#endif
}
