"""A real SIGKILL in the middle of preparing a store: going on gives the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import make_model

_ROOT = Path(__file__).parents[2]
# Argument 3: the share of the work at which the process kills itself; 2 never comes.
_CHILD = """
import os, signal, sys
from pathlib import Path
import torch
from eightgig.models.checkpoint import read_model_spec
from eightgig.quant.build import prepare_store

def progress(now):
    if not told:
        told.append(now.done_bytes)
        print(now.done_bytes, flush=True)
    if now.done_bytes >= float(sys.argv[3]) * now.total_bytes:
        os.kill(os.getpid(), signal.SIGKILL)

told = []
folder = Path(sys.argv[1])
prepare_store(
    read_model_spec(folder), folder, cache_dir=Path(sys.argv[2]), device=torch.device("cpu"),
    progress=progress,
)
"""


def _prepare(model: Path, cache_dir: Path, share: float) -> tuple[int, int]:
    """Exit status of a preparation, and the bytes that it found done."""
    result = subprocess.run(
        [sys.executable, "-c", _CHILD, str(model), str(cache_dir), str(share)],
        capture_output=True, text=True, cwd=_ROOT, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.stdout, result.stderr
    return result.returncode, int(result.stdout)


def _files(cache_dir: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(cache_dir)): path.read_bytes()
        for path in cache_dir.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_preparation_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    model = make_model("gemma4_e2b", tmp_path / "model", dtype="bfloat16", max_shard_size="200KB")
    assert _prepare(model, tmp_path / "whole", 2) == (0, 0)
    cut = tmp_path / "cut"
    assert _prepare(model, cut, 0.5)[0] == -signal.SIGKILL
    half = _files(cut)
    assert any(name.endswith(".blob") for name in half)
    assert not any(name.endswith("manifest.json") for name in half)
    status, done_bytes = _prepare(model, cut, 2)
    assert status == 0
    assert done_bytes > 0
    assert _files(cut) == _files(tmp_path / "whole")
