// y [batch, out, c] = bicubic x [batch, in, c], half-pixel centres, edges clamped, no antialias.
#import index::thread_index

#ifdef F16
alias Elem = f16;
#else
alias Elem = f32;
#endif

struct Params {
    threads: u32,
    channels: u32,
    in_height: u32,
    in_width: u32,
    out_height: u32,
    out_width: u32,
    scale_y: f32,
    scale_x: f32,
}

@group(0) @binding(0) var<storage, read> x: array<Elem>;
@group(0) @binding(1) var<storage, read_write> y: array<Elem>;
var<immediate> p: Params;

// Weights of the four pixels around a point that lies `t` past the second of them (Keys 1981, a = -0.75).
fn weights(t: f32) -> vec4<f32> {
    let a = -0.75;
    let near = vec2<f32>(t, 1.0 - t);
    let far = near + 1.0;
    let inner = ((a + 2.0) * near - (a + 3.0)) * near * near + 1.0;
    let outer = ((a * far - 5.0 * a) * far + 8.0 * a) * far - 4.0 * a;
    return vec4<f32>(outer.x, inner.x, inner.y, outer.y);
}

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
    let column = pixel % p.out_width;
    let row = pixel / p.out_width % p.out_height;
    let batch = pixel / (p.out_width * p.out_height);
    let at = (vec2<f32>(f32(row), f32(column)) + 0.5) * vec2<f32>(p.scale_y, p.scale_x) - 0.5;
    let first = floor(at);
    let of_row = weights(at.x - first.x);
    let of_column = weights(at.y - first.y);
    let last = vec2<i32>(i32(p.in_height), i32(p.in_width)) - 1;
    var sum = 0.0;
    for (var i = 0; i < 4; i++) {
        let from_row = u32(clamp(i32(first.x) + i - 1, 0, last.x));
        let line_start = (batch * p.in_height + from_row) * p.in_width;
        var line = 0.0;
        for (var j = 0; j < 4; j++) {
            let from_column = u32(clamp(i32(first.y) + j - 1, 0, last.y));
            line += of_column[j] * f32(x[(line_start + from_column) * p.channels + c]);
        }
        sum += of_row[i] * line;
    }
    y[t] = Elem(sum);
}
