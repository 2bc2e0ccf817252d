"""The Triton kernels without a GPU: under Triton's interpreter, and cross-compiled."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")


def _release(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version(package).split(".")[:2])


@pytest.mark.skipif(
    _release("triton") < (3, 7) and _release("numpy") >= (2, 4),
    reason="the interpreter of Triton before 3.7 breaks on NumPy 2.4",
)
def test_kernels_agree_with_the_definitions_under_the_interpreter() -> None:
    cases = Path(__file__).with_name("interpreted_kernels.py")
    # Triton reads the variable when it is first imported, so this takes another process. NumPy
    # warns where a masked lane divides by zero, which a GPU does without a word.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "ignore::RuntimeWarning", str(cases)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
