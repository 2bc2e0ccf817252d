"""What `eightgig bench` shows and writes: one line for each case."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from eightgig.cli import render
from eightgig.errors import ConfigError
from eightgig.run import append_json_line, from_json, write_atomically
from eightgig.training.bench_cases import BenchOutcome, BenchResult
from eightgig.units import MIB, format_bytes

_UNKNOWN = "-"
_COLUMNS = ("tokens/s", "reserved MiB", "plan MiB", "waiting", "model FLOPs", "first step s")
_LEGEND = (
    "reserved: peak of the allocator (CPU: of the process); plan: its forecast; waiting: share "
    "of a step spent waiting for copies; model FLOPs: share of the measured matrix product rate; "
    "first step: from the start of the process, weights prepared before."
)


def show_bench(outcomes: Sequence[BenchOutcome], output: Path, *, as_json: bool) -> None:
    """The table of all cases, and why some have no result.

    Raises:
        EightgigError: No case has a result; the first one's reason.
    """
    results = [outcome.result for outcome in outcomes if outcome.result is not None]
    failed = [(outcome.case.name, outcome.error) for outcome in outcomes if outcome.error]
    if failed and not results:
        raise failed[0][1]
    if as_json:
        faults = [
            {"case": name, "message": error.message, "why": error.why, "fix": error.fix}
            for name, error in failed
        ]
        render.show_json({"results": results, "failed": faults, "output": str(output)})
        return
    render.show_line(f"{results[0].model} on {results[0].machine}", "bold")
    render.show_table(_table(results))
    for name, error in failed:
        render.show_line(f"{name}: {error.message} {error.fix}", "yellow")
    render.show_wrapped(_LEGEND, "dim")
    render.show_line(f"Written: {output}, {markdown_path(output)}", "green")


def write_result(result: BenchResult, output: Path) -> None:
    """Append `result` to the JSON lines of `output`, and write all of them as Markdown beside it.

    Raises:
        ConfigError: `output` holds something else.
    """
    rows = [*read_results(output), result]
    output.parent.mkdir(parents=True, exist_ok=True)
    append_json_line(output, result)
    write_atomically(markdown_path(output), to_markdown(rows))


def read_results(output: Path) -> list[BenchResult]:
    """The results that a file holds; none where there is no file.

    Raises:
        ConfigError: It holds something else, cannot be appended to, or is to be the table itself.
    """
    place = next(path for path in (output, *output.absolute().parents) if path.exists())
    is_wrong_kind = place.is_dir() if place == output else not place.is_dir()
    if is_wrong_kind or not os.access(place, os.W_OK):
        raise ConfigError(
            f"{output} cannot be written.",
            why=f"{place} is not a place that you may write to.",
            fix="Name another file with --output.",
        )
    if output == markdown_path(output):
        raise ConfigError(
            f"{output} cannot hold timings.",
            why="They are JSON lines; the table for people is written beside them, as .md.",
            fix=f"Write --output {output.with_suffix('.jsonl')}.",
        )
    if not output.exists():
        return []
    try:
        lines = output.read_text(encoding="utf-8").splitlines()
        return [from_json(BenchResult, json.loads(line)) for line in lines if line.strip()]
    except ValueError as error:
        raise ConfigError(
            f"{output} is not a file of timings.",
            why=f"New ones are put behind those it holds, and it cannot be read: {error}.",
            fix="Name another file with --output.",
        ) from None


def markdown_path(output: Path) -> Path:
    """Where the table of `output` is written for people."""
    return output.with_suffix(".md")


def to_markdown(results: Sequence[BenchResult]) -> str:
    """All results as a table, with what each ran on."""
    head = ("case", "machine", "budget", *_COLUMNS, "layout", "versions", "date")
    lines = ["# Timings\n\n", f"{_LEGEND}\n\n", _line(head), _line(["---"] * len(head))]
    for result in results:
        layout = ", ".join(f"{name} {value}" for name, value in result.choices.items())
        versions = ", ".join(f"{name} {value}" for name, value in result.versions.items())
        budget = format_bytes(result.budget_bytes)
        cells = [result.case, result.machine, budget, *_cells(result), layout, versions]
        lines.append(_line([*cells, result.date]))
    return "".join(lines)


def _table(results: Sequence[BenchResult]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("case")
    for column in _COLUMNS:
        table.add_column(column.replace(" ", "\n"), justify="right")
    for result in results:
        name = result.case.replace(", ", "\n")
        table.add_row(*(Text(cell) for cell in (name, *_cells(result))))
    return table


def _cells(result: BenchResult) -> list[str]:
    """What stands under `_COLUMNS`."""
    first = result.seconds_to_first_step
    return [
        f"{result.tokens_per_second:,.0f}",
        _mib(result.reserved_peak_bytes),
        _mib(result.predicted_peak_bytes),
        _percent(result.copy_wait_ratio),
        _percent(result.model_flops_utilisation),
        _UNKNOWN if first is None else f"{first:.0f}",
    ]


def _mib(size_bytes: int | None) -> str:
    return _UNKNOWN if size_bytes is None else f"{size_bytes / MIB:,.0f}"


def _percent(ratio: float | None) -> str:
    return _UNKNOWN if ratio is None else f"{ratio:.1%}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |\n"
