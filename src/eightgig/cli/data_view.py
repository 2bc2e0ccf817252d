"""What `eightgig check` shows: counts, findings, lengths, and rows as the model will see them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from eightgig.cli import render
from eightgig.data.rules import KEPT_FINDINGS

if TYPE_CHECKING:
    from eightgig.data.checks import DataReport
    from eightgig.data.preview import PreviewRow

_BAR_COLUMNS = 30
# Marks besides the colour: for pipes, and for those who see no colours.
_TRAINED = (">>", "<<")
_TRAINED_STYLE = "green"
_SHOWN_FINDINGS = 10


def show_data(report: DataReport, *, token_ids: bool, as_json: bool) -> None:
    """The report on a data set.

    Args:
        report: From `check_data`.
        token_ids: Show the tokens of the sample one a line, with their numbers.
        as_json: One JSON object instead.
    """
    if as_json:
        preview = [_plain_row(row) for row in report.preview]
        parts = {"findings": report.findings, "summary": report.summary, "preview": preview}
        render.show_json(parts)
        return
    for line in _summary_lines(report.summary):
        render.show_line(line)
    if bars := report.summary.get("histogram"):
        render.show_table(_histogram(bars))
    if counts := report.summary.get("counts"):
        render.show_table(_counts(counts))
    _show_findings(report)
    for row in report.preview:
        _show_row(row, token_ids=token_ids)
    render.show_line(*_verdict(report))


def _show_findings(report: DataReport) -> None:
    """The first findings of each kind, one a line, then once why they matter and what to do."""
    for code, group in groupby(report.findings, key=lambda finding: finding.code):
        found = list(group)
        shown = found[:_SHOWN_FINDINGS]
        usual_fix = shown[-1].fix
        for finding in shown:
            head = (f"{finding.severity}: ", render.SEVERITY_STYLES[finding.severity])
            render.show_text(Text.assemble(head, finding.place, finding.message))
            if finding.fix != usual_fix:
                render.show_text(Text.assemble(("  fix: ", "dim"), finding.fix))
        more = max(len(found), report.summary["counts"].get(code, 0)) - len(shown)
        if more > 0:
            render.show_line(f"  and {more:,} more; `--json` lists up to {KEPT_FINDINGS}", "dim")
        render.show_text(Text.assemble(("  why: ", "dim"), shown[-1].why))
        render.show_text(Text.assemble(("  fix: ", "dim"), usual_fix))


def _verdict(report: DataReport) -> tuple[str, str]:
    if report.has_errors:
        return "The data cannot be trained on until the errors above are mended.", "bold red"
    if report.has_warnings:
        return "The data can be trained on; read the warnings above first.", "bold yellow"
    return "The data can be trained on.", "bold green"


def _plain_row(row: PreviewRow) -> dict[str, Any]:
    tokens = [token._asdict() for token in row.tokens]
    return {"file": row.file, "line": row.line, "tokens": tokens}


def _summary_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    for file in summary.get("files", ()):
        yield f"{file['path']}: {file['rows']:,} rows of the form {file['format']}"
    if "tokens" in summary:
        share = summary["trained_share"]
        yield f"{summary['rows']:,} rows, {summary['tokens']:,} tokens, {share:.1%} of them trained"
    if summary.get("rows") and (percentiles := summary.get("percentiles")):
        half, most = percentiles["p50"], percentiles["p99"]
        longest = summary["longest_tokens"]
        yield f"tokens a row: half up to {half:,}, 99 % up to {most:,}, the longest {longest:,}"
    for name in ("languages", "scripts"):
        if shares := summary.get(name):
            yield f"{name}: {', '.join(f'{key} {share:.0%}' for key, share in shares.items())}"


def _histogram(bars: list[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("tokens", justify="right")
    table.add_column("rows", justify="right")
    table.add_column("")
    most = max(bar["rows"] for bar in bars) or 1
    for bar in bars:
        end = "or more" if bar["below"] is None else f"to {bar['below'] - 1:,}"
        length = -(-_BAR_COLUMNS * bar["rows"] // most)
        table.add_row(f"{bar['from']:,} {end}", f"{bar['rows']:,}", Text("#" * length, "blue"))
    return table


def _counts(counts: Mapping[str, int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("finding")
    table.add_column("times", justify="right")
    for code, number in counts.items():
        table.add_row(code, f"{number:,}")
    return table


def _show_row(row: PreviewRow, *, token_ids: bool) -> None:
    place = "" if row.file is None else f" ({row.file}:{row.line})"
    begin, end = _TRAINED
    render.show_line(f"A row as the model sees it{place}; trained tokens: {begin} {end}", "bold")
    if token_ids:
        for token in row.tokens:
            mark, style = (begin, _TRAINED_STYLE) if token.is_trained else ("  ", "dim")
            render.show_line(f"{mark} {token.token_id:>7} {token.text!r}", style)
        return
    text = Text()
    for is_trained, tokens in groupby(row.tokens, key=lambda token: token.is_trained):
        words = "".join(token.text for token in tokens)
        text.append(
            f"{begin}{words}{end}" if is_trained else words,
            _TRAINED_STYLE if is_trained else "dim",
        )
    render.show_text(text)
