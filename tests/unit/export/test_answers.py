"""When two models agree: rounding and ties do, other answers do not."""

from __future__ import annotations

import numpy as np
import pytest

from eightgig.export.answers import (
    Answer,
    compare_answers,
    log_softmax,
    make_answer,
    tolerance_for,
)

V = 50


def answer(seed: int, *, noise: float = 0.0, length: int = 4) -> Answer:
    rng = np.random.default_rng(seed)
    logits = [rng.normal(size=V).astype(np.float32) * 3 for _ in range(length)]
    moved = [
        values + noise * np.random.default_rng(seed + 99).normal(size=V).astype(np.float32)
        for values in logits
    ]
    return make_answer(moved, [int(values.argmax()) for values in moved])


def test_equal_answers_agree_exactly() -> None:
    answers = [answer(seed) for seed in range(5)]
    agreement = compare_answers(answers, answers, tolerance_for("float32"))
    assert agreement.is_within
    assert agreement.num_same_answers == 5
    assert agreement.divergence == 0.0
    assert agreement.worst == ""


@pytest.mark.parametrize(("noise", "precision"), [(1e-3, "float32"), (0.03, "16 bit")])
def test_rounding_stays_within_its_tolerance(noise: float, precision: str) -> None:
    reference = [answer(seed) for seed in range(20)]
    found = [answer(seed, noise=noise) for seed in range(20)]
    assert compare_answers(reference, found, tolerance_for(precision)).is_within  # type: ignore[arg-type]


def test_larger_differences_are_outside_and_say_where() -> None:
    reference = [answer(seed) for seed in range(20)]
    found = [answer(seed, noise=1.0) for seed in range(20)]
    agreement = compare_answers(reference, found, tolerance_for("16 bit"))
    assert not agreement.is_within
    assert "prompt" in agreement.worst


def test_another_model_is_outside_even_the_widest_tolerance() -> None:
    reference = [answer(seed) for seed in range(3)]
    found = [answer(seed + 1000) for seed in range(3)]
    assert not compare_answers(reference, found, tolerance_for("float32", "4 bit")).is_within


def test_a_tie_counts_as_agreement_and_a_clear_choice_does_not() -> None:
    logits = np.zeros(V, np.float32)
    logits[7], logits[9] = 5.0, 5.0 - 0.1
    other = logits.copy()
    other[9] += 0.2
    reference = [make_answer([logits], [7])]
    tie = compare_answers(reference, [make_answer([other], [9])], tolerance_for("16 bit"))
    assert tie.is_within
    assert tie.num_ties == 1
    logits[9] = 1.0
    clear = compare_answers(
        [make_answer([logits], [7])], [make_answer([other], [9])], tolerance_for("16 bit")
    )
    assert not clear.is_within


def test_an_answer_that_goes_on_behind_its_end_is_outside() -> None:
    long, short = answer(1, length=5), answer(1, length=5)
    cut = Answer(first=short.first, ids=short.ids[:3], likeliest=short.likeliest[:3])
    assert not compare_answers([long], [cut], tolerance_for("4 bit")).is_within


def test_another_vocabulary_or_nan_is_outside() -> None:
    reference = answer(1)
    smaller = Answer(first=reference.first[:-1], ids=reference.ids, likeliest=reference.likeliest)
    broken = Answer(
        first=np.full(V, np.nan, np.float32), ids=reference.ids, likeliest=reference.likeliest
    )
    for found in (smaller, broken):
        agreement = compare_answers([reference], [found], tolerance_for("4 bit"))
        assert not agreement.is_within
        assert agreement.worst


def test_log_probabilities_sum_to_one_also_with_forbidden_tokens() -> None:
    logits = np.array([1000.0, 999.0, -np.inf], np.float32)
    assert np.exp(log_softmax(logits)).sum() == pytest.approx(1.0)
