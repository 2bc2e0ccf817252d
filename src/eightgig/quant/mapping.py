"""Files as tensors, and tensors as files: mapped without a copy, written beside and renamed."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import warnings
from collections.abc import Iterable
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eightgig.quant.manifest import ALIGNMENT_BYTES

_SAFETENSORS_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
}


def map_file(path: Path) -> Tensor:
    """The file's bytes, uint8, mapped read-only: writing to the tensor ends the process.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is empty.
    """
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return _read_only_tensor(mapped)


def tensor_of(array: NDArray[np.uint8]) -> Tensor:
    """The array's bytes as a flat uint8 tensor, without a copy; read-only arrays, too."""
    return _read_only_tensor(array.reshape(-1).data)


def write_parts(path: Path, parts: Iterable[Tensor | bytes], *, flush: bool = True) -> str:
    """Write `parts` beside `path`, flush them to the disk, rename; returns their SHA-256.

    Args:
        path: The file.
        parts: Contiguous host tensors (their bytes) and bytes, one after another.
        flush: False where a power cut may cost the file.
    """
    digest = hashlib.sha256()
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        for part in parts:
            data = part if isinstance(part, bytes) else tensor_bytes(part)
            digest.update(data)
            file.write(data)
        if flush:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous host tensor, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def safetensors_header(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    """Head of a safetensors file with one tensor, padded so that the data starts aligned."""
    size_bytes = prod(shape) * dtype.itemsize
    entry = {
        "dtype": _SAFETENSORS_NAMES[dtype],
        "shape": list(shape),
        "data_offsets": [0, size_bytes],
    }
    text = json.dumps({name: entry}).encode("utf-8")
    padding = -(len(text) + 8) % ALIGNMENT_BYTES
    return (len(text) + padding).to_bytes(8, "little") + text + b" " * padding


def _read_only_tensor(buffer: mmap.mmap | memoryview) -> Tensor:
    with warnings.catch_warnings():
        # Nobody writes to it: that is the contract of the functions here.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(buffer, dtype=torch.uint8)
