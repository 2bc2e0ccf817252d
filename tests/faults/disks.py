"""Disks that fail: at one chosen operation, or by losing what was not flushed."""

from __future__ import annotations

import errno
import os
import random
import shutil
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from eightgig.disk import Disk

PLENTY_BYTES = 1 << 40


class Killed(BaseException):
    """The process is gone: nothing after this reaches the disk."""


class CountingDisk(Disk):
    """Numbers every operation; a disk of tests, so flushing is only counted."""

    def __init__(self) -> None:
        self.operations: list[str] = []

    def _count(self, operation: str, path: Path) -> None:
        self.operations.append(f"{operation} {path.name}")

    def make_folder(self, path: Path) -> None:
        self._count("make_folder", path)
        super().make_folder(path)

    def create(self, path: Path) -> FileIO:
        self._count("create", path)
        return super().create(path)

    def write(self, file: FileIO, data: memoryview) -> int:
        self._count("write", Path(file.name))
        return super().write(file, data)

    def flush(self, file: FileIO) -> None:
        self._count("flush", Path(file.name))

    def close(self, file: FileIO) -> None:
        file.close()
        self._count("close", Path(file.name))

    def rename(self, source: Path, target: Path) -> None:
        self._count("rename", source)
        super().rename(source, target)

    def flush_folder(self, path: Path) -> None:
        self._count("flush_folder", path)

    def remove_file(self, path: Path) -> None:
        self._count("remove_file", path)
        super().remove_file(path)

    def remove_folder(self, path: Path) -> None:
        self._count("remove_folder", path)
        super().remove_folder(path)

    def open(self, path: Path) -> FileIO:
        self._count("open", path)
        return super().open(path)

    def read(self, file: FileIO) -> bytes:
        self._count("read", Path(file.name))
        return super().read(file)

    def free_bytes(self, path: Path) -> int:
        self._count("free_bytes", path)
        return PLENTY_BYTES


@dataclass(frozen=True)
class Fault:
    """What happens at the chosen operation.

    Attributes:
        name: For the test's name.
        number: errno of the error; 0 kills the process.
        lasts: Every later operation of the same effect fails, too.
        is_torn: Half of the bytes of a write arrive first.
        operations: Starts of the operations it can happen at.
    """

    name: str
    number: int = 0
    lasts: bool = False
    is_torn: bool = False
    operations: tuple[str, ...] = ("",)


_TAKES_SPACE = ("make_folder", "create", "write", "flush")
_CHANGES = (*_TAKES_SPACE, "rename", "remove")
FAULTS = (
    Fault("killed"),
    Fault("torn and killed", is_torn=True, operations=("write",)),
    Fault("full once", errno.ENOSPC, operations=_TAKES_SPACE),
    Fault("full from now on", errno.ENOSPC, lasts=True, operations=_TAKES_SPACE),
    Fault("full after half a write", errno.ENOSPC, is_torn=True, operations=("write",)),
    Fault("error once", errno.EIO),
    Fault("error from now on", errno.EIO, lasts=True),
    Fault("read-only from now on", errno.EROFS, lasts=True, operations=_CHANGES),
)


class FaultyDisk(CountingDisk):
    """Fails at operation `at` (0-based among all) in the way of `fault`."""

    def __init__(self, fault: Fault, at: int) -> None:
        super().__init__()
        self._fault = fault
        self._at = at
        self._is_dead = False
        self.has_failed = False

    def _count(self, operation: str, path: Path) -> None:
        super()._count(operation, path)
        if self._is_dead:
            raise Killed
        now = len(self.operations) - 1
        is_hit = now == self._at or (self._fault.lasts and now > self._at)
        if not is_hit or not operation.startswith(self._fault.operations):
            return
        self.has_failed = True
        self._is_dead = self._fault.number == 0
        if self._is_dead:
            raise Killed
        raise OSError(self._fault.number, os.strerror(self._fault.number), str(path))

    def write(self, file: FileIO, data: memoryview) -> int:
        try:
            return super().write(file, data)
        except (Killed, OSError):
            if self._fault.is_torn and self.has_failed:
                file.write(data[: data.nbytes // 2])
            raise


class ShortDisk(CountingDisk):
    """Takes one byte less than offered, as a system may."""

    def write(self, file: FileIO, data: memoryview) -> int:
        return super().write(file, data[: max(1, data.nbytes - 1)])


@dataclass
class _Change:
    """A change of a folder that is not on the disk yet."""

    kind: str
    path: Path
    target: Path | None = None
    content: bytes | None = None

    @property
    def folder(self) -> Path:
        return self.path.parent


class PowerCutDisk(CountingDisk):
    """Loses power before operation `at`: what was not flushed may be lost.

    Bytes are safe once their file was flushed; a name, a rename or a deletion once its folder was.
    Of the changes of one folder that are not safe, the first few survive, as on a file system with
    a journal; how many is chosen for each folder on its own.
    """

    def __init__(self, at: int) -> None:
        super().__init__()
        self._at = at
        self._is_dead = False
        self._changes: list[_Change] = []
        self._unflushed: set[Path] = set()

    def _count(self, operation: str, path: Path) -> None:
        super()._count(operation, path)
        if self._is_dead or len(self.operations) - 1 == self._at:
            self._is_dead = True
            raise Killed

    def make_folder(self, path: Path) -> None:
        super().make_folder(path)
        self._changes.append(_Change("make_folder", path))

    def create(self, path: Path) -> FileIO:
        file = super().create(path)
        self._changes.append(_Change("create", path))
        self._unflushed.add(path)
        return file

    def flush(self, file: FileIO) -> None:
        super().flush(file)
        self._unflushed.discard(Path(file.name))

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self._move(source, target)
        self._changes.append(_Change("rename", source, target=target))

    def flush_folder(self, path: Path) -> None:
        super().flush_folder(path)
        self._changes = [change for change in self._changes if change.folder != path]

    def remove_file(self, path: Path) -> None:
        content = path.read_bytes()
        super().remove_file(path)
        self._changes.append(_Change("remove_file", path, content=content))

    def remove_folder(self, path: Path) -> None:
        super().remove_folder(path)
        self._changes.append(_Change("remove_folder", path))

    def cut(self, chooser: random.Random) -> None:
        """Leave on the real disk what this cut leaves."""
        folders = sorted({change.folder for change in self._changes})
        survive = {
            folder: chooser.randint(0, sum(change.folder == folder for change in self._changes))
            for folder in folders
        }
        lost = []
        for change in self._changes:
            survive[change.folder] -= 1
            if survive[change.folder] < 0:
                lost.append(change)
        for change in reversed(lost):
            self._undo(change)
        for path in sorted(self._unflushed):
            if path.is_file():
                content = path.read_bytes()
                kept = chooser.randint(0, len(content))
                # Beyond what arrived a file may end, or hold the zeros of fresh blocks.
                rest = b"\0" * (len(content) - kept) if chooser.random() < 0.5 else b""
                path.write_bytes(content[:kept] + rest)

    def _undo(self, change: _Change) -> None:
        path = change.path
        if change.kind == "rename":
            assert change.target is not None
            if change.target.exists() and not path.exists():
                change.target.rename(path)
                self._move(change.target, path)
        elif change.kind == "remove_file":
            assert change.content is not None
            if path.parent.is_dir():
                path.write_bytes(change.content)
        elif change.kind == "remove_folder":
            if path.parent.is_dir():
                path.mkdir()
        elif path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()

    def _move(self, source: Path, target: Path) -> None:
        """Follow files and changes inside a folder that was renamed."""

        def moved(path: Path) -> Path:
            return target / path.relative_to(source) if path.is_relative_to(source) else path

        self._unflushed = {moved(path) for path in self._unflushed}
        for change in self._changes:
            # The renamed folder's own entry stays with its parent; what lies in it moves along.
            if change.path != source and change.path.is_relative_to(source):
                change.path = moved(change.path)
                if change.target is not None:
                    change.target = moved(change.target)
