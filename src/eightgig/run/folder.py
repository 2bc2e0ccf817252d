"""The run folder: its paths, and how it is created.

Layout: `config.yaml, plan.json, environment.json, data.json, metrics.jsonl, events.jsonl, log.txt,
checkpoints/step-000120/, adapter/, report.html`. Nothing here knows what a training is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eightgig.config import Config, is_safe_name, write_config
from eightgig.disk import failure_cause
from eightgig.errors import RunError
from eightgig.run.files import write_atomically
from eightgig.run.links import refuse_links

EventKind = Literal["eval", "guard", "oom", "save", "plan", "trial", "resume", "stop", "pause"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run folder and where its parts lie."""

    folder: Path

    @property
    def config_path(self) -> Path:
        """The settings, with absolute paths."""
        return self.folder / "config.yaml"

    @property
    def plan_path(self) -> Path:
        """The plan the run was started with."""
        return self.folder / "plan.json"

    @property
    def environment_path(self) -> Path:
        """Machine and versions."""
        return self.folder / "environment.json"

    @property
    def data_path(self) -> Path:
        """Numbers of the rows, and one of them as the model sees it."""
        return self.folder / "data.json"

    @property
    def metrics_path(self) -> Path:
        """One StepReport per optimizer step."""
        return self.folder / "metrics.jsonl"

    @property
    def events_path(self) -> Path:
        """One Event per evaluation, guard, out-of-memory detour and save."""
        return self.folder / "events.jsonl"

    @property
    def log_path(self) -> Path:
        """What the terminal showed beside steps and progress: events, choices, errors."""
        return self.folder / "log.txt"

    @property
    def checkpoints_path(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def adapter_path(self) -> Path:
        """Folder of the trained adapter in PEFT's format."""
        return self.folder / "adapter"

    @property
    def report_path(self) -> Path:
        """The report for people."""
        return self.folder / "report.html"


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One line of events.jsonl: something other than an optimizer step happened."""

    step: int
    kind: EventKind
    values: Mapping[str, Any]


def check_run(config: Config, *, resume: bool) -> Run:
    """The run folder that `config` names, before anything is made or fetched for it.

    Args:
        config: Names the folder: `run.output_dir` and `run.name`.
        resume: A folder that exists is gone on with.

    Raises:
        RunError: The name is no folder's, the folder exists (without `resume`), or holds links.
    """
    name = config.run.name
    if not is_safe_name(name):
        raise RunError(
            f'"{name}" cannot be the name of a run.',
            why="The run is written into the folder of this name, and nowhere else.",
            fix="Set run.name to letters, digits, dots, dashes and underscores.",
        )
    run = Run(folder=Path(config.run.output_dir, name).absolute())
    if os.path.lexists(run.folder) and not (resume and run.folder.is_dir()):
        raise _taken(run, name)
    refuse_links(run.folder)
    return run


def create_run(config: Config, *, resume: bool) -> Run:
    """The run folder of `config`, with its config.yaml in it.

    Args:
        config: Names the folder: `run.output_dir` and `run.name`.
        resume: Go on in a folder that exists; one that does not is created all the same, so
            that a supervisor may always ask to resume.

    Raises:
        RunError: The folder exists (without `resume`), or cannot be written.
    """
    run = check_run(config, resume=resume)
    with writing_to(run.folder):
        try:
            run.folder.parent.mkdir(parents=True, exist_ok=True)
            run.folder.mkdir(exist_ok=resume)
            if not run.config_path.exists():
                _write_settings(run, config, may_have_rival=resume)
        except FileExistsError:  # another process was faster
            raise _taken(run, config.run.name) from None
    return run


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """What a run cannot begin without is written to its folder.

    Raises:
        RunError: It cannot be.
    """
    try:
        yield
    except OSError as error:
        raise RunError(
            f"The run folder {folder} cannot be written: {failure_cause(error)}.",
            why="Metrics, checkpoints and the adapter are written there.",
            fix="Set run.output_dir to a folder that you may write, on a disk with space.",
        ) from error


def _write_settings(run: Run, config: Config, *, may_have_rival: bool) -> None:
    try:
        write_atomically(run.config_path, write_config(config))
    except (FileExistsError, FileNotFoundError):
        # Another process that resumes the same run writes it at this moment, and took or renamed
        # the file beside it. Which of the two goes on is decided by the lock.
        if not may_have_rival:
            raise


def _taken(run: Run, name: str) -> RunError:
    if not run.folder.is_dir():
        return RunError(
            f"{run.folder} cannot be a run folder: there is a file of that name.",
            why="Metrics, checkpoints and the adapter are written into that folder.",
            fix="Set run.output_dir or run.name to something else.",
        )
    return RunError(
        f"The run folder {run.folder} exists already.",
        why="A run is never written over.",
        fix=f"Go on with it: add --resume. Or begin another: --set run.name={name}-2.",
    )
