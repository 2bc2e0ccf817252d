"""Whole runs of a tiny model as a supervisor starts them: `eightgig train --resume`, again and
again, until it is done. What counts is that the end equals that of a run which nothing disturbed.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest

from tests.faults.server import Process, Server
from tests.faults.tally import Tally

STEPS = 12
SAVE_STEPS = 3
FAMILY = "llama"
SETTINGS = (
    "data.held_out=6",
    "train.per_device_train_batch_size=2",
    f"train.max_steps={STEPS}",
    "lora.r=4",
    "lora.lora_alpha=8",
    "lora.lora_dropout=0.1",
    f"run.save_steps={SAVE_STEPS}",
    "run.save_total_limit=2",
    "run.eval_steps=6",
)
_SAME_IN_METRICS = ("step", "epoch", "loss", "grad_norm", "learning_rate", "loss_tokens", "tokens")
_POLL_SECONDS = 0.001


class Bench:
    """A model, data and config, a server, and the undisturbed run; use it in a `with` statement.

    Attributes:
        folder: Holds all of it; runs lie in `runs/`.
        seconds: What the undisturbed run took, start of the process included.
    """

    def __init__(self, folder: Path) -> None:
        from tests import tiny_run

        self.folder = folder
        self._count = 0
        tiny_run.make_tame_model(FAMILY, folder / "model")
        tiny_run.write_config(folder, tiny_run.colour_rows(30), [])
        self.config_path = folder / "config.yaml"
        (folder / "output").mkdir()
        self.server = Server(folder / "output")

    def __enter__(self) -> Self:
        self.server.__enter__()
        # Twice: the first one prepares the model's weights, which later runs find.
        for name in ("prepared", "undisturbed"):
            self.undisturbed = Trial(self, name)
            start_seconds = time.monotonic()
            code, text = self.undisturbed.run()
            assert code == 0, text
            self.seconds = time.monotonic() - start_seconds
        assert Trial(self, "prepared").problems() == []
        return self

    def __exit__(self, *_: object) -> None:
        self.server.__exit__()

    def trial(self) -> Trial:
        """A run folder's name that is free."""
        self._count += 1
        return Trial(self, f"trial-{self._count:05d}")

    def stopped_trial(self, step: int = 8) -> Trial:
        """A run that was killed after `step`, with two checkpoints."""
        trial = self.trial()
        process = trial.start()
        trial.wait_for_step(step, process)
        process.signal(9)
        process.wait()
        assert trial.folder.joinpath("checkpoints").is_dir()
        return trial


@dataclass
class Trial:
    """One run folder, gone on with in as many processes as it takes."""

    bench: Bench
    name: str

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.bench.folder / "runs" / self.name

    def start(self, *words: str, plant: Sequence[object] = ()) -> Process:
        """Start a process on it that goes on where it can."""
        settings = [
            word for text in (*SETTINGS, f"run.name={self.name}") for word in ("--set", text)
        ]
        arguments = ["train", str(self.bench.config_path), "--resume", *settings, *words]
        return self.bench.server.start(arguments, plant=plant, cwd=self.bench.folder)

    def run(self, *words: str, plant: Sequence[object] = ()) -> tuple[int, str]:
        """Exit code and output of a process that nothing disturbs but its plant."""
        process = self.start(*words, plant=plant)
        return process.wait(), process.text()

    def steps(self) -> list[int]:
        """Steps in metrics.jsonl, as far as lines are whole."""
        return [row["step"] for row in self.metrics()]

    def metrics(self) -> list[dict[str, Any]]:
        """Whole lines of metrics.jsonl."""
        return _lines(self.folder / "metrics.jsonl")

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Events of a kind."""
        return [event for event in _lines(self.folder / "events.jsonl") if event["kind"] == kind]

    def saved_steps(self) -> list[int]:
        """Steps of what is called a checkpoint, oldest first."""
        paths = self.folder.glob("checkpoints/step-*")
        return sorted(int(path.name[5:]) for path in paths if path.name[5:].isdigit())

    def wait_for_step(self, step: int, process: Process) -> None:
        """Return when `step` is done, or the process has ended."""
        self._wait(lambda: max(self.steps(), default=0) >= step, process)

    def wait_for_save(self, step: int, process: Process) -> None:
        """Return when the save of `step` has begun, or the process has ended."""
        names = (f"step-{step:06d}.tmp", f"step-{step:06d}")
        folder = self.folder / "checkpoints"
        self._wait(lambda: any((folder / name).exists() for name in names), process)

    def problems(self) -> list[str]:
        """How its end differs from that of the undisturbed run; empty when it does not."""
        expected = self.bench.undisturbed
        found = []
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            path = self.folder / "adapter" / name
            if not path.is_file():
                found.append(f"there is no adapter/{name}")
            elif path.read_bytes() != (expected.folder / "adapter" / name).read_bytes():
                found.append(f"adapter/{name} differs")
        rows, expected_rows = self.metrics(), expected.metrics()
        if [row["step"] for row in rows] != list(range(1, STEPS + 1)):
            found.append(f"the steps are {[row['step'] for row in rows]}")
        for row, other in zip(rows, expected_rows, strict=False):
            if any(row[key] != other[key] for key in _SAME_IN_METRICS):
                found.append(f"step {row['step']} is another")
        if not (self.folder / "report.html").is_file():
            found.append("there is no report")
        odd = [
            path.name
            for path in self.folder.glob("checkpoints/*")
            if not path.name.removeprefix("step-").isdigit() and ".broken" not in path.name
        ]
        if odd:
            found.append(f"{odd} were left")
        return found

    def remove(self) -> None:
        """Make room."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wait(self, condition: Callable[[], bool], process: Process) -> None:
        while not condition() and process.is_running():
            time.sleep(_POLL_SECONDS)


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    whole = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    return [json.loads(line) for line in whole if line.strip(b"\0\n")]


def non_finite_files(folder: Path) -> list[str]:
    """Adapter and checkpoint files below `folder` that hold NaN or infinity."""
    import torch
    from safetensors.torch import load_file

    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*.safetensors"))
        if not all(bool(torch.isfinite(tensor).all()) for tensor in load_file(path).values())
    ]


def kill_anywhere(trial: Trial, chooser: random.Random) -> Process:
    """Kill a process at a moment that says nothing of what it does."""
    process = trial.start()
    time.sleep(chooser.uniform(0, trial.bench.seconds))
    process.signal(9)
    return process


def kill_around_a_save(trial: Trial, chooser: random.Random) -> Process:
    """Kill a process within some hundredths of a second of the beginning of a save."""
    step = chooser.randrange(SAVE_STEPS, STEPS + 1, SAVE_STEPS)
    process = trial.start()
    trial.wait_for_save(step, process)
    time.sleep(chooser.uniform(0, 0.03))
    process.signal(9)
    return process


def few_or_many(few: int, many: int) -> pytest.MarkDecorator:
    """A small number of trials in every test run, the published number with the marker slow."""
    return pytest.mark.parametrize(
        "trials",
        [pytest.param(few, id="few"), pytest.param(many, id="many", marks=pytest.mark.slow)],
    )


@dataclass
class Outcomes:
    """What became of the trials of one fault.

    Attributes:
        what: The fault, by the words of the tables.
        tally: Counts them.
        wrong: Problems of those that failed, by place and name; their folders are kept.
    """

    what: str
    tally: Tally
    wrong: dict[tuple[object, ...], list[str]] = field(default_factory=dict)

    def add(self, trial: Trial, problems: list[str], *place: object) -> None:
        """A trial is over; `place` says where the fault met it."""
        self.tally.add(self.what, passed=not problems)
        if problems:
            self.wrong[*place, trial.name] = problems
        else:
            trial.remove()


def finish(trial: Trial, *, attempts: int = 1) -> list[str]:
    """Go on without disturbance; what is wrong with the end."""
    text = ""
    for _ in range(attempts):
        code, text = trial.run()
        if code == 0:
            return trial.problems()
    return [f"exit code {code}: {text[-2000:]}"]


def lost_steps(trial: Trial) -> int:
    """Steps done in vain so far: behind the newest checkpoint."""
    return max(trial.steps(), default=0) - max(trial.saved_steps(), default=0)
