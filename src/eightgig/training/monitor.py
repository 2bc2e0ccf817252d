"""What a run leaves behind to look at: metrics.jsonl, events.jsonl, heartbeat.json, TensorBoard.

Lines are appended and handed to the system at once, so that a killed process loses none. A disk
that takes no more costs lines of a report, never the training.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import time
from collections import deque
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from eightgig.errors import ConfigError
from eightgig.run import Event, Run, to_json, write_atomically, writing_to
from eightgig.training.step import StepReport

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

TENSORBOARD_NAME = "tensorboard"
HEARTBEAT_NAME = "heartbeat.json"
_HEARTBEAT_SECONDS = 5.0
# Lines kept in memory while the disk takes none.
_MAX_WAITING_LINES = 10_000
_LOGGER = logging.getLogger(__name__)


class Monitor:
    """Writes the files of a running training; a context manager.

    Args:
        run: The run.
        report_to: Where to report besides the run folder.
        done_steps: Steps that the checkpoint holds from which the run goes on, 0 for a fresh
            start. Lines of later steps, which will be done again, are removed, and so is a line
            that was torn when the process died.

    Raises:
        ConfigError: TensorBoard is asked for and not installed.
        RunError: The run folder cannot be written.
    """

    def __init__(self, run: Run, *, report_to: str = "none", done_steps: int = 0) -> None:
        self._board: SummaryWriter | None = None
        if report_to == "tensorboard":
            self._board = _open_tensorboard(run.folder / TENSORBOARD_NAME, done_steps + 1)
        with writing_to(run.folder):
            for path in (run.metrics_path, run.events_path):
                cut_after(path, done_steps)
            self._metrics = LineFile(run.metrics_path)
            self._events = LineFile(run.events_path)
        self._heartbeat_path = run.folder / HEARTBEAT_NAME
        self._last_beat_seconds = -math.inf

    def report(self, report: StepReport) -> None:
        """One optimizer step was done."""
        self._metrics.append(_json_line(report))
        values = {"loss": report.loss, "grad_norm": report.grad_norm}
        values["learning_rate"] = report.learning_rate
        values["tokens_per_second"] = report.tokens_per_second
        self._draw({f"train/{name}": value for name, value in values.items()}, report.step)

    def event(self, event: Event) -> None:
        """Something else happened: an evaluation, a guard, a save, ..."""
        self._events.append(_json_line(event))
        if event.kind == "eval":
            numbers = {
                f"eval/{name}": float(value)
                for name, value in event.values.items()
                if isinstance(value, (int, float))
            }
            self._draw(numbers, event.step)

    def beat(self, step: int, phase: str) -> None:
        """Sign of life, as often as you like: heartbeat.json is rewritten every few seconds.

        Args:
            step: Optimizer step that is being done.
            phase: What the process is doing, one word.
        """
        if time.monotonic() - self._last_beat_seconds < _HEARTBEAT_SECONDS:
            return
        self._last_beat_seconds = time.monotonic()
        values = {"pid": os.getpid(), "unix_seconds": time.time(), "step": step, "phase": phase}
        temporary = self._heartbeat_path.with_suffix(".tmp")
        # Not flushed to the disk: after a power cut nobody's heart beats.
        with suppress(OSError):
            temporary.write_text(json.dumps(values) + "\n", encoding="utf-8")
            temporary.replace(self._heartbeat_path)

    def sync(self) -> None:
        """Return when all lines are on the disk; call before a checkpoint relies on them."""
        for file in (self._metrics, self._events):
            file.sync()

    def close(self) -> None:
        """Close all files."""
        for file in (self._metrics, self._events):
            file.close()
        if self._board is not None:
            try:
                self._board.close()
            except OSError as error:
                _LOGGER.warning("TensorBoard's file is incomplete: %s", error)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _draw(self, values: dict[str, float], step: int) -> None:
        if self._board is None:
            return
        try:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        except OSError as error:
            self._board = None
            _LOGGER.warning("TensorBoard's file cannot be written and ends here: %s", error)


class LineFile:
    """A text file that grows by whole lines, also on a disk that is full now and then.

    Args:
        path: The file; made if missing.
    """

    def __init__(self, path: Path) -> None:
        self._file = FileIO(path, "ab")
        self._size_bytes = self._file.tell()
        self._is_torn = False
        self._waiting: deque[bytes] = deque(maxlen=_MAX_WAITING_LINES)

    def append(self, line: str) -> None:
        """Append a line, and those that could not be written before."""
        self._waiting.append(line.encode("utf-8") + b"\n")
        while self._waiting and self._write(self._waiting[0]):
            self._waiting.popleft()

    def sync(self) -> None:
        """Return when the lines are on the disk, or the disk fails."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            _LOGGER.warning("%s is not safe on the disk: %s", Path(self._file.name).name, error)

    def close(self) -> None:
        """Close the file; lines that still wait are lost."""
        if self._is_torn:
            self._write(b"")
        self._file.close()

    def _write(self, data: bytes) -> bool:
        """Write `data` after the last whole line; False when the disk does not take all of it."""
        try:
            if self._is_torn:
                self._file.truncate(self._size_bytes)
            self._is_torn = True
            written_bytes = self._file.write(data)
        except OSError:
            return False
        if written_bytes != len(data):
            return False
        self._is_torn = False
        self._size_bytes += written_bytes
        return True


def cut_after(path: Path, step: int) -> None:
    """Keep the lines of `path` that are whole JSON objects of steps up to `step`.

    Raises:
        OSError: `path` cannot be read or written.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    kept = b"".join(line for line in content.splitlines(keepends=True) if _is_kept(line, step))
    if content.startswith(kept):
        # The usual case, and one that asks a full disk for nothing.
        os.truncate(path, len(kept))
    else:
        write_atomically(path, kept)


def _is_kept(line: bytes, step: int) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and isinstance(value.get("step"), int) and value["step"] <= step


def _json_line(value: Any) -> str:
    return json.dumps(to_json(value))


def require_reporting(report_to: str) -> None:
    """Refuse a report that could not be written, before anything is made for the run.

    Raises:
        ConfigError: TensorBoard is asked for and not installed.
    """
    if report_to == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise _no_tensorboard("it is missing")


def _no_tensorboard(reason: str) -> ConfigError:
    return ConfigError(
        "run.report_to: tensorboard is not installed.",
        why=f"Its files are written by its own package ({reason}).",
        fix='Run pip install "eightgig[tensorboard]", or set run.report_to: none.',
    )


def _open_tensorboard(folder: Path, next_step: int) -> SummaryWriter:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise _no_tensorboard(str(error)) from error
    return SummaryWriter(log_dir=str(folder), purge_step=next_step)
