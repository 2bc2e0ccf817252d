"""Stopping: the visit under way is finished, the step before is saved, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from eightgig.engine.model import Model
from eightgig.evaluation.loss import HeldOutLoss
from eightgig.training import loop, monitor, trial
from eightgig.training.checkpoint import read_checkpoint
from eightgig.training.save import SaveFailure
from tests import jobs

FAMILY = "llama"
STEPS = 5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.make_base(tmp_path_factory.mktemp("models") / "model", FAMILY)


def _config(base: Path, folder: Path, **options: Any) -> Any:
    run = {"save_epochs": False, "save_minutes": 0.0, **options.pop("run", {})}
    lora = {"lora_dropout": 0.1}
    return jobs.make_config(base, folder, max_steps=STEPS, run=run, lora=lora, **options)


def _job(config: Any, **options: Any) -> loop.Job:
    """Every row is a visit of its own: 6 a step, 8 an evaluation."""
    plan = {"micro_batch_tokens": 17}
    return jobs.make_job(config, held_out=jobs.make_rows(8, seed=4), plan=plan, **options)


def _signal_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> list[int]:
    """Sends SIGTERM in the middle of a call; returns the numbers of all calls."""
    real, calls = getattr(owner, name), []

    def wrapped(*arguments: Any, **options: Any) -> Any:
        calls.append(len(calls) + 1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, wrapped)
    return calls


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, list[Any]]:
    seen: list[object] = []
    job = _job(_config(base, tmp_path_factory.mktemp("whole"), early_stopping_patience=5))
    jobs.finish(job, seen.append)
    return jobs.adapter_of(job), jobs.events(seen, "eval")


def _finish_in_parts(config: Any) -> tuple[torch.Tensor, list[list[int]], list[Any]]:
    """Adapter, steps of each part, and evaluations of a run that is stopped and goes on."""
    parts: list[list[int]] = []
    evaluations: list[Any] = []
    for _ in range(4):
        seen: list[object] = []
        steps: list[int] = []
        job = _job(config, resume=bool(parts))
        try:
            steps.extend(report.step for report in loop.train(job, seen.append))
        except KeyboardInterrupt:
            parts.append(steps)
            evaluations += jobs.events(seen, "eval")
            continue
        parts.append(steps)
        return jobs.adapter_of(job), parts, evaluations + jobs.events(seen, "eval")
    raise AssertionError(f"never finished: {parts}")


def _losses(evaluations: list[Any]) -> list[float]:
    return [values["held_out_loss"] for values in evaluations]


@pytest.mark.parametrize(
    ("call", "done"),
    [
        pytest.param(1, [], id="in the first visit"),
        pytest.param(13, [1, 2], id="in the first visit of a step"),
        pytest.param(16, [1, 2], id="in the middle of a step"),
        pytest.param(18, [1, 2, 3], id="in the last visit of a step"),
    ],
)
def test_a_stop_waits_for_the_visit_and_not_for_the_step(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: Any,
    call: int,
    done: list[int],
) -> None:
    config = _config(base, tmp_path, early_stopping_patience=5)
    calls = _signal_at(monkeypatch, Model, "gradients", call)
    job, steps = _job(config), list[int]()
    with pytest.raises(KeyboardInterrupt):
        for report in loop.train(job, lambda _: None):
            steps.append(report.step)
    assert steps == done
    assert len(calls) == call, "no further visit is begun"
    saved = sorted(path.name for path in job.run.checkpoints_path.glob("step-*"))
    assert saved[-1:] == ([f"step-{done[-1]:06d}"] if done else [])
    stop = [line for line in job.run.events_path.read_text().splitlines() if '"stop"' in line]
    assert json.loads(stop[-1])["values"] == {"signal": "SIGTERM"}
    monkeypatch.undo()
    again = _job(config, resume=True)
    assert [report.step for report in jobs.finish(again)] == list(range(len(done) + 1, STEPS + 1))
    assert torch.equal(jobs.adapter_of(again), whole[0])


@pytest.mark.parametrize("call", [4, 20])
def test_an_evaluation_that_was_left_is_done_when_the_run_goes_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Any, call: int
) -> None:
    _signal_at(monkeypatch, Model, "losses", call)
    config = _config(base, tmp_path, early_stopping_patience=5)
    adapter, parts, evaluations = _finish_in_parts(config)
    assert len(parts) == 2
    assert [step for part in parts for step in part] == list(range(1, STEPS + 1))
    assert _losses(evaluations) == _losses(whole[1])
    assert torch.equal(adapter, whole[0])


def test_a_stop_in_the_trial_leaves_a_run_to_be_begun(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Any
) -> None:
    monkeypatch.setattr(trial, "_CHECKS_RATIO", 0.0)
    _signal_at(monkeypatch, Model, "gradients", 5)
    config = _config(base, tmp_path, early_stopping_patience=5, trial=True)
    adapter, parts, _ = _finish_in_parts(config)
    assert parts == [[], list(range(1, STEPS + 1))]
    assert torch.equal(adapter, whole[0])


def test_a_saved_step_is_not_saved_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _signal_at(monkeypatch, Model, "gradients", 16)
    seen: list[object] = []
    job = _job(_config(base, tmp_path, run={"save_steps": 2}))
    with pytest.raises(KeyboardInterrupt):
        jobs.finish(job, seen.append)
    assert [values["path"] for values in jobs.events(seen, "save")] == ["step-000002"]


# Clocks


class Leaping:
    """The `time` module of a machine that sleeps for hours and whose clock is set."""

    def __init__(self) -> None:
        self._calls = 0

    def time(self) -> float:
        self._calls += 1
        return time.time() + (self._calls % 3 - 1) * 86_400.0

    def monotonic(self) -> float:
        self._calls += 1
        return time.monotonic() + 28_800.0 * (self._calls // 40)

    def perf_counter(self) -> float:
        self._calls += 1
        return time.perf_counter() + 28_800.0 * (self._calls // 15)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def test_hibernation_and_a_clock_that_is_set_change_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Any
) -> None:
    leaping = Leaping()
    for module in (loop, monitor):
        monkeypatch.setattr(module, "time", leaping)
    seen: list[object] = []
    job = _job(_config(base, tmp_path, early_stopping_patience=5, run={"save_minutes": 10.0}))
    assert len(jobs.finish(job, seen.append)) == STEPS
    assert {code for code in jobs.codes(seen) if code != "guard.first_loss"} == set()
    assert torch.equal(jobs.adapter_of(job), whole[0])


def test_a_pause_for_a_hot_gpu_changes_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Any
) -> None:
    readings = [60, 95, 60]
    monkeypatch.setattr(loop, "HeatGuard", _quick_guard(readings))
    seen: list[object] = []
    config = _config(base, tmp_path, early_stopping_patience=5, run={"pause_above_celsius": 80})
    job = _job(config)
    reports = jobs.finish(job, seen.append)
    paused = jobs.events(seen, "pause")
    assert [set(values) for values in paused] == [
        {"gpu_celsius", "until_celsius"},
        {"ended_after_seconds"},
    ]
    assert paused[1]["ended_after_seconds"] >= 1.0
    # A pause is no slow step.
    assert max(report.seconds for report in reports) < sum(r.seconds for r in reports)
    assert torch.equal(jobs.adapter_of(job), whole[0])


def _quick_guard(readings: list[int]) -> Any:
    from eightgig.training import heat

    class Quick(heat.HeatGuard):
        def __init__(self, limit: int, stop: Any, say: Any) -> None:
            super().__init__(limit, stop, say, read=lambda: readings.pop(0) if readings else 60)
            self._looked_seconds = -1e9

    return Quick


# Early stopping


def _finish_watched(config: Any, *, resume: bool = False) -> tuple[loop.Job, list[object]]:
    seen: list[object] = []
    job = _job(config, resume=resume, observe=seen.append)
    jobs.finish(job, seen.append)
    return job, seen


def test_the_best_adapter_is_the_best_of_those_that_were_saved(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full when the best evaluation is saved must not cost the run."""
    real, losses = loop.save_checkpoint, iter([5.0, 4.0, 3.0, 3.5, 6.0, 6.0])
    states = []

    def save(run: Any, checkpoint: Any, *, keep: int) -> Any:
        states.append(checkpoint.state)
        if checkpoint.state.step == 2:
            return SaveFailure.of_memory(run, 2, "the disk is full")
        return real(run, checkpoint, keep=keep)

    monkeypatch.setattr(loop, "save_checkpoint", save)
    monkeypatch.setattr(
        loop.Worker, "loss", lambda *_: HeldOutLoss(loss=next(losses), loss_tokens=9, seconds=1.0)
    )
    run = {"eval_steps": 1, "save_total_limit": 1}
    config = _config(base, tmp_path, early_stopping_patience=2, run=run)
    job, seen = _finish_watched(config)
    assert [state.step for state in states] == [1, 2, 3, 5]
    assert [state.best_step for state in states] == [1, 2, 3, 3]
    assert jobs.events(seen, "stop") == [{"delivered_step": 3}]
    kept = read_checkpoint(job.run.checkpoints_path / "step-000003").adapter
    assert job.engine.adapter is not None
    for name, tensor in job.engine.adapter.named_tensors():
        assert torch.equal(tensor, kept[name]), name


@pytest.mark.parametrize("best_step", [2, STEPS])
def test_a_best_adapter_that_a_later_save_of_its_step_holds_is_delivered(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best_step: int
) -> None:
    """The disk is full for the save of the evaluation, and no more for that of the step."""
    real, failures = loop.save_checkpoint, [best_step]
    losses = iter([7.0 - step if step <= best_step else 6.0 for step in range(STEPS + 1)])

    def save(run: Any, checkpoint: Any, *, keep: int) -> Any:
        if checkpoint.state.step in failures:
            return SaveFailure.of_memory(run, failures.pop(), "the disk is full")
        return real(run, checkpoint, keep=keep)

    monkeypatch.setattr(loop, "save_checkpoint", save)
    monkeypatch.setattr(
        loop.Worker, "loss", lambda *_: HeldOutLoss(loss=next(losses), loss_tokens=9, seconds=1.0)
    )
    run = {"eval_steps": 1, "save_steps": 1}
    job, seen = _finish_watched(_config(base, tmp_path, early_stopping_patience=9, run=run))
    assert "checkpoint.not_saved" in jobs.codes(seen)
    said = [] if best_step == STEPS else [{"delivered_step": best_step}]
    assert jobs.events(seen, "stop") == said
    kept = read_checkpoint(job.run.checkpoints_path / f"step-{best_step:06d}").adapter
    assert job.engine.adapter is not None
    for name, tensor in job.engine.adapter.named_tensors():
        assert torch.equal(tensor, kept[name]), name


def test_a_best_checkpoint_that_is_damaged_since_ends_no_run(base: Path, tmp_path: Path) -> None:
    run = {"eval_steps": 1}
    config = _config(base, tmp_path, early_stopping_patience=1, learning_rate=0.3, run=run)
    job, seen = _finish_watched(config)
    (stop,) = jobs.events(seen, "stop")
    path = job.run.checkpoints_path / f"step-{stop['delivered_step']:06d}"
    (path / "adapter_model.safetensors").unlink()
    again, seen = _finish_watched(config, resume=True)
    last = again.start.state.step
    assert jobs.events(seen, "stop") == [{"delivered_step": last}]
    assert "checkpoint.best_lost" in jobs.codes(seen)
    assert path.exists(), "what is damaged is its owner's to look at"
    newest = _finish_watched(config, resume=True)[0]
    assert torch.equal(jobs.adapter_of(newest), jobs.adapter_of(again))
