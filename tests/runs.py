"""A finished run of a tiny model, trained for real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from eightgig.config import read_config
from eightgig.finetune import finetune
from eightgig.run import Run
from tests import tiny

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {first} and {second}?"},
            {"role": "assistant", "content": f"It is {first + second}."},
        ]
    }
    for first in range(6)
    for second in range(4)
]


def train_tiny(
    folder: Path, family: str = "llama", *, overrides: tuple[str, ...] = (), **model: Any
) -> Run:
    """Train two steps on `ROWS` and return the run.

    Args:
        folder: For model, data and run; empty.
        family: See `tests.tiny`.
        overrides: Settings over the defaults of this function.
        model: Arguments of `tiny.make_model`.
    """
    base = tiny.make_model(family, folder / "base", **model)
    make_calm(base)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    settings = {
        "model.name": str(base),
        "model.cache_dir": str(folder / "cache"),
        "model.quantization": "none",
        "data.path": str(data),
        "data.held_out": 0.25,
        "lora.r": 4,
        "lora.lora_alpha": 16,
        "train.learning_rate": 0.02,
        "train.max_steps": 2,
        "train.gradient_accumulation_steps": 4,
        "memory.device": "cpu",
        "run.output_dir": str(folder / "runs"),
        "run.name": "first",
    }
    texts = [f"{name}={value}" for name, value in settings.items()]
    config = read_config(None, [*texts, *overrides])
    for _ in finetune(config):
        pass
    return Run(folder=folder / "runs" / config.run.name)


def make_calm(base: Path) -> None:
    """Make the first answers near to a guess: random ones of great certainty stop a training."""
    for path in base.glob("*.safetensors"):
        weights = load_file(path)
        head = "lm_head.weight" if "lm_head.weight" in weights else "embed_tokens.weight"
        for name, weight in weights.items():
            if name.endswith(head):
                weights[name] = weight * 0.1
        save_file(weights, path, metadata={"format": "pt"})
