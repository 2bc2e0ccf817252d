"""Settings of torch's CUDA allocator that must stand before torch is loaded."""

from __future__ import annotations

import os
import sys

_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def prepare_allocator() -> None:
    """Ask for expandable segments, which do not fragment; what the user has set stays.

    Windows has none. Does nothing once torch is loaded.
    """
    if sys.platform == "win32" or "torch" in sys.modules:
        return
    if not any(name in os.environ for name in _VARIABLES):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
