"""The course of long work: a live line in a terminal, plain lines elsewhere, or JSON lines.

Imports no torch: the allocator is set up after this module is loaded, and before torch is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from eightgig.cli import render
from eightgig.cli.console import SafeConsole
from eightgig.config import Choice, Config
from eightgig.errors import Finding
from eightgig.memory.plan import Plan
from eightgig.run import Event
from eightgig.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from eightgig.training.step import StepReport

# What is shown of a run is in its log.txt, too: see `eightgig.run.log_to`.
_LOGGER = logging.getLogger(__name__)
# Work is shown this often where a line cannot be drawn over.
_PLAIN_SECONDS = 10.0
_STYLES = {
    "guard": "yellow",
    "oom": "yellow",
    "stop": "bold yellow",
    "eval": "green",
    "pause": "yellow",
}


@runtime_checkable
class _BytesDone(Protocol):
    """`StoreProgress` and `ExportProgress`; their modules load torch, this one does not."""

    @property
    def done_bytes(self) -> int: ...

    @property
    def total_bytes(self) -> int: ...


class WorkView:
    """Shows how far long work is; a context manager.

    Args:
        stderr: Leave standard output to results.
        console: Where to draw.
    """

    def __init__(self, *, stderr: bool, console: Console | None = None) -> None:
        self._console = console or SafeConsole(stderr=stderr)
        self._work = ""
        self._began_seconds = self._shown_seconds = 0.0
        self._live: Progress | None = None
        if self._console.is_terminal:
            columns = (BarColumn(bar_width=20), TextColumn("{task.description}", markup=False))
            self._live = Progress(*columns, console=self._console)
            self._task = self._live.add_task("", total=1.0, visible=False)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def work(self, name: str, done: str, *, share: float | None, rate: str = "") -> None:
        """Work is under way.

        Args:
            name: What is done.
            done: How much of it, in words.
            share: How much of all, 0 to 1; None where that is not known.
            rate: How fast, in words.
        """
        now = time.monotonic()
        if name != self._work:
            self._work, self._began_seconds, self._shown_seconds = name, now, now
        spent = now - self._began_seconds
        parts = [f"{name}: {done}", rate]
        if share is not None and 0 < share < 1:
            parts.append(f"{format_seconds(spent / share - spent)} left")
        line = "  ".join(filter(None, parts))
        is_done = share is not None and share >= 1
        if self._live is not None:
            self._draw(share or 0.0, line, visible=not is_done)
        elif is_done or now - self._shown_seconds >= _PLAIN_SECONDS:
            self._shown_seconds = now
            self._print(Text(line))
        if is_done:  # the same work may come again
            self._work = ""

    def rows(self, num_rows: int, share: float | None) -> None:
        """Rows are being read."""
        self.work("reading rows", f"{num_rows:,}", share=share)

    def notice(self, item: object) -> None:
        """Something other than a step: a plan, finding, event, choice, line of text or progress."""
        if isinstance(item, _BytesDone):
            self._show_bytes(item)
        else:
            text = _notice_text(item)
            _LOGGER.info("%s", text.plain)
            self._print(text)

    def _show_bytes(self, item: _BytesDone) -> None:
        name = str(getattr(item, "work", f"preparing {getattr(item, 'model', '')}"))
        spent = time.monotonic() - self._began_seconds if name == self._work else 0.0
        rate = f"{format_bytes(item.done_bytes / spent)}/s" if spent > 0 else ""
        done = f"{format_bytes(item.done_bytes)} of {format_bytes(item.total_bytes)}"
        self.work(name, done, share=item.done_bytes / max(1, item.total_bytes), rate=rate)

    def _draw(self, share: float, line: str, *, visible: bool = True) -> None:
        assert self._live is not None, "there is nothing to draw on"
        self._live.update(self._task, completed=share, description=line, visible=visible)

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True, highlight=False)


class TrainingView(WorkView):
    """Shows what a training reports; a context manager.

    Args:
        config: Settings of the run; they say how long it will be.
        as_json: Steps as JSON, one object a line, and nothing else on standard output.
        console: Where to draw.

    Attributes:
        last_report: Of the newest step, None before the first.
    """

    def __init__(self, config: Config, *, as_json: bool, console: Console | None = None) -> None:
        super().__init__(stderr=as_json, console=console)
        self._train = config.train
        self._as_json = as_json
        self._first_seconds = 0.0
        self._num_shown = 0
        self.last_report: StepReport | None = None

    def step(self, report: StepReport) -> None:
        """One optimizer step is done."""
        if self._num_shown == 0:
            self._first_seconds = time.monotonic() - report.seconds
        self._num_shown += 1
        self.last_report = report
        if self._as_json:
            render.show_json(report, is_needed=False)
        elif self._live is not None:
            self._draw(report.step / self._total_steps(report), self._describe(report))
        else:
            self._print(Text(self._describe(report)))

    def _describe(self, report: StepReport) -> str:
        total = self._total_steps(report)
        step_seconds = (time.monotonic() - self._first_seconds) / self._num_shown
        parts = [
            f"step {report.step}/{total}",
            f"epoch {report.epoch:.2f}",
            f"loss {report.loss:.4f}",
            f"lr {report.learning_rate:.1e}",
            f"{report.tokens_per_second:,.0f} tokens/s",
        ]
        if report.vram_peak_bytes:
            parts.append(f"VRAM {format_bytes(report.vram_peak_bytes)}")
        if report.step < total:
            parts.append(f"{format_seconds((total - report.step) * step_seconds)} left")
        return "  ".join(parts)

    def _total_steps(self, report: StepReport) -> int:
        if self._train.max_steps > 0:
            return self._train.max_steps
        return max(report.step, round(report.step / report.epoch * self._train.num_train_epochs))


def _notice_text(item: object) -> Text:
    if isinstance(item, str):
        return Text(item)
    if isinstance(item, Finding):
        severity = (f"{item.severity}: ", render.SEVERITY_STYLES[item.severity])
        return Text.assemble(severity, f"{item.place}{item.message} {item.fix}")
    if isinstance(item, Choice):
        return Text(f"{item.name}: {item.value} ({item.reason})")
    if isinstance(item, Event):
        head = f"step {item.step}  {item.kind}"
        return Text.assemble((head, _STYLES.get(item.kind, "cyan")), f"  {_values(item.values)}")
    if isinstance(item, Plan):
        budget = f"{format_bytes(item.peak_bytes)} of {format_bytes(item.budget_bytes)}"
        cut = f"{item.micro_batch_tokens:,} tokens a micro-batch, {item.layer_slots} layer slots"
        return Text(f"plan: peak {budget} on {item.device}, {cut}")
    raise TypeError(f"a training reported {type(item).__name__}, which has no picture")


def _values(values: Mapping[str, Any]) -> str:
    """What is known and so: a flag is shown by its name alone, and not at all where it is off."""
    shown = (_pair(name, value) for name, value in values.items() if value is not None)
    return ", ".join(pair for pair in shown if pair)


def _pair(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return _name(name).removeprefix("is ") if value else ""
    return f"{_name(name)} {_value(name, value)}"


def _name(name: str) -> str:
    return name.removesuffix("_bytes").replace("_", " ")


def _value(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return format_bytes(value)
    if name.endswith("seconds"):
        return format_seconds(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
