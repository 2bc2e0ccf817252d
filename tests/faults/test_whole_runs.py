"""Whole runs, killed and stopped: the end equals that of a run which nothing disturbed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.server import Process
from tests.faults.tally import Tally
from tests.faults.trials import (
    SAVE_STEPS,
    STEPS,
    Bench,
    Outcomes,
    Trial,
    few_or_many,
    finish,
    kill_anywhere,
    kill_around_a_save,
    lost_steps,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

KILLED = "SIGKILL at a random moment of a run, or around a save; automatic resume"
STORM = "kill storm: a SIGKILL after 0.3 to 1 of the time the run takes, until it is done"
STOPPED = "SIGTERM or Ctrl-C at a random moment"
FINISHED = "finished run resumed"
WRITERS = "two processes on one run folder"


@few_or_many(4, 100)
@pytest.mark.parametrize("kill", [kill_anywhere, kill_around_a_save])
def test_a_killed_run_ends_as_if_it_had_not_been(
    kill: Callable[[Trial, random.Random], Process], trials: int, bench: Bench, tally: Tally
) -> None:
    chooser, num_killed, outcomes = random.Random(trials), 0, Outcomes(KILLED, tally)
    for _ in range(trials):
        trial = bench.trial()
        process = kill(trial, chooser)
        code = process.wait()
        num_killed += code == -signal.SIGKILL
        problems = []
        if code not in (0, -signal.SIGKILL):
            problems.append(f"exit code {code}: {process.text()[-2000:]}")
        lost = lost_steps(trial)
        problems += finish(trial)
        if lost > SAVE_STEPS:
            problems.append(f"{lost} steps were lost")
        outcomes.add(trial, problems)
        tally.note(KILLED, "steps done again, at most", lost)
    assert not outcomes.wrong
    assert num_killed >= trials // 2


@few_or_many(1, 50)
def test_a_kill_storm_ends_some_day(trials: int, bench: Bench, tally: Tally) -> None:
    chooser, outcomes = random.Random(trials), Outcomes(STORM, tally)
    for _ in range(trials):
        trial, kills, problems = bench.trial(), 0, ["it did not end"]
        for _ in range(200):
            process = trial.start()
            end = time.monotonic() + bench.seconds * chooser.uniform(0.3, 1.0)
            while process.is_running() and time.monotonic() < end:
                time.sleep(0.01)
            process.signal(signal.SIGKILL)
            code = process.wait()
            if code == 0:
                problems = trial.problems()
                break
            if code != -signal.SIGKILL:
                problems = [f"exit code {code}: {process.text()[-2000:]}"]
                break
            kills += 1
        outcomes.add(trial, problems)
        tally.note(STORM, "kills", kills, is_sum=True)
    assert not outcomes.wrong


@few_or_many(2, 25)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_loses_one_step_at_most(
    number: signal.Signals, trials: int, bench: Bench, tally: Tally
) -> None:
    chooser, num_saved, outcomes = random.Random(trials), 0, Outcomes(STOPPED, tally)
    for _ in range(trials):
        trial = bench.trial()
        process = trial.start()
        if chooser.random() < 0.8:
            trial.wait_for_step(chooser.randrange(1, STEPS), process)
            time.sleep(chooser.uniform(0, 0.05))
        else:
            time.sleep(chooser.uniform(0, bench.seconds))
        process.signal(number)
        code = process.wait()
        problems = []
        # Before there is something to save, the signal does what it always does.
        if code not in (0, 130, -number) or (
            code == -number and trial.steps() and lost_steps(trial)
        ):
            problems.append(f"exit code {code}: {process.text()[-2000:]}")
        # While libraries are imported nothing is there to go on with, at the very end nothing is
        # left to do: then nothing is said.
        has_work = bool(trial.steps() and trial.problems())
        if code == 130 and has_work and "--resume" not in process.text():
            problems.append("how to go on was not said")
        lost = lost_steps(trial)
        if lost > 1:
            problems.append(f"{lost} steps were lost")
        num_saved += code == 130 and bool(trial.saved_steps())
        problems += finish(trial)
        outcomes.add(trial, problems)
        tally.note(STOPPED, "steps done again, at most", lost)
    assert not outcomes.wrong
    assert num_saved >= trials // 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("plant", [["stop_at_report"], ["stop_at_import", "matplotlib.artist"]])
def test_a_stop_before_the_report_says_how_to_get_it(
    plant: list[str], number: signal.Signals, bench: Bench
) -> None:
    trial = bench.trial()
    code, text = trial.run(plant=[*plant, number])
    assert code == 130, text
    assert "--resume" in text
    # Whoever interrupts the end wants it to end: the report is written all the same.
    assert trial.problems() == []
    assert trial.run()[0] == 0


def test_a_second_signal_leaves_at_once(bench: Bench) -> None:
    trial = bench.trial()
    process = trial.start(plant=["slow_steps", 5.0])
    trial.wait_for_step(1, process)
    time.sleep(0.5)
    process.signal(signal.SIGTERM)
    time.sleep(0.5)
    start_seconds = time.monotonic()
    process.signal(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM
    assert time.monotonic() - start_seconds < 2
    assert finish(trial) == []


@few_or_many(1, 20)
def test_a_finished_run_that_is_resumed_makes_no_step(
    trials: int, bench: Bench, tally: Tally
) -> None:
    trial = bench.trial()
    assert trial.run()[0] == 0
    before = _contents(trial)
    for _ in range(trials):
        code, text = trial.run()
        passed = code == 0 and _contents(trial) == before and trial.problems() == []
        tally.add(FINISHED, passed=passed)
        assert passed, text


def _contents(trial: Trial) -> dict[str, bytes]:
    paths = [*trial.folder.glob("checkpoints/*/*"), *trial.folder.glob("adapter/adapter_*")]
    paths.append(trial.folder / "metrics.jsonl")
    return {str(path): path.read_bytes() for path in paths}


@few_or_many(2, 20)
def test_the_second_of_two_writers_is_refused(trials: int, bench: Bench, tally: Tally) -> None:
    number = 0
    for _ in range(2 * trials):
        trial = bench.trial()
        plant = ["slow_steps", 0.3]
        first = trial.start(plant=plant)
        if number % 2:
            trial.wait_for_step(1, first)
        second = trial.start(plant=plant)
        codes = sorted([first.wait(), second.wait()])
        texts = first.text() + second.text()
        if "No step was left" in texts:
            continue  # on a busy machine the second came when the first had ended
        number += 1
        passed = codes == [0, 2] and "is in use by" in texts and trial.problems() == []
        tally.add(WRITERS, passed=passed)
        assert passed, (codes, texts, trial.problems())
        trial.remove()
        if number == trials:
            break
    assert number == trials


def test_a_lock_that_a_dead_process_left_is_nobodys(bench: Bench) -> None:
    trial = bench.stopped_trial()
    assert Path(trial.folder, "lock").is_file()
    assert finish(trial) == []
