// A 3×3 convolution of stride 1 by the minimal algorithm F(4×4, 3×3) of Winograd (Lavin & Gray, 2015): an output tile of
// 4×4 pixels takes 36 products a pair of channels instead of 144. STAGE 0 takes the image to the points 0, A, −A, B, −B and
// ∞ (Bᵀ d B), 1 the weight (G g Gᵀ); 36 matrix products over the channels later, 2 takes the sums back (Aᵀ m A) and adds
// the bias. A thread has four channels of a tile, or of a pair of weights.
#import index::thread_index

#ifdef S_F16
alias Scalar = f16;
#else
alias Scalar = f32;
#endif
#if STAGE == 1
#ifdef S_BF16
alias Source = u32;
#else
alias Source = Scalar;
#endif
#else
alias Source = vec4<Scalar>;
#endif
#ifdef T_F16
alias Target = vec4<f16>;
#else
alias Target = vec4<f32>;
#endif

struct Params {
    // Threads in all, and vec4s of the side that they lie along: channels, or the weight's columns.
    count: u32,
    quads: u32,
    // First vec4s of the image or weight, and of the result.
    source_start: u32,
    target_start: u32,
    // Tiles of an image across and down, and of all images.
    tiles_x: u32,
    tiles_y: u32,
    tiles: u32,
    // The image read (stage 0) or written (stage 2), and vec4s between its pixels.
    height: i32,
    width: i32,
    pixel: u32,
    pad_top: i32,
    pad_left: i32,
    // Stage 1: input channels in all of a result, vec4s in a panel's row; the weight's channels and whether it is turned
    // round with its channels exchanged, for the gradient of the input; the first column of the result.
    rows: u32,
    panel: u32,
    ci: u32,
    co: u32,
    turned: u32,
    first: u32,
    has_bias: u32,
}

@group(0) @binding(0) var<storage, read> source: array<Source>;
@group(0) @binding(1) var<storage, read_write> result: array<Target>;
@group(0) @binding(2) var<storage, read> bias: array<f32>;
var<immediate> p: Params;

// With 3/4 and 3/2 the largest error in f32 is a third of that with the usual 1 and 2.
const A = 0.75;
const B = 1.5;

alias Six = array<vec4<f32>, 6>;
alias Four = array<vec4<f32>, 4>;

#if STAGE != 2
// A line of six points; `points` vec4s lie between one and the next.
fn store(line: u32, at: u32, points: u32, v: Six) {
    let base = at + 6u * line * points;
    result[base] = v[0];
    result[base + points] = v[1];
    result[base + 2u * points] = v[2];
    result[base + 3u * points] = v[3];
    result[base + 4u * points] = v[4];
    result[base + 5u * points] = v[5];
}
#endif

#if STAGE == 0
fn image(d: Six) -> Six {
    let even_a = d[4] - (B * B) * d[2];
    let odd_a = A * d[3] - (A * B * B) * d[1];
    let even_b = d[4] - (A * A) * d[2];
    let odd_b = B * d[3] - (A * A * B) * d[1];
    return Six(
        (A * A * B * B) * d[0] - (A * A + B * B) * d[2] + d[4],
        even_a + odd_a,
        even_a - odd_a,
        even_b + odd_b,
        even_b - odd_b,
        (A * A * B * B) * d[1] - (A * A + B * B) * d[3] + d[5],
    );
}

fn pixel(base: u32, y: i32, x: i32) -> vec4<f32> {
    let inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
    let at = base + u32(clamp(y, 0, p.height - 1) * p.width + clamp(x, 0, p.width - 1)) * p.pixel;
    return select(vec4<f32>(), vec4<f32>(source[at]), inside);
}

fn column(base: u32, y: i32, x: i32) -> Six {
    return image(Six(
        pixel(base, y, x),
        pixel(base, y + 1, x),
        pixel(base, y + 2, x),
        pixel(base, y + 3, x),
        pixel(base, y + 4, x),
        pixel(base, y + 5, x),
    ));
}

fn work(i: u32) {
    let quad = i % p.quads;
    let tile = i / p.quads;
    let line = tile / p.tiles_x;
    let y = 4 * i32(line % p.tiles_y) - p.pad_top;
    let x = 4 * i32(tile % p.tiles_x) - p.pad_left;
    let base = p.source_start + (line / p.tiles_y) * u32(p.height * p.width) * p.pixel + quad;
    let points = p.tiles * p.quads;
    let a = column(base, y, x);
    let b = column(base, y, x + 1);
    let c = column(base, y, x + 2);
    let d = column(base, y, x + 3);
    let e = column(base, y, x + 4);
    let f = column(base, y, x + 5);
    store(0u, i, points, image(Six(a[0], b[0], c[0], d[0], e[0], f[0])));
    store(1u, i, points, image(Six(a[1], b[1], c[1], d[1], e[1], f[1])));
    store(2u, i, points, image(Six(a[2], b[2], c[2], d[2], e[2], f[2])));
    store(3u, i, points, image(Six(a[3], b[3], c[3], d[3], e[3], f[3])));
    store(4u, i, points, image(Six(a[4], b[4], c[4], d[4], e[4], f[4])));
    store(5u, i, points, image(Six(a[5], b[5], c[5], d[5], e[5], f[5])));
}
#endif

#if STAGE == 1
fn weight(g0: vec4<f32>, g1: vec4<f32>, g2: vec4<f32>) -> Six {
    let even_a = (g0 + (A * A) * g2) * (0.5 / (A * A * (A * A - B * B)));
    let odd_a = g1 * (0.5 / (A * (A * A - B * B)));
    let even_b = (g0 + (B * B) * g2) * (0.5 / (B * B * (B * B - A * A)));
    let odd_b = g1 * (0.5 / (B * (B * B - A * A)));
    return Six(
        g0 * (1.0 / (A * A * B * B)),
        even_a + odd_a,
        even_a - odd_a,
        even_b + odd_b,
        even_b - odd_b,
        g2,
    );
}

fn element(i: u32) -> f32 {
#ifdef S_BF16
    let word = source[i >> 1u];
    return bitcast<f32>(select(word << 16u, word & 0xffff0000u, (i & 1u) == 1u));
#else
    return f32(source[i]);
#endif
}

// Four columns of a row of the weight's tap.
fn tap(index: u32, row: u32, column: u32) -> vec4<f32> {
    var at = (index * p.ci + row) * p.co + column;
    var step = 1u;
    if p.turned != 0u {
        at = ((8u - index) * p.ci + column) * p.co + row;
        step = p.co;
    }
    return vec4<f32>(element(at), element(at + step), element(at + 2u * step), element(at + 3u * step));
}

// [36, panels, rows, 4 · panel]. Threads lie along what lies side by side in the weight: columns, or rows in eights.
fn work(i: u32) {
    var quad = i % p.quads;
    var row = i / p.quads;
    if p.turned != 0u {
        quad = (i / 8u) % p.quads;
        row = i % 8u + 8u * (i / (8u * p.quads));
        if row >= p.rows {
            return;
        }
    }
    let column = p.first + 4u * quad;
    let a = weight(tap(0u, row, column), tap(3u, row, column), tap(6u, row, column));
    let b = weight(tap(1u, row, column), tap(4u, row, column), tap(7u, row, column));
    let c = weight(tap(2u, row, column), tap(5u, row, column), tap(8u, row, column));
    let at = ((quad / p.panel) * p.rows + row) * p.panel + quad % p.panel;
    let points = (p.quads + p.panel - 1u) / p.panel * p.rows * p.panel;
    store(0u, at, points, weight(a[0], b[0], c[0]));
    store(1u, at, points, weight(a[1], b[1], c[1]));
    store(2u, at, points, weight(a[2], b[2], c[2]));
    store(3u, at, points, weight(a[3], b[3], c[3]));
    store(4u, at, points, weight(a[4], b[4], c[4]));
    store(5u, at, points, weight(a[5], b[5], c[5]));
}
#endif

#if STAGE == 2
fn sums(m0: vec4<f32>, m1: vec4<f32>, m2: vec4<f32>, m3: vec4<f32>, m4: vec4<f32>, m5: vec4<f32>) -> Four {
    let even_a = m1 + m2;
    let odd_a = m1 - m2;
    let even_b = m3 + m4;
    let odd_b = m3 - m4;
    return Four(
        m0 + even_a + even_b,
        A * odd_a + B * odd_b,
        (A * A) * even_a + (B * B) * even_b,
        (A * A * A) * odd_a + (B * B * B) * odd_b + m5,
    );
}

fn line(at: u32, index: u32, points: u32) -> Four {
    let base = at + 6u * index * points;
    return sums(
        source[base],
        source[base + points],
        source[base + 2u * points],
        source[base + 3u * points],
        source[base + 4u * points],
        source[base + 5u * points],
    );
}

fn store(at: u32, y: i32, x: i32, v: Four, added: vec4<f32>) {
    if x >= p.width {
        return;
    }
    for (var j = 0; j < 4; j++) {
        if y + j < p.height {
            result[at + u32((y + j) * p.width + x) * p.pixel] = Target(v[j] + added);
        }
    }
}

fn work(i: u32) {
    let quad = i % p.quads;
    let tile = i / p.quads;
    let row = tile / p.tiles_x;
    let y = 4 * i32(row % p.tiles_y);
    let x = 4 * i32(tile % p.tiles_x);
    let points = p.tiles * p.quads;
    let a = line(i, 0u, points);
    let b = line(i, 1u, points);
    let c = line(i, 2u, points);
    let d = line(i, 3u, points);
    let e = line(i, 4u, points);
    let f = line(i, 5u, points);
    var added = vec4<f32>();
    if p.has_bias != 0u {
        let channel = p.first + 4u * quad;
        added = vec4<f32>(bias[channel], bias[channel + 1u], bias[channel + 2u], bias[channel + 3u]);
    }
    let at = p.target_start + (row / p.tiles_y) * u32(p.height * p.width) * p.pixel + p.first / 4u + quad;
    store(at, y, x, sums(a[0], b[0], c[0], d[0], e[0], f[0]), added);
    store(at, y, x + 1, sums(a[1], b[1], c[1], d[1], e[1], f[1]), added);
    store(at, y, x + 2, sums(a[2], b[2], c[2], d[2], e[2], f[2]), added);
    store(at, y, x + 3, sums(a[3], b[3], c[3], d[3], e[3], f[3]), added);
}
#endif

@compute @workgroup_size(#{WG})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = thread_index(group, groups, local, #{WG}u);
    if i < p.count {
        work(i);
    }
}
