"""The allocator of a real card takes the settings that `prepare_allocator` gives it."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

CODE = """
from eightgig.hardware.allocator import prepare_allocator
prepare_allocator()
import torch
held = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
segments = torch.cuda.memory_snapshot()
assert segments and all(segment["is_expandable"] for segment in segments), segments
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no expandable segments")
def test_segments_are_expandable_and_torch_does_not_complain() -> None:
    kept = {name: text for name, text in os.environ.items() if "ALLOC_CONF" not in name}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=kept, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "ALLOC_CONF" not in done.stderr
