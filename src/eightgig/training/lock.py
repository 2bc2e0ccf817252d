"""One process at a time on a run folder; the system frees the lock of a process that died."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO

from eightgig.errors import RunError
from eightgig.run import Run, writing_to

LOCK_NAME = "lock"
_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}
# Windows locks bytes, and forbids reading them: one far behind the text stands for the file.
_LOCKED_BYTE = 1 << 30


@contextmanager
def lock_run(run: Run) -> Iterator[None]:
    """Hold the run folder for this process.

    Raises:
        RunError: Another process holds it, or the folder cannot be written.
    """
    with writing_to(run.folder):
        run.folder.mkdir(parents=True, exist_ok=True)
        opened = FileIO(run.folder / LOCK_NAME, "a+b")
    with opened as file:
        if not _try_lock(file):
            raise RunError(
                f"The run folder {run.folder} is in use by {_holder(file)}.",
                why="Two trainings in one folder would overwrite each other's checkpoints.",
                fix="Wait for it, stop it with Ctrl-C, or choose another run.name.",
            )
        # Who holds it is a courtesy; a full disk must not keep a run from going on.
        with suppress(OSError):
            file.truncate(0)
            file.write(
                json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode("ascii")
            )
        yield


def _try_lock(file: FileIO) -> bool:
    """Take the lock if it is free; True as well where the file system knows no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(_LOCKED_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _UNSUPPORTED
    return True


def _holder(file: FileIO) -> str:
    file.seek(0)
    try:
        held = json.loads(file.read(1024) or b"")
        return f"process {int(held['pid'])} on {str(held['host'])[:100]!r}"
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return "another process"
