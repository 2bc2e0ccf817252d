"""What a new config begins with, for a model, a data file and a machine."""

from __future__ import annotations

import os
from pathlib import Path

from eightgig.config.paths import expand_home, looks_like_path
from eightgig.config.settings import DEMO_MODEL

GPU_MODEL = "google/gemma-4-12B-it"
# Small enough for a processor, and it speaks.
CPU_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def starting_values(
    *, model: str | None, data: str, config_path: Path, has_gpu: bool
) -> dict[str, object]:
    """Settings (`group.name`) of a new config.

    Args:
        model: Hub id or folder; None takes one that an 8 GB card trains with ease, or a small one
            where there is no GPU.
        data: File or name with the rows, relative to the current folder.
        config_path: Where the config will be; paths in it are relative to its folder.
        has_gpu: Whether this machine has one.
    """
    folder = config_path.absolute().parent
    name = model or (GPU_MODEL if has_gpu else CPU_MODEL)
    return {
        "model.name": name if name == DEMO_MODEL else _seen_from(folder, name),
        "data.path": _seen_from(folder, data),
    }


def _seen_from(folder: Path, text: str) -> str:
    path = expand_home(text)
    if not looks_like_path(text) and not path.exists():
        return text
    try:
        relative = os.path.relpath(path.absolute(), folder)
    except ValueError:  # another drive of Windows
        return str(path.absolute())
    # A folder `models/mine` stays a folder, whatever the hub has under this name.
    return relative if looks_like_path(relative) else f".{os.sep}{relative}"
