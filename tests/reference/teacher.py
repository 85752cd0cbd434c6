"""Tiny random Stable Diffusion v1 checkpoints saved by diffusers and transformers, and what those
libraries compute with them.

    OMP_NUM_THREADS=1 python tests/reference/teacher.py

writes tests/reference/teacher/{a,b}/ (model_index.json, unet/, vae/, text_encoder/, tokenizer/,
scheduler/), image.png and expected-{a,b}.safetensors. The versions used are in the metadata of the
expected files. The two checkpoints differ on purpose:

  a  four levels as SD v1.4 (the last without attention), one ResNet a block, f16, VAE attention under
     its first names (query, key, value, proj_attn), text encoder keys with `text_model.`, tokenizer
     as vocab.json + merges.txt, a PNDM scheduler file as SD v1.4 has
  b  three levels with attention in all, two ResNets a block, odd sides (12, 6, 3), a head count per
     level, linear projections around the transformers, bf16, today's names, tokenizer.json

Also null-text inversion in 2 steps of 3 updates (prompt-to-prompt's rule: Adam, lr 1e-2 (1 - i/100), guidance 7.5,
stop below 1e-5 + 2e-5 i), guided sampling by DDIM and PNDM from given noise, and the DAAM aggregate.

Word maps: tokens of a word averaged, then its occurrences; layers of a side averaged, sides 1/2 and
1/4 of the latent side resized bilinearly (half-pixel centres) to 32 and averaged.
"""

import json
import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import diffusers
import numpy as np
import regex
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, DDIMInverseScheduler, DDIMScheduler, PNDMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

torch.set_num_threads(1)
OUT = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "teacher")
CORPUS = (
    "a photo of a red circle above a blue square and a small green triangle on a textured ground "
    "the big yellow circle is left of the square a triangle below the circle a cat's red-haired friend "
    "two circles three squares and the red triangle a picture of the blue circle near a green square"
)
SHORT = "A red circle above a blue square, and a small Circle near the cat's triangle."
LONG = " ".join(
    f"{n} {c} {s} stands left of the big textured square and above the ground."
    for n, c, s in [
        ("One", "red", "circle"),
        ("Two", "blue", "triangle"),
        ("The", "green", "circle"),
        ("A", "yellow", "square"),
        ("Three", "small", "circle"),
    ]
)


def byte_alphabet():
    """The 256 printable stand-ins for bytes that CLIP's and GPT-2's vocabularies use, in vocabulary order."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in keep]
    return [chr(b) for b in keep] + [chr(256 + i) for i in range(len(rest))]


def make_vocabulary(merge_count):
    """Byte-pair merges over CORPUS, and a vocabulary in CLIP's order: bytes, bytes</w>, merges, specials."""
    words = Counter(tuple(w[:-1]) + (w[-1] + "</w>",) for w in re.findall(r"[a-z]+", CORPUS))
    merges = []
    while len(merges) < merge_count:
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        if not pairs:
            break
        best = max(sorted(pairs), key=pairs.get)
        merges.append(best)
        merged = Counter()
        for word, n in words.items():
            new, i = [], 0
            while i < len(word):
                if word[i : i + 2] == best:
                    new.append(word[i] + word[i + 1])
                    i += 2
                else:
                    new.append(word[i])
                    i += 1
            merged[tuple(new)] += n
        words = merged
    alphabet = byte_alphabet()
    names = alphabet + [c + "</w>" for c in alphabet] + [a + b for a, b in merges]
    names += ["<|startoftext|>", "<|endoftext|>"]
    return {name: i for i, name in enumerate(names)}, merges


def randomise(module, gain=1.0):
    """Moves every parameter off its default, norms and biases too, so that a tensor loaded into the wrong place shows."""
    for name, p in module.named_parameters():
        with torch.no_grad():
            if p.dim() == 1 and name.endswith("weight"):
                p.copy_(1 + 0.2 * torch.randn_like(p))
            elif p.dim() == 1:
                p.copy_(0.1 * torch.randn_like(p))
            elif "attn2.to_q" in name or "attn2.to_k" in name:
                p.mul_(2.5 * gain)  # maps far enough from uniform to be a test


def build(name, merge_count, unet, vae, text, dtype):
    torch.manual_seed(7 if name == "a" else 11)
    root = OUT / name
    shutil.rmtree(root, ignore_errors=True)
    vocab, merges = make_vocabulary(merge_count)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    tokenizer.save_pretrained(root / "tokenizer")
    if name == "a":  # the layout that SD v1.4 is published in
        os.remove(root / "tokenizer/tokenizer.json")
        (root / "tokenizer/vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
        lines = ["#version: 0.2"] + [" ".join(m) for m in merges]
        (root / "tokenizer/merges.txt").write_text("\n".join(lines) + "\n")

    text_model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocab),
            bos_token_id=vocab["<|startoftext|>"],
            eos_token_id=vocab["<|endoftext|>"],
            **text,
        )
    )
    with torch.no_grad():
        for p in text_model.parameters():  # its own initialisation is small: hardly any signal
            if p.dim() == 2:
                p.copy_(torch.randn_like(p) * p.shape[1] ** -0.5)
    unet_model = UNet2DConditionModel(**unet)
    vae_model = AutoencoderKL(**vae)
    for m in (text_model, unet_model, vae_model):
        randomise(m)
        m.to(dtype)
    text_model.save_pretrained(root / "text_encoder")
    unet_model.save_pretrained(root / "unet")
    vae_model.save_pretrained(root / "vae")
    scheduler = dict(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        set_alpha_to_one=False,
    )
    if name == "a":
        PNDMScheduler(skip_prk_steps=True, steps_offset=1, **scheduler).save_pretrained(root / "scheduler")
    else:
        DDIMScheduler(clip_sample=False, **scheduler).save_pretrained(root / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "PNDMScheduler" if name == "a" else "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (root / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")

    def rename(file, f):
        tensors = {f(k): v for k, v in load_file(root / file).items()}
        save_file(tensors, root / file, metadata={"format": "pt"})

    def bare(key):
        return key.removeprefix("text_model.")

    def first_names(key):
        if ".attentions." not in key:
            return key
        for new, old in [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")]:
            key = key.replace(new, old)
        return key

    prefix = "text_model." if name == "a" else ""
    rename("text_encoder/model.safetensors", lambda k: prefix + bare(k))
    if name == "a":
        rename("vae/diffusion_pytorch_model.safetensors", first_names)
    # What the libraries read back from the files, in f32 (renamed keys included).
    saved = [m.state_dict() for m in (text_model, unet_model, vae_model)]
    text_model = CLIPTextModel.from_pretrained(root / "text_encoder", dtype=torch.float32)
    unet_model = UNet2DConditionModel.from_pretrained(root / "unet", torch_dtype=torch.float32)
    vae_model = AutoencoderKL.from_pretrained(root / "vae", torch_dtype=torch.float32)
    for before, model in zip(saved, (text_model, unet_model, vae_model)):
        after = model.state_dict()
        assert all(torch.equal(after[k], v.float()) for k, v in before.items() if v.is_floating_point())
    return tokenizer, text_model.eval(), unet_model.eval(), vae_model.eval()


class Capture:
    """Attention processor of every attn2: sums the mean-over-heads probabilities and counts the calls."""

    def __init__(self, sums, name):
        self.sums, self.name = sums, name

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **kw):
        q = attn.head_to_batch_dim(attn.to_q(hidden_states))
        k = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        v = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
        p = attn.get_attention_scores(q, k)
        b = hidden_states.shape[0]
        mean = p.reshape(b, attn.heads, *p.shape[1:]).mean(1)[0].detach()
        self.sums[self.name] = self.sums.get(self.name, 0) + mean
        h = attn.batch_to_head_dim(torch.bmm(p, v))
        return attn.to_out[1](attn.to_out[0](h))


def capture(unet):
    sums = {}
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            module.set_processor(Capture(sums, name.removesuffix(".attn2")))
    return sums


def words_of(text):
    """(start, end) of every UAX #29 word with a letter or digit in it."""
    parts = regex.split(r"(?w)\b", text, flags=regex.V1 | regex.WORD)
    at, spans = 0, []
    for part in parts:
        if any(c.isalnum() for c in part):
            spans.append((at, at + len(part)))
        at += len(part)
    assert at == len(text)
    return spans


def chunks_of(tokenizer, text):
    """Sentences packed into chunks of at most 75 tokens, as (start, end) of the text."""
    count = lambda a, b: len(tokenizer(text[a:b]).input_ids) - 2
    ends = [m.end() for m in re.finditer(r"[.!?]+(\s+|$)", text)]
    if not ends or ends[-1] != len(text):
        ends.append(len(text))
    chunks, start, last = [], 0, 0
    for end in ends:
        if last > start and count(start, end) > 75:
            chunks.append((start, last))
            start = last
        last = end
    chunks.append((start, len(text)))
    for a, b in chunks:
        assert count(a, b) <= 75, count(a, b)
    return chunks


def word_maps(tokenizer, chunks, sums_of_chunk, steps, side):
    """`raw` [words, 32, 32] and the words in order of first occurrence."""
    occurrences = {}
    for text, sums in zip(chunks, sums_of_chunk):
        sides = []
        for target in (side // 2, side // 4):
            chosen = [
                m / steps
                for name, m in sums.items()
                if name.startswith(("down_blocks", "up_blocks")) and m.shape[0] == target * target
            ]
            assert chosen
            m = torch.stack(chosen).mean(0).T.reshape(1, 77, target, target)
            sides.append(F.interpolate(m, size=(32, 32), mode="bilinear", align_corners=False, antialias=False)[0])
        token_maps = torch.stack(sides).mean(0)
        offsets = tokenizer(text, return_offsets_mapping=True).offset_mapping[1:-1]
        for a, b in words_of(text):
            rows = [1 + i for i, (s, e) in enumerate(offsets) if s < b and e > a]
            occurrences.setdefault(text[a:b].lower(), []).append(token_maps[rows].mean(0))
    return list(occurrences), torch.stack([torch.stack(m).mean(0) for m in occurrences.values()])


def daam_maps(tokenizer, text, sums, steps, side):
    """`raw` [words, 32, 32] of What the DAAM: every layer bicubic to the latent side, clamped, all averaged."""
    merged = []
    for name, m in sums.items():
        grid = int(m.shape[0] ** 0.5)
        if name.startswith("mid_block") or grid * 8 == side:
            continue
        m = (m / steps).T.reshape(1, 77, grid, grid)
        merged.append(F.interpolate(m, size=(side, side), mode="bicubic", align_corners=False).clamp(min=0))
    assert merged
    m = torch.stack(merged).mean(0)
    token_maps = F.interpolate(m, size=(32, 32), mode="bilinear", align_corners=False, antialias=False)[0]
    offsets = tokenizer(text, return_offsets_mapping=True).offset_mapping[1:-1]
    occurrences = {}
    for a, b in words_of(text):
        rows = [1 + i for i, (s, e) in enumerate(offsets) if s < b and e > a]
        occurrences.setdefault(text[a:b].lower(), []).append(token_maps[rows].mean(0))
    return torch.stack([torch.stack(m).mean(0) for m in occurrences.values()])


def null_text(unet, bars, latents, cond, uncond, steps, updates, guidance=7.5):
    """Null-text inversion as prompt-to-prompt's notebook does it: pivots, embeddings, losses, the reconstruction."""
    stride = 1000 // steps

    def move(z, eps, before, after):
        x0 = (z - (1 - before).sqrt() * eps) / before.sqrt()
        return (after.sqrt() * x0 + (1 - after).sqrt() * eps).float()

    pivots = [latents]
    for i in range(steps):
        with torch.no_grad():
            eps = unet(pivots[-1], i * stride, encoder_hidden_states=cond).sample
        pivots.append(move(pivots[-1], eps, bars[max((i - 1) * stride, 0)], bars[i * stride]))
    z, embeddings, losses = pivots[-1], [], []
    for i in range(steps):
        t = (steps - 1 - i) * stride
        uncond = uncond.clone().detach().requires_grad_(True)
        optimizer = torch.optim.Adam([uncond], lr=1e-2 * (1 - i / 100))
        target = pivots[steps - 1 - i]
        with torch.no_grad():
            eps_cond = unet(z, t, encoder_hidden_states=cond).sample
        for _ in range(updates):
            eps_uncond = unet(z, t, encoder_hidden_states=uncond).sample
            eps = eps_uncond + guidance * (eps_cond - eps_uncond)
            loss = F.mse_loss(move(z, eps, bars[t], bars[max(t - stride, 0)]), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if loss.item() < 1e-5 + i * 2e-5:
                break
        losses.append(loss.item())
        embeddings.append(uncond.detach())
        with torch.no_grad():
            eps_uncond = unet(z, t, encoder_hidden_states=uncond).sample
        z = move(z, eps_uncond + guidance * (eps_cond - eps_uncond), bars[t], bars[max(t - stride, 0)])
    return pivots, torch.cat(embeddings), torch.tensor(losses), z


def paint(scheduler, unet, noise, cond, uncond, steps, guidance=7.5):
    scheduler.set_timesteps(steps)
    z = noise
    for t in scheduler.timesteps:
        with torch.no_grad():
            a = unet(z, t, encoder_hidden_states=uncond).sample
            b = unet(z, t, encoder_hidden_states=cond).sample
        z = scheduler.step(a + guidance * (b - a), t, z).prev_sample
    return z


def min_max(raw):
    low, high = raw.amin((1, 2), keepdim=True), raw.amax((1, 2), keepdim=True)
    return (raw - low) / (high - low + 1e-6)


def expect(name, tokenizer, text_model, unet, vae, step_counts):
    sums = capture(unet)
    out, meta = {}, {}
    side = unet.config.sample_size
    pixels = side * 2 ** (len(vae.config.block_out_channels) - 1)
    image = Image.open(OUT / "image.png").convert("RGB")
    s = min(image.size)
    left, top = (image.width - s) // 2, (image.height - s) // 2
    image = image.crop((left, top, left + s, top + s)).resize((pixels, pixels), Image.Resampling.LANCZOS)
    x = torch.from_numpy(np.asarray(image).copy()).float().permute(2, 0, 1)[None] / 127.5 - 1
    x.requires_grad_(True)
    out["pixels"] = x.detach()
    mean = vae.encode(x).latent_dist.mean
    latents = mean * vae.config.scaling_factor
    weight = torch.randn_like(latents)
    out["latents"], out["latents.weight"] = latents.detach(), weight
    out["pixels.grad"] = torch.autograd.grad((latents * weight).sum(), x)[0]
    latents = latents.detach().requires_grad_(True)
    decoded = vae.decode(latents / vae.config.scaling_factor).sample
    weight = torch.randn_like(decoded)
    out["decoded"], out["decoded.weight"] = decoded.detach(), weight
    out["decoded.grad"] = torch.autograd.grad((decoded * weight).sum(), latents)[0]
    latents = latents.detach()

    scheduler = DDIMInverseScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
    )
    bars = scheduler.alphas_cumprod.double()
    out["alphas_cumprod"] = scheduler.alphas_cumprod
    meta["texts"] = json.dumps([SHORT, LONG])
    for which, text in (("short", SHORT), ("long", LONG)):
        chunks = [text[a:b].strip() for a, b in chunks_of(tokenizer, text)]
        meta[f"{which}.chunks"] = json.dumps(chunks)
        assert (which == "long") == (len(chunks) > 1), (which, len(chunks))
        ids = torch.tensor([tokenizer(c, padding="max_length", max_length=77).input_ids for c in chunks])
        assert ids.shape == (len(chunks), 77)
        with torch.no_grad():
            states = text_model(ids).last_hidden_state
        out[f"{which}.ids"], out[f"{which}.text"] = ids.int(), states
        for steps in step_counts if which == "short" else step_counts[:1]:
            per_chunk, finals, first = [], [], []
            stride = 1000 // steps
            scheduler.set_timesteps(steps)
            for c in range(len(chunks)):
                sums.clear()
                z = latents
                for i in range(steps):
                    t = i * stride
                    with torch.no_grad():
                        eps = unet(z, t, encoder_hidden_states=states[c : c + 1]).sample
                    if i == 0:
                        first.append(eps)
                    before, after = bars[max(t - stride, 0)], bars[t]
                    x0 = (z - (1 - before).sqrt() * eps) / before.sqrt()
                    new = (after.sqrt() * x0 + (1 - after).sqrt() * eps).float()
                    assert torch.allclose(new, scheduler.step(eps, t, z).prev_sample, rtol=1e-4, atol=1e-4)
                    z = new
                finals.append(z)
                per_chunk.append(dict(sums))
            raw_words, raw = word_maps(tokenizer, chunks, per_chunk, steps, side)
            key = f"{which}.{steps}"
            meta[f"{which}.words"] = json.dumps(raw_words)
            out[f"{which}.eps0"] = torch.cat(first)
            out[f"{key}.inverted"] = torch.cat(finals)
            out[f"{key}.raw"] = raw
            if which == "short":
                out[f"{key}.maps"] = min_max(raw)
            if which == "short":
                for layer, m in per_chunk[0].items():
                    if m.shape[0] <= (side // 2) ** 2 and steps == step_counts[0]:
                        out[f"{key}.layer.{layer}"] = m / steps
    # `noised` mode at two timesteps with a given noise.
    sums.clear()
    states = out["short.text"]
    noise = torch.randn_like(latents)
    out["noise"] = noise
    for t in (1, 300):
        z = (bars[t].sqrt() * latents + (1 - bars[t]).sqrt() * noise).float()
        with torch.no_grad():
            eps = unet(z, t, encoder_hidden_states=states).sample
        out[f"noised.eps{t}"] = eps
    _, out["noised.raw"] = word_maps(tokenizer, [SHORT], [dict(sums)], 2, side)
    out["noised.daam"] = daam_maps(tokenizer, SHORT, dict(sums), 2, side)
    # Null-text inversion; its maps are the conditional branch's on the way down.
    empty = tokenizer("", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        uncond = text_model(empty).last_hidden_state
    states = out["short.text"]
    pivots, embeddings, losses, reached = null_text(unet, bars, latents, states, uncond, steps=2, updates=3)
    out["null.embeddings"], out["null.losses"], out["null.latents"] = embeddings, losses, reached
    sums.clear()
    z = pivots[-1]
    for i, t in enumerate((500, 0)):
        with torch.no_grad():
            b = unet(z, t, encoder_hidden_states=states).sample
            mine = dict(sums)
            a = unet(z, t, encoder_hidden_states=embeddings[i : i + 1]).sample
            sums.clear()
            sums.update(mine)
        eps, before, after = a + 7.5 * (b - a), bars[t], bars[max(t - 500, 0)]
        z = (after.sqrt() * (z - (1 - before).sqrt() * eps) / before.sqrt() + (1 - after).sqrt() * eps).float()
    assert torch.allclose(z, reached, rtol=1e-4, atol=1e-4)
    _, out["null.raw"] = word_maps(tokenizer, [SHORT], [dict(sums)], 2, side)
    # Painting, with the scheduler's own offset of timesteps.
    options = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False)
    options["steps_offset"] = 1 if name == "a" else 0
    ddim = DDIMScheduler(clip_sample=False, **options)
    pndm = PNDMScheduler(skip_prk_steps=True, **options)
    out["paint.ddim"] = paint(ddim, unet, noise, states, uncond, 4)
    out["paint.pndm"] = paint(pndm, unet, noise, states, uncond, 6)
    # Gradients through the whole U-Net and text encoder; the optimisation above left some.
    unet.zero_grad()
    ids = out["short.ids"].long()
    states = text_model(ids).last_hidden_state
    states.retain_grad()
    z = latents.clone().requires_grad_(True)
    eps = unet(z, 250, encoder_hidden_states=states).sample
    weight = torch.randn_like(eps)
    out["eps.weight"] = weight
    (eps * weight).sum().backward()
    out["grad.text"], out["grad.latents"] = states.grad, z.grad
    for key in ("conv_in.weight", "time_embedding.linear_1.weight", "mid_block.resnets.0.conv1.weight"):
        out[f"grad.unet.{key}"] = unet.get_parameter(key).grad
    for key in ("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",):
        out[f"grad.unet.{key}"] = unet.get_parameter(key).grad
    token = [k for k, _ in text_model.named_parameters() if "token_embedding" in k][0]
    out["grad.text_encoder.token_embedding"] = text_model.get_parameter(token).grad
    meta["versions"] = json.dumps(
        {"torch": torch.__version__, "diffusers": diffusers.__version__, "transformers": transformers.__version__}
    )
    out = {k: v.contiguous() for k, v in out.items()}
    save_file(out, OUT / f"expected-{name}.safetensors", metadata=meta)
    for k, v in out.items():
        assert torch.isfinite(v.float()).all(), k
        print(name, k, tuple(v.shape), f"{v.float().std():.4g}")
    print({k: v for k, v in meta.items() if "words" in k or "chunks" in k})


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(3)
    # Smooth and not square, so that cropping and resampling are both seen.
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    coarse.resize((75, 61), Image.Resampling.BICUBIC).save(OUT / "image.png")
    a = build(
        "a",
        120,
        unet=dict(
            sample_size=16,
            block_out_channels=(16, 16, 32, 32),
            layers_per_block=1,
            attention_head_dim=2,
            norm_num_groups=8,
            cross_attention_dim=32,
        ),
        vae=dict(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            latent_channels=4,
            sample_size=32,
        ),
        text=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_act="quick_gelu",
        ),
        dtype=torch.float16,
    )
    expect("a", *a, step_counts=(4, 10))
    b = build(
        "b",
        60,
        unet=dict(
            sample_size=12,
            block_out_channels=(8, 16, 24),
            down_block_types=("CrossAttnDownBlock2D",) * 3,
            up_block_types=("CrossAttnUpBlock2D",) * 3,
            layers_per_block=2,
            attention_head_dim=(1, 2, 3),
            norm_num_groups=4,
            cross_attention_dim=24,
            use_linear_projection=True,
        ),
        vae=dict(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 16),
            layers_per_block=2,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=48,
            scaling_factor=0.3,
        ),
        text=dict(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=3,
            hidden_act="gelu",
        ),
        dtype=torch.bfloat16,
    )
    expect("b", *b, step_counts=(4,))


main()
