// A band of an image with its zero padding written out, `dilation` − 1 zeros between pixels, channels
// padded to a multiple of four: f32 [images, rows, columns, padded channels].
#ifdef F16
alias Elem = f16;
#else
alias Elem = f32;
#endif

struct Params {
    // Elements before the band, rows and columns of the source.
    start: u32,
    src_h: i32,
    src_w: i32,
    channels: u32,
    dilation: i32,
    top: i32,
    left: i32,
    // vec4s of a pixel and of a row of the result.
    quads: u32,
    row: u32,
    rows: u32,
}

@group(0) @binding(0) var<storage, read> x: array<Elem>;
@group(0) @binding(1) var<storage, read_write> padded: array<vec4<f32>>;
var<immediate> p: Params;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let i = group.x * 64u + local;
    if i >= p.row {
        return;
    }
    let channel = (i % p.quads) * 4u;
    let y = i32(group.y) - p.top;
    let x0 = i32(i / p.quads) - p.left;
    let row = y / p.dilation;
    let column = x0 / p.dilation;
    var v = vec4<f32>();
    if y >= 0 && row < p.src_h && row * p.dilation == y
        && x0 >= 0 && column < p.src_w && column * p.dilation == x0 {
        let at = p.start
            + ((group.z * u32(p.src_h) + u32(row)) * u32(p.src_w) + u32(column)) * p.channels
            + channel;
        if channel + 3u < p.channels {
            v = vec4<f32>(f32(x[at]), f32(x[at + 1u]), f32(x[at + 2u]), f32(x[at + 3u]));
        } else {
            for (var j = 0u; j < 3u; j++) {
                if channel + j < p.channels {
                    v[j] = f32(x[at + j]);
                }
            }
        }
    }
    padded[(group.z * p.rows + group.y) * p.row + i] = v;
}
