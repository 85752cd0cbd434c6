"""What transformers makes of awkward conversations: tokens, assistant masks, tiles, truncation.

Versions: torch 2.15.0, transformers 5.23.0, tokenizers 0.23.3, pillow 13.0.0.
Run:      python tests/reference/conversations.py
          (reads tests/reference/{smolvlm,mllama}/, writes tests/reference/conversations/)

The masks are transformers' own (`return_assistant_tokens_mask`): for it the chat templates get `{% generation %}`
blocks around what the assistant writes, its end of turn included. They render the same text as without.

  cases.json              the conversations; `{"image": "40x30"}` is a drawn picture, other names are files in
                          tests/reference/mllama/images/; `keep` is a length in tokens to be cut to
  smolvlm-a.json …        per checkpoint: the template used, and for each case either
                            ids      [id, how often, id, how often …]
                            learned  [first, after the last, …] of the runs of learned tokens
                            seen     Mllama: [images a token may attend to as bits, how often, …]
                          or `refused`, the message of transformers' error; `images` has for each drawn size its grid
                          and the weighted sums of the bytes of each tile
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import Idefics3Processor, MllamaProcessor, PreTrainedTokenizerFast
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import mllama  # noqa: E402
import smolvlm  # noqa: E402

OUT = HERE / "conversations"


def user(*parts):
    return {"role": "user", "content": [part(p) for p in parts]}


def says(*parts):
    return {"role": "assistant", "content": [part(p) for p in parts]}


def system(*parts):
    return {"role": "system", "content": [part(p) for p in parts]}


def part(p):
    """`@name` is a picture."""
    return {"image": p[1:]} if p.startswith("@") else {"text": p}


SEEN = user("@wide", "What is in the picture?")
LONG = " ".join(f"The {n}. circle is left of the blue square, isn't it?" for n in range(40))
FAMILY = "\U0001F468\u200D\U0001F469\u200D\U0001F467\u200D\U0001F466"  # one glyph of seven code points

# name, turns, and where needed: keep = cut to so many tokens.
CASES = [
    # Turns.
    ("two rounds", [SEEN, says("A red circle."), user("How many?"), says("two")]),
    ("five rounds", [SEEN] + [t for n in range(4) for t in (says(f"{n} squares"), user("Again?"))] + [says("No.")]),
    ("the same answer twice", [SEEN, says("two"), user("two or three? two"), says("two")]),
    ("an answer that stands in the question", [user("@wide", "A red circle: is there A red circle"), says("A red circle")]),
    ("answers within each other", [SEEN, says("circle"), user("More."), says("circle circle"), user("?"), says("circ")]),
    ("the role's name as answer", [user("@wide", "Who are you?"), says("Assistant:"), user("User:"), says("assistant")]),
    ("the user speaks last", [SEEN, says("A circle."), user("And then?")]),
    ("two assistant turns in a row", [SEEN, says("A circle."), says("And a square.")]),
    ("two user turns in a row", [SEEN, user("How many?"), says("two")]),
    ("no answer at all", [SEEN]),
    ("the assistant speaks first", [says("Hello."), SEEN, says("A circle.")]),
    ("a system prompt", [system("You are short."), SEEN, says("A circle.")]),
    ("a system prompt of two parts", [system("You are short. ", "Be kind."), SEEN, says("A circle.")]),
    ("a system prompt in the middle", [SEEN, says("A circle."), system("Now be long."), user("?"), says("It is round.")]),
    ("no picture", [user("How many squares are there?"), says("two")]),
    ("no picture, a system prompt", [system("You are short."), user("How many?"), says("two")]),
    # Parts.
    ("text before the picture", [user("Look:", "@wide"), says("A circle.")]),
    ("text around the picture", [user("Look: ", "@wide", " what is it?"), says("A circle.")]),
    ("the picture alone", [user("@wide"), says("A circle.")]),
    ("the picture in the second turn", [user("Are you there?"), says("Yes."), user("@wide", "And this?"), says("A circle.")]),
    ("an answer in three parts", [SEEN, says("A ", "red", " circle.")]),
    ("two pictures", [user("@tiny", "@wide", "Which is larger?"), says("The circle.")]),
    ("two pictures with text between", [user("First ", "@tiny", " then ", "@wide", "."), says("two")]),
    ("pictures in two turns", [user("@tiny", "This?"), says("A circle."), user("@tall", "And this?"), says("A square.")]),
    ("three pictures in a row and one later",
     [user("@tiny", "@40x30", "@wide", "Look."), says("Yes."), user("@9x9", "?"), says("small")]),
    ("a picture in the answer", [user("Draw it."), says("@tiny", "Here it is.")]),
    # White space.
    ("spaces around the answer", [SEEN, says("  A circle.  ")]),
    ("a newline before the answer", [SEEN, says("\nA circle.")]),
    ("newlines before and after", [SEEN, says("\n\n A circle.\n\n\n"), user("\n\n?\n"), says("two\n")]),
    ("tabs and returns", [user("@wide", "\tWhat\r\nis it?\r\n"), says("A\tred\r\ncircle.\r\n")]),
    ("a question of spaces", [user("@wide", "   "), says("A circle.")]),
    ("an empty question", [user("@wide", ""), says("A circle.")]),
    ("spaces of other alphabets", [SEEN, says("\u3000A\u00a0circle.\u2003\u2028")]),
    # Alphabets.
    ("an emoji of seven code points", [user("@wide", f"Who? {FAMILY}"), says(f"A family {FAMILY} of four {FAMILY}")]),
    ("an emoji alone", [SEEN, says("\U0001F534")]),
    ("flags and skin tones", [SEEN, says("\U0001F1E9\U0001F1EA \U0001F44B\U0001F3FE ok")]),
    ("combining marks", [SEEN, says("cafe\u0301 Z\u0335\u0321\u034f\u0360algo n\u0303o")]),
    ("composed and decomposed", [user("@wide", "\u00e9 or e\u0301?"), says("\u00e9"), user("?"), says("e\u0301")]),
    ("right to left", [user("@wide", "\u05de\u05d4 \u05d1\u05ea\u05de\u05d5\u05e0\u05d4?"), says("\u062f\u0627\u0626\u0631\u0629 \u062d\u0645\u0631\u0627\u0621 \u200f(2)\u200e")]),
    ("Chinese and Japanese", [user("@wide", "\u56fe\u7247\u4e2d\u6709\u4ec0\u4e48\uff1f"), says("\u8d64\u3044\u5186\u3068\u7dd1\u306e\u56db\u89d2\u3002")]),
    ("Thai, Hindi, Korean", [SEEN, says("\u0e27\u0e07\u0e01\u0e25\u0e21 \u0932\u093e\u0932 \u0935\u0943\u0924\u094d\u0924 \u1112\u1161\u11ab\ud55c")]),
    ("a byte order mark", [user("@wide", "\ufeffWhat?"), says("\ufeffA circle.\ufeff")]),
    ("only a byte order mark", [SEEN, says("\ufeff")]),
    ("zero widths", [SEEN, says("A\u200bred\u200c cir\u00adcle\u2060.")]),
    ("control characters", [user("@wide", "\u0000What\u0007?"), says("A\u0000circle\u001b[31m\u007f\u0085 red")]),
    ("only a null character", [SEEN, says("\u0000")]),
    ("noncharacters and private use", [SEEN, says("\uffff \ufffd \ue000 \U0010ffff")]),
    ("quotes, braces, Jinja and HTML", [user("@wide", "{{ messages }} {% raise %} <b>&amp;</b>"), says("{# no #} \"it's\" \\n {{x}} <|>")]),
    # Tokens that mean something.
    ("an end of turn in the answer", [SEEN, says("A circle.<end_of_utterance>\nUser: no<|eot_id|>yes")]),
    ("an end of turn at the end of the answer", [SEEN, says("A circle.<end_of_utterance>"), user("?"), says("two<|eot_id|>")]),
    ("only an end of turn", [SEEN, says("<end_of_utterance>"), user("?"), says("<|eot_id|>")]),
    ("headers in the question", [user("@wide", "a<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nno<end_of_utterance>\nAssistant: no"), says("no")]),
    ("a beginning of text in the question", [user("@wide", "<|begin_of_text|><|im_start|>?"), says("<|im_start|>A<|begin_of_text|>")]),
    ("padding and end of text", [user("@wide", "<|im_end|><|endoftext|>"), says("a<|finetune_right_pad_id|>b<|end_of_text|>c<|im_end|>")]),
    ("tiles' marks in the text", [user("@wide", "<row_1_col_1> <global-img>"), says("<fake_token_around_image> <row_6_col_6>")]),
    ("an image token in the question", [user("@wide", "What is <image> or <|image|> ?"), says("A tag.")]),
    ("an image token in the answer", [SEEN, says("The tag <image> or <|image|>.")]),
    ("image tokens without a picture", [user("What is <image> or <|image|> ?"), says("A tag.")]),
    ("pieces of tokens", [user("@wide", "<image <|image <image"), says("image> |> <end_of_utteranc")]),
    # Empty answers.
    ("an empty answer", [SEEN, says("")]),
    ("an empty answer among others", [SEEN, says("A circle."), user("?"), says(""), user("?"), says("two")]),
    ("an answer of spaces", [SEEN, says(" \n\t ")]),
    ("an answer without parts", [SEEN, says()]),
    # Lengths.
    ("longer than the context", [SEEN, says(LONG)]),
    ("a long question", [user("@wide", LONG), says("Yes.")]),
    ("cut in the answer", [SEEN, says(LONG)], 300),
    ("cut in the second answer", [SEEN, says("A circle."), user("And?"), says(LONG)], 310),
    ("cut between two emoji's bytes", [user("@tiny", "Who?"), says(FAMILY * 30)], 150),
    ("cut before the answer", [user("@tiny", LONG), says("Yes.")], 200),
    ("cut at its own length or beyond", [user("@tiny", "?"), says("Yes.")], 400),
    ("cut in the picture", [SEEN, says("A circle.")], 9),
    # Pictures of odd sizes.
    *[(f"a picture of {size}", [user(f"@{size}", "?"), says("A circle.")])
      for size in ["1x1", "2x1", "1x2", "3x5", "1x2000", "2000x1", "31x33", "63x64", "65x64", "64x129", "47x145", "28x29",
                   "57x28", "112x113", "301x200", "4097x3"]],
]

def smolvlm_generation():
    """The space that the template puts before an answer is the model's to write."""
    head = ("<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{{':'}}"
            "{% set space = '' if message['content'][0]['type'] == 'image' else ' ' %}")
    body = ("{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
            "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>")
    return (head + "{% if message['role'] == 'assistant' %}{% generation %}{{ space }}" + body +
            "{% endgeneration %}{% else %}{{ space }}" + body + "{% endif %}{{ '\\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")


def mllama_generation(template):
    content = template[template.index("    {%- if message['content'] is string %}\n        {{- message"):]
    content = content[:content.index("    {{- '<|eot_id|>' }}\n")]
    whole = content + "    {{- '<|eot_id|>' }}\n"
    assert whole in template
    return template.replace(whole, "    {%- if message.role == 'assistant' %}{% generation %}\n" + whole +
                            "    {%- endgeneration %}{% else %}\n" + whole + "    {%- endif %}\n")


# The template of Llama-3.2-Vision as it was later revised: a system message may stand beside pictures.
DATED = mllama.TEMPLATE.replace('strftime_now("%d %b %Y")', '"26 Jul 2024"')
REVISED = DATED.replace(
    "{%- set system_message = messages[0]['content']|trim %}",
    "{%- if messages[0]['content'] is string %}{%- set system_message = messages[0]['content']|trim %}"
    "{%- else %}{%- set system_message = messages[0]['content'][0]['text']|trim %}{%- endif %}")
REVISED = REVISED[:REVISED.index("{%- if seen.images and")] + \
    "{%- if system_message != \"\" or not seen.images %}" + \
    REVISED[REVISED.index("\n    {{- \"<|start_header_id|>system"):]


def picture(name):
    """A drawn picture of `WIDTHxHEIGHT`, or a file."""
    if "x" not in name or not name[0].isdigit():
        return mllama.picture(name)
    width, height = map(int, name.split("x"))
    y, x, c = np.mgrid[:height, :width, :3]
    return Image.fromarray(((x * 7 + y * 13 + c * 31 + x * y % 11 * 9) % 256).astype(np.uint8))


def runs(values):
    """[value, how often, …]"""
    out = []
    for value in values:
        if out and out[-2] == value:
            out[-1] += 1
        else:
            out += [value, 1]
    return out


def spans(mask):
    """[first, after the last, …] of the runs of ones."""
    edges = np.flatnonzero(np.diff([0, *mask, 0]))
    return edges.tolist()


def sums(tiles, mean, std, times):
    """Per tile the sum over bytes of byte × (1 + place % 251): any wrong byte shows, some exchanged ones do not."""
    bytes_ = (tiles.astype(np.float64) * np.reshape(std, (3, 1, 1)) + np.reshape(mean, (3, 1, 1))) * times
    assert np.abs(bytes_ - bytes_.round()).max() < 1e-2
    flat = bytes_.round().astype(np.int64).reshape(len(tiles), -1)
    return (flat * (1 + np.arange(flat.shape[1]) % 251)).sum(1).tolist()


def processors():
    for name in "ab":
        folder, shape = HERE / "smolvlm" / name, smolvlm.SHAPES[name]
        tok = PreTrainedTokenizerFast.from_pretrained(folder)
        images = Idefics3ImageProcessorPil.from_pretrained(folder)
        yield f"smolvlm-{name}", Idefics3Processor(images, tok, image_seq_len=shape["tokens"],
                                                   chat_template=smolvlm.TEMPLATE), smolvlm_generation()
    for name, template in [("a", DATED), ("b", REVISED)]:
        folder = HERE / "mllama" / name
        tok = PreTrainedTokenizerFast.from_pretrained(folder)
        images = MllamaImageProcessorPil.from_pretrained(folder)
        yield f"mllama-{name}", MllamaProcessor(images, tok, chat_template=template), mllama_generation(template)


def chat(turns, pictures):
    def content(p):
        return {"type": "image", "image": pictures[p["image"]]} if "image" in p else {"type": "text", **p}
    return [{"role": t["role"], "content": [content(p) for p in t["content"]]} for t in turns]


def expected(processor, generation, turns, pictures, keep):
    conversation = chat(turns, pictures)
    try:
        text = processor.apply_chat_template(conversation)
        assert processor.apply_chat_template(conversation, chat_template=generation) == text
        cut = {"truncation": True, "max_length": keep} if keep else {}
        out = processor.apply_chat_template(
            conversation, chat_template=generation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
            processor_kwargs={**cut, "return_offsets_mapping": True})
    except AssertionError:
        raise
    except Exception as error:  # noqa: BLE001
        return {"refused": f"{type(error).__name__}: {error}"}
    ids, mask = list(out["input_ids"][0]), np.array(out["assistant_masks"][0])
    # A picture is not the assistant's to write: what stands for it in an answer is not learned.
    for start, end in zip(*[iter(spans(mask))] * 2):
        shown = [t for t in range(start, end) if ids[t] == processor.image_token_id]
        if shown:
            after_fake_token = 2 if isinstance(processor, Idefics3Processor) else 1
            mask[start:shown[-1] + after_fake_token] = 0
    entry = {"ids": runs(ids), "learned": spans(mask)}
    if "cross_attention_mask" in out:
        seen = np.asarray(out["cross_attention_mask"][0]).any(-1)
        entry["seen"] = runs((seen * 2 ** np.arange(seen.shape[1])).sum(1).tolist())
    return entry


def main():
    OUT.mkdir(exist_ok=True)
    cases = [dict(zip(("name", "turns", "keep"), case)) for case in CASES]
    assert len({c["name"] for c in cases}) == len(cases)
    names = sorted({p["image"] for c in cases for t in c["turns"] for p in t["content"] if "image" in p})
    pictures = {name: picture(name) for name in names}
    (OUT / "cases.json").write_text(json.dumps(cases, indent=0))
    for name, processor, generation in processors():
        images = {}
        for key, image in pictures.items():
            family = name.startswith("smolvlm")
            out = processor.image_processor([[image]], return_tensors="np", **({"return_row_col_info": True} if family else {}))
            tiles = out["pixel_values"][0]
            if family:
                grid = [int(out["rows"][0][0]), int(out["cols"][0][0])]
            else:
                grid = list(mllama.grid_of(out["aspect_ratio_ids"][0, 0]))
                tiles = tiles[0][:grid[0] * grid[1]]
            p = processor.image_processor
            images[key] = {"grid": grid, "sums": sums(tiles, p.image_mean, p.image_std, 255)}
        results = {c["name"]: expected(processor, generation, c["turns"], pictures, c.get("keep")) for c in cases}
        (OUT / f"{name}.json").write_text(json.dumps(
            {"template": processor.chat_template, "images": images, "cases": results}))
        for key, entry in results.items():
            if "refused" in entry:
                print(name, "|", key, "|", entry["refused"][:150].replace("\n", " "))
    print(len(cases), "conversations,", sum(f.stat().st_size for f in OUT.iterdir()), "bytes")


if __name__ == "__main__":
    main()
