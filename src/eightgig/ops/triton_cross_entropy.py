"""The elementwise part of a streamed cross-entropy in Triton: one vocabulary chunk, one pass."""

# ruff: noqa: N803 - constants of a kernel are written in capitals

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from eightgig.ops.triton_jit import device_function, kernel

_BLOCK = 4096


@device_function
def _load_logits(
    row: tl.tensor, begin: tl.tensor, label: tl.tensor, C: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """Logits of a block of columns; -inf at the label's and behind the last."""
    columns = begin + tl.arange(0, BLOCK)
    inside = columns < C
    z = tl.load(row + columns, mask=inside, other=float("-inf"))
    return tl.where(columns == label, float("-inf"), z), columns, inside


@kernel(varying=("cap",))
def _capped(
    logits: tl.tensor,
    labels: tl.tensor,
    sums: tl.tensor,
    out: tl.tensor,
    logits_stride: tl.tensor,
    out_stride: tl.tensor,
    cap: tl.tensor,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + token)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, C, BLOCK):
        z, columns, inside = _load_logits(logits + token * logits_stride, begin, label, C, BLOCK)
        # tanh(x) = sign(x) (1 - a) / (1 + a) and 1 - tanh^2 = 4 a / (1 + a)^2 with a = exp(-2 |x|).
        a = tl.exp(-2.0 / cap * tl.abs(z))
        t = (1.0 - a) / (1.0 + a)
        t = tl.where(z < 0, -t, t)
        e = tl.where(z == float("-inf"), 0.0, tl.exp(cap * t - cap))
        total += e
        slope = 4.0 * a / ((1.0 + a) * (1.0 + a))
        at = out + token * out_stride + columns
        tl.store(at, (e * slope).to(out.dtype.element_ty), mask=inside)
    tl.store(sums + token, tl.load(sums + token) + tl.sum(total, 0))


@kernel()
def _uncapped(
    logits: tl.tensor,
    labels: tl.tensor,
    maxima: tl.tensor,
    sums: tl.tensor,
    factors: tl.tensor,
    out: tl.tensor,
    logits_stride: tl.tensor,
    out_stride: tl.tensor,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + token)
    row = logits + token * logits_stride
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    for begin in range(0, C, BLOCK):
        z, _, _ = _load_logits(row, begin, label, C, BLOCK)
        highest = tl.maximum(highest, z)
    before = tl.load(maxima + token)
    grown = tl.maximum(before, tl.max(highest, 0))
    # A first chunk of the label's column alone leaves the maximum at -inf.
    finite = tl.where(grown == float("-inf"), 0.0, grown)
    factor = tl.where(grown == float("-inf"), 1.0, tl.exp(before - finite))
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, C, BLOCK):
        z, columns, inside = _load_logits(row, begin, label, C, BLOCK)
        e = tl.exp(z - finite)
        total += e
        tl.store(
            out + token * out_stride + columns,
            e.to(out.dtype.element_ty),
            mask=inside,
        )
    tl.store(maxima + token, grown)
    tl.store(factors + token, factor)
    tl.store(sums + token, tl.load(sums + token) * factor + tl.sum(total, 0))


def cross_entropy_chunk(
    logits: Tensor,
    labels_local: Tensor,
    softcap: float | None,
    maxima: Tensor | None,
    sums: Tensor,
    out: Tensor,
) -> Tensor | None:
    """`reference.cross_entropy_chunk`."""
    tokens, C = logits.shape
    grid, strides = (tokens, 1, 1), (logits.stride(0), out.stride(0))
    if softcap is not None:
        _capped.launch(
            grid, logits, labels_local, sums, out, *strides, softcap,
            constants=(C, _BLOCK), num_warps=8,
        )  # fmt: skip
        return None
    assert maxima is not None, "without a cap the row maxima are needed"
    factors = torch.empty_like(sums)
    _uncapped.launch(
        grid, logits, labels_local, maxima, sums, factors, out, *strides,
        constants=(C, _BLOCK), num_warps=8,
    )  # fmt: skip
    return factors
