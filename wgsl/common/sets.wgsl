#define_import_path sets
// Numbers of up to eight tensors that one dispatch serves, and which of them a workgroup or thread belongs to.

// The i-th of eight.
fn one_of(low: vec4<u32>, high: vec4<u32>, i: u32) -> u32 {
    return select(low[i & 3u], high[i & 3u], i > 3u);
}

fn count(flags: vec4<bool>) -> u32 {
    let ones = select(vec4<u32>(0u), vec4<u32>(1u), flags);
    return ones.x + ones.y + ones.z + ones.w;
}

// How many of eight rising `ends` lie at or before `index`: the tensor that it belongs to.
fn tensor_of(index: u32, low: vec4<u32>, high: vec4<u32>) -> u32 {
    return count(vec4<u32>(index) >= low) + count(vec4<u32>(index) >= high);
}

// Where that tensor begins.
fn start_of(tensor: u32, low: vec4<u32>, high: vec4<u32>) -> u32 {
    return select(one_of(low, high, max(tensor, 1u) - 1u), 0u, tensor == 0u);
}
