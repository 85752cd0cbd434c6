// y [batch, 2h, 2w, c] repeats x [batch, h, w, c]; with BACKWARD y [batch, h, w, c] sums the four of x. A thread walks pixels
// of the smaller image in one channel (or four).
#import index::column_and_row

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
    // Of the smaller images, all of the batch.
    pixels: u32,
    // Of the smaller image.
    width: u32,
    channels: u32,
    chunk: u32,
}

@group(0) @binding(0) var<storage, read> x: array<Elem>;
@group(0) @binding(1) var<storage, read_write> y: array<Elem>;
var<immediate> p: Params;

@compute @workgroup_size(#{WG})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let at = column_and_row(group, local, #{LANES}u, #{WG}u, p.chunk);
    if at.x >= p.channels {
        return;
    }
    let end = min(at.y + p.chunk, p.pixels);
    var column = at.y % p.width;
    // Batch and row together: both images stack their rows the same way.
    var row = at.y / p.width;
    let pitch = 2u * p.width * p.channels;
    for (var pixel = at.y; pixel < end; pixel++) {
        let small = pixel * p.channels + at.x;
        let large = row * 2u * pitch + column * 2u * p.channels + at.x;
#ifdef BACKWARD
        let top = V(x[large]) + V(x[large + p.channels]);
        y[small] = Elem(top + (V(x[large + pitch]) + V(x[large + pitch + p.channels])));
#else
        let v = x[small];
        y[large] = v;
        y[large + p.channels] = v;
        y[large + pitch] = v;
        y[large + pitch + p.channels] = v;
#endif
        column++;
        if column == p.width {
            column = 0u;
            row++;
        }
    }
}
