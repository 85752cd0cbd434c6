"""A random checkpoint of Stable Diffusion v1.4's true shape, and what diffusers and transformers compute with it.

    OMP_NUM_THREADS=1 python tests/reference/full_size.py OUTDIR

writes OUTDIR/sd (diffusers layout, f16 files), OUTDIR/single.safetensors (the same weights as a single file under the
original names) and OUTDIR/expected.safetensors: text states, VAE mean, the decoded mean, noise prediction and the mean
map of every cross-attention, in f32 from the same f16 weights. 4.6 GB of files, some minutes.

    LAVENDER_FULL_SIZE=OUTDIR cargo test --release --test models full_size -- --ignored --nocapture
"""

import gc
import json
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from layouts import LDM_EXTRAS, V1_TEXT, V1_UNET, V1_VAE, clip_vocabulary, ldm_text, ldm_unet, ldm_vae

OUT = Path(sys.argv[1])
TEXT = "a photo of a red circle above two blue squares, and a cat's reflection in the window"


class Capture:
    """Attention processor of every attn2: keeps the mean-over-heads probabilities."""

    def __init__(self, maps, name):
        self.maps, self.name = maps, name

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **kw):
        q = attn.head_to_batch_dim(attn.to_q(hidden_states))
        k = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        v = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
        p = attn.get_attention_scores(q, k)
        self.maps[self.name] = p.mean(0)
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(torch.bmm(p, v))))


def randomise(module):
    """Norms and biases off their defaults, attention to the text far from uniform; then through f16, as the file."""
    for name, p in module.named_parameters():
        with torch.no_grad():
            if p.dim() == 1 and name.endswith("weight"):
                p.copy_(1 + 0.1 * torch.randn_like(p))
            elif p.dim() == 1:
                p.copy_(0.05 * torch.randn_like(p))
            elif "attn2.to_q" in name or "attn2.to_k" in name:
                p.mul_(2.5)
            p.copy_(p.half().float())


def main():
    torch.set_num_threads(1)
    torch.manual_seed(14)
    root = OUT / "sd"
    root.mkdir(parents=True, exist_ok=True)
    vocab, merges = clip_vocabulary()
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    tokenizer.save_pretrained(root / "tokenizer")
    PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
    ).save_pretrained(root / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (root / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    out, single = {}, dict(LDM_EXTRAS)

    def save(model, part, names):
        """Saves f16 files in both layouts."""
        model.half().save_pretrained(root / part)
        file = next((root / part).glob("*.safetensors"))
        single.update(names(load_file(file)))
        model.float()

    with torch.no_grad():
        text = CLIPTextModel(CLIPTextConfig(**V1_TEXT)).eval()
        for p in text.parameters():  # its own initialisation is small: hardly any signal
            if p.dim() == 2:
                p.copy_(torch.randn_like(p) * p.shape[1] ** -0.5)
        randomise(text)
        ids = torch.tensor([tokenizer(TEXT, padding="max_length", max_length=77).input_ids])
        out["ids"], out["text"] = ids.int(), text(ids).last_hidden_state
        save(text, "text_encoder", ldm_text)
        del text
        vae = AutoencoderKL(**V1_VAE).eval()
        randomise(vae)
        coarse = torch.rand(1, 3, 12, 12)
        pixels = torch.nn.functional.interpolate(coarse, size=512, mode="bicubic").clamp(0, 1) * 2 - 1
        mean = vae.encode(pixels).latent_dist.mean
        out["pixels"], out["mean"] = pixels, mean
        # A quarter of the latents: 256 pixels.
        out["decoded"] = vae.decode(mean[:, :, :32, :32]).sample
        save(vae, "vae", ldm_vae)
        del vae
        gc.collect()
        unet = UNet2DConditionModel(**V1_UNET).eval()
        randomise(unet)
        maps = {}
        for name, module in unet.named_modules():
            if name.endswith("attn2"):
                module.set_processor(Capture(maps, name.removesuffix(".attn2")))
        latents = torch.randn(1, 4, 64, 64)
        out["latents"] = latents
        out["noise"] = unet(latents, 261, encoder_hidden_states=out["text"]).sample
        assert len(maps) == 16
        out |= {f"map.{name}": m for name, m in maps.items()}
        save(unet, "unet", ldm_unet)
        print(sum(p.numel() for p in unet.parameters()), "weights in the U-Net")
    save_file(single, OUT / "single.safetensors", metadata={"format": "pt"})
    out = {k: v.contiguous() for k, v in out.items()}
    for k, v in out.items():
        print(k, tuple(v.shape), f"{v.float().std():.4g}")
    save_file(out, OUT / "expected.safetensors", metadata={"text": TEXT, "torch": torch.__version__})


if __name__ == "__main__":
    main()
