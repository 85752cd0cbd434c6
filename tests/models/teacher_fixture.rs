//! What `tests/reference/teacher.py` left to compare with.
#![allow(dead_code)]

use std::collections::HashMap;

use lavender_wgpu::tensor::{Checkpoint, Tensor};

use crate::support::{gpu, reference};

/// The two checkpoints.
pub const CHECKPOINTS: [&str; 2] = ["a", "b"];

/// The expected tensors and texts of one checkpoint.
pub struct Expected {
    /// The tensors.
    pub tensors: Checkpoint,
    metadata: HashMap<String, String>,
}

impl Expected {
    pub fn open(name: &str) -> Self {
        let path = reference(&format!("teacher/expected-{name}.safetensors"));
        let bytes = std::fs::read(&path).unwrap();
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        Expected {
            tensors: Checkpoint::open(&path, "").unwrap(),
            metadata: header.metadata().clone().unwrap(),
        }
    }

    pub fn get(&self, name: &str) -> (Vec<f32>, Vec<usize>) {
        self.tensors.values(name).unwrap()
    }

    /// A tensor of PyTorch's layout `[batch, channels, height, width]` with its channels last.
    pub fn channels_last(&self, name: &str) -> (Vec<f32>, Vec<usize>) {
        let (values, shape) = self.get(name);
        let [b, c, h, w] = shape[..] else {
            panic!("{name}: {shape:?}")
        };
        let mut last = Vec::with_capacity(values.len());
        for i in 0..b {
            for pixel in 0..h * w {
                last.extend((0..c).map(|k| values[(i * c + k) * h * w + pixel]));
            }
        }
        (last, vec![b, h, w, c])
    }

    pub fn image_tensor(&self, name: &str) -> Tensor {
        let (values, shape) = self.channels_last(name);
        Tensor::from_f32(gpu(), &values, &shape)
    }

    pub fn texts(&self) -> [String; 2] {
        serde_json::from_str(&self.metadata["texts"]).unwrap()
    }

    pub fn strings(&self, name: &str) -> Vec<String> {
        serde_json::from_str(&self.metadata[name]).unwrap()
    }

    pub fn ids(&self, name: &str) -> Vec<u32> {
        let path = self.tensors.path().to_path_buf();
        let bytes = std::fs::read(path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let data = file.tensor(name).unwrap().data().to_vec();
        data.chunks(4)
            .map(|b| u32::from_le_bytes(b.try_into().unwrap()))
            .collect()
    }
}

#[track_caller]
pub fn assert_relative(what: &str, actual: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(actual.len(), expected.len(), "{what}: lengths");
    let largest = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let error = actual.iter().zip(expected).fold(0.0f32, |m, (a, e)| {
        if a.is_finite() {
            m.max((a - e).abs())
        } else {
            f32::INFINITY
        }
    });
    assert!(
        error <= tolerance * largest,
        "{what}: off by {error:e} of {largest:e}"
    );
}
