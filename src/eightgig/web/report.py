"""`report.html` of a run: one page without a network, readable on a phone and by a screen reader.

It has no script and loads nothing; a Content Security Policy forbids both. Every curve has a
description and a table of its numbers.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eightgig.disk import failure_cause
from eightgig.errors import RunError
from eightgig.run import Run, write_atomically
from eightgig.units import GIB, format_bytes, format_seconds
from eightgig.web.charts import Chart, draw_chart, thin
from eightgig.web.curves import write_curves
from eightgig.web.evaluation_part import answers_section, evaluation_section
from eightgig.web.facts import RunFacts, read_facts
from eightgig.web.html import folded, number, pairs_table, section, table, text

_TABLE_ROWS = 40
_SAMPLE_TOKENS = 1500


def write_report(run: Run) -> Path:
    """Write `report.html` and a picture of the curves beside it; returns the report's path.

    Whatever is missing in the run folder is left out, so that a run that was stopped has a report,
    too.

    Raises:
        RunError: The folder cannot be written.
    """
    facts = read_facts(run)
    charts = make_charts(facts)
    try:
        write_atomically(run.report_path, report_page(facts, charts))
        write_curves(run.folder, charts, title=facts.name)
    except OSError as error:
        raise RunError(
            f"The report was not written to {run.report_path}: {failure_cause(error)}.",
            why="Adapter, checkpoints and numbers of the run are there; this page shows them.",
            fix=f"Free disk space, then run: eightgig eval {run.folder}",
        ) from error
    return run.report_path


def report_page(facts: RunFacts, charts: Sequence[Chart]) -> str:
    """The page."""
    style = _style()
    digest = base64.b64encode(hashlib.sha256(style.encode("utf-8")).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    sections = {
        "Curves": section("curves", "Curves", _figures(charts)),
        "Evaluation": evaluation_section(facts.evaluation),
        "Answers": answers_section(facts.evaluation),
        "Data": _data(facts.data),
        "Memory": _memory(facts.plan),
        "Incidents": _incidents(facts),
        "Settings": _settings(facts),
        "Environment": _environment(facts.environment),
    }
    links = "".join(
        f'<li><a href="#{name.lower()}">{name}</a></li>'
        for name, content in sections.items()
        if content
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{text(facts.name)}: report</title><style>{style}</style></head><body>"
        '<a class="skip" href="#main">To the content</a>'
        f'<header><h1>{text(facts.name)}</h1><p class="soft">{_subtitle(facts)}</p>'
        f'{_headline(facts)}<nav aria-label="Sections"><ul>{links}</ul></nav></header>'
        f'<main id="main">{"".join(sections.values())}</main></body></html>\n'
    )


def make_charts(facts: RunFacts) -> tuple[Chart, ...]:
    """The charts that have something to show."""
    budget, peak = facts.plan.get("budget_bytes"), facts.plan.get("peak_bytes")
    memory = facts.series("vram_peak_bytes", "reserved so far").scaled(1 / GIB)
    levels = [
        (name, value / GIB)
        for name, value in (("planned peak", peak), ("budget", budget))
        if isinstance(value, (int, float)) and value > 0
    ]
    charts = (
        Chart(
            slug="loss",
            title="Loss in nats",
            lines=(facts.series("loss", "training"), facts.held_out),
        ),
        Chart(
            slug="rate",
            title="Learning rate",
            lines=(facts.series("learning_rate", "learning rate"),),
            format_value="{:.2g}".format,
            starts_at_zero=True,
        ),
        Chart(
            slug="speed",
            title="Tokens per second",
            lines=(facts.series("tokens_per_second", "tokens per second"),),
            format_value="{:,.0f}".format,
            starts_at_zero=True,
        ),
        Chart(
            slug="norm",
            title="Norm of the gradient",
            lines=(facts.series("grad_norm", "before clipping"),),
            starts_at_zero=True,
        ),
        Chart(
            slug="vram",
            title="VRAM against the plan",
            lines=(memory,) if any(value for _, value in memory.finite) else (),
            levels=tuple(levels),
            format_value="{:.3g} GiB".format,
            starts_at_zero=True,
        ),
    )
    return tuple(chart for chart in charts if not chart.is_empty)


def _style() -> str:
    return importlib.resources.files("eightgig.web").joinpath("report.css").read_text("utf-8")


def _subtitle(facts: RunFacts) -> str:
    model = next(
        (line.partition(":")[2].strip() for line in facts.config.splitlines() if "  name:" in line),
        "",
    )
    environment = facts.environment
    parts = [
        model and f"Base model {model}",
        f"on {environment['device']}" if environment.get("device") else "",
        f"with eightgig {environment['eightgig']}" if environment.get("eightgig") else "",
    ]
    return text(" ".join(part for part in parts if part))


def _headline(facts: RunFacts) -> str:
    """The numbers that one wants to know first."""
    facts_shown = dict(_headline_values(facts))
    if not facts_shown:
        return "<p>No optimizer step has been done yet.</p>"
    items = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>"
        for name, value in facts_shown.items()
    )
    return f'<dl class="facts">{items}</dl>'


def _headline_values(facts: RunFacts) -> list[tuple[str, str]]:
    values: list[tuple[str, str]] = []
    held_out, loss = facts.held_out.finite, facts.series("loss", "").finite
    if facts.metrics:
        values.append(("Optimizer steps", number(facts.metrics[-1].get("step"))))
    if loss:
        values.append(("Training loss", f"{loss[0][1]:.3f} to {loss[-1][1]:.3f}"))
    if held_out:
        values.append(("Held-out loss", f"{held_out[0][1]:.3f} to {held_out[-1][1]:.3f}"))
    seconds = sum(value for _, value in facts.series("seconds", "").finite)
    tokens = sum(value for _, value in facts.series("tokens", "").finite)
    if seconds > 0:
        values.append(("Tokens per second", f"{tokens / seconds:,.0f}"))
        values.append(("Time of all steps", format_seconds(seconds)))
    memory = facts.series("vram_peak_bytes", "").finite
    if memory and memory[-1][1]:
        planned = facts.plan.get("peak_bytes")
        shown = format_bytes(memory[-1][1])
        if isinstance(planned, (int, float)):
            shown += f" of {format_bytes(planned)} planned"
        values.append(("VRAM", shown))
    word = (facts.evaluation.get("verdict") or {}).get("word") if facts.evaluation else None
    if word:
        values.append(("Tuned against base", str(word)))
    return values


def _figures(charts: Sequence[Chart]) -> str:
    if not charts:
        return ""
    return f'<div class="figures">{"".join(map(_figure, charts))}</div>'


def _figure(chart: Chart) -> str:
    lines = [line for line in chart.lines if line.finite]
    keys = [(chart.lines.index(line), line.name) for line in lines]
    keys += [(2, name) for name, _ in chart.levels]
    legend = "".join(
        f'<li><span class="key{number_}"></span>{text(name)}</li>' for number_, name in keys
    )
    numbers = _numbers(chart)
    return (
        f"<figure><figcaption>{text(chart.title)}</figcaption>"
        f'<ul class="legend" aria-hidden="true">{legend}</ul>{draw_chart(chart)}'
        f"{folded(f'{chart.title}: the numbers', numbers)}</figure>"
    )


def _numbers(chart: Chart) -> str:
    """The chart as a table; long ones are thinned, which the caption says."""
    parts = []
    for line in chart.lines:
        if not line.points:
            continue
        points = thin(line.finite, _TABLE_ROWS)
        points += [point for point in line.points if not math.isfinite(point[1])][:_TABLE_ROWS]
        rows = [(round(step), _shown(chart, value)) for step, value in sorted(points)]
        caption = f"{line.name}, {len(line.points):,} values"
        if len(rows) < len(line.points):
            caption += f", as {len(rows)} means; all are in metrics.jsonl and events.jsonl"
        parts.append(table(caption, ("step", line.name), rows))
    return "".join(parts)


def _shown(chart: Chart, value: float) -> str:
    return chart.format_value(value) if value == value else "NaN"


def _data(data: Mapping[str, Any]) -> str:
    parts = []
    summaries = [
        (title, summary)
        for key, title in (("train", "trained"), ("held_out", "held out"))
        if isinstance(summary := data.get(key), dict)
    ]
    if summaries:
        head = ("", *(title for title, _ in summaries))
        names = dict.fromkeys(name for _, summary in summaries for name in summary)
        rows = [
            (name.replace("_", " "), *(_plain(summary.get(name, "")) for _, summary in summaries))
            for name in names
            if name != "files"
        ]
        parts.append(table("Rows", head, rows))
    sample = data.get("sample")
    if isinstance(sample, list) and sample:
        parts.append(
            '<h3>A row as the model sees it</h3><p class="soft">Marked text is trained: its '
            f'tokens carry loss.</p><div class="sample">{_sample(sample)}</div>'
        )
    return section("data", "Data", "".join(parts))


def _sample(tokens: Sequence[Any]) -> str:
    """Tokens with trained stretches marked; a screen reader hears where they begin and end."""
    parts: list[str] = []
    is_open = False
    for token in tokens[:_SAMPLE_TOKENS]:
        if not isinstance(token, list) or len(token) != 2:
            continue
        piece, is_trained = str(token[0]), bool(token[1])
        if is_trained and not is_open:
            parts.append('<mark><span class="heard">[trained: </span>')
        if is_open and not is_trained:
            parts.append('<span class="heard">]</span></mark>')
        is_open = is_trained
        parts.append(text(piece))
    if is_open:
        parts.append('<span class="heard">]</span></mark>')
    if len(tokens) > _SAMPLE_TOKENS:
        parts.append(" …")
    return "".join(parts)


def _memory(plan: Mapping[str, Any]) -> str:
    parts = []
    kinds = [("host_breakdown", "Main memory, as planned")]
    if plan.get("device") != "cpu":  # there it is the same memory
        kinds.insert(0, ("breakdown", "Device memory at the peak, as planned"))
    for key, title in kinds:
        items = plan.get(key)
        if isinstance(items, dict) and any(items.values()):
            rows = [
                (name.replace("_", " "), format_bytes(size))
                for name, size in items.items()
                if isinstance(size, (int, float)) and size
            ]
            parts.append(table(title, ("item", "size"), rows))
    choices = [choice for choice in plan.get("choices") or () if isinstance(choice, dict)]
    if choices:
        columns = ("name", "value", "reason")
        cells = [tuple(str(choice.get(key, "")) for key in columns) for choice in choices]
        parts.append(
            folded("What was decided, and why", table("Choices", ("choice", *columns[1:]), cells))
        )
    return section("memory", "Memory", "".join(parts))


def _incidents(facts: RunFacts) -> str:
    rows = []
    for event in facts.incidents:
        values = event.get("values")
        shown = values if isinstance(values, dict) else {}
        words = "; ".join(f"{name.replace('_', ' ')}: {_plain(v)}" for name, v in shown.items())
        rows.append((event.get("step", ""), event.get("kind", ""), words))
    if not rows:
        return ""
    content = table("What else happened", ("step", "kind", "what"), rows)
    return section("incidents", "Incidents", content)


def _settings(facts: RunFacts) -> str:
    if not facts.config:
        return ""
    return section("settings", "Settings", f'<pre tabindex="0">{text(facts.config)}</pre>')


def _environment(environment: Mapping[str, Any]) -> str:
    if not environment:
        return ""
    versions = environment.get("versions")
    rows = {name: value for name, value in environment.items() if name != "versions"}
    if isinstance(versions, dict):
        rows |= versions
    return section("environment", "Environment", pairs_table("Machine and versions", rows))


def _plain(value: object) -> str:
    return number(value, 2) if isinstance(value, (int, float)) else str(value)
