// c = a·b + bias + residual for software drivers that run on the CPU, where shared memory, barriers and loads are slow:
// ROWS × 4 columns of sums a thread, 8 threads side by side that share what they load of a. Every step adds eight terms to
// every sum (COLUMN: four): the driver blends sums with its execution mask once per iteration, so longer iterations are
// cheaper, until the code is too long for the processor's caches. Loads are gathers of some 25 micro-operations: more rows
// use what is loaded of b more often, and where they lie between other rows' terms the processor does both at once.
//
// a is described by strides so that convolution is the same product over a padded image: k runs over segments, each adds
// `segment_stride` to an address and every `run` of them `run_stride`. Row form (a's rows are contiguous along k): rows lie
// `stride_x` apart or, with IMAGE, row → (image, y, x) gives the address, by divisions that the driver does lane after lane.
// COLUMN form (contiguous along m): k within a segment steps by `stride_x`.
//
// ALONG (row form): b's columns are contiguous along k, `b_row` apart, as a linear layer's weight or an image's pixels are.
//
// QUADS: rows of c, of the residual and the bias are whole vec4s. TURNED: c is stored transposed, without bias and residual.
#import lanes::{LANES, from_lane}
#import rows_product::{Params, after, place_of, terms}

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

@group(0) @binding(0) var<storage, read> a: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> b: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> c: array<CElem>;
@group(0) @binding(3) var<storage, read> bias: array<Bias>;
@group(0) @binding(4) var<storage, read> residual: array<CElem>;
var<immediate> p: Params;

const ROWS: u32 = #{ROWS}u;
#ifdef COLUMN
// Vectors of a that each of LANES threads loads for four k.
const LOADS: u32 = ROWS / LANES;
#else
// Vectors along k of each of a's rows in one step.
const ALONG_K = 2u;
// Rows whose loads are shared, and vectors of them that each of LANES threads loads.
const SHARED = 4u;
const LOADS: u32 = SHARED * ALONG_K / LANES;
const BLOCKS: u32 = ROWS / SHARED;

// Four k of b for this thread's columns, of what is loaded along its lines.
fn lines_of(loaded: mat4x4<f32>) -> mat4x4<f32> {
#ifdef ALONG
    return transpose(loaded);
#else
    return loaded;
#endif
}

fn lines(at: vec4<u32>) -> mat4x4<f32> {
    return lines_of(mat4x4<f32>(b[at.x], b[at.y], b[at.z], b[at.w]));
}

// Of two places, that of a thread's vector l of those that threads share.
fn along(at: vec2<u32>, l: u32, loader: u32) -> u32 {
    return select(at.x, at.y, (l * LANES + loader) % ALONG_K == 1u);
}
#endif

// Panels of b that workgroups pass over together before they turn to the next rows of a, which then come from a near cache.
const NEAR = 4u;

// Tile of c of a workgroup.
fn tile_of(group: vec3<u32>, groups: vec3<u32>) -> vec2<u32> {
    let i = group.y * groups.x + group.x;
    let first = i / (NEAR * groups.x) * NEAR;
    let near = min(NEAR, groups.y - first);
    let within = i - first * groups.x;
    return vec2<u32>(within / near, first + within % near);
}

@compute @workgroup_size(8)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let tile = tile_of(group, groups);
    let loader = lane % LANES;
    let batch = group.z / p.splits;
    let part = group.z % p.splits;
    let per_part = (p.segments + p.splits - 1u) / p.splits;
    let last = min(p.segments, (part + 1u) * per_part);
    let a0 = p.a_start + batch * p.a_batch;
    let col = tile.y * 32u + lane * 4u;
#ifdef ALONG
    // Columns past the end repeat the last one; they are not stored.
    let columns = min(vec4<u32>(col) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(p.n - 1u));
    let b0 = p.b_start + batch * p.b_batch + columns * p.b_row;
    let b_step = 1u;
#else
    let b0 = p.b_start + batch * p.b_batch + tile.y * p.b_panel + lane + vec4<u32>(0u, 1u, 2u, 3u) * p.b_row;
    let b_step = 4u * p.b_row;
#endif
    var sum: array<vec4<f32>, ROWS>;
#ifdef COLUMN
    let column = a0 + tile.x * (ROWS / 4u);
    for (var s = part * per_part; s < last; s++) {
        let length = min(p.segment, p.k - s * p.segment);
        var a_at = column + (s / p.run) * p.run_stride + (s % p.run) * p.segment_stride;
        var b_at = b0.x + s * p.segment * p.b_row;
        var k = 0u;
        for (; k + 4u <= length; k += 4u) {
            var held: array<vec4<f32>, LOADS>;
            for (var l = 0u; l < LOADS; l++) {
                let i = l * LANES + loader;
                held[l] = a[a_at + (i / 4u) * p.stride_x + i % 4u];
            }
            var bv: array<vec4<f32>, 4>;
            for (var u = 0u; u < 4u; u++) {
                bv[u] = b[b_at + u * p.b_row];
            }
            for (var q = 0u; q < 4u; q++) {
                for (var u = 0u; u < 4u; u++) {
                    let i = 4u * u + q;
                    let av = from_lane(held[i / LANES], i % LANES);
                    sum[4u * q] = fma(vec4<f32>(av.x), bv[u], sum[4u * q]);
                    sum[4u * q + 1u] = fma(vec4<f32>(av.y), bv[u], sum[4u * q + 1u]);
                    sum[4u * q + 2u] = fma(vec4<f32>(av.z), bv[u], sum[4u * q + 2u]);
                    sum[4u * q + 3u] = fma(vec4<f32>(av.w), bv[u], sum[4u * q + 3u]);
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
    var rows: array<u32, LOADS * BLOCKS>;
    for (var l = 0u; l < LOADS * BLOCKS; l++) {
        let i = l * LANES + loader;
        // Rows past the end repeat the last one; they are not stored.
        let row = min(tile.x * ROWS + i / ALONG_K, p.m - 1u);
#ifdef IMAGE
        let line = row / p.size_x;
        rows[l] = a0 + (row % p.size_x) * p.stride_x + (line % p.size_y) * p.stride_y
            + (line / p.size_y) * p.stride_image;
#else
        rows[l] = a0 + row * p.stride_x;
#endif
    }
    // Vectors along k of this part.
    let begin = part * per_part * (p.segment / 4u);
    let length = max(begin, min(last * (p.segment / 4u), p.k / 4u)) - begin;
    var place = place_of(p, part * per_part);
    var b_at = begin * b_step;
    var k = 0u;
    for (; k + ALONG_K <= length; k += ALONG_K) {
        let other = after(p, place);
        let a_at = vec2<u32>(place.at, other.at);
        let first = lines(b0 + b_at);
        var held: array<vec4<f32>, LOADS>;
        // Of the rows after those.
        var ahead: array<vec4<f32>, LOADS>;
        for (var l = 0u; l < LOADS; l++) {
            held[l] = a[rows[l] + along(a_at, l, loader)];
            ahead[l] = a[rows[LOADS + l] + along(a_at, l, loader)];
        }
        var loaded: mat4x4<f32>;
        for (var r = 0u; r < SHARED; r++) {
            let i = r * ALONG_K;
            sum[r] = terms(sum[r], from_lane(held[i / LANES], i % LANES), first);
            loaded[r] = b[b0[r] + b_at + b_step];
        }
        let second = lines_of(loaded);
        for (var r = 0u; r < SHARED; r++) {
            let i = r * ALONG_K + 1u;
            sum[r] = terms(sum[r], from_lane(held[i / LANES], i % LANES), second);
        }
        for (var block = 1u; block < BLOCKS; block++) {
            held = ahead;
            if block + 1u < BLOCKS {
                for (var l = 0u; l < LOADS; l++) {
                    ahead[l] = a[rows[(block + 1u) * LOADS + l] + along(a_at, l, loader)];
                }
            }
            for (var q = 0u; q < SHARED; q++) {
                let r = block * SHARED + q;
                let i = q * ALONG_K;
                sum[r] = terms(sum[r], from_lane(held[i / LANES], i % LANES), first);
                sum[r] = terms(sum[r], from_lane(held[(i + 1u) / LANES], (i + 1u) % LANES), second);
            }
        }
        place = after(p, other);
        b_at += ALONG_K * b_step;
    }
    if k < length {
        let first = lines(b0 + b_at);
        for (var block = 0u; block < BLOCKS; block++) {
            var held: array<vec4<f32>, LOADS>;
            for (var l = 0u; l < LOADS; l++) {
                held[l] = a[rows[block * LOADS + l] + place.at];
            }
            for (var q = 0u; q < SHARED; q++) {
                let r = block * SHARED + q;
                let i = q * ALONG_K;
                sum[r] = terms(sum[r], from_lane(held[i / LANES], i % LANES), first);
            }
        }
    }
#endif
    let c0 = p.c_start + group.z * p.c_batch;
    if col >= p.n {
        return;
    }
#ifdef TURNED
    for (var j = 0u; j < 4u; j++) {
        let first = c0 + (col + j) * p.ldc + tile.x * ROWS;
        for (var r = 0u; r < ROWS; r += 4u) {
            let v = vec4<f32>(sum[r][j], sum[r + 1u][j], sum[r + 2u][j], sum[r + 3u][j]);
            let left = select(0u, p.m - min(p.m, tile.x * ROWS + r), col + j < p.n);
#ifdef QUADS
            if left > 0u {
                c[(first + r) / 4u] = CElem(v);
            }
#else
            for (var q = 0u; q < min(left, 4u); q++) {
                c[first + r + q] = CElem(v[q]);
            }
#endif
        }
    }
#else
#ifdef QUADS
    var added = vec4<f32>();
    if p.has_bias != 0u {
        added = bias[(p.bias_start + col) / 4u];
    }
#endif
    for (var r = 0u; r < ROWS; r++) {
        let row = tile.x * ROWS + r;
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
#endif
}
