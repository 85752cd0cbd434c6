//! LoRA factors beside frozen linear layers.

use serde::{Deserialize, Serialize};

use super::dropout::dropped;
use super::loader::{Init, Loader};
use crate::autograd::{Var, no_grad};
use crate::error::Result;
use crate::ops::unary::{Unary, unary};
use crate::tensor::Tensor;

/// Largest rank that is taken; beyond it lies no known model's width.
pub const MOST_RANK: usize = 1 << 16;

/// Low-rank adaptation of linear layers (Hu et al., 2021).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraConfig {
    /// Rank.
    pub r: usize,
    /// The update is scaled by alpha / r.
    pub alpha: f32,
    /// Dropout on the update's input.
    pub dropout: f32,
    /// Module names; a module is adapted when its path is one of these or ends with `.name`.
    pub target_modules: Vec<String>,
    /// Names of those that are not adapted though they match.
    pub exclude_modules: Vec<String>,
    /// Scale by alpha / √r instead (rsLoRA: Kalajdzievski, 2023).
    pub use_rslora: bool,
    /// Also learn the length of each row of the adapted weights (DoRA: Liu et al., 2024).
    pub use_dora: bool,
    /// Ranks of single modules, by names that match as `target_modules` do; the first that matches counts.
    pub rank_pattern: Vec<(String, usize)>,
    /// Alphas of single modules, likewise.
    pub alpha_pattern: Vec<(String, f32)>,
}

impl LoraConfig {
    /// Whether PEFT would adapt the module at `path`.
    pub fn matches(&self, path: &str) -> bool {
        let any = |list: &[String]| list.iter().any(|name| names(name, path));
        any(&self.target_modules) && !any(&self.exclude_modules)
    }

    /// Rank of the module at `path`.
    pub fn rank(&self, path: &str) -> usize {
        pattern(&self.rank_pattern, path).unwrap_or(self.r)
    }

    /// Factor of the module's update B A x: α/r, or α/√r with rsLoRA.
    pub fn scale(&self, path: &str) -> f32 {
        let alpha = pattern(&self.alpha_pattern, path).unwrap_or(self.alpha);
        let rank = self.rank(path) as f32;
        match self.use_rslora {
            true => alpha / rank.sqrt(),
            false => alpha / rank,
        }
    }

    /// The same with every module name passed through `to_canonical` (another key dialect).
    pub fn rename(mut self, to_canonical: impl Fn(&str) -> String) -> Self {
        let ranks = self.rank_pattern.iter_mut().map(|(name, _)| name);
        let alphas = self.alpha_pattern.iter_mut().map(|(name, _)| name);
        let excluded = self.exclude_modules.iter_mut();
        let modules = self.target_modules.iter_mut().chain(excluded);
        for name in modules.chain(ranks).chain(alphas) {
            *name = to_canonical(name);
        }
        self
    }
}

/// Whether `name` is `path` or its end after a dot.
fn names(name: &str, path: &str) -> bool {
    let before = path.strip_suffix(name);
    before.is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

fn pattern<T: Copy>(list: &[(String, T)], path: &str) -> Option<T> {
    let found = list.iter().find(|(name, _)| names(name, path));
    found.map(|&(_, value)| value)
}

/// The two factors beside one linear layer.
pub(super) struct Lora {
    a: Var,
    b: Var,
    scale: f32,
    dropout: f32,
    site: u64,
    dora: Option<Dora>,
}

/// What DoRA adds: the adapted weight's rows have a learned length.
struct Dora {
    /// That length, f32 `[outputs]`.
    magnitude: Var,
    /// The frozen weight's own, squared, f32 `[outputs]`.
    squares: Var,
}

impl Lora {
    /// Factors for the linear layer at `loader`'s prefix when the options ask for them. `squares` gives the squared
    /// length of each row of its weight, f32 `[outputs]`.
    ///
    /// # Errors
    /// Those of `squares`.
    pub fn load(
        loader: &Loader,
        inputs: usize,
        outputs: usize,
        squares: impl Fn() -> Result<Tensor>,
    ) -> Result<Option<Lora>> {
        let path = loader.path("");
        let adapted =
            |config: &&LoraConfig| config.matches(&path) && !loader.options().freeze.matches(&path);
        let Some(config) = loader.options().lora.as_ref().filter(adapted) else {
            return Ok(None);
        };
        // Kaiming uniform with a = √5, as PEFT: ±1/√in.
        let bound = 1.0 / (inputs as f32).sqrt();
        let rank = config.rank(&path);
        Ok(Some(Lora {
            a: loader.lora_factor("lora_A.weight", &[rank, inputs], Init::Uniform(bound)),
            b: loader.lora_factor("lora_B.weight", &[outputs, rank], Init::Zeros),
            scale: config.scale(&path),
            dropout: config.dropout,
            site: fnv1a(&path),
            dora: match config.use_dora {
                true => {
                    let squares = squares()?;
                    let length = unary(&squares, Unary::Sqrt);
                    Some(Dora {
                        magnitude: loader.lora_parameter("lora_magnitude_vector", length),
                        squares: Var::constant(squares),
                    })
                }
                false => None,
            },
        }))
    }

    /// The layer's output `y` + scale · B A dropout(x), or with DoRA + what makes it that of
    /// m · (W + scale · B A) / ‖W + scale · B A‖. `product` gives W x.
    pub fn forward_onto(&self, x: &Var, y: &Var, product: impl Fn(&Var) -> Var) -> Var {
        let x = dropped(x, self.dropout, self.site);
        let Some(dora) = &self.dora else {
            return x.low_rank_onto(&self.a, &self.b, self.scale, y);
        };
        let inner = x.linear(&self.a, None).scale(self.scale);
        let update = inner.linear(&self.b, None);
        let ratio = dora.magnitude.div(&self.lengths(dora, &product));
        let (kept, changed) = (product(&x), update);
        let dtype = changed.value().dtype();
        y.add(
            &kept
                .mul(&ratio.add_scalar(-1.0).cast(dtype))
                .add(&changed.mul(&ratio.cast(dtype))),
        )
    }

    /// Lengths of the rows of W + sBA, f32 `[outputs]`; a constant to the backward, as the paper has it (section 4.3).
    ///
    /// From ‖w‖² + 2s w·(bA) + s² ‖bA‖² of each row, which needs no matrix of the weight's size.
    fn lengths(&self, dora: &Dora, product: impl Fn(&Var) -> Var) -> Var {
        no_grad(|| {
            let with_weight = product(&self.a).permute(&[1, 0]).scale(2.0 * self.scale);
            let gram = self.a.matmul_t(&self.a);
            let with_itself = self.b.matmul(&gram).scale(self.scale * self.scale);
            let change = self.b.mul(&with_weight.add(&with_itself)).sum(&[1], false);
            change.add(&dora.squares).unary(Unary::Sqrt)
        })
    }
}

/// FNV-1a, to give every layer a dropout stream of its own.
fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scale_and_rank_follow_the_patterns_as_in_peft() {
        let config = LoraConfig {
            r: 4,
            alpha: 8.0,
            target_modules: vec!["q_proj".into()],
            rank_pattern: vec![("layers.1.self_attn.q_proj".into(), 16)],
            alpha_pattern: vec![("v_proj".into(), 2.0)],
            ..LoraConfig::default()
        };
        let path = "model.layers.1.self_attn.q_proj";
        assert!(config.matches(path) && !config.matches("model.layers.1.xq_proj"));
        assert_eq!((config.rank(path), config.rank("a.q_proj")), (16, 4));
        // "11.self_attn" does not end with ".1.self_attn".
        assert_eq!(config.rank("model.layers.11.self_attn.q_proj"), 4);
        assert_eq!((config.scale(path), config.scale("a.v_proj")), (0.5, 0.5));
        let rs = LoraConfig {
            use_rslora: true,
            ..config
        };
        assert_eq!((rs.scale(path), rs.scale("a.v_proj")), (2.0, 1.0));
    }
}
