"""The embedded model and its data: small enough to fine-tune on any machine in minutes."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent


def demo_model_path() -> Path:
    """Folder of the embedded model."""
    return _FOLDER / "model"


def demo_data_path() -> Path:
    """File with the rows of the demo task."""
    return _FOLDER / "data" / "tickets.jsonl"
