// Group norm over channels-last x [batch, pixels, channels], statistics in f32; y = silu of it with SILU. STAGE:
// 0: mean and sum of squared deviations of each channel over a chunk of pixels: [batch, chunks, 2, channels].
// 1: mean and rstd of each group, spread over its channels: [batch, 2, channels]; a workgroup a group.
// 2: y = x̂ w + b, x̂ = (x − mean) rstd.
// 3: Σ g x̂ and Σ g of each channel over a chunk of pixels, g = dy or, with SILU, dy silu′(x̂ w + b):
//    [batch, chunks, 2, channels].
// 4: those over all pixels, and their weighted means over the group, spread over its channels:
//    both [batch, 2, channels]; a workgroup a group.
// 5: dx = rstd (g w − mean(g w) − x̂ mean(g w x̂)), added to `earlier` with ONTO.
// In 0, 2, 3 and 5 a thread walks `chunk` pixels of one channel (or four).
#if STAGE == 1
#import index::group_index
#import row_reduce::row_sum
#else if STAGE == 4
#import index::group_index
#import row_reduce::row_sum
#else
#import index::column_and_row
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

@compute @workgroup_size(#{WG})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let place = column_and_row(group, local, #{LANES}u, #{WG}u, p.chunk);
    let channel = place.x;
    let start = place.y;
    if channel >= p.width || start >= p.pixels {
        return;
    }
    let end = min(p.pixels, start + p.chunk);
    let base = group.z * p.pixels * p.width + channel;
    // Deviations from the chunk's first value: exact enough also where the mean is large.
    let origin = V(x[base + start * p.width]);
    var sum = V(0.0);
    var squares = V(0.0);
    // Four a turn: CPU drivers blend each sum with the execution mask once a turn.
    var pixel = start;
    for (; pixel + 4u <= end; pixel += 4u) {
        for (var k = 0u; k < 4u; k++) {
            let v = V(x[base + (pixel + k) * p.width]) - origin;
            sum += v;
            squares += v * v;
        }
    }
    for (; pixel < end; pixel++) {
        let v = V(x[base + pixel * p.width]) - origin;
        sum += v;
        squares += v * v;
    }
    let count = f32(end - start);
    let at = (group.z * p.chunks + start / p.chunk) * 2u * p.width + channel;
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
    for (var chunk = local; chunk < p.chunks; chunk += #{WG}u) {
        let at = (b * p.chunks + chunk) * 2u * p.width + first;
        let count = pixels_of(chunk);
        for (var i = 0u; i < size; i++) {
            sum += moments[at + i] * count;
        }
    }
    let mean = row_sum(sum, local) / elements;
    var squares = 0.0;
    for (var chunk = local; chunk < p.chunks; chunk += #{WG}u) {
        let at = (b * p.chunks + chunk) * 2u * p.width + first;
        let count = pixels_of(chunk);
        for (var i = 0u; i < size; i++) {
            let off = moments[at + i] - mean;
            squares += moments[at + p.width + i] + off * off * count;
        }
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
#else if STAGE == 3
@group(0) @binding(0) var<storage, read> x: array<Stored>;
@group(0) @binding(1) var<storage, read> statistics: array<V>;
@group(0) @binding(2) var<storage, read> weight: array<V>;
@group(0) @binding(3) var<storage, read> bias: array<V>;
@group(0) @binding(4) var<storage, read> dy: array<Stored>;
@group(0) @binding(5) var<storage, read_write> partial_sums: array<V>;
#else if STAGE == 5
@group(0) @binding(0) var<storage, read> x: array<Stored>;
@group(0) @binding(1) var<storage, read> statistics: array<V>;
@group(0) @binding(2) var<storage, read> weight: array<V>;
@group(0) @binding(3) var<storage, read> bias: array<V>;
@group(0) @binding(4) var<storage, read> dy: array<Stored>;
@group(0) @binding(5) var<storage, read> means: array<V>;
@group(0) @binding(6) var<storage, read> earlier: array<Stored>;
@group(0) @binding(7) var<storage, read_write> dx: array<Stored>;
#endif

#ifdef WALK
// What a thread holds of its channel.
struct Channel {
    mean: V,
    rstd: V,
    weight: V,
    bias: V,
#if STAGE == 5
    mean_along: V,
    mean_g: V,
#endif
}

fn channel_of(image: u32, channel: u32) -> Channel {
    let at = image * 2u * p.width + channel;
    var held: Channel;
    held.mean = statistics[at];
    held.rstd = statistics[at + p.width];
    held.weight = V(1.0);
    held.bias = V(0.0);
#if STAGE == 5
    held.mean_along = means[at];
    held.mean_g = means[at + p.width];
#endif
    if p.has_weight != 0u {
        held.weight = weight[channel];
    }
    if p.has_bias != 0u {
        held.bias = bias[channel];
    }
    return held;
}

fn sigmoid(v: V) -> V {
    return 1.0 / (1.0 + exp(-v));
}

// The gradient of what SILU was taken of.
fn through(dy: V, normed: V, held: Channel) -> V {
#ifdef SILU
    let z = normed * held.weight + held.bias;
    let s = sigmoid(z);
    return dy * s * (1.0 + z * (1.0 - s));
#else
    return dy;
#endif
}

#if STAGE == 2
fn finish(at: u32, held: Channel) {
    let normed = (V(x[at]) - held.mean) * held.rstd;
    let z = normed * held.weight + held.bias;
#ifdef SILU
    y[at] = Stored(z * sigmoid(z));
#else
    y[at] = Stored(z);
#endif
}
#endif

#if STAGE == 5
fn finish(at: u32, held: Channel) {
    let normed = (V(x[at]) - held.mean) * held.rstd;
    let g = through(V(dy[at]), normed, held);
    var result = held.rstd * (g * held.weight - held.mean_g - normed * held.mean_along);
#ifdef ONTO
    result += V(earlier[at]);
#endif
    dx[at] = Stored(result);
}
#endif

@compute @workgroup_size(#{WG})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let place = column_and_row(group, local, #{LANES}u, #{WG}u, p.chunk);
    let channel = place.x;
    let start = place.y;
    if channel >= p.width || start >= p.pixels {
        return;
    }
    let held = channel_of(group.z, channel);
    let base = group.z * p.pixels * p.width + channel;
    let end = min(p.pixels, start + p.chunk);
#if STAGE == 3
    var along = V(0.0);
    var sum = V(0.0);
    // Two a turn, as above.
    var pixel = start;
    for (; pixel + 2u <= end; pixel += 2u) {
        for (var k = 0u; k < 2u; k++) {
            let at = base + (pixel + k) * p.width;
            let normed = (V(x[at]) - held.mean) * held.rstd;
            let g = through(V(dy[at]), normed, held);
            along += g * normed;
            sum += g;
        }
    }
    if pixel < end {
        let at = base + pixel * p.width;
        let normed = (V(x[at]) - held.mean) * held.rstd;
        let g = through(V(dy[at]), normed, held);
        along += g * normed;
        sum += g;
    }
    let at = (group.z * p.chunks + start / p.chunk) * 2u * p.width + channel;
    partial_sums[at] = along;
    partial_sums[at + p.width] = sum;
#else
    // Four a turn: a turn of its own costs CPU drivers a fifth of a vector.
    var pixel = start;
    for (; pixel + 4u <= end; pixel += 4u) {
        for (var k = 0u; k < 4u; k++) {
            finish(base + (pixel + k) * p.width, held);
        }
    }
    for (; pixel < end; pixel++) {
        finish(base + pixel * p.width, held);
    }
#endif
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
