#define_import_path index

// Linear workgroup index of a grid that was split over x and y to stay under 65,535.
fn group_index(group: vec3<u32>, groups: vec3<u32>) -> u32 {
    return group.y * groups.x + group.x;
}

// Linear thread index of such a grid with `size` threads in a workgroup.
fn thread_index(group: vec3<u32>, groups: vec3<u32>, local: u32, size: u32) -> u32 {
    return group_index(group, groups) * size + local;
}
