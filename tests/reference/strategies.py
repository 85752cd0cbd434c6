"""Ten training steps of each strategy of the method on the tiny checkpoints `a` of SmolVLM and Mllama, by PyTorch and peft.

Versions: torch 2.15.0, transformers 5.23.0, peft 0.21.2.
Run:      python tests/reference/smolvlm.py && python tests/reference/train_smolvlm.py
          && python tests/reference/mllama.py && python tests/reference/train_mllama.py
          && python tests/reference/strategies.py [STRATEGY ...]
          (reads those scripts' checkpoints, samples, targets and initial LoRA, writes tests/reference/strategies/; with
          names, these strategies alone are made anew)

The recipe is that of `train_smolvlm.py`, or `train_mllama.py`, but for what a strategy names, and an aligner with 8 hidden
channels.

strategies.json   per strategy: its student, the configuration's keys that it sets, ten steps' losses, and `spread`, the
                  largest relative gap between the same run in float64 and this one or one from a start slightly moved
init.safetensors  `<strategy>.aligner.<tensor>`, `<strategy>.parallel.<tensor>`: the first weights
final.safetensors `<strategy>.<tensor>`: these and the LoRA factors after ten steps
<strategy>/       the first LoRA of a strategy with another kind of adapter, as peft saves it
"""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import (
    Idefics3Processor, MllamaForConditionalGeneration, MllamaProcessor, PreTrainedTokenizerFast,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parent))
import mllama  # noqa: E402
import smolvlm  # noqa: E402
import train_mllama  # noqa: E402
import train_smolvlm  # noqa: E402
from mllama import messages, picture, resize, word_rows  # noqa: E402
from smolvlm import SHAPES, TEMPLATE, global_columns  # noqa: E402
from train_smolvlm import ALPHA, BATCH, LAMBDA, LR, RANK, STEPS  # noqa: E402

OUT = Path(__file__).resolve().parent / "strategies"
HIDDEN = 8

STRATEGIES = {
    "mean-layer": {"attention.aggregate": "mean-layer"},
    "max-layer": {"attention.aggregate": "max-layer", "aligner.kind": "light", "aligner.activation": "leaky-relu"},
    "max-max": {"attention.aggregate": "max-max", "aligner.kind": "none"},
    "mean-mean": {"attention.aggregate": "mean-mean", "aligner.kind": "light", "aligner.norm": "none"},
    "flow": {"attention.aggregate": "flow", "aligner.kind": "none"},
    "flow-sum": {"attention.aggregate": "flow", "flow.sum": True, "aligner.activation": "leaky-relu"},
    "flow-heads": {"attention.aggregate": "flow", "flow.head_weights": True, "flow.token_weight": True,
                   "aligner.kind": "none", "attention.layers": "last:1"},
    "over-max": {"attention.over_layers": "max", "aligner.activation": "leaky-relu", "aligner.norm": "batch"},
    "deep": {"aligner.kind": "deep", "aligner.activation": "leaky-relu", "aligner.norm": "group"},
    "mlp": {"aligner.kind": "mlp", "aligner.activation": "leaky-relu"},
    "kl": {"loss.kind": "kl", "attention.aggregate": "mean-mean", "aligner.kind": "none"},
    "cosine": {"loss.kind": "cosine", "attention.aggregate": "mean-mean", "aligner.kind": "none"},
    "exponential": {"loss.schedule": "exponential", "loss.decay": 2.0, "attention.aggregate": "mean-mean",
                    "aligner.kind": "none"},
    "inverse": {"loss.schedule": "inverse", "loss.decay": 3.0, "attention.aggregate": "mean-mean",
                "aligner.kind": "none"},
    "ramp": {"loss.aligner_warmup_steps": 3, "loss.lm_ramp": True, "attention.aggregate": "mean-mean",
             "aligner.kind": "mlp", "aligner.activation": "leaky-relu"},
    "frozen": {"loss.aligner_warmup_steps": 3, "loss.warmup_frozen": True, "attention.aggregate": "mean-mean",
               "aligner.kind": "mlp", "aligner.activation": "leaky-relu"},
    "aligner-only": {"control.aligner_only": True, "attention.aggregate": "mean-mean", "aligner.kind": "mlp",
                     "aligner.activation": "leaky-relu"},
    "uniform": {"control.targets": "uniform", "attention.aggregate": "mean-mean", "aligner.kind": "none"},
    "parallel-map": {"attention.parallel": "map", "attention.aggregate": "mean-mean", "aligner.kind": "none"},
    "parallel-diff": {"attention.parallel": "diff", "attention.layers": "last:2", "aligner.activation": "leaky-relu"},
    "parallel-output": {"attention.parallel": "diff-output", "attention.aggregate": "mean-mean", "aligner.kind": "none"},
    "mirror": {"attention.mirror": True, "attention.aggregate": "mean-mean", "aligner.kind": "none"},
    "rslora": {"lora.use_rslora": True, "attention.aggregate": "mean-mean", "aligner.kind": "none"},
    "dora": {"lora.use_dora": True, "attention.aggregate": "mean-mean", "aligner.kind": "none"},
    "mllama-map": {"attention.parallel": "map", "attention.aggregate": "mean-mean", "aligner.kind": "none"},
    "mllama-diff": {"attention.parallel": "diff", "attention.layers": "last:1", "attention.aggregate": "mean-mean",
                    "aligner.kind": "none"},
    "mllama-output": {"attention.parallel": "diff-output", "attention.aggregate": "mean-mean", "aligner.kind": "none"},
}


class Aligner(torch.nn.Module):
    """method.md, section 5."""

    def __init__(self, kind, channels, norm, activation):
        super().__init__()
        h, self.kind, self.norm, self.activation = HIDDEN, kind, norm, activation
        widths = {"conv": [channels, h, h, channels], "light": [channels, h, channels],
                  "deep": [channels, h, h, h, h, channels], "mlp": [channels, h, h], "none": []}[kind]
        self.count = max(len(widths) - 1, 0)
        for i in range(self.count):
            conv = torch.nn.Conv2d(widths[i], widths[i + 1], 1) if kind == "mlp" else torch.nn.Conv2d(
                widths[i], widths[i + 1], 3, padding=1, bias=False)
            setattr(self, f"conv{i + 1}", conv)
        if kind != "none":
            self.out = torch.nn.Conv2d(widths[-1], 1, 1)

    def forward(self, x):
        if self.kind == "none":
            return x.mean(1, keepdim=True)
        for i in range(self.count):
            x = getattr(self, f"conv{i + 1}")(x)
            if self.kind != "mlp" and (i < 2 or i == self.count - 1):
                if self.norm == "instance":
                    x = F.instance_norm(x, eps=1e-5)
                elif self.norm == "batch":
                    x = F.batch_norm(x, None, None, training=True, eps=1e-5)
                elif self.norm == "group":
                    groups = max(g for g in range(1, 9) if x.shape[1] % g == 0)
                    x = F.group_norm(x, groups, eps=1e-5)
            x = F.leaky_relu(x, 0.1) if self.activation == "leaky-relu" else F.relu6(x)
        return self.out(x)


def aggregate(maps, counts, keys, aligner):
    """method.md, section 4: maps [layers, words, heads, 32, 32] -> [words, 32, 32]."""
    rule = keys.get("attention.aggregate", "learned")
    layers, words = maps.shape[:2]
    if rule == "learned":
        each = aligner(maps.flatten(0, 1)).reshape(layers, words, 32, 32)
        return each.amax(0) if keys.get("attention.over_layers") == "max" else each.mean(0)
    if rule == "mean-layer":
        return aligner(maps.mean(0))[:, 0]
    if rule == "max-layer":
        return aligner(maps.amax(0))[:, 0]
    if rule == "max-max":
        return aligner(maps.amax(2, keepdim=True).amax(0))[:, 0]
    if rule == "mean-mean":
        return aligner(maps.mean((0, 2)).unsqueeze(1))[:, 0]
    if keys.get("flow.head_weights"):
        weighted = []
        for part in maps.split(counts, 1):  # W[l,b,h]: mean over patches of the maximum over words
            weight = part.amax(1, keepdim=True).mean((3, 4), keepdim=True)
            weighted.append((weight * part).mean(2, keepdim=True))
        maps = torch.cat(weighted, 1)
    flow = maps.sum(0) if keys.get("flow.sum") else maps.prod(0)
    if not keys.get("flow.sum"):  # a product as small as the epsilons after it: its word's maximum becomes 1
        flow = flow / flow.detach().amax((1, 2, 3), keepdim=True)
    if keys.get("flow.token_weight"):
        places = torch.cat([torch.arange(1, n + 1) / n for n in counts]).to(flow)
        flow = flow * places[:, None, None, None]
    return aligner(flow)[:, 0]


def min_max(maps):
    flat = maps.flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    return (flat - low) / (high - low + 1e-6)


def distance(maps, wanted, kind):
    if kind == "kl":
        p, q = wanted + 1e-6, maps + 1e-6
        p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
        return (p * (p.log() - q.log())).sum(1).mean()
    if kind == "cosine":
        length = lambda x: ((x ** 2).sum(1) + 1e-6).sqrt()
        return 1 - ((maps * wanted).sum(1) / (length(maps) * length(wanted))).mean()
    return ((maps - wanted) ** 2).mean()


def weights(step, keys):
    decay, done = keys.get("loss.decay", 1.0), step / STEPS
    lam = {"exponential": LAMBDA * math.exp(-decay * done), "inverse": LAMBDA / (1 + decay * done)}.get(
        keys.get("loss.schedule"), LAMBDA)
    first = keys.get("loss.aligner_warmup_steps", 0)
    if step < first:
        return lam, 1e-7
    return lam, (step - first) / (STEPS - first) if keys.get("loss.lm_ramp") else 1.0


class SmolVLM:
    """Text rows and image tokens of one self-attention."""

    base, clip, decay = train_smolvlm.OUT, train_smolvlm.CLIP, train_smolvlm.DECAY
    samples, target_words = train_smolvlm.SAMPLES, train_smolvlm.TARGET_WORDS

    def __init__(self):
        model, shape = train_smolvlm.MODEL, SHAPES["a"]
        self.tok = PreTrainedTokenizerFast.from_pretrained(model)
        image_processor = Idefics3ImageProcessorPil(
            size={"longest_edge": shape["longest"]}, max_image_size={"longest_edge": shape["tile"]},
            image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5], resample=1)
        self.processor = Idefics3Processor(image_processor, self.tok, image_seq_len=shape["tokens"], chat_template=TEMPLATE)
        self.model = SmolVLMForConditionalGeneration.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")

    def attentions(self):
        """The hooked modules by name."""
        layers = self.model.model.text_model.layers
        return {f"model.text_model.layers.{i}.self_attn": layer.self_attn for i, layer in enumerate(layers)}

    def batch(self, picked):
        """Inputs, labels, texts, and where each answer starts in its text."""
        chats = [self.processor.apply_chat_template(messages(1, q, a)) for _, _, q, a in picked]
        batch = self.processor(images=[[picture(image)] for _, image, _, _ in picked], text=chats, padding=True,
                               padding_side="right", add_special_tokens=False, return_tensors="pt")
        labels = torch.full_like(batch["input_ids"], -100)
        texts, starts = [], []
        for i, (_, _, _, answer) in enumerate(picked):
            ids = batch["input_ids"][i, : int(batch["attention_mask"][i].sum())]
            text = self.tok.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            start = text.rindex(answer)
            for t, (a, b) in enumerate(self.tok(text, return_offsets_mapping=True)["offset_mapping"]):
                if b > text.rindex("Assistant:") + len("Assistant:") and a <= start + len(answer):
                    labels[i, t] = ids[t]
            texts.append(text), starts.append(start)
        return batch, labels, texts, starts

    def image_keys(self, batch):
        """Which keys are the picture's, [batch, keys]."""
        return batch["input_ids"] == self.tok.convert_tokens_to_ids("<image>")

    def maps(self, probs, i, found, batch):
        columns = global_columns(batch["input_ids"][i].tolist(), self.tok, SHAPES["a"]["tokens"])
        return resize(smolvlm.word_maps(probs, found, columns, 4))

    @staticmethod
    def scores(attn, q_proj, k_proj, kwargs):
        """Scaled scores [batch, heads, queries, keys] of projections, turned by the layer's positions."""
        x = kwargs["hidden_states"]
        split = lambda y: y.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)
        q, k = apply_rotary_pos_emb(split(q_proj(x)), split(k_proj(x)), *kwargs["position_embeddings"])
        return q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3) * attn.scaling

    @staticmethod
    def states(kwargs):
        return kwargs["hidden_states"]


class Mllama:
    """Cross-attention of text rows to tiles."""

    base, clip, decay = train_mllama.OUT, None, 0.0
    samples, target_words = train_mllama.SAMPLES, train_mllama.TARGET_WORDS

    def __init__(self):
        model = train_mllama.MODEL
        self.tok = PreTrainedTokenizerFast.from_pretrained(model)
        settings = json.loads((model / "processor_config.json").read_text())["image_processor"]
        image_processor = MllamaImageProcessorPil(
            size=settings["size"], max_image_tiles=settings["max_image_tiles"], image_mean=settings["image_mean"],
            image_std=settings["image_std"])
        self.processor = MllamaProcessor(image_processor, self.tok, chat_template=(model / "chat_template.jinja").read_text())
        self.model = MllamaForConditionalGeneration.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
        vision = self.model.config.vision_config
        self.patches = (vision.image_size // vision.patch_size) ** 2

    def attentions(self):
        layers = self.model.model.language_model.layers
        cross = self.model.config.text_config.cross_attention_layers
        return {f"model.language_model.layers.{i}.cross_attn": layers[i].cross_attn for i in cross}

    def batch(self, picked):
        prompts, texts = [], []
        for _, _, question, answer in picked:
            message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            prompts.append(self.processor.apply_chat_template(message, add_generation_prompt=True))
            texts.append(prompts[-1] + answer + "<|eot_id|>")
        batch = self.processor(images=[[picture(image)] for _, image, _, _ in picked], text=texts, padding=True,
                               padding_side="right", add_special_tokens=False, return_tensors="pt")
        labels = batch["input_ids"].clone()
        for i, prompt in enumerate(prompts):
            labels[i, : len(self.tok(prompt, add_special_tokens=False)["input_ids"])] = -100
            labels[i, int(batch["attention_mask"][i].sum()):] = -100
        return batch, labels, texts, [len(prompt) for prompt in prompts]

    def image_keys(self, batch):
        """The tiles that a picture has, each with its class token."""
        return batch["aspect_ratio_mask"].flatten(1).repeat_interleave(self.patches + 1, 1).bool()

    def maps(self, probs, i, found, batch):
        grid = mllama.grid_of(batch["aspect_ratio_ids"][i, 0])
        return resize(mllama.word_maps(probs, found, grid, self.patches))

    @staticmethod
    def scores(attn, q_proj, k_proj, kwargs):
        """Scaled scores [batch, heads, queries, keys] of projections, under the layer's norms."""
        split = lambda y: y.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)
        q = attn.q_norm(split(q_proj(kwargs["hidden_states"])))
        k = attn.k_norm(split(k_proj(Mllama.states(kwargs))))
        return q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3) * attn.scaling

    @staticmethod
    def states(kwargs):
        x = kwargs["cross_attention_states"]
        return x.reshape(kwargs["hidden_states"].shape[0], -1, x.shape[-1])


class Parallel(torch.nn.Module):
    """method.md, section 6: a second pair of projections beside those of a layer."""

    def __init__(self, attn, kind):
        super().__init__()
        keys, hidden = attn.k_proj.weight.shape
        self.q_proj = torch.nn.Linear(hidden, attn.q_proj.weight.shape[0], bias=False)
        self.k_proj = torch.nn.Linear(hidden, keys, bias=False)
        if kind != "map":
            self.lambda_d = torch.nn.Parameter(torch.tensor([0.8]))
        if kind == "diff-output":
            self.v_proj = torch.nn.Linear(hidden, keys, bias=False)


def hook(student, attn, parallel, kind, mirror, seen):
    """Writes the layer's parallel or mirrored probabilities to `seen` while it runs."""

    def before(_, args, kwargs):
        kwargs = kwargs | ({"hidden_states": args[0]} if args else {})
        if mirror:  # rows of the picture over all tokens of the sample, without the causal mask
            scores = student.scores(attn, attn.q_proj, attn.k_proj, kwargs)
            real = seen["real"][:, None, None]
            seen[attn] = scores.masked_fill(~real, float("-inf")).softmax(-1)
            return
        scores = student.scores(attn, parallel.q_proj, parallel.k_proj, kwargs)
        seen[attn] = scores.masked_fill(~seen["image"][:, None, None], float("-inf")).softmax(-1)
        if kind == "diff-output":
            v = parallel.v_proj(student.states(kwargs)).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)
            v = v.repeat_interleave(seen[attn].shape[1] // v.shape[1], 1)
            seen[attn, "out"] = (seen[attn] @ v).transpose(1, 2).flatten(2)

    attn.register_forward_pre_hook(before, with_kwargs=True)
    if kind == "diff-output":
        attn.o_proj.register_forward_pre_hook(lambda _, args: (args[0] - parallel.lambda_d * seen[attn, "out"],))


def adapter(keys):
    return LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=["q_proj", "v_proj"],
                      use_rslora=keys.get("lora.use_rslora", False), use_dora=keys.get("lora.use_dora", False))


def run(name, keys, dtype, init, seed, shaken=0):
    torch.manual_seed(seed)
    student = Mllama() if name.startswith("mllama-") else SmolVLM()
    targets = load_file(student.base / "targets.safetensors")
    attentions = student.attentions()
    if keys.get("attention.layers"):
        chosen = list(attentions)[-int(keys["attention.layers"].removeprefix("last:")):]
        attentions = {k: attentions[k] for k in chosen}
    kind, mirror = keys.get("attention.parallel", "none"), keys.get("attention.mirror", False)
    parallel = {k: Parallel(attn, kind) for k, attn in attentions.items() if kind != "none"}
    model = get_peft_model(student.model, adapter(keys))
    saved = load_file(student.base / "init" / "adapter_model.safetensors")
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_A" in key or "lora_B" in key:
                p.copy_(saved[key.replace(".default", "")])
    if "lora.use_rslora" in keys or "lora.use_dora" in keys:
        model.save_pretrained(OUT / name)
        (OUT / name / "README.md").unlink()
        fields = json.loads((OUT / name / "adapter_config.json").read_text())
        fields |= {"base_model_name_or_path": "a", "target_modules": sorted(fields["target_modules"])}
        (OUT / name / "adapter_config.json").write_text(json.dumps(fields, indent=1))
    rule = keys.get("attention.aggregate", "learned")
    heads = student.model.config.text_config.num_attention_heads
    channels = 1 if rule in ("max-max", "mean-mean") or keys.get("flow.head_weights") else heads
    aligner = Aligner(keys.get("aligner.kind", "conv"), channels, keys.get("aligner.norm", "instance"),
                      keys.get("aligner.activation", "relu6"))
    added = {f"aligner.{k}": p for k, p in aligner.named_parameters()}
    added |= {f"parallel.{k}.parallel.{t}": p for k, m in parallel.items() for t, p in m.named_parameters()}
    init |= {f"{name}.{k}": p.detach().clone() for k, p in added.items()}
    if shaken:
        noise = torch.Generator().manual_seed(shaken)
        with torch.no_grad():
            for p in added.values():
                p.mul_(1 + 1e-6 * torch.randn(p.shape, generator=noise))
    model.to(dtype), aligner.to(dtype), [m.to(dtype) for m in parallel.values()]
    seen = {}
    for k, attn in attentions.items():
        if kind != "none" or mirror:
            hook(student, attn, parallel.get(k), kind, mirror, seen)
    trained = [p for p in model.parameters() if p.requires_grad] + list(added.values())
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=student.decay)
    steps = []
    for step in range(STEPS):
        picked = [student.samples[(step * BATCH + i) % len(student.samples)] for i in range(BATCH)]
        batch, labels, texts, starts = student.batch(picked)
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
        seen["image"], seen["real"] = student.image_keys(batch), batch["attention_mask"].bool()
        out = model(**batch, output_attentions=True)
        lm_loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        probs = []
        for k, attn in attentions.items():
            own, new = out.attentions[int(k.split(".")[3])], seen.get(attn)
            if mirror:
                own = own.detach() + new.transpose(2, 3)
            elif kind == "map":
                own = new
            elif kind != "none":
                own = own - parallel[k].lambda_d * new
            probs.append(own)
        maps, wanted, counts = [], [], []
        for i, (sample, _, _, answer) in enumerate(picked):
            words = student.target_words[sample]
            found = [(w, rows) for w, rows in word_rows(student.tok, texts[i], starts[i], starts[i] + len(answer))
                     if w in words]
            if not found:
                continue
            per_layer = [student.maps(p[i], i, found, batch) for p in probs]
            maps.append(torch.stack(per_layer).transpose(1, 2))  # [layers, words, heads, 32, 32]
            wanted += [targets[sample][words.index(w)] for w, _ in found]
            counts.append(len(found))
        lam, language = weights(step, keys)
        frozen = keys.get("control.aligner_only") or (keys.get("loss.warmup_frozen")
                                                      and step < keys["loss.aligner_warmup_steps"])
        maps = torch.cat(maps, 1)
        wanted = (torch.stack(wanted).to(dtype) / 255).flatten(1)
        if keys.get("control.targets") == "uniform":
            wanted = torch.full_like(wanted, 0.5)
        maps = maps.detach() if frozen else maps
        aligned = min_max(aggregate(maps, counts, keys, aligner))
        attn_loss = distance(aligned, wanted, keys.get("loss.kind"))
        loss = (lm_loss.detach() if frozen else lm_loss) * language + lam * attn_loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in trained if p.grad is not None], student.clip or math.inf)
        steps.append({"loss": loss.item(), "lm_loss": lm_loss.item(), "attn_loss": attn_loss.item(), "grad_norm": norm.item()})
        optimizer.step()
    named = {k: p.detach() for k, p in get_peft_model_state_dict(model).items()}
    return steps, named | {k: p.detach() for k, p in added.items()}


# Seeds up to this one lie beside a kink (of an activation, or of a minimum or maximum) that the moves below are too small
# for: in float64, starts moved by 1e-5 change the ninth gradient norm by up to 7e-3 and the losses by 5e-6; with seed 8 of
# `deep`, another order of sums changes the eighth by 2.5e-2 where those before it agree to 1e-5.
PASSED_OVER = {"mean-layer": 3, "deep": 15}


def part_of(name):
    return name.split(".")[0] if name.startswith(("aligner.", "parallel.")) else "lora"


def main():
    OUT.mkdir(exist_ok=True)
    result, init, final = {}, {}, {}
    chosen = sys.argv[1:] or list(STRATEGIES)
    if sys.argv[1:]:
        of = lambda key: key.split(".")[0]
        result = {k: v for k, v in json.loads((OUT / "strategies.json").read_text()).items() if k in STRATEGIES}
        init = {k: v for k, v in load_file(OUT / "init.safetensors").items() if of(k) in result and of(k) not in chosen}
        final = {k: v for k, v in load_file(OUT / "final.safetensors").items() if of(k) in result and of(k) not in chosen}
    for name in chosen:
        keys = STRATEGIES[name]
        # Where two pixels lie close to a map's minimum or maximum, rounding decides which one moves: the first seed
        # whose run in f32 stays with the one in f64 is taken, as do three from a start moved in its last digits.
        for seed in range(PASSED_OVER.get(name, 2) + 1, 20):
            first = {}
            steps, named = run(name, keys, torch.float32, first, seed)
            exact, reference = run(name, keys, torch.float64, {}, seed)
            runs = [steps] + [run(name, keys, torch.float32, {}, seed, shaken)[0] for shaken in (1, 2, 3)]
            spread = {k: max(abs(a[k] - b[k]) / max(abs(b[k]), 1e-3) for run in runs for a, b in zip(run, exact))
                      for k in steps[0]}
            for part in ("lora", "aligner", "parallel"):
                gaps = [float((named[k].double() - reference[k]).abs().max() / max(reference[k].abs().max(), 1e-6))
                        for k in named if part_of(k) == part and k != "aligner.out.bias"]
                spread[part] = max(gaps, default=0.0)
            print(name, seed, {k: f"{v:.1e}" for k, v in spread.items()}, flush=True)
            if max(spread.values()) < 3.5e-5 or (not first and seed > 3):
                break
        init |= first
        student = "mllama" if name.startswith("mllama-") else "smolvlm"
        result[name] = {"student": student, "keys": keys, "seed": seed, "steps": steps, "spread": spread}
        # Every fourth LoRA tensor, the magnitudes, and all that is added: enough to see a wrong gradient.
        lora = sorted(k for k in named if part_of(k) == "lora" and "magnitude" not in k)[::4]
        lora += sorted(k for k in named if "magnitude" in k)[::2]
        kept = lora + [k for k in named if part_of(k) != "lora"]
        final |= {f"{name}.{k}": named[k].contiguous() for k in kept}
        print(name, f"{steps[0]['attn_loss']:.4f} {steps[-1]['attn_loss']:.4f}", flush=True)
    result = {k: result[k] for k in STRATEGIES if k in result}
    (OUT / "strategies.json").write_text(json.dumps(result, indent=1))
    save_file({k: v.contiguous() for k, v in init.items()}, OUT / "init.safetensors")
    save_file(final, OUT / "final.safetensors")
    print(sum(f.stat().st_size for f in OUT.rglob("*") if f.is_file()), "bytes")


if __name__ == "__main__":
    main()
