"""Where the time of an optimizer step goes: a profile of one step, by kind of work.

    python benchmarks/breakdown.py 12b-8x2048 [--budget 6.75GiB] [--set offload=none]

Kernels of the compute stream are told apart by name; those launched inside the head's pass count as
head. What is left of the step is waiting: for copies, for Python, for the optimizer. A row goes to
benchmarks/breakdown.jsonl, from which docs/benchmarks.md is written.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from eightgig.hardware.allocator import prepare_allocator

prepare_allocator()

import torch  # noqa: E402
from steps import add_case_options, commit, make_case  # noqa: E402

from eightgig.config import read_config  # noqa: E402
from eightgig.engine.assemble import assemble  # noqa: E402
from eightgig.hardware.calibrate import with_measured_rates  # noqa: E402
from eightgig.hardware.probe import probe  # noqa: E402
from eightgig.memory.fit import row_lengths  # noqa: E402
from eightgig.memory.plan import make_plan  # noqa: E402
from eightgig.memory.speed import (  # noqa: E402
    attention_flops_per_token,
    head_flops_per_loss_token,
    linear_flops_per_token,
)
from eightgig.memory.workload import build_workload  # noqa: E402
from eightgig.run import append_json_line  # noqa: E402
from eightgig.training.bench import prepare_random_store, random_rows, take_step  # noqa: E402
from eightgig.training.bench_cases import case_spec  # noqa: E402
from eightgig.training.identity import library_versions  # noqa: E402
from eightgig.training.optimizer import make_optimizer  # noqa: E402
from eightgig.training.step import make_schedule, prepare_step  # noqa: E402

# First match counts; names are those of eightgig's kernels, FlashAttention, cuBLAS and PyTorch.
KINDS = (
    ("dequantisation", r"_dequantize|^_place"),
    ("attention", r"flash|fmha|^_forward|^_backward_q|^_backward_kv|^_sum_splits"),
    ("GEMM", r"gemm|nvjet|cutlass|xmma|splitK|cublas"),
    ("norms and rotary", r"_norm"),
    ("gated activation", r"_glu"),
)
OTHER = "other elementwise work"
WARM_UP_STEPS = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", help="MODEL-ROWSxTOKENS, e.g. 12b-8x2048")
    add_case_options(parser, steps=1, output="breakdown.jsonl")
    options = parser.parse_args()
    case = make_case(options.case, options)
    spec, store = case_spec(case), prepare_random_store(case)
    config = read_config(None, case.settings)
    hardware = with_measured_rates(probe("cuda", options.stores))
    rows = random_rows(spec, config)
    plan = make_plan(spec, hardware, config, rows=row_lengths(config, rows, None), is_prepared=True)
    engine = assemble(spec, store, plan, config.lora, seed=0)
    assert engine.adapter is not None
    assert engine.gradients is not None
    assert hardware.rates is not None
    optimizer = make_optimizer(engine.adapter, engine.gradients, config.train)
    schedule = make_schedule(config, rows, plan.micro_batch_tokens)

    def step(number: int) -> float:
        prepared = prepare_step(engine, schedule.batches(number), step=number, seed=None)
        start_seconds = time.perf_counter()
        take_step(engine, optimizer, prepared)
        torch.cuda.synchronize()
        return time.perf_counter() - start_seconds

    for number in range(1, WARM_UP_STEPS + 1):
        step(number)
    unprofiled = step(WARM_UP_STEPS + 1)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profile:
        profiled = step(WARM_UP_STEPS + 2)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    kinds, busy_seconds = work_by_kind(events)
    work = build_workload(spec, config, max_length=plan.max_length)
    tokens = len(rows.input_ids)
    flops = tokens * (
        linear_flops_per_token(work)
        + attention_flops_per_token(work, plan.max_length)
        + head_flops_per_loss_token(work)
    )
    row = {
        "case": options.case,
        "model": spec.name,
        "step_seconds": unprofiled,
        "profiled_step_seconds": profiled,
        "waiting_seconds": profiled - busy_seconds,
        "seconds_by_kind": kinds,
        "limit_seconds": flops / hardware.rates.gemm_flops_per_second,
        "gemm_flops_per_second": hardware.rates.gemm_flops_per_second,
        "offload": "+".join(plan.offload) or "none",
        "machine": hardware.name,
        "versions": library_versions(),
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "commit": commit(),
    }
    append_json_line(options.output, row)
    print(json.dumps(row))
    optimizer.finish()
    engine.close()
    return 0


def work_by_kind(events: list[dict[str, Any]]) -> tuple[dict[str, float], float]:
    """Seconds of kernels on the stream that works most, by kind and in all."""
    heads = [
        (event["tid"], event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "user_annotation" and event["name"] == "head"
    ]
    launched = {
        event["args"]["correlation"]: (event["tid"], event["ts"])
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event["args"]
    }
    kernels = [event for event in events if event.get("cat") == "kernel"]
    streams = Counter[int]()
    for event in kernels:
        streams[event["args"]["stream"]] += event["dur"]
    ((stream, _),) = streams.most_common(1)
    kinds = Counter[str]()
    for event in kernels:
        if event["args"]["stream"] != stream:
            continue
        thread, at = launched.get(event["args"]["correlation"], (None, 0.0))
        in_head = any(thread == tid and start <= at <= end for tid, start, end in heads)
        kinds["head" if in_head else kind_of(event["name"])] += event["dur"]
    copies = [
        event
        for event in events
        if event.get("cat") in ("gpu_memcpy", "gpu_memset") and event["args"]["stream"] == stream
    ]
    kinds["copies on the device"] += sum(event["dur"] for event in copies)
    seconds = {name: micros / 1e6 for name, micros in kinds.most_common()}
    return seconds, sum(seconds.values())


def kind_of(kernel: str) -> str:
    for kind, pattern in KINDS:
        if re.search(pattern, kernel, re.IGNORECASE):
            return kind
    return OTHER


if __name__ == "__main__":
    sys.exit(main())
