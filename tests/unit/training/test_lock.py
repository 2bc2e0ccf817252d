"""Two processes on one run folder: the second is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from eightgig.errors import RunError
from eightgig.run import Run
from eightgig.training.lock import lock_run

_CHILD = """
import sys
from pathlib import Path
from eightgig.errors import RunError
from eightgig.run import Run
from eightgig.training.lock import lock_run

try:
    with lock_run(Run(folder=Path(sys.argv[1]))):
        print("held", flush=True)
        sys.stdin.read()
except RunError as error:
    print(error.message)
"""


def _start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_another_process_is_refused_and_told_who_holds_the_folder(tmp_path: Path) -> None:
    with _start(tmp_path) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"in use by process {first.pid} on"):
            lock_run(Run(folder=tmp_path)).__enter__()
        first.kill()
        first.communicate()
    with lock_run(Run(folder=tmp_path)):
        pass


def test_the_folder_is_free_again_afterwards(tmp_path: Path) -> None:
    run = Run(folder=tmp_path / "run")
    with lock_run(run):
        pass
    with _start(run.folder) as second:
        assert second.communicate()[0] == "held\n"


def test_a_garbled_lock_file_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "lock").write_bytes(b"\xff[[[")
    with lock_run(Run(folder=tmp_path)), pytest.raises(RunError, match="in use by process"):
        # A second open file of the same process counts as another holder.
        lock_run(Run(folder=tmp_path)).__enter__()
