"""Rows to test with: as many different good ones as are needed, and files of them."""

import json
from pathlib import Path

import numpy as np

_SYLLABLES = (
    "ba", "de", "fi", "go", "hu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "wu",
    "za", "che", "sto", "bri", "gla",
)  # fmt: skip


def words(count: int, seed: int) -> str:
    """Invented words that no other seed gives."""
    numbers = np.random.Generator(np.random.PCG64(seed)).integers(0, 20, (count, 3))
    return " ".join("".join(_SYLLABLES[part] for part in word) for word in numbers)


def chat_row(seed: int, turns: int = 1) -> dict:
    """A conversation."""
    messages = []
    for turn in range(turns):
        messages.append({"role": "user", "content": words(12, 1_000 * seed + 2 * turn) + "?"})
        messages.append({"role": "assistant", "content": words(9, 1_000 * seed + 2 * turn + 1)})
    return {"messages": messages}


def pair_row(seed: int) -> dict:
    """A prompt and its completion."""
    return {"prompt": words(12, seed) + "?", "completion": words(9, seed + 500_000)}


def write_lines(path: Path, rows: list) -> Path:
    """`rows` as JSONL; bytes and texts stand as they are."""
    lines = [
        row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else _line(row)
        for row in rows
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def _line(row: object) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")
