"""Dropout by a hash of token, module and column in Triton; the mask is never stored."""

# ruff: noqa: N803 - constants of a kernel are written in capitals

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from eightgig.ops.triton_jit import device_function, kernel

_BLOCK = 1024


@device_function
def _mix32(value: tl.tensor) -> tl.tensor:
    """`reference.mix32` of uint32."""
    value = (value ^ (value >> 16)) * tl.full([], 0x7FEB352D, tl.uint32)
    value = (value ^ (value >> 15)) * tl.full([], 0x846CA68B, tl.uint32)
    return value ^ (value >> 16)


@kernel(varying=("module_key", "threshold", "scale"))
def _dropout(
    hidden: tl.tensor,
    row_keys: tl.tensor,
    out: tl.tensor,
    hidden_stride: tl.tensor,
    out_stride: tl.tensor,
    module_key: tl.tensor,
    threshold: tl.tensor,
    scale: tl.tensor,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    token = _mix32(tl.load(row_keys + row).to(tl.uint32) ^ module_key.to(tl.uint32))
    keeps = _mix32(token ^ _mix32(columns.to(tl.uint32))) >= threshold.to(tl.uint32)
    value = tl.load(
        hidden + tl.multiple_of(row * hidden_stride, 8) + columns, mask=inside, other=0.0
    ).to(tl.float32)
    value = tl.where(keeps, value * scale, 0.0)
    tl.store(
        out + tl.multiple_of(row * out_stride, 8) + columns,
        value.to(out.dtype.element_ty),
        mask=inside,
    )


def dropout(
    hidden: Tensor, row_keys: Tensor, module_key: int, p: float, *, out: Tensor | None = None
) -> Tensor:
    """`reference.dropout`, the same mask bit for bit."""
    tokens, D = hidden.shape
    if out is None:
        out = torch.empty_like(hidden)
    _dropout.launch(
        (tokens, -(-D // _BLOCK), 1),
        hidden, row_keys, out, hidden.stride(0), out.stride(0),
        _as_int32(module_key), _as_int32(int(p * 2**32)), 1 / (1 - p),
        constants=(D, _BLOCK),
    )  # fmt: skip
    return out


def _as_int32(value: int) -> int:
    """The signed number with the bits of `value`: one type of argument, one compiled kernel."""
    return value - (1 << 32) if value >= 1 << 31 else value
