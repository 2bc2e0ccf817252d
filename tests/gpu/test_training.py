"""Trial and detours on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from eightgig.engine.assemble import Engine
from eightgig.engine.decoder import DecoderLayer
from eightgig.memory import ladder
from eightgig.training import memory, trial, worker
from eightgig.training.worker import Worker
from tests import jobs

pytestmark = pytest.mark.gpu

FAMILY = "gemma4_e2b"
PLAN = {
    "device": "cuda",
    "budget_bytes": 4 << 30,
    "peak_bytes": 4 << 30,
    "layer_slots": 4,
    "micro_batch_tokens": 160,
    "micro_batches_per_visit": 2,
    "max_length": 80,
    "host_weights": "pinned",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.make_base(tmp_path_factory.mktemp("models") / "model", FAMILY)


def _job(base: Path, folder: Path, *, plan: dict[str, Any], **options: Any) -> Any:
    config = jobs.make_config(base, folder, **options)
    rows = jobs.make_rows(60, shortest=40)
    return jobs.make_job(config, rows=rows, held_out=jobs.make_rows(5, seed=3), plan=plan)


@pytest.mark.parametrize(
    ("dtype", "kernels"),
    [("float32", "plain"), ("bfloat16", "plain"), ("bfloat16", "triton")],
)
@pytest.mark.parametrize("optim", ["adamw_torch", "paged_adamw_8bit"])
def test_a_trial_finds_nothing_and_leaves_nothing(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    optim: str,
    kernels: str,
) -> None:
    monkeypatch.setattr(trial, "MIN_SECONDS", 15.0)
    place = "host" if optim == "adamw_torch" else "device"
    plan = {**PLAN, "compute_dtype": dtype, "kernels": kernels, "optimizer_place": place}
    job = _job(base, tmp_path, plan=plan, optim=optim, lora={"r": 16, "lora_dropout": 0.1})
    before = jobs.adapter_of(job)
    doing = Worker(job, say=lambda *_: None, between=lambda: None)
    result, findings = trial.run_trial(job, doing, num_evaluations=2)
    assert findings == ()
    assert result.loss_after < result.loss_before
    assert result.vram_peak_bytes > 0
    assert result.gradients_checked > 0
    assert torch.equal(jobs.adapter_of(job), before)
    doing.close()


@pytest.mark.parametrize("rung", ["_slots", "_checkpoints"])
def test_residency_and_host_rungs_keep_every_bit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rung: str
) -> None:
    found: list[torch.Tensor] = []
    real_step, real_backward, calls = worker.run_step, DecoderLayer.backward, []

    def kept(engine: Engine, *arguments: Any) -> Any:
        result = real_step(engine, *arguments)
        assert engine.gradients is not None
        torch.cuda.synchronize()
        found.append(engine.gradients.whole.clone())
        return result

    def failing(self: DecoderLayer, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real_backward(self, *arguments)

    monkeypatch.setattr(worker, "run_step", kept)
    monkeypatch.setattr(memory, "next_rung", getattr(ladder, rung))
    plan = {**PLAN, "compute_dtype": "bfloat16"}
    jobs.finish(_job(base, tmp_path / "whole", plan=plan, max_steps=1))
    monkeypatch.setattr(DecoderLayer, "backward", failing)
    seen: list[object] = []
    jobs.finish(_job(base, tmp_path / "lower", plan=plan, max_steps=1), seen.append)
    assert len(jobs.events(seen, "oom")) == 1
    assert torch.equal(found[1], found[0])
