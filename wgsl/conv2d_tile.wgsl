// Convolution as an implicit matrix product for GPUs, tiled like matmul_tile. Pixels and taps are
// unfolded while loading. MODE 0: y[pixel, co] = Σ over (tap, ci); 1: dx[pixel, ci] = Σ over
// (tap, co); 2: dw[(tap, ci), co] = Σ over output pixels, cut into parts that are added later.

#ifdef X_F16
alias XElem = f16;
#else
alias XElem = f32;
#endif
#ifdef Y_F16
alias YElem = f16;
#else
alias YElem = f32;
#endif

struct Params {
    // The implicit product.
    m: u32,
    n: u32,
    k: u32,
    // Rows and columns of the tensor that is unfolded, and of the pixels that index it.
    src_h: i32,
    src_w: i32,
    dst_h: u32,
    dst_w: u32,
    channels: u32,
    kernel_w: u32,
    stride: i32,
    pad_top: i32,
    pad_left: i32,
    x_start: u32,
    b_start: u32,
    y_start: u32,
    splits: u32,
    k_part: u32,
    // Input and output channels of the weight, for MODE 1.
    ci: u32,
    co: u32,
    has_bias: u32,
}

// MODE 0 and 2: the input; MODE 1: dy.
@group(0) @binding(0) var<storage, read> x: array<XElem>;
// MODE 0 and 1: the weight; MODE 2: dy.
#ifdef B_BF16
@group(0) @binding(1) var<storage, read> b: array<u32>;
#else
#ifdef B_F16
@group(0) @binding(1) var<storage, read> b: array<f16>;
#else
@group(0) @binding(1) var<storage, read> b: array<f32>;
#endif
#endif
@group(0) @binding(2) var<storage, read_write> y: array<YElem>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
var<immediate> p: Params;

const PER = #{PER}u;
const TILE = 16u * PER;
const STEP = 16u;
const ROW = TILE + 1u;

var<workgroup> a_tile: array<f32, STEP * ROW>;
var<workgroup> b_tile: array<f32, STEP * ROW>;

fn load_b(i: u32) -> f32 {
#ifdef B_BF16
    let word = b[i >> 1u];
    return bitcast<f32>(select(word << 16u, word & 0xffff0000u, (i & 1u) == 1u));
#else
    return f32(b[i]);
#endif
}

struct Pixel {
    // First element of the image; row and column before the tap is added or taken away.
    image: u32,
    row: i32,
    column: i32,
}

fn pixel(index: u32) -> Pixel {
    let column = i32(index % p.dst_w);
    let line = index / p.dst_w;
    let row = i32(line % p.dst_h);
    let image = p.x_start + (line / p.dst_h) * u32(p.src_h * p.src_w) * p.channels;
#if MODE == 1
    return Pixel(image, row + p.pad_top, column + p.pad_left);
#else
    return Pixel(image, row * p.stride - p.pad_top, column * p.stride - p.pad_left);
#endif
}

// x at `at` moved by the tap, 0 outside.
fn unfold(at: Pixel, tap: u32, channel: u32) -> f32 {
    let ky = i32(tap / p.kernel_w);
    let kx = i32(tap % p.kernel_w);
#if MODE == 1
    let sy = at.row - ky;
    let sx = at.column - kx;
    let row = sy / p.stride;
    let column = sx / p.stride;
    let whole = sy >= 0 && sx >= 0 && row * p.stride == sy && column * p.stride == sx;
#else
    let row = at.row + ky;
    let column = at.column + kx;
    let whole = row >= 0 && column >= 0;
#endif
    if !whole || row >= p.src_h || column >= p.src_w {
        return 0.0;
    }
    return f32(x[at.image + u32(row * p.src_w + column) * p.channels + channel]);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let row0 = group.y * TILE;
    let col0 = group.x * TILE;
    let tx = local % 16u;
    let ty = local / 16u;
    let k_end = min(p.k, (group.z + 1u) * p.k_part);
#if MODE == 2
    // A thread's row of the tile, hence its tap and channel, never changes.
    let am = local % TILE;
    let tap = (row0 + am) / p.channels;
    let channel = (row0 + am) % p.channels;
#else
    // A thread's rows of the tile, hence their pixels, never change.
    let ak = local % STEP;
    var pixels: array<Pixel, PER>;
    for (var i = 0u; i < PER; i++) {
        pixels[i] = pixel(row0 + local / STEP + 16u * i);
    }
#endif
    var sum: array<array<f32, PER>, PER>;
    for (var k0 = group.z * p.k_part; k0 < k_end; k0 += STEP) {
#if MODE != 2
        let tap = (k0 + ak) / p.channels;
        let channel = (k0 + ak) % p.channels;
#endif
        for (var i = 0u; i < PER; i++) {
            let t = local + 256u * i;
            var av = 0.0;
#if MODE == 2
            let ak = t / TILE;
            if row0 + am < p.m && k0 + ak < k_end {
                av = unfold(pixel(k0 + ak), tap, channel);
            }
#else
            let am = t / STEP;
            if row0 + am < p.m && k0 + ak < k_end {
                av = unfold(pixels[i], tap, channel);
            }
#endif
            a_tile[ak * ROW + am] = av;
            var bv = 0.0;
#if MODE == 1
            // The weight is read transposed: channel is co, the column is ci.
            let bk = ak;
            let bn = t / STEP;
            if col0 + bn < p.n && k0 + bk < k_end {
                bv = load_b(p.b_start + (tap * p.ci + col0 + bn) * p.co + channel);
            }
#else
            let bk = t / TILE;
            let bn = t % TILE;
            if col0 + bn < p.n && k0 + bk < k_end {
                bv = load_b(p.b_start + (k0 + bk) * p.n + col0 + bn);
            }
#endif
            b_tile[bk * ROW + bn] = bv;
        }
        workgroupBarrier();
        for (var kk = 0u; kk < STEP; kk++) {
            var av: array<f32, PER>;
            var bv: array<f32, PER>;
            for (var i = 0u; i < PER; i++) {
                av[i] = a_tile[kk * ROW + ty + 16u * i];
                bv[i] = b_tile[kk * ROW + tx + 16u * i];
            }
            for (var i = 0u; i < PER; i++) {
                for (var j = 0u; j < PER; j++) {
                    sum[i][j] = fma(av[i], bv[j], sum[i][j]);
                }
            }
        }
        workgroupBarrier();
    }
    let y0 = p.y_start + group.z * p.m * p.n;
    for (var i = 0u; i < PER; i++) {
        let row = row0 + ty + 16u * i;
        for (var j = 0u; j < PER; j++) {
            let col = col0 + tx + 16u * j;
            if row < p.m && col < p.n {
                var v = sum[i][j];
                if p.has_bias != 0u {
                    v += bias[col];
                }
                y[y0 + row * p.n + col] = YElem(v);
            }
        }
    }
}
