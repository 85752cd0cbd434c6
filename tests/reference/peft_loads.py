"""Whether peft loads what `lavender-wgpu train` writes, and then computes what `lavender-wgpu` computes.

Versions: torch 2.15.0, transformers 5.23.0, peft 0.21.2.
Run:      python tests/reference/peft_loads.py [PROGRAM]      (writes nothing here; by default target/release/lavender-wgpu)

For each family and each kind of adapter a run of three steps at a learning rate that shows. `PeftModel.from_pretrained`
has to take its `lora/` without a word about missing or superfluous factors; the language loss of all samples with it, by
transformers, has to be the loss that a second run that starts from it (`init.lora`) reports for its first step, to 1e-4.
Kinds that only peft's configurations have (patterns of ranks) start from an adapter that peft saved.
"""

import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import conversations  # noqa: E402
import mllama  # noqa: E402
from merge import load  # noqa: E402

torch.set_num_threads(1)
warnings.simplefilter("ignore", FutureWarning)
PROGRAM = sys.argv[1:] or ["target/release/lavender-wgpu"]
TOLERANCE = 1e-4

KINDS = {
    "plain": ["lora.r=3"],
    "rsLoRA": ["lora.use_rslora=true", "lora.r=4", "lora.alpha=6"],
    "excluded": ['lora.exclude_modules=["layers.1.self_attn.q_proj"]'],
    "excluded, rsLoRA": ['lora.exclude_modules=["v_proj"]', "lora.use_rslora=true",
                         'lora.target_modules=["q_proj","v_proj","down_proj"]'],
    "vision frozen": ['train.freeze=["vision"]'],
    "layers frozen": ['train.freeze=["layers.0-1"]', 'lora.target_modules=["q_proj","o_proj","up_proj"]'],
    "quantised base": ['model.quantize="q8"', "lora.r=2"],
}
PATTERNS = dict(
    r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"],
    # The first that matches counts; peft sorts them when it saves, so that what was first only before is lost.
    rank_pattern={"layers.0.self_attn.q_proj": 1, "layers.1.self_attn.v_proj": 3, "v_proj": 2},
    alpha_pattern={"layers.1.self_attn.v_proj": 9, "v_proj": 5})
PEFTS = {
    "patterns": PATTERNS,
    "patterns, rsLoRA": {**PATTERNS, "use_rslora": True},
    "patterns, excluded": {**PATTERNS, "exclude_modules": ["layers.0.self_attn.q_proj"]},
}


def train(family, out, steps, sets):
    """The run's steps, as its metrics have them."""
    fixture = HERE / f"train_{family}"
    sets = [f"model.path={HERE / family / 'a'}", f"data.path={fixture / 'data.jsonl'}", f"run.dir={out}",
            f"data.images={HERE / 'mllama' / 'images'}", "loss.lambda=0", "train.batch=4", f"train.steps={steps}",
            "optimizer.lr=0.02", "lora.dropout=0", *sets]
    config = Path(out).with_suffix(".toml")
    config.write_text("")
    command = [*PROGRAM, "train", str(config), "--quiet", *[a for s in sets for a in ("--set", s)]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def samples(family):
    """What the model gets for each sample, with its labels."""
    named = {n: (p, g) for n, p, g in conversations.processors()}
    processor, generation = named[f"{family}-a"]
    for line in (HERE / f"train_{family}" / "data.jsonl").read_text().splitlines():
        entry = json.loads(line)
        picture = mllama.picture(Path(entry["image"]).stem)
        turns = entry["messages"]
        for part in (p for t in turns for p in t["content"] if p["type"] == "image"):
            part["image"] = picture
        out = processor.apply_chat_template(
            turns, chat_template=generation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
            return_tensors="pt", processor_kwargs={"return_offsets_mapping": True})
        mask = torch.as_tensor(out.pop("assistant_masks"))[0].bool()
        out.pop("offset_mapping", None)
        labels = out["input_ids"][0].masked_fill(~mask, -100)
        yield dict(out), labels


def loss(model, inputs):
    """The mean over all labels of all samples."""
    total = count = 0
    with torch.no_grad():
        for tensors, labels in inputs:
            logits = model(**tensors).logits[0, :-1].double()
            total += float(torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum"))
            count += int((labels[1:] != -100).sum())
    return total / count


def main():
    worst = 0.0
    for family in ["smolvlm", "mllama"]:
        base, inputs = HERE / family / "a", list(samples(family))
        before = loss(load(base), inputs)
        for kind in [*KINDS, *PEFTS]:
            with tempfile.TemporaryDirectory() as folder:
                folder = Path(folder)
                sets = list(KINDS.get(kind, []))
                quantised = [s for s in sets if s.startswith("model.")]
                if kind in PEFTS:
                    torch.manual_seed(1)
                    model = get_peft_model(load(base), LoraConfig(lora_dropout=0.0, **PEFTS[kind]))
                    with torch.no_grad():
                        for key, p in model.named_parameters():
                            if "lora_B" in key:
                                p.copy_(0.2 * torch.randn_like(p))
                    model.save_pretrained(folder / "peft")
                    wanted = loss(model, inputs)
                    first = train(family, folder / "zero", 1, [f"init.lora={folder / 'peft'}"])[0]["lm_loss"]
                    worst = max(worst, abs(first / wanted - 1))
                    assert abs(first / wanted - 1) < TOLERANCE, (family, kind, first, wanted)
                    sets.append(f"init.lora={folder / 'peft'}")
                train(family, folder / "one", 3, sets)
                lora = folder / "one" / "lora"
                with warnings.catch_warnings():
                    warnings.simplefilter("error", UserWarning)
                    theirs = loss(PeftModel.from_pretrained(load(base), lora).eval(), inputs)
                again = [f"init.lora={lora}", *[s for s in sets if s.startswith("train.freeze")], *quantised]
                ours = train(family, folder / "two", 1, again)[0]["lm_loss"]
                # A quantised base has other weights: here it only has to load.
                error = 0.0 if quantised else abs(ours / theirs - 1)
                worst = max(worst, error)
                modules = json.loads((lora / "adapter_config.json").read_text())["target_modules"]
                print(f"{family:8} {kind:18} before {before:.5f}, peft {theirs:.6f}, ours {ours:.6f}, "
                      f"{len(modules)} names of modules, relative difference {abs(ours / theirs - 1):.1e}", flush=True)
                assert abs(theirs / before - 1) > 1e-3, "the adapter does nothing"
                assert error < TOLERANCE, (family, kind)
    print(f"largest relative difference {worst:.1e}")


if __name__ == "__main__":
    main()
