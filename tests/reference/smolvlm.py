"""Tiny random SmolVLM and Idefics3 checkpoints and what transformers computes on them.

Versions: torch 2.15.0, transformers 5.23.0, tokenizers 0.23.3, pillow 13.0.0.
Run:      python tests/reference/mllama.py && python tests/reference/smolvlm.py
          (reads tests/reference/mllama/images/, writes tests/reference/smolvlm/)

Two shapes, two dialects of the same checkpoint format:
  a  SmolVLMForConditionalGeneration, f32, own `lm_head`, `preprocessor_config.json` + `processor_config.json`,
     `chat_template.json`, `rope_theta` + `rope_scaling`; tiles of 64, 4 x 4 tokens a tile (scale factor 2)
  b  Idefics3ForConditionalGeneration, f16, tied embeddings, nested `processor_config.json`,
     `chat_template.jinja`, `rope_parameters` (llama3), head_dim != hidden / heads; tiles of 48 on a position
     table for 64, 2 x 2 tokens a tile (scale factor 3)

Files of a checkpoint directory beside the published ones:
  expected.json         the cases: image files, text, words with token rows
  expected.safetensors  `<case>.<name>`; probabilities are of eager attention
"""

import json
import math
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor, PreTrainedTokenizerFast
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parent))
from mllama import CORPUS, messages, picture, resize, word_rows  # noqa: E402

OUT = Path(__file__).resolve().parent / "smolvlm"
torch.set_num_threads(1)

# The template published with SmolVLM.
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

SHAPES = {
    "a": dict(
        seed=21, dtype=torch.float32, merges=60, tile=64, longest=128, tokens=16,
        config=(SmolVLMConfig, SmolVLMForConditionalGeneration), tied=False, scale_factor=2,
        vision=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=64,
                    patch_size=8),
        text=dict(hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
                  num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=512,
                  rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
    ),
    "b": dict(
        seed=22, dtype=torch.float16, merges=90, tile=48, longest=144, tokens=4,
        config=(Idefics3Config, Idefics3ForConditionalGeneration), tied=True, scale_factor=3,
        vision=dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, image_size=64,
                    patch_size=8),
        text=dict(hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=6,
                  num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-6, max_position_embeddings=512,
                  rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
    ),
}


def tokenizer(merges):
    """A byte-level BPE of SmolLM's kind: digits alone, no prefix space, no post-processor."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(CORPUS + ["User: Assistant:\n\n\n"] * 3, trainers.BpeTrainer(
        vocab_size=256 + 3 + merges, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"]))
    tok.add_special_tokens(["<global-img>"])
    tok.add_special_tokens([f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)])
    tok.add_special_tokens(["<fake_token_around_image>", "<image>", "<end_of_utterance>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<|im_start|>", eos_token="<end_of_utterance>", unk_token="<|endoftext|>",
        pad_token="<|im_end|>", model_input_names=["input_ids", "attention_mask"])


def build(name):
    shape = SHAPES[name]
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    tok = tokenizer(shape["merges"])
    make_config, make_model = shape["config"]
    kind = "smolvlm_vision" if name == "a" else "idefics3_vision"
    config = make_config(
        vision_config={"model_type": kind, **shape["vision"]},
        text_config={"model_type": "llama", "vocab_size": len(tok), "bos_token_id": tok.bos_token_id,
                     "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id,
                     "tie_word_embeddings": shape["tied"], **shape["text"]},
        image_token_id=tok.convert_tokens_to_ids("<image>"), scale_factor=shape["scale_factor"],
        tie_word_embeddings=shape["tied"])
    config._attn_implementation = "eager"
    torch.manual_seed(shape["seed"])
    model = make_model(config).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "norm" in key and key.endswith("weight"):
                p.copy_(1 + 0.2 * torch.randn_like(p))
            elif key.endswith("bias"):
                p.copy_(0.1 * torch.randn_like(p))
            elif "embed" in key:
                p.copy_((0.3 if shape["tied"] else 0.6) * torch.randn_like(p))
            else:
                p.copy_(1.3 * torch.randn_like(p) / math.sqrt(p[0].numel()))
        model.tie_weights()
    image_processor = Idefics3ImageProcessorPil(
        size={"longest_edge": shape["longest"]}, max_image_size={"longest_edge": shape["tile"]},
        image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5], resample=1)
    processor = Idefics3Processor(image_processor, tok, image_seq_len=shape["tokens"], chat_template=TEMPLATE)
    model.to(shape["dtype"]).save_pretrained(folder)
    processor.save_pretrained(folder)
    # The weights exactly as the file holds them, and rotary frequencies that never were in half precision.
    model = make_model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    (folder / "generation_config.json").unlink(missing_ok=True)
    if name == "a":
        dialect(folder)
    return model, processor


def dialect(folder):
    """The files of the published SmolVLM checkpoints, written before transformers 5."""
    config = json.loads((folder / "config.json").read_text())
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"]["rope_theta"] = rope["rope_theta"]
    config["text_config"]["rope_scaling"] = None
    config["torch_dtype"] = config.pop("dtype", "float32")
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    nested = json.loads((folder / "processor_config.json").read_text())
    image = nested.pop("image_processor")
    image["image_processor_type"] = "SmolVLMImageProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=1))
    plain = {"image_seq_len": nested["image_seq_len"], "processor_class": "SmolVLMProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(plain, indent=1))
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}, indent=1))


def word_maps(probs, words, columns, side):
    """One sample's self-attention [heads, T, T] -> [heads, words, side, side]: tokens averaged, then occurrences."""
    out = []
    for _, occurrences in words:
        out.append(torch.stack([probs[:, rows][:, :, columns].mean(1) for rows in occurrences], 1).mean(1))
    return torch.stack(out, 1).reshape(probs.shape[0], len(words), side, side)


def global_columns(ids, tok, tokens):
    """Positions of the global tile's image tokens, in raster order."""
    at = ids.index(tok.convert_tokens_to_ids("<global-img>"))
    columns = list(range(at + 1, at + 1 + tokens))
    assert {ids[c] for c in columns} == {tok.convert_tokens_to_ids("<image>")}
    return columns


CASES = [
    # name, images, question, answer
    ("wide", ["wide"], "Describe it.", "The circle is left of the blue circle."),
    ("rgba", ["rgba"], "What is in the picture?", "A red circle and a green square."),
    ("tiny", ["tiny"], "Is there a triangle?", "No, the triangle isn't there."),
    ("two", ["gray", "line"], "How many?", "two small squares"),
    ("text", [], "How many squares?", "two"),
]
IMAGES = ["square", "wide", "tall", "tiny", "large", "gray", "rgba", "line"]


def main():
    OUT.mkdir(exist_ok=True)
    for name in SHAPES:
        model, processor = build(name)
        tok, shape = processor.tokenizer, SHAPES[name]
        side = math.isqrt(shape["tokens"])
        tensors, cases = {}, {"images": {}, "cases": []}
        for key in IMAGES:
            out = processor.image_processor(images=[[picture(key)]], return_tensors="pt", return_row_col_info=True)
            tiles = out["pixel_values"][0]
            assert bool(out["pixel_attention_mask"].all())
            bytes_ = (tiles.double() * 0.5 + 0.5) * 255
            assert float((bytes_ - bytes_.round()).abs().max()) < 1e-3
            # Every value is a byte, scaled: kept as that byte, exactly. Big ones by their sum along the rows.
            kept = bytes_.round().to(torch.uint8)
            if key in ("wide", "tiny"):
                tensors[f"image.{key}"] = kept.contiguous()
            weights = torch.arange(1, shape["tile"] + 1)
            sums = (kept.long() * weights).sum(-1)
            tensors[f"image.{key}.sums"] = sums.to(torch.int32).contiguous()
            whole = processor.image_processor(images=[[picture(key)]], return_tensors="pt", do_image_splitting=False)
            whole = ((whole["pixel_values"][0].double() * 0.5 + 0.5) * 255).round().to(torch.uint8)
            tensors[f"image.{key}.whole"] = (whole.long() * weights).sum(-1).to(torch.int32).contiguous()
            if key == "tiny":
                tensors["image.tiny.normalized"] = tiles[:1].float().contiguous()
            grid = [int(out["rows"][0][0]), int(out["cols"][0][0])]
            cases["images"][key] = {"grid": grid, "tiles": tiles.shape[0]}
        for label, names, question, answer in CASES:
            pictures = [picture(n) for n in names]
            prompt = processor.apply_chat_template(messages(len(names), question), add_generation_prompt=True)
            chat = processor.apply_chat_template(messages(len(names), question, answer))
            full = prompt + " " + answer
            run = lambda text: processor(  # noqa: E731
                images=[pictures] if pictures else None, text=[text], add_special_tokens=False, return_tensors="pt")
            inputs, whole, conversation = run(prompt), run(full), run(chat)
            with torch.no_grad():
                logits = model(**inputs).logits[0]
                generated = model.generate(**inputs, do_sample=False, max_new_tokens=12, eos_token_id=None,
                                           return_dict_in_generate=True, output_logits=True)
                out = model(**whole, output_attentions=True)
            scores = torch.stack([s[0] for s in generated.logits])
            top = scores.float().topk(2, -1).values
            margin = float((top[:, 0] - top[:, 1]).min())
            # The expanded text, from the tokens: nothing is lost in a byte-level vocabulary.
            expanded = tok.decode(whole["input_ids"][0], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            assert tok(expanded)["input_ids"] == whole["input_ids"][0].tolist()
            start = len(expanded) - len(answer)
            words = word_rows(tok, expanded, start, len(expanded))
            chat_ids = conversation["input_ids"][0].tolist()
            text = tok.decode(chat_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            # From the end of the generation prompt (the space before the answer is the model's to write) to the
            # <end_of_utterance> that begins where the answer ends.
            begin, end = text.rindex("Assistant:") + len("Assistant:"), text.rindex(answer) + len(answer)
            offsets = tok(text, return_offsets_mapping=True)["offset_mapping"]
            learned = [b > begin and a <= end for a, b in offsets]
            entry = {
                "name": label, "images": names, "question": question, "answer": answer, "prompt": prompt, "chat": chat,
                "prompt_tokens": inputs["input_ids"][0].tolist(), "full_tokens": whole["input_ids"][0].tolist(),
                "chat_tokens": chat_ids, "labels": [i if l else -100 for i, l in zip(chat_ids, learned)],
                "generated": generated.sequences[0, inputs["input_ids"].shape[1]:].tolist(),
                "smallest_margin": margin, "words": [{"word": w, "rows": rows} for w, rows in words],
            }
            tensors[f"{label}.logits"] = (logits if label == "tiny" else logits[-6:]).float().contiguous()
            if names:
                with torch.no_grad():
                    features = model.model.get_image_features(inputs["pixel_values"], inputs["pixel_attention_mask"])
                features = torch.cat(features.pooler_output)
                tensors[f"{label}.features"] = features[:: max(1, len(features) // 24)].float().contiguous()
            if len(names) == 1:
                columns = global_columns(entry["full_tokens"], tok, shape["tokens"])
                maps = torch.stack([word_maps(a[0].float(), words, columns, side) for a in out.attentions])
                tensors[f"{label}.maps"] = maps.contiguous()  # [layers, heads, words, side, side]
                if label == "wide":
                    tensors[f"{label}.mean"] = resize(maps).mean((0, 1)).contiguous()  # [words, 32, 32]
            cases["cases"].append(entry)
            print(name, label, "tokens", len(entry["prompt_tokens"]), "logits", float(logits.abs().max()), "margin",
                  margin, "learned", tok.decode([i for i, l in zip(chat_ids, learned) if l]))
        # A padded batch: samples of unlike lengths and tile counts in one forward.
        picked = [CASES[0], CASES[2]]
        chats = [processor.apply_chat_template(messages(1, q, a)) for _, _, q, a in picked]
        batch = processor(images=[[picture(c[1][0])] for c in picked], text=chats, padding=True, padding_side="right",
                          add_special_tokens=False, return_tensors="pt")
        rows = [next(e for e in cases["cases"] if e["name"] == c[0])["labels"] for c in picked]
        width = batch["input_ids"].shape[1]
        labels = torch.tensor([r + [-100] * (width - len(r)) for r in rows])
        with torch.no_grad():
            out = model(**batch)
            loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        cases["batch"] = {"cases": [c[0] for c in picked], "loss": float(loss)}
        (OUT / name / "expected.json").write_text(json.dumps(cases))
        save_file(tensors, OUT / name / "expected.safetensors")
    print(sum(f.stat().st_size for f in OUT.rglob("*") if f.is_file()), "bytes")


if __name__ == "__main__":
    main()
