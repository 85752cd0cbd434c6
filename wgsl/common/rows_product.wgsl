#define_import_path rows_product
// What the kernels of a product for CPU drivers have in common: their parameters, where vectors along k lie, and the terms
// that one of them adds.

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

// Where a vector along k of a's rows lies, counted from each row's own place.
struct Place {
    at: u32,
    // Vectors before it in its segment, and segments before that in its run.
    vector: u32,
    segment: u32,
}

fn place_of(p: Params, segment: u32) -> Place {
    let before = segment % p.run;
    return Place((segment / p.run) * p.run_stride + before * p.segment_stride, 0u, before);
}

// The place of the vector after that.
fn after(p: Params, place: Place) -> Place {
    let length = p.segment / 4u;
    let ends = place.vector + 1u == length;
    let turns = ends && place.segment + 1u == p.run;
    let segment = place.segment + select(0u, 1u, ends);
    let at = place.at + select(1u, p.segment_stride - length + 1u, ends);
    return Place(
        at + select(0u, p.run_stride - p.run * p.segment_stride, turns),
        select(place.vector + 1u, 0u, ends),
        select(segment, 0u, turns),
    );
}

// `sum` with four terms more, of a vector of a row of a and four lines of b.
fn terms(sum: vec4<f32>, av: vec4<f32>, bv: mat4x4<f32>) -> vec4<f32> {
    let two = fma(vec4<f32>(av.y), bv[1], fma(vec4<f32>(av.x), bv[0], sum));
    return fma(vec4<f32>(av.w), bv[3], fma(vec4<f32>(av.z), bv[2], two));
}
