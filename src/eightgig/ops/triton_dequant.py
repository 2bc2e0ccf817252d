"""4-bit dequantisation in Triton: both levels of scales in a single launch."""

# ruff: noqa: N803 - constants of a kernel are written in capitals

from __future__ import annotations

from collections.abc import Callable

import triton.language as tl
from torch import Tensor

from eightgig.ops.triton_jit import kernel

_GROUPS = 512


@kernel(varying=("mean",))
def _dequantize(
    codes: tl.tensor,
    absmax: tl.tensor,
    nested_absmax: tl.tensor,
    mean: tl.tensor,
    code: tl.tensor,
    nested_code: tl.tensor,
    out: tl.tensor,
    groups: tl.tensor,
    out_stride: tl.tensor,
    ROW_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """A group is 8 elements: 4 bytes of codes, 16 bytes of half precision weights."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    inside = group < groups
    word = tl.load(codes.to(tl.pointer_type(tl.int32)) + group, mask=inside, other=0)
    block = group // (BLOCK_SIZE // 8)
    maximum = tl.load(absmax + block, mask=inside, other=0)
    if nested_absmax is not None:
        nested = tl.load(nested_absmax + block // NESTED_BLOCK_SIZE, mask=inside, other=0.0)
        maximum = tl.load(nested_code + maximum) * nested + mean
    place = tl.arange(0, 8)
    shift = place // 2 * 8 + 4 - place % 2 * 4  # bytes from the low end, the high half first
    value = tl.load(code + ((word[:, None] >> shift[None, :]) & 15)) * maximum[:, None]
    at = tl.multiple_of((group // ROW_GROUPS).to(tl.int64) * out_stride, 8)
    at += group % ROW_GROUPS * 8
    tl.store(
        out + at[:, None] + place[None, :], value.to(out.dtype.element_ty), mask=inside[:, None]
    )


def dequantizer(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    mean: float,
    block_size: int,
    nested_block_size: int,
    code: Tensor,
    nested_code: Tensor | None,
    out: Tensor,
) -> Callable[[], None]:
    """What does `quant.nf4.dequantize` whenever it is called, with the same bits.

    Columns and block sizes are multiples of 8; no tensor may move.
    """
    rows, columns = out.shape
    assert columns % 8 == 0, f"columns are a multiple of 8: {columns}"
    assert block_size % 8 == 0, f"blocks are a multiple of 8: {block_size}"
    groups = rows * columns // 8
    # Fused multiply-add would round once where bitsandbytes rounds twice.
    return _dequantize.bind(
        (-(-groups // _GROUPS), 1, 1),
        codes, absmax, nested_absmax, mean, code, nested_code, out, groups, out.stride(0),
        constants=(columns // 8, block_size, nested_block_size, _GROUPS), enable_fp_fusion=False,
    )  # fmt: skip
