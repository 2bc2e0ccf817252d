"""Tokenised rows, and optimizer steps cut from them.

An optimizer step is a fixed number of rows in an order fixed by the seed. Inside it, rows are
packed without padding into micro-batches; nothing here depends on the card but how they are cut.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

IGNORE_INDEX = -100

_UINT64 = (1 << 64) - 1
_MEASURED_ROWS = 4_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """Tokenised rows, one behind the other.

    Attributes:
        input_ids: Token ids of all rows, (total,), int32.
        labels: `input_ids` where a token is trained, else `IGNORE_INDEX`; not shifted, (total,).
        offsets: Start of each row and the end of the last, (rows + 1,), int64.
        row_ids: 0-based number of each row in its source, (rows,), int64.
        fingerprint: Hash of the source files, the template and the settings that made the tokens.
        summary: Facts for people and the report: format, files, counts, lengths.
        lines: 1-based line of each row in its file, (rows,), int64; None where there is none.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    offsets: NDArray[np.int64]
    row_ids: NDArray[np.int64]
    fingerprint: str
    summary: Mapping[str, Any]
    lines: NDArray[np.int64] | None = None

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.row_ids)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, (rows,)."""
        return np.diff(self.offsets)

    def place(self, index: int) -> tuple[str | None, int | None]:
        """File and line of row `index`, as far as they are known."""
        row, file = int(self.row_ids[index]), None
        for source in self.summary.get("files", ()):
            if source["first_row"] <= row < source["first_row"] + source["rows"]:
                file = source["path"]
        return file, None if self.lines is None else int(self.lines[index])


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One micro-batch: whole rows, one behind the other, N tokens in all.

    Attributes:
        input_ids: (N,), int32.
        labels: Id of the next token where it is trained, else `IGNORE_INDEX`; already shifted,
            (N,), int32.
        row_ids: Row number of each token, (N,), int64.
        positions: 0-based position of each token in its row, (N,), int32.
        cu_seqlens: Start of each row and N, (rows + 1,), int32.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    row_ids: NDArray[np.int64]
    positions: NDArray[np.int32]
    cu_seqlens: NDArray[np.int32]

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.input_ids)

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that carry loss."""
        return int(np.count_nonzero(self.labels != IGNORE_INDEX))

    @property
    def max_length(self) -> int:
        """Tokens of the longest row."""
        return int(np.diff(self.cu_seqlens).max(initial=0))


def step_rows(
    dataset: Dataset, *, epoch: int, seed: int, rows_per_step: int
) -> tuple[NDArray[np.int64], ...]:
    """The rows of each optimizer step of an epoch, every row once.

    The order is fixed by `seed` and `epoch` alone: rows are sorted by the raw 64-bit numbers of a
    Philox generator with that key, a stream that NumPy keeps the same in every version. Nothing of
    the card, the packing or the lengths enters it.

    Args:
        dataset: The rows.
        epoch: 0-based pass over them.
        seed: `train.seed`.
        rows_per_step: Batch size times accumulation.

    Returns:
        Row indices per step; the last step has the rows that are left, fewer where they do not
        divide evenly.
    """
    order = random_order(dataset.num_rows, seed=seed, stream=epoch)
    starts = range(0, dataset.num_rows, rows_per_step)
    return tuple(order[start : start + rows_per_step] for start in starts)


def random_order(count: int, *, seed: int, stream: int) -> NDArray[np.int64]:
    """The numbers below `count` in an order fixed by `seed` and `stream`, (count,)."""
    key = np.array([seed & _UINT64, stream & _UINT64], np.uint64)
    numbers = np.random.Philox(key=key).random_raw(count)
    return np.argsort(numbers, kind="stable").astype(np.int64)


def pack_rows(
    dataset: Dataset, rows: NDArray[np.int64], *, micro_batch_tokens: int, packing: bool = True
) -> tuple[Batch, ...]:
    """The rows of an optimizer step as micro-batches: whole rows, no padding.

    Best fit decreasing: the longest row first, each into the micro-batch where it leaves the least
    room. A row longer than `micro_batch_tokens` has a micro-batch of its own. Inside a micro-batch
    rows keep the order of the step; which rows meet depends on their lengths and the budget only.

    Args:
        dataset: The rows.
        rows: Row indices of one step, from `step_rows`.
        micro_batch_tokens: Tokens that a micro-batch may hold.
        packing: Whether rows may share a micro-batch.
    """
    bins = _pack(dataset.lengths[rows], micro_batch_tokens, packing=packing)
    return tuple(make_batch(dataset, [int(rows[place]) for place in sorted(b)]) for b in bins)


def _pack(lengths: NDArray[np.int64], micro_batch_tokens: int, *, packing: bool) -> list[list[int]]:
    """The places of `lengths` that share a micro-batch, for each micro-batch."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # free tokens and number of each open bin, sorted
    for place in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[place])
        fitting = bisect.bisect_left(rooms, (length, -1)) if packing else len(rooms)
        if fitting < len(rooms):
            free, number = rooms.pop(fitting)
            bins[number].append(place)
        else:
            free, number = micro_batch_tokens, len(bins)
            bins.append([place])
        bisect.insort(rooms, (free - length, number))
    return bins


class PackingUse(NamedTuple):
    """How full micro-batches are: rows and micro-batches looked at, and the share of tokens used.

    A row longer than a micro-batch counts as one that is full.
    """

    rows: int
    micro_batches: int
    used_ratio: float


def measure_packing(
    dataset: Dataset,
    *,
    seed: int,
    rows_per_step: int,
    micro_batch_tokens: int,
    packing: bool = True,
) -> PackingUse:
    """How the first steps of the first epoch fill their micro-batches.

    Args:
        dataset: The rows.
        seed: `train.seed`.
        rows_per_step: Batch size times accumulation.
        micro_batch_tokens: Tokens that a micro-batch may hold.
        packing: Whether rows may share a micro-batch.
    """
    lengths = dataset.lengths
    rows = micro_batches = 0
    used_tokens = room_tokens = 0
    for step in step_rows(dataset, epoch=0, seed=seed, rows_per_step=rows_per_step):
        if rows >= _MEASURED_ROWS:
            break
        own = lengths[step]
        sizes = [int(own[b].sum()) for b in _pack(own, micro_batch_tokens, packing=packing)]
        rows += len(step)
        micro_batches += len(sizes)
        used_tokens += sum(sizes)
        room_tokens += sum(max(size, micro_batch_tokens) for size in sizes)
    return PackingUse(rows, micro_batches, used_tokens / max(1, room_tokens))


def make_batch(dataset: Dataset, rows: Sequence[int]) -> Batch:
    """The rows `rows` one behind the other, labels shifted to the token that predicts them."""
    spans = [slice(int(dataset.offsets[row]), int(dataset.offsets[row + 1])) for row in rows]
    lengths = [span.stop - span.start for span in spans]
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    labels = np.concatenate([dataset.labels[span] for span in spans])
    shifted = np.append(labels[1:], np.int32(IGNORE_INDEX))
    # The last token of a row predicts nothing: what follows it is another row.
    shifted[cu_seqlens[1:] - 1] = IGNORE_INDEX
    return Batch(
        input_ids=np.concatenate([dataset.input_ids[span] for span in spans]),
        labels=shifted,
        row_ids=np.repeat(dataset.row_ids[list(rows)], lengths),
        positions=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        cu_seqlens=cu_seqlens,
    )
