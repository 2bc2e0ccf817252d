"""Measures of generated answers, row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eightgig.evaluation.questions import Question
from eightgig.evaluation.schema import Schema, infer_schema
from eightgig.evaluation.statistics import Floats, Paired
from eightgig.evaluation.texts import is_exact, is_match, parse_json, rouge_l

_JSON_SHARE = 0.9

Score = Callable[[str, str], float]
"""Called with answer and reference."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerScores:
    """Which measures apply to the answers of a run, by name.

    Attributes:
        scores: Each from 0 to 1, more is better.
        schema: What JSON answers must look like, None where references are no JSON.
    """

    scores: Mapping[str, Score]
    schema: Schema | None


def choose_scores(references: Sequence[str]) -> AnswerScores:
    """The measures for answers like `references`; those of JSON where nearly all are JSON."""
    scores: dict[str, Score] = {
        "exact_match": lambda answer, reference: float(is_exact(answer, reference)),
        "normalised_match": lambda answer, reference: float(is_match(answer, reference)),
        "rouge_l": rouge_l,
    }
    parsed = [parse_json(text) for text in references]
    values = [value for value in parsed if isinstance(value, (dict, list))]
    if not references or len(values) < _JSON_SHARE * len(references):
        return AnswerScores(scores=scores, schema=None)
    schema = infer_schema(values)
    scores["json_valid"] = lambda answer, _: float(isinstance(parse_json(answer), (dict, list)))
    scores["schema_match"] = lambda answer, _: float(_fits(schema, answer))
    return AnswerScores(scores=scores, schema=schema)


def _fits(schema: Schema, answer: str) -> bool:
    value = parse_json(answer)
    return isinstance(value, (dict, list)) and schema.accepts(value)


def pair_scores(
    score: Score,
    references: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    questions: Sequence[Question],
) -> Paired:
    """`score` of two models' answers to the same questions."""
    return Paired(
        first=_each(score, first, references),
        second=_each(score, second, references),
        weights=np.ones(len(references)),
        sources=np.array([question.source for question in questions], np.int64),
    )


def _each(score: Score, answers: Sequence[str], references: Sequence[str]) -> Floats:
    pairs = zip(answers, references, strict=True)
    return np.array([score(answer, reference) for answer, reference in pairs], np.float64)
