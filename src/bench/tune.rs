//! The products that `bench --tune` measures: those of the models that the engine is made for, and what runs have met.

use std::collections::HashSet;

use crate::gpu::Gpu;
use crate::ops::matmul::Shape;
use crate::tensor::DType;

/// Linear layers of a model: tokens that go through them, and each layer's inputs and outputs.
struct Layers {
    tokens: &'static [usize],
    layers: &'static [[usize; 2]],
    /// Whether their inputs and weights have gradients.
    trained: bool,
}

/// SmolLM2-135M, alone and in SmolVLM-256M, with LoRA of rank 16 and the output projection in chunks of rows.
const SMOLLM2: Layers = Layers {
    tokens: &[128, 320, 1200],
    layers: &[
        [576, 576],
        [576, 192],
        [576, 1536],
        [1536, 576],
        [576, 16],
        [16, 576],
    ],
    trained: true,
};

const VOCABULARY: Layers = Layers {
    tokens: &[32, 320],
    layers: &[[576, 49_280]],
    trained: true,
};

/// SmolVLM-256M's vision tower: 1,024 patches a tile; then its connector.
const SIGLIP: Layers = Layers {
    tokens: &[1024],
    layers: &[[768, 768], [768, 3072], [3072, 768]],
    trained: false,
};

const CONNECTOR: Layers = Layers {
    tokens: &[64],
    layers: &[[12_288, 576]],
    trained: false,
};

/// Stable Diffusion v1.4's U-Net at 64² latents: each side's transformer blocks, then text and timestep.
const UNET: [Layers; 6] = [
    Layers {
        tokens: &[4096],
        layers: &[[320, 320], [320, 2560], [1280, 320]],
        trained: false,
    },
    Layers {
        tokens: &[1024],
        layers: &[[640, 640], [640, 5120], [2560, 640]],
        trained: false,
    },
    Layers {
        tokens: &[256],
        layers: &[[1280, 1280], [1280, 10_240], [5120, 1280]],
        trained: false,
    },
    Layers {
        tokens: &[64],
        layers: &[[1280, 1280], [1280, 10_240], [5120, 1280]],
        trained: false,
    },
    Layers {
        tokens: &[77],
        layers: &[
            [768, 320],
            [768, 640],
            [768, 1280],
            [768, 768],
            [768, 3072],
            [3072, 768],
        ],
        trained: false,
    },
    Layers {
        tokens: &[1],
        layers: &[[320, 1280], [1280, 1280], [1280, 640], [1280, 320]],
        trained: false,
    },
];

/// One shape of each class: the models', in every type that the adapter computes in, then what else runs on it have met.
pub fn shapes(gpu: &Gpu) -> Vec<Shape> {
    let float = DType::F32;
    let mut types = vec![[float, float], [float, DType::Bf16]];
    if gpu.tier().f16 {
        types.extend([[DType::F16, DType::F16], [DType::F16, DType::Bf16]]);
    }
    let mut shapes = Vec::new();
    for [a, b] in types {
        for model in [&SMOLLM2, &VOCABULARY, &SIGLIP, &CONNECTOR]
            .into_iter()
            .chain(&UNET)
        {
            for &tokens in model.tokens {
                for &[inputs, outputs] in model.layers {
                    let forward = [tokens, outputs, inputs];
                    shapes.push(Shape::float(forward, [false, true], a, b));
                    if model.trained {
                        let input = [tokens, inputs, outputs];
                        shapes.push(Shape::float(input, [false, false], a, b));
                    }
                    // A weight that is trained is stored as it is computed with.
                    if model.trained && a == b {
                        let weight = [outputs, inputs, tokens];
                        shapes.push(Shape::float(weight, [true, false], a, a));
                    }
                }
            }
        }
    }
    shapes.extend(
        gpu.tuning_shapes()
            .iter()
            .filter_map(|shape| shape.parse::<Shape>().ok()),
    );
    let mut seen = HashSet::new();
    shapes.retain(|shape| seen.insert(shape.class()));
    shapes
}
