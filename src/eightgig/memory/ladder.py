"""What is given up when memory runs out after all: one rung at a time, the cheapest first.

No rung changes which rows a step has, their order, or how their losses are weighed.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from eightgig.config import Choice
from eightgig.memory.plan import Plan

_REASON = "memory ran out"
# On a card with more to give than this, an earlier card's rungs are not taken over.
_SAME_BUDGET_RATIO = 1.05

_FEWEST_SLOTS = 2
_LEAST_HEAD_TOKENS = 256
_LEAST_MLP_TOKENS = 256


def next_rung(plan: Plan) -> tuple[Plan, Choice] | None:
    """`plan` one rung further down, and what changed; None at the bottom.

    Order: fewer labelled tokens whose logits exist at a time; layers no longer resident; layer
    inputs to host memory; fewer micro-batches a visit; smaller tiles of the MLP; micro-batches of
    fewer rows. The first four leave every number as it was.
    """
    for rung in (_head, _slots, _checkpoints, _visit, _mlp, _split):
        lower = rung(plan)
        if lower is not None:
            return lower
    return None


def count_rungs(plan: Plan) -> int:
    """Rungs that led to `plan`."""
    return sum(choice.reason == _REASON for choice in plan.choices)


def keep_rungs(plan: Plan, earlier_path: Path) -> Plan:
    """`plan` on the rungs of an earlier part of the run, so that it does not meet the same wall.

    Args:
        plan: As planned now.
        earlier_path: plan.json of the earlier part; `plan` stays as it is where there is none.
    """
    try:
        earlier = json.loads(earlier_path.read_text(encoding="utf-8"))
        if plan.budget_bytes > _SAME_BUDGET_RATIO * int(earlier["budget_bytes"]):
            return plan
        rungs = [choice for choice in earlier["choices"] if choice["reason"] == _REASON]
        for rung in rungs:
            name = str(rung["name"])
            plan = _lower(plan, name, earlier[name], Choice(**rung))
    except (OSError, ValueError, KeyError, TypeError):
        return plan
    return plan


def _lower(plan: Plan, name: str, value: Any, choice: Choice) -> Plan:
    """`plan` with one field as low as it was already, and the choice that says so."""
    now = getattr(plan, name, None)
    plan = replace(plan, choices=(*plan.choices, choice))
    if name == "checkpoints" and value == "host":
        return replace(plan, checkpoints="host")
    if not isinstance(now, int) or not isinstance(value, int):
        return plan
    if name == "layer_slots" and value < now:
        plan = replace(plan, resident_layers=0)
    # The field is one of Plan's; replace() cannot say that to a type checker.
    return replace(plan, **{name: min(now, value)})  # type: ignore[arg-type]


def _step(plan: Plan, name: str, value: int | str) -> tuple[Plan, Choice]:
    choice = Choice(
        name=name,
        value=f"{value:,}" if isinstance(value, int) else value,
        reason=_REASON,
        rejected=str(getattr(plan, name)),
    )
    lower = replace(plan, choices=(*plan.choices, choice))
    # The field is one of Plan's; replace() cannot say that to a type checker.
    return replace(lower, **{name: value}), choice  # type: ignore[arg-type]


def _head(plan: Plan) -> tuple[Plan, Choice] | None:
    tokens = max(_LEAST_HEAD_TOKENS, plan.head_tile_tokens // 4)
    return _step(plan, "head_tile_tokens", tokens) if tokens < plan.head_tile_tokens else None


def _slots(plan: Plan) -> tuple[Plan, Choice] | None:
    if plan.layer_slots <= _FEWEST_SLOTS:
        return None
    return _step(replace(plan, resident_layers=0), "layer_slots", _FEWEST_SLOTS)


def _checkpoints(plan: Plan) -> tuple[Plan, Choice] | None:
    is_possible = plan.checkpoints == "device" and plan.device == "cuda"
    return _step(plan, "checkpoints", "host") if is_possible else None


def _visit(plan: Plan) -> tuple[Plan, Choice] | None:
    count = plan.micro_batches_per_visit
    return _step(plan, "micro_batches_per_visit", count // 2) if count > 1 else None


def _mlp(plan: Plan) -> tuple[Plan, Choice] | None:
    tokens = min(plan.mlp_tile_tokens, plan.micro_batch_tokens) // 2
    return _step(plan, "mlp_tile_tokens", tokens) if tokens >= _LEAST_MLP_TOKENS else None


def _split(plan: Plan) -> tuple[Plan, Choice] | None:
    tokens = max(plan.micro_batch_tokens // 2, plan.max_length)
    return _step(plan, "micro_batch_tokens", tokens) if tokens < plan.micro_batch_tokens else None
