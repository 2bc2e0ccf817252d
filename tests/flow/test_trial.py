"""The trial does what the run will do, takes little of its time, and leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eightgig.config import AUTO
from eightgig.engine.decoder import DecoderLayer
from eightgig.errors import RunError, TrainingStopped
from eightgig.memory import ladder
from eightgig.training import loop, memory, trial, worker
from eightgig.training.loop import Job
from eightgig.training.save import SaveFailure
from eightgig.training.step import make_schedule
from eightgig.training.worker import Worker
from tests import jobs

FAMILY = "llama"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.make_base(tmp_path_factory.mktemp("models") / "model", FAMILY)


@pytest.fixture(autouse=True)
def _one_gradient_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "MIN_SECONDS", 600.0)
    monkeypatch.setattr(trial, "_CHECKS_RATIO", 0.0)


def _job(base: Path, folder: Path, *, seen: list[object] | None = None, **options: Any) -> Job:
    settings = {"max_steps": 3, "trial": True, **options}
    plan = settings.pop("plan", None)
    config = jobs.make_config(base, folder, **settings)
    observe = (lambda _: None) if seen is None else seen.append
    return jobs.make_job(
        config,
        rows=jobs.make_rows(24),
        held_out=jobs.make_rows(5, seed=3),
        plan=plan,
        observe=observe,
    )


def _try(job: Job) -> tuple[trial.TrialResult, tuple[Any, ...]]:
    doing = Worker(job, say=lambda *_: None, between=lambda: None)
    return trial.run_trial(job, doing, num_evaluations=4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optim": "adamw_8bit", "lora": {"r": 16}},
        {"lora": {"lora_dropout": 0.2}, "weight_decay": 0.1},
    ],
    ids=["plain", "8-bit moments", "dropout"],
)
def test_the_run_begins_from_the_untouched_state_bit_for_bit(
    base: Path, tmp_path: Path, options: Mapping[str, Any]
) -> None:
    runs = []
    for is_tried in (False, True):
        seen: list[object] = []
        job = _job(base, tmp_path / str(is_tried), trial=is_tried, seen=seen, **options)
        losses = [report.loss for report in jobs.finish(job, seen.append)]
        tensors = job.start.optimizer.state_tensors()
        runs.append((losses, jobs.adapter_of(job), tensors))
        assert len(jobs.events(seen, "trial")) == is_tried
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])
    for name, tensor in runs[0][2].items():
        assert torch.equal(tensor, runs[1][2][name]), name


def test_after_the_trial_everything_is_as_it_was(base: Path, tmp_path: Path) -> None:
    job = _job(base, tmp_path)
    adapter = jobs.adapter_of(job)
    assert job.engine.adapter is not None
    compute = [copy.clone() for copy in job.engine.adapter.compute]
    moments = job.start.optimizer.state_tensors()
    moments = {name: tensor.clone() for name, tensor in moments.items()}
    result, findings = _try(job)
    assert findings == ()
    assert result.steps == len(list(trial.sample_steps(make_schedule(job.config, job.rows, 40))))
    assert result.rows == 24
    assert result.loss_after < result.loss_before
    assert result.gradient_error is not None
    assert torch.equal(jobs.adapter_of(job), adapter)
    pairs = zip(job.engine.adapter.compute, compute, strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    now = job.start.optimizer.state_tensors()
    assert now.keys() == moments.keys()
    assert all(torch.equal(now[name], moments[name]) for name in now)
    assert not (job.run.folder / "trial").exists()
    assert not list(job.run.checkpoints_path.glob("*"))


def test_it_says_how_long_the_run_will_take(base: Path, tmp_path: Path) -> None:
    seen: list[object] = []
    job = _job(base, tmp_path, seen=seen, max_steps=30)
    reports = jobs.finish(job, seen.append)
    (tried,) = jobs.events(seen, "trial")
    seconds = sum(report.seconds for report in reports)
    seconds += sum(values["seconds"] for values in jobs.events(seen, "eval"))
    # Other programs share the machine that tests run on.
    assert 0.2 < tried["run_seconds"] / seconds < 5


def test_the_largest_micro_batches_are_in(base: Path, tmp_path: Path) -> None:
    job = _job(base, tmp_path)
    schedule = make_schedule(job.config, job.rows, 40)
    largest = max(
        batch.num_tokens
        for step in range(1, schedule.steps_per_epoch + 1)
        for batch in schedule.batches(step)
    )
    assert _try(job)[0].longest_micro_batch_tokens >= largest


def test_five_percent_of_the_time_is_enough_for_the_largest_alone(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "MIN_SECONDS", 0.0)
    job = _job(base, tmp_path)
    job = replace(job, plan=replace(job.plan, run_seconds=0.01))
    result, findings = _try(job)
    assert result.steps == 1
    assert [finding.code for finding in findings] == ["trial.too_small"]
    assert findings[0].severity == "note"
    assert result.gradients_checked >= 1


def test_a_long_run_has_time_for_more(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "MIN_SECONDS", 0.0)
    job = _job(base, tmp_path)
    job = replace(job, plan=replace(job.plan, run_seconds=36_000.0))
    assert _try(job)[0].rows == 24


@pytest.mark.parametrize(
    ("setting", "run_seconds", "is_tried"),
    [
        (AUTO, None, False),
        (AUTO, 599.0, False),
        (AUTO, 601.0, True),
        (True, 1.0, True),
        (False, 10_000.0, False),
    ],
)
def test_long_runs_are_tried_and_who_asks(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: Any,
    run_seconds: float | None,
    is_tried: bool,
) -> None:
    class Tried(Exception):
        pass

    def tried(*_: Any, **__: Any) -> Any:
        raise Tried

    monkeypatch.setattr(loop, "run_trial", tried)
    job = _job(base, tmp_path, trial=setting, max_steps=1, plan={"run_seconds": run_seconds})
    if is_tried:
        with pytest.raises(Tried):
            jobs.finish(job)
    else:
        assert len(jobs.finish(job)) == 1


def test_a_run_that_goes_on_is_not_tried_again(base: Path, tmp_path: Path) -> None:
    seen: list[object] = []
    job = _job(base, tmp_path, run={"save_steps": 1})
    reports = loop.train(job, seen.append)
    assert next(reports).step == 1
    assert next(reports).step == 2
    reports.close()
    seen.clear()
    again = jobs.make_job(job.config, rows=job.rows, held_out=job.held_out, resume=True)
    assert [report.step for report in jobs.finish(again, seen.append)] == [2, 3]
    assert jobs.events(seen, "trial") == []
    assert len(jobs.events(seen, "resume")) == 1


def test_memory_that_runs_out_in_the_trial_is_met_before_the_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _job(base, tmp_path / "whole")
    losses = [report.loss for report in jobs.finish(expected)]
    monkeypatch.setattr(memory, "next_rung", ladder._slots)
    real, calls = DecoderLayer.backward, []

    def failing(self: DecoderLayer, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, *arguments)

    monkeypatch.setattr(DecoderLayer, "backward", failing)
    seen: list[object] = []
    job = _job(base, tmp_path / "lower", seen=seen)
    assert [report.loss for report in jobs.finish(job, seen.append)] == losses
    assert len(jobs.events(seen, "oom")) == 1
    assert json.loads(job.run.plan_path.read_text())["layer_slots"] == 2
    assert torch.equal(jobs.adapter_of(job), jobs.adapter_of(expected))


def test_a_trial_that_fails_leaves_the_run_to_be_begun(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = worker.run_step
    with monkeypatch.context() as patch:
        patch.setattr(worker, "run_step", lambda *a: (float("inf"), real(*a)[1]))
        job = _job(base, tmp_path)
        before = jobs.adapter_of(job)
        with pytest.raises(TrainingStopped, match="loss inf") as caught:
            jobs.finish(job)
    assert "--resume" in caught.value.fix
    assert torch.equal(jobs.adapter_of(job), before)
    # Other settings are no other run: nothing of it had begun.
    config = replace(job.config, train=replace(job.config.train, learning_rate=1e-3))
    again = jobs.make_job(config, rows=job.rows, resume=True)
    assert len(jobs.finish(again)) == 3
    assert "learning_rate: 0.001" in again.run.config_path.read_text()


def test_a_disk_that_takes_no_checkpoint_is_met_before_the_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eightgig.disk.Disk.free_bytes", lambda *_: 10)
    with pytest.raises(RunError, match="disk is full"):
        _try(_job(base, tmp_path))


def test_what_a_killed_trial_left_is_deleted(base: Path, tmp_path: Path) -> None:
    job = _job(base, tmp_path, trial=False, max_steps=1)
    left = job.run.folder / "trial" / "checkpoints" / "step-000003"
    left.mkdir(parents=True)
    (left / "adapter_model.safetensors").write_bytes(b"half")
    jobs.finish(job)
    assert not (job.run.folder / "trial").exists()


def test_save_failures_have_a_sentence(tmp_path: Path, base: Path) -> None:
    failure = SaveFailure.of_memory(_job(base, tmp_path).run, 3, "CUDA out of memory")
    assert failure.message == (
        "The checkpoint of step 3 was not saved: memory ran out (CUDA out of memory)."
    )


def test_each_row_is_taken_once(base: Path, tmp_path: Path) -> None:
    rows = jobs.make_rows(400, seed=2)
    job = jobs.make_job(jobs.make_config(base, tmp_path), rows=rows)
    steps = list(trial.sample_steps(make_schedule(job.config, rows, 40)))
    taken = np.concatenate(steps)
    assert len(taken) == len(set(taken.tolist()))
    assert 95 <= len(taken) <= 100
    assert rows.lengths[steps[0]].min() >= np.sort(rows.lengths)[-len(steps[0])]
