"""An optimizer step happens whole, also where memory runs out in the middle of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from eightgig.training import optimizer
from eightgig.training.optimizer import Optimizer
from tests import jobs

FAMILY = "gemma4_e2b"
OPTIMS = ("adamw_torch", "adamw_8bit")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.make_base(tmp_path_factory.mktemp("models") / "model", FAMILY)


class Bench:
    """An optimizer with random gradients."""

    def __init__(self, base: Path, folder: Path, optim: str) -> None:
        self.job = jobs.make_job(jobs.make_config(base, folder, optim=optim, weight_decay=0.1))
        self.optimizer: Optimizer = self.job.start.optimizer

    def fill(self, seed: int) -> None:
        gradients = self.job.engine.gradients
        assert gradients is not None
        gradients.begin_step()
        gradients.whole.normal_(generator=torch.Generator().manual_seed(seed))

    def step(self, seed: int) -> None:
        self.fill(seed)
        self.optimizer.start_step(1e-2, 0.5)
        self.optimizer.finish()

    def numbers(self) -> dict[str, torch.Tensor]:
        tensors = {**self.optimizer.state_tensors(), "adapter": jobs.adapter_of(self.job)}
        assert self.job.engine.adapter is not None
        tensors["compute"] = torch.cat(self.job.engine.adapter.compute)
        return {name: tensor.clone() for name, tensor in tensors.items()}


def _assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("optim", OPTIMS)
def test_moments_exist_before_the_first_step(base: Path, tmp_path: Path, optim: str) -> None:
    bench = Bench(base, tmp_path, optim)
    before = bench.numbers()
    places = {name: t.data_ptr() for name, t in bench.optimizer.state_tensors().items()}
    bench.step(1)
    after = bench.numbers()
    assert before.keys() == after.keys()
    assert len(places) > 2
    assert not torch.equal(before["adapter"], after["adapter"])


def test_moments_made_beforehand_are_torchs_own(base: Path, tmp_path: Path) -> None:
    bench = Bench(base, tmp_path, "adamw_torch")
    theirs = jobs.adapter_of(bench.job).requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, fused=True)
    gradients = bench.job.engine.gradients
    assert gradients is not None
    for seed in (1, 2, 3):
        bench.fill(seed)
        theirs.grad = gradients.whole * 0.5
        optimizer.step()
        bench.optimizer.start_step(1e-2, 0.5)
        bench.optimizer.finish()
    assert torch.equal(jobs.adapter_of(bench.job), theirs.detach())


@pytest.mark.parametrize("optim", OPTIMS)
def test_after_a_reset_nothing_is_remembered(base: Path, tmp_path: Path, optim: str) -> None:
    bench = Bench(base, tmp_path / "one", optim)
    start = bench.numbers()
    bench.step(1)
    bench.step(2)
    bench.optimizer.reset()
    assert bench.job.engine.adapter is not None
    bench.job.engine.adapter.whole.copy_(start["adapter"])
    bench.job.engine.adapter.refresh_all()
    _assert_same(bench.numbers(), start)
    bench.step(3)
    other = Bench(base, tmp_path / "other", optim)
    other.step(3)
    _assert_same(bench.numbers(), other.numbers())


@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("call", [1, 2])
def test_memory_that_runs_out_within_a_step_costs_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optim: str, call: int
) -> None:
    whole = Bench(base, tmp_path / "whole", optim)
    for seed in (1, 2):
        whole.step(seed)
    bench = Bench(base, tmp_path / "bench", optim)
    bench.step(1)
    bench.fill(2)
    inner: Any = bench.optimizer._optimizer
    real, calls = inner.step, []

    def failing() -> None:
        calls.append(1)
        if len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        real()

    monkeypatch.setattr(inner, "step", failing)
    with pytest.raises(torch.OutOfMemoryError):
        bench.optimizer.start_step(1e-2, 0.5)
        bench.optimizer.finish()
    bench.optimizer.finish()
    _assert_same(bench.numbers(), whole.numbers())


def test_who_waits_for_gradients_hears_of_it_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(base, tmp_path, "adamw_torch")
    bench.fill(1)
    inner: Any = bench.optimizer._optimizer
    real, calls = inner.step, []

    def failing() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        real()

    monkeypatch.setattr(inner, "step", failing)
    gradients = bench.job.engine.gradients
    assert gradients is not None
    bench.optimizer.start_step(1e-2, 1.0)
    before = gradients.whole.clone()
    with pytest.raises(torch.OutOfMemoryError):
        gradients.begin_step()
    assert torch.equal(gradients.whole, before), "what is left of the step needs them"
    bench.optimizer.finish()
    gradients.begin_step()
    assert not gradients.whole.any()


def test_beside_a_gpu_adamw_leaves_processors_to_the_thread_that_feeds_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Bench(base, tmp_path, "adamw_torch").job
    adapter, gradients = job.engine.adapter, job.engine.gradients
    assert adapter is not None
    assert gradients is not None
    gradients.device = torch.device("cuda")
    monkeypatch.setattr(optimizer, "optimizer_threads", lambda: torch.get_num_threads() + 1)
    made = optimizer.HostAdamW(adapter, gradients, job.config.train)
    assert made._thread.submit(torch.get_num_threads).result() == torch.get_num_threads() + 1
