"""Many small matrices copied to their places in one launch."""

# ruff: noqa: N803 - constants of a kernel are written in capitals

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton.language as tl
from torch import Tensor

from eightgig.ops.reference import Placed
from eightgig.ops.triton_jit import kernel

_BLOCK = 1024
_FIELDS = 9


@kernel(varying=("scale",))
def _place(
    source: tl.tensor,
    target: tl.tensor,
    table: tl.tensor,
    scale: tl.tensor,
    PIECES: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    piece = 0
    for number in range(1, PIECES):
        piece += (program >= tl.load(table + number * FIELDS)).to(tl.int32)
    row = table + piece * FIELDS
    place = (program - tl.load(row)) * BLOCK + tl.arange(0, BLOCK)
    columns, width = tl.load(row + 4), tl.load(row + 7)
    at, column = place // columns, place % columns
    within = column - tl.load(row + 6)
    inside = at < tl.load(row + 3)
    has = inside & (within >= 0) & (within < width)
    value = tl.load(source + tl.load(row + 1) + at * width + within, mask=has, other=0.0)
    value = value.to(tl.float32) * tl.where(tl.load(row + 8) != 0, scale, 1.0)
    to = target + tl.load(row + 2) + at * tl.load(row + 5) + column
    tl.store(to, value.to(target.dtype.element_ty), mask=inside)


def placer(
    source: Tensor, target: Tensor, pieces: Sequence[Placed], scale: float
) -> Callable[[], None]:
    """`reference.placer`."""
    programs = sum(map(_programs, pieces))
    return _place.bind(
        (programs, 1, 1), source, target, _table(pieces, target.device), scale,
        constants=(len(pieces), _FIELDS, _BLOCK),
    )  # fmt: skip


def _table(pieces: Sequence[Placed], device: torch.device) -> Tensor:
    """What the kernel reads of every piece."""
    rows = []
    first = 0
    for piece in pieces:
        rows.append(
            (
                first, piece.source, piece.target, piece.rows, piece.columns, piece.stride,
                piece.start, piece.width, piece.is_scaled,
            )
        )  # fmt: skip
        first += _programs(piece)
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _programs(piece: Placed) -> int:
    return -(-piece.rows * piece.columns // _BLOCK)
