"""Settings of torch's CUDA allocator that must stand before torch is loaded."""

from __future__ import annotations

import os
import sys

# The name since torch 2.9, which warns of the old one.
VARIABLE = "PYTORCH_ALLOC_CONF"
_OLD_NAMES = ("PYTORCH_CUDA_ALLOC_CONF",)


def prepare_allocator() -> None:
    """Ask for expandable segments, which do not fragment; what the user has set stays.

    Windows has none. Does nothing once torch is loaded.
    """
    if sys.platform == "win32" or "torch" in sys.modules:
        return
    if not any(name in os.environ for name in (VARIABLE, *_OLD_NAMES)):
        os.environ[VARIABLE] = "expandable_segments:True"
