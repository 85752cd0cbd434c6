#define_import_path index

// Linear workgroup index of a grid that was split over x and y to stay under 65,535.
fn group_index(group: vec3<u32>, groups: vec3<u32>) -> u32 {
    return group.y * groups.x + group.x;
}

// Linear thread index of such a grid with `size` threads in a workgroup.
fn thread_index(group: vec3<u32>, groups: vec3<u32>, local: u32, size: u32) -> u32 {
    return group_index(group, groups) * size + local;
}

// First and end of the share of workgroup `index` in `count` vectors, of which each workgroup takes `chunk`.
fn share(index: u32, chunk: u32, count: u32) -> vec2<u32> {
    let start = index * chunk;
    return vec2<u32>(start, min(start + chunk, count));
}

// Column and first row of a thread of `columns` in Rust: a workgroup has `lanes` neighbouring columns of `size / lanes`
// blocks of `chunk` rows.
fn column_and_row(group: vec3<u32>, local: u32, lanes: u32, size: u32, chunk: u32) -> vec2<u32> {
    let block = group.y * (size / lanes) + local / lanes;
    return vec2<u32>(group.x * lanes + local % lanes, block * chunk);
}
