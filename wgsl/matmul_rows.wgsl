// c = a·b + bias + residual for software drivers that run on the CPU, where shared memory, barriers
// and lane-varying loads are slow: 16 rows × 4 columns of sums a thread, 8 threads side by side, a's
// addresses the same for all of them. Every step adds four terms to every sum: the driver blends sums
// with its execution mask once per iteration, so longer iterations are cheaper.
//
// a is described by strides so that convolution is the same product over a padded image: k runs over segments, each adds
// `segment_stride` to an address and every `run` of them `run_stride`. Row form (a's rows are contiguous along k): row →
// (image, y, x) gives the row's address. COLUMN form (contiguous along m): k within a segment steps by `stride_x`.
//
// ALONG (row form): b's columns are contiguous along k, `b_row` apart, as a linear layer's weight or an image's pixels are.
//
// SUBGROUP (row form, subgroups of 8): a's elements are loaded by one thread each and broadcast, where a load that is
// the same for all threads would check its bounds once for each component.
//
// QUADS: rows of c, of the residual and the bias are whole vec4s.
#ifdef C_F16
alias Scalar = f16;
#else
alias Scalar = f32;
#endif
#ifdef QUADS
alias CElem = vec4<Scalar>;
alias Bias = vec4<f32>;
#else
alias CElem = Scalar;
alias Bias = f32;
#endif

struct Params {
    m: u32,
    n: u32,
    k: u32,
    splits: u32,
    // a, in vec4s.
    a_start: u32,
    a_batch: u32,
    size_x: u32,
    size_y: u32,
    stride_x: u32,
    stride_y: u32,
    stride_image: u32,
    segments: u32,
    segment: u32,
    segment_stride: u32,
    run: u32,
    run_stride: u32,
    // b, in vec4s: panels of 32 columns.
    b_start: u32,
    b_batch: u32,
    b_row: u32,
    b_panel: u32,
    ldc: u32,
    c_start: u32,
    c_batch: u32,
    bias_start: u32,
    has_bias: u32,
    has_residual: u32,
}

@group(0) @binding(0) var<storage, read> a: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> b: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> c: array<CElem>;
@group(0) @binding(3) var<storage, read> bias: array<Bias>;
@group(0) @binding(4) var<storage, read> residual: array<CElem>;
var<immediate> p: Params;

const ROWS = 16u;
#ifdef SUBGROUP
// Rows whose elements a thread loads: two for itself, handed round in the subgroup that the workgroup is.
const HELD = 2u;
#else
const HELD = ROWS;
#endif

fn terms(sum: vec4<f32>, av: vec4<f32>, bx: vec4<f32>, by: vec4<f32>, bz: vec4<f32>, bw: vec4<f32>) -> vec4<f32> {
    let two = fma(vec4<f32>(av.y), by, fma(vec4<f32>(av.x), bx, sum));
    return fma(vec4<f32>(av.w), bw, fma(vec4<f32>(av.z), bz, two));
}

@compute @workgroup_size(8)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let batch = group.z / p.splits;
    let part = group.z % p.splits;
    let per_part = (p.segments + p.splits - 1u) / p.splits;
    let last = min(p.segments, (part + 1u) * per_part);
    let a0 = p.a_start + batch * p.a_batch;
    let col = group.y * 32u + lane * 4u;
#ifdef ALONG
    // Columns past the end repeat the last one; they are not stored.
    let columns = p.b_start + batch * p.b_batch + min(vec4<u32>(col) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(p.n - 1u)) * p.b_row;
#else
    let b0 = p.b_start + batch * p.b_batch + group.y * p.b_panel + lane;
#endif
    var sum: array<vec4<f32>, ROWS>;
#ifdef COLUMN
    let column = a0 + group.x * (ROWS / 4u);
    for (var s = part * per_part; s < last; s++) {
        let length = min(p.segment, p.k - s * p.segment);
        var a_at = column + (s / p.run) * p.run_stride + (s % p.run) * p.segment_stride;
        var b_at = b0 + s * p.segment * p.b_row;
        var k = 0u;
        for (; k + 4u <= length; k += 4u) {
            for (var u = 0u; u < 4u; u++) {
                let bv = b[b_at + u * p.b_row];
                for (var q = 0u; q < 4u; q++) {
                    let av = a[a_at + u * p.stride_x + q];
                    sum[4u * q] = fma(vec4<f32>(av.x), bv, sum[4u * q]);
                    sum[4u * q + 1u] = fma(vec4<f32>(av.y), bv, sum[4u * q + 1u]);
                    sum[4u * q + 2u] = fma(vec4<f32>(av.z), bv, sum[4u * q + 2u]);
                    sum[4u * q + 3u] = fma(vec4<f32>(av.w), bv, sum[4u * q + 3u]);
                }
            }
            a_at += 4u * p.stride_x;
            b_at += 4u * p.b_row;
        }
        for (; k < length; k++) {
            let bv = b[b_at];
            for (var q = 0u; q < 4u; q++) {
                let av = a[a_at + q];
                sum[4u * q] = fma(vec4<f32>(av.x), bv, sum[4u * q]);
                sum[4u * q + 1u] = fma(vec4<f32>(av.y), bv, sum[4u * q + 1u]);
                sum[4u * q + 2u] = fma(vec4<f32>(av.z), bv, sum[4u * q + 2u]);
                sum[4u * q + 3u] = fma(vec4<f32>(av.w), bv, sum[4u * q + 3u]);
            }
            a_at += p.stride_x;
            b_at += p.b_row;
        }
    }
#else
    var rows: array<u32, HELD>;
    for (var r = 0u; r < HELD; r++) {
        // Rows past the end repeat the last one; they are not stored.
#ifdef SUBGROUP
        let row = min(group.x * ROWS + 8u * r + lane, p.m - 1u);
#else
        let row = min(group.x * ROWS + r, p.m - 1u);
#endif
        let line = row / p.size_x;
        rows[r] = a0 + (row % p.size_x) * p.stride_x + (line % p.size_y) * p.stride_y
            + (line / p.size_y) * p.stride_image;
    }
    for (var s = part * per_part; s < last; s++) {
        let length = min(p.segment, p.k - s * p.segment) / 4u;
        var a_at = (s / p.run) * p.run_stride + (s % p.run) * p.segment_stride;
#ifdef ALONG
        var b_at = s * (p.segment / 4u);
#else
        var b_at = b0 + s * p.segment * p.b_row;
#endif
        for (var k = 0u; k < length; k++) {
#ifdef ALONG
            let cx = b[columns.x + b_at];
            let cy = b[columns.y + b_at];
            let cz = b[columns.z + b_at];
            let cw = b[columns.w + b_at];
            let bx = vec4<f32>(cx.x, cy.x, cz.x, cw.x);
            let by = vec4<f32>(cx.y, cy.y, cz.y, cw.y);
            let bz = vec4<f32>(cx.z, cy.z, cz.z, cw.z);
            let bw = vec4<f32>(cx.w, cy.w, cz.w, cw.w);
            b_at += 1u;
#else
            let bx = b[b_at];
            let by = b[b_at + p.b_row];
            let bz = b[b_at + 2u * p.b_row];
            let bw = b[b_at + 3u * p.b_row];
            b_at += 4u * p.b_row;
#endif
#ifdef SUBGROUP
            let upper = a[rows[0] + a_at];
            let lower = a[rows[1] + a_at];
            sum[0] = terms(sum[0], subgroupBroadcast(upper, 0u), bx, by, bz, bw);
            sum[1] = terms(sum[1], subgroupBroadcast(upper, 1u), bx, by, bz, bw);
            sum[2] = terms(sum[2], subgroupBroadcast(upper, 2u), bx, by, bz, bw);
            sum[3] = terms(sum[3], subgroupBroadcast(upper, 3u), bx, by, bz, bw);
            sum[4] = terms(sum[4], subgroupBroadcast(upper, 4u), bx, by, bz, bw);
            sum[5] = terms(sum[5], subgroupBroadcast(upper, 5u), bx, by, bz, bw);
            sum[6] = terms(sum[6], subgroupBroadcast(upper, 6u), bx, by, bz, bw);
            sum[7] = terms(sum[7], subgroupBroadcast(upper, 7u), bx, by, bz, bw);
            sum[8] = terms(sum[8], subgroupBroadcast(lower, 0u), bx, by, bz, bw);
            sum[9] = terms(sum[9], subgroupBroadcast(lower, 1u), bx, by, bz, bw);
            sum[10] = terms(sum[10], subgroupBroadcast(lower, 2u), bx, by, bz, bw);
            sum[11] = terms(sum[11], subgroupBroadcast(lower, 3u), bx, by, bz, bw);
            sum[12] = terms(sum[12], subgroupBroadcast(lower, 4u), bx, by, bz, bw);
            sum[13] = terms(sum[13], subgroupBroadcast(lower, 5u), bx, by, bz, bw);
            sum[14] = terms(sum[14], subgroupBroadcast(lower, 6u), bx, by, bz, bw);
            sum[15] = terms(sum[15], subgroupBroadcast(lower, 7u), bx, by, bz, bw);
#else
            for (var r = 0u; r < ROWS; r++) {
                sum[r] = terms(sum[r], a[rows[r] + a_at], bx, by, bz, bw);
            }
#endif
            a_at += 1u;
        }
    }
#endif
    let c0 = p.c_start + group.z * p.c_batch;
    if col >= p.n {
        return;
    }
#ifdef QUADS
    var added = vec4<f32>();
    if p.has_bias != 0u {
        added = bias[(p.bias_start + col) / 4u];
    }
#endif
    for (var r = 0u; r < ROWS; r++) {
        let row = group.x * ROWS + r;
        if row < p.m {
            let first = c0 + row * p.ldc + col;
#ifdef QUADS
            var v = sum[r] + added;
            if p.has_residual != 0u {
                v += vec4<f32>(residual[first / 4u]);
            }
            c[first / 4u] = CElem(v);
#else
            for (var j = 0u; j < 4u; j++) {
                if col + j < p.n {
                    let at = first + j;
                    var v = sum[r][j];
                    if p.has_bias != 0u {
                        v += bias[p.bias_start + col + j];
                    }
                    if p.has_residual != 0u {
                        v += f32(residual[at]);
                    }
                    c[at] = CElem(v);
                }
            }
#endif
        }
    }
}
