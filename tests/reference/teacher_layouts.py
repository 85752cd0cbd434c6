"""What diffusers makes of other layouts of the teacher's checkpoints, and CLIP's tokenizer on awkward texts.

    OMP_NUM_THREADS=1 python tests/reference/teacher_layouts.py

writes tests/reference/teacher_layouts/names.json: for the checkpoints of teacher.py (`a`, `b`) and for Stable Diffusion
v1.4's configuration (`v1`) the name of every tensor in the original single-file layout, with its shape there and the
component and name it has in diffusers. diffusers' own conversion of a single file, applied to these names, gives back
its state dict; that is asserted here. tiled.safetensors: the VAE of `a` with diffusers' tiling. tokens.json: texts and
the ids that transformers gives them with CLIP's published vocabulary.
"""

import json
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from layouts import V1_TEXT, V1_UNET, V1_VAE, clip_vocabulary, ldm_text, ldm_unet, ldm_vae
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

HERE = Path(__file__).parent
OUT = HERE / "teacher_layouts"
TEXTS = [
    "a photo of an astronaut riding a horse on mars",
    "",
    "   leading,  double   and trailing white space \n\t ",
    "It's the cat's, they'll say; we'd've gone & I'm here!!!",
    "3.14159 x 2,000 = 6283.18 (approx.) #1 50% $9.99",
    "naïve café Ünïcödé Ångström résumé STRASSE straße",
    "Cafe\u0301 with a combining accent, ﬁ ligature, ½ and №5",
    "日本語のテキスト と 한국어 и русский текст",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 and ❤️ hearts",
    "<|startoftext|> special <|endoftext|> tokens in the text <|x|>",
    "http://example.com/a_b-c?d=e&f=%20g user@example.com snake_case CamelCase",
    "supercalifragilisticexpialidocious antidisestablishmentarianism zzzzqqqqxxxx",
    "“curly quotes” – dashes — and… ellipses¿? ¡!",
    "zero\u200bwidth\u00a0nbsp\u3000ideographic space",
]


def names(text, vae, unet):
    """{original name: [component, diffusers name, original shape]}, checked by diffusers' own conversion."""
    out = {}
    for part, state, to_ldm, back in [
        ("text_encoder", text.state_dict(), ldm_text, convert_ldm_clip_checkpoint),
        ("vae", vae.state_dict(), ldm_vae, lambda c: convert_ldm_vae_checkpoint(c, vae.config)),
        ("unet", unet.state_dict(), ldm_unet, lambda c: convert_ldm_unet_checkpoint(c, unet.config)),
    ]:
        state = {k: v for k, v in state.items() if v.is_floating_point()}
        single = to_ldm(state)
        assert len(single) == len(state)
        restored = {k.removeprefix("text_model."): v for k, v in back(dict(single)).items()}
        bare = {k.removeprefix("text_model."): v for k, v in state.items()}
        assert restored.keys() == bare.keys(), sorted(restored.keys() ^ bare.keys())[:9]
        for k, v in bare.items():
            assert restored[k].shape == v.shape and (v.is_meta or torch.equal(restored[k], v)), k
        for (old, value), new in zip(single.items(), state):
            out[old] = [part, new.removeprefix("text_model."), list(value.shape)]
    return out


def main():
    OUT.mkdir(exist_ok=True)
    table = {"versions": {"diffusers": diffusers.__version__, "transformers": transformers.__version__}}
    vaes = {}
    for name in "ab":
        root = HERE / "teacher" / name
        vaes[name] = AutoencoderKL.from_pretrained(root / "vae", torch_dtype=torch.float32).eval()
        table[name] = names(
            CLIPTextModel.from_pretrained(root / "text_encoder", dtype=torch.float32),
            vaes[name],
            UNet2DConditionModel.from_pretrained(root / "unet", torch_dtype=torch.float32),
        )
    with torch.device("meta"):
        table["v1"] = names(
            CLIPTextModel(CLIPTextConfig(**V1_TEXT)), AutoencoderKL(**V1_VAE), UNet2DConditionModel(**V1_UNET)
        )
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in table.items())
    (OUT / "names.json").write_text("{\n" + lines + "\n}\n")

    torch.manual_seed(5)
    out = {}
    vae = vaes["a"]
    with torch.no_grad():
        # Neither side is a multiple of the tiles' step: the last row and column are cut.
        out["pixels"] = torch.nn.functional.interpolate(torch.rand(2, 3, 5, 5), size=(56, 48), mode="bilinear") * 2 - 1
        out["latents"] = torch.randn(2, 4, 28, 24)
        vae.enable_tiling()
        vae.tile_latent_min_size, vae.tile_sample_min_size = 12, 24
        out["mean"] = vae.encode(out["pixels"]).latent_dist.mean
        out["decoded"] = vae.decode(out["latents"]).sample
        vae.disable_tiling()
        plain = vae.decode(out["latents"]).sample
        print("tiling changes the decoded image by", (plain - out["decoded"]).abs().max().item())
    save_file({k: v.contiguous() for k, v in out.items()}, OUT / "tiled.safetensors")

    vocab, merges = clip_vocabulary()
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    ids = [tokenizer(text, padding="max_length", max_length=77, truncation=True).input_ids for text in TEXTS]
    (OUT / "tokens.json").write_text(json.dumps({"texts": TEXTS, "ids": ids}) + "\n")
    print([len(tokenizer(t).input_ids) for t in TEXTS])


main()
