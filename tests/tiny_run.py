"""A finished run on a tiny model, in seconds: what evaluation, chat and export start from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eightgig.config import read_config
from eightgig.finetune import finetune
from tests import tiny

COLOURS = {"sky": "blue", "grass": "green", "blood": "red"}


def make_tame_model(family: str, folder: Path, **options: Any) -> Path:
    """A tiny model whose first loss is near that of guessing, as the guards want it."""
    from safetensors.torch import load_file, save_file

    tiny.make_model(family, folder, **options)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            tensors[name] = tensor * 0.2
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def colour_rows(count: int) -> list[dict[str, Any]]:
    """Rows whose answer follows from the question: three labels, each in many rows."""
    things = list(COLOURS)
    rows = []
    for number in range(count):
        thing = things[number % len(things)]
        question = f"{number}: which colour has {thing}?"
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": COLOURS[thing]},
                ]
            }
        )
    return rows


def make_run(
    root: Path,
    *,
    family: str = "gemma4_e2b",
    rows: Sequence[Mapping[str, Any]] | None = None,
    settings: Sequence[str] = (),
) -> Path:
    """Train a run in `root` and return its folder.

    Args:
        root: Gets model, data, prepared weights and the run.
        family: Of the model.
        rows: To train on; None: `colour_rows`.
        settings: Put over those of this function, as on the command line.
    """
    make_tame_model(family, root / "model")
    config = write_config(root, rows if rows is not None else colour_rows(60), settings)
    for _ in finetune(config):
        pass
    return Path(config.run.output_dir, config.run.name)


def write_config(root: Path, rows: Sequence[Mapping[str, Any]], settings: Sequence[str]) -> Any:
    """`root`/data.jsonl and `root`/config.yaml, read as the command line reads them."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "data.jsonl").write_text(lines, encoding="utf-8")
    (root / "config.yaml").write_text(
        "model: {name: model, cache_dir: cache}\n"
        "data: {path: data.jsonl, held_out: 18}\n"
        "train: {max_steps: 8, learning_rate: 0.02, per_device_train_batch_size: 6,\n"
        "        gradient_accumulation_steps: 1, lr_scheduler_type: constant}\n"
        "run: {name: first, eval_steps: 0}\n",
        encoding="utf-8",
    )
    return read_config(root / "config.yaml", list(settings))
