// Convolution as an implicit matrix product on matrix units (wgsl/common/matrix_product.wgsl), unfolded while loading, four
// channels at a time. MODE as in conv2d_tile; 1 reads the weight transposed, 2 the unfolded image.
#import matrix_units::{BLOCKS, Elem, FRAGMENTS, SIZE, THREADS}
#import matrix_product::{A_LINE, B_LINE, BLOCK, LOADS, Matrices, Quads, STEP, TILE, advance, multiply, put, result, stage}

#ifdef X_F16
alias XElem = f16;
#else
alias XElem = f32;
#endif
#ifdef B_F16
alias BElem = f16;
#else
alias BElem = f32;
#endif
#ifdef Y_F16
alias YElem = f16;
#else
alias YElem = f32;
#endif

// As in conv2d_tile.
struct Params {
    m: u32,
    n: u32,
    k: u32,
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
    ci: u32,
    co: u32,
    has_bias: u32,
}

@group(0) @binding(0) var<storage, read> x: array<vec4<XElem>>;
#ifdef B_BF16
@group(0) @binding(1) var<storage, read> b: array<vec2<u32>>;
#else
@group(0) @binding(1) var<storage, read> b: array<vec4<BElem>>;
#endif
@group(0) @binding(2) var<storage, read_write> y: array<YElem>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
var<immediate> p: Params;

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

// Four channels of x at `at` moved by the tap, 0 outside.
fn unfold(at: Pixel, tap: u32, channel: u32) -> vec4<Elem> {
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
        return vec4<Elem>();
    }
    return vec4<Elem>(x[(at.image + u32(row * p.src_w + column) * p.channels + channel) / 4u]);
}

fn load_b(at: u32) -> vec4<Elem> {
#ifdef B_BF16
    let w = b[at / 4u];
    return vec4<Elem>(bitcast<vec4<f32>>(vec4<u32>(w.x << 16u, w.x & 0xffff0000u, w.y << 16u, w.y & 0xffff0000u)));
#else
    return vec4<Elem>(b[at / 4u]);
#endif
}

// The pixels of a thread's lines, which stay the same along k; none where lines run across it.
#if MODE == 2
const LINES = 1u;
#else
const LINES = LOADS;
#endif

// A thread's part of both operands at k0, zeros beyond their edges. Channels come in whole fours, so k and n do.
fn load(
    to: ptr<function, Quads>,
    lines: ptr<function, array<Pixel, LINES>>,
    corner: vec2<u32>,
    k0: u32,
    k_end: u32,
    local: u32,
) {
    for (var i = 0u; i < LOADS; i++) {
        let t = local + THREADS * i;
        let a_line = t / (A_LINE / 4u);
        let a_along = t % (A_LINE / 4u) * 4u;
        var av = vec4<Elem>();
#if MODE == 2
        let row = corner.x + a_along;
        if row < p.m && k0 + a_line < k_end {
            av = unfold(pixel(k0 + a_line), row / p.channels, row % p.channels);
        }
#else
        let ak = k0 + a_along;
        if corner.x + a_line < p.m && ak < k_end {
            av = unfold((*lines)[i], ak / p.channels, ak % p.channels);
        }
#endif
        (*to).a[i] = av;
        let b_line = t / (B_LINE / 4u);
        let b_along = t % (B_LINE / 4u) * 4u;
        var bv = vec4<Elem>();
#if MODE == 1
        let column = corner.y + b_line;
        let bk = k0 + b_along;
        if column < p.n && bk < k_end {
            bv = load_b(p.b_start + (bk / p.channels * p.ci + column) * p.co + bk % p.channels);
        }
#else
        let column = corner.y + b_along;
        if column < p.n && k0 + b_line < k_end {
            bv = load_b(p.b_start + (k0 + b_line) * p.n + column);
        }
#endif
        (*to).b[i] = bv;
    }
}

// The block's matrices one after the other, from `row` and `column` of the result on.
fn store(matrices: ptr<function, Matrices>, row: u32, column: u32, y0: u32, slot: u32, mine: u32, lane: u32, lanes: u32) {
    for (var f = 0u; f < FRAGMENTS * FRAGMENTS; f++) {
        put(matrices, slot, mine);
        workgroupBarrier();
        for (var i = lane; i < SIZE * SIZE * mine; i += lanes) {
            let r = row + f / FRAGMENTS * SIZE + i / SIZE;
            let c = column + f % FRAGMENTS * SIZE + i % SIZE;
            if r < p.m && c < p.n {
                var v = result(slot, i);
                if p.has_bias != 0u {
                    v += bias[c];
                }
                y[y0 + r * p.n + c] = YElem(v);
            }
        }
        workgroupBarrier();
        advance(matrices, f);
    }
}

@compute @workgroup_size(#{THREADS})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
    @builtin(subgroup_invocation_id) lane: u32,
    @builtin(subgroup_size) lanes: u32,
) {
    let corner = group.yx * TILE;
    let k_start = group.z * p.k_part;
    let k_end = min(p.k, k_start + p.k_part);
    var lines: array<Pixel, LINES>;
#if MODE != 2
    for (var i = 0u; i < LOADS; i++) {
        lines[i] = pixel(corner.x + (local + THREADS * i) / (A_LINE / 4u));
    }
#endif
    for (var first = 0u; first < BLOCKS; first += subgroups) {
        let block = first + subgroup;
        let mine = select(0u, 1u, block < BLOCKS);
        let row = block / 2u * BLOCK;
        let column = block % 2u * BLOCK;
        var sums = Matrices();
        var next: Quads;
        load(&next, &lines, corner, k_start, k_end, local);
        for (var k0 = k_start; k0 < k_end; k0 += STEP) {
            stage(&next, local);
            workgroupBarrier();
            load(&next, &lines, corner, k0 + STEP, k_end, local);
            multiply(&sums, row, column, mine);
            workgroupBarrier();
        }
        let y0 = p.y_start + group.z * p.m * p.n;
        store(&sums, corner.x + row, corner.y + column, y0, subgroup, mine, lane, lanes);
    }
}
