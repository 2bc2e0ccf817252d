"""Answers that are labels: found in the references, generated from them alone, and counted.

The generation is held to the labels by a trie of their tokens: at each step only tokens follow
that go on with a label, so that every answer is one of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_LABELS = 32
MOST_LABEL_TOKENS = 24
FEWEST_ROWS_PER_LABEL = 4
_OPENERS = ("{", "[")


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelScores:
    """How a model's labels compare with the references.

    Attributes:
        accuracy: Share of rows with the right label.
        macro_f1: Mean of the F1 of each label that occurs in references or answers.
        confusion: Rows by reference (outer) and answer (inner), in the order of the labels.
    """

    accuracy: float
    macro_f1: float
    confusion: tuple[tuple[int, ...], ...]


def find_labels(
    references: Sequence[tuple[str, Sequence[int]]], held_out: Sequence[str]
) -> dict[str, tuple[int, ...]] | None:
    """The labels that answers consist of, with their tokens; None where answers are no labels.

    They are labels if few different ones make up all references, each often enough, and nothing
    else occurs in the held-out rows.

    Args:
        references: Text and tokens, stop included, of each answer that was trained.
        held_out: Texts of the held-out answers.
    """
    counts = Counter(text for text, _ in references)
    is_closed = set(held_out) <= set(counts)
    if not is_closed or not 2 <= len(counts) <= MOST_LABELS:
        return None
    if len(references) < FEWEST_ROWS_PER_LABEL * len(counts):
        return None
    tokens = Counter((text, tuple(ids)) for text, ids in references)
    labels: dict[str, tuple[int, ...]] = {}
    for (text, ids), _ in tokens.most_common():
        labels.setdefault(text, ids)
    is_short = all(len(ids) <= MOST_LABEL_TOKENS for ids in labels.values())
    is_json = any(text.startswith(_OPENERS) for text in labels)
    return dict(sorted(labels.items())) if is_short and not is_json else None


class LabelTrie:
    """Allows only tokens that go on with a label; `allowed` goes to `generate`.

    Args:
        labels: Tokens of each label, stop included.
    """

    def __init__(self, labels: Mapping[str, Sequence[int]]) -> None:
        self._following: dict[tuple[int, ...], set[int]] = {}
        for ids in labels.values():
            for end, token in enumerate(ids):
                self._following.setdefault(tuple(ids[:end]), set()).add(token)

    def allowed(self, made: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
        """`logits` (rows, V) with -inf for what goes on with no label; ended rows as they are."""
        following = [self._following.get(tuple(row)) for row in made]
        is_barred = torch.ones(logits.shape, dtype=torch.bool)
        for row, tokens in enumerate(following):
            is_barred[row, list(tokens) if tokens is not None else slice(None)] = False
        return logits.masked_fill(is_barred.to(logits.device), float("-inf"))


def score_labels(
    labels: Sequence[str], references: Sequence[str], answers: Sequence[str]
) -> LabelScores:
    """Accuracy, macro F1 and confusion matrix of `answers`, all of them among `labels`."""
    counts = Counter(zip(references, answers, strict=True))
    confusion = tuple(tuple(counts[reference, answer] for answer in labels) for reference in labels)
    right = [confusion[place][place] for place in range(len(labels))]
    wanted = [sum(row) for row in confusion]
    given = [sum(column) for column in zip(*confusion, strict=True)]
    f1 = [
        2 * hits / (first + second)
        for hits, first, second in zip(right, wanted, given, strict=True)
        if first + second
    ]
    return LabelScores(
        accuracy=sum(right) / max(1, len(references)),
        macro_f1=sum(f1) / max(1, len(f1)),
        confusion=confusion,
    )
