"""A timed training on random tokens: what `eightgig bench` and the published figures come from.

`bench_cases` starts this module as a process of its own for each case:
`python -m eightgig.training.bench time ANSWER`, with the case as JSON on standard input.
"""

from __future__ import annotations

import datetime
import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eightgig.hardware.allocator import prepare_allocator

if __name__ == "__main__":
    prepare_allocator()  # before torch is imported

import numpy as np
import psutil
import torch

from eightgig.config import Config, read_config
from eightgig.data.batches import Dataset
from eightgig.engine.assemble import Engine, assemble
from eightgig.errors import EightgigError
from eightgig.hardware.calibrate import with_measured_rates
from eightgig.hardware.probe import Hardware, probe
from eightgig.memory.fit import refuse_misfit, row_lengths
from eightgig.memory.flops import model_flops_utilisation
from eightgig.memory.plan import Plan, make_plan
from eightgig.memory.workload import build_workload
from eightgig.models.spec import ModelSpec
from eightgig.quant.random_store import random_store
from eightgig.quant.store import Store
from eightgig.run import from_json, write_json
from eightgig.training.bench_cases import BenchCase, BenchResult, case_spec, store_path
from eightgig.training.identity import library_versions
from eightgig.training.optimizer import Optimizer, make_optimizer
from eightgig.training.step import (
    PreparedStep,
    StepSchedule,
    clip_scale,
    make_schedule,
    prepare_step,
    run_step,
)

_FIRST_TOKEN = 300
_LEARNING_RATE = 1e-4
_MAX_GRAD_NORM = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """What some optimizer steps took.

    Attributes:
        seconds: Of each timed step.
        losses: Of all steps, those before the timed ones too.
        wait_seconds: In which the compute stream waited for copies, during the timed steps; None on
            a CPU.
        seconds_to_first_step: From the start of the process to the end of the first step.
        reserved_peak_bytes: See `BenchResult`.
        allocated_peak_bytes: Of that, most that tensors took at a time; None on a CPU.
    """

    seconds: Sequence[float]
    losses: Sequence[float]
    wait_seconds: float | None
    seconds_to_first_step: float
    reserved_peak_bytes: int | None
    allocated_peak_bytes: int | None

    def tokens_per_second(self, tokens: int) -> float:
        """Of steps of so many tokens; the median of the timed ones."""
        return tokens / statistics.median(self.seconds)


def bench(
    case: BenchCase, spec: ModelSpec, store: Store, hardware: Hardware, config: Config
) -> BenchResult:
    """Plan and train on one batch of random rows, again and again.

    Args:
        case: What to time.
        spec: The model.
        store: Its weights, or random ones.
        hardware: The machine, with measured rates.
        config: The settings of `case`.

    Raises:
        DoesNotFitError: The plan does not fit the budget.
    """
    rows = random_rows(spec, config)
    measured = row_lengths(config, rows, None)
    plan = make_plan(spec, hardware, config, rows=measured, is_prepared=True)
    refuse_misfit(plan, hardware)
    timing = time_plan(case, spec, store, plan, (config, rows))
    tokens_per_second = timing.tokens_per_second(len(rows.input_ids))
    return BenchResult(
        case=case.name,
        tool="eightgig",
        model=spec.name,
        tokens=plan.max_length,
        micro_batches=rows.num_rows,
        rank=config.lora.r,
        optim=config.train.optim,
        lora_dropout=config.lora.lora_dropout,
        budget_bytes=plan.budget_bytes,
        tokens_per_second=tokens_per_second,
        reserved_peak_bytes=timing.reserved_peak_bytes,
        predicted_peak_bytes=plan.peak_bytes,
        predicted_tokens_per_second=plan.tokens_per_second,
        copy_wait_ratio=(
            None if timing.wait_seconds is None else timing.wait_seconds / sum(timing.seconds)
        ),
        model_flops_utilisation=_utilisation(
            spec, config, plan, hardware, tokens_per_second=tokens_per_second
        ),
        seconds_to_first_step=timing.seconds_to_first_step,
        first_loss=timing.losses[0],
        last_loss=timing.losses[-1],
        choices=_layout(plan),
        rates=hardware.rates,
        machine=hardware.name,
        versions=library_versions(),
        date=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        commit=case.commit,
    )


def time_plan(
    case: BenchCase, spec: ModelSpec, store: Store, plan: Plan, run: tuple[Config, Dataset]
) -> Timing:
    """Train as `plan` says on the same rows again and again.

    Args:
        case: How many steps.
        spec: The model.
        store: Its weights.
        plan: The layout; the allocator is capped at its budget.
        run: Settings, and the rows of one optimizer step.
    """
    config, rows = run
    engine = assemble(spec, store, plan, config.lora, seed=config.train.seed)
    assert engine.adapter is not None and engine.gradients is not None
    optimizer = make_optimizer(engine.adapter, engine.gradients, config.train)
    schedule = make_schedule(config, rows, plan.micro_batch_tokens)
    try:
        return _time_steps(case, engine, optimizer, schedule)
    finally:
        optimizer.finish()
        engine.close()


def _time_steps(
    case: BenchCase, engine: Engine, optimizer: Optimizer, schedule: StepSchedule
) -> Timing:
    """Steps as the training loop does them, without what happens beside them."""
    on_gpu = engine.model.device.type == "cuda"
    has_dropout = engine.adapter is not None and engine.adapter.dropout > 0
    seed = schedule.seed if has_dropout else None
    # Every pass has the same rows: a falling loss shows that the adapter learns.
    prepared = prepare_step(engine, schedule.batches(1), step=1, seed=seed)
    seconds, losses, to_first = [], [], 0.0
    for step in range(1, case.warmup_steps + case.timed_steps + 1):
        if step == case.warmup_steps + 1:
            engine.model.meter.start()
        start_seconds = time.perf_counter()
        current = prepared
        prepared = prepare_step(engine, schedule.batches(step + 1), step=step + 1, seed=seed)
        loss = take_step(engine, optimizer, current)
        seconds.append(time.perf_counter() - start_seconds)
        losses.append(loss)
        if step == 1:
            to_first = time.time() - psutil.Process().create_time()
    return Timing(
        seconds=seconds[case.warmup_steps :],
        losses=losses,
        wait_seconds=engine.model.meter.take_seconds() if on_gpu else None,
        seconds_to_first_step=to_first,
        reserved_peak_bytes=torch.cuda.max_memory_reserved() if on_gpu else _most_resident_bytes(),
        allocated_peak_bytes=torch.cuda.max_memory_allocated() if on_gpu else None,
    )


def take_step(engine: Engine, optimizer: Optimizer, prepared: PreparedStep) -> float:
    """The loss of a step, after which the adapter has begun to move."""
    loss, norm = run_step(engine, prepared)
    optimizer.start_step(_LEARNING_RATE, clip_scale(norm, _MAX_GRAD_NORM))
    engine.model.ring.invalidate_changing()
    return loss


def _most_resident_bytes() -> int | None:
    """Most main memory that this process held, mapped files included."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _utilisation(
    spec: ModelSpec, config: Config, plan: Plan, hardware: Hardware, *, tokens_per_second: float
) -> float | None:
    if hardware.rates is None:
        return None
    return model_flops_utilisation(
        build_workload(spec, config, max_length=plan.max_length),
        tokens_per_second=tokens_per_second,
        gemm_flops_per_second=hardware.rates.gemm_flops_per_second,
    )


def random_rows(spec: ModelSpec, config: Config) -> Dataset:
    """The rows of one optimizer step, each of `data.max_length` random tokens, all trained."""
    vocab_size, tokens = spec.decoder.vocab_size, config.data.max_length
    assert isinstance(tokens, int), f"data.max_length is {tokens}"
    count = config.train.rows_per_step
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


def prepare_random_store(case: BenchCase) -> Store:
    """The random weights of `case`, written if they are not there yet."""
    folder = store_path(case)
    if not folder.is_dir():
        spec, config = case_spec(case), read_config(None, case.settings)
        beside = folder.with_name(folder.name + ".tmp")
        random_store(
            spec.decoder,
            beside,
            quantization=config.model.quantization,
            dtype=spec.dtype,
            seed=0,
            alias_layers=case.shares_layers,
        )
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
    return Store.open(folder)


def main(arguments: Sequence[str]) -> None:
    """Do what a parent process asks for, and write the answer into a file.

    Args:
        arguments: `prepare` or `time`, and where the answer goes.
    """
    work, answer_path = arguments
    case = from_json(BenchCase, json.load(sys.stdin))
    answer: Any = {}
    try:
        store = prepare_random_store(case)
        if work == "time":
            config = read_config(None, case.settings)
            machine = with_measured_rates(probe(config.memory.device, Path(case.stores)))
            answer = bench(case, case_spec(case), store, machine, config)
    except EightgigError as error:
        answer = {"error": {"message": error.message, "why": error.why, "fix": error.fix}}
    write_json(Path(answer_path), answer)


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


if __name__ == "__main__":
    main(sys.argv[1:])
