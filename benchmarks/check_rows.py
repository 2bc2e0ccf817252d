"""Time of `eightgig check` on a clean file, from starting the command to its last line.

`python benchmarks/check_rows.py --turns 3` writes 10,000 conversations of so many turns, runs the
command on them with a tokenizer as large as Gemma's (or that of `--model`), and prints one JSON
line for benchmarks/data_results.jsonl. The chat template is not one of those that are trusted, so
rows are rendered in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from prepare_rows import describe_machine, read_words
from wide_tokenizer import make_wide_tokenizer

from eightgig.data.tokenizer import load_tokenizer

_QUESTION_WORDS = (10, 80)
_ANSWER_WORDS = (40, 200)


def make_rows(count: int, turns: int) -> Iterator[str]:
    random = np.random.default_rng(11)
    words = np.array(read_words())
    for number in range(count):
        messages = []
        for turn in range(turns):
            for role, limits in (("user", _QUESTION_WORDS), ("assistant", _ANSWER_WORDS)):
                text = " ".join(random.choice(words, int(random.integers(*limits))))
                text = f"{number}.{turn}: {text}" if role == "user" else text
                messages.append({"role": role, "content": text})
        yield json.dumps({"messages": messages}) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--model", type=Path, help="folder of a model, for its tokenizer")
    parser.add_argument("--machine", help="what to call this machine")
    options = parser.parse_args()
    tokenizer = make_wide_tokenizer() if options.model is None else load_tokenizer(options.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model"
        tokenizer.save_pretrained(model)
        (model / "config.json").write_text('{"model_type": "llama"}', "utf-8")
        path = folder / "rows.jsonl"
        path.write_text("".join(make_rows(options.rows, options.turns)), "utf-8")
        settings = {
            "model": {"name": str(model), "cache_dir": str(folder / "cache")},
            "data": {"path": str(path)},
        }
        config = folder / "config.yaml"
        config.write_text(json.dumps(settings), "utf-8")
        start = time.monotonic()
        command = [sys.executable, "-m", "eightgig", "check", str(config), "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        seconds = time.monotonic() - start
    report = json.loads(done.stdout)
    measured = {
        "what": "check",
        "rows": options.rows,
        "turns": options.turns,
        "tokens": report["summary"]["tokens"],
        "vocabulary": len(tokenizer),
        "findings": len(report["findings"]),
        "seconds": round(seconds, 1),
        **describe_machine(options.machine),
    }  # fmt: skip
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
