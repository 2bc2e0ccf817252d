"""safetensors files: written part by part, read after a look at their header.

Written here and not by the safetensors package, because that opens the file itself: no flush, no
hash on the way, and a copy of everything in memory. Reading is the package's.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eightgig.units import MIB, format_bytes

MAX_HEADER_BYTES = 25 * MIB
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorFileError(Exception):
    """A file is not a safetensors file one may read; the text says why in a few words."""


def tensor_parts(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file with `tensors`, in order, one part per tensor.

    Args:
        tensors: By name; any device, any of safetensors' common dtypes. One at a time is copied
            to host memory.

    Yields:
        The header, then the data of each tensor; joined they are the file.
    """
    order, header = plan_file(
        {
            name: (_DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes)
            for name, tensor in tensors.items()
        }
    )
    yield header
    for name in order:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def plan_file(
    layouts: Mapping[str, tuple[str, tuple[int, ...], int]],
) -> tuple[list[str], bytes]:
    """How a safetensors file begins, and the order of the data behind that.

    Args:
        layouts: By name: safetensors' dtype, shape, and bytes of data.
    """

    def element_bytes(name: str) -> int:
        _, shape, size_bytes = layouts[name]
        return size_bytes // max(1, math.prod(shape))

    # Wide elements first: then every tensor starts at a multiple of its element size.
    order = sorted(layouts, key=lambda name: (-element_bytes(name), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset_bytes = 0
    for name in order:
        dtype, shape, size_bytes = layouts[name]
        end_bytes = offset_bytes + size_bytes
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset_bytes, end_bytes],
        }
        offset_bytes = end_bytes
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return order, len(text).to_bytes(8, "little") + text


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the data of `tensors`."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a safetensors file, from its header alone.

    Raises:
        TensorFileError: `path` is not a regular file, or its header is damaged or oversized.
        OSError: It cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise TensorFileError("it is not a regular file")
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise TensorFileError(
            f"its header claims {format_bytes(header_bytes)}, "
            f"{format_bytes(MAX_HEADER_BYTES)} are allowed"
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise TensorFileError(f"it is no safetensors file ({error})") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors file `path`, in host memory.

    Raises:
        TensorFileError: See `read_shapes`.
        OSError: It cannot be read.
    """
    names = read_shapes(path)
    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in names}
