//! Kernels that are cut one way for GPUs and another for drivers that run on the CPU: the same bits either way.

use lavender_wgpu::gpu::Kernel;
use lavender_wgpu::tensor::{DType, Tensor};

use crate::support::*;

fn tensor(seed: u64, shape: &[usize]) -> Tensor {
    let n = shape.iter().product();
    upload(&uniform(&mut rng(seed), n), DType::F32, shape).0
}

/// What `kernel` writes into a tensor of `elements`, its inputs and parameters given.
fn run(
    kernel: &Kernel,
    inputs: &[&Tensor],
    elements: usize,
    params: &[u32],
    groups: [u32; 3],
) -> Vec<u32> {
    let out = Tensor::from_f32(gpu(), &vec![7.0; elements], &[elements]);
    let bindings: Vec<_> = inputs.iter().chain([&&out]).map(|t| t.binding()).collect();
    let bytes = bytemuck::cast_slice(params);
    gpu().dispatch(kernel, &bindings, bytes, groups, 1);
    out.to_f32().unwrap().iter().map(|v| v.to_bits()).collect()
}

/// Compares both cuts of a kernel whose threads walk `chunk` of `rows` rows in one of `width` columns.
fn walked(
    kernel: Kernel,
    inputs: &[&Tensor],
    elements: usize,
    params: &[u32],
    [rows, width, chunk, images]: [u32; 4],
) {
    let [cpu, gpu] = [(8, 8), (64, 16)].map(|(threads, lanes)| {
        let kernel = kernel
            .clone()
            .def("WG", threads as i32)
            .def("LANES", lanes as i32);
        let rows = rows.div_ceil(threads / lanes * chunk);
        let groups = [width.div_ceil(lanes), rows, images];
        run(&kernel, inputs, elements, params, groups)
    });
    assert!(cpu == gpu, "{} {:?}", kernel.label(), kernel.defs);
    let untouched = 7.0f32.to_bits();
    let written = cpu.iter().filter(|v| **v != untouched).count();
    assert_eq!(written, elements, "{}", kernel.label());
}

#[test]
fn columns_are_walked_alike() {
    // 37 rows of 21 vectors: neither divides into the lanes or chunks of either cut.
    let (rows, width) = (37u32, 21u32);
    let elements = (rows * width * 4) as usize;
    for chunk in [3, 8, 64] {
        let cut = [rows, width, chunk, 1];
        let x = tensor(151, &[2 * elements]);
        let geglu = Kernel::new("geglu").flag("VEC4", true);
        walked(geglu, &[&x], elements, &[rows, width, chunk], cut);

        let a = tensor(152, &[elements]);
        let b = tensor(153, &[width as usize * 4]);
        let add = Kernel::new("binary").def("OP", 0).def("RANK", 2);
        let add = add
            .flag("VEC4", true)
            .flag("COLUMNS", true)
            .flag("B_STAYS", true);
        let (n, vectors) = (4 * width, rows * width);
        let sizes = [n, rows, 1, 1, 1, 1];
        let strides = [1, n, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0];
        let params = [&[vectors, chunk], &sizes[..], &strides[..]].concat();
        walked(add, &[&a, &b], elements, &params, cut);

        // 37 pixels are no whole rows of 5; what is past the last is not read here.
        let double = Kernel::new("upsample_nearest2x").flag("VEC4", true);
        let small = tensor(154, &[35 * width as usize * 4]);
        let params = [35, 5, width, chunk];
        let cut = [35, width, chunk, 1];
        walked(double, &[&small], 4 * small.elements(), &params, cut);
    }
}

#[test]
fn pixels_of_a_group_norm_are_walked_alike() {
    let (batch, pixels, width) = (2u32, 37u32, 5u32);
    let elements = (batch * pixels * width * 4) as usize;
    let x = tensor(155, &[elements]);
    let statistics = tensor(156, &[(batch * 2 * width * 4) as usize]);
    let (w, b) = (tensor(157, &[20]), tensor(158, &[20]));
    for chunk in [4u32, 16] {
        let chunks = pixels.div_ceil(chunk);
        let params = [batch, pixels, width, 4, chunk, chunks, 1, 1, 0];
        let kernel = |stage| {
            Kernel::new("group_norm")
                .def("STAGE", stage)
                .flag("WALK", stage != 0)
                .flag("VEC4", true)
        };
        let cut = [pixels, width, chunk, batch];
        let moments = (batch * chunks * 2 * width * 4) as usize;
        walked(kernel(0), &[&x], moments, &params, cut);
        let inputs = [&x, &statistics, &w, &b];
        walked(
            kernel(2).flag("SILU", true),
            &inputs,
            elements,
            &params,
            cut,
        );
        let inputs = [&x, &statistics, &w, &b, &x];
        walked(kernel(3), &inputs, moments, &params, cut);
    }
}

#[test]
fn heads_are_turned_alike() {
    // Half a head shorter and longer than the workgroup of either cut, and one that does not divide it.
    for (half, unit) in [(8u32, 4u32), (32, 4), (144, 4), (5, 1)] {
        let (rows, heads) = (6u32, 3u32);
        let shape = [(rows * heads * 2 * half) as usize];
        let angles = [159, 160].map(|seed| tensor(seed, &[(3 * half) as usize]));
        let x = tensor(161, &shape);
        let kernel = Kernel::new("rotary")
            .flag("VEC4", unit == 4)
            .def("HALF", (half / unit) as i32);
        let [one, other] = [(8, 4), (32, 1)].map(|(threads, chunk): (u32, u32)| {
            let params = [rows, 3, heads, heads, 1, 1f32.to_bits(), chunk];
            let kernel = kernel.clone().def("WG", threads as i32);
            let inputs = [&angles[0], &angles[1], &x];
            let groups = [rows.div_ceil(chunk), 1, 1];
            run(&kernel, &inputs, shape[0], &params, groups)
        });
        assert!(one == other, "half a head of {half}");
        assert!(one.iter().all(|v| *v != 7.0f32.to_bits()), "{half}");
    }
}

#[test]
fn lines_are_shared_out_alike() {
    let vectors = 1000u32;
    let elements = 4 * vectors as usize;
    let (gate, up) = (tensor(162, &[elements]), tensor(163, &[elements]));
    let [one, other] = [(8, 64), (64, 128)].map(|(threads, chunk): (u32, u32)| {
        let kernel = Kernel::new("swiglu").def("WG", threads as i32);
        let groups = [vectors.div_ceil(chunk), 1, 1];
        run(&kernel, &[&gate, &up], elements, &[vectors, chunk], groups)
    });
    assert!(one == other);
    assert!(one.iter().all(|v| *v != 7.0f32.to_bits()));
}
