"""One row as written becomes one object: JSON that means exactly one thing, or a finding."""

from __future__ import annotations

import json
from typing import Any

from eightgig.data.raw import MAX_COLUMNS, RawRow
from eightgig.data.rules import Notes

MAX_DEPTH = 64


class _DuplicateKey(ValueError):
    """An object names one key twice."""


def parse_row(row: RawRow, notes: Notes) -> dict[str, Any] | None:
    """The object that `row` holds; None, and an error in `notes`, if it holds none."""
    text = _decode(row.data, notes)
    value = None if text is None else _parse(text, notes)
    if value is None:
        return None
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a text", bool: "true or false"}.get(type(value), "a number")
        notes.add("data.not_an_object", f"The row is {kind}, not an object.")
        return None
    if len(value) > MAX_COLUMNS:
        message = f"The row has {len(value):,} columns; at most {MAX_COLUMNS} are read."
        notes.add("data.too_many_columns", message)
        return None
    return value


def _decode(data: bytes, notes: Notes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        column = len(data[: error.start].decode("utf-8", "replace")) + 1
        message = f"Column {column} is not UTF-8 (byte 0x{data[error.start]:02x})."
        notes.add("data.encoding", message)
        return None


def _parse(text: str, notes: Notes) -> Any:
    constants: list[str] = []

    def keep_constant(name: str) -> float:
        constants.append(name)
        return float(name)

    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        notes.add("data.too_deep", f"The row is nested more than {MAX_DEPTH} levels deep.")
        return None
    try:
        value = json.loads(text, parse_constant=keep_constant, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        notes.add("data.json", _describe(error))
        return None
    except _DuplicateKey as error:
        notes.add("data.duplicate_key", f'The key "{error}" stands twice in one object.')
        return None
    except (ValueError, RecursionError) as error:
        notes.add("data.json", f"The row is no valid JSON: {error}.")
        return None
    if value is None:
        notes.add("data.not_an_object", "The row is null, not an object.")
    if "\\u" in text and _has_half_characters(value):
        notes.add("data.surrogate", "The row holds half of a character pair (\\ud800 to \\udfff).")
        return None
    if constants:
        notes.add("data.json_constant", f"The row holds {constants[0]}.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKey(next(key for key in keys if keys.count(key) > 1))
    return value


def _has_half_characters(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _describe(error: json.JSONDecodeError) -> str:
    if error.msg == "Extra data":
        return f"Column {error.pos + 1}: a second value begins on the same line."
    if error.pos >= len(error.doc.rstrip()):
        return f"Column {error.pos + 1}: the line ends before its value does ({error.msg})."
    return f"Column {error.pos + 1}: no valid JSON ({error.msg})."


def _depth(text: str) -> int:
    """Deepest nesting of brackets outside of strings."""
    depth = deepest = 0
    in_string = is_escaped = False
    for character in text:
        if is_escaped:
            is_escaped = False
        elif in_string:
            is_escaped = character == "\\"
            in_string = character != '"'
        elif character == '"':
            in_string = True
        elif character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest
