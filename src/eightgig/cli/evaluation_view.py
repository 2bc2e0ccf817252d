"""What `eightgig eval` and `eightgig demo` show: base against tuned, and answers side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from eightgig.cli import render
from eightgig.cli.demo import SYSTEM_TURN
from eightgig.evaluation.statistics import measure_label
from eightgig.units import format_seconds

if TYPE_CHECKING:
    from pathlib import Path

    from eightgig.cli.demo import DemoResult
    from eightgig.evaluation.records import (
        AnswerPair,
        Evaluation,
        LabelComparison,
        NullComparison,
    )
    from eightgig.evaluation.statistics import Measure

_SHOWN_PAIRS = 5
_WORD_STYLES = {"better": "green", "worse": "red", "same": ""}


def show_evaluation(evaluation: Evaluation, report_path: Path, *, as_json: bool) -> None:
    """Every measure of both models, some answers, the verdict, and where the report is."""
    if as_json:
        render.show_json(evaluation)
        return
    render.show_table(_measures(_all_measures(evaluation), ("base", "tuned")))
    if evaluation.json_schema is not None:
        render.show_line(f"JSON asked for: {evaluation.json_schema}")
    if evaluation.labels is not None:
        _show_labels(evaluation.labels)
    if evaluation.null is not None:
        _show_null(evaluation.null)
    show_pairs(evaluation.pairs, ("base", "tuned"))
    for note in evaluation.notes:
        render.show_line(f"note: {note}")
    render.show_findings(evaluation.findings)
    verdict = evaluation.verdict
    render.show_note(f"rule: {verdict.rule}")
    render.show_line(f"The tuned model: {verdict.word} ({verdict.reason})", _style(verdict.word))
    render.show_line(f"Report: {report_path}")


def show_demo(result: DemoResult, pairs: Sequence[AnswerPair], *, as_json: bool) -> None:
    """Answers before and after, the scores, a chat, and where everything is."""
    if as_json:
        render.show_json(result)
        return
    show_pairs(pairs, ("before", "after"))
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("held-out rows", "before", "after"):
        table.add_column(column, justify="left" if column == "held-out rows" else "right")
    before, after = result.before, result.after
    table.add_row("loss", f"{before.loss:.3f}", f"{after.loss:.3f}")
    table.add_row("exact match", f"{before.exact_match:.1%}", f"{after.exact_match:.1%}")
    render.show_table(table)
    render.show_line(f"The tuned model: {result.verdict}", _style(result.verdict))
    render.show_line("Asked in a chat, as eightgig chat does it:")
    render.show_text(Text.assemble(("  question  ", "bold"), result.question))
    render.show_text(Text.assemble(("  answer    ", "bold"), result.answer))
    spent, training = format_seconds(result.seconds), format_seconds(result.training_seconds)
    render.show_line(f"Done in {spent}, {training} of it training.")
    for name, place in (
        ("Run folder", result.run),
        ("Report", result.report),
        ("Merged model", result.export),
    ):
        render.show_line(f"{name + ':':<14}{place}")
    render.show_line(f'Ask it yourself: eightgig chat {result.run} --system "{SYSTEM_TURN}"')


def show_pairs(pairs: Sequence[AnswerPair], models: tuple[str, str]) -> None:
    """Some questions, the wanted answers and those of both models; first where these differ."""
    first, second = (f"  {name:<8}" for name in models)
    for pair in sorted(pairs, key=lambda pair: pair.base == pair.tuned)[:_SHOWN_PAIRS]:
        render.show_text(Text.assemble(("question  ", "bold"), pair.question))
        render.show_text(Text.assemble(("  wanted  ", "dim"), pair.reference))
        render.show_text(Text.assemble((first, "dim"), pair.base))
        is_right = pair.tuned == pair.reference
        render.show_text(Text.assemble((second, "green" if is_right else "dim"), pair.tuned))


def _style(word: str) -> str:
    return f"bold {_WORD_STYLES.get(word, 'yellow')}"


def _all_measures(evaluation: Evaluation) -> Iterator[Measure]:
    yield evaluation.loss
    yield evaluation.perplexity
    yield from evaluation.answers
    if evaluation.labels is not None:
        yield evaluation.labels.accuracy
    if evaluation.forgetting is not None:
        yield evaluation.forgetting.loss


def _show_labels(labels: LabelComparison) -> None:
    """F1, and the confusion matrix of the tuned model."""
    base, tuned = labels.base, labels.tuned
    render.show_line(f"F1, mean over labels: {base.macro_f1:.3f} -> {tuned.macro_f1:.3f}")
    table = Table(title="Tuned: answers", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("wanted")
    for label in labels.labels:
        table.add_column(Text(label), justify="right")
    for label, counts in zip(labels.labels, tuned.confusion, strict=True):
        cells = [
            Text(str(count), "bold" if other == label else "")
            for other, count in zip(labels.labels, counts, strict=True)
        ]
        table.add_row(Text(label), *cells)
    render.show_table(table)


def _show_null(null: NullComparison) -> None:
    """What the form of answers is worth, and what their content is."""
    for columns, measures in (
        (("base", "null"), (null.loss, null.exact_match)),
        (("null", "tuned"), (null.tuned_loss, null.tuned_exact_match)),
    ):
        taken = (measure for measure in measures if measure is not None)
        render.show_table(_measures(taken, columns))
    render.show_line(
        "The null adapter was trained on shuffled answers: what it gains is their form; what the "
        "tuned model gains over it is their content."
    )


def _measures(measures: Iterable[Measure], models: tuple[str, str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("measure")
    for column in (*models, "difference", "95 % interval", "p"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for measure in measures:
        change = measure.difference
        table.add_row(
            measure_label(measure.name),
            f"{measure.first.value:.3f}",
            f"{measure.second.value:.3f}",
            f"{change.value:+.3f}",
            f"{change.low:+.3f} to {change.high:+.3f}",
            f"{measure.p_value:.2g}",
            Text(measure.verdict, _WORD_STYLES.get(measure.verdict, "")),
        )
    return table
