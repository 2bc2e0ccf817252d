"""Numbers that are none: the optimizer does not move by them, and no file ever holds them."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.faults.tally import Tally
from tests.faults.trials import STEPS, Bench, finish, non_finite_files

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

NON_FINITE = "NaN or infinity in loss, gradient, input, weight or moment of one step or all"
_ALWAYS = 99
_PASSING = [
    (plant, first, value)
    for plant in ("nan_loss", "nan_gradient", "nan_input")
    for first in (1, 7)
    for value in ("nan", "inf")
]
_LASTING = [
    (plant, first, value)
    for plant in ("nan_loss", "nan_gradient", "nan_input", "nan_weight", "nan_moment")
    for first in (1, 7)
    for value in ("nan", "-inf")
]
_SOME = [("nan_gradient", 7, "nan"), ("nan_weight", 7, "nan")]


def _cases(cases: list[tuple[str, int, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("plant", "first", "value"),
        [pytest.param(*case, marks=() if case in _SOME else pytest.mark.slow) for case in cases],
    )


@_cases(_PASSING)
def test_a_step_that_is_no_number_is_skipped(
    plant: str, first: int, value: str, bench: Bench, tally: Tally
) -> None:
    trial = bench.trial()
    code, text = trial.run(plant=[plant, first, first, value])
    problems = [] if code == 0 else [f"exit code {code}: {text[-2000:]}"]
    skipped = [e["step"] for e in trial.events("guard") if e["values"]["guard"] == "non_finite"]
    if skipped != [first]:
        problems.append(f"skipped were {skipped}")
    problems += non_finite_files(trial.folder)
    tally.add(NON_FINITE, passed=not problems)
    assert not problems
    trial.remove()


@_cases(_LASTING)
def test_a_run_of_such_steps_is_stopped_and_can_go_on(
    plant: str, first: int, value: str, bench: Bench, tally: Tally
) -> None:
    trial = bench.trial()
    code, text = trial.run(plant=[plant, first, _ALWAYS, value])
    problems = [] if code == 3 else [f"exit code {code}: {text[-2000:]}"]
    if (trial.folder / "adapter").exists() or max(trial.steps()) == STEPS:
        problems.append("it went on to the end")
    problems += non_finite_files(trial.folder)
    # The cause is gone: the run goes on from numbers that are sound.
    code, text = trial.run()
    problems += [] if code == 0 else [f"resumed, exit code {code}: {text[-2000:]}"]
    problems += non_finite_files(trial.folder)
    tally.add(NON_FINITE, passed=not problems)
    assert not problems
    trial.remove()


@pytest.mark.parametrize("value", ["nan", pytest.param("inf", marks=pytest.mark.slow)])
def test_a_base_model_that_holds_such_numbers(value: str, bench: Bench, tally: Tally) -> None:
    from safetensors.torch import load_file, save_file

    spoiled = bench.folder / f"spoiled-{value}"
    shutil.copytree(bench.folder / "model", spoiled)
    tensors = load_file(spoiled / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = float(value)
    save_file(tensors, spoiled / "model.safetensors", metadata={"format": "pt"})
    trial = bench.trial()
    code, text = trial.run("--set", f"model.name={spoiled}")
    problems = [] if code in (2, 3) else [f"exit code {code}: {text[-2000:]}"]
    if (trial.folder / "adapter").exists():
        problems.append("an adapter was written")
    problems += non_finite_files(trial.folder)
    tally.add(NON_FINITE, passed=not problems)
    assert not problems
    assert finish(bench.trial()) == []
