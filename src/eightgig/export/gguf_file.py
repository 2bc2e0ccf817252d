"""A GGUF file as a stream of bytes: the header by the gguf library, tensors a block at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from eightgig.errors import ExportError

if TYPE_CHECKING:
    from gguf import GGUFWriter

ALIGNMENT_BYTES = 32
DIRECT_TYPES = ("f32", "f16", "bf16", "q8_0")
"""Types that are written here; llama-quantize makes the others."""

# What the header takes besides tensor names: vocabulary and template, generously.
HEADER_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufTensor:
    """One tensor of a GGUF file.

    Attributes:
        name: As llama.cpp knows it.
        shape: Outermost dimension first.
        kind: One of `DIRECT_TYPES`.
        blocks: Makes its rows in float32, some at a time.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    blocks: Callable[[], Iterator[Tensor]]

    @property
    def size_bytes(self) -> int:
        """Bytes of its data."""
        return prod(_byte_shape(self.shape, self.kind))


def load_gguf() -> Any:
    """The gguf library.

    Raises:
        ExportError: It is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ExportError(
            "The gguf library is not installed.",
            why="GGUF files are written with llama.cpp's own library.",
            fix='Run pip install "eightgig[gguf]".',
        ) from error
    return gguf


def stored_kind(name: str, shape: tuple[int, ...], wanted: str) -> str:
    """The type that llama.cpp's rules give a tensor, where `wanted` is asked for.

    Vectors and norms stay in float32; rows that are no whole number of blocks are not quantised.
    """
    if len(shape) <= 1 or name.endswith("_norm.weight"):
        return "f32"
    if wanted == "q8_0" and shape[-1] % _block_size("q8_0"):
        return "f16"
    return wanted


def gguf_parts(
    writer: GGUFWriter, tensors: list[GgufTensor], *, wrote: Callable[[int], None]
) -> Iterator[bytes | memoryview]:
    """The bytes of a whole GGUF file.

    Args:
        writer: Holds all keys and values; it writes to no file of the caller's.
        tensors: In the order of the file.
        wrote: Called with the bytes of each block of tensor data.

    Raises:
        ExportError: A number is too large for the type.
    """
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name,
            _byte_shape(tensor.shape, tensor.kind),
            np.dtype(np.uint8),
            tensor.size_bytes,
            raw_dtype=_quantization_type(tensor.kind),
        )
    header = _header(writer)
    yield header + bytes(-len(header) % ALIGNMENT_BYTES)
    for tensor in tensors:
        written_bytes = 0
        for block in tensor.blocks():
            part = encode_block(block, tensor)
            written_bytes += part.nbytes
            yield part
            wrote(part.nbytes)
        assert written_bytes == tensor.size_bytes, (tensor.name, written_bytes, tensor.size_bytes)
        yield bytes(-written_bytes % ALIGNMENT_BYTES)


def encode_block(block: Tensor, tensor: GgufTensor) -> memoryview:
    """Rows of float32 in the type of `tensor`.

    Raises:
        ExportError: A number is too large for float16.
    """
    if tensor.kind == "q8_0":
        gguf = load_gguf()
        codes = gguf.quants.quantize(block.numpy(), _quantization_type("q8_0"))
        data: memoryview = np.ascontiguousarray(codes).reshape(-1).data
        return data
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[tensor.kind]
    rounded = block.to(dtype).contiguous()
    if tensor.kind == "f16" and not bool(torch.isfinite(rounded).all()):
        raise ExportError(
            f"The tensor {tensor.name} has numbers that float16 cannot hold.",
            why="float16 ends at 65,504; the model was made for bfloat16.",
            fix="Export with --type bf16.",
        )
    return rounded.reshape(-1).view(torch.uint8).numpy().data


def _header(writer: GGUFWriter) -> bytes:
    """Header, keys and tensor list, as the library writes them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "header")
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return path.read_bytes()


def _byte_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    from gguf.quants import quant_shape_to_byte_shape

    byte_shape: tuple[int, ...] = quant_shape_to_byte_shape(shape, _quantization_type(kind))
    return byte_shape


def _block_size(kind: str) -> int:
    gguf = load_gguf()
    return int(gguf.GGML_QUANT_SIZES[_quantization_type(kind)][0])


def _quantization_type(kind: str) -> Any:
    return load_gguf().GGMLQuantizationType[kind.upper()]
