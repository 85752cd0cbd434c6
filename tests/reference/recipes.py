"""Configurations of the models in models/recipes/, with the number of their weights as transformers counts them.

Versions: torch 2.15.0, transformers 5.23.0.
Run:      python tests/reference/recipes.py        (writes tests/reference/recipes/)

A directory per model, with config.json and preprocessor_config.json of the published values, written by transformers,
and no weights; parameters.json has how many weights each model has and how many tensors they are in, counted on the
meta device.
"""

import json
from pathlib import Path

import torch
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, MllamaConfig, MllamaForConditionalGeneration
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

OUT = Path(__file__).resolve().parent / "recipes"


def smolvlm(text, vision, scale_factor, vocabulary, image_token, tile, longest):
    """SmolVLM of 2024 and January 2025: the class and `model_type` of Idefics3; `intermediate_size` and the number of
    picture layers stand in the published files only where they are not the defaults."""
    config = Idefics3Config(
        text_config=dict(model_type="llama", head_dim=64, rms_norm_eps=1e-5, vocab_size=vocabulary, pad_token_id=2,
                         tie_word_embeddings=False, dtype="bfloat16", **text),
        vision_config=vision, scale_factor=scale_factor, image_token_id=image_token, tie_word_embeddings=False,
        dtype="bfloat16")
    processor = Idefics3ImageProcessorPil(size={"longest_edge": longest}, max_image_size={"longest_edge": tile})
    return config, Idefics3ForConditionalGeneration, processor


def small(text):
    """256M and 500M: SigLIP base of 512 pixels, 64 tokens a tile."""
    vision = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=512,
                  patch_size=16)
    text |= dict(max_position_embeddings=8192, rope_theta=100_000.0)
    return smolvlm(text, vision, 4, 49_280, 49_190, 512, 2048)


def models():
    yield "SmolVLM-256M-Instruct", small(dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3))
    yield "SmolVLM-500M-Instruct", small(dict(
        hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5))
    # SigLIP so400m of 384 pixels, 27 x 27 patches, 81 tokens a tile.
    yield "SmolVLM-Instruct", smolvlm(
        dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32,
             num_key_value_heads=32, max_position_embeddings=16_384, rope_theta=273_768.0),
        dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384,
             patch_size=14), 3, 49_155, 49_153, 384, 1536)
    rope = dict(rope_type="llama3", rope_theta=500_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=8192)
    config = MllamaConfig(
        text_config=dict(vocab_size=128_256, hidden_size=4096, num_hidden_layers=40, num_attention_heads=32,
                         num_key_value_heads=8, intermediate_size=14_336, rms_norm_eps=1e-5, rope_parameters=rope,
                         max_position_embeddings=131_072, cross_attention_layers=[3, 8, 13, 18, 23, 28, 33, 38],
                         eos_token_id=[128_001, 128_008, 128_009], dtype="bfloat16"),
        vision_config=dict(hidden_size=1280, num_hidden_layers=32, num_global_layers=8, attention_heads=16,
                           intermediate_size=5120, vision_output_dim=7680, image_size=560, patch_size=14,
                           max_num_tiles=4, intermediate_layers_indices=[3, 7, 15, 23, 30], dtype="bfloat16"),
        image_token_index=128_256, dtype="bfloat16")
    processor = MllamaImageProcessorPil(
        size={"height": 560, "width": 560}, max_image_tiles=4,
        image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])
    yield "Llama-3.2-11B-Vision-Instruct", (config, MllamaForConditionalGeneration, processor)


def main():
    counts = {}
    for name, (config, model, processor) in models():
        with torch.device("meta"):
            tensors = model(config).state_dict()
        counts[name] = {"parameters": sum(t.numel() for t in tensors.values()), "tensors": len(tensors)}
        config.architectures = [model.__name__]
        config.save_pretrained(OUT / name)
        processor.save_pretrained(OUT / name)
    (OUT / "parameters.json").write_text(json.dumps(counts, indent=2) + "\n")
    print(json.dumps(counts, indent=2))


if __name__ == "__main__":
    main()
