// Sums what each tap of a convolution of stride 1 gave at the input pixel that it sees: `products` [taps · channels, pixels]
// into y [images, rows, columns, channels], a thread an element.
#ifdef F16
alias Elem = f16;
#else
alias Elem = f32;
#endif

struct Params {
    // Input pixels of all images; the size of one.
    pixels: u32,
    height: i32,
    width: i32,
    // Output rows of an image, elements of one, channels.
    rows: u32,
    row: u32,
    channels: u32,
    kernel_h: u32,
    kernel_w: u32,
    pad_top: i32,
    pad_left: i32,
    start: u32,
    has_bias: u32,
}

@group(0) @binding(0) var<storage, read> products: array<f32>;
@group(0) @binding(1) var<storage, read_write> result: array<Elem>;
@group(0) @binding(2) var<storage, read> bias: array<f32>;
var<immediate> p: Params;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let i = group.x * 64u + local;
    if i >= p.row {
        return;
    }
    let channel = i % p.channels;
    let x0 = i32(i / p.channels) - p.pad_left;
    var sum = 0.0;
    if p.has_bias != 0u {
        sum = bias[channel];
    }
    for (var ky = 0u; ky < p.kernel_h; ky++) {
        let y = i32(group.y + ky) - p.pad_top;
        if y < 0 || y >= p.height {
            continue;
        }
        let line = (i32(group.z) * p.height + y) * p.width;
        for (var kx = 0u; kx < p.kernel_w; kx++) {
            let x = x0 + i32(kx);
            if x >= 0 && x < p.width {
                sum += products[((ky * p.kernel_w + kx) * p.channels + channel) * p.pixels + u32(line + x)];
            }
        }
    }
    result[p.start + (group.z * p.rows + group.y) * p.row + i] = Elem(sum);
}
