"""Some rows of a `Dataset`: chosen, left out or cut, without holding all tokens in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from eightgig.data.batches import IGNORE_INDEX, Dataset
from eightgig.data.cache import ArrayWriter
from eightgig.data.rules import make_finding
from eightgig.errors import DataError, Finding
from eightgig.units import MIB

TooLong = Literal["refuse", "drop", "truncate"]

SHOWN_ROWS = 20
"""Rows that are named where more are meant."""

_BLOCK_TOKENS = 1 << 22
_MEMORY_BYTES = 512 * MIB


def select_rows(
    dataset: Dataset,
    rows: NDArray[np.int64],
    *,
    lengths: NDArray[np.int64] | None = None,
    cache_dir: Path | None = None,
) -> Dataset:
    """The rows `rows` of `dataset`, in that order.

    Args:
        dataset: The rows to choose from.
        rows: Which of them, (chosen,).
        lengths: How many tokens of the beginning of each are kept, (chosen,); None keeps all.
        cache_dir: Where tokens are kept that are too many for memory.

    Raises:
        DataError: The disk is full, or fails.
    """
    kept = dataset.lengths[rows] if lengths is None else lengths
    is_everything = len(rows) == dataset.num_rows and np.array_equal(
        rows, np.arange(dataset.num_rows)
    )
    if is_everything and np.array_equal(kept, dataset.lengths):
        return dataset
    digest = hashlib.sha256(dataset.fingerprint.encode() + rows.tobytes() + kept.tobytes())
    input_ids, labels = _copy_tokens(
        dataset, dataset.offsets[rows], kept, _scratch(cache_dir, kept, digest.hexdigest())
    )
    return describe_dataset(
        Dataset(
            input_ids=input_ids,
            labels=labels,
            offsets=np.concatenate([[0], np.cumsum(kept)]).astype(np.int64),
            row_ids=dataset.row_ids[rows],
            fingerprint=digest.hexdigest(),
            summary={},
            lines=None if dataset.lines is None else dataset.lines[rows],
        ),
        dataset.summary.get("files", ()),
    )


def _scratch(cache_dir: Path | None, lengths: NDArray[np.int64], digest: str) -> Path | None:
    is_large = 8 * int(lengths.sum()) > _MEMORY_BYTES
    return cache_dir / "rows" / digest[:32] if cache_dir is not None and is_large else None


def _copy_tokens(
    dataset: Dataset,
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    folder: Path | None,
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    writer = ArrayWriter(folder)
    for some in row_blocks(lengths):
        index = _token_index(starts[some], lengths[some])
        writer.append("input_ids", dataset.input_ids[index])
        writer.append("labels", dataset.labels[index])
    writer.close()
    return writer.array("input_ids", np.int32), writer.array("labels", np.int32)


def row_blocks(lengths: NDArray[np.int64]) -> Sequence[slice]:
    """Neighbouring rows that have about so many tokens that they fit easily."""
    if not len(lengths):
        return []
    block = np.cumsum(lengths) // _BLOCK_TOKENS
    edges = np.flatnonzero(np.diff(block, prepend=-1))
    return [
        slice(int(start), int(end))
        for start, end in zip(edges, [*edges[1:], len(lengths)], strict=True)
    ]


def _token_index(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places of the tokens of some rows, one row behind the other."""
    shift: NDArray[np.int64] = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    return np.arange(int(lengths.sum()), dtype=np.int64) + shift


def count_trained(dataset: Dataset) -> int:
    """Trained tokens of `dataset`."""
    blocks = range(0, len(dataset.labels), _BLOCK_TOKENS)
    return sum(
        int(np.count_nonzero(dataset.labels[start : start + _BLOCK_TOKENS] != IGNORE_INDEX))
        for start in blocks
    )


def trained_per_row(dataset: Dataset) -> NDArray[np.int64]:
    """Trained tokens of each row of `dataset`, (rows,), without holding all of them in memory."""
    counts = np.zeros(dataset.num_rows, np.int64)
    for rows in row_blocks(dataset.lengths):
        offsets = dataset.offsets[rows.start : rows.stop + 1]
        is_trained = dataset.labels[int(offsets[0]) : int(offsets[-1])] != IGNORE_INDEX
        before = np.concatenate([[0], np.cumsum(is_trained)])
        counts[rows] = np.diff(before[offsets - offsets[0]])
    return counts


def describe_dataset(dataset: Dataset, files: Sequence[Mapping[str, Any]]) -> Dataset:
    """`dataset` with its summary.

    Args:
        dataset: Rows whose summary is not yet made.
        files: `path`, `format`, `first_row` and `rows` of each source.
    """
    lengths = dataset.lengths
    formats = sorted({str(file["format"]) for file in files})
    return Dataset(
        input_ids=dataset.input_ids,
        labels=dataset.labels,
        offsets=dataset.offsets,
        row_ids=dataset.row_ids,
        fingerprint=dataset.fingerprint,
        summary={
            "format": ", ".join(formats),
            "files": [dict(file) for file in files],
            "rows": dataset.num_rows,
            "tokens": int(lengths.sum()),
            "trained_tokens": count_trained(dataset),
            "longest_tokens": int(lengths.max(initial=0)),
            "mean_tokens": float(lengths.mean()) if len(lengths) else 0.0,
        },
        lines=dataset.lines,
    )


def limit_length(
    dataset: Dataset,
    max_length: int,
    too_long: TooLong,
    findings: list[Finding],
    *,
    cache_dir: Path | None = None,
) -> Dataset:
    """`dataset` with no row longer than `max_length`, as `data.too_long` says.

    Args:
        dataset: The rows.
        max_length: Longest row in tokens.
        too_long: `refuse`, `drop` or `truncate`.
        findings: What is dropped or cut is added here.
        cache_dir: Where tokens are kept that are too many for memory.

    Raises:
        DataError: Rows are longer, and `too_long` is `refuse`; or the disk is full.
    """
    found = find_long_rows(dataset, max_length, too_long)
    if not found:
        return dataset
    lengths = dataset.lengths
    if too_long == "refuse":
        raise DataError(
            found[0].message,
            why=found[0].why,
            fix=f"Set `data.max_length: {int(lengths.max())}`, or `data.too_long` to drop or "
            "truncate.",
            findings=found,
        )
    findings.extend(found)
    rows = rows_left(dataset, max_length, too_long)
    cut = np.minimum(lengths[rows], max_length)
    return select_rows(dataset, rows, lengths=cut, cache_dir=cache_dir)


def rows_left(dataset: Dataset, max_length: int, too_long: TooLong) -> NDArray[np.int64]:
    """Numbers of the rows of which something is left to train on, as `data.too_long` says."""
    long = np.flatnonzero(dataset.lengths > max_length)
    # A row whose whole answer is cut would only cost time.
    lost = [
        row
        for row in long.tolist()
        if too_long == "drop" or not _trained_in(dataset, row, max_length)
    ]
    return np.setdiff1d(np.arange(dataset.num_rows), np.array(lost, np.int64))


def find_long_rows(dataset: Dataset, max_length: int, too_long: TooLong) -> tuple[Finding, ...]:
    """What becomes of rows longer than `max_length`: counts first, then rows."""
    lengths = dataset.lengths
    long = np.flatnonzero(lengths > max_length)
    if not len(long):
        return ()
    longest = int(lengths.max())
    message = (
        f"{len(long):,} of {dataset.num_rows:,} rows are longer than {max_length:,} tokens; the "
        f"longest has {longest:,}."
    )
    code = {"refuse": "data.too_long", "drop": "data.dropped", "truncate": "data.truncated"}
    findings = [make_finding(code[too_long], message)]
    for row in long[:SHOWN_ROWS].tolist():
        file, line = dataset.place(row)
        trained = _trained_in(dataset, row, int(lengths[row]))
        lost = trained - _trained_in(dataset, row, max_length)
        cut = f"{lost:,} of {trained:,} trained ones" if lost else "no trained ones"
        text = f"The row has {int(lengths[row]):,} tokens; {cut} lie behind {max_length:,}."
        if too_long == "refuse":
            findings.append(make_finding("data.too_long", text, file=file, line=line))
        elif too_long == "truncate" and lost:
            findings.append(make_finding("data.answer_cut", text, file=file, line=line))
    return tuple(findings)


def _trained_in(dataset: Dataset, row: int, length: int) -> int:
    """Trained tokens among the first `length` of a row."""
    start = int(dataset.offsets[row])
    end = min(start + length, int(dataset.offsets[row + 1]))
    return int(np.count_nonzero(dataset.labels[start:end] != IGNORE_INDEX))
