"""Held-out rows as questions: the prompt that a server would send, and the answer of the row."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from eightgig.data.batches import IGNORE_INDEX, Dataset
from eightgig.data.turns import ROLES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_ROLE_WORDS = frozenset({*ROLES, "model", "ipython", "thought"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """The last trained answer of a row, and all that stands before it.

    Attributes:
        row: Index of the row.
        source: Row that it was made from.
        prompt: Token ids before the answer.
        answer: Token ids of the answer, its stop included.
    """

    row: int
    source: int
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def read_questions(rows: Dataset) -> tuple[Question, ...]:
    """A question for every row that has a prompt; plain text, trained whole, has none."""
    questions = []
    for row in range(rows.num_rows):
        span = slice(int(rows.offsets[row]), int(rows.offsets[row + 1]))
        ids = rows.input_ids[span].tolist()
        is_trained = rows.labels[span] != IGNORE_INDEX
        trained = np.flatnonzero(is_trained)
        if not len(trained):
            continue
        end = int(trained[-1]) + 1
        before = np.flatnonzero(~is_trained[:end])
        start = int(before[-1]) + 1 if len(before) else 0
        # One token before the answer is the beginning of the text: nothing was asked.
        if start > 1:
            questions.append(
                Question(
                    row=row,
                    source=int(rows.row_ids[row]),
                    prompt=tuple(ids[:start]),
                    answer=tuple(ids[start:end]),
                )
            )
    return tuple(questions)


def pick_questions(questions: Sequence[Question], most: int) -> tuple[Question, ...]:
    """At most `most` of `questions`, spread over all."""
    count = min(most, len(questions))
    return tuple(questions[place * len(questions) // count] for place in range(count))


class TokenText:
    """Texts of prompts and answers.

    Args:
        tokenizer: The run's.
        stop_ids: Tokens that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop_ids: Set[int]) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        added = tokenizer.added_tokens_decoder.items()
        self._special_ids = frozenset(number for number, token in added if token.special)

    def answer(self, ids: Sequence[int]) -> str:
        """The text of an answer, without its stop and the blanks around it."""
        kept = [token for token in ids if token not in self._stop_ids]
        return str(self._tokenizer.decode(kept, skip_special_tokens=True)).strip()

    def question(self, ids: Sequence[int]) -> str:
        """The last turn of a prompt, without what the template puts around it.

        Control tokens cut a prompt into pieces; names of roles among these, alone or in a line
        before the text, are the template's.
        """
        pieces: list[list[int]] = [[]]
        for token in ids:
            if token in self._special_ids:
                pieces.append([])
            else:
                pieces[-1].append(token)
        texts = [_without_role(str(self._tokenizer.decode(piece))) for piece in pieces]
        said = [text for text in texts if text]
        return said[-1] if said else str(self._tokenizer.decode(list(ids)))


def _without_role(text: str) -> str:
    first, _, rest = text.strip().partition("\n")
    return rest.strip() if first.strip() in _ROLE_WORDS else text.strip()
