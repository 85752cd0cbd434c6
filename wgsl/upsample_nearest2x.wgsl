// y [batch, 2h, 2w, c] repeats x [batch, h, w, c]; with BACKWARD y [batch, h, w, c] sums the four of x.
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
    channels: u32,
}

@group(0) @binding(0) var<storage, read> x: array<Elem>;
@group(0) @binding(1) var<storage, read_write> y: array<Elem>;
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
    let c = t % p.channels;
    let pixel = t / p.channels;
#ifdef BACKWARD
    let column = pixel % p.width;
    // Batch and row together: both images stack their rows the same way.
    let row = pixel / p.width;
    let pitch = 2u * p.width * p.channels;
    let i = row * 2u * pitch + column * 2u * p.channels + c;
    let top = V(x[i]) + V(x[i + p.channels]);
    y[t] = Elem(top + (V(x[i + pitch]) + V(x[i + pitch + p.channels])));
#else
    let column = pixel % (2u * p.width);
    let row = pixel / (2u * p.width);
    y[t] = x[(row / 2u * p.width + column / 2u) * p.channels + c];
#endif
}
