"""Tensors that a checkpoint already holds in bitsandbytes' 4-bit format.

Next to the codes under the weight's own name stand `.absmax`, `.quant_map`, with double
quantisation `.nested_absmax` and `.nested_quant_map`, and `.quant_state.bitsandbytes__nf4` (or
`__fp4`): JSON with block sizes, dtype, shape and mean.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from eightgig.errors import ModelError
from eightgig.models.checkpoint import quantized_parts
from eightgig.models.spec import TensorSpec
from eightgig.quant.layout import FourBitFormat, four_bit_layout
from eightgig.quant.nf4 import (
    BLOCK_SIZES,
    DYNAMIC_TABLE,
    FP4_CODE,
    FP4_TABLE,
    NF4_CODE,
    NF4_TABLE,
    QuantizedTensor,
    aligned_rows,
    code_table_tensors,
    dequantize,
    dtype_of,
    dynamic_map,
    write_quantized,
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FourBitTensor:
    """One 4-bit tensor of a checkpoint.

    Attributes:
        quantized: Its parts, mapped.
        four_bit_format: Block sizes and names of its tables.
        dtype: Of the original, and of what bitsandbytes makes of it.
        code_tables: Its tables by those names.
    """

    quantized: QuantizedTensor
    four_bit_format: FourBitFormat
    dtype: str
    code_tables: Mapping[str, tuple[float, ...]]

    def dequantize(self) -> Tensor:
        """The numbers that bitsandbytes makes of it, in `dtype`."""
        shape = self.quantized.shape
        stored, size_bytes = four_bit_layout(
            shape, dtype=self.dtype, four_bit_format=self.four_bit_format
        )
        blob = torch.zeros(size_bytes, dtype=torch.uint8)
        stored = write_quantized(blob, stored, self.quantized)
        tables = code_table_tensors(self.code_tables, blob.device)
        out = torch.empty(shape, dtype=dtype_of(self.dtype))
        return dequantize(blob, stored, tables, out=out)

    def split(self, num_rows: int) -> Iterator[FourBitTensor]:
        """The same tensor, some rows at a time.

        Args:
            num_rows: About so many; a part begins where blocks of maxima and a byte do.
        """
        quantized = self.quantized
        all_rows, columns = quantized.shape
        whole = math.lcm(2, quantized.block_size)
        if quantized.nested_absmax is not None:
            whole *= quantized.nested_block_size
        step = aligned_rows(num_rows, columns, whole)
        for first_row in range(0, all_rows, step):
            last_row = min(first_row + step, all_rows)
            yield replace(self, quantized=self._rows(first_row, last_row))

    def _rows(self, first_row: int, last_row: int) -> QuantizedTensor:
        """Some rows, the first of which begins a block of maxima."""
        quantized = self.quantized
        columns = quantized.shape[1]
        start, stop = first_row * columns, last_row * columns
        blocks = _cut(start, stop, quantized.block_size)
        nested = quantized.nested_absmax
        if nested is not None:
            nested = nested[_cut(blocks.start, blocks.stop, quantized.nested_block_size)]
        return replace(
            quantized,
            codes=quantized.codes.view(-1)[_cut(start, stop, 2)],
            absmax=quantized.absmax.view(-1)[blocks],
            nested_absmax=nested,
            shape=(last_row - first_row, columns),
        )


def _cut(start: int, stop: int, size: int) -> slice:
    """The blocks of `size` that hold the values from `start`, where a block begins, to `stop`."""
    return slice(start // size, -(-stop // size))


def format_from_headers(
    tensors: Mapping[str, TensorSpec], name: str, shape: tuple[int, ...]
) -> FourBitFormat | None:
    """A format of the same size as that of the weight `name`; None where it is dense.

    The true block sizes stand in the data. Of small tensors several give the same number of
    maxima; the layout's size is the same with each.
    """
    parts = quantized_parts(tensors, name)
    if parts is None:
        return None
    num_blocks = prod(tensors[parts["absmax"]].shape)
    nested_block_size = None
    if "nested_absmax" in parts:
        nested_block_size = _block_size(num_blocks, prod(tensors[parts["nested_absmax"]].shape))
    return FourBitFormat(
        block_size=_block_size(prod(shape), num_blocks), nested_block_size=nested_block_size
    )


def read_four_bit(
    read: Callable[[str], Tensor], tensors: Mapping[str, TensorSpec], name: str
) -> FourBitTensor | None:
    """The weight `name` with its codes and maxima bit for bit; None where it is dense.

    Args:
        read: Gives a tensor of the checkpoint by its full name, in its own dtype.
        tensors: Headers of the checkpoint.
        name: Full name of the weight.

    Raises:
        ModelError: The description is not bitsandbytes' or does not match the parts.
    """
    names = quantized_parts(tensors, name)
    if names is None:
        return None
    parts = {part: read(full_name) for part, full_name in names.items() if part != "quant_state"}
    state = _read_state(read(names["quant_state"]), name)
    kind = NF4_TABLE if names["quant_state"].endswith(NF4_TABLE) else FP4_TABLE
    code = tuple(parts["quant_map"].tolist())
    code_name = _table_name(kind, code, NF4_CODE if kind == NF4_TABLE else FP4_CODE)
    code_tables = {code_name: code}
    nested_name = DYNAMIC_TABLE
    if state.nested_block_size is not None:
        if not {"nested_absmax", "nested_quant_map"} <= set(parts):
            raise _damaged(name, "its nested maxima are missing")
        nested_code = tuple(parts["nested_quant_map"].tolist())
        nested_name = _table_name(DYNAMIC_TABLE, nested_code, dynamic_map())
        code_tables[nested_name] = nested_code
    quantized = _quantized(parts, state)
    _check(name, quantized)
    return FourBitTensor(
        quantized=quantized,
        four_bit_format=FourBitFormat(
            block_size=state.block_size,
            nested_block_size=state.nested_block_size,
            code_table=code_name,
            nested_code_table=nested_name,
        ),
        dtype=state.dtype,
        code_tables=code_tables,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _State:
    """What `.quant_state` says; `nested_block_size` is None without double quantisation."""

    shape: tuple[int, ...]
    dtype: str
    block_size: int
    nested_block_size: int | None
    mean: float


def _read_state(data: Tensor, name: str) -> _State:
    try:
        values = json.loads(bytes(data.tolist()))
        has_nested = "nested_blocksize" in values
        state = _State(
            shape=tuple(int(size) for size in values["shape"]),
            dtype=str(values["dtype"]),
            block_size=int(values["blocksize"]),
            nested_block_size=int(values["nested_blocksize"]) if has_nested else None,
            mean=float(values["nested_offset"]) if has_nested else 0.0,
        )
        dtype_of(state.dtype)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(name, f"its quant_state cannot be understood ({error})") from error
    return state


def _quantized(parts: Mapping[str, Tensor], state: _State) -> QuantizedTensor:
    has_nested = state.nested_block_size is not None
    absmax = parts["absmax"].reshape(-1)
    return QuantizedTensor(
        codes=parts["codes"].reshape(-1).view(torch.uint8),
        absmax=absmax if has_nested else absmax.float(),
        nested_absmax=parts["nested_absmax"].reshape(-1).float() if has_nested else None,
        mean=state.mean,
        block_size=state.block_size,
        nested_block_size=state.nested_block_size or 0,
        shape=state.shape,
    )


def _check(name: str, quantized: QuantizedTensor) -> None:
    is_nested = quantized.nested_absmax is not None
    if quantized.block_size not in BLOCK_SIZES or (is_nested and quantized.nested_block_size < 1):
        sizes = f"{quantized.block_size} and {quantized.nested_block_size}"
        raise _damaged(name, f"its block sizes are {sizes}")
    num_blocks = -(-prod(quantized.shape) // quantized.block_size)
    expected = {"codes": -(-prod(quantized.shape) // 2), "absmax": num_blocks}
    found = {"codes": quantized.codes.numel(), "absmax": quantized.absmax.numel()}
    if quantized.nested_absmax is not None:
        expected["nested_absmax"] = -(-num_blocks // quantized.nested_block_size)
        found["nested_absmax"] = quantized.nested_absmax.numel()
    if expected != found:
        raise _damaged(name, f"its parts should have {expected} entries and have {found}")


def _damaged(name: str, why: str) -> ModelError:
    return ModelError(
        f"The 4-bit weight {name} of the checkpoint cannot be read.",
        why=f"{why}.",
        fix="Download the checkpoint again, or start from the model in 16 bit.",
    )


def _block_size(count: int, num_blocks: int) -> int:
    """The smallest power of two, 32 or more, that cuts `count` values into `num_blocks` blocks."""
    size = 32
    while -(-count // size) > max(num_blocks, 1):
        size *= 2
    return size


def _table_name(kind: str, table: tuple[float, ...], standard: tuple[float, ...]) -> str:
    """`kind` for the usual table, else one of its own that depends on the numbers."""
    numbers = torch.tensor(table, dtype=torch.float32)
    if torch.equal(numbers, torch.tensor(standard, dtype=torch.float32)):
        return kind
    return f"{kind}-{zlib.crc32(numbers.numpy().tobytes()):08x}"
