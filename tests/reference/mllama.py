"""Tiny random Mllama (Llama-3.2-Vision) checkpoints and what transformers computes on them.

Versions: torch 2.15.0, transformers 5.23.0, tokenizers 0.23.3, pillow 13.0.0.
Run:      python tests/reference/mllama.py          (writes tests/reference/mllama/)

Two shapes, two dialects of the same checkpoint format:
  a  f32 weights, keys `model.language_model.…` + `lm_head`, `processor_config.json`,
     `chat_template.jinja`, `rope_parameters`, plain rotary embedding
  b  f16 weights, keys `language_model.model.…` + `language_model.lm_head`,
     `preprocessor_config.json`, `chat_template.json`, `rope_theta` + `rope_scaling` (llama3)
Every tanh gate is away from zero, or nothing behind it would be compared.

Files of a checkpoint directory beside the published ones:
  expected.json         the cases: image files, text, words with token rows
  expected.safetensors  `<case>.<name>`; probabilities are of eager attention
"""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaProcessor, PreTrainedTokenizerFast
from transformers.image_utils import load_image
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

OUT = Path(__file__).resolve().parent / "mllama"
SIDE = 32  # word maps are SIDE x SIDE
torch.set_num_threads(1)

SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|finetune_right_pad_id|>",
]
IMAGE_TOKEN = "<|image|>"
# Llama 3's split: contractions, words with one leading non-letter, up to three digits, punctuation, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "user assistant system", "What is in the picture?", "Describe the image in a single sentence as a caption.",
    "A red circle and a green square.", "The circle is left of the blue triangle.", "two small yellow squares",
    "Is there a triangle? Yes, there is.", "No, the circle isn't green.", "How many squares are there?",
]

# The behaviour of the template published with Llama-3.2-Vision: BOS first, a dated system turn only where
# there is no image, an image part becomes <|image|>, turns end with <|eot_id|>; a system message beside an
# image is refused.
TEMPLATE = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{%- set seen = namespace(images=false) %}
{%- for message in messages %}
    {%- if message['content'] is not string %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}{% set seen.images = true %}{% endif %}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if seen.images and system_message != "" %}
    {{- raise_exception("Prompting with images is incompatible with system messages.") }}
{%- endif %}
{%- if not seen.images %}
    {{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
    {{- system_message + "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}
                {{- '<|image|>' }}
            {%- elif part['type'] == 'text' %}
                {{- part['text'] }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

SHAPES = {
    "a": dict(
        seed=3, dtype=torch.float32, merges=40,
        vision=dict(hidden_size=32, attention_heads=2, num_hidden_layers=3, num_global_layers=2, intermediate_size=64,
                    image_size=28, patch_size=7, intermediate_layers_indices=[0, 2], norm_eps=1e-5),
        text=dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=5,
                  cross_attention_layers=[1, 3], intermediate_size=56, rms_norm_eps=1e-5,
                  max_position_embeddings=512, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
    ),
    "b": dict(
        seed=11, dtype=torch.float16, merges=70,
        vision=dict(hidden_size=48, attention_heads=3, num_hidden_layers=2, num_global_layers=1, intermediate_size=80,
                    image_size=30, patch_size=6, intermediate_layers_indices=[0], norm_eps=1e-5),
        text=dict(hidden_size=48, num_attention_heads=3, num_key_value_heads=1, num_hidden_layers=4,
                  cross_attention_layers=[1, 2], intermediate_size=80, rms_norm_eps=1e-6,
                  max_position_embeddings=512,
                  rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
    ),
}


def tokenizer(merges):
    """A byte-level BPE of Llama 3's kind; `<|image|>` is the first id past the vocabulary."""
    tok = Tokenizer(models.BPE(ignore_merges=True))
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=256 + merges, initial_alphabet=alphabet, show_progress=False))
    tok.add_special_tokens(SPECIAL)
    tok.add_special_tokens([IMAGE_TOKEN])
    bos = tok.token_to_id(SPECIAL[0])
    tok.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=True),
        processors.TemplateProcessing(
            single=f"{SPECIAL[0]} $A", pair=f"{SPECIAL[0]} $A {SPECIAL[0]} $B", special_tokens=[(SPECIAL[0], bos)]),
    ])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token=SPECIAL[0], eos_token="<|eot_id|>", pad_token="<|finetune_right_pad_id|>",
        model_input_names=["input_ids", "attention_mask"])


def draw(size, mode="RGB", seed=0):
    """Shapes on a slanted gradient: cheap as PNG, and no two pixels' neighbourhoods alike."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 255 // max(width, 2), y * 255 // max(height, 2), (x + 2 * y) % 256], -1).astype(np.uint8)
    image = Image.fromarray(base, "RGB")
    pen = ImageDraw.Draw(image)
    rng = np.random.default_rng(seed)
    for _ in range(4):
        cx, cy = rng.integers(0, width), rng.integers(0, height)
        r = max(1, min(width, height) // 4)
        pen.ellipse([cx - r, cy - r, cx + r, cy + r], fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
    if mode == "L":
        return image.convert("L")
    if mode == "RGBA":
        image.putalpha(Image.fromarray(((x * 7 + y * 3) % 256).astype(np.uint8), "L"))
    return image


IMAGES = {
    "square": draw((40, 40), seed=1), "wide": draw((84, 30), seed=2), "tall": draw((21, 100), seed=3),
    "tiny": draw((3, 5), seed=4), "large": draw((260, 190), seed=5), "gray": draw((50, 33), "L", seed=6),
    "rgba": draw((31, 62), "RGBA", seed=7), "line": draw((300, 2), seed=8),
}


def build(name):
    """Makes checkpoint `name` as transformers saves it, then puts `b` into the older dialect."""
    shape = SHAPES[name]
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    tok = tokenizer(shape["merges"])
    vocab = tok.convert_tokens_to_ids(IMAGE_TOKEN)
    vision, text = shape["vision"], shape["text"]
    outputs = vision["hidden_size"] * (1 + len(vision["intermediate_layers_indices"]))
    config = MllamaConfig(
        vision_config=MllamaVisionConfig(vision_output_dim=outputs, max_num_tiles=4, **vision).to_dict(),
        text_config=MllamaTextConfig(
            vocab_size=vocab, bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id,
            pad_token_id=tok.pad_token_id, **text).to_dict(),
        image_token_index=vocab)
    config._attn_implementation = "eager"
    torch.manual_seed(shape["seed"])
    model = MllamaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "gate" in key.rsplit(".", 1)[-1] and p.numel() == 1:
                p.copy_(torch.empty(1).uniform_(0.4, 1.2) * (1 if torch.rand(1) < 0.7 else -1))
            elif "norm" in key and key.endswith("weight"):
                p.copy_(1 + 0.2 * torch.randn_like(p))
            elif "norm" in key:
                p.copy_(0.1 * torch.randn_like(p))
            elif "embed" in key:
                p.copy_(0.6 * torch.randn_like(p))
            else:
                fan = p[0].numel()
                p.copy_(1.3 * torch.randn_like(p) / math.sqrt(fan))
    image_processor = MllamaImageProcessorPil(
        size={"height": vision["image_size"], "width": vision["image_size"]}, max_image_tiles=4,
        image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])
    processor = MllamaProcessor(image_processor, tok, chat_template=TEMPLATE)
    model.to(shape["dtype"]).save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    dialect(name, folder)
    # Read back, so that the weights are what the file holds and the rotary frequencies never saw f16.
    model = MllamaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval(), processor


def dialect(name, folder):
    """Rewrites keys and configuration files into the dialect that checkpoint `name` stands for."""
    weights = load_file(folder / "model.safetensors")
    old = {}
    for key, value in weights.items():
        key = re.sub(r"^model\.", "", key)
        key = re.sub(r"^language_model\.model\.", "language_model.", key)
        key = re.sub(r"^language_model\.lm_head", "lm_head", key)
        old[key] = value.contiguous()
    new = {}
    for key, value in old.items():
        if name == "a":
            new[key if key.startswith("lm_head") else f"model.{key}"] = value
        elif key.startswith("lm_head"):
            new[f"language_model.{key}"] = value
        else:
            new[re.sub(r"^language_model\.", "language_model.model.", key)] = value
    save_file(new, folder / "model.safetensors", metadata={"format": "pt"})
    if name == "a":
        return
    config = json.loads((folder / "config.json").read_text())
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"]["rope_theta"] = rope.pop("rope_theta")
    config["text_config"]["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype", "float16")
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    nested = json.loads((folder / "processor_config.json").read_text())
    image = nested["image_processor"]
    image["processor_class"] = "MllamaProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=1))
    (folder / "processor_config.json").unlink()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}, indent=1))


def messages(n_images, question, answer=None):
    parts = [{"type": "image"}] * n_images + [{"type": "text", "text": question}]
    out = [{"role": "user", "content": parts}]
    if answer is not None:
        out.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return out


def word_rows(tok, text, start, end):
    """The answer's words, lower-cased, in order of first occurrence: [(word, [[predicting rows] per occurrence])]."""
    offsets = tok(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    words = {}
    for m in re.finditer(r"\w+(?:'\w+)*", text[start:end]):
        s, e = start + m.start(), start + m.end()
        rows = [t - 1 for t, (a, b) in enumerate(offsets) if a < e and b > s]
        words.setdefault(m.group().lower(), []).append(rows)
    return list(words.items())


def compose(probs, grid, patches):
    """Probabilities [heads, rows, images*tiles*(1 + patches)] of one image -> [heads, rows, grid h*g, grid w*g]."""
    high, wide = grid
    g = math.isqrt(patches)
    heads, rows, _ = probs.shape
    tiles = probs.reshape(heads, rows, -1, patches + 1)[:, :, : high * wide, 1:]
    tiles = tiles.reshape(heads, rows, high, wide, g, g)
    return tiles.permute(0, 1, 2, 4, 3, 5).reshape(heads, rows, high * g, wide * g)


def resize(maps, side=SIDE):
    """Bilinear with half-pixel centres and no antialias, over the last two dimensions."""
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    out = torch.nn.functional.interpolate(flat, size=(side, side), mode="bilinear", align_corners=False)
    return out.reshape(*maps.shape[:-2], side, side)


def word_maps(probs, words, grid, patches):
    """One sample's cross-attention [heads, text, keys] -> [heads, words, h*g, w*g], tokens averaged, then occurrences."""
    per_word = []
    for _, occurrences in words:
        occ = torch.stack([probs[:, rows].mean(1) for rows in occurrences], 1).mean(1)
        per_word.append(occ)
    return compose(torch.stack(per_word, 1), grid, patches)


def grid_of(ids):
    ratios = [(h, w) for h in range(1, 5) for w in range(1, 5) if h * w <= 4]
    return ratios[int(ids) - 1]


CASES = [
    # name, images, question, answer
    ("one", ["rgba"], "What is in the picture?", "A red circle and a green square."),
    ("wide", ["wide"], "Describe it.", "The circle is left of the blue circle."),
    ("tall", ["tall"], "Is there a triangle?", "No, the triangle isn't there."),
    ("two", ["tiny", "large"], "How many?", "two small squares"),
    ("text", [], "How many squares?", "two"),
]


def picture(name):
    """An image as transformers loads it from a file: upright, then `convert("RGB")`, which drops alpha."""
    return load_image(str(OUT / "images" / f"{name}.png"))


def prepared(processor, case):
    _, names, question, answer = case
    pictures = [picture(n) for n in names]
    prompt = processor.apply_chat_template(messages(len(names), question), add_generation_prompt=True,
                                           date_string="26 Jul 2024")
    full = prompt + answer + "<|eot_id|>"
    def run(text):
        return processor(images=[pictures] if pictures else None, text=[text], add_special_tokens=False,
                         return_tensors="pt")
    return prompt, full, run(prompt), run(full)


def main():
    OUT.mkdir(exist_ok=True)
    (OUT / "images").mkdir(exist_ok=True)
    for key, image in IMAGES.items():
        image.save(OUT / "images" / f"{key}.png", optimize=True)
    for name in SHAPES:
        model, processor = build(name)
        tok = processor.tokenizer
        shape = SHAPES[name]
        patches = (shape["vision"]["image_size"] // shape["vision"]["patch_size"]) ** 2
        cross = shape["text"]["cross_attention_layers"]
        mean = torch.tensor(processor.image_processor.image_mean).view(3, 1, 1)
        std = torch.tensor(processor.image_processor.image_std).view(3, 1, 1)
        tensors, cases = {}, {"images": {}, "cases": [], "cross_attention_layers": cross}
        for key, image in IMAGES.items():
            out = processor.image_processor(images=[[picture(key)]], return_tensors="pt")
            ids, mask = int(out["aspect_ratio_ids"][0, 0]), out["aspect_ratio_mask"][0, 0]
            high, wide = grid_of(ids)
            assert int(mask.sum()) == high * wide == out["num_tiles"][0][0]
            tiles = out["pixel_values"][0, 0]
            assert float(tiles[high * wide:].abs().sum()) == 0.0
            # Every value is a byte, scaled: kept as that byte, exactly.
            bytes_ = (tiles[: high * wide].double() * std.double() + mean.double()) * 255
            assert float((bytes_ - bytes_.round()).abs().max()) < 1e-3
            tensors[f"image.{key}"] = bytes_.round().to(torch.uint8).contiguous()
            if key == "tiny":
                tensors["image.tiny.normalized"] = tiles[: high * wide].float().contiguous()
            cases["images"][key] = {"aspect_ratio_id": ids, "grid": [high, wide], "size": list(image.size)}
        for case in CASES:
            label, names, question, answer = case
            prompt, full, inputs, whole = prepared(processor, case)
            with torch.no_grad():
                vision = {}
                if names:
                    v = model.model.vision_model(
                        pixel_values=inputs["pixel_values"], aspect_ratio_ids=inputs["aspect_ratio_ids"],
                        aspect_ratio_mask=inputs["aspect_ratio_mask"]).last_hidden_state
                    vision = model.model.multi_modal_projector(v)
                logits = model(**inputs).logits[0]
                generated = model.generate(**inputs, do_sample=False, max_new_tokens=12, eos_token_id=None,
                                           return_dict_in_generate=True, output_logits=True)
                out = model(**whole, output_attentions=True)
            scores = torch.stack([s[0] for s in generated.logits])
            top = scores.float().topk(2, -1).values
            margin = float((top[:, 0] - top[:, 1]).min())
            start = len(prompt)
            words = word_rows(tok, full, start, start + len(answer))
            entry = {
                "name": label, "images": names, "question": question, "answer": answer, "prompt": prompt,
                "full": full, "prompt_tokens": inputs["input_ids"][0].tolist(),
                "full_tokens": whole["input_ids"][0].tolist(),
                "generated": generated.sequences[0, inputs["input_ids"].shape[1]:].tolist(),
                "smallest_margin": margin, "words": [{"word": w, "rows": rows} for w, rows in words],
            }
            # All rows of one case, the last ones of the others: the file stays small.
            tensors[f"{label}.logits"] = (logits if label == "wide" else logits[-6:]).float().contiguous()
            if names:
                entry["cross_attention_mask"] = whole["cross_attention_mask"][0].flatten(1).tolist()
                if label in ("wide", "two"):
                    tensors[f"{label}.vision"] = vision.reshape(-1, *vision.shape[-2:])[:, ::5].float().contiguous()
            if len(names) == 1:
                grid = grid_of(inputs["aspect_ratio_ids"][0, 0])
                maps = torch.stack([word_maps(out.attentions[l][0].float(), words, grid, patches) for l in cross])
                tensors[f"{label}.maps"] = maps.contiguous()  # [layers, heads, words, h*g, w*g]
                if label == "wide":
                    tensors[f"{label}.mean"] = resize(maps).mean((0, 1)).contiguous()  # [words, 32, 32]
            cases["cases"].append(entry)
            print(name, label, "tokens", len(entry["prompt_tokens"]), "logits", float(logits.abs().max()), "margin", margin)
        # A padded batch: two samples of unlike lengths and tile counts in one forward.
        fulls = [prepared(processor, c)[1] for c in CASES[:2]]
        batch = processor(images=[[picture(CASES[0][1][0])], [picture(CASES[1][1][0])]], text=fulls, padding=True,
                          padding_side="right", add_special_tokens=False, return_tensors="pt")
        labels = batch["input_ids"].clone()
        for i, c in enumerate(CASES[:2]):
            prompt = prepared(processor, c)[2]["input_ids"].shape[1]
            labels[i, :prompt] = -100
            labels[i, int(batch["attention_mask"][i].sum()):] = -100
        with torch.no_grad():
            out = model(**batch, labels=labels)
        cases["batch"] = {"cases": ["one", "wide"], "loss": float(out.loss), "labels": labels.tolist()}
        (OUT / name / "expected.json").write_text(json.dumps(cases))
        save_file(tensors, OUT / name / "expected.safetensors")
    print(sum(f.stat().st_size for f in OUT.rglob("*") if f.is_file()), "bytes")


if __name__ == "__main__":
    main()
