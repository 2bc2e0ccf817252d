"""Python's time for a visit of a layer; appends rows to benchmarks/visits.jsonl.

    python benchmarks/visits.py 12b-1x128 e2b-1x128 --budget 40GiB --set offload=none

A case is MODEL-1xTOKENS. What is timed is the calling thread: the loop over the layers forward,
and backward, from its beginning until its last launch is queued, over the number of layers. Give
few tokens, so that the device is never waited for; for the optimizer the thread waits between two
steps. Opening the weights, and starting the copies of the ring, of what waits for the backward pass
and of gradients, is part of a visit.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from eightgig.hardware.allocator import prepare_allocator

prepare_allocator()

import torch  # noqa: E402
from steps import add_case_options, make_case  # noqa: E402

from eightgig.config import read_config  # noqa: E402
from eightgig.engine.assemble import Engine, assemble  # noqa: E402
from eightgig.hardware.calibrate import with_measured_rates  # noqa: E402
from eightgig.hardware.probe import probe  # noqa: E402
from eightgig.memory.fit import row_lengths  # noqa: E402
from eightgig.memory.plan import make_plan  # noqa: E402
from eightgig.run import append_json_line  # noqa: E402
from eightgig.training.bench import prepare_random_store, random_rows, take_step  # noqa: E402
from eightgig.training.bench_cases import BenchCase, case_spec  # noqa: E402
from eightgig.training.identity import library_versions  # noqa: E402
from eightgig.training.optimizer import make_optimizer  # noqa: E402
from eightgig.training.step import make_schedule, prepare_step  # noqa: E402

WARM_UP_STEPS = 5


class Clock:
    """Times the parts of a step in a model, by standing before three of its methods.

    Attributes:
        forward, backward: Seconds of each step.
    """

    def __init__(self, engine: Engine) -> None:
        self.forward: list[float] = []
        self.backward: list[float] = []
        self._model: Any = engine.model
        self._began_backward = 0.0
        self._stand_before("_forward", self._time_forward)
        self._stand_before("_head_pass", self._time_head)
        self._stand_before("_group", self._time_group)

    def _stand_before(self, name: str, timed: Any) -> None:
        real = getattr(self._model, name)
        setattr(self._model, name, lambda *args, **options: timed(real, *args, **options))

    def _time_forward(self, real: Any, *args: Any, **options: Any) -> None:
        began = time.perf_counter()
        real(*args, **options)
        self.forward.append(time.perf_counter() - began)

    def _time_head(self, real: Any, *args: Any, **options: Any) -> Any:
        result = real(*args, **options)
        torch.cuda.synchronize()
        self._began_backward = time.perf_counter()
        return result

    def _time_group(self, real: Any, *args: Any) -> Any:
        torch.cuda.synchronize()
        result = real(*args)
        self.backward.append(time.perf_counter() - self._began_backward)
        return result


def measure(case: BenchCase, steps: int) -> dict[str, Any]:
    spec, store = case_spec(case), prepare_random_store(case)
    config = read_config(None, case.settings)
    hardware = with_measured_rates(probe(config.memory.device, Path(case.stores)))
    rows = random_rows(spec, config)
    plan = make_plan(spec, hardware, config, rows=row_lengths(config, rows, None), is_prepared=True)
    engine = assemble(spec, store, plan, config.lora, seed=config.train.seed)
    assert engine.adapter is not None
    assert engine.gradients is not None
    optimizer = make_optimizer(engine.adapter, engine.gradients, config.train)
    schedule = make_schedule(config, rows, plan.micro_batch_tokens)
    assert len(schedule.batches(1)) == 1, "a visit is timed with one micro-batch"
    clock = Clock(engine)
    for step in range(1, WARM_UP_STEPS + steps + 1):
        prepared = prepare_step(engine, schedule.batches(step), step=step, seed=None)
        take_step(engine, optimizer, prepared)
        optimizer.finish()
    engine.close()
    assert hardware.rates is not None
    layers = spec.decoder.num_layers
    return {
        "case": case.name,
        "layers": layers,
        "micro_batches": plan.micro_batches_per_visit,
        "layer_slots": plan.layer_slots,
        "checkpoints": plan.checkpoints,
        "forward_us": microseconds(clock.forward[WARM_UP_STEPS:], layers),
        "backward_us": microseconds(clock.backward[WARM_UP_STEPS:], layers),
        "launch_us": round(1e6 * hardware.rates.launch_seconds, 2),
        "steps": steps,
        "machine": hardware.name,
        "versions": library_versions(),
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "commit": case.commit,
    }


def microseconds(seconds: list[float], layers: int) -> float:
    return round(1e6 * statistics.median(seconds) / layers, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+", help="MODEL-1xTOKENS, e.g. 12b-1x128")
    add_case_options(parser, steps=20, output="visits.jsonl", budget="40GiB")
    options = parser.parse_args()
    for name in options.cases:
        row = measure(make_case(name, options), options.steps)
        append_json_line(options.output, row)
        print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
