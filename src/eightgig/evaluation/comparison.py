"""What two models did, compared measure by measure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from eightgig.evaluation.answers import choose_scores, pair_scores
from eightgig.evaluation.forgetting import compare_general
from eightgig.evaluation.labels import score_labels
from eightgig.evaluation.passes import EvaluationOptions, ModelPass, Work
from eightgig.evaluation.records import (
    AnswerPair,
    Forgetting,
    LabelComparison,
    NullComparison,
)
from eightgig.evaluation.schema import describe_schema
from eightgig.evaluation.statistics import Measure, Paired, compare
from eightgig.evaluation.texts import is_exact
from eightgig.evaluation.verdict import MARGINS

_SHARE_MARGIN = MARGINS["exact_match"]


def compare_loss(work: Work, first: ModelPass, second: ModelPass, *, seed: int) -> Measure:
    """Loss of the trained tokens of the held-out rows."""
    return compare(
        "loss",
        _pair_losses(work, first, second),
        is_higher_better=False,
        margin=MARGINS["loss"],
        seed=seed,
    )


def compare_perplexity(work: Work, first: ModelPass, second: ModelPass, *, seed: int) -> Measure:
    """Perplexity of the same tokens; the margin is that of the loss."""
    paired = _pair_losses(work, first, second)
    at_first = float(np.exp(paired.first.sum() / max(1.0, paired.weights.sum())))
    return compare(
        "perplexity",
        paired,
        is_higher_better=False,
        margin=at_first * math.expm1(MARGINS["loss"]),
        seed=seed,
        transform=np.exp,
    )


def compare_answers(
    work: Work, first: ModelPass, second: ModelPass, *, seed: int
) -> tuple[tuple[Measure, ...], str | None]:
    """Every measure of generated answers, and what JSON answers must look like."""
    if not work.questions:
        return (), None
    chosen = choose_scores(work.known_answers)
    measures = tuple(
        compare(
            name,
            pair_scores(score, work.references, first.answers, second.answers, work.questions),
            is_higher_better=True,
            margin=_SHARE_MARGIN,
            seed=seed,
        )
        for name, score in chosen.scores.items()
    )
    return measures, None if chosen.schema is None else describe_schema(chosen.schema)


def compare_labels(
    work: Work, first: ModelPass, second: ModelPass, *, seed: int
) -> LabelComparison | None:
    """Answers held to labels; None where answers are no labels."""
    if work.labels is None or not work.questions:
        return None
    names = tuple(work.labels)
    accuracy = compare(
        "label_accuracy",
        pair_scores(_is_exact, work.references, first.labels, second.labels, work.questions),
        is_higher_better=True,
        margin=MARGINS["label_accuracy"],
        seed=seed,
    )
    return LabelComparison(
        labels=names,
        base=score_labels(names, work.references, first.labels),
        tuned=score_labels(names, work.references, second.labels),
        accuracy=accuracy,
    )


def compare_forgetting(
    work: Work, first: ModelPass, second: ModelPass, options: EvaluationOptions
) -> Forgetting | None:
    """Loss on general text; None where it was not measured."""
    if work.general is None or first.general is None or second.general is None:
        return None
    return compare_general(
        options.general_text, work.general, first.general, second.general, seed=options.seed
    )


def compare_null(
    work: Work, base: ModelPass, tuned: ModelPass, null: ModelPass, *, seed: int
) -> NullComparison:
    """The null adapter against the base model, and the tuned one against it."""
    exact = tuned_exact = None
    if work.questions:
        pairs = [(base, null), (null, tuned)]
        exact, tuned_exact = (
            compare(
                "exact_match",
                pair_scores(_is_exact, work.references, one.answers, two.answers, work.questions),
                is_higher_better=True,
                margin=_SHARE_MARGIN,
                seed=seed,
            )
            for one, two in pairs
        )
    return NullComparison(
        loss=compare_loss(work, base, null, seed=seed),
        tuned_loss=compare_loss(work, null, tuned, seed=seed),
        exact_match=exact,
        tuned_exact_match=tuned_exact,
    )


def pair_answers(work: Work, base: ModelPass, tuned: ModelPass) -> tuple[AnswerPair, ...]:
    """All answers, side by side."""
    pairs = []
    for number, question in enumerate(work.questions):
        file, line = work.planned.held_out.place(question.row)
        pairs.append(
            AnswerPair(
                file=file,
                line=line,
                question=work.text.question(question.prompt),
                reference=work.references[number],
                base=base.answers[number],
                tuned=tuned.answers[number],
                is_base_cut=base.is_cut[number],
                is_tuned_cut=tuned.is_cut[number],
            )
        )
    return tuple(pairs)


def describe_limits(work: Work, passes: Sequence[tuple[str, ModelPass]]) -> tuple[str, ...]:
    """What was left out or cut, in words."""
    held_out, count = work.planned.held_out.num_rows, len(work.questions)
    notes = []
    if not count:
        notes.append("No answers were generated: no held-out row has a question.")
    elif count < held_out:
        notes.append(f"Answers were generated for {count:,} of {held_out:,} held-out rows.")
    for name, done in passes:
        cut = sum(done.is_cut)
        if cut:
            notes.append(
                f"{name}: {cut:,} of {count:,} answers had not ended after "
                f"{work.max_new_tokens:,} tokens."
            )
    return tuple(notes)


def _pair_losses(work: Work, first: ModelPass, second: ModelPass) -> Paired:
    return Paired(
        first=first.losses.sums,
        second=second.losses.sums,
        weights=first.losses.tokens.astype(np.float64),
        sources=work.planned.held_out.row_ids,
    )


def _is_exact(answer: str, reference: str) -> float:
    return float(is_exact(answer, reference))
