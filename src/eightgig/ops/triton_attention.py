"""Causal attention of packed rows in Triton, forward and backward, for head_dim up to 512.

K and V are never expanded to the query heads and no score leaves the chip. The backward pass adds
nothing atomically, so that the same inputs give the same bits. Tiles are chosen by what a block
of the device may use of shared memory: `attention_tiles`.

With `Tile.apart` the products for scores stand in an `if` that is always true. Triton gives the
products of one region that feed each other one division among the warps, and where head_dim is much
longer than a tile that of the results is bad for the scores: several warps compute the same
numbers, two to four times the matrix instructions.
"""

# ruff: noqa: N803 - constants of a kernel are written in capitals

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from eightgig.ops.triton_jit import device_function, kernel

_UNLIMITED = 1 << 30
_LOG2E = tl.constexpr(1.4426950408889634)


@device_function
def _row_of(cu_seqlens: tl.tensor, row: tl.tensor) -> tl.tensor:
    start = tl.load(cu_seqlens + row)
    return start, tl.load(cu_seqlens + row + 1) - start


@device_function
def _tile(
    matrix: tl.tensor,
    stride: tl.tensor,
    row: tl.tensor,
    end: tl.tensor,
    column: tl.tensor,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    TMA: tl.constexpr,
) -> tl.tensor:
    """Rows `row` ... `row` + ROWS of D columns.

    Rows from `end` on are 0, or with TMA those of the next packed row: finite, and masked later.
    """
    if TMA:
        tile = matrix.load([row, column])
    else:
        rows = tl.arange(0, ROWS)
        # Rows start at multiples of 16 bytes, whether or not Triton can see it in the stride.
        at = matrix + tl.multiple_of(row.to(tl.int64) * stride, 8) + column
        at += tl.multiple_of(rows[:, None] * stride, [8, 8]) + tl.arange(0, D)[None, :]
        tile = tl.load(at, mask=(row + rows < end)[:, None], other=0.0)
    return tile


@device_function
def _sees(queries: tl.tensor, keys: tl.tensor, window: tl.tensor) -> tl.tensor:
    return (keys <= queries) & (keys > queries - window)


@device_function
def _store_rows(
    matrix: tl.tensor, at: tl.tensor, value: tl.tensor, inside: tl.tensor, WANTED: tl.constexpr
) -> None:
    if WANTED:
        tl.store(matrix + at, value.to(matrix.dtype.element_ty), mask=inside[:, None])


@kernel(varying=("num_tokens", "window", "scale"))
def _forward(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    cu_seqlens: tl.tensor,
    q_stride: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    out_stride: tl.tensor,
    num_tokens: tl.tensor,
    window: tl.tensor,
    scale: tl.tensor,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
    APART: tl.constexpr,
) -> None:
    head = tl.program_id(0)
    start, length = _row_of(cu_seqlens, tl.program_id(2))
    tile = tl.cdiv(length, BLOCK_M) - 1 - tl.program_id(1)
    if tile < 0:
        return
    first = tile * BLOCK_M
    end = start + length
    kv_column = head // GROUP * D
    queries = first + tl.arange(0, BLOCK_M)
    q_tile = _tile(q, q_stride, start + first, end, head * D, BLOCK_M, D, TMA)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, D], tl.float32)
    weights = tl.zeros([BLOCK_M, BLOCK_N], q_tile.dtype)
    factor = tl.zeros([BLOCK_M], tl.float32)
    oldest = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
    for begin in tl.range(oldest, tl.minimum(first + BLOCK_M, length), BLOCK_N, num_stages=STAGES):
        keys = begin + tl.arange(0, BLOCK_N)
        k_tile = _tile(k, k_stride, start + begin, end, kv_column, BLOCK_N, D, TMA)
        v_tile = _tile(v, v_stride, start + begin, end, kv_column, BLOCK_N, D, TMA)
        if (begin >= 0) if APART else True:  # always true: see the module's first lines
            scores = tl.dot(q_tile, tl.trans(k_tile)) * (scale * _LOG2E)
            sees = _sees(queries[:, None], keys[None, :], window)
            scores = tl.where(sees, scores, float("-inf"))
            grown = tl.maximum(maximum, tl.max(scores, 1))
            # A query whose window starts after this tile has seen nothing: -inf - -inf is nan.
            finite = tl.where(grown == float("-inf"), 0.0, grown)
            scores = tl.exp2(scores - finite[:, None])
            factor = tl.exp2(maximum - finite)
            total = total * factor + tl.sum(scores, 1)
            maximum = grown
            weights = scores.to(q_tile.dtype)
        result = tl.dot(weights, v_tile, result * factor[:, None])
    inside = queries < length
    at = tl.multiple_of((start.to(tl.int64) + queries)[:, None] * out_stride, [8, 8])
    at += head * D + tl.arange(0, D)[None, :]
    _store_rows(out, at, result / total[:, None], inside, True)
    tl.store(
        lse + head.to(tl.int64) * num_tokens + start + queries,
        (maximum + tl.log2(total)) / _LOG2E,
        mask=inside,
    )


@kernel(varying=("num_tokens", "window", "scale"))
def _backward_q(
    grad_out: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    grad_q: tl.tensor,
    cu_seqlens: tl.tensor,
    grad_stride: tl.tensor,
    q_stride: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    out_stride: tl.tensor,
    num_tokens: tl.tensor,
    window: tl.tensor,
    scale: tl.tensor,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
    APART: tl.constexpr,
    LAZY: tl.constexpr,
) -> None:
    head = tl.program_id(0)
    start, length = _row_of(cu_seqlens, tl.program_id(2))
    tile = tl.cdiv(length, BLOCK_M) - 1 - tl.program_id(1)
    if tile < 0:
        return
    first = tile * BLOCK_M
    end = start + length
    kv_column = head // GROUP * D
    queries = first + tl.arange(0, BLOCK_M)
    inside = queries < length
    g_tile = _tile(grad_out, grad_stride, start + first, end, head * D, BLOCK_M, D, TMA)
    o_tile = _tile(out, out_stride, start + first, end, head * D, BLOCK_M, D, TMA)
    dots = tl.sum(g_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    by_token = head.to(tl.int64) * num_tokens + start + queries
    tl.store(delta + by_token, dots, mask=inside)
    denominator = tl.load(lse + by_token, mask=inside, other=0.0) * _LOG2E
    q_tile = _tile(q, q_stride, start + first, end, head * D, BLOCK_M, D, TMA)
    result = tl.zeros([BLOCK_M, D], tl.float32)
    weights = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    slopes = tl.zeros([BLOCK_M, BLOCK_N], q_tile.dtype)
    oldest = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
    newest = tl.minimum(first + BLOCK_M, length)
    for begin in tl.range(oldest, newest, BLOCK_N, num_stages=STAGES):
        keys = begin + tl.arange(0, BLOCK_N)
        k_tile = _tile(k, k_stride, start + begin, end, kv_column, BLOCK_N, D, TMA)
        if not LAZY:
            v_tile = _tile(v, v_stride, start + begin, end, kv_column, BLOCK_N, D, TMA)
        if (begin >= 0) if APART else True:
            scores = tl.dot(q_tile, tl.trans(k_tile)) * (scale * _LOG2E)
            sees = _sees(queries[:, None], keys[None, :], window)
            weights = tl.where(sees, tl.exp2(scores - denominator[:, None]), 0.0)
        if (begin < newest) if APART else True:
            if LAZY:
                v_tile = _tile(v, v_stride, start + begin, end, kv_column, BLOCK_N, D, TMA)
            slopes_32 = weights * (tl.dot(g_tile, tl.trans(v_tile)) - dots[:, None])
            slopes = slopes_32.to(q_tile.dtype)
        result = tl.dot(slopes, k_tile, result)
    at = (start.to(tl.int64) + queries)[:, None] * (HEADS * D) + head * D + tl.arange(0, D)[None, :]
    _store_rows(grad_q, at, result * scale, inside, True)


@kernel(varying=("num_tokens", "window", "scale", "splits"))
def _backward_kv(
    grad_out: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    grad_k: tl.tensor,
    grad_v: tl.tensor,
    cu_seqlens: tl.tensor,
    grad_stride: tl.tensor,
    q_stride: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    num_tokens: tl.tensor,
    window: tl.tensor,
    scale: tl.tensor,
    splits: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
    APART: tl.constexpr,
    LAZY: tl.constexpr,
    WANTS_K: tl.constexpr,
    WANTS_V: tl.constexpr,
) -> None:
    kv_head = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    start, length = _row_of(cu_seqlens, tl.program_id(2))
    first = tl.program_id(1) * BLOCK_N
    if first >= length:
        return
    end = start + length
    keys = first + tl.arange(0, BLOCK_N)
    k_tile = _tile(k, k_stride, start + first, end, kv_head * D, BLOCK_N, D, TMA)
    if WANTS_K:
        v_tile = _tile(v, v_stride, start + first, end, kv_head * D, BLOCK_N, D, TMA)
    k_result = tl.zeros([BLOCK_N, D], tl.float32)
    v_result = tl.zeros([BLOCK_N, D], tl.float32)
    oldest = first // BLOCK_M * BLOCK_M
    tiles = tl.cdiv(tl.minimum(length, first + BLOCK_N - 1 + window) - oldest, BLOCK_M)
    heads = GROUP // splits
    first_head = kv_head * GROUP + split * heads
    weights = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    weights_16 = tl.zeros([BLOCK_N, BLOCK_M], k_tile.dtype)
    slopes = tl.zeros([BLOCK_N, BLOCK_M], k_tile.dtype)
    for step in tl.range(tiles * heads, num_stages=STAGES):
        head = first_head + step // tiles
        begin = oldest + step % tiles * BLOCK_M
        queries = begin + tl.arange(0, BLOCK_M)
        inside = queries < length
        by_token = head.to(tl.int64) * num_tokens + start + queries
        q_tile = _tile(q, q_stride, start + begin, end, head * D, BLOCK_M, D, TMA)
        if not LAZY:
            g_tile = _tile(grad_out, grad_stride, start + begin, end, head * D, BLOCK_M, D, TMA)
        if (step >= 0) if APART else True:
            denominator = tl.load(lse + by_token, mask=inside, other=0.0) * _LOG2E
            scores = tl.dot(k_tile, tl.trans(q_tile)) * (scale * _LOG2E)  # (n, m)
            sees = _sees(queries[None, :], keys[:, None], window) & inside[None, :]
            weights = tl.where(sees, tl.exp2(scores - denominator[None, :]), 0.0)
            weights_16 = weights.to(k_tile.dtype)
        if WANTS_V:
            v_result = tl.dot(weights_16, g_tile, v_result)
        if WANTS_K:
            if (step < tiles * heads) if APART else True:
                if LAZY:
                    g_tile = _tile(
                        grad_out, grad_stride, start + begin, end, head * D, BLOCK_M, D, TMA
                    )
                dots = tl.load(delta + by_token, mask=inside, other=0.0)
                slopes_32 = weights * (tl.dot(v_tile, tl.trans(g_tile)) - dots[None, :])
                slopes = slopes_32.to(k_tile.dtype)
            k_result = tl.dot(slopes, q_tile, k_result)
    at = (split.to(tl.int64) * num_tokens + start + keys)[:, None] * (KV_HEADS * D)
    at += kv_head * D + tl.arange(0, D)[None, :]
    _store_rows(grad_k, at, k_result * scale, keys < length, WANTS_K)
    _store_rows(grad_v, at, v_result, keys < length, WANTS_V)


@kernel(varying=("size", "splits"))
def _sum_splits(
    parts: tl.tensor, out: tl.tensor, size: tl.tensor, splits: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """out[i, j] = sum over s of parts[i, s, j]; two rows i."""
    which = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    result = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        result += tl.load(parts + (which * splits + split) * size + at, mask=at < size, other=0.0)
    tl.store(out + which * size + at, result.to(out.dtype.element_ty), mask=at < size)


@dataclass(frozen=True, slots=True)
class Tile:
    """How one kernel cuts its work.

    Attributes:
        queries, keys: Rows of Q and of K in a tile.
        warps: Of 32 threads, per program.
        stages: Tiles in flight; 1 keeps no more than one in shared memory.
        apart: Divide the products for scores among the warps in their own way.
        lazy: Load V, or for the gradient of K that of the output, just when it is needed: it is
            waited for, but takes one buffer only.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    apart: bool = False
    lazy: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionTiles:
    """Tiles of all kernels for one head_dim on one device.

    Attributes:
        forward, grad_q, grad_k, grad_v: Tiles; without `grad_v` one kernel makes both of K, V.
        uses_tma: Load tiles by the copy engine of Hopper and later.
        processors: Multiprocessors of the device, which the backward pass has to fill.
    """

    forward: Tile
    grad_q: Tile
    grad_k: Tile
    grad_v: Tile | None
    uses_tma: bool
    processors: int


_Tiles = tuple[Tile, Tile, Tile, Tile | None]  # forward, grad_q, grad_k, grad_v

# Measured on an H100 (torch 2.11, Triton 3.6, 2026-11-24) by benchmarks/attention_tiles.py: 4,096
# tokens, 16 query heads, forward + backward in ms, beside torch's best: head_dim 512, 1 kv head:
# 6.0 (memory-efficient 27.6); 256, 8 kv heads, window 1,024: 0.90 (flash 1.08); 128, 32 and 8
# heads: 1.36 (flash 1.91).
_HOPPER_TILES: dict[int, _Tiles] = {
    64: (Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), None),
    128: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), None),
    256: (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2, apart=True), None),
    512: (
        Tile(64, 64, 8, 1, apart=True),
        Tile(64, 32, 8, 1, apart=True),
        Tile(32, 64, 8, 2, apart=True, lazy=True),
        Tile(32, 64, 8, 2, apart=True),
    ),
}
# Chosen for few matrix instructions, no spilled registers and at most 99 KB; not measured on the
# cards they are for. On an H100 head_dim 512 takes 8.7 ms with them.
_SMALL_TILES: dict[int, _Tiles] = {
    64: (Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2), None),
    128: (Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2), None),
    256: (
        Tile(64, 32, 8, 2, apart=True),
        Tile(32, 32, 8, 2, apart=True),
        Tile(32, 32, 8, 2, apart=True),
        None,
    ),
    512: (
        Tile(64, 16, 8, 2, apart=True),
        Tile(32, 16, 4, 2, apart=True),
        Tile(16, 32, 4, 2, apart=True),
        Tile(16, 64, 8, 2, apart=True),
    ),
}


def attention_tiles(
    head_dim: int, capability: tuple[int, int], processors: int
) -> AttentionTiles | None:
    """The tiles for a GPU of this compute capability, None where none are known to work.

    Those of Hopper take up to 227 KB of shared memory per block, the others at most 99 KB, which
    is what sm_86, sm_89 and sm_120 have; sm_80 has more.
    """
    if capability == (9, 0):
        tiles, uses_tma = _HOPPER_TILES.get(head_dim), True
    elif capability[0] in (8, 12):
        tiles, uses_tma = _SMALL_TILES.get(head_dim), False
    else:
        return None
    if tiles is None:
        return None
    forward, grad_q, grad_k, grad_v = tiles
    return AttentionTiles(
        forward=forward,
        grad_q=grad_q,
        grad_k=grad_k,
        grad_v=grad_v,
        uses_tma=uses_tma,
        processors=processors,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRows:
    """Where the rows of a packed batch are, and how far back a query sees in its row."""

    cu_seqlens: Tensor
    max_length: int
    window: int

    def grid(self, heads: int, tile_tokens: int) -> tuple[int, int, int]:
        """A program per head, tile of the longest row, and row."""
        return heads, -(-self.max_length // tile_tokens), self.cu_seqlens.shape[0] - 1


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scale: float,
    window: int | None,
    *,
    tiles: AttentionTiles,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.attention`; the packed rows must cover all N tokens."""
    tokens, heads, head_dim = q.shape
    rows = PackedRows(cu_seqlens=cu_seqlens, max_length=max_length, window=window or _UNLIMITED)
    tile = tiles.forward
    if out is None:
        out = torch.empty_like(q)
    lse = q.new_empty(heads, tokens, dtype=torch.float32)
    _forward.launch(
        rows.grid(heads, tile.queries),
        _matrix(q, tile.queries, tiles),
        _matrix(k, tile.keys, tiles),
        _matrix(v, tile.keys, tiles),
        out, lse, cu_seqlens,
        q.stride(0), k.stride(0), v.stride(0), out.stride(0), tokens, rows.window, scale,
        constants=(
            heads // k.shape[1], head_dim, tile.queries, tile.keys, tiles.uses_tma, tile.stages,
            tile.apart,
        ),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, lse


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scale: float,
    window: int | None,
    *,
    tiles: AttentionTiles,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.attention_backward`; the packed rows must cover all N tokens."""
    rows = PackedRows(cu_seqlens=cu_seqlens, max_length=max_length, window=window or _UNLIMITED)
    grad_q, delta = gradient_of_q(grad_out, q, k, v, out, lse, rows, scale, tiles)
    return grad_q, *gradient_of_kv(grad_out, q, k, v, lse, delta, rows, scale, tiles)


def gradient_of_q(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: PackedRows,
    scale: float,
    tiles: AttentionTiles,
) -> tuple[Tensor, Tensor]:
    """The gradient of Q, and sum(grad_out * out) per head and token, which that of K needs."""
    tokens, heads, head_dim = q.shape
    tile = tiles.grad_q
    grad_q = q.new_empty(tokens, heads, head_dim)
    delta = torch.empty_like(lse)
    _backward_q.launch(
        rows.grid(heads, tile.queries),
        _matrix(grad_out, tile.queries, tiles),
        _matrix(q, tile.queries, tiles),
        _matrix(k, tile.keys, tiles),
        _matrix(v, tile.keys, tiles),
        _matrix(out, tile.queries, tiles),
        lse, delta, grad_q, rows.cu_seqlens,
        grad_out.stride(0), q.stride(0), k.stride(0), v.stride(0), out.stride(0),
        tokens, rows.window, scale,
        constants=(
            heads, heads // k.shape[1], head_dim, tile.queries, tile.keys, tiles.uses_tma,
            tile.stages, tile.apart, tile.lazy,
        ),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return grad_q, delta


def gradient_of_kv(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    rows: PackedRows,
    scale: float,
    tiles: AttentionTiles,
) -> tuple[Tensor, Tensor]:
    """The gradients of K and V, summed over the query heads that share them."""
    tokens, heads, head_dim = q.shape
    kv_heads, group = k.shape[1], heads // k.shape[1]
    splits = _splits(tokens, kv_heads, group, tiles)
    grads = k.new_empty(2, *k.shape)
    parts = grads
    if splits > 1:
        parts = k.new_empty(2, splits, *k.shape, dtype=torch.float32)
    kinds = [(tiles.grad_k, True, tiles.grad_v is None)]
    if tiles.grad_v is not None:
        kinds.append((tiles.grad_v, False, True))
    for tile, wants_k, wants_v in kinds:
        _backward_kv.launch(
            rows.grid(kv_heads * splits, tile.keys),
            _matrix(grad_out, tile.queries, tiles),
            _matrix(q, tile.queries, tiles),
            _matrix(k, tile.keys, tiles),
            _matrix(v, tile.keys, tiles),
            lse, delta, parts[0], parts[1], rows.cu_seqlens,
            grad_out.stride(0), q.stride(0), k.stride(0), v.stride(0),
            tokens, rows.window, scale, splits,
            constants=(
                kv_heads, group, head_dim, tile.queries, tile.keys, tiles.uses_tma,
                tile.stages, tile.apart, tile.lazy, wants_k, wants_v,
            ),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    if splits > 1:
        size = k.numel()
        grid = (-(-size // 1024), 2, 1)
        _sum_splits.launch(grid, parts, grads, size, splits, constants=(1024,))
    return grads[0], grads[1]


def _splits(tokens: int, kv_heads: int, group: int, tiles: AttentionTiles) -> int:
    """Programs that share the query heads of one kv head, so that every processor has work.

    Each split has its own float32 sums: no more than are needed.
    """
    programs = -(-tokens // tiles.grad_k.keys) * kv_heads
    splits = 1
    while programs * splits < tiles.processors and group % (2 * splits) == 0:
        splits *= 2
    return splits


class _Rows(TensorDescriptor):  # type: ignore[misc]  # Triton is not typed
    """A descriptor without the checks of its parts, which cost more than the rest of a launch."""

    def __post_init__(self) -> None:
        pass


def _matrix(tensor: Tensor, rows: int, tiles: AttentionTiles) -> Any:
    """What a kernel loads tiles of `rows` tokens and one head from."""
    if not tiles.uses_tma:
        return tensor
    tokens, heads, head_dim = tensor.shape
    return _Rows(tensor, [tokens, heads * head_dim], [tensor.stride(0), 1], [rows, head_dim])
