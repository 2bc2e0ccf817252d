"""A `config.yaml` and the settings of the command line, read into a `Config`.

All faults are collected and raised once, each with its line and what to write instead.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from eightgig.config.check import find_problems
from eightgig.config.convert import (
    WrongTypeError,
    accepts_numbers,
    accepts_text,
    convert,
    describe_node,
    describe_type,
    kind_of,
    literal_options,
    mark_as_text,
)
from eightgig.config.names import nearest, suggest
from eightgig.config.nodes import (
    Place,
    make_error,
    make_finding,
    mapping_items,
    parse_node,
    read_text,
)
from eightgig.config.paths import resolve_paths
from eightgig.config.settings import Config
from eightgig.errors import Finding


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """A known setting as written."""

    setting: str
    node: yaml.Node
    place: Place


def read_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The settings of the file `path`, those in `overrides` put over them.

    Relative paths are relative to the file, defaults included; those in `overrides` to the
    current folder.

    Args:
        path: A YAML file; None: there are but the overrides.
        overrides: Settings of the form `group.name=value`; a later one wins.

    Raises:
        ConfigError: With a finding for every fault.
    """
    whole = Place(file=str(path or "--set"), line=1 if path else None, folder=_folder_of(path))
    items = [*_read_file(path, whole)] if path else []
    items += [item for text in overrides for item in _read_override(text)]
    findings = [item for item in items if isinstance(item, Finding)]
    entries = {item.setting: item for item in items if isinstance(item, _Entry)}
    values: dict[str, Any] = {}
    for setting, entry in entries.items():
        try:
            values[setting] = convert(_hint(setting), entry.node)
        except WrongTypeError:
            findings.append(_wrong_type(entry))
    findings += _missing(whole, entries)
    findings += _impossible(whole, entries, values)
    if findings:
        raise make_error(whole.file, sorted(findings, key=lambda finding: finding.line or 0))
    folders = {setting: entry.place.folder for setting, entry in entries.items()}
    return resolve_paths(_build(values), lambda setting: folders.get(setting, whole.folder))


@functools.cache
def setting_groups() -> Mapping[str, tuple[str, ...]]:
    """Names of all settings, by group."""
    return MappingProxyType(
        {
            group.name: tuple(field.name for field in dataclasses.fields(_group_type(group.name)))
            for group in dataclasses.fields(Config)
        }
    )


def _folder_of(path: Path | None) -> Path:
    return Path.cwd() if path is None else path.absolute().parent


def _read_file(path: Path, place: Place) -> Iterator[_Entry | Finding]:
    root = parse_node(read_text(path), place)
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        yield _not_a_group(place, "a config", root)
        return
    for item in mapping_items(root, place):
        if isinstance(item, Finding):
            yield item
            continue
        group, node, at = item
        if group not in setting_groups():
            yield _unknown(at, group, None)
        elif isinstance(node, yaml.MappingNode):
            yield from _read_group(group, node, at)
        elif kind_of(node) != "null":  # a group with nothing but comments in it
            yield _not_a_group(at, f'"{group}"', node)


def _read_group(group: str, node: yaml.MappingNode, place: Place) -> Iterator[_Entry | Finding]:
    for item in mapping_items(node, place):
        if isinstance(item, Finding):
            yield item
            continue
        key, value, at = item
        if key in setting_groups()[group]:
            yield _Entry(setting=f"{group}.{key}", node=value, place=at)
        else:
            yield _unknown(at, key, group)


def _read_override(text: str) -> Iterator[_Entry | Finding]:
    setting, has_value, value = text.partition("=")
    setting = setting.strip()
    place = Place(file=f"--set {setting}", line=None, folder=Path.cwd())
    if not has_value:
        yield make_finding(
            place,
            "syntax",
            message="there is no value.",
            why="Settings on the command line have the form --set group.name=value.",
            fix=f"Write --set {setting}=VALUE.",
        )
        return
    group, _, key = setting.rpartition(".")
    if key not in setting_groups().get(group, ()):
        yield _unknown(place, key, group or None)
        return
    node = parse_node(value, place) or yaml.ScalarNode("tag:yaml.org,2002:null", "")
    # The shell took the quotes that would make a number a text.
    is_number = isinstance(node, yaml.ScalarNode) and kind_of(node) in {"int", "float"}
    if is_number and not accepts_numbers(_hint(setting)):
        mark_as_text(node)
    yield _Entry(setting=setting, node=node, place=place)


def _missing(whole: Place, entries: Mapping[str, _Entry]) -> Iterator[Finding]:
    for setting in _required():
        if setting in entries:
            continue
        group, _, name = setting.partition(".")
        yield make_finding(
            whole,
            "missing",
            message=f'"{name}" is missing under "{group}".',
            why="It has no default.",
            fix=f'Add "{name}: ..." under "{group}".',
        )


def _impossible(
    whole: Place, entries: Mapping[str, _Entry], values: Mapping[str, Any]
) -> Iterator[Finding]:
    """Judge the values that could be read; the others are reported already."""
    is_unread = {*_required(), *entries} - set(values)
    for problem in find_problems(_build(values)):
        if is_unread & {problem.setting, *problem.involved}:
            continue
        named = (problem.setting, *problem.involved)
        written = next((entries[setting] for setting in named if setting in entries), None)
        place = written.place if written else whole
        yield make_finding(
            place, problem.code, message=problem.message, why=problem.why, fix=problem.fix
        )


def _build(values: Mapping[str, Any]) -> Config:
    groups: dict[str, dict[str, Any]] = {group: {} for group in setting_groups()}
    for setting in (*_required(), *values):
        group, _, name = setting.partition(".")
        groups[group][name] = values.get(setting, "")
    return Config(**{group: _group_type(group)(**fields) for group, fields in groups.items()})


def _required() -> tuple[str, ...]:
    return tuple(
        f"{group}.{field.name}"
        for group in setting_groups()
        for field in dataclasses.fields(_group_type(group))
        if field.default is dataclasses.MISSING
    )


@functools.cache
def _group_type(group: str) -> Any:
    return typing.get_type_hints(Config)[group]


@functools.cache
def _hint(setting: str) -> Any:
    group, _, name = setting.partition(".")
    return typing.get_type_hints(_group_type(group), include_extras=True)[name]


def _unknown(place: Place, key: str, group: str | None) -> Finding:
    return make_finding(
        place,
        "unknown_key",
        message=f'unknown key "{key}".',
        why="Unknown settings are refused: a typo must not become a silent default.",
        fix=suggest(key, group, setting_groups(), is_dotted=place.line is None),
    )


def _wrong_type(entry: _Entry) -> Finding:
    name = entry.setting.partition(".")[2]
    hint = _hint(entry.setting)
    words = literal_options(hint)
    near = nearest(str(entry.node.value), words) if words else None
    wanted = f'"{near}"' if near else describe_type(hint)
    is_text_possible = isinstance(entry.node, yaml.ScalarNode) and accepts_text(hint)
    quotes = f', or put "{entry.node.value}" in quotes' if is_text_possible else ""
    return make_finding(
        entry.place,
        "wrong_type",
        message=f'"{name}" is {describe_node(entry.node)}.',
        why=f"It must be {describe_type(hint)}.",
        fix=f"Write {wanted}{quotes}.",
    )


def _not_a_group(place: Place, what: str, node: yaml.Node) -> Finding:
    return make_finding(
        place,
        "wrong_type",
        message=f"{what} is {describe_node(node)}.",
        why="It must hold settings, one `name: value` a line.",
        fix="Indent the settings below the name of their group.",
    )
