"""Held-out loss."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from eightgig.data.batches import Dataset, pack_rows
from eightgig.engine.model import Model
from eightgig.memory.plan import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutLoss:
    """Mean loss of the trained tokens of held-out rows.

    Attributes:
        loss: In nats.
        loss_tokens: How many tokens it is the mean of.
        seconds: Time it took.
    """

    loss: float
    loss_tokens: int
    seconds: float


def measure_loss(model: Model, rows: Dataset, plan: Plan, packing: bool = True) -> HeldOutLoss:
    """The loss of all of `rows`, in the micro-batches that training uses."""
    start_seconds = time.perf_counter()
    batches = pack_rows(
        rows,
        np.arange(rows.num_rows),
        micro_batch_tokens=plan.micro_batch_tokens,
        packing=packing,
    )
    loss_sum, loss_tokens = 0.0, 0
    size = plan.micro_batches_per_visit
    for start in range(0, len(batches), size):
        group = batches[start : start + size]
        inputs = [model.embedding.prepare(batch) for batch in group]
        losses = model.losses([future.result() for future in inputs])
        loss_sum += float(losses.total)
        loss_tokens += sum(batch.num_loss_tokens for batch in group)
    return HeldOutLoss(
        loss=loss_sum / max(loss_tokens, 1),
        loss_tokens=loss_tokens,
        seconds=time.perf_counter() - start_seconds,
    )
