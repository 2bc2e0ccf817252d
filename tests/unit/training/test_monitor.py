"""metrics.jsonl and events.jsonl: whole lines, the right steps, whatever happens to the disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from eightgig.errors import ConfigError
from eightgig.run import Event, Run
from eightgig.training.monitor import LineFile, Monitor, cut_after
from eightgig.training.step import StepReport


def _report(step: int, loss: float = 2.5) -> StepReport:
    return StepReport(
        step=step, epoch=step / 10, loss=loss, grad_norm=0.7, learning_rate=2e-5, loss_tokens=12,
        tokens=16, tokens_per_second=280.0, vram_peak_bytes=0, seconds=0.1,
    )  # fmt: skip


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(folder=tmp_path)


def test_each_step_is_one_line_with_the_keys_of_the_design(run: Run) -> None:
    with Monitor(run) as monitor:
        monitor.report(_report(1))
        assert len(_lines(run.metrics_path)) == 1, "a line must be there at once"
        monitor.report(_report(2))
        monitor.event(Event(step=2, kind="eval", values={"held_out_loss": 1.5}))
        monitor.sync()
    assert list(_lines(run.metrics_path)[0]) == [
        "step", "epoch", "loss", "grad_norm", "learning_rate", "loss_tokens", "tokens",
        "tokens_per_second", "vram_peak_bytes", "seconds",
    ]  # fmt: skip
    assert [line["step"] for line in _lines(run.metrics_path)] == [1, 2]
    assert _lines(run.events_path) == [
        {"step": 2, "kind": "eval", "values": {"held_out_loss": 1.5}}
    ]


def test_nan_is_shown(run: Run) -> None:
    with Monitor(run) as monitor:
        monitor.report(_report(1, loss=float("nan")))
    assert _lines(run.metrics_path)[0]["loss"] != _lines(run.metrics_path)[0]["loss"]


def test_going_on_removes_the_steps_that_are_done_again(run: Run) -> None:
    with Monitor(run) as monitor:
        for step in range(1, 8):
            monitor.report(_report(step))
            monitor.event(Event(step=step, kind="guard", values={}))
    with Monitor(run, done_steps=5) as monitor:
        monitor.report(_report(6, loss=1.0))
    assert [(line["step"], line["loss"]) for line in _lines(run.metrics_path)[-2:]] == [
        (5, 2.5),
        (6, 1.0),
    ]
    assert [line["step"] for line in _lines(run.events_path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        (b'{"step": 1}\n{"step": 2}\n{"st', b'{"step": 1}\n{"step": 2}\n'),
        (b'{"step": 1}\n{"step": 2}', b'{"step": 1}\n'),
        (b'{"step": 1}\n\0\0\0\0\0\n{"step": 2}\n', b'{"step": 1}\n{"step": 2}\n'),
        (b'{"step": 1}\n[]\n{"loss": 1}\n{"step": "2"}\n', b'{"step": 1}\n'),
        (b'{"step": 3}\n{"step": 1}\n', b'{"step": 1}\n'),
        (b"\xff\xfe\n" + b"[" * 9999 + b"\n", b""),
        (b"", b""),
    ],
)
def test_torn_and_foreign_lines_are_cut(content: bytes, kept: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    cut_after(path, 2)
    assert path.read_bytes() == kept


def test_a_fresh_start_leaves_no_old_line(run: Run) -> None:
    run.metrics_path.write_text('{"step": 1}\n')
    with Monitor(run):
        pass
    assert run.metrics_path.read_bytes() == b""


class _FullFile:
    """A file on a disk that takes `room` bytes more."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if self.room == 0 and data:
            raise OSError(28, os.strerror(28))
        count = self.file.write(data[: self.room])
        self.room -= count
        return int(count)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("room", range(1, 30))
def test_a_full_disk_delays_lines_and_tears_none(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = LineFile(path)
    full = _FullFile(lines._file, room)
    monkeypatch.setattr(lines, "_file", full)
    for step in range(4):
        lines.append(json.dumps({"step": step}))
    full.room = 1 << 20
    lines.append(json.dumps({"step": 4}))
    lines.close()
    assert [line["step"] for line in _lines(path)] == [0, 1, 2, 3, 4]


def test_a_disk_that_stays_full_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = LineFile(path)
    monkeypatch.setattr(lines, "_file", _FullFile(lines._file, 17))
    for step in range(4):
        lines.append(json.dumps({"step": step}))
    lines.close()
    assert _lines(path) == [{"step": 0}]


def test_the_heart_beats_but_not_too_often(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("eightgig.training.monitor.time.monotonic", lambda: now[0])
    path = run.folder / "heartbeat.json"
    with Monitor(run) as monitor:
        monitor.beat(1, "forward")
        assert json.loads(path.read_text())["step"] == 1
        monitor.beat(2, "forward")
        assert json.loads(path.read_text())["step"] == 1
        now[0] += 6.0
        monitor.beat(3, "saving")
    beat = json.loads(path.read_text())
    assert (beat["step"], beat["phase"], beat["pid"]) == (3, "saving", os.getpid())


def test_tensorboard_gets_the_same_numbers(run: Run) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Monitor(run, report_to="tensorboard") as monitor:
        for step in (1, 2):
            monitor.report(_report(step, loss=3.0 - step))
        monitor.event(Event(step=2, kind="eval", values={"held_out_loss": 1.5, "note": "x"}))
    read = EventAccumulator(str(run.folder / "tensorboard"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [
        (1, 2.0),
        (2, 1.0),
    ]
    assert [event.value for event in read.Scalars("eval/held_out_loss")] == [1.5]


def test_tensorboard_that_is_missing_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(ConfigError, match="tensorboard is not installed") as caught:
        Monitor(run, report_to="tensorboard")
    assert "eightgig[tensorboard]" in caught.value.fix
