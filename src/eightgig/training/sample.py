"""Which rows a trial takes: the largest micro-batches first, then rows at random."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from eightgig.data.batches import IGNORE_INDEX, Dataset, random_order
from eightgig.training.step import StepSchedule

MAX_ROWS = 100
_MAX_ROWS_OF_A_STEP = 25
_LOOKED_AT_STEPS = 500
_WANTED_LOSS_TOKENS = 256
_MAX_SHORT_ROWS = 16


def sample_steps(schedule: StepSchedule) -> Iterator[NDArray[np.int64]]:
    """The rows of each step of the trial: about `MAX_ROWS`, each once.

    First a step of the longest rows, and the one with the largest micro-batch among the first
    steps of the run where that is larger; these have as many rows as a step of the run. Then
    others at random.
    """
    longest = schedule.longest_rows()
    taken = set(longest.tolist())
    yield longest
    fullest = max(schedule.epoch_steps(0)[:_LOOKED_AT_STEPS], key=partial(largest, schedule))
    if largest(schedule, fullest) > largest(schedule, longest):
        fresh = fullest[~np.isin(fullest, longest)]
        yield fullest if len(fresh) == len(fullest) else fresh
        taken |= set(fullest.tolist())
    order = random_order(schedule.dataset.num_rows, seed=schedule.seed, stream=0)
    rest = [row for row in order.tolist() if row not in taken][: max(0, MAX_ROWS - len(taken))]
    size = min(schedule.rows_per_step, _MAX_ROWS_OF_A_STEP)
    for start in range(0, len(rest), size):
        yield np.array(rest[start : start + size], np.int64)


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
