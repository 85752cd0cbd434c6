// c = a·b + bias + residual as in `matmul_rows`, for sums of few terms, where what a tile costs beside its sums counts most:
// a thread keeps its four columns of all VECTORS · 4 rows of b and goes down RUN rows of a with them. Each of the 8 threads
// side by side loads one of eight rows and they hand them round; no sum lives from one turn to the next, and the code is
// small enough for the processor's first cache.
//
// Operands lie as in `matmul_rows`; rows of c, of the residual and the bias are whole vec4s. With IMAGE lines have 8 pixels
// at the least.
#import lanes::from_lane
#import rows_product::{Params, after, place_of, terms}

#ifdef C_F16
alias CElem = vec4<f16>;
#else
alias CElem = vec4<f32>;
#endif

@group(0) @binding(0) var<storage, read> a: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> b: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> c: array<CElem>;
@group(0) @binding(3) var<storage, read> bias: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> residual: array<CElem>;
var<immediate> p: Params;

const VECTORS = #{VECTORS}u;
const RUN = #{RUN}u;

fn store(at: u32, sum: vec4<f32>) {
#ifdef RESIDUAL
    c[at] = CElem(sum + vec4<f32>(residual[at]));
#else
    c[at] = CElem(sum);
#endif
}

@compute @workgroup_size(8)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let col = group.y * 32u + lane * 4u;
    let start = group.x * RUN;
#ifdef ALONG
    // Columns past the end repeat the last one; they are not stored.
    let columns = min(vec4<u32>(col) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(p.n - 1u));
    let b0 = p.b_start + group.z * p.b_batch + columns * p.b_row;
#else
    let b0 = p.b_start + group.z * p.b_batch + group.y * p.b_panel + lane + vec4<u32>(0u, 1u, 2u, 3u) * p.b_row;
#endif
    var held: array<mat4x4<f32>, VECTORS>;
    var along: array<u32, VECTORS>;
#ifdef IMAGE
    var place = place_of(p, 0u);
#endif
    for (var v = 0u; v < VECTORS; v++) {
#ifdef ALONG
        held[v] = transpose(mat4x4<f32>(b[b0.x + v], b[b0.y + v], b[b0.z + v], b[b0.w + v]));
#else
        let at = b0 + v * 4u * p.b_row;
        held[v] = mat4x4<f32>(b[at.x], b[at.y], b[at.z], b[at.w]);
#endif
#ifdef IMAGE
        along[v] = place.at;
        place = after(p, place);
#else
        along[v] = v;
#endif
    }
    var added = vec4<f32>();
    if p.has_bias != 0u {
        added = bias[(p.bias_start + col) / 4u];
    }
    let inside = col < p.n;
    let mine = start + lane;
    var a_at = p.a_start + group.z * p.a_batch;
#ifdef IMAGE
    var x = mine % p.size_x;
    var y = mine / p.size_x % p.size_y;
    a_at += x * p.stride_x + y * p.stride_y + mine / p.size_x / p.size_y * p.stride_image;
#else
    a_at += mine * p.stride_x;
#endif
    let end = min(start + RUN, p.m);
    var c_at = (p.c_start + group.z * p.c_batch + start * p.ldc + col) / 4u;
    for (var first = start; first < end; first += 8u) {
        // A row past the end is whatever lies there; it is not stored.
        var row: array<vec4<f32>, VECTORS>;
        for (var v = 0u; v < VECTORS; v++) {
            row[v] = a[a_at + along[v]];
        }
        // Two rows at once use what is read of `held` twice. The bias comes last, as in `matmul_rows`: the same bits.
        for (var r = 0u; r < 8u; r += 2u) {
            var sum = vec4<f32>();
            var below = vec4<f32>();
            for (var v = 0u; v < VECTORS; v++) {
                sum = terms(sum, from_lane(row[v], r), held[v]);
                below = terms(below, from_lane(row[v], r + 1u), held[v]);
            }
            if inside && first + r < end {
                store(c_at, sum + added);
            }
            if inside && first + r + 1u < end {
                store(c_at + p.ldc / 4u, below + added);
            }
            c_at += p.ldc / 2u;
        }
        a_at += 8u * p.stride_x;
#ifdef IMAGE
        x += 8u;
        let over = x >= p.size_x;
        x -= select(0u, p.size_x, over);
        a_at += select(0u, p.stride_y - p.size_x * p.stride_x, over);
        y += select(0u, 1u, over);
        let next = y == p.size_y;
        y = select(y, 0u, next);
        a_at += select(0u, p.stride_image - p.size_y * p.stride_y, next);
#endif
    }
}
