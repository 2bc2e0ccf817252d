"""The plan: every decision that memory forces, with its reason, before a weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from eightgig.config import Choice, Config
from eightgig.hardware.probe import Hardware
from eightgig.memory import estimate, host_estimate
from eightgig.memory.advice import advise
from eightgig.memory.problem import Problem, Solution, read_problem, solve
from eightgig.memory.reasons import explain
from eightgig.memory.speed import speed_range
from eightgig.memory.workload import RowLengths as RowLengths
from eightgig.memory.workload import measure_rows as measure_rows
from eightgig.models.spec import DecoderSpec, ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What will run where, and what it will take.

    Attributes:
        fits: Whether peak, host memory and disk stay within their budgets.
        device, compute_dtype: Where and in what the layers compute.
        budget_bytes: What the CUDA allocator may reserve; on a CPU, what host memory allows.
        peak_bytes: Predicted reserved peak; never below the true one.
        breakdown: `peak_bytes` by item: layer_slots, resident_layers, dequant_scratch, lora,
            optimizer, hidden, checkpoints, attention, mlp, head, allocator_slack.
        budget_breakdown: How the budget came about: card, context, display, margin.
        host_bytes, host_budget_bytes: Main memory needed and allowed.
        host_breakdown: `host_bytes` by item.
        disk_bytes: Free disk needed for prepared weights and checkpoints.
        layer_slots: Slots of the ring; each holds one decoder layer or one head chunk.
        resident_layers: Layers that in effect never leave the device.
        micro_batch_tokens: Tokens of packed rows per micro-batch.
        micro_batches_per_visit: G, micro-batches sharing one visit of a layer.
        max_length: Longest row planned for.
        mlp_tile_tokens: Tokens per tile of the MLP.
        head_tile_tokens: Labelled tokens per tile of the head.
        head_chunk_rows: Vocabulary rows per head chunk.
        checkpoints: Where layer inputs wait for the backward pass.
        offload: Outputs kept in host memory instead of recomputed.
        optimizer_place: Where masters and moments of the adapter live.
        host_weights: Prepared layers in pinned memory, in pageable memory, or mapped from disk.
        kernels: `triton` or `plain`.
        choices: Every decision with its reason and best rejected alternative.
        advice: What to change to make it fit, or fit better, least harm first.
        tokens_per_second: Predicted speed, None where no rates are known.
        tokens_per_second_range: Honest range of it (low, high).
        longest_row_tokens: Longest row that would fit with the least-memory layout.
        mapped_bytes: Tables and layers read through the page cache, beside `host_bytes`.
        num_steps: Optimizer steps of the run, None where the number of rows is not known.
        run_seconds, run_seconds_range: Time for all of them, None where it is not known.
        waiting_ratio: Share of a step spent waiting for copies, None where no rates are known.
    """

    fits: bool
    device: Literal["cuda", "cpu"]
    compute_dtype: Literal["bfloat16", "float16", "float32"]
    budget_bytes: int
    peak_bytes: int
    breakdown: Mapping[str, int]
    budget_breakdown: Mapping[str, int]
    host_bytes: int
    host_budget_bytes: int
    host_breakdown: Mapping[str, int]
    disk_bytes: int
    layer_slots: int
    resident_layers: int
    micro_batch_tokens: int
    micro_batches_per_visit: int
    max_length: int
    mlp_tile_tokens: int
    head_tile_tokens: int
    head_chunk_rows: int
    checkpoints: Literal["device", "host"]
    offload: tuple[str, ...]
    optimizer_place: Literal["host", "device"]
    host_weights: Literal["pinned", "pageable", "mapped"]
    kernels: Literal["triton", "plain"]
    choices: tuple[Choice, ...]
    advice: tuple[str, ...] = ()
    tokens_per_second: float | None = None
    tokens_per_second_range: tuple[float, float] | None = None
    longest_row_tokens: int | None = None
    mapped_bytes: int = 0
    num_steps: int | None = None
    run_seconds: float | None = None
    run_seconds_range: tuple[float, float] | None = None
    waiting_ratio: float | None = None


def make_plan(
    spec: ModelSpec | DecoderSpec,
    hardware: Hardware,
    config: Config,
    *,
    rows: RowLengths | None = None,
    is_prepared: bool = False,
) -> Plan:
    """Everything that memory decides for training `spec` on `hardware` as `config` says.

    A plan that does not fit is returned, not raised: `fits` is False, the layout is the one that
    needs the least, and `advice` says what would change it.

    Args:
        spec: The model; its tensors are not needed.
        hardware: The machine, with measured rates for a forecast that holds.
        config: Settings; a number binds what `auto` would decide.
        rows: What is known of the data; None: every row is as long as planned for.
        is_prepared: Whether the prepared weights are on the disk already.

    Raises:
        ConfigError: A setting asks for what cannot be done.
        ModelError: `lora.target_modules` matches nothing.
    """
    problem = read_problem(spec, hardware, config, rows=rows, is_prepared=is_prepared)
    solution = solve(problem)
    return _write_plan(problem, solution)


def _write_plan(problem: Problem, solution: Solution) -> Plan:
    best, work, layout = solution.best, solution.work, solution.best.layout
    slots = layout.layer_slots
    resident = slots if slots >= estimate.slots_for_everything(work) else slots - 3
    speed = _speed(problem, solution)
    return Plan(
        fits=solution.fits,
        device=problem.hardware.device,
        compute_dtype=work.compute_dtype,
        budget_bytes=solution.device.total_bytes,
        peak_bytes=best.peak_bytes,
        breakdown=best.breakdown,
        budget_breakdown=solution.device.parts,
        host_bytes=best.host_bytes,
        host_budget_bytes=solution.host.total_bytes,
        host_breakdown=best.host,
        disk_bytes=solution.disk_bytes,
        layer_slots=slots,
        resident_layers=max(0, min(work.num_layers, resident)),
        micro_batch_tokens=layout.micro_batch_tokens,
        micro_batches_per_visit=layout.micro_batches_per_visit,
        max_length=work.max_length,
        mlp_tile_tokens=layout.mlp_tile_tokens,
        head_tile_tokens=layout.head_tile_tokens,
        head_chunk_rows=estimate.head_chunk_rows(work),
        checkpoints=layout.checkpoints,
        offload=layout.offload,
        optimizer_place="device" if estimate.is_optimizer_on_device(work) else "host",
        host_weights=best.host_weights,
        kernels=layout.kernels,
        choices=explain(problem, solution),
        advice=advise(problem, solution),
        tokens_per_second=speed.middle,
        tokens_per_second_range=speed.around,
        longest_row_tokens=solution.longest_row_tokens,
        mapped_bytes=_mapped_bytes(solution),
        num_steps=problem.num_steps,
        run_seconds=speed.run_seconds,
        run_seconds_range=speed.run_around,
        waiting_ratio=speed.waiting_ratio,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Speed:
    middle: float | None = None
    around: tuple[float, float] | None = None
    run_seconds: float | None = None
    run_around: tuple[float, float] | None = None
    waiting_ratio: float | None = None


def _speed(problem: Problem, solution: Solution) -> _Speed:
    """The forecast, where rates of this device are known."""
    rates = problem.hardware.rates
    if rates is None:
        return _Speed()
    time = solution.best.time
    low, high = speed_range(time, rates)
    middle = time.tokens_per_second
    run = None if problem.num_steps is None else problem.num_steps * time.seconds
    return _Speed(
        middle=middle,
        around=(middle * low, middle * high),
        run_seconds=run,
        run_around=None if run is None else (run / high, run / low),
        waiting_ratio=time.waiting_seconds / time.seconds,
    )


def _mapped_bytes(solution: Solution) -> int:
    """Files that are read through the page cache while training."""
    tables = host_estimate.table_bytes(solution.work)
    if solution.best.host_weights != "mapped":
        # The head has a copy of its own; embedding rows are still read from the file.
        return tables["embedding"] + tables["ple"]
    return sum(tables.values()) + host_estimate.layer_blobs_bytes(solution.work)
