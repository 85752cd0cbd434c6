// y = x with its dimensions reordered; one element (or four that stay neighbours) a thread.
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

// Sizes of y, innermost first, and x's stride along each.
struct Params {
    threads: u32,
    d0: u32, d1: u32, d2: u32, d3: u32, d4: u32, d5: u32,
    s0: u32, s1: u32, s2: u32, s3: u32, s4: u32, s5: u32,
}

@group(0) @binding(0) var<storage, read> x: array<Word>;
@group(0) @binding(1) var<storage, read_write> y: array<Word>;
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
    var from_index = t % p.d0 * p.s0;
    var i = t / p.d0;
#if RANK == 2
    from_index += i * p.s1;
#else
    from_index += i % p.d1 * p.s1;
    i = i / p.d1;
#if RANK == 3
    from_index += i * p.s2;
#else
    from_index += i % p.d2 * p.s2;
    i = i / p.d2;
    from_index += i % p.d3 * p.s3;
    i = i / p.d3;
    from_index += i % p.d4 * p.s4;
    i = i / p.d4;
    from_index += i * p.s5;
#endif
#endif
    y[t] = x[from_index];
}
