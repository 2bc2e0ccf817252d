"""The verdict over several measures."""

import pytest

from eightgig.evaluation.statistics import Interval, Measure, Word
from eightgig.evaluation.verdict import decide

FEW: Word = "not enough rows to tell"


def _measure(name: str, verdict: Word) -> Measure:
    some = Interval(value=0.5, low=0.4, high=0.6)
    return Measure(
        name=name,
        first=some,
        second=some,
        difference=some,
        p_value=0.5,
        num_rows=20,
        is_higher_better=True,
        verdict=verdict,
    )


@pytest.mark.parametrize(
    ("loss", "exact", "expected"),
    [
        ("better", "better", "better"),
        ("better", "same", "better"),
        ("better", FEW, "better"),
        ("better", "worse", "worse"),
        ("same", "worse", "worse"),
        ("same", "same", "same"),
        ("same", FEW, FEW),
        (FEW, FEW, FEW),
    ],
)
def test_worse_outweighs_better_and_same_needs_all(loss: Word, exact: Word, expected: Word) -> None:
    verdict = decide([_measure("loss", loss), _measure("exact_match", exact)])
    assert verdict.word == expected
    assert f"exact match 0.500 -> 0.500: {exact}" in verdict.reason
    assert "Margins: loss 0.02, exact match 0.02." in verdict.rule
