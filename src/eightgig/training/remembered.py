"""The form of what the guards remember, to tell damage before a guard stumbles over it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from eightgig.run import from_json


@dataclass(frozen=True, kw_only=True, slots=True)
class _Start:
    losses: tuple[float, ...]
    norms: tuple[float, ...]
    loss_sum: float
    loss_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Recent:
    losses: tuple[float, ...]
    norms: tuple[float, ...]
    loss_tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Speed:
    steps: int
    start: tuple[float, ...]
    recent: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _NonFinite:
    in_a_row: int
    total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _DeadLayers:
    steps: int
    silent: tuple[str, ...]
    is_open: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class _Singles:
    """What is not a record of its own."""

    steps: int = 0
    best_loss: float | None = None
    is_flat_judged: bool = False
    said: tuple[str, ...] = ()


_RECORDS: Mapping[str, type[Any]] = MappingProxyType(
    {
        "start": _Start,
        "recent": _Recent,
        "speed": _Speed,
        "non_finite": _NonFinite,
        "dead_layers": _DeadLayers,
    }
)


def check_memory(memory: Mapping[str, Any]) -> None:
    """Compare what guards remember with the form in which they write it.

    A name may be missing, until its guard has seen something.

    Raises:
        ValueError: It has another form.
    """
    singles = [field.name for field in fields(_Singles)]
    try:
        from_json(_Singles, {name: memory[name] for name in singles if name in memory})
        for name, kind in _RECORDS.items():
            if name in memory:
                from_json(kind, memory[name])
    except ValueError as error:
        raise ValueError("what its guards remember is not of the form they write") from error
