"""The run folder: its paths, its files, and records to and from JSON.

Layout: `config.yaml, plan.json, environment.json, metrics.jsonl, events.jsonl, log.txt,
checkpoints/step-000120/, adapter/, report.html`. Nothing here knows what a training is.
"""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

RecordT = TypeVar("RecordT")
EventKind = Literal["eval", "guard", "oom", "save", "plan", "trial", "resume", "stop"]


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
    def metrics_path(self) -> Path:
        """One StepReport per optimizer step."""
        return self.folder / "metrics.jsonl"

    @property
    def events_path(self) -> Path:
        """One Event per evaluation, guard, out-of-memory detour and save."""
        return self.folder / "events.jsonl"

    @property
    def log_path(self) -> Path:
        """What the terminal showed."""
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


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` beside `path`, flush it to the disk and rename it over `path`."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` (a record or plain JSON) to `path` atomically."""
    write_atomically(path, json.dumps(to_json(value), indent=2, ensure_ascii=False) + "\n")


def append_json_line(path: Path, value: Any) -> None:
    """Append `value` (a record or plain JSON) as one line to `path`."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(to_json(value), ensure_ascii=False) + "\n")


def to_json(value: Any) -> Any:
    """Plain JSON of a record: dataclasses become objects, tuples lists, paths strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: to_json(getattr(value, field.name)) for field in fields}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def from_json(kind: type[RecordT], value: Any) -> RecordT:
    """A record of type `kind` from what `to_json` made of it.

    Raises:
        ValueError: A field is missing, unknown, or of another type.
    """
    converted = _convert(kind, value, kind.__name__)
    return typing.cast("RecordT", converted)


def _convert(hint: Any, value: Any, place: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _convert_record(hint, value, place)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, place)
    if origin is Literal:
        if value in arguments:
            return value
        raise ValueError(f"{place}: {value!r} is none of {arguments}")
    if origin is tuple:
        return _convert_tuple(arguments, value, place)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{place}: expected an object, found {value!r}")
        return {key: _convert(arguments[1], item, f"{place}.{key}") for key, item in value.items()}
    return _convert_scalar(hint, value, place)


def _convert_scalar(hint: Any, value: Any, place: str) -> Any:
    if hint is Any:
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (None, type(None)) and value is None:
        return None
    is_bool_for_number = isinstance(value, bool) and hint is not bool
    if isinstance(hint, type) and isinstance(value, hint) and not is_bool_for_number:
        return value
    raise ValueError(f"{place}: expected {getattr(hint, '__name__', hint)}, found {value!r}")


def _convert_union(options: tuple[Any, ...], value: Any, place: str) -> Any:
    for option in options:
        try:
            return _convert(option, value, place)
        except ValueError:
            continue
    raise ValueError(f"{place}: {value!r} is none of the allowed types")


def _convert_tuple(arguments: tuple[Any, ...], value: Any, place: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{place}: expected a list, found {value!r}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise ValueError(f"{place}: expected {len(arguments)} items, found {len(value)}")
    items = zip(arguments, value, strict=True)
    return tuple(_convert(hint, item, f"{place}[{i}]") for i, (hint, item) in enumerate(items))


def _convert_record(kind: type[Any], value: Any, place: str) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{place}: expected an object, found {value!r}")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise ValueError(f"{place}: unknown field {unknown[0]!r}")
    required = {
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(value))
    if missing:
        raise ValueError(f"{place}: missing field {missing[0]!r}")
    return kind(**{n: _convert(hints[n], item, f"{place}.{n}") for n, item in value.items()})
