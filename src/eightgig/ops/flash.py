"""Attention by torch's own fused operators, which are private: `probe_attention` tries them first.

`flash_*` takes head_dim up to 256 on sm_80 and later. `efficient_*` takes any head_dim from sm_50
on, but as many kv heads as query heads: query heads go in groups, so that K and V of one head
need no copies and the gradients of only a group wait to be summed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eightgig.ops import reference

LARGEST_HEAD_DIM = 256
_CAUSAL_FROM_TOP_LEFT = 1
_HEADS_PER_GROUP = 4
_PROBE_TOLERANCE = 2e-2
"""Relative error of a bfloat16 probe: four times what correct kernels show."""


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scale: float,
    window: int | None,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.attention` by FlashAttention."""
    result, lse = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, max_length, max_length, 0.0, True, False,
        scale=scale, window_size_left=-1 if window is None else window - 1, window_size_right=0,
    )[:2]  # fmt: skip
    return result if out is None else out.copy_(result), lse


def flash_attention_backward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.attention_backward` by FlashAttention; grad_q is summed in no fixed order."""
    no_dropout = torch.empty(2, dtype=torch.uint64, device=q.device)
    grad_q, grad_k, grad_v = torch.ops.aten._flash_attention_backward(
        grad_out, q, k, v, out, lse, cu_seqlens, cu_seqlens, max_length, max_length, 0.0, True,
        no_dropout, no_dropout, scale=scale,
        window_size_left=-1 if window is None else window - 1, window_size_right=0,
    )  # fmt: skip
    return grad_q, grad_k, grad_v


def efficient_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scale: float,
    window: int | None,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.attention` by memory-efficient attention, but for the form of its second result.

    Returns:
        Outputs (N, H, hd), and the logarithms as `efficient_attention_backward` takes them:
        (rows, H, longest row rounded up).
    """
    result = torch.empty_like(q) if out is None else out
    logarithms = []
    for heads, kv_head in _head_groups(q, k):
        group = heads.stop - heads.start
        part, lse = torch.ops.aten._efficient_attention_forward(
            q[None, :, heads], _repeat(k, kv_head, group), _repeat(v, kv_head, group), None,
            cu_seqlens, cu_seqlens, max_length, max_length, 0.0, _CAUSAL_FROM_TOP_LEFT, True,
            scale=scale, window_size=window,
        )[:2]  # fmt: skip
        result[:, heads] = part[0]
        logarithms.append(lse)
    return result, torch.cat(logarithms, dim=1)


def efficient_attention_backward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.attention_backward` by memory-efficient attention."""
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grad_k = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
    grad_v = torch.zeros_like(grad_k)
    no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)
    for heads, kv_head in _head_groups(q, k):
        group = heads.stop - heads.start
        parts = torch.ops.aten._efficient_attention_backward(
            grad_out[None, :, heads], q[None, :, heads], _repeat(k, kv_head, group),
            _repeat(v, kv_head, group), None, out[None, :, heads], cu_seqlens, cu_seqlens,
            max_length, max_length, lse[:, heads].contiguous(), 0.0, no_dropout, no_dropout,
            _CAUSAL_FROM_TOP_LEFT, False, scale=scale, window_size=window,
        )  # fmt: skip
        grad_q[:, heads] = parts[0][0]
        grad_k[:, kv_head] += parts[1][0].sum(1, dtype=torch.float32)
        grad_v[:, kv_head] += parts[2][0].sum(1, dtype=torch.float32)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _head_groups(q: Tensor, k: Tensor) -> list[tuple[slice, int]]:
    """Slices of query heads that share a kv head, with that head."""
    num_heads, per_kv_head = q.shape[1], q.shape[1] // k.shape[1]
    return [
        (slice(first, min(first + _HEADS_PER_GROUP, end)), end // per_kv_head - 1)
        for end in range(per_kv_head, num_heads + 1, per_kv_head)
        for first in range(end - per_kv_head, end, _HEADS_PER_GROUP)
    ]


def _repeat(kv: Tensor, head: int, times: int) -> Tensor:
    """One kv head seen `times` times, (1, N, times, hd), without a copy."""
    return kv[None, :, head : head + 1].expand(-1, -1, times, -1)


def probe_attention(
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    *,
    head_dim: int,
    device: str,
    dtype: torch.dtype,
) -> str:
    """Run a small forward and backward pass with packed rows, a window and shared kv heads.

    Returns:
        Why these functions cannot be used here; empty when results agree with the definition.
    """
    generator = torch.Generator().manual_seed(0)
    bounds = torch.tensor([0, 5, 45], dtype=torch.int32, device=device)
    q, k, v, grad = (
        torch.randn(45, heads, head_dim, generator=generator).to(device, dtype)
        for heads in (4, 2, 2, 4)
    )
    arguments = (bounds, 40, head_dim**-0.5, 7)
    try:
        out, lse = forward(q, k, v, *arguments)
        results = (out, *backward(grad, q, k, v, out, lse, *arguments))
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
    except (RuntimeError, TypeError) as error:  # a kernel not built in, or another signature
        return str(error).strip().splitlines()[0].split(". ")[0]
    q, k, v, grad = q.float(), k.float(), v.float(), grad.float()
    out, lse = reference.attention(q, k, v, *arguments)
    grads = reference.attention_backward(grad, q, k, v, out, lse, *arguments)
    for name, ours, expected in zip(
        ("output", "grad_q", "grad_k", "grad_v"), results, (out, *grads), strict=True
    ):
        error_ratio = float((ours.float() - expected).norm() / expected.norm())
        if not error_ratio < _PROBE_TOLERANCE:
            return f"its {name} is off by {error_ratio:.2g}"
    return ""
