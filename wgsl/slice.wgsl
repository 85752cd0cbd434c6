// Copies [rows, width] between two row pitches; with PAD thread t makes every element of y's rows,
// zero outside the copied columns.
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
    x_pitch: u32,
    x_start: u32,
    y_pitch: u32,
    y_start: u32,
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
#ifdef PAD
    let row = t / p.y_pitch;
    let column = t % p.y_pitch - p.y_start;
    var word = Word();
    if column < p.width {
        word = x[row * p.x_pitch + p.x_start + column];
    }
    y[t] = word;
#else
    let row = t / p.width;
    let column = t % p.width;
    y[row * p.y_pitch + p.y_start + column] = x[row * p.x_pitch + p.x_start + column];
#endif
}
