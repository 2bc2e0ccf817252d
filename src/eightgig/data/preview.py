"""Rendered rows for people: each token's text, and whether it is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from eightgig.data.batches import IGNORE_INDEX, Dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CLEAN_TOKENS = 16


class PreviewToken(NamedTuple):
    """One token of a row.

    Attributes:
        text: What it adds to the text; empty where it is only part of a character.
        is_trained: Whether it carries loss.
        token_id: Its number.
    """

    text: str
    is_trained: bool
    token_id: int


class PreviewRow(NamedTuple):
    """One row, and where it was written."""

    file: str | None
    line: int | None
    tokens: tuple[PreviewToken, ...]


def preview_rows(
    dataset: Dataset, tokenizer: PreTrainedTokenizerFast, *, count: int = 3
) -> tuple[PreviewRow, ...]:
    """Some rows of `dataset`, spread over it.

    Args:
        dataset: The rows.
        tokenizer: From `load_tokenizer`.
        count: How many rows.
    """
    count = min(count, dataset.num_rows)
    rows = [index * dataset.num_rows // count for index in range(count)]
    return tuple(preview_row(dataset, row, tokenizer) for row in rows)


def preview_row(dataset: Dataset, row: int, tokenizer: PreTrainedTokenizerFast) -> PreviewRow:
    """Row `row` of `dataset`."""
    span = slice(int(dataset.offsets[row]), int(dataset.offsets[row + 1]))
    ids = dataset.input_ids[span].tolist()
    is_trained = (dataset.labels[span] != IGNORE_INDEX).tolist()
    texts = _token_texts(ids, lambda some: str(tokenizer.decode(some)))
    file, line = dataset.place(row)
    return PreviewRow(
        file=file,
        line=line,
        tokens=tuple(map(PreviewToken, texts, is_trained, ids)),
    )


def _token_texts(ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """What each token adds to the text of those before it."""
    texts: list[str] = []
    start, shown = 0, ""
    for end in range(1, len(ids) + 1):
        text = decode(list(ids[start:end]))
        # A character of several tokens is whole with its last one.
        whole = text if not text.endswith("\ufffd") else shown
        texts.append(whole[len(shown) :])
        shown = whole
        # Blanks at the start of a text may be dropped: one token, itself whole characters, stays as
        # what goes before.
        anchor = decode([ids[end - 1]]) if end - start >= _CLEAN_TOKENS else "\ufffd"
        if whole == text and "\ufffd" not in anchor:
            start, shown = end - 1, anchor
    return texts
