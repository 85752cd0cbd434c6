"""LoRA adapters of several kinds on the tiny SmolVLM and Mllama checkpoints, as peft saves, applies and merges them.

Versions: torch 2.15.0, transformers 5.23.0, peft 0.21.2.
Run:      python tests/reference/mllama.py && python tests/reference/smolvlm.py && python tests/reference/merge.py
          (reads tests/reference/{smolvlm,mllama}/, writes tests/reference/merge/)
Check:    python tests/reference/merge.py check BASE ADAPTER MERGED
          (loads MERGED, written by `lavender-wgpu merge`, with transformers and compares every weight with peft's
          `merge_and_unload` of ADAPTER on BASE, to 1e-6 relative in f32)

Adapters, all of random factors (peft's zeros for B would merge to nothing):
  smolvlm-rslora    SmolVLM `a`; rsLoRA; r 4, alpha 8; q_proj, v_proj and o_proj by suffix
  smolvlm-patterns  SmolVLM `a`; target modules by a regular expression (the text model's q_proj and down_proj); own
                    rank of one layer, own alpha of another
  smolvlm-dora      SmolVLM `a`; DoRA with random magnitudes; r 4, alpha 8; q_proj (the vision tower's too, with biases)
  mllama-rslora     Mllama `a`; rsLoRA, r 2, alpha 3; q_proj and v_proj (the vision tower's too) and the projector
  mllama-old        as saved by a class of before transformers 5: other key dialect (`language_model.model.…`)

<adapter>/adapter_config.json, adapter_model.safetensors    as peft saves them
<adapter>/expected.safetensors    `logits` of the last six positions of a prompt, with the adapter; `merged.<name>` a
                                  few weights after merge_and_unload, under the base file's name
<adapter>/expected.json           the base, the prompt's case, the modules that were adapted
"""

import json
import re
import shutil
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

HERE = Path(__file__).resolve().parent
OUT = HERE / "merge"
torch.set_num_threads(1)

ADAPTERS = {
    "smolvlm-rslora": ("smolvlm", dict(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj", "o_proj"])),
    "smolvlm-patterns": ("smolvlm", dict(
        r=4, lora_alpha=8, target_modules=r".*text_model\.layers.*\.(q_proj|down_proj)",
        rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"layers.2.mlp.down_proj": 5})),
    "smolvlm-dora": ("smolvlm", dict(r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj"])),
    "mllama-rslora": ("mllama", dict(
        r=2, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "v_proj", "multi_modal_projector"])),
}


def inputs_of(family):
    """The text-only case of the family's fixture: its token ids (pictures are compared elsewhere)."""
    cases = json.loads((HERE / family / "a" / "expected.json").read_text())["cases"]
    case = next(c for c in cases if c["name"] == "text")
    return torch.tensor([case["prompt_tokens"]])


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def make(name):
    family, settings = ADAPTERS[name]
    base = HERE / family / "a"
    torch.manual_seed(sum(map(ord, name)))
    model = get_peft_model(load(base), LoraConfig(lora_dropout=0.0, **settings)).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_B" in key:
                p.copy_(0.2 * torch.randn_like(p))
            if "magnitude" in key:
                p.copy_(p * (0.5 + torch.rand_like(p)))
        ids = inputs_of(family)
        extra = {"cross_attention_mask": None} if family == "mllama" else {}
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits[0]
    model.save_pretrained(OUT / name)
    (OUT / name / "README.md").unlink(missing_ok=True)
    config = json.loads((OUT / name / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = f"tests/reference/{family}/a"
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    (OUT / name / "adapter_config.json").write_text(json.dumps(config, indent=1))
    modules = sorted({re.sub(r"^base_model\.model\.|\.lora_([AB]\.weight|magnitude_vector)$", "", k)
                      for k in load_file(OUT / name / "adapter_model.safetensors")})
    merged = model.merge_and_unload().state_dict()
    kept = [modules[0], modules[len(modules) // 2], modules[-1]]
    tensors = {f"merged.{m}.weight": merged[f"{m}.weight"].contiguous() for m in kept}
    tensors["logits"] = logits[-6:].contiguous()
    save_file(tensors, OUT / name / "expected.safetensors")
    (OUT / name / "expected.json").write_text(json.dumps({"base": f"{family}/a", "case": "text", "modules": modules}, indent=1))
    print(name, len(modules), "modules, logits up to", float(logits.abs().max()))


def old_dialect():
    """The same adapter under the names that transformers 4 gave Mllama's modules."""
    source, folder = OUT / "mllama-rslora", OUT / "mllama-old"
    shutil.copytree(source, folder, dirs_exist_ok=True)
    old = {}
    for key, value in load_file(source / "adapter_model.safetensors").items():
        key = key.replace("base_model.model.model.language_model.", "base_model.model.language_model.model.")
        old[re.sub(r"^base_model\.model\.model\.", "base_model.model.", key)] = value
    save_file(old, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def check(base, adapter, merged):
    model = PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    want, got = model.state_dict(), load(merged).state_dict()
    assert want.keys() == got.keys(), want.keys() ^ got.keys()
    worst = max((float((got[k] - v).abs().max() / v.abs().max().clamp_min(1e-30)), k) for k, v in want.items())
    before = load(base).state_dict()
    changed = sum(not torch.equal(before[k], v) for k, v in got.items())
    print(f"{len(want)} weights, {changed} changed; largest relative difference {worst[0]:.2e} ({worst[1]})")
    assert worst[0] < 1e-6


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    for name in ADAPTERS:
        make(name)
    old_dialect()
    print(sum(f.stat().st_size for f in OUT.rglob("*") if f.is_file()), "bytes")


if __name__ == "__main__":
    check(*sys.argv[2:]) if sys.argv[1:2] == ["check"] else main()
