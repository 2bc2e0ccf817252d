"""The streamed head: cross-entropy and its gradient in one pass over the vocabulary.

Only labelled tokens enter. The head is visited chunk by chunk through the ring and never held;
logits exist for one chunk and one tile of tokens at a time. With z the logits, t = tanh(z / c)
and e = exp(c t - c) the label's column is left out of the running sums R = sum e and
U = sum e (1 - t^2) W, so that loss = log1p(R / e_y) and
dh = (U - R (1 - t_y^2) W_y) / (R + e_y) need no difference of nearly equal numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eightgig.engine.batch import to_device
from eightgig.engine.linear import add_product
from eightgig.ops.choose import Ops
from eightgig.ops.reference import wide
from eightgig.streaming.ring import Ring

# exp(-2c) must stay above the smallest float32: cap 30 leaves 1e-26.
_LARGEST_FIXED_CAP = 40.0
_LOG_RATIO_LIMIT = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadChunks:
    """How the head is cut.

    Attributes:
        hidden_size: D.
        vocab_size: V.
        rows: Rows of each chunk but the last.
        dtype: Of the table.
        tile_tokens: Labelled tokens whose logits exist at a time.
    """

    hidden_size: int
    vocab_size: int
    rows: int
    dtype: torch.dtype
    tile_tokens: int

    @property
    def starts(self) -> range:
        """First row of each chunk."""
        return range(0, self.vocab_size, self.rows)

    def view(self, slot: Tensor, start: int) -> Tensor:
        """The chunk that begins at row `start`, (rows, D), in a slot."""
        rows = min(self.rows, self.vocab_size - start)
        size_bytes = rows * self.hidden_size * self.dtype.itemsize
        return slot[:size_bytes].view(self.dtype).view(rows, self.hidden_size)


@dataclass(frozen=True, slots=True)
class HeadResult:
    """Loss of each labelled token (n,) float32, and d loss_sum / d hidden (n, D) or None."""

    losses: Tensor
    grad: Tensor | None


class StreamedHead:
    """Cross-entropy over the ring's head chunks.

    Args:
        chunks: How the head is cut.
        ops: Fast or plain operations.
        softcap: Logit cap, None without.
    """

    def __init__(self, chunks: HeadChunks, ops: Ops, softcap: float | None) -> None:
        self.chunks = chunks
        self._ops = ops
        self._softcap = softcap

    def cross_entropy(
        self,
        ring: Ring,
        hidden: Tensor,
        labels: NDArray[np.int64],
        *,
        grad_scale: float | None,
    ) -> HeadResult:
        """Visit every chunk of the head once.

        Args:
            ring: At the first chunk's visit.
            hidden: Normed hidden states of the labelled tokens, (n, D), compute dtype.
            labels: Their next tokens, (n,).
            grad_scale: Factor of the gradient; None: no gradient is made.
        """
        n = len(labels)
        state = _State.start(
            hidden, with_grad=grad_scale is not None, is_fixed=self._is_fixed(hidden)
        )
        device_labels = to_device(labels, hidden.device)
        order = np.argsort(labels, kind="stable").astype(np.int64)
        ordered = labels[order]
        device_order = to_device(order, hidden.device)
        for start in self.chunks.starts:
            weight = self.chunks.view(ring.acquire(), start)
            first, last = np.searchsorted(ordered, (start, start + len(weight)))
            if last > first:
                index = device_order[int(first) : int(last)]
                rows = weight.index_select(0, device_labels.index_select(0, index) - start)
                state.label_rows.index_copy_(0, index, rows.to(hidden.dtype))
                del rows
            weight = weight.to(hidden.dtype)
            for tile in _tiles(n, self.chunks.tile_tokens):
                self._visit(state, hidden, weight, device_labels, tile, start)
            ring.release()
        results = [
            self._finish(state.part(tile), hidden[tile], grad_scale)
            for tile in _tiles(n, self.chunks.tile_tokens)
        ]
        losses = torch.cat([result.losses for result in results]) if results else state.sums
        if grad_scale is None:
            return HeadResult(losses, None)
        # Each tile's gradient has been written over its hidden states' label rows.
        return HeadResult(losses, state.label_rows)

    def logits(self, ring: Ring, hidden: Tensor) -> Tensor:
        """All logits of `hidden` (n, D), (n, V) float32; visits every chunk once."""
        parts = []
        for start in self.chunks.starts:
            weight = self.chunks.view(ring.acquire(), start).to(hidden.dtype)
            parts.append(_product(hidden, weight))
            ring.release()
        logits = torch.cat(parts, dim=1)
        if self._softcap is not None:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        return logits

    def _is_fixed(self, hidden: Tensor) -> bool:
        """Whether the cap bounds the logits tightly enough to do without a running maximum."""
        is_capped = self._softcap is not None and self._softcap <= _LARGEST_FIXED_CAP
        return is_capped and hidden.dtype != torch.float16

    def _visit(
        self,
        state: _State,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        tile: slice,
        start: int,
    ) -> None:
        logits = _product(hidden[tile], weight)
        probabilities = torch.empty_like(logits, dtype=hidden.dtype)
        maxima = state.maxima[tile] if state.maxima is not None else None
        slopes = None
        if maxima is not None and self._softcap is not None:
            t = torch.tanh(logits / self._softcap)
            slopes = 1 - t.square()
            logits = self._softcap * t
        factor = self._ops.cross_entropy_chunk(
            logits,
            labels[tile] - start,
            None if maxima is not None else self._softcap,
            maxima,
            state.sums[tile],
            probabilities,
        )
        if state.accumulated is None:
            return
        accumulated = state.accumulated[tile]
        if factor is not None:
            accumulated.mul_(factor[:, None])
        if slopes is not None:
            probabilities.mul_(slopes)
        add_product(accumulated, probabilities, weight)

    def _finish(self, state: _State, hidden: Tensor, grad_scale: float | None) -> HeadResult:
        label_logits = (wide(hidden) * wide(state.label_rows)).sum(1)
        slope = torch.ones_like(label_logits)
        if self._softcap is not None:
            t = torch.tanh(label_logits / self._softcap)
            slope = 1 - t.square()
            label_logits = self._softcap * t
        fixed = self._softcap if state.maxima is None else None
        maxima = torch.full_like(label_logits, fixed) if fixed is not None else state.maxima
        assert maxima is not None
        # With the larger of both maxima taken out neither exponential overflows.
        top = torch.maximum(maxima, label_logits)
        others = state.sums * torch.exp(maxima - top)
        label = torch.exp(label_logits - top)
        # log1p(R / e_y) is exact for likely labels; for very unlikely ones it would overflow.
        losses = torch.where(
            label_logits > top - _LOG_RATIO_LIMIT,
            torch.log1p(others / label),
            torch.log(others + label) + top - label_logits,
        )
        if grad_scale is None or state.accumulated is None:
            return HeadResult(losses, None)
        whole = others + label
        from_others = state.accumulated.mul_((torch.exp(maxima - top) / whole)[:, None])
        from_label = wide(state.label_rows) * (others / whole * slope)[:, None]
        grad = (from_others - from_label).mul_(grad_scale)
        return HeadResult(losses, state.label_rows.copy_(grad))


@dataclass(slots=True)
class _State:
    """Running sums of one pass over the vocabulary."""

    sums: Tensor
    maxima: Tensor | None
    accumulated: Tensor | None
    label_rows: Tensor

    def part(self, tile: slice) -> _State:
        """Views of some tokens."""
        return _State(
            sums=self.sums[tile],
            maxima=None if self.maxima is None else self.maxima[tile],
            accumulated=None if self.accumulated is None else self.accumulated[tile],
            label_rows=self.label_rows[tile],
        )

    @staticmethod
    def start(hidden: Tensor, *, with_grad: bool, is_fixed: bool) -> _State:
        n, width = hidden.shape
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        sums = torch.zeros(n, dtype=dtype, device=hidden.device)
        return _State(
            sums=sums,
            maxima=None if is_fixed else torch.full_like(sums, float("-inf")),
            accumulated=sums.new_zeros(n, width) if with_grad else None,
            label_rows=torch.empty_like(hidden),
        )


def _tiles(n: int, size: int) -> Sequence[slice]:
    return [slice(at, min(at + size, n)) for at in range(0, n, size)]


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    """The product hidden @ weight.T in float32 or wider."""
    if hidden.dtype in (torch.float32, torch.float64):
        return torch.mm(hidden, weight.t())
    if hidden.device.type == "cuda":
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return torch.mm(hidden.float(), weight.t().float())
