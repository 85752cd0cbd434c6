"""Whether other programs read what `lavender-wgpu eval --out DIR` writes.

Versions: pandas 2 or later.
Run:      python tests/reference/eval.py DIR

Reads the files as the two programs do (their code was read, not run): VLMEvalKit loads a result file by its
extension with pandas (`PRED_FORMAT=tsv`) and needs the columns index, question, answer, prediction and the options;
lmms-eval's model `from_log` walks a folder for `*.json` with `args`, `model_configs.task` and `logs`, and replays
`logs[i]["resps"][0][0]` by `doc_id`. The JSONL is checked against both.
"""

import json
import sys
from pathlib import Path

import pandas as pd


def main(folder):
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    frame = pd.read_csv(folder / "predictions.tsv", sep="\t", keep_default_na=False, dtype=str)
    assert {"index", "question", "answer", "prediction"} <= set(frame.columns), list(frame.columns)
    assert len(frame) == len(lines)
    by_index = {line["index"]: line for line in lines}
    for row in frame.to_dict("records"):
        line = by_index[row["index"]]
        for key in row:
            assert row[key] == (line.get(key) or ""), (row["index"], key)
    log = json.loads((folder / "lmms_eval.json").read_text())
    assert "model" in log["args"] and log["args"]["limit"] is None and log["model_configs"]["task"]
    replies = {entry["doc_id"]: entry["resps"][0][0] for entry in log["logs"]}
    assert replies == {line["doc_id"]: line["prediction"] for line in lines}
    assert all(line["filtered_resps"] == [line["prediction"]] for line in lines)
    # What pandas makes of the JSONL itself.
    assert set(frame.columns) <= set(pd.DataFrame(lines).columns) | {"category", "split"}
    print(len(lines), "predictions are read by both")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
