"""Which rows a trial takes: the largest micro-batches first, then rows at random."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from eightgig.data.batches import IGNORE_INDEX, Dataset, random_order
from eightgig.training.step import StepSchedule

MAX_ROWS = 100
_MAX_ROWS_OF_A_STEP = 25
_LOOKED_AT_ROWS = 5_000
_WANTED_LOSS_TOKENS = 256
_MAX_SHORT_ROWS = 16


def largest_steps(schedule: StepSchedule) -> list[NDArray[np.int64]]:
    """The rows of the steps that a trial must do, each as large as a step of the run.

    One of the longest rows, and the one with the largest micro-batch among the first steps of the
    run where that is larger still.
    """
    longest = schedule.longest_rows()
    steps = schedule.epoch_steps(0)[: max(1, _LOOKED_AT_ROWS // schedule.rows_per_step)]
    fullest = max(steps, key=partial(largest, schedule))
    if largest(schedule, fullest) > largest(schedule, longest):
        return [longest, fullest]
    return [longest]


def other_steps(schedule: StepSchedule, taken: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """The rows of further steps: others than those `taken`, at random, `MAX_ROWS` with them."""
    seen = set(np.concatenate(taken).tolist())
    order = random_order(schedule.dataset.num_rows, seed=schedule.seed, stream=0)
    rest = [row for row in order.tolist() if row not in seen][: max(0, MAX_ROWS - len(seen))]
    size = min(schedule.rows_per_step, _MAX_ROWS_OF_A_STEP)
    return [np.array(rest[at : at + size], np.int64) for at in range(0, len(rest), size)]


def largest(schedule: StepSchedule, rows: NDArray[np.int64]) -> int:
    """Tokens of the largest micro-batch of `rows`."""
    return max(batch.num_tokens for batch in schedule.pack(rows))


def short_rows(rows: Dataset) -> NDArray[np.int64]:
    """The shortest of `rows` that carry loss: at least two, where there are, and not many."""
    is_trained = (rows.labels != IGNORE_INDEX).astype(np.int64)
    trained = np.add.reduceat(is_trained, rows.offsets[:-1])
    order = [row for row in np.argsort(rows.lengths, kind="stable").tolist() if trained[row]]
    enough = int(np.searchsorted(np.cumsum(trained[order]), _WANTED_LOSS_TOKENS)) + 1
    chosen = order[: min(max(2, enough), _MAX_SHORT_ROWS)]
    return np.array(chosen or [0], np.int64)
