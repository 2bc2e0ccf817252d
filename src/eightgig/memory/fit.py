"""The plan for a data set, and the data set cut to what the plan can take."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from eightgig.config import Choice, Config
from eightgig.data.batches import Dataset, measure_packing
from eightgig.data.load import limit_both
from eightgig.data.select import trained_per_row
from eightgig.errors import DoesNotFitError, Finding
from eightgig.hardware.probe import Hardware
from eightgig.memory.plan import Plan, make_plan
from eightgig.memory.workload import RowLengths, measure_rows
from eightgig.models.spec import ModelSpec
from eightgig.units import format_bytes


class Fitted(NamedTuple):
    """A plan, the rows that it takes, and notices: of longer rows, and how full batches are."""

    plan: Plan
    rows: Dataset
    held_out: Dataset | None
    notices: tuple[object, ...]


def fit_rows(
    spec: ModelSpec,
    hardware: Hardware,
    config: Config,
    data: tuple[Dataset, Dataset | None],
    *,
    is_prepared: bool,
) -> Fitted:
    """Plan for the rows; longer ones than the plan takes go the way of `data.too_long`.

    Args:
        spec: The model.
        hardware: The machine.
        config: The settings.
        data: Training and held-out rows.
        is_prepared: Whether the prepared weights are on the disk already.

    Raises:
        DataError: Rows are too long, and `data.too_long` is `refuse`; or it leaves none to train.
    """
    rows, held_out = data
    measured = row_lengths(config, rows, held_out)
    plan = make_plan(spec, hardware, config, rows=measured, is_prepared=is_prepared)
    if not plan.fits:
        return Fitted(plan, rows, held_out, ())
    findings: list[Finding] = []
    if measured.longest_tokens > plan.max_length:
        rows, held_out = limit_both(data, plan.max_length, config.data.too_long, findings)
    packing = describe_packing(config, rows, plan.micro_batch_tokens)
    return Fitted(plan, rows, held_out, (*findings, packing))


def describe_packing(config: Config, rows: Dataset, micro_batch_tokens: int) -> Choice:
    """How full the micro-batches of a step are."""
    train = config.train
    use = measure_packing(
        rows,
        seed=train.seed,
        rows_per_step=train.rows_per_step,
        micro_batch_tokens=micro_batch_tokens,
        packing=config.data.packing,
    )
    steps = -(-use.rows // train.rows_per_step)
    reason = (
        f"{train.rows_per_step:,} rows a step in {use.micro_batches / steps:.1f} micro-batches "
        f"of up to {micro_batch_tokens:,} tokens, without padding"
        if config.data.packing
        else "`data.packing` is off: every row has a micro-batch of its own"
    )
    return Choice(name="packing", value=f"{use.used_ratio:.0%} of the tokens used", reason=reason)


def bind_layout(config: Config, plan_path: Path) -> Config:
    """`config` with the micro-batches of an earlier plan of the same run, if there is one.

    How a step is cut decides the order of sums: a run that goes on keeps it, also where the
    machine is measured anew.
    """
    try:
        plan = json.loads(plan_path.read_text(encoding="utf-8"))
        memory = replace(
            config.memory,
            micro_batch_tokens=int(plan["micro_batch_tokens"]),
            micro_batches_per_visit=int(plan["micro_batches_per_visit"]),
            mlp_tile_tokens=int(plan["mlp_tile_tokens"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return config
    return replace(config, memory=memory)


def refuse_misfit(plan: Plan, hardware: Hardware) -> None:
    """Stop where a plan does not fit.

    Args:
        plan: What it needs.
        hardware: What it was made for.

    Raises:
        DoesNotFitError: With what takes how much, and what would change it.
    """
    if plan.fits:
        return
    has_memory = plan.peak_bytes <= plan.budget_bytes and plan.host_bytes <= plan.host_budget_bytes
    if has_memory and plan.disk_bytes > hardware.disk_free_bytes:
        raise DoesNotFitError(
            f"{format_bytes(plan.disk_bytes)} of disk are needed; "
            f"{format_bytes(hardware.disk_free_bytes)} are free.",
            why="The prepared weights and the checkpoints of the run are written there.",
            fix=" ".join(plan.advice),
        )
    largest = sorted(plan.breakdown.items(), key=lambda item: -item[1])
    items = ", ".join(f"{name} {format_bytes(size)}" for name, size in largest[:4])
    raise DoesNotFitError(
        f"The plan needs {format_bytes(plan.peak_bytes)} on the device and "
        f"{format_bytes(plan.host_bytes)} of main memory; "
        f"{format_bytes(plan.budget_bytes)} and {format_bytes(plan.host_budget_bytes)} are there.",
        why=f"The largest items are {items}.",
        fix=" ".join(plan.advice) or "Run `eightgig plan` for every item.",
    )


def row_lengths(config: Config, rows: Dataset, held_out: Dataset | None) -> RowLengths:
    """What the planner needs to know of the rows; held-out rows must pass, too."""
    lengths = rows.lengths
    measured = measure_rows(
        lengths.tolist(),
        trained_per_row(rows).tolist(),
        config.train.rows_per_step,
    )
    if held_out is None:
        return measured
    longest = max(measured.longest_tokens, int(held_out.lengths.max()))
    return replace(measured, longest_tokens=longest)
