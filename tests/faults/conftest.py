"""Thousands of small folders: made in memory where the system offers that."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

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
