//! Element types.

/// Element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// bfloat16; storage only, widened in registers.
    Bf16,
    /// Unsigned 32-bit integer: ids, rows, masks.
    U32,
    /// Signed 32-bit integer.
    I32,
}

impl DType {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            DType::F32 | DType::U32 | DType::I32 => 4,
            DType::F16 | DType::Bf16 => 2,
        }
    }

    /// Little-endian bytes of this dtype as `f32` values.
    pub fn widen(self, bytes: &[u8]) -> Vec<f32> {
        let halves = || {
            bytes
                .chunks_exact(2)
                .map(|b| u16::from_le_bytes([b[0], b[1]]))
        };
        let words = || {
            bytes
                .chunks_exact(4)
                .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        };
        match self {
            DType::F32 => words().map(f32::from_bits).collect(),
            DType::U32 => words().map(|v| v as f32).collect(),
            DType::I32 => words().map(|v| v as i32 as f32).collect(),
            DType::F16 => halves().map(|v| half::f16::from_bits(v).to_f32()).collect(),
            DType::Bf16 => halves()
                .map(|v| half::bf16::from_bits(v).to_f32())
                .collect(),
        }
    }

    /// `f32` values as little-endian bytes of this dtype, rounded to nearest even.
    pub fn narrow(self, values: &[f32]) -> Vec<u8> {
        match self {
            DType::F32 => bytemuck::cast_slice(values).to_vec(),
            DType::U32 => values
                .iter()
                .flat_map(|&v| (v as u32).to_le_bytes())
                .collect(),
            DType::I32 => values
                .iter()
                .flat_map(|&v| (v as i32).to_le_bytes())
                .collect(),
            DType::F16 => values
                .iter()
                .flat_map(|&v| half::f16::from_f32(v).to_le_bytes())
                .collect(),
            DType::Bf16 => values
                .iter()
                .flat_map(|&v| half::bf16::from_f32(v).to_le_bytes())
                .collect(),
        }
    }
}
