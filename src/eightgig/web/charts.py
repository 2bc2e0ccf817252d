"""Line charts as SVG, with a title and a description for those who cannot see them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from eightgig.web.facts import Series

_WIDTH, _HEIGHT = 480, 264
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 12, 18, 42
_TICKS = 4
_MOST_POINTS = 600
_MOST_MARKED_POINTS = 40

Format = Callable[[float], str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """What a chart shows.

    Attributes:
        slug: Names its parts within the page.
        title: Above it.
        lines: Drawn as lines; the first ones in front.
        levels: Named horizontal lines, such as a budget.
        format_value: Numbers for people.
        starts_at_zero: Whether the axis begins at 0.
    """

    slug: str
    title: str
    lines: tuple[Series, ...]
    levels: tuple[tuple[str, float], ...] = ()
    format_value: Format = "{:.4g}".format
    starts_at_zero: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not any(line.finite for line in self.lines)


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where numbers lie in the picture."""

    first_step: int
    last_step: int
    low: float
    high: float

    def x(self, step: float) -> float:
        span = max(1, self.last_step - self.first_step)
        return _LEFT + (step - self.first_step) / span * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def draw_chart(chart: Chart) -> str:
    """The chart as an SVG element; its colours are those of the page's style."""
    frame = _frame(chart)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-labelledby="{chart.slug}-title {chart.slug}-desc">',
        f'<title id="{chart.slug}-title">{escape(chart.title)}</title>',
        f'<desc id="{chart.slug}-desc">{escape(describe_chart(chart))}</desc>',
        *_axes(chart, frame),
    ]
    highest = max((value for _, value in chart.levels), default=0.0)
    for name, value in chart.levels:
        y = frame.y(value)
        parts.append(f'<path class="level" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        # Names of levels near to each other would cover each other.
        offset = -5 if value == highest else 14
        parts.append(_text(_WIDTH - _RIGHT, y + offset, name, "end", "small"))
    for number, line in reversed(list(enumerate(chart.lines))):
        parts += _line(line, frame, f"line{number}")
    parts.append("</svg>")
    return "".join(parts)


def describe_chart(chart: Chart) -> str:
    """What the chart shows, in words."""
    sentences = []
    for line in chart.lines:
        points = line.finite
        if not points:
            continue
        (first_step, first), (last_step, last) = points[0], points[-1]
        low = min(points, key=lambda point: point[1])
        high = max(points, key=lambda point: point[1])
        shown = chart.format_value
        sentences.append(
            f"{line.name}: {shown(first)} at step {first_step}, {shown(last)} at step {last_step}; "
            f"lowest {shown(low[1])} at step {low[0]}, highest {shown(high[1])} at step {high[0]}."
        )
        missing = len(line.points) - len(points)
        if missing:
            sentences.append(f"{missing} values of {line.name} are not finite.")
    sentences += [f"{name}: {chart.format_value(value)}." for name, value in chart.levels]
    return " ".join(sentences)


def nice_ticks(low: float, high: float, count: int = _TICKS) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them."""
    span = high - low
    raw = span / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    ticks = []
    while (value := first * step) <= high + 1e-9 * span:
        ticks.append(0.0 if abs(value) < 1e-12 * span else value)
        first += 1
    return ticks


def thin(points: Sequence[tuple[int, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` points: means of neighbours, the last point as it is."""
    if len(points) <= most:
        return [(float(step), value) for step, value in points]
    thinned = []
    for number in range(most - 1):
        part = points[number * len(points) // (most - 1) : (number + 1) * len(points) // (most - 1)]
        thinned.append(
            (sum(step for step, _ in part) / len(part), sum(value for _, value in part) / len(part))
        )
    return [*thinned, (float(points[-1][0]), points[-1][1])]


def _frame(chart: Chart) -> _Frame:
    points = [point for line in chart.lines for point in line.finite]
    values = [value for _, value in points] + [value for _, value in chart.levels]
    low, high = min(values), max(values)
    if chart.starts_at_zero:
        low = min(0.0, low)
    # A constant gets room above and below, so that it is a line in the middle.
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    is_floor = chart.starts_at_zero and low == 0.0
    steps = [step for step, _ in points]
    return _Frame(min(steps), max(steps), low if is_floor else low - margin, high + margin)


def _axes(chart: Chart, frame: _Frame) -> list[str]:
    parts = []
    for value in nice_ticks(frame.low, frame.high):
        y = frame.y(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 8, y + 4, chart.format_value(value), "end"))
    base = _HEIGHT - _BOTTOM
    for step in _step_ticks(frame):
        x = frame.x(step)
        parts.append(f'<path class="tick" d="M{x:.1f} {base}v5"/>')
        parts.append(_text(x, base + 19, f"{step:,}", "middle"))
    parts.append(f'<path class="axis" d="M{_LEFT} {base}H{_WIDTH - _RIGHT}"/>')
    parts.append(_text(_WIDTH - _RIGHT, _HEIGHT - 4, "optimizer step", "end", "small"))
    return parts


def _step_ticks(frame: _Frame) -> list[int]:
    if frame.last_step == frame.first_step:
        return [frame.first_step]
    ticks = nice_ticks(frame.first_step, frame.last_step)
    return sorted({round(tick) for tick in ticks if abs(tick - round(tick)) < 1e-6})


def _line(line: Series, frame: _Frame, style: str) -> list[str]:
    points = thin(line.finite, _MOST_POINTS)
    if not points:
        return []
    places = [(frame.x(step), frame.y(value)) for step, value in points]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts = [f'<path class="{style}" d="M{path}"/>']
    if len(points) <= _MOST_MARKED_POINTS:
        parts += [f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]
    return parts


def _text(x: float, y: float, content: str, anchor: str, style: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'
