//! The single-file layout that Stable Diffusion v1 was first published in: its tensor names, the configuration that
//! their shapes tell, and what else such a file may be.

use super::clip_text::{self, ClipTextConfig};
use super::unet::UnetConfig;
use super::vae::VaeConfig;
use crate::ops::unary::Unary;
use crate::tensor::Checkpoint;

const UNET: &str = "model.diffusion_model.";
const VAE: &str = "first_stage_model.";
const TEXT: &str = "cond_stage_model.transformer.";

/// Shape of the tensor that the file has under a name.
pub type Shapes<'a> = &'a dyn Fn(&str) -> Option<Vec<usize>>;

/// The configurations of a file's components.
#[derive(Clone, Debug)]
pub struct Configs {
    /// The text encoder's.
    pub text: ClipTextConfig,
    /// The VAE's.
    pub vae: VaeConfig,
    /// The U-Net's.
    pub unet: UnetConfig,
}

/// Configurations from the shapes of a file's tensors; what shapes do not tell (heads, groups, the latents' side and
/// scale, activations) is as in Stable Diffusion v1.
///
/// # Errors
/// The name of a tensor that is missing.
pub fn infer(shapes: Shapes) -> Result<Configs, String> {
    Ok(Configs {
        text: infer_text(shapes)?,
        vae: infer_vae(shapes)?,
        unet: infer_unet(shapes)?,
    })
}

/// Refuses widths that Stable Diffusion v1's groups and heads, which shapes do not tell, do not divide: which width.
///
/// # Errors
/// What does not divide what.
pub fn check_constants(configs: &Configs) -> Result<(), String> {
    let (unet, vae) = (&configs.unet, &configs.vae);
    let of_vae = vae.block_out_channels.iter().map(|&c| (c, 32, "groups"));
    let of_unet = unet.block_out_channels.iter();
    let of_unet = of_unet.flat_map(|&c| [(c, 32, "groups"), (c, 8, "heads")]);
    match of_vae.chain(of_unet).find(|&(c, by, _)| c % by != 0) {
        Some((channels, by, what)) => Err(format!(
            "{by} {what}, as Stable Diffusion v1 has, do not divide {channels} channels"
        )),
        None => Ok(()),
    }
}

/// The shape of a tensor that must be there, with at least `rank` dimensions.
fn need(shapes: Shapes, name: String, rank: usize) -> Result<Vec<usize>, String> {
    match shapes(&name) {
        Some(shape) if shape.len() >= rank => Ok(shape),
        _ => Err(name),
    }
}

/// How many of `name(0)`, `name(1)`, … there are.
fn count(shapes: Shapes, name: impl Fn(usize) -> String) -> usize {
    (0..).take_while(|&i| shapes(&name(i)).is_some()).count()
}

fn infer_text(shapes: Shapes) -> Result<ClipTextConfig, String> {
    let dialects = ["", "text_model."].map(|model| format!("{TEXT}{model}"));
    let table = |root: &String| shapes(&format!("{root}embeddings.token_embedding.weight"));
    let root = dialects.iter().find(|root| table(root).is_some());
    let root = root.unwrap_or(&dialects[1]);
    let tokens = need(
        shapes,
        format!("{root}embeddings.token_embedding.weight"),
        2,
    )?;
    let positions = need(
        shapes,
        format!("{root}embeddings.position_embedding.weight"),
        2,
    )?;
    let layers = format!("{root}encoder.layers");
    let inner = need(shapes, format!("{layers}.0.mlp.fc1.weight"), 2)?;
    Ok(ClipTextConfig {
        vocab_size: tokens[0],
        hidden_size: tokens[1],
        intermediate_size: inner[0],
        num_hidden_layers: count(shapes, |i| format!("{layers}.{i}.mlp.fc1.weight")),
        num_attention_heads: (tokens[1] / 64).max(1),
        max_position_embeddings: positions[0],
        layer_norm_eps: 1e-5,
        activation: Unary::QuickGelu,
    })
}

fn infer_vae(shapes: Shapes) -> Result<VaeConfig, String> {
    let conv = |i: usize, j: usize| format!("{VAE}encoder.down.{i}.block.{j}.conv1.weight");
    let levels = count(shapes, |i| conv(i, 0)).max(1);
    let block_out_channels = (0..levels)
        .map(|i| Ok(need(shapes, conv(i, 0), 4)?[0]))
        .collect::<Result<_, String>>()?;
    Ok(VaeConfig {
        block_out_channels,
        layers_per_block: count(shapes, |j| conv(0, j)),
        latent_channels: need(shapes, format!("{VAE}post_quant_conv.weight"), 4)?[0],
        norm_num_groups: 32,
        scaling_factor: 0.18215,
    })
}

fn infer_unet(shapes: Shapes) -> Result<UnetConfig, String> {
    let conv_in = need(shapes, format!("{UNET}input_blocks.0.0.weight"), 4)?;
    let conv_out = need(shapes, format!("{UNET}out.2.weight"), 4)?;
    let blocks = |at: String| count(shapes, |d| format!("{at}.{d}.norm1.weight"));
    let (mut channels, mut layers, mut depth, mut down) = (vec![], vec![0], vec![0], vec![]);
    for i in 1.. {
        let block = format!("{UNET}input_blocks.{i}");
        let level = layers.len() - 1;
        if shapes(&format!("{block}.0.op.weight")).is_some() {
            layers.push(0);
            depth.push(0);
        } else if let Some(conv) = shapes(&format!("{block}.0.out_layers.3.weight")) {
            layers[level] += 1;
            channels.resize(level + 1, conv[0]);
            depth[level] = blocks(format!("{block}.1.transformer_blocks"));
        } else {
            break;
        }
    }
    let levels = layers.len();
    if channels.len() < levels {
        return Err(format!("{UNET}input_blocks.1.0.out_layers.3.weight"));
    }
    down.extend(depth.iter().map(|&d| d > 0));
    let mut at = 0;
    let up_attention = (0..levels).map(|i| {
        let here = format!("{UNET}output_blocks.{at}.1.norm.weight");
        at += layers[levels - 1 - i] + 1;
        shapes(&here).is_some()
    });
    let up_attention = up_attention.collect();
    let middle = format!("{UNET}middle_block.1");
    let cross = format!("{middle}.transformer_blocks.0.attn2.to_k.weight");
    Ok(UnetConfig {
        sample_size: 64,
        in_channels: conv_in[1],
        out_channels: conv_out[0],
        heads: vec![8; levels],
        depth: depth.into_iter().map(|d| d.max(1)).collect(),
        down_attention: down,
        up_attention,
        cross_attention_dim: need(shapes, cross, 2)?[1],
        norm_num_groups: 32,
        norm_eps: 1e-5,
        flip_sin_to_cos: true,
        freq_shift: 0.0,
        downsample_padding: 1,
        use_linear_projection: need(shapes, format!("{middle}.proj_in.weight"), 2)?.len() == 2,
        layers_per_block: layers,
        block_out_channels: channels,
    })
}

/// A file's tensors by component, under today's names.
pub struct Components {
    /// The text encoder's.
    pub text: Checkpoint,
    /// The VAE's.
    pub vae: Checkpoint,
    /// The U-Net's.
    pub unet: Checkpoint,
}

/// Sorts a file's tensors into components; whatever else it holds (`model_ema.*`, the schedule) is left out.
pub fn split(file: &Checkpoint, configs: &Configs) -> Components {
    let names = Names::new(configs);
    let part = |part: Part| {
        file.select(|name, shape| {
            let (_, name) = names.of(name).filter(|(found, _)| *found == part)?;
            // The VAE's attention was once made of 1×1 convolutions.
            let matrix = part == Part::Vae && name.contains(".attentions.") && shape.len() == 4;
            let shape = if matrix { &shape[..2] } else { shape };
            Some((name, shape.to_vec()))
        })
    };
    Components {
        text: part(Part::Text),
        vae: part(Part::Vae),
        unet: part(Part::Unet),
    }
}

/// A component.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The text encoder.
    Text,
    /// The VAE.
    Vae,
    /// The U-Net.
    Unet,
}

/// Today's names of the tensors of a single file.
pub struct Names {
    places: Vec<(String, String)>,
    vae_levels: usize,
}

impl Names {
    /// The names in a file of these configurations.
    pub fn new(configs: &Configs) -> Self {
        Names {
            places: unet_places(&configs.unet),
            vae_levels: configs.vae.block_out_channels.len(),
        }
    }

    /// The component that a tensor belongs to, and its name there; `None` where it belongs to none.
    pub fn of(&self, name: &str) -> Option<(Part, String)> {
        if let Some(name) = name.strip_prefix(UNET) {
            return Some((Part::Unet, unet_name(name, &self.places)?));
        }
        if let Some(name) = name.strip_prefix(VAE) {
            return Some((Part::Vae, vae_name(name, self.vae_levels)));
        }
        let name = name.strip_prefix(TEXT)?;
        Some((Part::Text, clip_text::canonical_name(name)))
    }
}

/// Where the blocks of a U-Net stand: (prefix in the file, today's prefix).
fn unet_places(config: &UnetConfig) -> Vec<(String, String)> {
    let mut places: Vec<(String, String)> = [
        ("time_embed.0.", "time_embedding.linear_1."),
        ("time_embed.2.", "time_embedding.linear_2."),
        ("input_blocks.0.0.", "conv_in."),
        ("middle_block.0.", "mid_block.resnets.0."),
        ("middle_block.1.", "mid_block.attentions.0."),
        ("middle_block.2.", "mid_block.resnets.1."),
        ("out.0.", "conv_norm_out."),
        ("out.2.", "conv_out."),
    ]
    .map(|(old, new)| (old.to_string(), new.to_string()))
    .to_vec();
    let mut put = |old: String, new: String| places.push((old, new));
    let layers = &config.layers_per_block;
    let levels = layers.len();
    let mut at = 1;
    for (i, &count) in layers.iter().enumerate() {
        for j in 0..count {
            let (old, new) = (format!("input_blocks.{at}"), format!("down_blocks.{i}"));
            put(format!("{old}.0."), format!("{new}.resnets.{j}."));
            put(format!("{old}.1."), format!("{new}.attentions.{j}."));
            at += 1;
        }
        if i + 1 < levels {
            let new = format!("down_blocks.{i}.downsamplers.0.conv.");
            put(format!("input_blocks.{at}.0.op."), new);
            at += 1;
        }
    }
    let mut at = 0;
    for i in 0..levels {
        let attention = config.up_attention[i];
        for j in 0..=layers[levels - 1 - i] {
            let (old, new) = (format!("output_blocks.{at}"), format!("up_blocks.{i}"));
            put(format!("{old}.0."), format!("{new}.resnets.{j}."));
            if attention {
                put(format!("{old}.1."), format!("{new}.attentions.{j}."));
            }
            at += 1;
        }
        let old = format!(
            "output_blocks.{}.{}.conv.",
            at - 1,
            1 + usize::from(attention)
        );
        put(old, format!("up_blocks.{i}.upsamplers.0.conv."));
    }
    places
}

/// Today's name of one of the U-Net's tensors.
fn unet_name(name: &str, places: &[(String, String)]) -> Option<String> {
    let (old, new) = places.iter().find(|(old, _)| name.starts_with(old))?;
    let rest = &name[old.len()..];
    let rest = match new.contains(".resnets.") {
        true => renamed(
            rest,
            &[
                ("in_layers.0", "norm1"),
                ("in_layers.2", "conv1"),
                ("out_layers.0", "norm2"),
                ("out_layers.3", "conv2"),
                ("emb_layers.1", "time_emb_proj"),
                ("skip_connection", "conv_shortcut"),
            ],
        ),
        false => rest.to_string(),
    };
    Some(format!("{new}{rest}"))
}

/// Today's name of one of the VAE's tensors; the file counts the decoder's levels from the finest.
fn vae_name(name: &str, levels: usize) -> String {
    let mut parts: Vec<String> = name.split('.').map(str::to_string).collect();
    if parts.len() > 2 && parts[1] == "up" {
        if let Ok(level) = parts[2].parse::<usize>() {
            parts[2] = levels.saturating_sub(1 + level).to_string();
        }
        parts[1] = "up_blocks".into();
    }
    renamed(
        &parts.join("."),
        &[
            (".down.", ".down_blocks."),
            (".downsample.", ".downsamplers.0."),
            (".upsample.", ".upsamplers.0."),
            (".mid.block_1.", ".mid_block.resnets.0."),
            (".mid.block_2.", ".mid_block.resnets.1."),
            (".mid.attn_1.", ".mid_block.attentions.0."),
            (".attentions.0.norm.", ".attentions.0.group_norm."),
            (".attentions.0.q.", ".attentions.0.to_q."),
            (".attentions.0.k.", ".attentions.0.to_k."),
            (".attentions.0.v.", ".attentions.0.to_v."),
            (".attentions.0.proj_out.", ".attentions.0.to_out.0."),
            (".block.", ".resnets."),
            (".norm_out.", ".conv_norm_out."),
            (".nin_shortcut.", ".conv_shortcut."),
        ],
    )
}

fn renamed(name: &str, pairs: &[(&str, &str)]) -> String {
    pairs
        .iter()
        .fold(name.to_string(), |name, (old, new)| name.replace(old, new))
}

/// Why a file is no Stable Diffusion v1 to load, in words that follow "found": which other model it is, or which
/// component it lacks. `None` where its names are those of Stable Diffusion v1.
pub fn unsupported(file: &Checkpoint) -> Option<String> {
    let any = |starts: &[&str]| {
        file.names()
            .any(|name| starts.iter().any(|start| name.starts_with(start)))
    };
    let known = |what: &str| Some(what.to_string());
    if any(&["conditioner.embedders.", "model.diffusion_model.label_emb."]) {
        return known("Stable Diffusion XL");
    }
    if any(&["model.diffusion_model.joint_blocks.", "joint_blocks."]) {
        return known("Stable Diffusion 3");
    }
    if any(&["model.diffusion_model.double_blocks.", "double_blocks."]) {
        return known("FLUX");
    }
    if any(&["control_model."]) {
        return known("a ControlNet");
    }
    if any(&["cond_stage_model.model."]) {
        return known(
            "Stable Diffusion 2 in a single file (with OpenCLIP's text encoder); \
             its 2-base in diffusers layout can be read",
        );
    }
    if any(&[UNET]) {
        let input = file.shape(&format!("{UNET}input_blocks.0.0.weight"));
        if let Some(what) = input.and_then(|s| s.get(1)).and_then(|&c| extra_inputs(c)) {
            return known(what);
        }
        let missing = [(VAE, "VAE"), (TEXT, "text encoder")];
        return missing
            .into_iter()
            .find(|(prefix, _)| !any(&[prefix]))
            .map(|(prefix, part)| {
                format!("a U-Net without its {part} (no tensor starts with `{prefix}`)")
            });
    }
    let lora = |name: &str| {
        [
            ".lora_up.",
            ".lora_down.",
            ".lora_A.",
            ".lora_B.",
            ".lora.",
            "lora_linear_layer",
        ]
        .iter()
        .any(|part| name.contains(part))
    };
    if file.names().any(lora) {
        return known("LoRA factors alone, without the model that they belong to");
    }
    if any(&[
        VAE,
        "encoder.down.",
        "decoder.up.",
        "encoder.down_blocks.",
        "decoder.up_blocks.",
    ]) {
        return known("a VAE alone");
    }
    if any(&[
        "down_blocks.",
        "up_blocks.",
        "mid_block.",
        "input_blocks.",
        "output_blocks.",
    ]) {
        return known("a U-Net alone");
    }
    if any(&["text_model.", TEXT]) {
        return known("a text encoder alone");
    }
    let some: Vec<String> = file.names().take(3).map(|n| format!("`{n}`")).collect();
    Some(format!("another model's tensors ({} …)", some.join(", ")))
}

/// What a U-Net with so many input channels is, other than the text-to-image model of 4.
pub fn extra_inputs(channels: usize) -> Option<&'static str> {
    match channels {
        9 => Some("an inpainting model (9 input channels)"),
        8 => Some("an InstructPix2Pix model (8 input channels)"),
        7 => Some("an upscaler (7 input channels)"),
        5 => Some("a depth-conditioned model (5 input channels)"),
        _ => None,
    }
}
