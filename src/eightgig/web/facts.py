"""What a run folder holds, read for a report: whatever is there, however little that is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eightgig.run import Run

EVALUATION_NAME = "evaluation.json"
_MOST_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """Numbers over optimizer steps.

    Attributes:
        name: For legends and tables.
        points: (step, value); values may be NaN.
    """

    name: str
    points: tuple[tuple[int, float], ...]

    @property
    def finite(self) -> tuple[tuple[int, float], ...]:
        """The points that can be drawn."""
        return tuple(point for point in self.points if math.isfinite(point[1]))

    def scaled(self, factor: float) -> Series:
        """The same in another unit."""
        points = tuple((step, value * factor) for step, value in self.points)
        return Series(name=self.name, points=points)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """The content of a run folder; empty where a file is missing or damaged.

    Attributes:
        name: Of the folder.
        metrics: Lines of metrics.jsonl.
        events: Lines of events.jsonl.
        plan, environment, evaluation: The JSON files.
        data: data.json: `{"train": summary, "held_out": summary, "sample": [[text, is_trained]]}`.
        config: Text of config.yaml.
    """

    name: str
    metrics: tuple[Mapping[str, Any], ...]
    events: tuple[Mapping[str, Any], ...]
    plan: Mapping[str, Any]
    environment: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    data: Mapping[str, Any]
    config: str

    def series(self, key: str, name: str) -> Series:
        """A column of metrics.jsonl."""
        return _series(self.metrics, lambda line: line.get(key), name)

    @property
    def held_out(self) -> Series:
        """The held-out losses."""
        evaluations = [event for event in self.events if event.get("kind") == "eval"]
        return _series(
            evaluations, lambda event: _mapping(event, "values").get("held_out_loss"), "held-out"
        )

    @property
    def incidents(self) -> tuple[Mapping[str, Any], ...]:
        """Events that somebody should know of: guards, memory, stops, resumes, failed saves."""
        return tuple(
            event
            for event in self.events
            if event.get("kind") in ("guard", "oom", "stop", "resume", "trial", "pause")
            or "failed" in _mapping(event, "values")
        )


def read_facts(run: Run) -> RunFacts:
    """Everything in the folder of `run` that a report shows."""
    return RunFacts(
        name=run.folder.name,
        metrics=_read_lines(run.metrics_path),
        events=_read_lines(run.events_path),
        plan=_read_object(run.plan_path),
        environment=_read_object(run.environment_path),
        evaluation=_read_object(run.folder / EVALUATION_NAME),
        data=_read_object(run.data_path),
        config=_read_text(run.config_path),
    )


def _series(lines: Sequence[Mapping[str, Any]], value: Any, name: str) -> Series:
    points = []
    for line in lines:
        number = value(line)
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        if is_number and isinstance(line.get("step"), int):
            points.append((int(line["step"]), float(number)))
    return Series(name=name, points=tuple(points))


def _mapping(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    inner = value.get(key)
    return inner if isinstance(inner, dict) else {}


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _MOST_BYTES:
            return ""
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _read_object(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(_read_text(path) or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_lines(path: Path) -> tuple[Mapping[str, Any], ...]:
    lines = []
    for text in _read_text(path).splitlines():
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            lines.append(value)
    return tuple(lines)
