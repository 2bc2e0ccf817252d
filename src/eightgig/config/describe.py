"""The settings as rows: group, name, type, default and their sentence, for help and reference."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from dataclasses import dataclass
from typing import Any

from eightgig.config import settings
from eightgig.config.convert import describe_type
from eightgig.config.settings import Config


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One setting.

    Attributes:
        group, name: Where it stands in a config.
        type_words: Its type in words.
        default: Its default as written in YAML, None where there is none.
        help: The sentence beneath its field.
    """

    group: str
    name: str
    type_words: str
    default: str | None
    help: str


def describe_settings() -> tuple[Setting, ...]:
    """Every setting, in the order of the config."""
    sentences = _sentences()
    rows = []
    for group, kind in typing.get_type_hints(Config).items():
        hints = typing.get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            has_default = field.default is not dataclasses.MISSING
            rows.append(
                Setting(
                    group=group,
                    name=field.name,
                    type_words=describe_type(hints[field.name]),
                    default=to_yaml(field.default) if has_default else None,
                    help=sentences[kind.__name__, field.name],
                )
            )
    return tuple(rows)


def describe_groups() -> dict[str, str]:
    """One sentence on each group of settings."""
    hints = typing.get_type_hints(Config)
    return {group: inspect.getdoc(kind) or "" for group, kind in hints.items()}


def to_yaml(value: Any) -> str:
    """`value` of a setting as it is written on one line of a config."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"[{', '.join(to_yaml(item) for item in value)}]"
    return str(value)


def _sentences() -> dict[tuple[str, str], str]:
    """The literals beneath the fields, by (class, field)."""
    sentences: dict[tuple[str, str], str] = {}
    for node in ast.parse(inspect.getsource(settings)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, literal in zip(node.body, node.body[1:], strict=False):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            if isinstance(literal, ast.Expr) and isinstance(literal.value, ast.Constant):
                sentences[node.name, field.target.id] = str(literal.value.value)
    return sentences
