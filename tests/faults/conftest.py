"""Thousands of small folders: made in memory where the system offers that."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.tally import Tally, tally_of
from tests.faults.trials import Bench

_MEMORY = Path("/dev/shm")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder on a fast file system."""
    if not _MEMORY.is_dir():
        yield tmp_path
        return
    made = Path(tempfile.mkdtemp(prefix="eightgig-faults-", dir=_MEMORY))
    try:
        yield made
    finally:
        shutil.rmtree(made)


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """Counts for the tables."""
    return tally_of(request.config)


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A server of whole processes, and the run that nothing disturbed."""
    # On a real disk: there a save takes its time, and is hit more often.
    with Bench(tmp_path_factory.mktemp("bench")) as bench:
        yield bench
