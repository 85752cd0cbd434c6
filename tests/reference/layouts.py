"""Stable Diffusion v1's configurations, CLIP's vocabulary, and the names of the original single-file layout."""

import gzip
from pathlib import Path

import torch

V1_UNET = dict(
    sample_size=64,
    cross_attention_dim=768,
    attention_head_dim=8,
    block_out_channels=(320, 640, 1280, 1280),
    layers_per_block=2,
)
V1_VAE = dict(
    sample_size=512,
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    latent_channels=4,
)
V1_TEXT = dict(
    vocab_size=49408,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    hidden_act="quick_gelu",
    bos_token_id=49406,
    eos_token_id=49407,
)
# What published single files hold beside the weights.
LDM_EXTRAS = {
    "alphas_cumprod": torch.ones(1000),
    "betas": torch.zeros(1000),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    "model_ema.decay": torch.ones(()),
    "model_ema.diffusion_modeltime_embed0weight": torch.ones(2, 2),
}


def clip_vocabulary():
    """CLIP's vocabulary and merges, in CLIP's order: bytes, bytes</w>, the first 48,894 merges, specials."""
    path = Path(__file__).parents[2] / "models/clip-tokenizer/bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.open(path).read().decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(b) for b in keep] + [chr(256 + i) for i in range(256 - len(keep))]
    names = alphabet + [c + "</w>" for c in alphabet] + ["".join(m) for m in merges]
    names += ["<|startoftext|>", "<|endoftext|>"]
    assert len(names) == 49408
    return {name: i for i, name in enumerate(names)}, merges


def replace(name, *pairs):
    for new, old in pairs:
        name = name.replace(new, old)
    return name


def ldm_text(state):
    """The text encoder's tensors under `cond_stage_model.transformer.text_model.`."""
    return {f"cond_stage_model.transformer.text_model.{k.removeprefix('text_model.')}": v for k, v in state.items()}


def ldm_vae(state):
    """AutoencoderKL's tensors under `first_stage_model.`; the attention's matrices become 1×1 convolutions."""
    levels = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("decoder.up_blocks."))
    out = {}
    for k, v in state.items():
        name = k
        for i in range(levels):
            name = replace(
                name, (f"down_blocks.{i}.", f"down.{i}."), (f"decoder.up_blocks.{i}.", f"decoder.UP.{levels - 1 - i}.")
            )
        name = name.replace(".UP.", ".up.")
        if "mid_block.attentions" in name:
            name = replace(
                name,
                ("mid_block.attentions.0", "mid.attn_1"),
                ("group_norm", "norm"),
                *((f".{a}.", f".{b}.") for a, b in [("to_q", "q"), ("to_k", "k"), ("to_v", "v")]),
                *((f".{a}.", f".{b}.") for a, b in [("query", "q"), ("key", "k"), ("value", "v")]),
                ("to_out.0", "proj_out"),
                ("proj_attn", "proj_out"),
            )
            v = v[:, :, None, None] if v.dim() == 2 else v
        name = replace(
            name,
            ("mid_block.resnets.0", "mid.block_1"),
            ("mid_block.resnets.1", "mid.block_2"),
            (".resnets.", ".block."),
            ("downsamplers.0", "downsample"),
            ("upsamplers.0", "upsample"),
            ("conv_norm_out", "norm_out"),
            ("conv_shortcut", "nin_shortcut"),
        )
        out[f"first_stage_model.{name}"] = v.contiguous()
    return out


def ldm_unet(state):
    """UNet2DConditionModel's tensors under `model.diffusion_model.`."""
    count = lambda block, kind: len({k.split(".")[3] for k in state if k.startswith(f"{block}.{kind}.")})
    levels = len({k.split(".")[1] for k in state if k.startswith("down_blocks.")})
    places = {}
    at = 1
    for i in range(levels):
        for j in range(count(f"down_blocks.{i}", "resnets")):
            places[f"down_blocks.{i}.resnets.{j}."] = f"input_blocks.{at}.0."
            places[f"down_blocks.{i}.attentions.{j}."] = f"input_blocks.{at}.1."
            at += 1
        if i + 1 < levels:
            places[f"down_blocks.{i}.downsamplers.0.conv."] = f"input_blocks.{at}.0.op."
            at += 1
    at = 0
    for i in range(levels):
        for j in range(count(f"up_blocks.{i}", "resnets")):
            places[f"up_blocks.{i}.resnets.{j}."] = f"output_blocks.{at}.0."
            places[f"up_blocks.{i}.attentions.{j}."] = f"output_blocks.{at}.1."
            at += 1
        attention = any(k.startswith(f"up_blocks.{i}.attentions.") for k in state)
        places[f"up_blocks.{i}.upsamplers.0.conv."] = f"output_blocks.{at - 1}.{1 + attention}.conv."
    places |= {
        "mid_block.resnets.0.": "middle_block.0.",
        "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.1.": "middle_block.2.",
        "time_embedding.linear_1.": "time_embed.0.",
        "time_embedding.linear_2.": "time_embed.2.",
        "conv_in.": "input_blocks.0.0.",
        "conv_norm_out.": "out.0.",
        "conv_out.": "out.2.",
    }
    out = {}
    for k, v in state.items():
        new, old = next((n, o) for n, o in places.items() if k.startswith(n))
        rest = k.removeprefix(new)
        if ".resnets." in k:
            rest = replace(
                rest,
                ("norm1", "in_layers.0"),
                ("conv1", "in_layers.2"),
                ("norm2", "out_layers.0"),
                ("conv2", "out_layers.3"),
                ("time_emb_proj", "emb_layers.1"),
                ("conv_shortcut", "skip_connection"),
            )
        out[f"model.diffusion_model.{old}{rest}"] = v
    return out
