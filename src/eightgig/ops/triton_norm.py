"""RMS norms in Triton: with residual and layer scalar, and of heads together with RoPE.

One program per row, or per head of a few rows; sums are taken in float32. An argument that may be
None is left out of the compiled kernel.
"""

# ruff: noqa: N803 - constants of a kernel are written in capitals

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from eightgig.ops.reference import HeadLayout
from eightgig.ops.triton_jit import device_function, kernel, power_of_two

_HEAD_TILE_ELEMENTS = 4096


@kernel(varying=("eps",))
def _norm_row(
    hidden: tl.tensor,
    weight: tl.tensor,
    residual: tl.tensor,
    scalar: tl.tensor,
    out: tl.tensor,
    hidden_stride: tl.tensor,
    residual_stride: tl.tensor,
    out_stride: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    value = tl.load(
        hidden + tl.multiple_of(row * hidden_stride, 8) + columns, mask=inside, other=0.0
    ).to(tl.float32)
    if NORMS:
        value = value * tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    if weight is not None:
        value = value * tl.load(weight + columns, mask=inside, other=0.0)
    if residual is not None:
        at = residual + tl.multiple_of(row * residual_stride, 8) + columns
        value = tl.load(at, mask=inside, other=0.0).to(tl.float32) + value
    if scalar is not None:
        value = value * tl.load(scalar)
    tl.store(
        out + tl.multiple_of(row * out_stride, 8) + columns,
        value.to(out.dtype.element_ty),
        mask=inside,
    )


@kernel(varying=("eps",))
def _norm_row_backward(
    grad: tl.tensor,
    hidden: tl.tensor,
    weight: tl.tensor,
    add: tl.tensor,
    scalar: tl.tensor,
    grad_residual: tl.tensor,
    out: tl.tensor,
    grad_stride: tl.tensor,
    hidden_stride: tl.tensor,
    add_stride: tl.tensor,
    out_stride: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    g = tl.load(grad + tl.multiple_of(row * grad_stride, 8) + columns, mask=inside, other=0.0).to(
        tl.float32
    )
    if scalar is not None:
        g = g * tl.load(scalar)
        at = grad_residual + row * D + columns
        tl.store(at, g.to(grad_residual.dtype.element_ty), mask=inside)
    if weight is not None:
        g = g * tl.load(weight + columns, mask=inside, other=0.0)
    if NORMS:
        x = tl.load(
            hidden + tl.multiple_of(row * hidden_stride, 8) + columns, mask=inside, other=0.0
        ).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
        x = x * inverse
        g = inverse * (g - x * (tl.sum(g * x, 0) / D))
    if add is not None:
        g += tl.load(
            add + tl.multiple_of(row * add_stride, 8) + columns, mask=inside, other=0.0
        ).to(tl.float32)
    tl.store(
        out + tl.multiple_of(row * out_stride, 8) + columns, g.to(out.dtype.element_ty), mask=inside
    )


@device_function
def _load_halves(
    base: tl.tensor, stride: tl.tensor, rows: tl.tensor, inside: tl.tensor, HALF: tl.constexpr
) -> tl.tensor:
    """Both halves of a head for some rows, (rows, HALF) float32 each."""
    at = base + tl.multiple_of(rows.to(tl.int64)[:, None] * stride, [8, 8])
    at += tl.arange(0, HALF)[None, :]
    first = tl.load(at, mask=inside[:, None], other=0.0)
    second = tl.load(at + HALF, mask=inside[:, None], other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@device_function
def _store_halves(
    base: tl.tensor,
    stride: tl.tensor,
    rows: tl.tensor,
    inside: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    HALF: tl.constexpr,
) -> None:
    at = base + tl.multiple_of(rows.to(tl.int64)[:, None] * stride, [8, 8])
    at += tl.arange(0, HALF)[None, :]
    tl.store(at, first.to(base.dtype.element_ty), mask=inside[:, None])
    tl.store(at + HALF, second.to(base.dtype.element_ty), mask=inside[:, None])


@device_function
def _inverse_rms(
    first: tl.tensor, second: tl.tensor, eps: tl.tensor, HALF: tl.constexpr
) -> tl.tensor:
    return tl.rsqrt(tl.sum(first * first + second * second, 1) / (2 * HALF) + eps)[:, None]


@device_function
def _norm_rope_head(
    source: tl.tensor,
    source_stride: tl.tensor,
    target: tl.tensor,
    target_stride: tl.tensor,
    weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    rows: tl.tensor,
    inside: tl.tensor,
    eps: tl.tensor,
    HALF: tl.constexpr,
    NORMS: tl.constexpr,
) -> None:
    """One head of some rows: norm if wanted, weight if given, rotation if `cos` is given."""
    first, second = _load_halves(source, source_stride, rows, inside, HALF)
    if NORMS:
        inverse = _inverse_rms(first, second, eps, HALF)
        first, second = first * inverse, second * inverse
    columns = tl.arange(0, HALF)[None, :]
    if weight is not None:
        first = first * tl.load(weight + columns)
        second = second * tl.load(weight + HALF + columns)
    if cos is not None:
        at = rows[:, None] * HALF + columns
        c = tl.load(cos + at, mask=inside[:, None], other=0.0)
        s = tl.load(sin + at, mask=inside[:, None], other=0.0)
        first, second = first * c - second * s, second * c + first * s
    _store_halves(target, target_stride, rows, inside, first, second, HALF)


@device_function
def _unrope_unnorm_head(
    grad: tl.tensor,
    grad_stride: tl.tensor,
    source: tl.tensor,
    source_stride: tl.tensor,
    weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    rows: tl.tensor,
    inside: tl.tensor,
    eps: tl.tensor,
    HALF: tl.constexpr,
    NORMS: tl.constexpr,
) -> tl.tensor:
    """Gradient of `_norm_rope_head` with respect to its source, as halves."""
    first, second = _load_halves(grad, grad_stride, rows, inside, HALF)
    columns = tl.arange(0, HALF)[None, :]
    if cos is not None:
        at = rows[:, None] * HALF + columns
        c = tl.load(cos + at, mask=inside[:, None], other=0.0)
        s = tl.load(sin + at, mask=inside[:, None], other=0.0)
        first, second = first * c + second * s, second * c - first * s
    if weight is not None:
        first = first * tl.load(weight + columns)
        second = second * tl.load(weight + HALF + columns)
    if NORMS:
        x, y = _load_halves(source, source_stride, rows, inside, HALF)
        inverse = _inverse_rms(x, y, eps, HALF)
        x, y = x * inverse, y * inverse
        along = (tl.sum(first * x + second * y, 1) / (2 * HALF))[:, None]
        first, second = inverse * (first - x * along), inverse * (second - y * along)
    return first, second


@kernel(varying=("tokens", "eps"))
def _norm_rope(
    qkv: tl.tensor,
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    stride: tl.tensor,
    tokens: tl.tensor,
    eps: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    V_COLUMN: tl.constexpr,
    NORMS_V: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < tokens
    head = tl.program_id(1)
    HD: tl.constexpr = 2 * HALF
    if head < H:
        _norm_rope_head(
            qkv + head * HD, stride, q + head * HD, H * HD, q_weight, cos, sin, rows, inside, eps,
            HALF, q_weight is not None,
        )  # fmt: skip
    elif k is not None:
        if head < H + K:
            _norm_rope_head(
                qkv + head * HD, stride, k + (head - H) * HD, K * HD, k_weight, cos, sin, rows,
                inside, eps, HALF, k_weight is not None,
            )  # fmt: skip
        else:
            head -= H + K
            _norm_rope_head(
                qkv + V_COLUMN + head * HD, stride, v + head * HD, K * HD, None, None, None, rows,
                inside, eps, HALF, NORMS_V,
            )  # fmt: skip


@kernel(varying=("tokens", "eps"))
def _norm_rope_backward(
    grad_q: tl.tensor,
    grad_k: tl.tensor,
    grad_v: tl.tensor,
    qkv: tl.tensor,
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    grad_q_stride: tl.tensor,
    grad_k_stride: tl.tensor,
    grad_v_stride: tl.tensor,
    stride: tl.tensor,
    out_stride: tl.tensor,
    tokens: tl.tensor,
    eps: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    HAS_V: tl.constexpr,
    NORMS_V: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < tokens
    head = tl.program_id(1)
    HD: tl.constexpr = 2 * HALF
    source = qkv + head * HD
    target = out + head * HD
    if head < H:
        first, second = _unrope_unnorm_head(
            grad_q + head * HD, grad_q_stride, source, stride, q_weight, cos, sin, rows, inside,
            eps, HALF, q_weight is not None,
        )  # fmt: skip
        _store_halves(target, out_stride, rows, inside, first, second, HALF)
    elif grad_k is not None:
        if head < H + K:
            head -= H
            first, second = _unrope_unnorm_head(
                grad_k + head * HD, grad_k_stride, source, stride, k_weight, cos, sin, rows,
                inside, eps, HALF, k_weight is not None,
            )  # fmt: skip
            if not HAS_V:
                v_first, v_second = _unrope_unnorm_head(
                    grad_v + head * HD, grad_v_stride, source, stride, None, None, None, rows,
                    inside, eps, HALF, NORMS_V,
                )  # fmt: skip
                first, second = first + v_first, second + v_second
            _store_halves(target, out_stride, rows, inside, first, second, HALF)
        else:
            head -= H + K
            first, second = _unrope_unnorm_head(
                grad_v + head * HD, grad_v_stride, source, stride, None, None, None, rows, inside,
                eps, HALF, NORMS_V,
            )  # fmt: skip
            _store_halves(target, out_stride, rows, inside, first, second, HALF)


def rms_norm(
    hidden: Tensor, weight: Tensor | None, eps: float, *, out: Tensor | None = None
) -> Tensor:
    """`reference.rms_norm` of an (N, D) matrix."""
    if out is None:
        out = torch.empty_like(hidden)
    return _norm(hidden, weight, None, None, out, eps, norms=True)


def rms_norm_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    add: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`reference.rms_norm_backward` of (N, D) matrices."""
    if out is None:
        out = torch.empty_like(hidden)
    _norm_backward(grad, hidden, weight, eps, out=out, add=add)
    return out


def residual_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    scalar: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`reference.residual_norm`."""
    if out is None:
        out = torch.empty_like(residual)
    return _norm(branch, weight, residual, scalar, out, eps, norms=weight is not None)


def residual_norm_backward(
    grad: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    scalar: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.residual_norm_backward`."""
    if weight is None and scalar is None:
        return grad, grad if out is None else out.copy_(grad)
    if out is None:
        out = torch.empty_like(grad)
    grad_residual = grad
    if scalar is not None:
        grad_residual = torch.empty_like(grad)
    _norm_backward(grad, branch, weight, eps, out=out, scalar=scalar, grad_residual=grad_residual)
    return grad_residual, out


def qkv_norm_rope(
    qkv: Tensor,
    heads: HeadLayout,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`reference.qkv_norm_rope`; `cos` and `sin` contiguous, head_dim a power of two."""
    tokens = qkv.shape[0]
    H, K, head_dim = heads.num_heads, heads.num_kv_heads, heads.head_dim
    q = qkv.new_empty(tokens, H, head_dim)
    k = v = None
    if heads.has_k:
        k = qkv.new_empty(tokens, K, head_dim)
        v = torch.empty_like(k)
    rows = max(1, _HEAD_TILE_ELEMENTS // head_dim)
    v_column = heads.query_size + (heads.kv_size if heads.has_v else 0)
    _norm_rope.launch(
        (-(-tokens // rows), H + 2 * K if heads.has_k else H, 1),
        qkv, q_weight, k_weight, cos, sin, q, k, v, qkv.stride(0), tokens, eps,
        constants=(H, K, head_dim // 2, v_column, heads.norms_v, rows),
    )  # fmt: skip
    return q, k, v


def qkv_norm_rope_backward(
    grad_q: Tensor,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
    qkv: Tensor,
    heads: HeadLayout,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """`reference.qkv_norm_rope_backward`."""
    tokens = qkv.shape[0]
    H, K, head_dim = heads.num_heads, heads.num_kv_heads, heads.head_dim
    if out is None:
        out = qkv.new_empty(tokens, heads.width)
    rows = max(1, _HEAD_TILE_ELEMENTS // head_dim)
    _norm_rope_backward.launch(
        (-(-tokens // rows), heads.width // head_dim, 1),
        grad_q, grad_k, grad_v, qkv, q_weight, k_weight, cos, sin, out,
        grad_q.stride(0),
        0 if grad_k is None else grad_k.stride(0),
        0 if grad_v is None else grad_v.stride(0),
        qkv.stride(0), out.stride(0), tokens, eps,
        constants=(H, K, head_dim // 2, heads.has_v, heads.norms_v, rows),
    )  # fmt: skip
    return out


def _norm(
    branch: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    scalar: Tensor | None,
    out: Tensor,
    eps: float,
    *,
    norms: bool,
) -> Tensor:
    tokens, D = branch.shape
    _norm_row.launch(
        (tokens, 1, 1), branch, weight, residual, scalar, out, branch.stride(0),
        0 if residual is None else residual.stride(0), out.stride(0), eps,
        constants=(D, power_of_two(D), norms), num_warps=_row_warps(D),
    )  # fmt: skip
    return out


def _norm_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    out: Tensor,
    add: Tensor | None = None,
    scalar: Tensor | None = None,
    grad_residual: Tensor | None = None,
) -> None:
    tokens, D = grad.shape
    _norm_row_backward.launch(
        (tokens, 1, 1),
        grad, hidden, weight, add, scalar, None if scalar is None else grad_residual, out,
        grad.stride(0), hidden.stride(0), 0 if add is None else add.stride(0), out.stride(0), eps,
        constants=(D, power_of_two(D), weight is not None or scalar is None),
        num_warps=_row_warps(D),
    )  # fmt: skip


def _row_warps(columns: int) -> int:
    return 4 if columns <= 2048 else 8
