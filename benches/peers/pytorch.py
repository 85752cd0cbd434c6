#!/usr/bin/env python3
"""lavender-wgpu's benchmark and PyTorch's on the same machine, one after the other, and the ratio of each figure.

    python benches/peers/pytorch.py [--program target/release/lavender-wgpu] [--what kernels unet train] [--threads N]
        [--device cpu|cuda] [--precision f32|f16] [--batch N] [--json FILE]

On a GPU `--device cuda --precision f16 --batch 2` measures all that the targets at the end name. Needs torch; `unet` also diffusers, `train` transformers and peft. The kernels' statements come from the program's own
report, so both sides compute the same shapes. Ratios are PyTorch's median time over ours: 1 is as fast, 0.2 five times
slower. Where both run on the CPU, the last column is the ratio of CPU time: a busy machine distorts it less than the clock,
and both load averages are printed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def timed(torch, f, device, seconds):
    def once():
        start = time.perf_counter()
        f()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    times, end, cpu = [], time.time() + seconds, time.process_time()
    while time.time() < end or len(times) < 3:
        times.append(once())
    return {"median_ms": statistics.median(times) * 1e3, "cpu_ms": (time.process_time() - cpu) * 1e3 / len(times)}


def kernels(torch, report, device, seconds):
    import torch.nn.functional as F

    for kernel in report["kernels"]:
        if kernel.get("pytorch"):
            setup, statement = kernel["pytorch"]
            scope = {"torch": torch, "F": F}
            exec(setup, scope)
            run = eval(f"lambda: {statement}", scope)
            yield kernel["name"], kernel, timed(torch, run, device, seconds)


def unets(torch, report, device, seconds):
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
    ).eval()
    for row in report["unet"]:
        if row["capture"]:
            continue
        half = row["dtype"] == "f16" and device == "cuda"
        model = model.to(torch.float16 if half else torch.float32)
        dtype = next(model.parameters()).dtype
        x = torch.rand(row["batch"], 4, row["side"], row["side"], dtype=dtype)
        text = torch.rand(row["batch"], 77, 768, dtype=dtype)
        with torch.no_grad():
            mine = timed(torch, lambda: model(x, 261, encoder_hidden_states=text), device, seconds)
        yield f"U-Net {row['side']}², batch {row['batch']}, {row['dtype']} (PyTorch {dtype})", row, mine


def steps(torch, report, device, seconds, half=False):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49280, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, rope_theta=1e5, tie_word_embeddings=True, attn_implementation="sdpa",
    )
    for row in report["training"]:
        if not row["setting"].startswith("text"):
            continue
        model = LlamaForCausalLM(config)
        if half and row["setting"] == "text-lora":
            model = model.to(torch.float16)
        if row["setting"] == "text-lora":
            model = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"]))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        ids = torch.randint(0, 40000, (1, row["tokens"]))
        labels = ids.clone()
        labels[:, :-32] = -100

        def step():
            with torch.autocast(device, torch.float16, enabled=half):
                loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()

        yield f"training step, SmolLM2-135M, {row['setting']}", row, timed(torch, step, device, seconds)


def share(rows, report):
    """What the project holds itself to on a GPU, and what was measured."""
    peak = report["peak"]["gflops"]
    ratio = {row["name"]: row["ratio"] for row in rows}
    kernels = {kernel["name"]: kernel["gflops"] / peak for kernel in report["kernels"]}
    targets = [
        ("f16 product 4096³ to the vendor's", 0.45, ratio.get("matmul 4096×4096×4096 a f16 b f16")),
        ("f32 product 4096³ to the adapter's multiply-adds", 0.40, kernels.get("matmul 4096×4096×4096 a f32 b f32")),
    ]
    targets += [(f"{name} to PyTorch", 1 / 3, r) for name, r in ratio.items() if "U-Net 64²" in name or "step" in name]
    print("\nat least   measured")
    for name, least, found in targets:
        if found is not None:
            print(f"{least:8.2f} {found:10.2f}  {name}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", nargs="+", default=["target/release/lavender-wgpu"])
    parser.add_argument("--what", nargs="+", choices=["kernels", "unet", "train"], default=["kernels", "unet", "train"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["f32", "f16"], default="f32")
    parser.add_argument("--batch", type=int, default=1, help="samples of the U-Net")
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--filter", action="append", default=[])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows, whole = [], {"kernels": []}
    import torch

    torch.set_num_threads(args.threads)
    torch.set_default_device(args.device)
    print(f"PyTorch {torch.__version__} on {args.device}, {args.threads} threads")
    for what, peer in (("kernels", kernels), ("unet", unets), ("train", steps)):
        if what not in args.what:
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "report.json"
            filters = [part for text in args.filter for part in ("--filter", text)] if what == "kernels" else []
            command = [*args.program, "bench", what, "--seconds", str(args.seconds), "--json", str(out), *filters]
            command += ["--precision", args.precision, "--batch", str(args.batch)]
            before = os.getloadavg()[0]
            if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
                sys.exit(f"failed: {' '.join(command)}")
            report = json.loads(out.read_text())
        whole["peak"] = report["peak"]
        whole["kernels"] += report["kernels"]
        print(f"\n{report['tier']['name']} [{report['tier']['driver']}]; load before {before:.1f}")
        print(f"{'':60} {'ours ms':>10} {'PyTorch':>10}  ratio  by CPU time")
        more = {"half": True} if what == "train" and args.precision == "f16" and args.device == "cuda" else {}
        for name, ours, theirs in peer(torch, report, args.device, args.seconds, **more):
            row = {"name": name, "ours_ms": ours["median_ms"], "pytorch_ms": theirs["median_ms"]}
            row["ratio"] = row["pytorch_ms"] / row["ours_ms"]
            by_cpu = ""
            if args.device == "cpu" and report["tier"]["cpu"] and ours.get("cpu_ms"):
                row["cpu_ratio"] = theirs["cpu_ms"] / ours["cpu_ms"]
                by_cpu = f" {row['cpu_ratio']:12.3f}"
            rows.append(row)
            print(f"{name:60} {row['ours_ms']:10.3f} {row['pytorch_ms']:10.3f} {row['ratio']:6.3f}{by_cpu}", flush=True)
        print(f"load after {os.getloadavg()[0]:.1f}")
    if args.device == "cuda":
        share(rows, whole)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
