"""Time and memory of reading, rendering and tokenising many rows.

`python benchmarks/prepare_rows.py --rows 1000000` writes so many conversations of 100 to 2,000
tokens (evenly on a logarithmic scale), loads them twice, and prints one JSON line for
benchmarks/data_results.jsonl: seconds and tokens of the first time, seconds of the second (from the
cache), and the most anonymous memory that this process and its workers held together beyond what
this process started with. Mapped token files are not counted: they are the
page cache's. Linux alone says so much.

Without `--model` a tokenizer as large as Gemma's is made first (`benchmarks/wide_tokenizer.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import threading
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
from wide_tokenizer import make_wide_tokenizer

from eightgig.config import DataConfig
from eightgig.data.load import load_dataset
from eightgig.data.tokenizer import load_tokenizer


def read_words() -> list[str]:
    page = Path(__file__).parent.parent / "docs/explain/memory.md"
    return [word for word in page.read_text("utf-8").split() if not set(word) & set("<[{")]


def write_rows(path: Path, count: int, tokens_per_word: float) -> None:
    random = np.random.default_rng(7)
    words = read_words()
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            tokens = np.exp(random.uniform(np.log(100), np.log(2_000)))
            picked = random.integers(0, len(words), max(4, int(tokens / tokens_per_word)))
            text = [words[index] for index in picked]
            half = len(text) // 3
            row = [
                {"role": "user", "content": f"{number}: " + " ".join(text[:half])},
                {"role": "assistant", "content": " ".join(text[half:])},
            ]
            file.write(json.dumps({"messages": row}) + "\n")


class MemoryWatch:
    """The most anonymous memory that this process and those it started held at a time, in bytes."""

    def __init__(self) -> None:
        self.peak_bytes = self.num_processes = 0
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_done.set()
        self._thread.join()

    def _watch(self) -> None:
        own = psutil.Process()
        while not self._is_done.wait(0.1):
            processes = [own, *own.children(recursive=True)]
            held_bytes = sum(anonymous_bytes(process.pid) for process in processes)
            self.peak_bytes = max(self.peak_bytes, held_bytes)
            self.num_processes = max(self.num_processes, len(processes))


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that no file backs; what it shares with its forks counts in parts."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--model", type=Path, help="folder of a model, for its tokenizer")
    parser.add_argument("--machine", help="what to call this machine")
    options = parser.parse_args()
    tokenizer = make_wide_tokenizer() if options.model is None else load_tokenizer(options.model)
    words = read_words()
    per_word = len(tokenizer(" ".join(words))["input_ids"]) / len(words)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, options.rows, per_word)
        before = anonymous_bytes(os.getpid())
        seconds = []
        with MemoryWatch() as watch:
            for _ in range(2):
                start = time.monotonic()
                data = load_dataset(
                    DataConfig(path=str(path), held_out=0), tokenizer, cache_dir=Path(folder)
                )
                seconds.append(time.monotonic() - start)
        summary = data.train.summary
        measured = {
            "what": "prepare",
            "rows": options.rows,
            "file_bytes": path.stat().st_size,
            "tokens": summary["tokens"],
            "longest_tokens": summary["longest_tokens"],
            "vocabulary": len(tokenizer),
            "seconds": round(seconds[0], 1),
            "cached_seconds": round(seconds[1], 1),
            "processes": watch.num_processes,
            "anonymous_peak_bytes": watch.peak_bytes - before,
            **describe_machine(options.machine),
        }
        print(json.dumps(measured))


def describe_machine(name: str | None) -> dict[str, object]:
    """What a measurement was made on, and when."""
    return {
        "processors": psutil.cpu_count(),
        "machine": name or platform.processor() or platform.machine(),
        "versions": {library: version(library) for library in ("tokenizers", "transformers")},
        "date": datetime.now(UTC).date().isoformat(),
    }


if __name__ == "__main__":
    main()
