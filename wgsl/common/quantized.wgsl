#define_import_path quantized
// Weights in 8 or (Q4) 4 bits with bf16 scales for groups of 64, read four at a time: quad i holds elements 4 i … 4 i + 3.

// The word that quad i is in.
fn quad_word(i: u32) -> u32 {
#ifdef Q4
    return i >> 1u;
#else
    return i;
#endif
}

// The word that its scale is in, two to a word.
fn scale_word(i: u32) -> u32 {
    return i >> 5u;
}

// Its weights, from those two words.
fn quad(i: u32, word: u32, scales: u32) -> vec4<f32> {
#ifdef Q4
    let bits = vec4<u32>(word >> ((i & 1u) * 16u));
    let q = bitcast<vec4<i32>>(bits << vec4<u32>(28u, 24u, 20u, 16u)) >> vec4<u32>(28u);
#else
    let q = bitcast<vec4<i32>>(vec4<u32>(word) << vec4<u32>(24u, 16u, 8u, 0u)) >> vec4<u32>(24u);
#endif
    let scale = bitcast<f32>(select(scales << 16u, scales & 0xffff0000u, (i & 16u) != 0u));
    return vec4<f32>(q) * scale;
}
