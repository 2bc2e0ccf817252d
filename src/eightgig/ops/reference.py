"""The plain definition of every operation; fast versions are tested against these.

Shapes: B batch, T tokens of a row or of a tile, N tokens of a micro-batch, D hidden, V vocabulary,
R rank, H heads, K kv heads, hd head_dim, F feed-forward, C vocabulary rows of a head chunk,
L layers, P per-layer inputs.

Sums, norms and softmax are taken in float32 (float64 for float64 tensors); results are stored in
the dtype of the input. `out` may be a view whose rows lie further apart than they are long.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["silu", "gelu_tanh"]
_ATTENTION_BLOCK_TOKENS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadLayout:
    """How the columns of a fused projection divide: [q heads | k heads | v heads].

    Attributes:
        num_heads, num_kv_heads, head_dim: H, K and hd.
        has_k: The columns hold K; False where K and V come from another layer.
        has_v: The columns hold V; where K is there without V, V is made of K's columns.
        norms_v: V is RMS-normed, without weight.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    has_k: bool
    has_v: bool
    norms_v: bool

    @property
    def query_size(self) -> int:
        """Columns of Q."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of K, and of V."""
        return self.num_kv_heads * self.head_dim

    @property
    def width(self) -> int:
        """Columns in all."""
        return self.query_size + self.kv_size * (int(self.has_k) + int(self.has_v))


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """A matrix of one tensor, and the rectangle of another that it is copied into.

    Attributes:
        source, target: First element of the matrix and of the rectangle.
        rows, columns: Of the rectangle.
        stride: Elements from one of its rows to the next.
        start, width: Columns of the rectangle that the matrix takes; the others become zero.
        is_scaled: The matrix is multiplied by the scale.
    """

    source: int
    target: int
    rows: int
    columns: int
    stride: int
    start: int
    width: int
    is_scaled: bool


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in the dtype sums are taken in: float32, or float64 if it is that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _store(result: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    return result.to(dtype) if out is None else out.copy_(result)


def rms_norm(
    hidden: Tensor, weight: Tensor | None, eps: float, *, out: Tensor | None = None
) -> Tensor:
    """RMS norm: hidden / sqrt(mean(hidden^2) + eps) * weight over the last dimension.

    Args:
        hidden: (..., D).
        weight: (D,) float32 with the family's offset added, None for 1.
        eps: Added to the mean square.
        out: Written to, if given; same shape.

    Returns:
        (..., D), dtype of `hidden`.
    """
    x = wide(hidden)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * weight.to(normed.dtype)
    return _store(normed, hidden.dtype, out)


def rms_norm_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    add: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient of `rms_norm` with respect to `hidden`, plus `add` (a residual's gradient).

    With r = 1/sqrt(mean(x^2) + eps), g = grad * weight: dx = r g - r^3 x mean(g x). `out` may be
    any of the inputs.
    """
    x, g = wide(hidden), wide(grad)
    if weight is not None:
        g = g * weight.to(g.dtype)
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    result = inverse * g - inverse.pow(3) * x * (g * x).mean(-1, keepdim=True)
    if add is not None:
        result = result + wide(add)
    return _store(result, hidden.dtype, out)


def residual_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    scalar: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """(residual + rms_norm(branch, weight)) * scalar; the branch is not normed without weight.

    Args:
        residual, branch: (N, D).
        weight: (D,) float32, None where the family has no norm after the branch.
        eps: Of the norm.
        scalar: 0-d float32, None for 1.
        out: Written to, if given; same shape. It may be any of the inputs.
    """
    value = wide(branch)
    if weight is not None:
        value = rms_norm(value, weight, eps)
    value = wide(residual) + value
    if scalar is not None:
        value = value * scalar.to(value.dtype)
    return _store(value, residual.dtype, out)


def residual_norm_backward(
    grad: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    scalar: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `residual_norm` with respect to (residual, branch); the latter goes to `out`.

    Without `scalar` the first is `grad` itself.
    """
    g = wide(grad)
    grad_residual = grad
    if scalar is not None:
        g = g * scalar.to(g.dtype)
        grad_residual = g.to(grad.dtype)
    if weight is not None:
        g = rms_norm_backward(g, wide(branch), weight, eps)
    return grad_residual, _store(g, grad.dtype, out)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (N, heads, hd) by angles whose cos and sin are (N, hd/2)."""
    first, second = heads.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(heads.dtype), sin[:, None].to(heads.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def qkv_norm_rope(
    qkv: Tensor,
    heads: HeadLayout,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Split a fused projection into heads, norm them and rotate Q and K.

    Args:
        qkv: (N, width), columns as `heads` says.
        heads: The division.
        q_weight, k_weight: (hd,) float32, None where the family has no such norm.
        cos, sin: (N, hd/2) float32.
        eps: Of the norms.

    Returns:
        q (N, H, hd), and k, v (N, K, hd), None where they come from another layer.
    """
    raw_q, raw_k, raw_v = _split_heads(qkv, heads)
    q = rotate(_norm_heads(wide(raw_q), q_weight, eps), cos, sin).to(qkv.dtype)
    if raw_k is None or raw_v is None:
        return q, None, None
    k = rotate(_norm_heads(wide(raw_k), k_weight, eps), cos, sin).to(qkv.dtype)
    v = rms_norm(raw_v, None, eps) if heads.norms_v else raw_v.contiguous()
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
    """Gradient of `qkv_norm_rope` with respect to `qkv`, (N, width)."""
    raw_q, raw_k, raw_v = _split_heads(qkv, heads)
    parts = [_unrotate(wide(grad_q), raw_q, q_weight, cos, sin, eps)]
    if raw_k is not None and raw_v is not None:
        assert grad_k is not None and grad_v is not None
        part_k = _unrotate(wide(grad_k), raw_k, k_weight, cos, sin, eps)
        part_v = wide(grad_v)
        if heads.norms_v:
            part_v = rms_norm_backward(part_v, wide(raw_v), None, eps)
        parts += [part_k, part_v] if heads.has_v else [part_k + part_v]
    result = torch.cat([part.flatten(1) for part in parts], dim=1)
    return _store(result, qkv.dtype, out)


def _split_heads(qkv: Tensor, heads: HeadLayout) -> tuple[Tensor, Tensor | None, Tensor | None]:
    q_end, kv = heads.query_size, heads.kv_size
    q = qkv[:, :q_end].view(-1, heads.num_heads, heads.head_dim)
    if not heads.has_k:
        return q, None, None
    k = qkv[:, q_end : q_end + kv].view(-1, heads.num_kv_heads, heads.head_dim)
    if not heads.has_v:
        return q, k, k
    v = qkv[:, q_end + kv :].view(-1, heads.num_kv_heads, heads.head_dim)
    return q, k, v


def _norm_heads(heads: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return heads if weight is None else rms_norm(heads, weight, eps)


def _unrotate(
    grad: Tensor, raw: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float
) -> Tensor:
    grad = rotate(grad, cos, -sin)
    return grad if weight is None else rms_norm_backward(grad, wide(raw), weight, eps)


def glu(gate: Tensor, up: Tensor, activation: Activation, *, out: Tensor | None = None) -> Tensor:
    """activation(gate) * up, (N, F); `gate` and `up` may be strided views."""
    return _store(_activate(wide(gate), activation) * wide(up), gate.dtype, out)


def glu_backward(
    gate: Tensor,
    up: Tensor,
    grad: Tensor,
    activation: Activation,
    *,
    out_gate: Tensor | None = None,
    out_up: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `glu` with respect to (gate, up)."""
    x, g = wide(gate), wide(grad)
    grad_up = g * _activate(x, activation)
    grad_gate = g * wide(up) * _activation_slope(x, activation)
    return _store(grad_gate, gate.dtype, out_gate), _store(grad_up, gate.dtype, out_up)


def _activate(x: Tensor, activation: Activation) -> Tensor:
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")


def _activation_slope(x: Tensor, activation: Activation) -> Tensor:
    if activation == "silu":
        sigmoid = torch.sigmoid(x)
        return sigmoid * (1 + x * (1 - sigmoid))
    root, cubic = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(root * (x + cubic * x.pow(3)))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t.square()) * root * (1 + 3 * cubic * x.square())


def attention(
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
    """Causal attention inside each packed row, in blocks of queries; no T x T mask.

    Args:
        q: (N, H, hd).
        k, v: (N, K, hd); H is a multiple of K.
        cu_seqlens: Start of each row and N, (rows + 1,) int32.
        max_length: Longest row; only fast versions need it.
        scale: Factor of the scores.
        window: Keys a query sees, itself included; None: all earlier ones of its row.
        out: Written to, if given; (N, H, hd).

    Returns:
        Outputs (N, H, hd), and the logarithm of the softmax's denominator, (H, N) float32.
    """
    del max_length
    result = torch.empty_like(q) if out is None else out
    lse = torch.empty(q.shape[1], q.shape[0], dtype=wide(q).dtype, device=q.device)
    for block, keys in _attention_blocks(cu_seqlens, window):
        scores = _block_scores(q, k, block, keys, scale, window)  # (K, H/K, m, n)
        maxima = scores.amax(-1, keepdim=True)
        weights = scores.sub_(maxima).exp_()
        sums = weights.sum(-1, keepdim=True)
        values = wide(v[keys]).permute(1, 0, 2)[:, None]  # (K, 1, n, hd)
        outputs = (weights @ values).div_(sums)
        result[block] = outputs.flatten(0, 1).transpose(0, 1).to(q.dtype)
        lse[:, block] = maxima.add_(sums.log_())[..., 0].flatten(0, 1)
    return result, lse


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention` with respect to (q, k, v)."""
    del max_length
    num_kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    grad_q = torch.empty_like(q)
    grad_k, grad_v = torch.zeros_like(wide(k)), torch.zeros_like(wide(v))
    for block, keys in _attention_blocks(cu_seqlens, window):
        scores = _block_scores(q, k, block, keys, scale, window)
        block_lse = lse[:, block].reshape(num_kv_heads, group, -1)
        weights = scores.sub_(block_lse[..., None].to(scores.dtype)).exp_()
        g, o = _by_kv_head(wide(grad_out[block]), group), _by_kv_head(wide(out[block]), group)
        values = wide(v[keys]).permute(1, 0, 2)[:, None]
        grad_scores = g @ values.transpose(-1, -2)
        grad_scores.sub_((g * o).sum(-1, keepdim=True)).mul_(weights).mul_(scale)
        grad_block = grad_scores @ wide(k[keys]).permute(1, 0, 2)[:, None]
        grad_q[block] = grad_block.flatten(0, 1).transpose(0, 1).to(q.dtype)
        queries = _by_kv_head(wide(q[block]), group)
        grad_k[keys] += (grad_scores.transpose(-1, -2) @ queries).sum(1).transpose(0, 1)
        grad_v[keys] += (weights.transpose(-1, -2) @ g).sum(1).transpose(0, 1)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _attention_blocks(cu_seqlens: Tensor, window: int | None) -> list[tuple[slice, slice]]:
    """Blocks of queries, each with the run of keys that they can see."""
    bounds = cu_seqlens.tolist()
    blocks = []
    for first, end in itertools.pairwise(bounds):
        for start in range(first, end, _ATTENTION_BLOCK_TOKENS):
            stop = min(start + _ATTENTION_BLOCK_TOKENS, end)
            oldest = first if window is None else max(first, start - window + 1)
            blocks.append((slice(start, stop), slice(oldest, stop)))
    return blocks


def _by_kv_head(heads: Tensor, group: int) -> Tensor:
    """(m, H, hd) as (K, H/K, m, hd)."""
    m, _, head_dim = heads.shape
    return heads.transpose(0, 1).reshape(-1, group, m, head_dim)


def _block_scores(
    q: Tensor, k: Tensor, block: slice, keys: slice, scale: float, window: int | None
) -> Tensor:
    queries = _by_kv_head(wide(q[block]), q.shape[1] // k.shape[1])
    scores = (queries * scale) @ wide(k[keys]).permute(1, 2, 0)[:, None]
    query_at = torch.arange(block.start, block.stop, device=q.device)[:, None]
    key_at = torch.arange(keys.start, keys.stop, device=q.device)[None]
    hidden = key_at > query_at
    if window is not None:
        hidden |= key_at <= query_at - window
    return scores.masked_fill_(hidden, float("-inf"))


def cross_entropy_chunk(
    logits: Tensor,
    labels_local: Tensor,
    softcap: float | None,
    maxima: Tensor | None,
    sums: Tensor,
    out: Tensor,
) -> Tensor | None:
    """One chunk of the vocabulary of a streamed cross-entropy; the label's column is left out.

    With a cap c: t = tanh(z / c), e = exp(c t - c), which is at most 1, so that no maximum is
    needed; `sums` grows by sum(e) and `out` becomes e (1 - t^2). Without one, `maxima` is a
    running maximum: what was summed before is scaled by the returned factor.

    Args:
        logits: z, (n, C) float32.
        labels_local: Label minus the chunk's first row, (n,); outside [0, C) in other chunks.
        softcap: c, or None.
        maxima: (n,) float32 running maxima, starting at -inf; None with a cap.
        sums: (n,) float32, added to in place.
        out: (n, C), the weights by which the chunk's rows enter the gradient.

    Returns:
        None with a cap; else (n,) float32, the factor for what was accumulated before.
    """
    column = torch.arange(logits.shape[1], device=logits.device)
    is_label = column[None] == labels_local[:, None]
    if softcap is not None:
        t = torch.tanh(logits / softcap)
        e = torch.exp(softcap * t - softcap).masked_fill(is_label, 0)
        sums += e.sum(1)
        out.copy_(e * (1 - t.square()))
        return None
    assert maxima is not None
    others = logits.masked_fill(is_label, float("-inf"))
    grown = torch.maximum(maxima, others.amax(1))
    # A chunk of the label's column alone leaves the maximum at -inf: there is nothing to scale.
    factor = torch.exp(maxima - grown).nan_to_num_(nan=1.0)
    e = torch.exp(others - grown[:, None]).nan_to_num_(nan=0.0)
    sums.mul_(factor).add_(e.sum(1))
    maxima.copy_(grown)
    out.copy_(e)
    return factor


def mix32(value: Tensor) -> Tensor:
    """A bijective hash of 32-bit integers held in int64 (Prospector's lowbias32).

    Source: https://nullprogram.com/blog/2018/07/31/, public domain.
    """
    mask = 0xFFFFFFFF
    value = value & mask
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & mask
    value = ((value ^ (value >> 15)) * 0x846CA68B) & mask
    return value ^ (value >> 16)


def dropout(
    hidden: Tensor, row_keys: Tensor, module_key: int, p: float, *, out: Tensor | None = None
) -> Tensor:
    """Drop elements with probability p and scale the others by 1 / (1 - p).

    Which ones is a hash of token, module and column alone, so that recomputing and splitting a
    step find the same mask: element (i, j) stays where
    mix32(mix32(row_keys[i] ^ module_key) ^ mix32(j)) >= floor(p 2^32).

    Args:
        hidden: (N, D).
        row_keys: (N,) int64 below 2^32, a hash of seed, step, row and position.
        module_key: Below 2^32, a hash of layer and module.
        p: Share dropped.
        out: Written to, if given; (N, D).
    """
    column = torch.arange(hidden.shape[1], device=hidden.device)
    token = mix32(row_keys ^ module_key)[:, None]
    keeps = mix32(token ^ mix32(column)[None]) >= int(p * 2**32)
    return _store(hidden * keeps * (1 / (1 - p)), hidden.dtype, out)


def placer(
    source: Tensor, target: Tensor, pieces: Sequence[Placed], scale: float
) -> Callable[[], None]:
    """What copies all `pieces`, whenever it is called, from what `source` holds then.

    Args:
        source, target: Flat, of one dtype; they must not move.
        pieces: What goes where.
        scale: Multiplied in float32.
    """
    blanks = []
    copies = []
    for piece in pieces:
        size = (piece.rows, piece.columns)
        place = target.as_strided(size, (piece.stride, 1), target.storage_offset() + piece.target)
        if piece.width < piece.columns:
            blanks.append(place)
        matrix = source[piece.source : piece.source + piece.rows * piece.width]
        to = place[:, piece.start : piece.start + piece.width]
        copies.append((to, matrix.view(piece.rows, piece.width), piece.is_scaled))

    def place_all() -> None:
        for blank in blanks:
            blank.zero_()
        for to, matrix, is_scaled in copies:
            if is_scaled:
                torch.mul(matrix, scale, out=to)
            else:
                to.copy_(matrix)

    return place_all
