"""Faults that are planted in a whole process of `eightgig`, before its command begins."""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

from tests.faults.disks import CountingDisk, PowerCutDisk


def slow_steps(seconds: float) -> None:
    """Every step after the first takes so much longer."""

    def slow(engine: Any, prepared: Any) -> None:
        if prepared.step > 1:
            time.sleep(seconds)

    _before_steps(slow)


def pretend_version(library: str, version: str) -> None:
    """Another version of a library is installed, or of eightgig itself."""
    from eightgig.training import identity

    if library == "eightgig":
        identity.__version__ = version
        return
    real = identity.installed_versions
    identity.installed_versions = lambda names: {**real(names), library: version}


def nan_loss(first: int, last: int, value: str) -> None:
    """The loss of some steps is no number."""
    from eightgig.training import worker

    real_step = worker.run_step

    def step(engine: Any, prepared: Any, *more: Any) -> tuple[float, float]:
        loss, norm = real_step(engine, prepared, *more)
        return (float(value) if first <= prepared.step <= last else loss, norm)

    worker.run_step = step


def nan_gradient(first: int, last: int, value: str) -> None:
    """One number of the gradient of one layer is none, and the loss is as ever."""
    from eightgig.engine.gradients import Gradients

    real_open = Gradients.open
    now = [0]

    def opened(self: Any, layer: int) -> Any:
        views = real_open(self, layer)
        if layer == 1 and first <= now[0] <= last:
            self.sums[layer][7] = float(value)
        return views

    Gradients.open = opened  # type: ignore[method-assign]
    _before_steps(lambda engine, prepared: now.__setitem__(0, prepared.step))


def nan_input(first: int, last: int, value: str) -> None:
    """One number of a row's embedding is none."""

    def spoil(engine: Any, prepared: Any) -> None:
        if first <= prepared.step <= last:
            prepared.inputs[0].result().embedding[3, 2] = float(value)

    _before_steps(spoil)


def nan_weight(first: int, last: int, value: str) -> None:
    """A number of the adapter itself is none."""

    def spoil(engine: Any, prepared: Any) -> None:
        if first <= prepared.step <= last:
            engine.adapter.masters[1][5] = float(value)
            engine.adapter.refresh(1)
            engine.model.ring.invalidate_changing()

    _before_steps(spoil)


def nan_moment(first: int, last: int, value: str) -> None:
    """A number of the optimizer's moments is none."""
    from eightgig.training.optimizer import HostAdamW

    real_start = HostAdamW.start_step
    now = [0]

    def start(self: Any, learning_rate: float, grad_scale: float) -> None:
        if first <= now[0] <= last:
            self.finish()
            for state in self._optimizer.state.values():
                state["exp_avg"][3] = float(value)
        real_start(self, learning_rate, grad_scale)

    HostAdamW.start_step = start  # type: ignore[method-assign]
    _before_steps(lambda engine, prepared: now.__setitem__(0, prepared.step))


def stop_at_report(number: int) -> None:
    """A signal arrives when all is trained and saved, and the report is about to be written."""
    from eightgig.web import report

    real_write = report.write_report
    signals = [number]

    def write(run: Any) -> None:
        if signals:
            signal.raise_signal(signals.pop())
        real_write(run)

    report.write_report = write


def stop_at_import(module: str, number: int) -> None:
    """A signal arrives in the middle of an import, when a library is half there."""

    class Finder:
        def find_spec(self, name: str, *_: object) -> None:
            if name == module:
                sys.meta_path.remove(self)  # type: ignore[arg-type]
                signal.raise_signal(number)

    sys.meta_path.insert(0, Finder())  # type: ignore[arg-type]


def _before_steps(work: Callable[[Any, Any], object]) -> None:
    from eightgig.training import worker

    real_step = worker.run_step

    def step(engine: Any, prepared: Any, *more: Any) -> tuple[float, float]:
        work(engine, prepared)
        return real_step(engine, prepared, *more)

    worker.run_step = step


def count_disk(path: str) -> None:
    """Write all operations on checkpoints and adapter into a file."""

    class Noted(CountingDisk):
        def _count(self, operation: str, file: Path) -> None:
            super()._count(operation, file)
            with Path(path).open("a", encoding="utf-8") as notes:
                notes.write(f"{operation} {file.name}\n")

        free_bytes = _real_free_bytes

    _use_disk(Noted())


def disk_errors(number: int, at: int, count: int) -> None:
    """`count` operations in a row, from the one with the number `at`, end with an error."""

    class Failing(CountingDisk):
        def _count(self, operation: str, file: Path) -> None:
            super()._count(operation, file)
            takes_space = operation in ("make_folder", "create", "write", "flush")
            is_hit = at <= len(self.operations) - 1 < at + count
            if is_hit and (takes_space or number != errno.ENOSPC):
                raise OSError(number, os.strerror(number), str(file))

    _use_disk(Failing())


def disk_kill(at: int) -> None:
    """SIGKILL at the operation with the number `at`, half of the bytes written if it writes."""

    class Killing(CountingDisk):
        def _count(self, operation: str, file: Path) -> None:
            super()._count(operation, file)
            if len(self.operations) - 1 == at and operation != "write":
                os.kill(os.getpid(), signal.SIGKILL)

        def write(self, file: FileIO, data: memoryview) -> int:
            if len(self.operations) == at:
                file.write(data[: data.nbytes // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return super().write(file, data)

    _use_disk(Killing())


def power_cut(at: int, seed: int) -> None:
    """The power goes before the operation `at`: what was not flushed is lost at random.

    That of metrics.jsonl and events.jsonl, too.
    """
    from eightgig.training.monitor import LineFile

    chooser = random.Random(seed)
    files: dict[Path, int] = {}
    real_init, real_sync = LineFile.__init__, LineFile.sync

    def opened(self: Any, path: Path) -> None:
        real_init(self, path)
        files[path] = path.stat().st_size

    def synced(self: Any) -> None:
        real_sync(self)
        path = Path(self._file.name)
        files[path] = path.stat().st_size

    LineFile.__init__ = opened  # type: ignore[method-assign]
    LineFile.sync = synced  # type: ignore[method-assign]

    class Cut(PowerCutDisk):
        def _count(self, operation: str, file: Path) -> None:
            CountingDisk._count(self, operation, file)
            if len(self.operations) - 1 != at:
                return
            self.cut(chooser)
            for path, safe_bytes in files.items():
                size_bytes = path.stat().st_size
                os.truncate(path, chooser.randint(safe_bytes, size_bytes))
                if chooser.random() < 0.5:
                    os.truncate(path, size_bytes)
            os.kill(os.getpid(), signal.SIGKILL)

    _use_disk(Cut(at))


def _real_free_bytes(self: object, path: Path) -> int:
    from eightgig.disk import Disk

    return Disk.free_bytes(Disk(), path)


def _use_disk(disk: Any) -> None:
    """Checkpoints and the adapter are written with `disk`."""
    from eightgig.adapters import files
    from eightgig.training import checkpoint, save

    for module in (files, save, checkpoint):
        module.Disk = lambda: disk


def watched(places: list[str], secrets: list[str], home: str, notes: str) -> None:
    """Note what an audit hook sees that must not happen; a token lies in the environment."""
    from tests.security.watch import SECRET, Watch, switch_on

    os.environ["HOME"] = home
    os.environ["HF_TOKEN"] = os.environ["HUGGING_FACE_HUB_TOKEN"] = SECRET
    os.environ["WANDB_API_KEY"] = SECRET

    class Noted(list[str]):
        def append(self, event: str) -> None:
            with Path(notes).open("a", encoding="utf-8") as file:
                file.write(event + "\n")

    switch_on(Watch(places=[*places, notes], secrets=secrets, events=Noted(), nameless="/tmp"))
