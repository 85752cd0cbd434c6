//! The tensors of a student from its `config.json` alone: names and shapes, no weights.

use std::collections::BTreeMap;
use std::path::Path;

use super::idefics3_config::Idefics3Config;
use super::mllama::MllamaConfig;
use super::prepare::model_type;
use crate::Result;

/// Shapes by today's names of the tensors.
pub type Shapes = BTreeMap<String, Vec<usize>>;

/// What the checkpoint in `dir` has to hold, as [`super::Student::open`] asks for it.
///
/// # Errors
/// A missing `config.json`, an unknown `model_type`, a field with an unusable value, by file and field.
pub fn shapes(dir: &Path) -> Result<Shapes> {
    Ok(match model_type(dir)?.as_str() {
        "mllama" => mllama(&MllamaConfig::load(dir)?),
        _ => idefics3(&Idefics3Config::load(dir)?),
    })
}

/// Collects what stands below a prefix.
struct Below<'a> {
    all: &'a mut Shapes,
    prefix: String,
}

impl Below<'_> {
    fn sub(&mut self, name: impl std::fmt::Display) -> Below<'_> {
        Below {
            prefix: format!("{}{name}.", self.prefix),
            all: self.all,
        }
    }

    fn tensor(&mut self, name: &str, shape: &[usize]) {
        let name = format!("{}{name}", self.prefix);
        self.all.insert(name, shape.to_vec());
    }

    /// `weight` [outputs, inputs], or [width] of a norm, and perhaps `bias`.
    fn layer(&mut self, name: &str, shape: &[usize], bias: bool) {
        self.tensor(&format!("{name}.weight"), shape);
        if bias {
            self.tensor(&format!("{name}.bias"), &shape[..1]);
        }
    }

    fn linears(&mut self, names: &[&str], inputs: usize, outputs: usize, bias: bool) {
        for name in names {
            self.layer(name, &[outputs, inputs], bias);
        }
    }

    fn norms(&mut self, names: &[&str], width: usize, bias: bool) {
        for name in names {
            self.layer(name, &[width], bias);
        }
    }

    /// The gated feed-forward block of a Llama decoder, and the norms around it and the attention.
    fn decoder_layer(&mut self, hidden: usize, intermediate: usize) {
        self.norms(
            &["input_layernorm", "post_attention_layernorm"],
            hidden,
            false,
        );
        let mut mlp = self.sub("mlp");
        mlp.linears(&["gate_proj", "up_proj"], hidden, intermediate, false);
        mlp.linears(&["down_proj"], intermediate, hidden, false);
    }

    fn attention(&mut self, hidden: usize, queries: usize, keys: usize) {
        self.linears(&["q_proj"], hidden, queries, false);
        self.linears(&["k_proj", "v_proj"], hidden, keys, false);
        self.linears(&["o_proj"], queries, hidden, false);
    }
}

fn idefics3(c: &Idefics3Config) -> Shapes {
    let mut all = Shapes::new();
    let mut root = Below {
        all: &mut all,
        prefix: String::new(),
    };
    if !c.tied {
        root.linears(&["lm_head"], c.hidden, c.vocabulary, false);
    }
    let mut model = root.sub("model");
    let (v, merged) = (&c.vision, c.vision.hidden * c.scale_factor * c.scale_factor);
    model.linears(
        &["connector.modality_projection.proj"],
        merged,
        c.hidden,
        false,
    );

    let mut vision = model.sub("vision_model");
    vision.norms(&["post_layernorm"], v.hidden, true);
    let mut embeddings = vision.sub("embeddings");
    embeddings.layer("patch_embedding", &[v.hidden, 3, v.patch, v.patch], true);
    let table = (v.image_size / v.patch).pow(2);
    embeddings.layer("position_embedding", &[table, v.hidden], false);
    for i in 0..v.layers {
        let mut layer = vision.sub(format!("encoder.layers.{i}"));
        layer.norms(&["layer_norm1", "layer_norm2"], v.hidden, true);
        let projections = ["q_proj", "k_proj", "v_proj", "out_proj"];
        layer
            .sub("self_attn")
            .linears(&projections, v.hidden, v.hidden, true);
        layer.linears(&["mlp.fc1"], v.hidden, v.intermediate, true);
        layer.linears(&["mlp.fc2"], v.intermediate, v.hidden, true);
    }

    let mut text = model.sub("text_model");
    text.layer("embed_tokens", &[c.vocabulary, c.hidden], false);
    text.norms(&["norm"], c.hidden, false);
    for i in 0..c.layers {
        let mut layer = text.sub(format!("layers.{i}"));
        layer.decoder_layer(c.hidden, c.intermediate);
        let (queries, keys) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        layer.sub("self_attn").attention(c.hidden, queries, keys);
    }
    all
}

fn mllama(c: &MllamaConfig) -> Shapes {
    let mut all = Shapes::new();
    let mut root = Below {
        all: &mut all,
        prefix: String::new(),
    };
    root.linears(&["lm_head"], c.hidden, c.vocabulary, false);
    let (v, mut model) = (&c.vision, root.sub("model"));
    model.linears(&["multi_modal_projector"], v.output(), c.hidden, true);

    let mut vision = model.sub("vision_model");
    vision.layer("patch_embedding", &[v.hidden, 3, v.patch, v.patch], false);
    vision.tensor("class_embedding", &[v.hidden]);
    vision.norms(&["layernorm_pre", "layernorm_post"], v.hidden, true);
    // Grid 0 is "no picture".
    let (grids, tiles) = (v.grids + 1, v.max_tiles * v.hidden);
    for name in [
        "pre_tile_positional_embedding",
        "post_tile_positional_embedding",
    ] {
        let mut embedding = vision.sub(name);
        embedding.tensor("gate", &[1]);
        embedding.layer("embedding", &[grids, tiles], false);
    }
    let mut positions = vision.sub("gated_positional_embedding");
    positions.tensor("gate", &[1]);
    positions.tensor("embedding", &[v.tokens(), v.hidden]);
    positions.layer("tile_embedding", &[grids, tiles * v.tokens()], false);
    for (stack, layers, gated) in [
        ("transformer", v.layers, false),
        ("global_transformer", v.global_layers, true),
    ] {
        for i in 0..layers {
            let mut layer = vision.sub(format!("{stack}.layers.{i}"));
            layer.norms(
                &["input_layernorm", "post_attention_layernorm"],
                v.hidden,
                true,
            );
            layer
                .sub("self_attn")
                .attention(v.hidden, v.hidden, v.hidden);
            layer.linears(&["mlp.fc1"], v.hidden, v.intermediate, true);
            layer.linears(&["mlp.fc2"], v.intermediate, v.hidden, true);
            if gated {
                layer.tensor("gate_attn", &[1]);
                layer.tensor("gate_ffn", &[1]);
            }
        }
    }

    let mut text = model.sub("language_model");
    let table = c.vocabulary + super::mllama::EXTRA_TOKENS;
    text.layer("embed_tokens", &[table, c.hidden], false);
    text.norms(&["norm"], c.hidden, false);
    let head = c.hidden / c.heads;
    for i in 0..c.layers {
        let mut layer = text.sub(format!("layers.{i}"));
        layer.decoder_layer(c.hidden, c.intermediate);
        let cross = c.cross_layers.contains(&i);
        let mut attention = layer.sub(if cross { "cross_attn" } else { "self_attn" });
        attention.attention(c.hidden, c.hidden, c.kv_heads * head);
        if cross {
            attention.norms(&["q_norm", "k_norm"], head, false);
            layer.tensor("cross_attn_attn_gate", &[1]);
            layer.tensor("cross_attn_mlp_gate", &[1]);
        }
    }
    all
}
