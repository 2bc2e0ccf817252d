"""Held-out loss: of all rows together, and of each row."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from eightgig.data.batches import IGNORE_INDEX, Dataset, pack_rows
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


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLosses:
    """Loss of each row.

    Attributes:
        sums: Sum over its trained tokens, in nats, (rows,).
        tokens: How many they are, (rows,).
    """

    sums: NDArray[np.float64]
    tokens: NDArray[np.int64]


def measure_loss(
    model: Model,
    rows: Dataset,
    plan: Plan,
    packing: bool = True,
    between: Callable[[], None] = lambda: None,
) -> HeldOutLoss:
    """The loss of all of `rows`, in the micro-batches that training uses.

    Args:
        model: Computes it.
        rows: All of them.
        plan: How they are cut.
        packing: Whether rows share a micro-batch.
        between: Called before each visit of micro-batches; what it raises ends the measurement.
    """
    start_seconds = time.perf_counter()
    losses = measure_row_losses(model, rows, plan, packing, between)
    loss_tokens = int(losses.tokens.sum())
    return HeldOutLoss(
        loss=float(losses.sums.sum()) / max(loss_tokens, 1),
        loss_tokens=loss_tokens,
        seconds=time.perf_counter() - start_seconds,
    )


def measure_row_losses(
    model: Model,
    rows: Dataset,
    plan: Plan,
    packing: bool = True,
    between: Callable[[], None] = lambda: None,
) -> RowLosses:
    """The loss of each of `rows`, in the micro-batches that training uses; as `measure_loss`."""
    # Several rendered rows may come from one source row: here each has a number of its own.
    numbered = replace(rows, row_ids=np.arange(rows.num_rows))
    batches = pack_rows(
        numbered,
        np.arange(rows.num_rows),
        micro_batch_tokens=plan.micro_batch_tokens,
        packing=packing,
    )
    sums = np.zeros(rows.num_rows)
    tokens = np.zeros(rows.num_rows, dtype=np.int64)
    size = plan.micro_batches_per_visit
    for start in range(0, len(batches), size):
        between()
        group = batches[start : start + size]
        inputs = [model.embedding.prepare(batch) for batch in group]
        losses = model.losses([future.result() for future in inputs])
        values = losses.values.double().cpu().numpy()
        row_of = np.concatenate([b.row_ids[b.labels != IGNORE_INDEX] for b in group])
        sums += np.bincount(row_of, values, rows.num_rows)
        tokens += np.bincount(row_of, minlength=rows.num_rows)
    return RowLosses(sums=sums, tokens=tokens)
