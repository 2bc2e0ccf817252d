"""Trainings on a card that another process fills in mid-run: `cudaMalloc` itself fails.

    python -m tests.gpu.neighbour --runs 24 --output neighbour.jsonl

E2B's true shape with random weights, all layers resident, rows of one length until some six times
as long come late in the run. A second process takes all that is free on the card before they do, so
that there is no memory for them as planned. The run must go on some rungs further down, with the
losses that runs without a neighbour have.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eightgig.hardware.allocator import prepare_allocator

prepare_allocator()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from eightgig.config import Config, read_config  # noqa: E402
from eightgig.data.batches import Dataset  # noqa: E402
from eightgig.errors import EightgigError  # noqa: E402
from eightgig.hardware.calibrate import with_measured_rates  # noqa: E402
from eightgig.hardware.probe import probe  # noqa: E402
from eightgig.memory.fit import row_lengths  # noqa: E402
from eightgig.memory.ladder import next_rung  # noqa: E402
from eightgig.memory.plan import Plan, make_plan  # noqa: E402
from eightgig.models.spec import ModelSpec  # noqa: E402
from eightgig.quant.store import Store  # noqa: E402
from eightgig.run import append_json_line  # noqa: E402
from eightgig.training.bench import prepare_random_store  # noqa: E402
from eightgig.training.bench_cases import case_spec, make_cases  # noqa: E402
from eightgig.training.identity import library_versions  # noqa: E402
from eightgig.training.loop import train  # noqa: E402
from eightgig.training.step import make_schedule  # noqa: E402
from tests import jobs  # noqa: E402

SHORT, LONG, ROWS, LONG_ROWS = 256, 1536, 40, 4
STEPS, ROWS_PER_STEP = 10, 4
_FIRST_LONG_STEP = 6
_MIB = 1 << 20
_NOTHING = -1
# What a struck run may differ by, in the largest difference between undisturbed runs: both are
# draws of rounding noise, and one that came late may be the larger by chance.
_NOISE_FACTOR = 3.0

_CODE = """
import sys, torch
held = []
torch.cuda.init()
print("ready", flush=True)
for line in sys.stdin:
    left = int(line)
    held.clear()
    torch.cuda.empty_cache()
    while left >= 0:
        size = torch.cuda.mem_get_info()[0] - left
        if size < (2 << 20):
            break
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            left += 8 << 20
    print(sum(map(len, held)), flush=True)
"""


class Neighbour:
    """A process that fills the card on request."""

    def __enter__(self) -> Neighbour:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def take(self, left_bytes: int) -> int:
        """Take all but `left_bytes` of what is free; give all back for `_NOTHING`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{left_bytes}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every run has in common."""

    config: Config
    spec: ModelSpec
    store: Store
    rows: Dataset
    plan: Plan
    first_long_step: int


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run ended.

    Attributes:
        losses: Of each step.
        seconds: When each step was done, from the end of the first.
        rungs: What was given up, by step.
        error: What ended the run before its last step.
    """

    losses: Sequence[float]
    seconds: Sequence[float]
    rungs: Sequence[Any]
    error: str


def make_setting(folder: Path, *, model: str = "e2b", device: str = "cuda") -> Setting:
    """Shape, random weights, rows and plan."""
    settings = [
        f"tokens={LONG}", f"rows={ROWS_PER_STEP}", "rank=16", "lora_dropout=0.05",
        "budget=6.75GiB", "layer_slots=35", "checkpoints=device", "offload=none",
        f"micro_batches_per_visit={ROWS_PER_STEP}", f"device={device}", "packing=false",
        f"max_steps={STEPS}",
        "learning_rate=2e-4", "trial=false", "eval_steps=0", "save_steps=0", "save_minutes=0",
        f"output_dir={folder}",
    ]  # fmt: skip
    (case,) = make_cases(model, settings, [], timed_steps=1, stores=folder / "stores")
    spec, store = case_spec(case), prepare_random_store(case)
    config = read_config(None, case.settings)
    rows = _rows(spec)
    for seed in itertools.count():
        config = replace(config, train=replace(config.train, seed=seed))
        first = _first_long_step(config, rows)
        if first >= _FIRST_LONG_STEP:
            break
    hardware = with_measured_rates(probe(config.memory.device, folder))
    measured = row_lengths(config, rows, None)
    plan = make_plan(spec, hardware, config, rows=measured, is_prepared=True)
    return Setting(
        config=config, spec=spec, store=store, rows=rows, plan=plan, first_long_step=first
    )


def _rows(spec: ModelSpec) -> Dataset:
    rng = np.random.default_rng(1)
    lengths = np.full(ROWS, SHORT)
    lengths[:LONG_ROWS] = LONG
    rows = [
        np.resize(rng.integers(300, spec.decoder.vocab_size, jobs.PERIOD), length)
        for length in lengths
    ]
    ids = np.concatenate(rows).astype(np.int32)
    return Dataset(
        input_ids=ids,
        labels=ids,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        row_ids=np.arange(ROWS, dtype=np.int64),
        fingerprint="rows with a neighbour",
        summary={},
    )


def _first_long_step(config: Config, rows: Dataset) -> int:
    schedule = make_schedule(config, rows, LONG)
    return next(
        step
        for step in range(1, STEPS + 1)
        if max(batch.num_tokens for batch in schedule.batches(step)) == LONG
    )


def run(
    setting: Setting,
    name: str,
    *,
    plan: Plan | None = None,
    strike: tuple[Neighbour, float, int] | None = None,
) -> Ended:
    """Train to the end.

    Args:
        setting: What all runs have in common.
        name: Of the run folder.
        plan: Another layout.
        strike: Who comes, how many seconds after the first step, and what it leaves, in bytes.
    """
    config = replace(setting.config, run=replace(setting.config.run, name=name))
    job = jobs.assemble_job(
        config,
        (setting.spec, setting.store),
        plan or setting.plan,
        (setting.rows, None),
    )
    seen: list[Any] = []
    losses, seconds, error = [], [], ""
    timer, began = None, 0.0
    try:
        for report in train(job, seen.append):
            if report.step == 1:
                began = time.monotonic()
                if strike is not None:
                    neighbour, delay, left_bytes = strike
                    timer = threading.Timer(delay, neighbour.take, [left_bytes])
                    timer.start()
            losses.append(report.loss)
            seconds.append(time.monotonic() - began)
    except EightgigError as ended:
        error = str(ended)
    finally:
        if timer is not None:
            timer.join()
        job.engine.close()
    rungs = [dict(event) for event in jobs.events(seen, "oom")]
    return Ended(losses=losses, seconds=seconds, rungs=rungs, error=error)


def lowered(plan: Plan, rungs: int) -> Plan:
    """The layout so many rungs further down."""
    for _ in range(rungs):
        lower = next_rung(plan)
        assert lower is not None, f"the ladder of {plan} has fewer than {rungs} rungs"
        plan = lower[0]
    return plan


def noise_of(runs: Sequence[Ended]) -> float:
    """Largest difference of a step's loss between any two."""
    pairs = itertools.combinations(runs, 2)
    return max(difference(one, other) for one, other in pairs)


def difference(one: Ended, other: Ended) -> float:
    """Largest difference of a step's loss."""
    return float(np.abs(np.subtract(one.losses, other.losses)).max())


def trials(
    setting: Setting, neighbour: Neighbour, count: int, *, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Undisturbed runs, then struck ones, each of which yields a row; see the module."""
    undisturbed = [run(setting, f"alone-{number}") for number in range(2)]
    noises: dict[int, float] = {}
    span_seconds = undisturbed[1].seconds[setting.first_long_step - 2]
    rng = random.Random(seed)
    for number in range(count):
        delay, left_bytes = rng.uniform(0, 0.9 * span_seconds), rng.randrange(8, 128) * _MIB
        ended = run(setting, f"struck-{number}", strike=(neighbour, delay, left_bytes))
        neighbour.take(_NOTHING)
        rungs = len(ended.rungs)
        if rungs not in noises:
            # All the way where the struck run came to: rounding differs from layout to layout.
            below = run(setting, f"alone-{rungs}-down", plan=lowered(setting.plan, rungs))
            noises[rungs] = noise_of([*undisturbed, below])
        is_whole = not ended.error and len(ended.losses) == STEPS
        apart = difference(ended, undisturbed[0]) if is_whole else None
        yield {
            "struck_after_seconds": delay,
            "left_bytes": left_bytes,
            "out_of_memory": rungs,
            "given_up": [_given_up(rung) for rung in ended.rungs],
            "largest_difference": apart,
            "noise": noises[rungs],
            "error": ended.error,
            "passed": apart is not None and apart <= max(_NOISE_FACTOR * noises[rungs], 1e-6),
            "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "versions": library_versions(),
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        }


def _given_up(rung: dict[str, str]) -> str:
    (name,) = rung.keys() - {"cause", "before"}
    return f"{name} {rung['before']} -> {rung[name]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    has_failed = False
    with tempfile.TemporaryDirectory() as folder, Neighbour() as neighbour:
        setting = make_setting(Path(folder))
        for row in trials(setting, neighbour, options.runs, seed=options.seed):
            append_json_line(options.output, row)
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
            has_failed |= not row["passed"]
    return 1 if has_failed else 0


if __name__ == "__main__":
    sys.exit(main())
