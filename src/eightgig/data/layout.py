"""Answers as tokens: rows that begin with the very tokens of the prompts they answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eightgig.data.control import ControlTokens, RenderedText
from eightgig.data.encode import Encoded
from eightgig.data.served import Answer


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """One row to train on.

    Attributes:
        input_ids: Token ids, (T,), int32.
        is_trained: Which of them are trained, (T,), bool.
    """

    input_ids: NDArray[np.int32]
    is_trained: NDArray[np.bool_]


class RowLayout:
    """Lays answers out in rows, for one tokenizer.

    Args:
        control: Its control tokens.
    """

    def __init__(self, control: ControlTokens) -> None:
        self._control = control

    def lay_out(self, answers: Sequence[Answer], *, is_whole: bool) -> tuple[RenderedRow, ...]:
        """Rows that train `answers`, the turns of one conversation in order.

        Answers that stand in the row of the last one just as they were answered are trained there;
        every other one has a row of its own.

        Args:
            answers: At least one.
            is_whole: Whether the row of the last one is trained from its beginning.

        Raises:
            ControlTokenLost: A typed control token cannot be kept apart.
        """
        *earlier, last = answers
        encoded = self._control.encode(last.full)
        splits = self._splits_at(last.prompt, encoded)
        inside = [answer for answer in earlier if splits and self._lies_in(answer, last, encoded)]
        rows = [
            self._row([answer], self._control.encode(answer.full))
            for answer in earlier
            if answer not in inside
        ]
        rows.append(self._row([*inside, last], encoded))
        if is_whole:
            rows[-1].is_trained[1:] = True
        return tuple(rows)

    def _lies_in(self, answer: Answer, last: Answer, encoded: Encoded) -> bool:
        """Whether `last`'s row trains `answer` behind the prompt that a server would send."""
        text, start = last.full.text, len(answer.prompt.text)
        return (
            text.startswith(answer.prompt.text)
            and text[start : answer.end] == answer.full.text[start : answer.end]
            and self._splits_at(answer.prompt, encoded)
        )

    def _splits_at(self, prompt: RenderedText, row: Encoded) -> bool:
        """Whether `row`, whose text begins with `prompt`, begins with its tokens."""
        real = self._control.real_in(prompt)
        start = real[-1].start() if real else 0
        first, count = row.token_at(start), row.token_at(len(prompt.text))
        if first is None or count is None:
            return False
        # Control tokens cut a text into pieces that are tokenised apart, so that all tokens up to
        # the last one agree when the texts do; only what follows it can join with the answer.
        return row.ids[first:count] == self._control.encode(prompt.part(start)).ids

    def _row(self, answers: list[Answer], encoded: Encoded) -> RenderedRow:
        """The row of the last of `answers`, tokenised as `encoded`, with all of them trained."""
        if not self._splits_at(answers[-1].prompt, encoded):
            return self._compose(answers[-1])
        ids = np.array(encoded.ids, np.int32)
        is_trained = np.zeros(len(ids), np.bool_)
        for answer in answers:
            start = encoded.token_at(len(answer.prompt.text))
            end = encoded.token_at(answer.end)
            is_trained[start : len(ids) if end is None else end] = True
        return RenderedRow(ids, is_trained)

    def _compose(self, answer: Answer) -> RenderedRow:
        """Prompt and answer tokenised apart: a token would reach from one into the other."""
        prompt = self._control.encode(answer.prompt).ids
        start, end = len(answer.prompt.text), answer.end
        # Behind a control token, so that a tokenizer adds no blank as at the start of a text.
        last = self._control.real_in(answer.full.part(0, end))[-1]
        lead = RenderedText(last.group())
        trained = self._control.encode(lead + answer.full.part(start, end)).ids[1:]
        rest = self._control.encode(lead + answer.full.part(end)).ids[1:]
        ids = np.array([*prompt, *trained, *rest], np.int32)
        is_trained = np.zeros(len(ids), np.bool_)
        is_trained[len(prompt) : len(prompt) + len(trained)] = True
        return RenderedRow(ids, is_trained)
