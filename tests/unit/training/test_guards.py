"""Guards: no false stop on healthy runs, every planted failure found."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eightgig.training.guards import (
    GUARDS,
    HeldOut,
    forget_speed,
    judge_evaluation,
    judge_gradient,
    judge_layers,
    judge_step,
    wants_layers,
)
from eightgig.training.remembered import check_memory
from eightgig.training.step import StepReport
from eightgig.training.symptoms import Alarm

VOCAB = 262_144
NAN, INF = math.nan, math.inf


def _report(step: int, **values: Any) -> StepReport:
    usual = {
        "epoch": 0.1, "loss": 2.0, "grad_norm": 0.7, "learning_rate": 2e-4, "loss_tokens": 1200,
        "tokens": 2000, "tokens_per_second": 1000.0, "vram_peak_bytes": 0, "seconds": 2.0,
    }  # fmt: skip
    return StepReport(step=step, **{**usual, **values})


def _watch(
    reports: Iterator[StepReport] | list[StepReport], *, vocab: int = VOCAB, warmup: int = 0
) -> list[tuple[int, Alarm]]:
    """All alarms of a run; as in a run, nothing comes after a stop."""
    memory: Mapping[str, Any] = {}
    alarms = []
    for report in reports:
        before = judge_gradient(
            memory, step=report.step, loss=report.loss, grad_norm=report.grad_norm
        )
        after = judge_step(before.memory, report, vocab_size=vocab, warmup_steps=warmup)
        memory = json.loads(json.dumps(after.memory))
        assert memory == after.memory, "the memory must survive a checkpoint"
        check_memory(memory)
        alarms += [(report.step, alarm) for alarm in (*before.alarms, *after.alarms)]
        if any(alarm.action == "stop" for _, alarm in alarms):
            break
    return alarms


def _names(alarms: list[tuple[int, Alarm]]) -> list[str]:
    return [alarm.guard for _, alarm in alarms]


# --- healthy runs: step numbers from 1 -> losses, with a generator for noise ---------------------


def _instructions(random: np.random.Generator) -> Iterator[dict[str, Any]]:
    for step in range(400):
        yield {"loss": 1.25 + 0.9 * math.exp(-step / 40) + 0.12 * random.standard_normal()}


def _epochs(random: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Falls in stairs, as each epoch sees rows that are known."""
    for step in range(300):
        yield {"loss": (2.0, 1.1, 0.5, 0.2)[step // 75] * math.exp(0.1 * random.standard_normal())}


def _by_heart(random: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Twenty rows, a hundred epochs: the loss and the gradient go to nothing."""
    for step in range(300):
        loss = 2.5 * math.exp(-step / 25) * math.exp(0.3 * random.standard_normal()) + 2e-6
        yield {"loss": loss, "grad_norm": 0.3 * loss, "loss_tokens": 300}


def _labels(random: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Classification: two loss tokens a row, eight rows a step, a few hard rows for ever."""
    for step in range(400):
        easy = random.exponential(4.0 * math.exp(-step / 15) + 0.02, size=8)
        hard = random.exponential(5.0, size=8) * (random.random(8) < 0.08)
        losses = np.concatenate([easy + hard, np.full(8, 1e-4)])
        yield {"loss": float(losses.mean()), "loss_tokens": 16, "grad_norm": 3.0}


def _unknown_labels(random: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Labels the base model would never say: the first steps are worse than guessing."""
    for step in range(60):
        loss = 15.0 * math.exp(-step / 2) + 0.1 + 0.05 * random.random()
        yield {"loss": loss, "loss_tokens": 8}


def _already_good(random: np.random.Generator) -> Iterator[dict[str, Any]]:
    for step in range(200):
        yield {"loss": 0.45 - 0.0005 * step + 0.03 * random.standard_normal()}


def _slow_start(random: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Warm-up of 300 steps: nothing happens at first."""
    for step in range(450):
        fall = 0.6 * (1 - math.exp(-max(0, step - 200) / 60))
        yield {"loss": 2.1 - fall + 0.02 * random.standard_normal()}


def _spikes(random: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Single odd rows: the loss jumps and comes back."""
    for step in range(400):
        spike = 4.0 if random.random() < 0.02 else 0.0
        yield {
            "loss": 1.3 + 0.5 * math.exp(-step / 50) + spike + 0.1 * random.random(),
            "grad_norm": 0.5 + 10 * spike,
        }


def _one_batch(random: np.random.Generator) -> Iterator[dict[str, Any]]:
    """The same batch again and again, as a benchmark does it."""
    for step in range(80):
        loss = 11.0 * math.exp(-((step / 22) ** 2)) + 1e-7 * random.random()
        yield {"loss": loss, "grad_norm": max(1e-9, 0.1 * loss)}


def _uneven_rows(random: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Steps of very different length: speed and noise vary by several times."""
    for step in range(300):
        tokens = int(random.integers(20, 4000))
        yield {
            "loss": 1.4 + 0.4 * math.exp(-step / 60) + random.standard_normal() * 6 / tokens**0.5,
            "loss_tokens": tokens,
            "tokens_per_second": float(random.uniform(500, 1500)),
        }


def _suspended(random: np.random.Generator) -> Iterator[dict[str, Any]]:
    """A laptop that sleeps now and then: single steps take hours."""
    for step in range(200):
        speed = 0.1 if step % 60 == 50 else 1000.0 * random.uniform(0.9, 1.1)
        yield {"loss": 1.9 - 0.004 * step + 0.05 * random.random(), "tokens_per_second": speed}


def _random_weights(random: np.random.Generator) -> Iterator[dict[str, Any]]:
    """An untrained model of true size: near ln(V) from start to end."""
    for step in range(120):
        yield {"loss": 12.6 - 0.02 * step + 0.05 * random.standard_normal()}


# What else may be said of a healthy run: never more than a warning.
HEALTHY: dict[str, tuple[Callable[[np.random.Generator], Iterator[dict[str, Any]]], set[str]]] = {
    "instructions": (_instructions, set()),
    "epochs": (_epochs, set()),
    "by heart": (_by_heart, set()),
    "labels": (_labels, set()),
    "unknown labels": (_unknown_labels, {"first_loss"}),
    "already good": (_already_good, {"flat"}),
    "slow start": (_slow_start, set()),
    "spikes": (_spikes, set()),
    "one batch": (_one_batch, {"first_loss"}),
    "uneven rows": (_uneven_rows, set()),
    "suspended": (_suspended, set()),
    "random weights": (_random_weights, {"first_loss"}),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("course", "allowed"), HEALTHY.values(), ids=HEALTHY)
def test_a_healthy_run_is_never_stopped_and_hardly_warned(
    course: Callable[[np.random.Generator], Iterator[dict[str, Any]]], allowed: set[str], seed: int
) -> None:
    values = course(np.random.default_rng(seed))
    reports = (_report(step, **value) for step, value in enumerate(values, start=1))
    alarms = _watch(reports, warmup=300 if course is _slow_start else 8)
    assert {alarm.action for _, alarm in alarms} <= {"warn"}
    assert set(_names(alarms)) <= allowed


@pytest.mark.parametrize("steps", [1, 2, 5, 19, 21])
def test_short_runs_are_judged_without_a_crash(steps: int) -> None:
    assert _watch([_report(step) for step in range(1, steps + 1)]) == []


# --- planted failures ----------------------------------------------------------------------------


def _course(steps: int, loss: Callable[[int], float], **values: Any) -> list[StepReport]:
    random = np.random.default_rng(0)
    return [
        _report(step, loss=loss(step) * math.exp(0.05 * random.standard_normal()), **values)
        for step in range(1, steps + 1)
    ]


PLANTED: dict[str, tuple[list[StepReport], str, str, int]] = {
    # reports, guard, action, at the latest by step
    "wrong weights": (_course(30, lambda _: 16.2), "first_loss", "stop", 1),
    "wrong weights, few tokens": (
        _course(30, lambda _: 16.2, loss_tokens=8), "first_loss", "stop", 8,
    ),
    "hardly better than guessing": (_course(30, lambda _: 11.0), "first_loss", "warn", 1),
    "learning rate too high": (
        _course(200, lambda step: 2.0 if step < 60 else 7.5), "divergence", "stop", 75,
    ),
    "explodes in the first steps": (
        _course(60, lambda step: 2.0 if step < 4 else 9.0), "divergence", "stop", 25,
    ),
    "creeps up": (
        _course(400, lambda step: 1.5 + max(0, step - 50) * 0.01), "divergence", "stop", 250,
    ),
    "unlearns": (
        _course(300, lambda step: 2.5 * math.exp(-step / 30) + (2.2 if step > 150 else 0.2)),
        "divergence", "stop", 180,
    ),
    "learning rate too low": (_course(120, lambda _: 2.0), "flat", "warn", 120),
    "all labels masked": (_course(9, lambda _: 0.0, loss_tokens=0), "zero_loss", "stop", 2),
    "nothing to predict": (_course(9, lambda _: 1e-8), "zero_loss", "stop", 2),
    "answer in the prompt": (_course(9, lambda _: 0.005), "leak", "warn", 5),
    "no gradient": (_course(9, lambda _: 2.0, grad_norm=0.0), "zero_gradient", "stop", 2),
    "hardly a gradient": (
        _course(9, lambda _: 2.0, grad_norm=5e-9), "zero_gradient", "stop", 2,
    ),
    "gradient fades": (
        [_report(step, grad_norm=1.0 if step < 30 else 1e-4) for step in range(1, 80)],
        "collapse", "warn", 40,
    ),
    "spills": (
        [_report(step, tokens_per_second=1000.0 if step < 40 else 250.0) for step in range(1, 80)],
        "speed", "warn", 46,
    ),
    "NaN loss": ([_report(step, loss=NAN) for step in range(1, 9)], "non_finite", "stop", 3),
    "NaN gradient": (
        [_report(step, grad_norm=NAN if step > 6 else 1.0) for step in range(1, 12)],
        "non_finite", "stop", 9,
    ),
    "infinite loss": ([_report(step, loss=INF) for step in range(1, 9)], "non_finite", "stop", 3),
    "NaN now and then": (
        [_report(step, grad_norm=INF if step % 3 == 0 else 1.0) for step in range(1, 100)],
        "non_finite", "stop", 60,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("reports", "guard", "action", "latest"), PLANTED.values(), ids=PLANTED)
def test_a_planted_failure_is_found(
    reports: list[StepReport], guard: str, action: str, latest: int
) -> None:
    alarms = _watch(reports)
    found = [step for step, alarm in alarms if (alarm.guard, alarm.action) == (guard, action)]
    assert found, _names(alarms)
    assert found[0] <= latest
    finding = next(alarm.finding for _, alarm in alarms if alarm.guard == guard)
    assert finding.code == f"guard.{guard}"
    assert finding.message
    assert finding.why
    assert finding.fix


def test_one_non_finite_step_is_skipped_and_the_run_goes_on() -> None:
    reports = [_report(step, loss=NAN if step == 5 else 2.0) for step in range(1, 30)]
    assert [(step, alarm.action) for step, alarm in _watch(reports)] == [(5, "skip")]


def test_a_stop_is_an_error_with_exit_code_3() -> None:
    (*_, (_, alarm)) = _watch([_report(step, loss=NAN) for step in range(1, 9)])
    assert alarm.error.exit_code == 3
    assert alarm.error.findings == (alarm.finding,)


def test_the_strongest_alarm_comes_first() -> None:
    reports = [_report(step, loss=16.0, grad_norm=0.0) for step in (1, 2)]
    first = judge_step({}, reports[0], vocab_size=VOCAB, warmup_steps=0)
    assert first.action == "stop"
    calm = judge_step({}, _report(1), vocab_size=VOCAB, warmup_steps=0)
    assert calm.action is None


def test_a_resumed_run_judges_as_if_it_had_not_stopped() -> None:
    reports, _, _, _ = PLANTED["unlearns"]
    memory: Mapping[str, Any] = {}
    for report in reports[:100]:
        memory = judge_step(memory, report, vocab_size=VOCAB, warmup_steps=0).memory
    whole = judge_step(memory, reports[100], vocab_size=VOCAB, warmup_steps=0)
    resumed = judge_step(
        json.loads(json.dumps(memory)), reports[100], vocab_size=VOCAB, warmup_steps=0
    )
    assert whole == resumed
    assert len(json.dumps(memory)) < 4000


def test_speed_is_measured_anew_on_another_machine() -> None:
    memory: Mapping[str, Any] = {}
    for step in range(1, 60):
        memory = judge_step(memory, _report(step), vocab_size=VOCAB, warmup_steps=0).memory
    memory, alarms = forget_speed(memory), []
    check_memory(memory)
    for step in range(60, 120):
        slow = _report(step, tokens_per_second=100.0)
        judged = judge_step(memory, slow, vocab_size=VOCAB, warmup_steps=0)
        memory, alarms = judged.memory, [*alarms, *judged.alarms]
    assert [alarm.guard for alarm in alarms if alarm.guard == "speed"] == []


# --- single linears ------------------------------------------------------------------------------


def _judge_norms(steps: list[dict[str, float]]) -> list[Alarm]:
    memory: Mapping[str, Any] = {}
    alarms: list[Alarm] = []
    for step, norms in enumerate(steps, start=1):
        judged = judge_layers(memory, step=step, norms=norms)
        memory = json.loads(json.dumps(judged.memory))
        check_memory(memory)
        alarms += judged.alarms
    return alarms


def test_a_linear_that_never_gets_a_gradient_stops_the_run() -> None:
    norms = {"layers.0.self_attn.q_proj": 0.5, "layers.7.mlp.up_proj": 0.0}
    (alarm,) = _judge_norms([norms] * 8)
    assert alarm.action == "stop"
    assert alarm.finding.message.startswith("1 of 2 adapted linears got no gradient up to step 5")
    assert "layers.7.mlp.up_proj" in alarm.finding.message


def test_a_linear_that_gets_one_late_is_fine() -> None:
    steps = [{"a": 0.5, "b": 0.0}] * 4 + [{"a": 0.5, "b": 1e-30}]
    assert _judge_norms(steps) == []


def test_once_all_had_a_gradient_nobody_asks_again() -> None:
    judged = judge_layers({}, step=1, norms={"a": 0.5, "b": 0.1})
    assert not wants_layers(judged.memory)
    assert wants_layers(judge_layers({}, step=1, norms={"a": 0.5, "b": 0.0}).memory)
    assert judge_layers(judged.memory, step=2, norms={"a": 0.0, "b": 0.0}).alarms == ()


def test_steps_without_any_gradient_are_not_counted_against_a_linear() -> None:
    assert _judge_norms([{"a": 0.0, "b": 0.0}] * 9) == []


# --- held-out loss -------------------------------------------------------------------------------


def _evaluate(losses: list[float], patience: int = 0) -> tuple[HeldOut, list[tuple[int, Alarm]]]:
    progress, alarms = HeldOut(), []
    for number, loss in enumerate(losses, start=1):
        progress, found = judge_evaluation(progress, step=10 * number, loss=loss, patience=patience)
        alarms += [(10 * number, alarm) for alarm in found]
    return progress, alarms


def test_the_best_is_remembered() -> None:
    progress, alarms = _evaluate([2.0, 1.5, 1.6, 1.52])
    assert progress == HeldOut(best_loss=1.5, best_step=20, evaluations_without_gain=2)
    assert alarms == []


def test_a_rising_held_out_loss_is_said() -> None:
    _, alarms = _evaluate([2.0, 1.5, 1.7, 1.9])
    assert [(step, alarm.action) for step, alarm in alarms] == [(40, "warn")]


def test_a_slowly_rising_one_is_said_once_it_is_high() -> None:
    _, alarms = _evaluate([1.5, 1.52, 1.54, 1.56, 1.6])
    assert [step for step, _ in alarms] == [50]


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_early_stopping_finishes_after_so_many_without_gain(patience: int) -> None:
    _, alarms = _evaluate([2.0, 1.5, 1.5, 1.5, 1.5], patience)
    assert (20 + 10 * patience, "finish") == (alarms[0][0], alarms[0][1].action)


def test_falling_held_out_losses_never_stop() -> None:
    assert _evaluate([2.0 - 0.001 * number for number in range(50)], patience=1)[1] == []


def test_nan_is_no_gain() -> None:
    progress, alarms = _evaluate([NAN, 2.0, NAN, NAN])
    assert progress.best_step == 20
    assert [alarm.action for _, alarm in alarms] == ["warn"]


# --- the table -----------------------------------------------------------------------------------


def test_every_guard_that_speaks_is_in_the_table() -> None:
    planted = {guard for _, guard, _, _ in PLANTED.values()}
    assert planted | {"dead_layers", "held_out"} == {guard.name for guard in GUARDS}


def test_the_page_on_reliability_has_the_same_table() -> None:
    page = (Path(__file__).parents[3] / "docs" / "reliability.md").read_text(encoding="utf-8")
    for guard in GUARDS:
        row = f"| {guard.name} | {guard.rule} | {guard.action} | {guard.source} |"
        assert row in page.splitlines()
