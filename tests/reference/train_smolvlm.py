"""Ten training steps of the default recipe on the tiny SmolVLM checkpoint `a`, by PyTorch and peft; and of a full
fine-tune.

Versions: torch 2.15.0, transformers 5.23.0, peft 0.21.2.
Run:      python tests/reference/smolvlm.py && python tests/reference/train_smolvlm.py
          (reads tests/reference/smolvlm/ and mllama/images/, writes tests/reference/train_smolvlm/ and train_smolvlm_full/)

Recipe: LoRA r 4, alpha 8, dropout 0 on q_proj and v_proj by suffix (the vision tower's too); aggregation
`learned` over all text layers, columns of the global tile; aligner `conv`, hidden 32; per-word min-max, MSE;
lambda 10; AdamW lr 1e-3, betas (0.9, 0.999), eps 1e-8, weight decay 0.01, gradient norm clipped at 1; batch 2,
samples in file order, no shuffle. The text is the conversation as the chat template renders it.

data.jsonl              a sample a line: id, image file, messages
targets.json            per sample: its target words, in the row order of `targets.safetensors`
targets.safetensors     `<id>` u8 [words, 32, 32], value / 255 is the target (random)
init/, final/           LoRA as peft saves it; `aligner.safetensors`
losses.json             recipe, and per step, before its update: loss, lm_loss, attn_loss, matched_words, grad_norm
                        (before clipping), and `spread`: the largest relative gap between this run and the same
                        one in float64

The full fine-tune trains every weight but those of FROZEN, at FULL_LR and without LoRA, on the same data; its
directory has init/aligner.safetensors, losses.json, and final.safetensors with the weights of KEPT and the aligner's.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import Idefics3Processor, PreTrainedTokenizerFast, SmolVLMForConditionalGeneration
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parent))
from mllama import messages, picture, resize, word_rows  # noqa: E402
from smolvlm import SHAPES, TEMPLATE, global_columns, word_maps  # noqa: E402
import train_mllama  # noqa: E402
from train_mllama import Aligner, min_max  # noqa: E402

train_mllama.MARGIN = 0.0  # its seeds are chosen to stay clear of ReLU6's kinks; these runs' are not

HERE = Path(__file__).resolve().parent
MODEL, OUT = HERE / "smolvlm" / "a", HERE / "train_smolvlm"
FULL = HERE / "train_smolvlm_full"
STEPS, BATCH, LAMBDA, LR, DECAY, CLIP, SEED = 10, 2, 10.0, 1e-3, 0.01, 1.0, 8
RANK, ALPHA = 4, 8
FULL_LR, FULL_HIDDEN = 3e-4, 8
FROZEN = ["model.connector.", "model.text_model.layers.0."]
KEPT = [
    "model.vision_model.embeddings.patch_embedding.weight", "model.vision_model.encoder.layers.0.self_attn.q_proj.weight",
    "model.vision_model.encoder.layers.0.layer_norm1.bias", "model.text_model.layers.0.self_attn.q_proj.weight",
    "model.text_model.layers.1.mlp.down_proj.weight", "model.text_model.layers.2.self_attn.k_proj.weight",
    "model.text_model.norm.weight",
]

SAMPLES = [
    ("s0", "wide", "Describe the picture.", "A green circle is left of the red circle."),
    ("s1", "rgba", "What is there?", "Two squares."),
    ("s2", "tall", "Is there a triangle?", "Yes, there is a small triangle, isn't there?"),
    ("s3", "tiny", "Describe it.", "one blue square"),
]
# Words with a target: part of the answer's, one ("sky") that no answer has.
TARGET_WORDS = {
    "s0": ["green", "circle", "left", "sky"], "s1": ["squares", "two"], "s2": ["triangle", "isn't", "small"], "s3": ["sky"],
}


def run(dtype, targets, write, full=False):
    torch.manual_seed(SEED)
    shape = SHAPES["a"]
    tok = PreTrainedTokenizerFast.from_pretrained(MODEL)
    image_processor = Idefics3ImageProcessorPil(
        size={"longest_edge": shape["longest"]}, max_image_size={"longest_edge": shape["tile"]},
        image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5], resample=1)
    processor = Idefics3Processor(image_processor, tok, image_seq_len=shape["tokens"], chat_template=TEMPLATE)
    model = SmolVLMForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager")
    heads = model.config.text_config.num_attention_heads
    if full:
        for key, p in model.named_parameters():
            p.requires_grad = not any(key.startswith(frozen) for frozen in FROZEN)
    else:
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for key, p in model.named_parameters():
            # Away from peft's zeros, or the first gradients of every A would be zero.
            if "lora_B" in key:
                p.copy_(0.1 * torch.randn_like(p))
    aligner = Aligner(heads, FULL_HIDDEN if full else 32)
    if write and full:
        (FULL / "init").mkdir()
        save_file(dict(aligner.state_dict()), FULL / "init" / "aligner.safetensors")
    elif write:
        model.save_pretrained(OUT / "init")
        save_file(dict(aligner.state_dict()), OUT / "init" / "aligner.safetensors")
    model.to(dtype), aligner.to(dtype)
    trained = [p for p in model.parameters() if p.requires_grad] + list(aligner.parameters())
    optimizer = torch.optim.AdamW(trained, lr=FULL_LR if full else LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=DECAY)

    steps = []
    for step in range(STEPS):
        picked = [SAMPLES[(step * BATCH + i) % len(SAMPLES)] for i in range(BATCH)]
        chats = [processor.apply_chat_template(messages(1, q, a)) for _, _, q, a in picked]
        batch = processor(images=[[picture(image)] for _, image, _, _ in picked], text=chats, padding=True,
                          padding_side="right", add_special_tokens=False, return_tensors="pt")
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
        labels = torch.full_like(batch["input_ids"], -100)
        texts, starts = [], []
        for i, (_, _, _, answer) in enumerate(picked):
            ids = batch["input_ids"][i, : int(batch["attention_mask"][i].sum())]
            text = tok.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            start = text.rindex(answer)
            for t, (a, b) in enumerate(tok(text, return_offsets_mapping=True)["offset_mapping"]):
                # From the generation prompt's end to the <end_of_utterance> that begins where the answer ends.
                if b > text.rindex("Assistant:") + len("Assistant:") and a <= start + len(answer):
                    labels[i, t] = ids[t]
            texts.append(text), starts.append(start)
        out = model(**batch, output_attentions=True)
        lm_loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

        maps, wanted = [], []
        for i, (name, _, _, answer) in enumerate(picked):
            found = [(w, rows) for w, rows in word_rows(tok, texts[i], starts[i], starts[i] + len(answer))
                     if w in TARGET_WORDS[name]]
            if not found:
                continue
            columns = global_columns(batch["input_ids"][i].tolist(), tok, shape["tokens"])
            per_layer = [resize(word_maps(a[i], found, columns, 4)) for a in out.attentions]
            maps.append(torch.stack(per_layer).transpose(1, 2))  # [layers, words, heads, 32, 32]
            wanted += [targets[name][TARGET_WORDS[name].index(w)] for w, _ in found]
        maps = torch.cat(maps, 1)
        layers, words = maps.shape[:2]
        aligned = aligner(maps.flatten(0, 1)).reshape(layers, words, 32, 32).mean(0)
        wanted = torch.stack(wanted).to(dtype) / 255
        attn_loss = ((min_max(aligned) - wanted.flatten(1)) ** 2).mean(1).sum() / words
        loss = lm_loss + LAMBDA * attn_loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP)
        steps.append({"step": step, "loss": loss.item(), "lm_loss": lm_loss.item(), "attn_loss": attn_loss.item(),
                      "matched_words": words, "grad_norm": norm.item(), "tokens": int(batch["attention_mask"].sum())})
        optimizer.step()
    if write and full:
        weights = model.state_dict()
        final = {k: weights[k].contiguous() for k in KEPT} | {f"aligner.{k}": v for k, v in aligner.state_dict().items()}
        save_file(final, FULL / "final.safetensors")
    elif write:
        model.save_pretrained(OUT / "final")
        save_file(dict(aligner.state_dict()), OUT / "final" / "aligner.safetensors")
        for readme in OUT.rglob("README.md"):
            readme.unlink()
        for config in OUT.rglob("adapter_config.json"):  # no paths of the machine that wrote it
            fields = json.loads(config.read_text()) | {"base_model_name_or_path": "tests/reference/smolvlm/a"}
            config.write_text(json.dumps(fields, indent=1))
    named = {k: p.detach().double() for k, p in model.named_parameters() if p.requires_grad}
    named |= {f"aligner.{k}": p.detach().double() for k, p in aligner.named_parameters()}
    return steps, named


def spread_of(steps, exact, weights, reference):
    """The largest relative gaps between the float32 and the float64 run."""
    keys = ["loss", "lm_loss", "attn_loss", "grad_norm"]
    spread = {k: max(abs(a[k] - b[k]) / abs(b[k]) for a, b in zip(steps, exact)) for k in keys}
    gaps = {k: float((weights[k] - reference[k]).norm() / reference[k].norm().clamp(min=1e-12)) for k in weights}
    return spread | {"weights": dict(sorted(gaps.items(), key=lambda kv: -kv[1])[:6])}


def full(targets):
    shutil.rmtree(FULL, ignore_errors=True)
    FULL.mkdir()
    steps, weights = run(torch.float32, targets, True, full=True)
    exact, reference = run(torch.float64, targets, False, full=True)
    spread = spread_of(steps, exact, weights, reference)
    recipe = {"steps": STEPS, "batch": BATCH, "lambda": LAMBDA, "lr": FULL_LR, "weight_decay": DECAY, "grad_clip": CLIP,
              "frozen": FROZEN, "aggregate": "learned", "aligner": "conv", "hidden": FULL_HIDDEN}
    (FULL / "losses.json").write_text(json.dumps({"recipe": recipe, "steps": steps, "spread": spread}, indent=1))
    print(*steps, spread, sep="\n")


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    rng = np.random.default_rng(SEED)
    targets = {k: torch.from_numpy(rng.integers(0, 256, (len(v), 32, 32), dtype=np.uint8)) for k, v in TARGET_WORDS.items()}
    save_file(targets, OUT / "targets.safetensors")
    (OUT / "targets.json").write_text(json.dumps(TARGET_WORDS, indent=1))
    with open(OUT / "data.jsonl", "w") as f:
        for name, image, question, answer in SAMPLES:
            f.write(json.dumps({"id": name, "image": f"{image}.png", "messages": messages(1, question, answer)}) + "\n")
    steps, weights = run(torch.float32, targets, True)
    exact, reference = run(torch.float64, targets, False)
    spread = spread_of(steps, exact, weights, reference)
    recipe = {"steps": STEPS, "batch": BATCH, "lambda": LAMBDA, "lr": LR, "weight_decay": DECAY, "grad_clip": CLIP,
              "r": RANK, "alpha": ALPHA, "target_modules": ["q_proj", "v_proj"], "aggregate": "learned",
              "aligner": "conv", "hidden": 32}
    (OUT / "losses.json").write_text(json.dumps({"recipe": recipe, "steps": steps, "spread": spread}, indent=1))
    for s in steps:
        print(s)
    print(spread)
    full(targets)
    print(sum(f.stat().st_size for f in OUT.rglob("*") if f.is_file()), "bytes")


if __name__ == "__main__":
    main()
