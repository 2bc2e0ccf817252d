"""How sure a difference is: bootstrap intervals and the sign test, of rows answered twice.

Every measure is a sum over rows divided by a sum of weights: loss by its tokens, matches by their
number. Rows that were made from one source row are summed first, since they are not independent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Word = Literal["better", "same", "worse", "not enough rows to tell"]

CONFIDENCE = 0.95
FEWEST_ROWS = 10
"""Fewer rows never decide anything."""

_LABELS = {
    "rouge_l": "ROUGE-L",
    "json_valid": "JSON valid",
    "general_loss": "loss on general text",
}
_RESAMPLES = 2000
# Numbers in memory at a time, about 80 MB.
_BLOCK_ELEMENTS = 10_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A value, and where it lies with 95 % confidence.

    Attributes:
        value: Of the rows as they are.
        low, high: The middle 95 % over rows drawn again with replacement.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """One number of two models on the same rows.

    Attributes:
        name: `loss`, `exact_match`, ...
        first, second: Of each model.
        difference: Second minus first, over the same draws of rows.
        p_value: Two-sided sign test over rows.
        num_rows: Source rows.
        is_higher_better: Whether a positive difference is an improvement.
        verdict: What that means for the second model.
    """

    name: str
    first: Interval
    second: Interval
    difference: Interval
    p_value: float
    num_rows: int
    is_higher_better: bool
    verdict: Word


@dataclass(frozen=True, kw_only=True, slots=True)
class Paired:
    """What two models did on the same rows.

    Attributes:
        first, second: Sums of each row, (rows,).
        weights: What they are divided by, (rows,).
        sources: Row that each was made from, (rows,).
    """

    first: Floats
    second: Floats
    weights: Floats
    sources: NDArray[np.int64]

    def by_source(self) -> Paired:
        """The same with one entry for each source row."""
        sources, places = np.unique(self.sources, return_inverse=True)
        parts = np.zeros((3, len(sources)))
        for sums, values in zip(parts, (self.first, self.second, self.weights), strict=True):
            np.add.at(sums, places, values)
        return Paired(first=parts[0], second=parts[1], weights=parts[2], sources=sources)


def compare(
    name: str,
    paired: Paired,
    *,
    is_higher_better: bool,
    margin: float,
    seed: int,
    transform: Callable[[Floats], Floats] | None = None,
) -> Measure:
    """The measure of two models, and whether the second is better.

    Args:
        name: Of the measure.
        paired: Its parts.
        is_higher_better: Whether more of it is better.
        margin: Differences below it count as none.
        seed: Of the resampling.
        transform: Applied to the quotients; perplexity is exp of the loss. It must be monotonic.
    """
    paired = paired.by_source()
    rows = len(paired.weights)
    draws = _resample(paired, seed)
    first, second = _quotients(draws)
    one = np.array([[paired.first.sum(), paired.second.sum(), paired.weights.sum()]])
    value_first, value_second = _quotients(one)
    if transform is not None:
        first, second = transform(first), transform(second)
        value_first, value_second = transform(value_first), transform(value_second)
    difference = _interval(float(value_second[0] - value_first[0]), second - first)
    weights = np.maximum(paired.weights, 1)
    p_value = sign_test((paired.second - paired.first) / weights)
    return Measure(
        name=name,
        first=_interval(float(value_first[0]), first),
        second=_interval(float(value_second[0]), second),
        difference=difference,
        p_value=p_value,
        num_rows=rows,
        is_higher_better=is_higher_better,
        verdict=_judge(difference, p_value, rows, margin, is_higher_better=is_higher_better),
    )


def sign_test(differences: Floats) -> float:
    """Two-sided p-value of the hypothesis that rises and falls are equally likely.

    Rows without a difference say nothing. For right and wrong answers this is McNemar's exact
    test.
    """
    rises, falls = int((differences > 0).sum()), int((differences < 0).sum())
    count, term, tail = rises + falls, 1, 0
    for number in range(min(rises, falls) + 1):  # the binomial coefficients, one from the other
        tail += term
        term = term * (count - number) // (number + 1)
    return min(1.0, 2 * tail / (1 << count))


def measure_label(name: str) -> str:
    """The name of a measure, for people."""
    return _LABELS.get(name, name.replace("_", " "))


def describe_rule() -> str:
    """How a measure is judged, in words."""
    return (
        f"Fewer than {FEWEST_ROWS} rows decide nothing. Same: the {CONFIDENCE:.0%} bootstrap "
        "interval of the difference lies within the measure's margin. Better or worse: it lies "
        f"wholly on one side of zero, and the sign test over rows gives p < {1 - CONFIDENCE:.2f}. "
        "Otherwise there are not enough rows to tell."
    )


def _judge(
    difference: Interval, p_value: float, rows: int, margin: float, *, is_higher_better: bool
) -> Word:
    if rows < FEWEST_ROWS:
        return "not enough rows to tell"
    if max(abs(difference.low), abs(difference.high)) <= margin:
        return "same"
    is_sure = p_value < 1 - CONFIDENCE and (difference.low > 0 or difference.high < 0)
    if not is_sure:
        return "not enough rows to tell"
    return "better" if (difference.value > 0) == is_higher_better else "worse"


def _resample(paired: Paired, seed: int) -> Floats:
    """Sums over rows drawn with replacement, (resamples, 3): first, second, weights."""
    rows = len(paired.weights)
    parts = np.stack([paired.first, paired.second, paired.weights], axis=1)  # (rows, 3)
    rng = np.random.Generator(np.random.Philox(seed))
    block = max(1, min(_RESAMPLES, _BLOCK_ELEMENTS // rows))
    sums = [
        rng.multinomial(rows, np.full(rows, 1 / rows), size=min(block, _RESAMPLES - start)) @ parts
        for start in range(0, _RESAMPLES, block)
    ]
    return np.concatenate(sums)


def _quotients(sums: Floats) -> tuple[Floats, Floats]:
    weights = np.maximum(sums[:, 2], np.finfo(np.float64).tiny)
    return sums[:, 0] / weights, sums[:, 1] / weights


def _interval(value: float, draws: Floats) -> Interval:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(value=value, low=float(low), high=float(high))
