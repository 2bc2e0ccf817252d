"""The one place where running out of memory is caught: a detour, not an end."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

ResultT = TypeVar("ResultT")

# What libraries raise as plain RuntimeErrors when they cannot allocate.
_SIGNS = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
)


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """Memory ran out; the message of whoever noticed."""

    message: str


def attempt(work: Callable[[], ResultT]) -> ResultT | OutOfMemory:
    """The result of `work`, or word that memory ran out, with all it held given back.

    The handler runs after the `except` block: until then the exception holds the frames, and the
    frames hold the tensors.
    """
    try:
        return work()
    except torch.OutOfMemoryError as error:
        message = str(error)
    except RuntimeError as error:
        message = str(error)
        if not any(sign in message for sign in _SIGNS):
            raise
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return OutOfMemory(message.splitlines()[0])
