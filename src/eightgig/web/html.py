"""Pieces of HTML: everything that comes from outside is escaped and freed of secrets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from eightgig.run import mask_secrets

_LONGEST_TEXT = 20_000


def text(value: object) -> str:
    """`value` as text within an element."""
    plain = str(value)
    if len(plain) > _LONGEST_TEXT:
        plain = plain[:_LONGEST_TEXT] + f" … ({len(plain):,} characters in all)"
    return escape(mask_secrets(plain), quote=True)


def number(value: Any, digits: int = 4) -> str:
    """A number for people; anything else as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return text(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.{digits}f}" if 1e-3 <= abs(value) < 1e6 or value == 0 else f"{value:.3g}"


def table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: int = 0
) -> str:
    """A table.

    Args:
        caption: What it holds.
        head: Names of the columns.
        rows: Cells, already text or numbers; they are escaped here.
        numbers: Columns from the right that hold numbers.
    """
    first = len(head) - numbers
    cells = "".join(
        f'<th scope="col"{_kind(column >= first)}>{text(name)}</th>'
        for column, name in enumerate(head)
    )
    body = "".join(_row(row, first) for row in rows)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{text(caption)}"><table>'
        f"<caption>{text(caption)}</caption><thead><tr>{cells}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def pairs_table(caption: str, values: Mapping[str, Any]) -> str:
    """A table of names and values."""
    rows = [(name.replace("_", " "), value) for name, value in values.items()]
    return table(caption, ("", ""), rows)


def folded(title: str, content: str) -> str:
    """`content` behind a line that opens it."""
    return f"<details><summary>{text(title)}</summary>{content}</details>"


def section(slug: str, title: str, content: str) -> str:
    """A section of the page; empty where it has no content."""
    if not content:
        return ""
    return (
        f'<section id="{slug}" aria-labelledby="{slug}-head">'
        f'<h2 id="{slug}-head">{text(title)}</h2>{content}</section>'
    )


def _row(cells: Sequence[object], first_number: int) -> str:
    parts = [f'<th scope="row">{text(cells[0])}</th>']
    for column, cell in enumerate(cells[1:], start=1):
        shown = number(cell) if column >= first_number else text(cell)
        parts.append(f"<td{_kind(column >= first_number)}>{shown}</td>")
    return f"<tr>{''.join(parts)}</tr>"


def _kind(is_number: bool) -> str:
    return ' class="number"' if is_number else ""
