"""The training and held-out rows of a config, as `Dataset`s.

Rows with errors stop the load: nothing is trained that is not understood. What is left out, split
or cut is a finding.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from eightgig.config import DataConfig
from eightgig.data.batches import Dataset, random_order
from eightgig.data.prepare import Preparation, Progress, tokenise
from eightgig.data.rules import make_finding
from eightgig.data.select import (
    SHOWN_ROWS,
    TooLong,
    count_trained,
    describe_dataset,
    limit_length,
    select_rows,
)
from eightgig.data.tokenised import Tokenised
from eightgig.data.tokenizer import render_settings
from eightgig.errors import DataError, Finding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "LoadedData",
    "RowSplit",
    "limit_both",
    "limit_length",
    "load_dataset",
    "make_dataset",
    "split_rows",
]

_SPLIT_STREAM = 0x5EED_5711


class LoadedData(NamedTuple):
    """What a training needs of its data: `train, held_out, findings = load_dataset(...)`."""

    train: Dataset
    held_out: Dataset | None
    findings: tuple[Finding, ...]


class RowSplit(NamedTuple):
    """Rendered rows to train on, rendered rows to hold out, and what was noticed."""

    trained: NDArray[np.int64]
    held_out: NDArray[np.int64]
    findings: tuple[Finding, ...]


def load_dataset(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_length: int | None = None,
    seed: int = 42,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> LoadedData:
    """Read, render and split the rows of `config`.

    Args:
        config: The group `data`.
        tokenizer: From `load_tokenizer`.
        max_length: Longest row in tokens; None leaves all as they are (`limit_length` cuts later).
        seed: `train.seed`; it fixes which rows are held out.
        cache_dir: Folder for tokens of this and former runs; None keeps them in memory.
        progress: Called with the rows done, and the share of all.

    Raises:
        DataError: A row has an error, or nothing is left to train on.
    """
    settings = render_settings(tokenizer, config.chat_template)
    preparation = Preparation(cache_dir=cache_dir, progress=progress)
    tokens = tokenise(config, config.path, settings, preparation)
    _stop_at_errors(tokens)
    other: Tokenised | None = None
    if config.held_out_path is not None:
        other = tokenise(config, config.held_out_path, settings, preparation)
        _stop_at_errors(other)
    findings = [*tokens.findings, *(() if other is None else other.findings)]
    split = split_rows(tokens, other, config, seed=seed)
    findings.extend(split.findings)
    if not len(split.trained):
        raise _no_rows()
    train = select_rows(make_dataset(tokens), split.trained, cache_dir=cache_dir)
    held_out: Dataset | None = None
    if len(split.held_out):
        held_out = make_dataset(tokens if other is None else other)
        held_out = select_rows(held_out, split.held_out, cache_dir=cache_dir)
    data = (train, held_out)
    if max_length is None:
        train, held_out = _require_trained(data)
    else:
        train, held_out = limit_both(
            data, max_length, config.too_long, findings, cache_dir=cache_dir
        )
    return LoadedData(train=train, held_out=held_out, findings=tuple(findings))


def limit_both(
    data: tuple[Dataset, Dataset | None],
    max_length: int,
    too_long: TooLong,
    findings: list[Finding],
    *,
    cache_dir: Path | None = None,
) -> tuple[Dataset, Dataset | None]:
    """`limit_length` of training and held-out rows; of the latter None where nothing is left.

    Raises:
        DataError: As `limit_length`, or nothing is left to train on.
    """
    rows, held_out = data
    rows = limit_length(rows, max_length, too_long, findings, cache_dir=cache_dir)
    if held_out is not None:
        held_out = limit_length(held_out, max_length, too_long, findings, cache_dir=cache_dir)
    return _require_trained((rows, held_out))


def _require_trained(
    data: tuple[Dataset, Dataset | None],
) -> tuple[Dataset, Dataset | None]:
    """Training rows, and held-out rows if any of them carries loss."""
    rows, held_out = data
    if not count_trained(rows):
        raise _no_rows()
    return rows, held_out if held_out is not None and count_trained(held_out) else None


def _stop_at_errors(tokens: Tokenised) -> None:
    errors = [finding for finding in tokens.findings if finding.severity == "error"]
    if not errors:
        return
    first, count = errors[0], tokens.count("error")
    more = f" {count - 1:,} more error{'s' if count > 2 else ''}." if count > 1 else ""
    raise DataError(
        f"{first.place}{first.message}{more}",
        why=first.why,
        fix=first.fix,
        findings=errors,
    )


def _no_rows() -> DataError:
    finding = make_finding("data.no_rows", "No row is left to train on.")
    return DataError(finding.message, why=finding.why, fix=finding.fix, findings=[finding])


def split_rows(
    tokens: Tokenised, other: Tokenised | None, config: DataConfig, *, seed: int
) -> RowSplit:
    """Which rendered rows are trained on, and which are held out.

    Whole groups are held out, in an order fixed by `seed`, until there are enough rows. Rows of
    one `data.group_column`, rows that say the same, and rows made from one row are one group.

    Args:
        tokens: Rows of `data.path`.
        other: Rows of `data.held_out_path`, if it is set; then none of `tokens` is held out.
        config: The group `data`.
        seed: `train.seed`.

    Raises:
        DataError: Every row would be held out.
    """
    every = np.arange(len(tokens.lengths), dtype=np.int64)
    if other is not None:
        trained_keys = tokens.content_keys[tokens.origins]
        held = np.arange(len(other.lengths), dtype=np.int64)
        held, findings = _without_twins(other, held, trained_keys)
        return RowSplit(every, held, findings)
    if config.held_out == 0 or not len(every):
        return RowSplit(every, every[:0], ())
    sources = np.unique(tokens.origins)
    groups, of_source = np.unique(tokens.group_keys[sources], return_inverse=True)
    wanted = _wanted_rows(config.held_out, len(sources))
    if len(groups) == 1:
        message = f"All {len(sources):,} rows are one group; none is held out."
        note = make_finding("data.held_out_skipped", message)
        return RowSplit(every, every[:0], (note,))
    order = random_order(len(groups), seed=seed, stream=_SPLIT_STREAM)
    sizes = np.bincount(of_source, minlength=len(groups))[order]
    before = np.cumsum(sizes) - sizes
    # The last group is always trained on; so are those behind the one that reaches the number.
    chosen = order[:-1][before[:-1] < wanted]
    is_held = np.isin(tokens.origins, sources[np.isin(of_source, chosen)])
    trained_keys = tokens.content_keys[tokens.origins[~is_held]]
    held, findings = _without_twins(tokens, every[is_held], trained_keys)
    return RowSplit(every[~is_held], held, findings)


def _wanted_rows(held_out: float, rows: int) -> int:
    wanted = int(held_out) if held_out >= 1 else max(1, round(held_out * rows))
    if wanted < rows or rows == 1:
        return wanted
    message = f"`data.held_out` is {held_out:g}, and there are {rows:,} rows."
    finding = make_finding("data.held_out", message)
    raise DataError(message, why=finding.why, fix=finding.fix, findings=[finding])


def _without_twins(
    tokens: Tokenised, held: NDArray[np.int64], trained_keys: NDArray[np.uint64]
) -> tuple[NDArray[np.int64], tuple[Finding, ...]]:
    """`held` without rows that say what a trained row says, and the findings of that."""
    is_twin = np.isin(tokens.content_keys[tokens.origins[held]], trained_keys)
    twins = np.unique(tokens.origins[held[is_twin]]).tolist()
    findings: list[Finding] = []
    for origin in twins[:SHOWN_ROWS]:
        file, line = tokens.place(origin)
        message = f"The held-out row is also trained on; {len(twins):,} held-out rows are."
        findings.append(make_finding("data.leak", message, file=file, line=line))
    return held[~is_twin], tuple(findings)


def make_dataset(tokens: Tokenised) -> Dataset:
    """All rendered rows of `tokens`."""
    files: list[dict[str, Any]] = [
        {
            "path": source.name,
            "format": source.format,
            "first_row": source.first_row,
            "rows": source.num_rows,
        }
        for source in tokens.sources
    ]
    return describe_dataset(
        Dataset(
            input_ids=tokens.input_ids,
            labels=tokens.labels,
            offsets=np.concatenate([[0], np.cumsum(tokens.lengths)]).astype(np.int64),
            row_ids=np.asarray(tokens.origins),
            fingerprint=tokens.fingerprint,
            summary={},
            lines=tokens.lines[tokens.origins] if len(tokens.lines) else None,
        ),
        files,
    )
