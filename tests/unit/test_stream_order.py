"""Copies and AdamW run beside the computation, and whatever they share is in an order.

The parts of the engine that use streams run on a CPU here, with `tests.streams` in place of CUDA.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from eightgig.engine.checkpoints import HostWaiting
from eightgig.engine.gradients import _CopyLane
from eightgig.streaming.ring import _CudaLane
from eightgig.training.loop import Job
from eightgig.training.step import make_schedule, prepare_step, run_step
from tests import jobs
from tests.streams import Watch, watched

CPU = torch.device("cpu")
# Fewer slots than layers, two visits a step, tiles, and everything that waits for the backward.
PLAN = {
    "layer_slots": 3,
    "micro_batches_per_visit": 2,
    "mlp_tile_tokens": 16,
    "head_chunk_rows": 64,
    "offload": ("attention", "o_proj", "down_proj"),
}
SMALL_BYTES = 100  # so that buffers have to grow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.make_base(tmp_path_factory.mktemp("models") / "model")


def make_job(base: Path, folder: Path) -> Job:
    options = {"gradient_accumulation_steps": 5, "max_steps": 2}
    return jobs.make_job(jobs.make_config(base, folder, **options), plan=PLAN)


def use_streams(job: Job) -> None:
    """Lanes as on a GPU, in the order side 1 (weights), 2 and 3 (bundles), 4 (gradients)."""
    model, gradients = job.engine.model, job.engine.gradients
    assert gradients is not None
    model.ring._lane = _CudaLane(CPU)
    model._waiting = HostWaiting(CPU, model.meter, expected_bytes=1 << 20, buffer_bytes=SMALL_BYTES)
    gradients._lane = _CopyLane(CPU, max(run.numel() for run in gradients.sums))


def train(job: Job) -> tuple[list[float], Tensor]:
    """Two steps, and the loss between them."""
    engine, optimizer = job.engine, job.start.optimizer
    schedule = make_schedule(job.config, job.rows, job.plan.micro_batch_tokens)
    losses = []
    for step in (1, 2):
        prepared = prepare_step(engine, schedule.batches(step), step=step, seed=None)
        losses.append(run_step(engine, prepared)[0])
        optimizer.start_step(1e-3, 0.5)
        engine.model.ring.invalidate_changing()
        if step == 1:
            inputs = [engine.model.embedding.prepare(batch).result() for batch in prepared.batches]
            losses.append(float(engine.model.losses(inputs).total))
    optimizer.finish()
    adapter = jobs.adapter_of(job)
    engine.close()
    return losses, adapter


def train_on_streams(base: Path, folder: Path) -> tuple[list[float], Tensor]:
    job = make_job(base, folder)
    use_streams(job)
    return train(job)


@pytest.mark.parametrize("is_pinned", [True, False], ids=["pinned", "pageable"])
def test_nothing_is_touched_out_of_order_and_nothing_is_another_number(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_pinned: bool
) -> None:
    losses, adapter = train(make_job(base, tmp_path / "plain"))
    with watched(monkeypatch, is_pinned=is_pinned) as watch:
        same_losses, same_adapter = train_on_streams(base, tmp_path / "streams")
    assert watch.races == []
    assert same_losses == losses
    assert torch.equal(same_adapter, adapter)


@pytest.mark.parametrize(
    ("waiting", "other"),
    [
        ("side 1", "compute"),
        ("compute", "side 3"),
        ("compute", "side 4"),
    ],
)
def test_a_wait_that_is_left_out_is_seen(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waiting: str, other: str
) -> None:
    with watched(monkeypatch) as watch:
        watch.forgets = lambda *pair: pair == (waiting, other)
        train_on_streams(base, tmp_path)
    assert _names(watch) >= {waiting, other}


def _names(watch: Watch) -> set[str]:
    """Streams of the races."""
    return {part.rsplit(" on ", 1)[1] for race in watch.races for part in race.split(", ")}
