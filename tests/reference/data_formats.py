"""Writes tests/reference/formats: the same few samples in every format, by the libraries that people write them with.

    pip install pyarrow datasets webdataset pillow numpy
    python tests/reference/data_formats.py
"""

import io
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from PIL import Image

ROOT = Path(__file__).parent / "formats"
PROMPT = "Describe the image in a single sentence as a caption."
CAPTIONS = [
    ["a red cat", "a cat, red"],
    ["zwei Hunde – größer als 3", "two dogs"],
    ["猫と犬", "a cat and a dog 🐶"],
    ['a "quoted" sign', "a sign"],
    ["the last one", "one"],
]
N = len(CAPTIONS)
IDS = [f"s{i}" for i in range(N)]
SPLITS = ["train", "train", "val", "test", "train"]


def png(i):
    rng = np.random.default_rng(i)
    pixels = rng.integers(0, 256, (5 + i, 7, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


PNG = [png(i) for i in range(N)]


def chat(i):
    """Two questions and answers, as messages."""
    return [
        {"role": "user", "content": f"<image>\nWhat is it, {i}?"},
        {"role": "assistant", "content": CAPTIONS[i][0]},
        {"role": "user", "content": "In other words?"},
        {"role": "assistant", "content": CAPTIONS[i][1]},
    ]


def llava(messages):
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names[m["role"]], "value": m["content"]} for m in messages]


def caption(i):
    return [
        {"role": "user", "content": f"<image>\n{PROMPT}"},
        {"role": "assistant", "content": CAPTIONS[i][0]},
    ]


def save(name, value):
    (ROOT / name).write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def hf(name, columns, rows_per_group=2, **options):
    """A parquet file as `push_to_hub` and `to_parquet` write it: images as structs, features in the metadata."""
    features = {key: datasets.Image() for key in ("image",) if key in columns}
    data = datasets.Dataset.from_dict(columns)
    for key, feature in features.items():
        data = data.cast_column(key, feature)
    data.to_parquet(ROOT / name, batch_size=rows_per_group, **options)


def main():
    shutil.rmtree(ROOT, ignore_errors=True)
    (ROOT / "images").mkdir(parents=True)
    for i in range(N):
        (ROOT / f"images/{IDS[i]}.png").write_bytes(PNG[i])
    entry = lambda i, messages: {"id": IDS[i], "image": f"images/{IDS[i]}.png", "conversations": llava(messages)}
    # What every other file is compared with.
    save("captions.json", [entry(i, caption(i)) for i in range(N)])
    save("chat.json", [entry(i, chat(i)) for i in range(N)])
    with open(ROOT / "chat.jsonl", "w", encoding="utf-8") as f:
        for i in range(N):
            row = {"id": IDS[i], "image": f"images/{IDS[i]}.png", "messages": chat(i)}
            f.write(json.dumps(row, ensure_ascii=False) + "\n")

    # datasets: struct {bytes, path}
    stored = [{"bytes": PNG[i], "path": f"{IDS[i]}.png"} for i in range(N)]
    first = [c[0] for c in CAPTIONS]
    hf("chat.parquet", {"id": IDS, "image": stored, "messages": [chat(i) for i in range(N)], "score": [0.5] * N})
    hf("caption.parquet", {"id": IDS, "image": stored, "caption": first})
    hf("captions.parquet", {"image": stored, "filename": [f"{i}.png" for i in IDS], "captions": CAPTIONS, "split": SPLITS})
    # pyarrow: plain bytes, paths, a list of one image with pairs of texts, other compressions, dictionaries
    required = [pa.field("id", pa.string()), pa.field("image", pa.binary(), nullable=False), pa.field("text", pa.string())]
    table = pa.table({"id": IDS, "image": pa.array(PNG, pa.binary()), "text": first}, schema=pa.schema(required))
    pq.write_table(table, ROOT / "bytes.parquet", row_group_size=3, compression="zstd", data_page_version="2.0")
    table = pa.table({"id": IDS, "image": [f"images/{i}.png" for i in IDS], "text": first})
    pq.write_table(table, ROOT / "path.parquet", compression="lz4")
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pairs = [
        [{"user": f"What is it, {i}?", "assistant": CAPTIONS[i][0]}, {"user": "In other words?", "assistant": CAPTIONS[i][1]}]
        for i in range(N)
    ]
    table = pa.table({
        "id": IDS,
        "images": pa.array([[{"bytes": PNG[i], "path": None}] for i in range(N)], pa.list_(picture)),
        "texts": pairs,
    })
    pq.write_table(table, ROOT / "pairs.parquet", row_group_size=2, compression="none", write_page_index=True)
    # datasets' older way to store a list of structs: a struct of lists
    columns = {"from": ["human", "gpt"], "value": None}
    turns = [{**columns, "value": [f"<image>\n{PROMPT}", CAPTIONS[i][0]]} for i in range(N)]
    table = pa.table({"id": IDS, "image": pa.array(stored, picture), "conversations": turns})
    pq.write_table(table, ROOT / "lists.parquet", use_dictionary=True)
    # questions with one answer or several
    table = pa.table({
        "image": pa.array(stored[:3], picture),
        "question": ["what?", "how many?", "which?"],
        "answers": [["cat", "dog", "dog"], ["2", "two"], ["left"]],
    })
    pq.write_table(table, ROOT / "answers.parquet")
    # a row whose bytes are null: its path counts
    table = pa.table({
        "id": IDS[:2],
        "image": pa.array([{"bytes": None, "path": "images/s0.png"}, {"bytes": PNG[1], "path": None}], picture),
        "caption": first[:2],
    })
    pq.write_table(table, ROOT / "null_bytes.parquet")

    # what is to be refused: nothing to say, no image, a path out of the folder, a text that unpacks to 80 MB
    pq.write_table(pa.table({"id": IDS, "image": pa.array(stored, picture), "score": [1] * N}), ROOT / "bad_texts.parquet")
    pq.write_table(pa.table({"image": list(range(N)), "caption": first}), ROOT / "bad_image.parquet")
    pq.write_table(pa.table({"image": pa.array(stored, picture), "caption": list(range(N))}), ROOT / "bad_caption.parquet")
    pq.write_table(pa.table({"image": ["../../etc/x.png"], "caption": ["a"]}), ROOT / "bad_path.parquet")
    two = pa.array([[stored[0], stored[1]]], pa.list_(picture))
    pq.write_table(pa.table({"images": two, "caption": ["a"]}), ROOT / "bad_two.parquet")
    table = pa.table({"image": ["x.png"], "caption": [" " * 80_000_000]})
    pq.write_table(table, ROOT / "bad_bomb.parquet", compression="zstd", use_dictionary=False, write_statistics=False)

    # shards of two splits in the layout of the hub
    (ROOT / "hub/data").mkdir(parents=True)
    row = lambda i: {"id": [IDS[i]], "image": [stored[i]], "caption": [first[i]]}
    for name, i in [("train-00000-of-00002", 0), ("train-00001-of-00002", 1), ("test-00000-of-00001", 2)]:
        hf(f"hub/data/{name}.parquet", row(i))

    # WebDataset: captions as .txt, conversations as .json, over two shards
    (ROOT / "wds").mkdir()
    for shard, members in enumerate([range(3), range(3, N)]):
        with webdataset.TarWriter(str(ROOT / f"wds/captions-{shard:03}.tar")) as tar:
            for i in members:
                tar.write({"__key__": IDS[i], "png": PNG[i], "txt": CAPTIONS[i][0]})
    with webdataset.TarWriter(str(ROOT / "wds-chat.tar")) as tar:
        for i in range(N):
            tar.write({"__key__": IDS[i], "png": PNG[i], "json": {"conversations": llava(chat(i))}})

    # a folder with texts beside its images
    (ROOT / "folder").mkdir()
    for i in range(N):
        (ROOT / f"folder/{IDS[i]}.png").write_bytes(PNG[i])
        if i % 2 == 0:
            (ROOT / f"folder/{IDS[i]}.txt").write_text(CAPTIONS[i][0] + "\n", encoding="utf-8")
        else:
            save(f"folder/{IDS[i]}.json", {"caption": CAPTIONS[i][0], "width": 7})

    # Karpathy's JSON
    images = [
        {
            "filename": f"{IDS[i]}.png",
            "imgid": i,
            "split": SPLITS[i],
            "sentids": [2 * i, 2 * i + 1],
            "sentences": [
                {"raw": text, "tokens": text.split(), "imgid": i, "sentid": 2 * i + n}
                for n, text in enumerate(CAPTIONS[i])
            ],
        }
        for i in range(N)
    ]
    (ROOT / "karpathy.json").write_text(json.dumps({"images": images, "dataset": "flickr30k"}), encoding="utf-8")


main()
