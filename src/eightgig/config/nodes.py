"""YAML text to a tree of nodes with line numbers; no object is ever constructed from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from eightgig.errors import ConfigError, Finding
from eightgig.units import KIB, format_bytes

MAX_FILE_BYTES = 256 * KIB
MAX_DEPTH = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a setting is written.

    Attributes:
        file: The file as the user named it, or the argument of the command line.
        line: 1-based line, None on the command line.
        folder: What its relative paths are relative to.
    """

    file: str
    line: int | None
    folder: Path


def make_finding(place: Place, code: str, *, message: str, why: str, fix: str) -> Finding:
    """An error in the settings, at `place`."""
    return Finding(
        severity="error",
        code=f"config.{code}",
        message=message,
        why=why,
        fix=fix,
        file=place.file,
        line=place.line,
    )


def make_error(file: str, findings: list[Finding]) -> ConfigError:
    """The one error that stands for `findings`."""
    if len(findings) == 1:
        (only,) = findings
        return ConfigError(only.place + only.message, why=only.why, fix=only.fix, findings=findings)
    return ConfigError(
        f"{file}: {len(findings)} settings cannot be used.",
        why="Every setting must be known, of its type, possible and of effect.",
        fix="Change the lines named; `eightgig init` writes all settings with their meaning.",
        findings=findings,
    )


def read_text(path: Path) -> str:
    """The text of the config file `path`.

    Raises:
        ConfigError: It is missing, unreadable, too large or not UTF-8.
    """
    try:
        size_bytes = path.stat().st_size
        if size_bytes > MAX_FILE_BYTES:
            raise ConfigError(
                f"{path} is {format_bytes(size_bytes)} large.",
                why=f"A config has at most {format_bytes(MAX_FILE_BYTES)}; is this the data file?",
                fix="Give the path of a config.yaml; `eightgig init` writes one.",
            )
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist.",
            why="It is read for the settings of the run.",
            fix="Check the path, or write a new one with `eightgig init`.",
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}.",
            why="It is read for the settings of the run.",
            fix="Give the path of a config.yaml that you may read.",
        ) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path}:{line}: byte {error.start} is not UTF-8.",
            why="Config files are read as UTF-8 text.",
            fix="Save the file as UTF-8.",
        ) from None


def parse_node(text: str, place: Place) -> yaml.Node | None:
    """The root node of `text`, None where it is empty.

    Raises:
        ConfigError: It is no YAML, or uses what a config does not need (aliases, deep nesting).
    """
    try:
        _refuse_expansion(text, place)
        root: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line if mark is not None else 0
        raise _syntax_error(place, line, error.problem or "it ends too early") from None
    except yaml.YAMLError as error:
        raise _syntax_error(place, 0, str(error).splitlines()[0]) from None
    return root


def mapping_items(
    node: yaml.MappingNode, place: Place
) -> Iterator[tuple[str, yaml.Node, Place] | Finding]:
    """Keys, values and places of `node`; a finding for every key that stands there twice."""
    lines: dict[str, int | None] = {}
    for key_node, value in node.value:
        key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
        here = at_node(place, key_node)
        if key in lines:
            yield make_finding(
                here,
                "duplicate_key",
                message=f'"{key}" stands here a second time (first in line {lines[key]}).',
                why="Only one of the two values could be used.",
                fix="Delete one of the two lines.",
            )
            continue
        lines[key] = here.line
        yield key, value, here


def at_node(place: Place, node: yaml.Node) -> Place:
    """The place of `node` in the file of `place`."""
    if place.line is None:
        return place
    return dataclasses.replace(place, line=node.start_mark.line + 1)


def _refuse_expansion(text: str, place: Place) -> None:
    """Refuse what makes a small file a large tree, before a tree is made."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        line = event.start_mark.line if event.start_mark is not None else 0
        if isinstance(event, yaml.AliasEvent):
            raise _syntax_error(place, line, "aliases (*name) are not read")
        if depth > MAX_DEPTH:
            raise _syntax_error(place, line, "it is nested too deeply")


def _syntax_error(place: Place, line: int, problem: str) -> ConfigError:
    where = place if place.line is None else dataclasses.replace(place, line=line + 1)
    finding = make_finding(
        where,
        "syntax",
        message=f"this is not a config: {problem}.",
        why="A config is YAML: groups, and indented below them one `name: value` a line.",
        fix="Mend this line or the one before it; texts with special characters need quotes.",
    )
    return make_error(place.file, [finding])
