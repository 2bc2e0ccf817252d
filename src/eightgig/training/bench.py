"""A timed training on random tokens: what `eightgig bench` and the published figures come from."""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import psutil
import torch

from eightgig.config import Config
from eightgig.data.batches import Dataset
from eightgig.engine.assemble import Engine, assemble
from eightgig.hardware.probe import Hardware
from eightgig.memory.fit import refuse_misfit, row_lengths
from eightgig.memory.plan import Plan, make_plan
from eightgig.models.spec import ModelSpec
from eightgig.quant.store import Store
from eightgig.training.identity import library_versions
from eightgig.training.optimizer import Optimizer, make_optimizer
from eightgig.training.step import StepSchedule, make_schedule, prepare_step, run_step

_FIRST_TOKEN = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchResult:
    """One row of `benchmarks/results.jsonl`.

    Attributes:
        case: Name, such as `12b-8x2048`.
        tool: What was timed.
        model: Its name.
        tokens: Tokens of each row.
        micro_batches: Rows of an optimizer step.
        rank: LoRA rank, on the seven linears.
        optim: Optimizer.
        lora_dropout: Dropout of adapter inputs.
        budget_bytes: What the allocator may reserve.
        tokens_per_second: Median over the timed steps.
        reserved_peak_bytes: Most the allocator reserved.
        predicted_peak_bytes: What the plan had said.
        predicted_tokens_per_second: What the plan had said; None where it had not.
        copy_wait_ratio: Share of a step in which the compute stream waited for copies.
        seconds_to_first_step: From the start of the process to the end of the first step; None
            where other cases ran before in the same process.
        first_loss, last_loss: Of the same rows, before and after all steps.
        choices: The plan's layout.
        machine: Name of the GPU or processor.
        versions: Of the libraries that decide results.
        date: Day of the measurement.
        commit: Of the code, empty where unknown.
    """

    case: str
    tool: str
    model: str
    tokens: int
    micro_batches: int
    rank: int
    optim: str
    lora_dropout: float
    budget_bytes: int
    tokens_per_second: float
    reserved_peak_bytes: int
    predicted_peak_bytes: int | None
    predicted_tokens_per_second: float | None
    copy_wait_ratio: float | None
    seconds_to_first_step: float | None
    first_loss: float
    last_loss: float
    choices: Mapping[str, str]
    machine: str
    versions: Mapping[str, str]
    date: str
    commit: str


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchCase:
    """What to time.

    Attributes:
        name: Of the row.
        tokens: Tokens of each row.
        warmup_steps: Steps before the timed ones.
        timed_steps: Steps whose median counts.
        commit: Of the code, empty where unknown.
    """

    name: str
    tokens: int
    warmup_steps: int = 2
    timed_steps: int = 8
    commit: str = ""


def bench(
    case: BenchCase, spec: ModelSpec, store: Store, hardware: Hardware, config: Config
) -> BenchResult:
    """Plan and train on one batch of random rows, again and again.

    Args:
        case: What to time.
        spec: The model.
        store: Its weights, or random ones.
        hardware: The machine, with measured rates.
        config: Its batch settings say how many rows a step has.

    Raises:
        DoesNotFitError: The plan does not fit the budget.
    """
    rows_per_step = (
        config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps
    )
    rows = _random_rows(spec.decoder.vocab_size, rows_per_step, case.tokens)
    measured = row_lengths(config, rows, None)
    plan = make_plan(spec, hardware, config, rows=measured, is_prepared=True)
    refuse_misfit(plan)
    engine = assemble(spec, store, plan, config.lora, seed=config.train.seed)
    assert engine.adapter is not None and engine.gradients is not None
    if plan.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    optimizer = make_optimizer(engine.adapter, engine.gradients, config.train)
    timing = _time_steps(
        case, engine, optimizer, make_schedule(config, rows, plan.micro_batch_tokens)
    )
    reserved_bytes = torch.cuda.max_memory_reserved() if plan.device == "cuda" else 0
    optimizer.finish()
    engine.close()
    return BenchResult(
        case=case.name,
        tool="eightgig",
        model=spec.name,
        tokens=case.tokens,
        micro_batches=rows_per_step,
        rank=config.lora.r,
        optim=config.train.optim,
        lora_dropout=config.lora.lora_dropout,
        budget_bytes=plan.budget_bytes,
        tokens_per_second=rows_per_step * case.tokens / statistics.median(timing.seconds),
        reserved_peak_bytes=reserved_bytes,
        predicted_peak_bytes=plan.peak_bytes,
        predicted_tokens_per_second=plan.tokens_per_second,
        copy_wait_ratio=timing.wait_seconds / sum(timing.seconds),
        seconds_to_first_step=timing.seconds_to_first_step,
        first_loss=timing.losses[0],
        last_loss=timing.losses[-1],
        choices=_layout(plan),
        machine=hardware.name,
        versions=library_versions(),
        date=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        commit=case.commit,
    )


@dataclass(frozen=True, slots=True)
class _Timing:
    seconds: Sequence[float]
    losses: Sequence[float]
    wait_seconds: float
    seconds_to_first_step: float


def _time_steps(
    case: BenchCase, engine: Engine, optimizer: Optimizer, schedule: StepSchedule
) -> _Timing:
    """Steps as the training loop does them, without what happens beside them."""
    total = case.warmup_steps + case.timed_steps
    # Every pass has the same rows: a falling loss shows that the adapter learns.
    prepared = prepare_step(engine, schedule.batches(1), step=1, seed=None)
    seconds, losses, to_first = [], [], 0.0
    for step in range(1, total + 1):
        if step == case.warmup_steps + 1:
            engine.model.meter.start()
        start_seconds = time.perf_counter()
        current = prepared
        prepared = prepare_step(engine, schedule.batches(step + 1), step=step + 1, seed=None)
        loss, norm = run_step(engine, current)
        optimizer.start_step(1e-4, min(1.0, 1.0 / (norm + 1e-6)))
        engine.model.ring.invalidate_changing()
        seconds.append(time.perf_counter() - start_seconds)
        losses.append(loss)
        if step == 1:
            to_first = time.time() - psutil.Process().create_time()
    wait_seconds = engine.model.meter.take_seconds() if engine.model.device.type == "cuda" else 0.0
    return _Timing(seconds[case.warmup_steps :], losses, wait_seconds, to_first)


def _random_rows(vocab_size: int, count: int, tokens: int) -> Dataset:
    ids = np.random.default_rng(0).integers(
        min(_FIRST_TOKEN, vocab_size // 2), vocab_size, count * tokens, dtype=np.int32
    )
    return Dataset(
        input_ids=ids,
        labels=ids,
        offsets=np.arange(0, count * tokens + 1, tokens, dtype=np.int64),
        row_ids=np.arange(count, dtype=np.int64),
        fingerprint="random",
        summary={},
    )


def _layout(plan: Plan) -> dict[str, str]:
    return {
        "layer_slots": str(plan.layer_slots),
        "micro_batch_tokens": str(plan.micro_batch_tokens),
        "micro_batches_per_visit": str(plan.micro_batches_per_visit),
        "mlp_tile_tokens": str(plan.mlp_tile_tokens),
        "head_tile_tokens": str(plan.head_tile_tokens),
        "head_chunk_rows": str(plan.head_chunk_rows),
        "checkpoints": plan.checkpoints,
        "offload": "+".join(plan.offload) or "none",
        "optimizer": plan.optimizer_place,
        "host_weights": plan.host_weights,
        "kernels": plan.kernels,
    }
