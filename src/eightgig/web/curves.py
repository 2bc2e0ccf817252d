"""The curves of a run as a static picture: PNG where matplotlib is installed, else nothing."""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eightgig.run import write_atomically
from eightgig.web.charts import Chart

CURVES_NAME = "curves.png"
_COLOURS = ("#0060a8", "#c04d00")
_LEVEL_COLOUR = "#8a2b6b"
_INCHES = (9.0, 2.6)
_DPI = 110


def write_curves(folder: Path, charts: Sequence[Chart], *, title: str) -> Path | None:
    """Draw `charts` below each other into `curves.png`.

    Args:
        folder: Where to write.
        charts: What is drawn; nothing is written where there are none.
        title: Above all.

    Returns:
        The picture, None where matplotlib is not installed or there is nothing to draw.

    Raises:
        OSError: The folder cannot be written.
    """
    if not charts or importlib.util.find_spec("matplotlib") is None:
        return None
    figures: Any = importlib.import_module("matplotlib.figure")
    figure = figures.Figure(
        figsize=(_INCHES[0], _INCHES[1] * len(charts)), dpi=_DPI, layout="constrained"
    )
    figure.suptitle(title)
    for axes, chart in zip(figure.subplots(len(charts), squeeze=False)[:, 0], charts, strict=True):
        _draw(axes, chart)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    path = folder / CURVES_NAME
    write_atomically(path, content.getvalue())
    return path


def _draw(axes: Any, chart: Chart) -> None:
    for line, colour in zip(chart.lines, _COLOURS, strict=False):
        if line.finite:
            steps, values = zip(*line.finite, strict=True)
            marker = "o" if len(steps) == 1 or line is not chart.lines[0] else None
            axes.plot(steps, values, color=colour, label=line.name, marker=marker, markersize=4)
    for name, value in chart.levels:
        axes.axhline(value, color=_LEVEL_COLOUR, linestyle="--", linewidth=1, label=name)
    axes.set_title(chart.title, loc="left", fontsize=10)
    axes.yaxis.set_major_formatter(lambda value, _: chart.format_value(value))
    if chart.starts_at_zero:
        axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    axes.set_xlabel("optimizer step", fontsize=8)
