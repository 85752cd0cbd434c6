#!/usr/bin/env python3
"""The easy-VQA data set as LLaVA files.

    python3 scripts/easy_vqa.py easy-vqa out [--words circle,triangle,red,green,blue,yellow]
    lavender-wgpu data check --data out/train.json --images easy-vqa
    lavender-wgpu targets --diffusion DIR --data out/train-captions.json --images easy-vqa --out targets

`easy-vqa` is the published folder: `{train,test}/questions.json` of [question, answer, image number] and
`{train,test}/images/NUMBER.png`; the official split is kept. Written are, for each split,

- `SPLIT.json`: a sample for each question, answered as in the set;
- `SPLIT-captions.json`: a sample for each image, its caption made of the shape and colour that the image's own
  questions and answers tell ("a blue rectangle", "a circle", "something red"). Targets made of them are found by the
  image's file name, so each image is given to the teacher once. With `--words`, only words that the teacher knows are
  said, and images of which nothing is left are left out.
"""

import argparse
import json
from pathlib import Path

PROMPT = "Describe the image in a single sentence as a caption."
SHAPES = ["circle", "rectangle", "triangle"]
COLOURS = ["black", "blue", "brown", "gray", "green", "red", "teal", "yellow"]


def sample(id, image, question, answer):
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": id, "image": image, "conversations": turns}


def told(question, answer):
    """The words that a question with its answer says are in the image."""
    words = question.rstrip("?").split()
    named = [word for word in words if word in SHAPES + COLOURS]
    if answer not in ("yes", "no"):
        return [*named, answer]
    denied = "not" in words or "no" in words
    return named if (answer == "yes") != denied else []


def caption(words, known):
    shape = next((w for w in SHAPES if w in words and w in known), None)
    colour = next((w for w in COLOURS if w in words and w in known), None)
    if shape and colour:
        return f"a {colour} {shape}"
    return f"a {shape}" if shape else f"something {colour}" if colour else None


def convert(source, split, out, known):
    rows = json.loads((source / split / "questions.json").read_text(encoding="utf-8"))
    questions, seen = [], {}
    for number, (question, answer, image) in enumerate(rows):
        questions.append(sample(f"{split}-{number:05}", f"{split}/images/{image}.png", question, answer))
        seen.setdefault(image, set()).update(told(question, answer))
    captions = []
    for image, words in sorted(seen.items()):
        for kind in (SHAPES, COLOURS):
            if sum(word in kind for word in words) > 1:
                raise SystemExit(f"{split} image {image}: told to be {sorted(words)}, expected one shape and one colour")
        if text := caption(words, known):
            captions.append(sample(f"{split}-image-{image}", f"{split}/images/{image}.png", PROMPT, text))
    for name, samples in ((split, questions), (f"{split}-captions", captions)):
        (out / f"{name}.json").write_text(json.dumps(samples, indent=1), encoding="utf-8")
    with_word = sum(row[1] in known for row in rows)
    print(f"{split}: {len(questions)} questions, {with_word} answered by a word with targets; "
          f"{len(captions)} captions of {len(seen)} images")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the published folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--words", default=",".join(SHAPES + COLOURS), help="the words that captions may say")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        convert(args.source, split, args.out, args.words.split(","))


if __name__ == "__main__":
    main()
