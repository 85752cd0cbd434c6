// y [batch, out, c] = bilinear x [batch, in, c], half-pixel centres, edges clamped, no antialias.
// With BACKWARD x is the upstream gradient of the output and y that of the input.
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

struct Source {
    low: u32,
    high: u32,
    fraction: f32,
}

// The two input pixels of an axis that output pixel `i` reads, and the share of the second.
fn source(i: u32, scale: f32, size: u32) -> Source {
    let at = max((f32(i) + 0.5) * scale - 0.5, 0.0);
    let low = min(u32(at), size - 1u);
    return Source(low, min(low + 1u, size - 1u), at - f32(low));
}

// Weight of input pixel `j` in output pixel `i`.
fn weight(i: u32, j: u32, scale: f32, size: u32) -> f32 {
    let s = source(i, scale, size);
    return select(0.0, 1.0 - s.fraction, s.low == j) + select(0.0, s.fraction, s.high == j);
}

// First and one past the last output pixel that can read input pixel `j`; a pixel to spare each side.
fn readers(j: u32, scale: f32, size: u32, out: u32) -> vec2<u32> {
    var first = 0u;
    if j > 0u {
        first = u32(max((f32(j) - 0.5) / scale - 1.5, 0.0));
    }
    var end = out;
    if j + 1u < size {
        end = min(u32((f32(j) + 1.5) / scale + 1.5), out);
    }
    return vec2<u32>(first, end);
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
#ifdef BACKWARD
    let column = pixel % p.in_width;
    let row = pixel / p.in_width % p.in_height;
    let batch = pixel / (p.in_width * p.in_height);
    let rows = readers(row, p.scale_y, p.in_height, p.out_height);
    let columns = readers(column, p.scale_x, p.in_width, p.out_width);
    var sum = 0.0;
    for (var i = rows.x; i < rows.y; i++) {
        let weight_y = weight(i, row, p.scale_y, p.in_height);
        if weight_y != 0.0 {
            var line = 0.0;
            for (var j = columns.x; j < columns.y; j++) {
                let index = ((batch * p.out_height + i) * p.out_width + j) * p.channels + c;
                line += weight(j, column, p.scale_x, p.in_width) * f32(x[index]);
            }
            sum += weight_y * line;
        }
    }
    y[t] = Elem(sum);
#else
    let column = pixel % p.out_width;
    let row = pixel / p.out_width % p.out_height;
    let batch = pixel / (p.out_width * p.out_height);
    let sy = source(row, p.scale_y, p.in_height);
    let sx = source(column, p.scale_x, p.in_width);
    let top = (batch * p.in_height + sy.low) * p.in_width;
    let bottom = (batch * p.in_height + sy.high) * p.in_width;
    let a = mix(f32(x[(top + sx.low) * p.channels + c]), f32(x[(top + sx.high) * p.channels + c]), sx.fraction);
    let b = mix(f32(x[(bottom + sx.low) * p.channels + c]), f32(x[(bottom + sx.high) * p.channels + c]), sx.fraction);
    y[t] = Elem(mix(a, b, sy.fraction));
#endif
}
