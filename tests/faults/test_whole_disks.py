"""Whole runs on disks that fail: training goes on, and ends as if nothing had disturbed it."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.tally import Tally
from tests.faults.test_damage import DAMAGES, FILES
from tests.faults.trials import (
    SAVE_STEPS,
    STEPS,
    Bench,
    Outcomes,
    few_or_many,
    finish,
    lost_steps,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

KILLED = "whole run killed at one of its operations on checkpoints and adapter, or in a write"
POWER = "whole run, power cut at one of them, metrics included"
ERRORS = "whole run, disk full or input/output error at one of them, or for a while"
FULL = "whole run on a file system that is too small, enlarged afterwards"
DAMAGED = "whole run, one file of its newest checkpoint damaged, resumed"


@pytest.fixture(scope="module")
def num_operations(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Operations on checkpoints and adapter in a run that nothing disturbs."""
    notes = tmp_path_factory.mktemp("notes") / "operations.txt"
    trial = bench.trial()
    code, text = trial.run(plant=["count_disk", str(notes)])
    assert code == 0, text
    assert trial.problems() == []
    operations = notes.read_text().splitlines()
    assert len(operations) > 100
    return len(operations)


@few_or_many(2, 20)
def test_killed_at_any_operation(
    trials: int, bench: Bench, num_operations: int, tally: Tally
) -> None:
    chooser, outcomes = random.Random(trials), Outcomes(KILLED, tally)
    for at in chooser.sample(range(num_operations), trials):
        trial = bench.trial()
        code, text = trial.run(plant=["disk_kill", at])
        assert code == -signal.SIGKILL, (at, code, text)
        lost = lost_steps(trial)
        problems = finish(trial) + ([f"{lost} steps were lost"] if lost > SAVE_STEPS else [])
        outcomes.add(trial, problems, at)
    assert not outcomes.wrong


@few_or_many(2, 20)
def test_a_power_cut_costs_one_interval_at_most(
    trials: int, bench: Bench, num_operations: int, tally: Tally
) -> None:
    chooser, outcomes = random.Random(trials), Outcomes(POWER, tally)
    for at in chooser.sample(range(num_operations), trials):
        trial = bench.trial()
        code, text = trial.run(plant=["power_cut", at, at])
        assert code == -signal.SIGKILL, (at, code, text)
        done = max(trial.steps(), default=0)
        code, text = trial.run()
        problems = trial.problems() if code == 0 else [f"exit code {code}: {text[-2000:]}"]
        begun = [event["step"] for event in trial.events("resume")]
        lost = done - max(begun, default=0)
        if lost > SAVE_STEPS:
            problems.append(f"{lost} steps were lost")
        tally.note(POWER, "steps done again, at most", lost)
        outcomes.add(trial, problems, at)
    assert not outcomes.wrong


@few_or_many(2, 20)
def test_disk_errors_do_not_end_a_training(
    trials: int, bench: Bench, num_operations: int, tally: Tally
) -> None:
    chooser, num_noticed, outcomes = random.Random(trials), 0, Outcomes(ERRORS, tally)
    for number_of_trial in range(trials):
        number = (errno.ENOSPC, errno.EIO)[number_of_trial % 2]
        at, count = chooser.randrange(num_operations), chooser.choice([1, 1, 5, 80])
        trial = bench.trial()
        code, text = trial.run(plant=["disk_errors", number, at, count])
        problems = []
        cause = "the disk is full" if number == errno.ENOSPC else "input/output error"
        said = [line for line in text.splitlines() if "not saved" in line or "not written" in line]
        num_noticed += bool(said)
        if not all(cause in line for line in said if "read back" not in line):
            problems.append(f"the cause was not said: {said}")
        if number == errno.ENOSPC and not all(
            "are missing" in line for line in said if "checkpoint" in line
        ):
            problems.append(f"the bytes were not said: {said}")
        if max(trial.steps(), default=0) != STEPS:
            problems.append(f"training ended with step {max(trial.steps(), default=0)}: {text}")
        if code != 0 and not (code == 2 and "--resume" in text):
            problems.append(f"exit code {code}: {text[-2000:]}")
        problems += finish(trial)
        outcomes.add(trial, problems, number, at, count)
    assert not outcomes.wrong
    assert num_noticed >= trials // 4


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system in memory of some KiB, or changes its size."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(kibibytes: int) -> Path:
        option = "remount," if os.path.ismount(place) else ""
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"{option}size={kibibytes}k", "tmpfs", str(place)],
            capture_output=True, check=False,
        )  # fmt: skip
        if done.returncode:
            pytest.skip("file systems cannot be mounted here")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("kibibytes", [150, 400, 600, 800, 1000, 1200, 1400, 1700, 2000])
def test_a_disk_that_is_too_small(
    kibibytes: int, bench: Bench, small_disk: Callable[[int], Path], tally: Tally
) -> None:
    place = small_disk(kibibytes)
    trial = bench.trial()
    trial.folder.symlink_to(place / "run", target_is_directory=True)
    (place / "run").mkdir()
    code, text = trial.run()
    problems = []
    if max(trial.steps(), default=0) < STEPS:
        problems.append(f"training ended early: {text[-2000:]}")
    if code and not (code == 2 and "the disk is full" in text and "are missing" in text):
        problems.append(f"exit code {code}: {text[-2000:]}")
    small_disk(20_000)
    problems += finish(trial)
    tally.add(FULL, passed=not problems)
    assert not problems


_SOME = [("state.json", "missing"), ("optimizer.safetensors", "middle bit")]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param(name, damage, marks=() if (name, damage) in _SOME else pytest.mark.slow)
        for name in FILES
        for damage in DAMAGES
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    name: str, damage: str, bench: Bench, tally: Tally, request: pytest.FixtureRequest
) -> None:
    prepared = getattr(bench, "two_checkpoints", None)
    if prepared is None:
        prepared = bench.two_checkpoints = bench.stopped_trial()  # type: ignore[attr-defined]
    trial = bench.trial()
    shutil.copytree(prepared.folder, trial.folder)
    older, newest = trial.saved_steps()
    path = trial.folder / "checkpoints" / f"step-{newest:06d}"
    if damage == "of an older checkpoint":
        # Written for the step 5 of another test.
        shutil.copyfile(path.with_name(f"step-{older:06d}") / name, path / name)
    else:
        DAMAGES[damage](path / name)
    before = sorted(path.name for path in path.iterdir())
    code, text = trial.run()
    problems = trial.problems() if code == 0 else [f"exit code {code}: {text[-2000:]}"]
    if f"step-{newest:06d} is damaged" not in text:
        problems.append(f"it was not said: {text[-2000:]}")
    if [event["step"] for event in trial.events("resume")] != [older]:
        problems.append("another checkpoint was used")
    if sorted(p.name for p in path.with_name(path.name + ".broken").iterdir()) != before:
        problems.append("something was deleted")
    tally.add(DAMAGED, passed=not problems)
    assert not problems
    shutil.rmtree(trial.folder)
