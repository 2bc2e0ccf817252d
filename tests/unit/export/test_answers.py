"""When two models agree: rounding does, other distributions do not."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from eightgig.export.answers import (
    Answer,
    Precision,
    compare_answers,
    log_softmax,
    tolerance_for,
)

V = 50


def answer(seed: int, *, length: int = 4) -> Answer:
    logits = np.random.default_rng(seed).normal(size=(length, V)).astype(np.float32) * 3
    ids = tuple(int(values.argmax()) for values in logits)
    return Answer(ids=ids, log_probs=log_softmax(logits))


def moved(seed: int, noise: float) -> NDArray[np.float32]:
    """What another model says to `answer(seed)`."""
    log_probs = answer(seed).log_probs
    rng = np.random.default_rng(seed + 99)
    return log_softmax(log_probs + noise * rng.normal(size=log_probs.shape).astype(np.float32))


def test_equal_models_agree_exactly() -> None:
    answers = [answer(seed) for seed in range(5)]
    found = [each.log_probs for each in answers]
    agreement = compare_answers(answers, found, tolerance_for("float32"))
    assert agreement.is_within
    assert agreement.num_same_answers == 5
    assert agreement.num_same_tokens == agreement.num_tokens == 20
    assert agreement.divergence == agreement.prompt_divergence == 0.0
    assert agreement.worst == ""


@pytest.mark.parametrize(("noise", "precision"), [(1e-3, "float32"), (0.03, "16 bit")])
def test_rounding_stays_within_its_tolerance(noise: float, precision: Precision) -> None:
    reference = [answer(seed) for seed in range(20)]
    found = [moved(seed, noise) for seed in range(20)]
    assert compare_answers(reference, found, tolerance_for(precision)).is_within


def test_larger_differences_are_outside_and_say_by_how_much() -> None:
    reference = [answer(seed) for seed in range(20)]
    agreement = compare_answers(
        reference, [moved(seed, 1.0) for seed in range(20)], tolerance_for("16 bit")
    )
    assert not agreement.is_within
    assert "nats a token" in agreement.worst


def test_another_model_is_outside_even_the_widest_tolerance() -> None:
    reference = [answer(seed) for seed in range(3)]
    found = [answer(seed + 1000).log_probs for seed in range(3)]
    assert not compare_answers(reference, found, tolerance_for("float32", "4 bit")).is_within


def test_bfloat16_may_lose_half_of_what_was_trained_and_other_types_nothing_of_it() -> None:
    # A divergence grows with the square of a change.
    assert tolerance_for("float32", "bfloat16 weights", effect=2.0).divergence == 2.0 / 4
    assert tolerance_for("bfloat16 weights", effect=0.01) == tolerance_for("bfloat16 weights")
    for precision in ("float32", "16 bit", "8 bit", "bfloat16"):
        assert tolerance_for(precision, effect=9.0) == tolerance_for(precision)


def test_a_near_tie_that_falls_otherwise_is_counted_and_ends_nothing() -> None:
    logits = np.zeros((2, V), np.float32)
    logits[:, 7] = 5.0
    logits[0, 9] = 5.0 - 1e-3
    other = logits.copy()
    other[0, 9] += 2e-3
    reference = [Answer(ids=(7, 7), log_probs=log_softmax(logits))]
    agreement = compare_answers(reference, [log_softmax(other)], tolerance_for("float32"))
    assert agreement.is_within
    assert agreement.num_same_answers == 0
    assert (agreement.num_same_tokens, agreement.num_tokens) == (1, 2)


def test_one_wrong_answer_among_many_right_ones_is_outside() -> None:
    reference = [answer(seed) for seed in range(40)]
    found = [each.log_probs for each in reference]
    found[17] = moved(17, 0.5)
    agreement = compare_answers(reference, found, tolerance_for("16 bit"))
    assert not agreement.is_within
    assert "prompt 18" in agreement.worst


def test_another_vocabulary_or_nan_is_outside() -> None:
    reference = answer(1)
    for found in (reference.log_probs[:, :-1], np.full((4, V), np.nan, np.float32)):
        agreement = compare_answers([reference], [found], tolerance_for("4 bit"))
        assert not agreement.is_within
        assert agreement.worst


def test_log_probabilities_sum_to_one_also_with_forbidden_tokens() -> None:
    logits = np.array([1000.0, 999.0, -np.inf], np.float32)
    assert np.exp(log_softmax(logits)).sum() == pytest.approx(1.0)
