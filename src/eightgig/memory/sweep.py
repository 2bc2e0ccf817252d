"""The frontier: one plan for each value of a setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from eightgig.config import Config
from eightgig.hardware.probe import Hardware
from eightgig.memory.plan import Plan, RowLengths, make_plan
from eightgig.models.spec import DecoderSpec, ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPoint:
    """One value of the swept setting, and the plan it leads to."""

    value: str
    plan: Plan


def sweep(
    spec: ModelSpec | DecoderSpec,
    hardware: Hardware,
    configs: Mapping[str, Config],
    *,
    rows: RowLengths | None = None,
    is_prepared: bool = False,
) -> tuple[SweepPoint, ...]:
    """A plan for each of `configs`.

    Args:
        spec, hardware, rows, is_prepared: As for `make_plan`.
        configs: By value of the setting in which they differ.

    Raises:
        ConfigError: A value cannot be planned for.
    """
    return tuple(
        SweepPoint(
            value=value,
            plan=make_plan(spec, hardware, config, rows=rows, is_prepared=is_prepared),
        )
        for value, config in configs.items()
    )
