// Group norm of channels-last x [batch, pixels, channels], statistics in f32. STAGE:
// 0: mean and sum of squared deviations of each channel over a chunk of pixels: [batch, chunks, 2, channels].
// 1: mean and rstd of each group, spread over its channels: [batch, 2, channels]; a workgroup a group.
// 2: y = (x − mean) rstd w + b.
// 3: Σ dy x̂ and Σ dy of each channel over a chunk of pixels: [batch, chunks, 2, channels].
// 4: those over all pixels, and their weighted means over the group, spread over its channels:
//    both [batch, 2, channels]; a workgroup a group.
// 5: dx = rstd (dy w − mean(dy w) − x̂ mean(dy w x̂)).
#import index::{group_index, thread_index}
#if STAGE == 1
#import row_reduce::row_sum
#endif
#if STAGE == 4
#import row_reduce::row_sum
#endif

#ifdef VEC4
alias V = vec4<f32>;
#ifdef F16
alias Stored = vec4<f16>;
#else
alias Stored = vec4<f32>;
#endif
#else
alias V = f32;
#ifdef F16
alias Stored = f16;
#else
alias Stored = f32;
#endif
#endif

struct Params {
    batch: u32,
    pixels: u32,
    // Channels in units of V (stages 1 and 4: of one).
    width: u32,
    groups: u32,
    chunk: u32,
    chunks: u32,
    has_weight: u32,
    has_bias: u32,
    eps: f32,
}
var<immediate> p: Params;

#if STAGE == 0
@group(0) @binding(0) var<storage, read> x: array<Stored>;
@group(0) @binding(1) var<storage, read_write> moments: array<V>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let channel = group.x * 64u + local;
    if channel >= p.width {
        return;
    }
    let chunk = group.y;
    let start = chunk * p.chunk;
    let end = min(p.pixels, start + p.chunk);
    let base = group.z * p.pixels * p.width + channel;
    // Deviations from the chunk's first value: exact enough also where the mean is large.
    let origin = V(x[base + start * p.width]);
    var sum = V(0.0);
    var squares = V(0.0);
    for (var pixel = start; pixel < end; pixel++) {
        let v = V(x[base + pixel * p.width]) - origin;
        sum += v;
        squares += v * v;
    }
    let count = f32(end - start);
    let at = (group.z * p.chunks + chunk) * 2u * p.width + channel;
    moments[at] = origin + sum / count;
    moments[at + p.width] = max(squares - sum * sum / count, V(0.0));
}
#endif

#if STAGE == 1
@group(0) @binding(0) var<storage, read> moments: array<f32>;
@group(0) @binding(1) var<storage, read_write> statistics: array<f32>;

fn pixels_of(chunk: u32) -> f32 {
    return f32(min(p.pixels - chunk * p.chunk, p.chunk));
}

@compute @workgroup_size(#{WG})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let index = group_index(group, groups);
    if index >= p.batch * p.groups {
        return;
    }
    let b = index / p.groups;
    let size = p.width / p.groups;
    let first = (index % p.groups) * size;
    let elements = f32(p.pixels) * f32(size);
    var sum = 0.0;
    for (var i = local; i < p.chunks * size; i += #{WG}u) {
        let chunk = i / size;
        let at = (b * p.chunks + chunk) * 2u * p.width + first + i % size;
        sum += moments[at] * pixels_of(chunk);
    }
    let mean = row_sum(sum, local) / elements;
    var squares = 0.0;
    for (var i = local; i < p.chunks * size; i += #{WG}u) {
        let chunk = i / size;
        let at = (b * p.chunks + chunk) * 2u * p.width + first + i % size;
        let off = moments[at] - mean;
        squares += moments[at + p.width] + off * off * pixels_of(chunk);
    }
    let rstd = 1.0 / sqrt(row_sum(squares, local) / elements + p.eps);
    for (var i = local; i < size; i += #{WG}u) {
        statistics[b * 2u * p.width + first + i] = mean;
        statistics[(b * 2u + 1u) * p.width + first + i] = rstd;
    }
}
#endif

#if STAGE == 2
@group(0) @binding(0) var<storage, read> x: array<Stored>;
@group(0) @binding(1) var<storage, read> statistics: array<V>;
@group(0) @binding(2) var<storage, read> weight: array<V>;
@group(0) @binding(3) var<storage, read> bias: array<V>;
@group(0) @binding(4) var<storage, read_write> y: array<Stored>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = thread_index(group, groups, local, 64u);
    if i >= p.batch * p.pixels * p.width {
        return;
    }
    let channel = i % p.width;
    let at = i / (p.pixels * p.width) * 2u * p.width + channel;
    var v = (V(x[i]) - statistics[at]) * statistics[at + p.width];
    if p.has_weight != 0u {
        v *= weight[channel];
    }
    if p.has_bias != 0u {
        v += bias[channel];
    }
    y[i] = Stored(v);
}
#endif

#if STAGE == 3
@group(0) @binding(0) var<storage, read> x: array<Stored>;
@group(0) @binding(1) var<storage, read> dy: array<Stored>;
@group(0) @binding(2) var<storage, read> statistics: array<V>;
@group(0) @binding(3) var<storage, read_write> partial_sums: array<V>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let channel = group.x * 64u + local;
    if channel >= p.width {
        return;
    }
    let chunk = group.y;
    let end = min(p.pixels, (chunk + 1u) * p.chunk);
    let base = group.z * p.pixels * p.width + channel;
    let mean = statistics[group.z * 2u * p.width + channel];
    let rstd = statistics[(group.z * 2u + 1u) * p.width + channel];
    var along = V(0.0);
    var sum = V(0.0);
    for (var pixel = chunk * p.chunk; pixel < end; pixel++) {
        let at = base + pixel * p.width;
        let g = V(dy[at]);
        along += g * (V(x[at]) - mean) * rstd;
        sum += g;
    }
    let at = (group.z * p.chunks + chunk) * 2u * p.width + channel;
    partial_sums[at] = along;
    partial_sums[at + p.width] = sum;
}
#endif

#if STAGE == 4
@group(0) @binding(0) var<storage, read> partial_sums: array<f32>;
@group(0) @binding(1) var<storage, read> weight: array<f32>;
@group(0) @binding(2) var<storage, read_write> sums: array<f32>;
@group(0) @binding(3) var<storage, read_write> means: array<f32>;

@compute @workgroup_size(#{WG})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let index = group_index(group, groups);
    if index >= p.batch * p.groups {
        return;
    }
    let b = index / p.groups;
    let size = p.width / p.groups;
    let first = (index % p.groups) * size;
    var group_sum = vec2<f32>(0.0);
    for (var i = local; i < size; i += #{WG}u) {
        let channel = first + i;
        var sum = vec2<f32>(0.0);
        for (var chunk = 0u; chunk < p.chunks; chunk++) {
            let at = (b * p.chunks + chunk) * 2u * p.width + channel;
            sum += vec2<f32>(partial_sums[at], partial_sums[at + p.width]);
        }
        sums[b * 2u * p.width + channel] = sum.x;
        sums[(b * 2u + 1u) * p.width + channel] = sum.y;
        var w = 1.0;
        if p.has_weight != 0u {
            w = weight[channel];
        }
        group_sum += w * sum;
    }
    let elements = f32(p.pixels) * f32(size);
    let along = row_sum(group_sum.x, local) / elements;
    let mean = row_sum(group_sum.y, local) / elements;
    for (var i = local; i < size; i += #{WG}u) {
        means[b * 2u * p.width + first + i] = along;
        means[(b * 2u + 1u) * p.width + first + i] = mean;
    }
}
#endif

#if STAGE == 5
@group(0) @binding(0) var<storage, read> x: array<Stored>;
@group(0) @binding(1) var<storage, read> dy: array<Stored>;
@group(0) @binding(2) var<storage, read> statistics: array<V>;
@group(0) @binding(3) var<storage, read> weight: array<V>;
@group(0) @binding(4) var<storage, read> means: array<V>;
@group(0) @binding(5) var<storage, read_write> dx: array<Stored>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = thread_index(group, groups, local, 64u);
    if i >= p.batch * p.pixels * p.width {
        return;
    }
    let channel = i % p.width;
    let at = i / (p.pixels * p.width) * 2u * p.width + channel;
    let rstd = statistics[at + p.width];
    let normed = (V(x[i]) - statistics[at]) * rstd;
    var g = V(dy[i]);
    if p.has_weight != 0u {
        g *= weight[channel];
    }
    dx[i] = Stored(rstd * (g - means[at + p.width] - normed * means[at]));
}
#endif
