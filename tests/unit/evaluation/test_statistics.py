"""Bootstrap intervals and the sign test, against values known otherwise."""

import math

import numpy as np
import pytest

from eightgig.evaluation.statistics import FEWEST_ROWS, Paired, compare, describe_rule, sign_test


def _paired(first: list[float], second: list[float], weights: list[float] | None = None) -> Paired:
    rows = len(first)
    return Paired(
        first=np.array(first, float),
        second=np.array(second, float),
        weights=np.array(weights or [1.0] * rows),
        sources=np.arange(rows),
    )


def _compare(paired: Paired, *, is_higher_better: bool = True, seed: int = 0, **options):
    options = {"margin": 0.02, **options}
    return compare("m", paired, is_higher_better=is_higher_better, seed=seed, **options)


@pytest.mark.parametrize(
    ("rises", "falls", "ties", "expected"),
    [
        (0, 0, 4, 1.0),
        (1, 0, 0, 1.0),
        (5, 0, 3, 0.0625),
        (6, 0, 0, 0.03125),
        (0, 6, 0, 0.03125),
        (8, 2, 1, 0.109375),
        (15, 5, 0, 0.04138946533203125),
        (7, 7, 0, 1.0),
    ],
)
def test_the_sign_test_gives_the_binomial_tail(
    rises: int, falls: int, ties: int, expected: float
) -> None:
    differences = np.array([1.0] * rises + [-2.0] * falls + [0.0] * ties)
    assert sign_test(differences) == pytest.approx(expected, abs=1e-15)


def test_the_sign_test_of_many_rows_is_near_the_normal_tail() -> None:
    differences = np.array([1.0] * 2600 + [-1.0] * 2400)
    z = (2600 - 2500 - 0.5) / math.sqrt(5000 / 4)
    assert sign_test(differences) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-2)


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    measure = _compare(_paired([0.0] * 400, values.tolist()))
    error = values.std() / math.sqrt(400)
    assert measure.second.value == pytest.approx(values.mean())
    assert measure.second.low == pytest.approx(values.mean() - 1.96 * error, abs=0.25 * error)
    assert measure.second.high == pytest.approx(values.mean() + 1.96 * error, abs=0.25 * error)


def test_a_quotient_weighs_rows_by_their_tokens() -> None:
    measure = _compare(_paired([10.0, 2.0], [20.0, 1.0], [10.0, 1.0]))
    assert measure.first.value == pytest.approx(12 / 11)
    assert measure.second.value == pytest.approx(21 / 11)


def test_paired_rows_make_the_difference_sharper_than_either_value() -> None:
    noise = np.random.default_rng(2).normal(0, 5, 100)
    measure = _compare(_paired(noise.tolist(), (noise - 0.5).tolist()), is_higher_better=False)
    width = measure.difference.high - measure.difference.low
    assert width < 0.01 * (measure.first.high - measure.first.low)
    assert measure.verdict == "better"


def test_perplexity_is_the_exponential_of_the_loss_with_its_ends() -> None:
    paired = _paired([2.0, 3.0, 4.0] * 5, [1.0, 2.5, 3.0] * 5)
    loss = _compare(paired, is_higher_better=False)
    perplexity = _compare(paired, is_higher_better=False, transform=np.exp)
    for name in ("value", "low", "high"):
        expected = math.exp(getattr(loss.first, name))
        assert getattr(perplexity.first, name) == pytest.approx(expected, rel=1e-3)


def test_rows_of_one_source_count_once() -> None:
    paired = Paired(
        first=np.array([1.0, 2.0, 5.0]),
        second=np.array([0.0, 0.0, 6.0]),
        weights=np.array([1.0, 1.0, 2.0]),
        sources=np.array([7, 7, 3]),
    )
    merged = paired.by_source()
    assert merged.sources.tolist() == [3, 7]
    assert merged.first.tolist() == [5.0, 3.0]
    assert merged.weights.tolist() == [2.0, 2.0]
    assert _compare(paired).num_rows == 2


@pytest.mark.parametrize(
    ("second", "verdict"),
    [
        ([1.0] * 30, "better"),
        ([0.0] * 30, "same"),
        ([0.0] * 28 + [1.0] * 2, "not enough rows to tell"),
    ],
    ids=["all rise", "none changes", "two of thirty rise"],
)
def test_the_verdict_follows_its_rule(second: list[float], verdict: str) -> None:
    assert _compare(_paired([0.0] * 30, second)).verdict == verdict


def test_less_is_better_where_the_measure_says_so() -> None:
    paired = _paired([2.0] * 30, [1.0] * 30)
    assert _compare(paired, is_higher_better=False).verdict == "better"
    assert _compare(paired, is_higher_better=True).verdict == "worse"


@pytest.mark.parametrize("rows", [1, 2, FEWEST_ROWS - 1])
def test_few_rows_decide_nothing(rows: int) -> None:
    measure = _compare(_paired([0.0] * rows, [1.0] * rows))
    assert measure.verdict == "not enough rows to tell"


def test_a_difference_within_the_margin_is_none() -> None:
    paired = _paired([1.0] * 50, [1.01] * 50)
    assert _compare(paired, margin=0.02).verdict == "same"
    assert _compare(paired, margin=0.001).verdict == "better"


def test_draws_repeat_with_the_seed() -> None:
    paired = _paired(list(range(20)), list(range(1, 21)), list(range(1, 21)))
    assert _compare(paired, seed=4) == _compare(paired, seed=4)
    assert _compare(paired, seed=4) != _compare(paired, seed=5)


def test_the_rule_names_its_numbers() -> None:
    rule = describe_rule()
    assert str(FEWEST_ROWS) in rule
    assert "95%" in rule
    assert "p < 0.05" in rule
