"""The verdict: better, same, worse, or not enough rows to tell, with the rule that gave it."""

from __future__ import annotations

from collections.abc import Sequence

from eightgig.evaluation.records import Verdict
from eightgig.evaluation.statistics import Measure, Word, describe_rule, measure_label

MARGINS = {
    "loss": 0.02,
    "exact_match": 0.02,
    "label_accuracy": 0.02,
}
"""Differences that count as none: nats a token, or share of the rows."""


def decide(measures: Sequence[Measure]) -> Verdict:
    """The verdict over the measures that decide.

    Args:
        measures: The loss, and where answers were generated the one that says most about them.
    """
    words = [measure.verdict for measure in measures]
    word: Word = "not enough rows to tell"
    if "worse" in words:
        word = "worse"
    elif "better" in words:
        word = "better"
    elif words and set(words) == {"same"}:
        word = "same"
    reason = "; ".join(
        f"{measure_label(measure.name)} {measure.first.value:.3f} -> "
        f"{measure.second.value:.3f}: {measure.verdict}"
        for measure in measures
    )
    margins = ", ".join(
        f"{measure_label(measure.name)} {MARGINS[measure.name]:g}" for measure in measures
    )
    rule = (
        f"{describe_rule()} Margins: {margins}. Worse if any of these measures is worse; else "
        "better if any is better; same only if all are."
    )
    return Verdict(word=word, reason=reason, rule=rule)
