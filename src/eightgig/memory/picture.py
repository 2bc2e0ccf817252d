"""A plan as a picture: one bar of memory by item against the budget, as SVG or PNG."""

from __future__ import annotations

import importlib
import importlib.util
import io
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from eightgig.errors import ConfigError
from eightgig.memory.plan import Plan
from eightgig.run import write_atomically
from eightgig.units import GIB, format_bytes

# Colours that stay apart for colour-blind readers and in grey (Okabe and Ito).
_COLOURS = {
    "layer_slots": "#0072B2",
    "resident_layers": "#56B4E9",
    "dequant_scratch": "#999999",
    "lora": "#009E73",
    "optimizer": "#004D38",
    "hidden": "#F0E442",
    "checkpoints": "#E69F00",
    "attention": "#D55E00",
    "mlp": "#CC79A7",
    "head": "#7A3E9D",
    "allocator_slack": "#D0D0D0",
}
_WIDTH, _LEFT, _TOP = 760, 20, 56
_BAR_WIDTH, _BAR_HEIGHT = _WIDTH - 2 * _LEFT, 44
_LINE_HEIGHT = 22
_FONT = 'font-family="system-ui, sans-serif"'


@dataclass(frozen=True, slots=True)
class _Part:
    name: str
    size_bytes: int
    start_bytes: int

    @property
    def colour(self) -> str:
        return _COLOURS.get(self.name, "#444444")


def write_picture(plan: Plan, path: Path, *, title: str = "") -> None:
    """Draw `plan` into a file, as its ending says.

    Args:
        plan: What is drawn.
        path: An `.svg`, or a `.png`, which matplotlib draws.
        title: Above the bar, for example the model and the card.

    Raises:
        ConfigError: Another ending, no such folder, or matplotlib is not installed.
    """
    kind = path.suffix.lower()
    if kind not in (".svg", ".png"):
        raise ConfigError(
            f"{path} cannot be drawn.",
            why="A picture is an .svg or a .png.",
            fix=f"Write {path.with_suffix('.svg') if path.name else path / 'plan.svg'}.",
        )
    if kind == ".png" and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            f"{path} cannot be drawn: matplotlib is not installed.",
            why="It draws .png; .svg needs nothing.",
            fix=f'python -m pip install "matplotlib>=3.8,<4", or write {path.with_suffix(".svg")}.',
        )
    try:
        write_atomically(
            path, draw_plan(plan, title=title) if kind == ".svg" else draw_png(plan, title=title)
        )
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written.",
            why=f"{error.strerror or error}.",
            fix="Name a file in a folder that you may write to.",
        ) from None


def draw_png(plan: Plan, *, title: str = "") -> bytes:
    """The same picture as `draw_plan`, as PNG; needs matplotlib."""
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(9.5, 3.2), dpi=160)
    axes: Any = figure.subplots()
    for part in _parts(plan):
        axes.barh(
            0,
            part.size_bytes / GIB,
            left=part.start_bytes / GIB,
            color=part.colour,
            edgecolor="#ffffff",
            label=f"{_words(part.name)}  {format_bytes(part.size_bytes)}",
        )
    axes.axvline(plan.budget_bytes / GIB, color="#c00000", label="budget")
    axes.set_xlim(0, 1.02 * max(plan.peak_bytes, plan.budget_bytes) / GIB)
    axes.set_yticks([])
    axes.set_xlabel("GiB")
    axes.set_title(_head(plan, title), loc="left", fontsize=11)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=3, fontsize=9, frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", bbox_inches="tight")
    return content.getvalue()


def _head(plan: Plan, title: str) -> str:
    verdict = "fits" if plan.fits else "does not fit"
    sizes = f"{format_bytes(plan.peak_bytes)} of {format_bytes(plan.budget_bytes)}"
    return f"{title + ': ' if title else ''}{sizes}, {verdict}"


def draw_plan(plan: Plan, *, title: str = "") -> str:
    """The plan's memory as a stacked bar, with a line where the budget ends.

    Args:
        plan: What is drawn.
        title: Above the bar, for example the model and the card.
    """
    parts = _parts(plan)
    whole = max(1, plan.peak_bytes, plan.budget_bytes)
    legend_top = _TOP + _BAR_HEIGHT + 40
    rows = -(-len(parts) // 2)
    height = legend_top + rows * _LINE_HEIGHT + 10
    budget_x = _LEFT + _BAR_WIDTH * plan.budget_bytes / whole
    head = _head(plan, title)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(head, quote=True)}">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(_LEFT, 30, head, size=17),
        f'<rect x="{_LEFT}" y="{_TOP}" width="{_BAR_WIDTH * plan.budget_bytes / whole:.1f}" '
        f'height="{_BAR_HEIGHT}" fill="#f4f4f4" stroke="#888888"/>',
    ]
    lines += [_bar(part, whole) for part in parts]
    lines.append(
        f'<line x1="{budget_x:.1f}" y1="{_TOP - 8}" x2="{budget_x:.1f}" '
        f'y2="{_TOP + _BAR_HEIGHT + 8}" stroke="#c00000" stroke-width="2"/>'
    )
    lines.append(_text(budget_x, _TOP + _BAR_HEIGHT + 22, "budget", size=12, anchor="end"))
    lines += [
        line
        for number, part in enumerate(parts)
        for line in _legend(part, number % 2, legend_top + number // 2 * _LINE_HEIGHT)
    ]
    lines.append("</svg>")
    return "\n".join(lines) + "\n"


def _parts(plan: Plan) -> list[_Part]:
    parts, start = [], 0
    for name, size in plan.breakdown.items():
        if size > 0:
            parts.append(_Part(name, size, start))
            start += size
    return parts


def _bar(part: _Part, whole: int) -> str:
    x = _LEFT + _BAR_WIDTH * part.start_bytes / whole
    width = _BAR_WIDTH * part.size_bytes / whole
    label = f"{_words(part.name)}: {format_bytes(part.size_bytes)}"
    return (
        f'<rect x="{x:.1f}" y="{_TOP}" width="{width:.1f}" height="{_BAR_HEIGHT}" '
        f'fill="{part.colour}" stroke="#ffffff" stroke-width="0.5">'
        f"<title>{escape(label)}</title></rect>"
    )


def _legend(part: _Part, column: int, y: int) -> list[str]:
    x = _LEFT + column * _BAR_WIDTH // 2
    return [
        f'<rect x="{x}" y="{y - 12}" width="14" height="14" fill="{part.colour}" '
        'stroke="#888888" stroke-width="0.5"/>',
        _text(x + 22, y, f"{_words(part.name)}  {format_bytes(part.size_bytes)}", size=13),
    ]


def _text(x: float, y: float, content: str, *, size: int, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" {_FONT} font-size="{size}" text-anchor="{anchor}" '
        f'fill="#222222">{escape(content)}</text>'
    )


def _words(name: str) -> str:
    return name.replace("_", " ")
