//! CLIP's text encoder, as `transformers`' `CLIPTextModel`.
//!
//! Radford et al.: *Learning Transferable Visual Models From Natural Language Supervision*, 2021. Stable Diffusion v1
//! reads its last hidden state after the final layer norm.

use std::path::Path;

use super::config::ConfigFile;
use crate::Result;
use crate::autograd::{self, Var};
use crate::nn::{Embedding, LayerNorm, Linear, Loader};
use crate::ops::attention::{AttentionMask, AttentionShape};
use crate::ops::unary::Unary;
use crate::tensor::Tensor;

/// The fields of `text_encoder/config.json` that shape the model.
#[derive(Clone, Debug)]
pub struct ClipTextConfig {
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width of the hidden states; the U-Net's `cross_attention_dim`.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Encoder layers.
    pub num_hidden_layers: usize,
    /// Attention heads of a layer.
    pub num_attention_heads: usize,
    /// Context length in tokens, 77.
    pub max_position_embeddings: usize,
    /// ε of the layer norms.
    pub layer_norm_eps: f64,
    /// The MLP's activation.
    pub activation: Unary,
}

impl ClipTextConfig {
    /// Reads a `config.json`. Errors: a missing or ill-typed field, another model type, heads that do not divide.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let file = ConfigFile::read(path)?;
        file.only("model_type", &["clip_text_model".to_string()])?;
        let act: String = file.or("hidden_act", "quick_gelu".to_string())?;
        let config = ClipTextConfig {
            vocab_size: file.or("vocab_size", 49408)?,
            hidden_size: file.required("hidden_size")?,
            intermediate_size: file.required("intermediate_size")?,
            num_hidden_layers: file.required("num_hidden_layers")?,
            num_attention_heads: file.required("num_attention_heads")?,
            max_position_embeddings: file.or("max_position_embeddings", 77)?,
            layer_norm_eps: file.or("layer_norm_eps", 1e-5)?,
            activation: match act.as_str() {
                "quick_gelu" => Unary::QuickGelu,
                "gelu" => Unary::GeluErf,
                "gelu_new" | "gelu_pytorch_tanh" => Unary::GeluTanh,
                other => {
                    return Err(file.error(
                        "hidden_act",
                        format!("found \"{other}\", expected \"quick_gelu\" or \"gelu\""),
                    ));
                }
            },
        };
        file.divides(
            "num_attention_heads",
            config.num_attention_heads,
            config.hidden_size,
        )?;
        if config.max_position_embeddings < 3 {
            return Err(file.error("max_position_embeddings", "expected at least 3"));
        }
        Ok(config)
    }
}

/// A tensor name without the `text_model.` that `transformers` wrote before every name until version 5.
pub fn canonical_name(name: &str) -> String {
    name.strip_prefix("text_model.").unwrap_or(name).to_string()
}

/// The encoder: token and position embeddings, pre-norm layers, final layer norm.
pub struct ClipText {
    token_embedding: Embedding,
    position_embedding: Embedding,
    layers: Vec<EncoderLayer>,
    final_layer_norm: LayerNorm,
    context: usize,
}

impl ClipText {
    /// Loads the encoder; the checkpoint's names must have gone through [`canonical_name`].
    pub fn load(config: &ClipTextConfig, l: &Loader) -> Result<Self> {
        let width = config.hidden_size;
        let embeddings = l.sub("embeddings");
        let layers = l.sub("encoder.layers");
        Ok(ClipText {
            token_embedding: Embedding::load(
                &embeddings.sub("token_embedding"),
                config.vocab_size,
                width,
            )?,
            position_embedding: Embedding::load(
                &embeddings.sub("position_embedding"),
                config.max_position_embeddings,
                width,
            )?,
            layers: (0..config.num_hidden_layers)
                .map(|i| EncoderLayer::load(config, &layers.sub(i)))
                .collect::<Result<_>>()?,
            final_layer_norm: LayerNorm::load(
                &l.sub("final_layer_norm"),
                width,
                config.layer_norm_eps,
            )?,
            context: config.max_position_embeddings,
        })
    }

    /// Last hidden states `[batch, tokens, hidden]` of token ids u32 `[batch, tokens]`, padding included as CLIP does.
    pub fn forward(&self, ids: &Tensor) -> Var {
        let tokens = ids.dim(1);
        assert!(
            tokens <= self.context,
            "CLIP text: {tokens} tokens in a context of {}",
            self.context
        );
        let positions: Vec<u32> = (0..tokens as u32).collect();
        let positions = Tensor::from_u32(ids.gpu(), &positions, &[1, tokens]);
        let mut x = self
            .token_embedding
            .forward(ids)
            .add(&self.position_embedding.forward(&positions));
        for layer in &self.layers {
            x = layer.forward(&x);
        }
        self.final_layer_norm.forward(&x)
    }
}

struct EncoderLayer {
    layer_norm1: LayerNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    shape: AttentionShape,
    activation: Unary,
}

impl EncoderLayer {
    fn load(config: &ClipTextConfig, l: &Loader) -> Result<Self> {
        let (width, inner) = (config.hidden_size, config.intermediate_size);
        let attention = l.sub("self_attn");
        let square = |name: &str| Linear::load(&attention.sub(name), width, width, true);
        Ok(EncoderLayer {
            layer_norm1: LayerNorm::load(&l.sub("layer_norm1"), width, config.layer_norm_eps)?,
            q_proj: square("q_proj")?,
            k_proj: square("k_proj")?,
            v_proj: square("v_proj")?,
            out_proj: square("out_proj")?,
            layer_norm2: LayerNorm::load(&l.sub("layer_norm2"), width, config.layer_norm_eps)?,
            fc1: Linear::load(&l.sub("mlp.fc1"), width, inner, true)?,
            fc2: Linear::load(&l.sub("mlp.fc2"), inner, width, true)?,
            shape: AttentionShape {
                heads: config.num_attention_heads,
                kv_heads: config.num_attention_heads,
                scale: ((width / config.num_attention_heads) as f32).powf(-0.5),
            },
            activation: config.activation,
        })
    }

    /// `x` `[batch, tokens, hidden]`.
    fn forward(&self, x: &Var) -> Var {
        let h = self.layer_norm1.forward(x);
        let h = autograd::attention(
            &self.q_proj.forward(&h),
            &self.k_proj.forward(&h),
            &self.v_proj.forward(&h),
            self.shape,
            &AttentionMask {
                causal: true,
                ..AttentionMask::default()
            },
        );
        let x = self.out_proj.forward_onto(&h, x);
        let h = self.layer_norm2.forward(&x);
        let h = self.fc1.forward(&h).unary(self.activation);
        self.fc2.forward_onto(&h, &x)
    }
}
