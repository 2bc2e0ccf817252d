"""What `eightgig plan` shows: a verdict, memory by item, every choice with its reason, advice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from eightgig.cli import render
from eightgig.config import Choice
from eightgig.units import MIB, format_bytes, format_seconds

if TYPE_CHECKING:
    from eightgig.cli.inputs import Asked
    from eightgig.memory.plan import Plan
    from eightgig.memory.sweep import SweepPoint

_BAR_COLUMNS = 30
_MILLION = 1_000_000
_SHOWN_RATIO = 0.005


def show_plan(plan: Plan, asked: Asked, *, picture: Path | None, as_json: bool) -> None:
    """Whether it fits, memory by item, every choice with its reason, and what would help.

    Raises:
        ConfigError: `picture` has an ending that cannot be drawn, or what draws it is missing.
    """
    title = f"{asked.spec.name} on {asked.hardware.name}"
    if picture is not None:
        from eightgig.memory.picture import write_picture

        write_picture(plan, picture, title=title)
    if as_json:
        render.show_json(plan)
        return
    render.show_wrapped(title, "bold")
    for note in asked.notes:
        render.show_wrapped(note, "dim")
    render.show_wrapped(_verdict(plan, is_trainable=not asked.spec.decoder.has_experts))
    for line in (*_forecast(plan), *(f"- {advice}" for advice in plan.advice)):
        render.show_wrapped(line)
    device = "VRAM" if plan.device == "cuda" else "Memory"
    render.show_table(_bytes_table(f"{device} at the peak, MiB", plan.breakdown, plan.peak_bytes))
    budget = _bytes_table(f"{device} budget, MiB", plan.budget_breakdown, plan.budget_bytes)
    render.show_table(budget)
    if plan.device == "cuda":
        host = _bytes_table("Main memory, MiB", plan.host_breakdown, plan.host_bytes)
        render.show_table(host)
    if plan.mapped_bytes:
        render.show_wrapped(
            f"Not counted: {format_bytes(plan.mapped_bytes)} of files that are read through the "
            "page cache, as far as memory is left for it.",
            "dim",
        )
    render.show_table(_choices_table(plan.choices))
    if picture is not None:
        render.show_line(f"Drawn: {picture}", "green")


def show_sweep(key: str, points: Sequence[SweepPoint], *, as_json: bool) -> None:
    """One line for each value of a setting."""
    if as_json:
        render.show_json({"setting": key, "points": points})
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in (key, "fits", "peak", "budget", "main memory", "tokens/s"):
        table.add_column(column, justify="right")
    for point in points:
        plan = point.plan
        speed = "" if plan.tokens_per_second is None else f"{plan.tokens_per_second:,.0f}"
        sizes = (plan.peak_bytes, plan.budget_bytes, plan.host_bytes)
        cells = [point.value, "yes" if plan.fits else "no", *map(format_bytes, sizes)]
        table.add_row(*(Text(cell) for cell in (*cells, speed if plan.fits else "")))
    render.show_table(table)


def _verdict(plan: Plan, *, is_trainable: bool) -> Text:
    word, style = ("It fits", "bold green") if plan.fits else ("It does not fit", "bold red")
    if plan.fits and not is_trainable:
        word, style = "It would fit, but cannot be trained yet", "bold yellow"
    peak, budget = format_bytes(plan.peak_bytes), format_bytes(plan.budget_bytes)
    host, allowed = format_bytes(plan.host_bytes), format_bytes(plan.host_budget_bytes)
    disk = format_bytes(plan.disk_bytes)
    needs = f"{peak} of {budget} VRAM, {host} of {allowed} main memory"
    if plan.device == "cpu":
        needs = f"{host} of {allowed} main memory"
    return Text.assemble((word, style), f": {needs}, {disk} of disk.")


def _forecast(plan: Plan) -> Iterator[str]:
    if not plan.fits:
        return
    if plan.tokens_per_second is None:
        yield "Speed: not known before `train` has measured this machine."
        return
    low, high = plan.tokens_per_second_range or (plan.tokens_per_second,) * 2
    waiting = ""
    if plan.waiting_ratio and plan.waiting_ratio >= _SHOWN_RATIO:
        waiting = f", {plan.waiting_ratio:.0%} of the time waiting for copies"
    yield f"Speed: {plan.tokens_per_second:,.0f} tokens/s ({low:,.0f} to {high:,.0f}){waiting}."
    if plan.run_seconds is not None:
        short, long = plan.run_seconds_range or (plan.run_seconds,) * 2
        span = f"{format_seconds(short)} to {format_seconds(long)}"
        steps = f"{plan.num_steps:,} optimizer step{'' if plan.num_steps == 1 else 's'}"
        yield f"Run: {steps} in {format_seconds(plan.run_seconds)} ({span})."
    else:
        each = (plan.tokens_per_second, high, low)
        took, least, most = (format_seconds(_MILLION / speed) for speed in each)
        yield f"Each million tokens takes {took} ({least} to {most})."


def _bytes_table(title: str, items: Mapping[str, int], total_bytes: int) -> Table:
    """Items that take something, with a bar each."""
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None)
    table.show_header = False
    table.add_column(width=26)
    table.add_column(justify="right", width=9)
    table.add_column()
    shown = {name: size for name, size in items.items() if size}
    largest = max((abs(size) for size in shown.values()), default=1)
    for name, size in shown.items():
        bar = "#" * round(_BAR_COLUMNS * abs(size) / largest)
        table.add_row(name.replace("_", " "), f"{size / MIB:,.1f}", Text(bar, style="blue"))
    table.add_row(Text("total", "bold"), Text(f"{total_bytes / MIB:,.1f}", "bold"), "")
    return table


def _choices_table(choices: Iterable[Choice]) -> Table:
    table = Table(title="\nChoices", title_justify="left", title_style="bold", box=None)
    table.show_header = False
    table.add_column(no_wrap=True)
    table.add_column()
    for choice in choices:
        text = Text.assemble((choice.value, "bold"), f": {choice.reason}")
        if choice.rejected:
            text.append(f"\nnot {choice.rejected}", style="dim")
        table.add_row(choice.name, text)
    return table
