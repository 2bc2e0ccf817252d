"""Predicted and measured side by side: for a run, and for the table the formulas are held to."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eightgig.config import Config, DataConfig, LoraConfig, ModelConfig, TrainConfig
from eightgig.hardware.probe import Rates
from eightgig.memory.estimate import Layout, device_bytes
from eightgig.memory.plan import Plan
from eightgig.memory.search import is_hopper
from eightgig.memory.speed import StepTime, step_time
from eightgig.memory.workload import Workload, build_workload
from eightgig.models.spec import DecoderSpec, ModelSpec
from eightgig.run import from_json

# What the planner owes its users, as ratios of the measured value.
MEDIAN_EXCESS_RATIO = 0.03
WORST_EXCESS_RATIO = 0.06
SPEED_RATIO = 0.15


@dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """What the first steps of a run say about its plan; written to the run's events.

    Attributes:
        predicted_peak_bytes, measured_peak_bytes: Most that the allocator reserved; measured None
            on a CPU, where nothing counts it.
        peak_excess_ratio: (predicted - measured) / measured; negative: the plan was too low.
        predicted_tokens_per_second: None where no rates were known.
        measured_tokens_per_second: Median of the steps.
        speed_ratio: Measured over predicted.
        run_seconds: Time of the whole run at the measured speed, None where it is not known.
        is_peak_too_low: The plan promised less than was taken.
        is_speed_off: Further off than promised.
    """

    predicted_peak_bytes: int
    measured_peak_bytes: int | None
    peak_excess_ratio: float | None
    predicted_tokens_per_second: float | None
    measured_tokens_per_second: float | None
    speed_ratio: float | None
    run_seconds: float | None
    is_peak_too_low: bool
    is_speed_off: bool


def compare_with_plan(
    plan: Plan, *, peak_bytes: int, tokens_per_second: Sequence[float]
) -> Correction:
    """Compare `plan` with what its first optimizer steps took.

    Args:
        plan: The prediction.
        peak_bytes: Most bytes the allocator reserved; 0 on a CPU, where nothing counts them.
        tokens_per_second: Of each step after the first, which pays for compiling and filling.
    """
    measured = statistics.median(tokens_per_second) if tokens_per_second else None
    predicted = plan.tokens_per_second
    speed = measured / predicted if measured is not None and predicted else None
    run_seconds = plan.run_seconds
    if run_seconds is not None and speed:
        run_seconds /= speed
    excess = (plan.peak_bytes - peak_bytes) / peak_bytes if peak_bytes else None
    return Correction(
        predicted_peak_bytes=plan.peak_bytes,
        measured_peak_bytes=peak_bytes or None,
        peak_excess_ratio=excess,
        predicted_tokens_per_second=predicted,
        measured_tokens_per_second=measured,
        speed_ratio=speed,
        run_seconds=run_seconds,
        is_peak_too_low=excess is not None and excess < 0,
        is_speed_off=speed is not None and abs(speed - 1) > SPEED_RATIO,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredPeak:
    """One run of the table `measured_peaks.jsonl`, with all that a forecast of it needs.

    Attributes:
        case: Name of the run in `benchmarks/peaks.py`.
        model: Name of the shape.
        tokens: Of each row.
        rows: Of an optimizer step.
        rank, lora_dropout: Of the adapter, on the seven linears.
        placement: `streamed`, `half` or `resident`: how many layers stay on the device.
        offload: Outputs kept instead of recomputed.
        optim: As in the config.
        micro_batch_tokens, micro_batches_per_visit, layer_slots, mlp_tile_tokens, head_tile_tokens,
            checkpoints, kernels: The layout, as in `Plan`.
        compute_capability: Of the card.
        budget_bytes: What the allocator was allowed to reserve.
        rates: Measured before the run; until 2026-11-30 `host_bytes_per_second` was not, and is the
            number that fits those rows best.
        predicted_bytes: By the formulas of the commit that measured.
        measured_bytes: Most that the allocator reserved.
        allocated_bytes: Most that tensors took of it at a time; None where it was not noted.
        predicted_tokens_per_second: By the formulas of the commit that measured.
        measured_tokens_per_second: Median of the steps after the first; None where `rates` are not
            all of the same minute.
        used_for_tuning: Whether formulas may have been changed because of this row.
        machine, versions, date: Where and when.
    """

    case: str
    model: str
    tokens: int
    rows: int
    rank: int
    lora_dropout: float
    placement: Literal["streamed", "half", "resident"]
    offload: tuple[str, ...]
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit"]
    micro_batch_tokens: int
    micro_batches_per_visit: int
    layer_slots: int
    mlp_tile_tokens: int
    head_tile_tokens: int
    checkpoints: Literal["device", "host"]
    kernels: Literal["triton", "plain"]
    compute_capability: tuple[int, int]
    budget_bytes: int
    rates: Rates
    predicted_bytes: int
    measured_bytes: int
    allocated_bytes: int | None
    predicted_tokens_per_second: float
    measured_tokens_per_second: float | None
    used_for_tuning: bool
    machine: str
    versions: Mapping[str, str]
    date: str


def read_measured_peaks(path: Path) -> tuple[MeasuredPeak, ...]:
    """The rows of `measured_peaks.jsonl`.

    Raises:
        ValueError: A line is not a row.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    return tuple(from_json(MeasuredPeak, json.loads(line)) for line in lines if line.strip())


def predict_peak(row: MeasuredPeak, spec: ModelSpec | DecoderSpec) -> int:
    """Today's forecast of the reserved peak of `row`, which trained `spec`."""
    return sum(predict_items(row, spec).values())


def predict_items(row: MeasuredPeak, spec: ModelSpec | DecoderSpec) -> dict[str, int]:
    """The same by item."""
    return device_bytes(*_asked(row, spec))


def predict_time(row: MeasuredPeak, spec: ModelSpec | DecoderSpec) -> StepTime:
    """Today's forecast of a step of `row`, from the rates that were measured before it."""
    return step_time(*_asked(row, spec), row.rates)


def _asked(row: MeasuredPeak, spec: ModelSpec | DecoderSpec) -> tuple[Workload, Layout]:
    config = Config(
        model=ModelConfig(name=row.model),
        data=DataConfig(path=""),
        lora=LoraConfig(r=row.rank, lora_dropout=row.lora_dropout),
        train=TrainConfig(optim=row.optim, gradient_accumulation_steps=row.rows),
    )
    layout = Layout(
        micro_batch_tokens=row.micro_batch_tokens,
        micro_batches_per_visit=row.micro_batches_per_visit,
        layer_slots=row.layer_slots,
        mlp_tile_tokens=row.mlp_tile_tokens,
        head_tile_tokens=row.head_tile_tokens,
        checkpoints=row.checkpoints,
        kernels=row.kernels,
        offload=row.offload,
        is_hopper=is_hopper(row.compute_capability),
    )
    return build_workload(spec, config, max_length=row.tokens), layout


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """How well predictions hold over a table.

    Attributes:
        num_rows, num_unseen: Rows, and those that no formula was tuned on.
        median_excess_ratio, worst_excess_ratio: Of predicted over measured.
        too_low: Rows whose prediction was below the measured peak.
    """

    num_rows: int
    num_unseen: int
    median_excess_ratio: float
    worst_excess_ratio: float
    too_low: tuple[MeasuredPeak, ...]

    @property
    def holds(self) -> bool:
        """Whether predictions are never low and seldom high."""
        return (
            not self.too_low
            and self.median_excess_ratio <= MEDIAN_EXCESS_RATIO
            and self.worst_excess_ratio <= WORST_EXCESS_RATIO
        )


def judge_peaks(rows: Sequence[MeasuredPeak], predicted_bytes: Sequence[int]) -> Accuracy:
    """How `predicted_bytes`, made by today's formulas, compare with the rows' measurements.

    Raises:
        ValueError: There are no rows.
    """
    if not rows:
        raise ValueError("there are no measured rows")
    pairs = list(zip(rows, predicted_bytes, strict=True))
    excess = [predicted / row.measured_bytes - 1 for row, predicted in pairs]
    return Accuracy(
        num_rows=len(rows),
        num_unseen=sum(not row.used_for_tuning for row in rows),
        median_excess_ratio=statistics.median(excess),
        worst_excess_ratio=max(excess),
        too_low=tuple(row for row, predicted in pairs if predicted < row.measured_bytes),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedAccuracy:
    """How well predicted speeds hold over a table.

    Attributes:
        num_rows: Rows.
        median_ratio: Of measured over predicted tokens/s.
        off: Cases further off than `SPEED_RATIO`, with measured over predicted.
    """

    num_rows: int
    median_ratio: float
    off: Mapping[str, float]


def judge_speeds(rows: Sequence[MeasuredPeak], predicted: Sequence[float]) -> SpeedAccuracy:
    """How `predicted` tokens/s, made by today's formulas, compare with the rows' measurements.

    Raises:
        ValueError: There are no rows.
    """
    if not rows:
        raise ValueError("there are no measured rows")
    ratios = {
        row.case: row.measured_tokens_per_second / speed
        for row, speed in zip(rows, predicted, strict=True)
        if row.measured_tokens_per_second is not None
    }
    return SpeedAccuracy(
        num_rows=len(ratios),
        median_ratio=statistics.median(ratios.values()),
        off={case: ratio for case, ratio in ratios.items() if abs(ratio - 1) > SPEED_RATIO},
    )
