"""The smallest kernel: whether Triton, the C compiler and Python's headers work together.

Imported in a child process of the doctor alone, where Triton is installed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_SIZE = 128


def _add_one(values: tl.tensor, size: tl.constexpr) -> None:
    places = tl.arange(0, size)
    tl.store(values + places, tl.load(values + places) + 1.0)


def run_kernel(device: str) -> dict[str, Any]:
    """Compile a kernel and run it.

    Args:
        device: `cuda`; `cpu` works under TRITON_INTERPRET=1.

    Returns:
        Triton's version, and whether the result is right.
    """
    values = torch.zeros(_SIZE, device=device)
    triton.jit(_add_one)[(1,)](values, size=_SIZE)
    return {"version": triton.__version__, "is_right": bool((values == 1.0).all())}
