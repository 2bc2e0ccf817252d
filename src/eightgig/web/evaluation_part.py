"""The part of a report that shows `evaluation.json`: verdict, measures, labels, answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from eightgig.evaluation.statistics import measure_label
from eightgig.web.html import folded, number, pairs_table, section, table, text

_SHOWN_PAIRS = 20
_GOOD, _BAD = ("better",), ("worse",)


def evaluation_section(evaluation: Mapping[str, Any]) -> str:
    """The section, empty where there was no evaluation."""
    if not evaluation:
        return ""
    parts = [_verdict(_mapping(evaluation.get("verdict")))]
    measures = list(_measures(evaluation))
    if measures:
        parts.append(_comparison("Base against tuned on the same rows", "base", "tuned", measures))
    parts.append(_null(_mapping(evaluation.get("null"))))
    parts.append(_labels(_mapping(evaluation.get("labels"))))
    notes = [str(note) for note in _list(evaluation.get("notes"))]
    notes += [
        f"{finding.get('message', '')} {finding.get('fix', '')}"
        for finding in _mappings(evaluation.get("findings"))
    ]
    if notes:
        items = "".join(f"<li>{text(note)}</li>" for note in notes)
        parts.append(f"<h3>Notes</h3><ul>{items}</ul>")
    settings = _mapping(evaluation.get("settings"))
    if settings:
        parts.append(folded("Settings of the evaluation", pairs_table("Settings", settings)))
    return section("evaluation", "Evaluation", "".join(parts))


def answers_section(evaluation: Mapping[str, Any]) -> str:
    """Questions with the answers of both models, side by side."""
    pairs = _mappings(evaluation.get("pairs"))
    shown = "".join(_pair(pair) for pair in pairs[:_SHOWN_PAIRS])
    if len(pairs) > _SHOWN_PAIRS:
        shown += f'<p class="soft">{len(pairs) - _SHOWN_PAIRS} more are in evaluation.json.</p>'
    return section("answers", "Answers", shown)


def _verdict(verdict: Mapping[str, Any]) -> str:
    if not verdict:
        return ""
    word = str(verdict.get("word", ""))
    reason, rule = text(verdict.get("reason", "")), text(verdict.get("rule", ""))
    return (
        f'<p>The tuned model: <strong class="{_style(word)}">{text(word)}</strong> ({reason}).</p>'
        f'<p class="soft">{rule}</p>'
    )


def _measures(evaluation: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Every measure, with what it is of."""
    for name in ("loss", "perplexity"):
        yield from _named(evaluation.get(name), f"held-out {name}")
    for measure in _mappings(evaluation.get("answers")):
        yield from _named(measure, measure_label(str(measure.get("name", ""))))
    yield from _named(_mapping(evaluation.get("labels")).get("accuracy"), "label accuracy")
    yield from _named(_mapping(evaluation.get("forgetting")).get("loss"), "loss on general text")


def _null(null: Mapping[str, Any]) -> str:
    """The null adapter: what the form of answers is worth, and what their content is."""
    tables = []
    for first, second, loss, exact in (
        ("base", "null", "loss", "exact_match"),
        ("null", "tuned", "tuned_loss", "tuned_exact_match"),
    ):
        measures = [
            *_named(null.get(loss), "held-out loss"),
            *_named(null.get(exact), "exact match"),
        ]
        if measures:
            caption = f"{first} against {second}"
            tables.append(_comparison(caption, first, second, measures))
    if not tables:
        return ""
    words = (
        "The null adapter was trained on shuffled answers: what it gains is their form; what the "
        "tuned model gains over it is their content."
    )
    return f'<h3>Null adapter</h3><p class="soft">{words}</p>{"".join(tables)}'


def _comparison(
    caption: str, first: str, second: str, measures: Sequence[Mapping[str, Any]]
) -> str:
    head = ("measure", f"{second} is", first, second, "difference", "95 % interval", "p", "rows")
    return table(caption, head, [_measure_row(measure) for measure in measures], numbers=6)


def _named(measure: object, name: str) -> Iterator[Mapping[str, Any]]:
    if isinstance(measure, dict) and "first" in measure:
        yield {**measure, "name": name}


def _measure_row(measure: Mapping[str, Any]) -> tuple[str, ...]:
    first, second = _mapping(measure.get("first")), _mapping(measure.get("second"))
    difference = _mapping(measure.get("difference"))
    interval = f"{_value(difference, 'low')} to {_value(difference, 'high')}"
    return (
        str(measure["name"]),
        str(measure.get("verdict", "")),
        _value(first),
        _value(second),
        _value(difference),
        interval,
        number(measure.get("p_value"), 2),
        number(measure.get("num_rows")),
    )


def _value(interval: Mapping[str, Any], key: str = "value") -> str:
    value = interval.get(key)
    # What is left of sums in floating point is 0.
    return number(round(value, 6) if isinstance(value, float) else value, 3)


def _labels(labels: Mapping[str, Any]) -> str:
    names = [str(name) for name in _list(labels.get("labels"))]
    if not names:
        return ""
    parts = []
    for which in ("base", "tuned"):
        scores = _mapping(labels.get(which))
        matrix = _list(scores.get("confusion"))
        caption = (
            f"{which}: accuracy {number(scores.get('accuracy'))}, macro F1 "
            f"{number(scores.get('macro_f1'))}; rows are references, columns answers"
        )
        rows = [(name, *_list(line)) for name, line in zip(names, matrix, strict=False)]
        width = max((len(row) for row in rows), default=1) - 1
        columns = [*names, *(["other"] * (width - len(names)))][:width]
        parts.append(table(caption, ("", *columns), rows, numbers=width))
    return folded("Confusion matrices", "".join(parts))


def _pair(pair: Mapping[str, Any]) -> str:
    answers = "".join(
        f"<div><h4>{title}{' (cut)' if pair.get(cut) else ''}</h4><p>{text(pair.get(key, ''))}</p>"
        "</div>"
        for title, key, cut in (
            ("Reference", "reference", ""),
            ("Base", "base", "is_base_cut"),
            ("Tuned", "tuned", "is_tuned_cut"),
        )
    )
    return (
        f'<article class="pair"><h4>Question</h4><p>{text(pair.get("question", ""))}</p>'
        f'<div class="answers">{answers}</div></article>'
    )


def _style(word: str) -> str:
    if word in _GOOD:
        return "good"
    return "bad" if word in _BAD else ""


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _mappings(value: object) -> list[Mapping[str, Any]]:
    return [item for item in _list(value) if isinstance(item, dict)]
