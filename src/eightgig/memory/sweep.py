"""The frontier: one plan for each value of a setting."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eightgig.config import Config, setting_groups
from eightgig.errors import ConfigError
from eightgig.hardware.probe import Hardware
from eightgig.memory.plan import Plan, RowLengths, make_plan
from eightgig.models.spec import DecoderSpec, ModelSpec
from eightgig.units import parse_bytes

_SIZES = ("budget", "host_budget")


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPoint:
    """One value of the swept setting, and the plan it leads to."""

    value: Any
    plan: Plan


def sweep(
    spec: ModelSpec | DecoderSpec,
    hardware: Hardware,
    config: Config,
    key: str,
    values: Sequence[Any],
    *,
    rows: RowLengths | None = None,
) -> tuple[SweepPoint, ...]:
    """Plans of `config` with `key` set to each of `values` in turn.

    Args:
        spec, hardware, config, rows: As for `make_plan`.
        key: A setting: `data.max_length`, or `max_length` where one group alone has it.
        values: Its values; text is read as the number or size that it is.

    Raises:
        ConfigError: There is no such setting, or a value cannot be planned for.
    """
    group, _, name = find_setting(key).partition(".")
    points = []
    for text in values:
        value = _read_value(name, text)
        changed = dataclasses.replace(getattr(config, group), **{name: value})
        # `replace` takes the group under its own name, which mypy cannot follow.
        planned = dataclasses.replace(config, **{group: changed})
        points.append(SweepPoint(value=value, plan=make_plan(spec, hardware, planned, rows=rows)))
    return tuple(points)


def find_setting(key: str) -> str:
    """`max_length` as `data.max_length`, where one group alone has it.

    Raises:
        ConfigError: There is no such setting, or several.
    """
    group, _, name = key.rpartition(".")
    holders = [
        each for each, names in setting_groups().items() if name in names and group in ("", each)
    ]
    if len(holders) != 1:
        found = ", ".join(f"{each}.{name}" for each in holders)
        raise ConfigError(
            f'"{key}" is not the name of one setting.',
            why=f"There are several: {found}." if holders else "No group has it.",
            fix='Write the group too, for example "data.max_length" or "lora.r".',
        )
    return f"{holders[0]}.{name}"


def _read_value(name: str, value: Any) -> Any:
    """Text as the number it is; sizes of budgets in bytes."""
    if not isinstance(value, str):
        return value
    if name in _SIZES and value != "auto":
        try:
            return parse_bytes(value)
        except ValueError as error:
            raise ConfigError(
                f"memory.{name} cannot be {value}.",
                why=f"{error}.",
                fix='Write sizes such as "6GiB".',
            ) from None
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
