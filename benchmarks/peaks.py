"""Measures reserved peak and speed of many layouts, for tests/data/measured_peaks.jsonl.

    python benchmarks/peaks.py [--models e2b,12b] [--seconds 290] [--output FILE]

Every case trains three steps on random weights of a model's true shape with a layout that is
bound: streamed, half resident, resident; with outputs kept or not; several ranks, lengths and
optimizers. A row holds what the formulas of `eightgig.memory` need to forecast it again: a test
compares them. Rows are appended one by one; what the file holds already is not measured again, so
that a run that was cut short can go on. Every third case is held back: no formula may be tuned on
it.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from eightgig.hardware.allocator import prepare_allocator

prepare_allocator()

import torch  # noqa: E402

from eightgig.config import Config, read_config  # noqa: E402
from eightgig.hardware.calibrate import with_measured_rates  # noqa: E402
from eightgig.hardware.probe import Hardware, probe  # noqa: E402
from eightgig.memory.calibration import MeasuredPeak, read_measured_peaks  # noqa: E402
from eightgig.memory.estimate import RING_SLOTS, slots_for_everything  # noqa: E402
from eightgig.memory.fit import row_lengths  # noqa: E402
from eightgig.memory.plan import Plan, make_plan  # noqa: E402
from eightgig.memory.workload import build_workload  # noqa: E402
from eightgig.models.spec import ModelSpec  # noqa: E402
from eightgig.quant.store import Store  # noqa: E402
from eightgig.run import append_json_line  # noqa: E402
from eightgig.training.bench import prepare_random_store, random_rows, time_plan  # noqa: E402
from eightgig.training.bench_cases import BenchCase, case_spec, make_cases  # noqa: E402
from eightgig.training.identity import library_versions  # noqa: E402
from eightgig.units import GIB, format_bytes  # noqa: E402

# An 8 GB card's; then what half and fully resident models need.
BUDGETS_BYTES = (int(6.75 * GIB), 16 * GIB, 32 * GIB, 64 * GIB)
SECONDS_OF_A_CASE = 9
# Short steps are timed more often: what Python takes for them varies.
SHORT_STEP_TOKENS, STEPS = 4096, 6
HELD_BACK_EVERY = 3
OFFLOADS = {
    "none": "none",
    "down": "down_proj",
    "down+o": "down_proj+o_proj",
    "all": "down_proj+o_proj+attention",
}
OPTIMIZERS = {"host": "adamw_torch", "8bit": "adamw_8bit", "paged": "paged_adamw_8bit"}
# ROWSxTOKENS, rank, placement, offload, optimizer; then optionally `G` micro-batches per visit, `N`
# tokens of packed rows per micro-batch, `dropout`, `device` checkpoints.
MATRIX = {
    "e2b": """
        4x512 8 streamed none host G4
        4x1024 16 streamed down host G2
        1x2048 16 streamed none host
        4x2048 32 streamed down+o host G4
        2x2048 16 resident none paged
        1x4096 64 half none host
        2x4096 16 streamed all 8bit G2
        1x8192 16 streamed down+o host
        1x8192 128 resident none 8bit
        1x16384 16 streamed none host
        8x512 16 streamed none host G2 N2048 dropout
        1x2048 16 streamed none host device
    """,
    "e4b": """
        2x512 16 half none 8bit
        1x1024 8 streamed none host
        1x2048 16 streamed down host
        4x2048 16 streamed all host G4
        2x2048 64 resident none host G2
        1x4096 16 streamed down+o paged
        1x4096 32 half down host
        1x8192 16 streamed none host
        1x8192 16 streamed all 8bit
        1x16384 8 streamed down host
        4x1024 16 streamed down+o host N4096 dropout
    """,
    "12b": """
        2x512 16 streamed none host G2
        1x1024 8 streamed down+o host
        1x2048 16 streamed none host
        4x2048 16 streamed down+o host G4
        1x2048 16 half none host
        1x2048 32 resident none 8bit
        4x1024 16 streamed none paged G4
        1x2048 128 streamed none 8bit
        1x4096 16 streamed all host
        1x4096 64 streamed none host
        1x8192 16 streamed down host
        1x2048 16 streamed down paged dropout
    """,
    "31b": """
        1x512 16 streamed none host
        1x1024 16 streamed down host
        2x1024 8 half none host G2
        1x2048 16 streamed none host
        1x2048 16 streamed down+o 8bit
        1x2048 32 resident none paged
        1x1024 64 streamed none 8bit
        1x4096 16 streamed all host
        4x512 16 streamed down+o host G4
    """,
    "llama8b": """
        4x512 16 streamed none host G4
        1x1024 16 streamed down host
        1x2048 16 streamed none host
        4x2048 16 streamed down+o host G4
        1x2048 8 resident none 8bit
        2x2048 128 half none host
        1x4096 16 streamed all paged
        1x4096 32 half none host
        1x8192 16 streamed none host
        1x8192 16 streamed down+o 8bit
        1x16384 16 streamed all host
        4x512 16 streamed none host N2048 dropout
    """,
    "qwen14b": """
        1x512 16 streamed none host
        2x1024 16 streamed down host G2
        1x2048 16 streamed none host
        1x2048 16 half down+o host
        1x2048 16 resident none paged
        1x2048 64 streamed all 8bit
        4x2048 16 streamed down+o host G4
        1x4096 16 streamed none host
        1x4096 8 streamed all host
        1x8192 16 streamed down host
        1x1024 32 half none host device
    """,
}


@dataclass(frozen=True, kw_only=True)
class PeakCase:
    """A line of `MATRIX`."""

    name: str
    model: str
    placement: str
    bench: BenchCase
    is_held_back: bool


def matrix(models: list[str], stores: Path) -> Iterator[PeakCase]:
    for model in MATRIX:
        for number, line in enumerate(MATRIX[model].strip().splitlines()):
            words = line.split()
            case = parse_line(model, words, stores)
            held_back = number % HELD_BACK_EVERY == HELD_BACK_EVERY - 1
            if model in models:
                yield PeakCase(
                    name=case.name,
                    model=model,
                    placement=words[2],
                    bench=case,
                    is_held_back=held_back,
                )


def parse_line(model: str, words: list[str], stores: Path) -> BenchCase:
    shape, rank, _, offload, optimizer, *more = words
    rows, tokens = shape.split("x")
    per_visit = next((word[1:] for word in more if word[0] == "G"), "1")
    settings = [
        f"tokens={tokens}",
        f"rows={rows}",
        f"rank={rank}",
        f"lora_alpha={2 * int(rank)}",
        f"lora_dropout={0.05 if 'dropout' in more else 0}",
        f"optim={OPTIMIZERS[optimizer]}",
        f"offload={OFFLOADS[offload]}",
        f"checkpoints={'device' if 'device' in more else 'host'}",
        f"micro_batch_tokens={next((word[1:] for word in more if word[0] == 'N'), tokens)}",
        f"micro_batches_per_visit={per_visit}",
    ]
    steps = STEPS if int(rows) * int(tokens) <= SHORT_STEP_TOKENS else 2
    (case,) = make_cases(model, settings, [], timed_steps=steps, stores=stores)
    return dataclasses.replace(case, name=f"{model} {' '.join(words)}", warmup_steps=2)


def bound_plan(case: PeakCase, spec: ModelSpec, hardware: Hardware) -> tuple[Config, Plan]:
    """The plan of a case, with the smallest of the budgets that holds it."""
    config = read_config(None, case.bench.settings)
    work = build_workload(spec, config, max_length=int(config.data.max_length))
    slots = {
        "streamed": RING_SLOTS,
        "half": RING_SLOTS + work.num_layers // 2,
        "resident": slots_for_everything(work),
    }[case.placement]
    lengths = row_lengths(config, random_rows(spec, config), None)
    for budget_bytes in BUDGETS_BYTES:
        memory = dataclasses.replace(config.memory, layer_slots=slots, budget=budget_bytes)
        config = dataclasses.replace(config, memory=memory)
        plan = make_plan(spec, hardware, config, rows=lengths, is_prepared=True)
        if plan.fits:
            break
    else:
        raise ValueError(f"no budget is enough: {plan.peak_bytes} {plan.host_bytes} {plan.advice}")
    return config, plan


def measure(case: PeakCase, spec: ModelSpec, store: Store, hardware: Hardware) -> MeasuredPeak:
    config, plan = bound_plan(case, spec, hardware)
    rows = random_rows(spec, config)
    timing = time_plan(case.bench, spec, store, plan, (config, rows))
    assert hardware.rates is not None
    assert hardware.compute_capability is not None
    assert timing.reserved_peak_bytes is not None
    assert timing.allocated_peak_bytes is not None
    assert plan.tokens_per_second is not None
    return MeasuredPeak(
        case=case.name,
        model=case.model,
        tokens=plan.max_length,
        rows=rows.num_rows,
        rank=config.lora.r,
        lora_dropout=config.lora.lora_dropout,
        placement=case.placement,  # type: ignore[arg-type]
        offload=plan.offload,
        optim=config.train.optim,
        micro_batch_tokens=plan.micro_batch_tokens,
        micro_batches_per_visit=plan.micro_batches_per_visit,
        layer_slots=plan.layer_slots,
        mlp_tile_tokens=plan.mlp_tile_tokens,
        head_tile_tokens=plan.head_tile_tokens,
        checkpoints=plan.checkpoints,
        kernels=plan.kernels,
        compute_capability=hardware.compute_capability,
        budget_bytes=plan.budget_bytes,
        rates=hardware.rates,
        predicted_bytes=plan.peak_bytes,
        measured_bytes=timing.reserved_peak_bytes,
        allocated_bytes=timing.allocated_peak_bytes,
        predicted_tokens_per_second=plan.tokens_per_second,
        measured_tokens_per_second=timing.tokens_per_second(len(rows.input_ids)),
        used_for_tuning=not case.is_held_back,
        machine=hardware.name,
        versions=library_versions(),
        date=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
    )


def tell(row: MeasuredPeak, seconds: float, left_bytes: int) -> None:
    excess = row.predicted_bytes / row.measured_bytes - 1
    speed = row.measured_tokens_per_second / row.predicted_tokens_per_second - 1
    print(
        f"{row.case}: {format_bytes(row.measured_bytes)} reserved, "
        f"{format_bytes(row.allocated_bytes)} allocated, predicted {excess:+.1%}; "
        f"{row.measured_tokens_per_second:,.0f} tokens/s, {speed:+.1%} of the predicted; "
        f"{seconds:.1f} s, {format_bytes(left_bytes)} still reserved",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MATRIX), help="comma-separated")
    parser.add_argument("--seconds", type=float, default=290, help="begin no case after this")
    parser.add_argument("--output", type=Path, default=Path("tests/data/measured_peaks.jsonl"))
    parser.add_argument("--stores", type=Path, default=Path("/tmp/eightgig-bench"))
    options = parser.parse_args()
    began = time.monotonic()
    cases = list(matrix(options.models.split(","), options.stores.absolute()))
    known = (
        {row.case for row in read_measured_peaks(options.output)} if options.output.exists() else ()
    )
    cases = [case for case in cases if case.name not in known]
    hardware = with_measured_rates(probe("cuda", options.stores))
    print(f"{len(cases)} cases on {hardware.name}: {hardware.rates}", flush=True)
    spec: ModelSpec | None = None
    store: Store | None = None
    failed = 0
    for number, case in enumerate(cases):
        case_began = time.monotonic()
        if case_began - began > options.seconds - SECONDS_OF_A_CASE:
            print(f"{len(cases) - number} cases are left for another run", flush=True)
            break
        try:
            if spec is None or store is None or case.model != cases[number - 1].model:
                spec, store = case_spec(case.bench), prepare_random_store(case.bench)
            row = measure(case, spec, store, hardware)
            append_json_line(options.output, row)
        except Exception:  # noqa: BLE001 - one case that fails must not cost the others
            failed += 1
            print(f"{case.name}: failed", flush=True)
            traceback.print_exc()
            row = None
        gc.collect()
        torch.cuda.empty_cache()
        if row is not None:
            tell(row, time.monotonic() - case_began, torch.cuda.memory_reserved())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
