"""Shapes of rows: which one a file has, and each row as the conversation or text it means.

Whatever the shape, the rest of the package sees an `Example`: turns in the one form that chat
templates read, and which of them are trained. A row can never say how it is rendered.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from eightgig.data.rules import Notes, make_finding
from eightgig.data.turns import (
    ROLE_ALIASES,
    Message,
    check_order,
    kind_of,
    read_messages,
    read_tools,
)
from eightgig.errors import Finding

Format = Literal["messages", "prompt_completion", "sharegpt", "alpaca", "text"]

REQUIRED: Mapping[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
"""Columns that a row of each format must have."""

_EVERY_COLUMN = ("messages", "conversations", "prompt", "completion", "instruction", "input",
                 "output", "text", "system", "tools")  # fmt: skip

# What people call these columns, where the intent is plain.
_ALIASES: Mapping[str, tuple[str, ...]] = {
    "messages": ("message", "conversation", "dialogue", "dialog", "chat", "turns", "msgs"),
    "prompt": ("question", "query", "input", "user", "human", "instruction", "request", "source",
               "problem"),
    "completion": ("answer", "response", "output", "target", "assistant", "reply", "chosen",
                   "solution", "summary", "label"),
    "text": ("content", "body", "document", "article"),
}  # fmt: skip
_TEMPLATE_COLUMNS = frozenset(
    {"chat_template", "chat_template_kwargs", "template", "template_kwargs", "enable_thinking",
     "add_generation_prompt", "continue_final_message", "bos_token", "eos_token"}
)  # fmt: skip
_TOKEN_COLUMNS = frozenset({"input_ids", "labels", "attention_mask", "assistant_masks"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """What one row means.

    Attributes:
        messages: The turns; empty for plain text.
        trained: Indices of the assistant turns that are trained.
        tools: Tools the model may call, as JSON schemas.
        text: Plain text, trained whole.
        prompt_completion: The two texts, where the row gave texts and not turns.
        group: Value of `data.group_column`.
    """

    messages: tuple[Message, ...] = ()
    trained: tuple[int, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    text: str | None = None
    prompt_completion: tuple[str, str] | None = None
    group: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RowShape:
    """How rows are read: their format, and the names that columns have in them."""

    format: Format
    columns: Mapping[str, str]
    group_column: str | None = None


def detect_format(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> Format | None:
    """The format of the first of `rows` that has one.

    Args:
        rows: Some rows from the beginning of the data.
        columns: Expected name -> name in the rows.
    """
    return next((found for row in rows if (found := _format_of(row, columns)) is not None), None)


def _format_of(row: Mapping[str, Any], columns: Mapping[str, str]) -> Format | None:
    for name, required in REQUIRED.items():
        if all(columns.get(column, column) in row for column in required):
            return name
    return None


def check_columns(columns: Mapping[str, str], file: str) -> Finding | None:
    """The finding that `data.columns` maps a name that nothing is read from, if it does."""
    unknown = next((name for name in columns if name not in _EVERY_COLUMN), None)
    if unknown is None:
        return None
    close = difflib.get_close_matches(unknown, _EVERY_COLUMN, n=1)
    meant = f'Write "{close[0]}" there' if close else f"Use {', '.join(_EVERY_COLUMN)} there"
    message = f'`data.columns` maps "{unknown}", which is not read.'
    fix = f"{meant}; your own name stands behind the colon."
    return make_finding("data.columns", message, file=file, fix=fix)


def describe_columns(
    row: Mapping[str, Any], columns: Mapping[str, str], file: str, line: int
) -> Finding:
    """The finding that no format fits `row`, with the names that were probably meant."""
    names = sorted(str(key) for key in row)
    listed = ", ".join(f'"{name}"' for name in names[:12]) or "no columns"
    if _TOKEN_COLUMNS & set(names):
        message = "The rows hold token ids, not text."
        return make_finding("data.tokens_column", message, file=file, line=line)
    absent = next((name for name in columns.values() if name not in row), None)
    if absent is not None:
        message = f'`data.columns` names "{absent}"; the columns are {listed}.'
        fix = "Correct `data.columns`: expected name first, your name behind the colon."
        return make_finding("data.columns", message, file=file, line=line, fix=fix)
    message = f"The columns are not known: {listed}."
    inside = next((name for name in names if _holds_rows(row[name])), None)
    if inside is not None:
        message = f'The rows are a list inside of one object, under "{inside}".'
        fix = f"Write them as lines of their own: jq -c '.{inside}[]' OLD > NEW.jsonl"
        return make_finding("data.columns", message, file=file, line=line, fix=fix)
    guess = _guess_columns(row)
    if guess is None:
        return make_finding("data.columns", message, file=file, line=line)
    mapping = ", ".join(f"{expected}: {name}" for expected, name in guess.items())
    fix = f"Set `data.columns: {{{mapping}}}`, if that is what the columns mean."
    return make_finding("data.columns", message, file=file, line=line, fix=fix)


def _holds_rows(value: Any) -> bool:
    """Whether `value` is a list of rows of a known format."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and _format_of(first, {}) is not None


def _guess_columns(row: Mapping[str, Any]) -> dict[str, str] | None:
    for wanted, kind in ((("messages",), list), (("prompt", "completion"), str), (("text",), str)):
        names = [name for name in sorted(row) if isinstance(row[name], (kind, type(None)))]
        found: dict[str, str] = {}
        for expected in wanted:
            left = [name for name in names if name not in found.values()]
            likely = _likely_name(expected, left)
            if likely is not None:
                found[expected] = likely
        if len(found) == len(wanted):
            return {key: name for key, name in found.items() if key != name}
    return None


def _likely_name(expected: str, names: Sequence[str]) -> str | None:
    lowered = {name.lower().strip(): name for name in names}
    for alias in (expected, *_ALIASES.get(expected, ())):
        if alias in lowered:
            return lowered[alias]
    close = difflib.get_close_matches(expected, list(lowered), n=1, cutoff=0.75)
    return lowered[close[0]] if close else None


def read_example(row: Mapping[str, Any], shape: RowShape, notes: Notes) -> Example | None:
    """What `row` means, read in `shape`; None, and an error in `notes`, if it means nothing."""
    for name in sorted(_TEMPLATE_COLUMNS & set(row)):
        if row[name] is not None:
            notes.add("data.template_column", f'The column "{name}" is ignored.')
    values = {name: row.get(name) for name in (*_EVERY_COLUMN, *row)}
    values.update({expected: row.get(name) for expected, name in shape.columns.items()})
    if not _has_columns(values, row, shape, notes):
        return None
    group = None
    if shape.group_column is not None:
        if row.get(shape.group_column) is None:
            notes.add("data.missing_column", f'The group column "{shape.group_column}" is missing.')
            return None
        group = json.dumps(row[shape.group_column], sort_keys=True, default=str)
    if shape.format == "text":
        text = _text_of(values, "text", notes)
        return None if text is None else Example(text=text, group=group)
    return _read_conversation(values, shape.format, group, notes)


def _has_columns(
    values: Mapping[str, Any], row: Mapping[str, Any], shape: RowShape, notes: Notes
) -> bool:
    missing = [name for name in REQUIRED[shape.format] if values[name] is None]
    if not missing:
        return True
    other = _format_of({key: item for key, item in row.items() if item is not None}, {})
    if other is not None and other != shape.format:
        message = f"The row has the format {other}, not {shape.format}."
        notes.add("data.mixed_format", message)
        return False
    name = shape.columns.get(missing[0], missing[0])
    state = "null" if name in row else "missing"
    likely = _likely_name(missing[0], [key for key in row if key != name])
    fix = f'Rename "{likely}" to "{name}" in this row, or delete the row.' if likely else ""
    notes.add("data.missing_column", f'The column "{name}" is {state}.', fix=fix)
    return False


def _text_of(values: Mapping[str, Any], name: str, notes: Notes) -> str | None:
    value = values[name]
    if not isinstance(value, str):
        notes.add("data.column_type", f'The column "{name}" holds {kind_of(value)}, not text.')
        return None
    if not value.strip():
        notes.add("data.empty_turn", f'The column "{name}" is empty.')
        return None
    return value


@dataclass(frozen=True, kw_only=True, slots=True)
class _Turns:
    """Turns of a row, how many of them are its prompt, and its texts if it gave texts."""

    messages: tuple[Message, ...]
    prompt_length: int = 0
    texts: tuple[str, str] | None = None


def _read_conversation(
    values: Mapping[str, Any], shape: Format, group: str | None, notes: Notes
) -> Example | None:
    turns = _with_system(_read_turns(values, shape, notes), values.get("system"))
    tools = read_tools(_from_json(values.get("tools")), notes)
    messages = None if turns is None else check_order(turns.messages, notes)
    if turns is None or messages is None or tools is None:
        return None
    trained = tuple(
        index
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
        and index >= turns.prompt_length
        and message.get("weight", 1) != 0
    )
    if not trained:
        notes.add("data.no_answer", "No assistant turn of the row is trained.")
        return None
    return Example(
        messages=tuple({k: v for k, v in m.items() if k != "weight"} for m in messages),
        trained=trained,
        tools=tools,
        prompt_completion=turns.texts,
        group=group,
    )


def _read_turns(values: Mapping[str, Any], shape: Format, notes: Notes) -> _Turns | None:
    if shape == "prompt_completion":
        return _read_prompt_completion(values, notes)
    if shape == "alpaca":
        return _read_alpaca(values, notes)
    column = REQUIRED[shape][0]
    listed = _from_json(values[column])
    messages = read_messages(_from_sharegpt(listed), column, notes)
    return None if messages is None else _Turns(messages=messages)


def _with_system(turns: _Turns | None, system: Any) -> _Turns | None:
    """`turns` behind the text of a column `system`, where they have no system turn."""
    if turns is None or not isinstance(system, str) or not system.strip():
        return turns
    if turns.messages[0]["role"] == "system":
        return turns
    return _Turns(
        messages=({"role": "system", "content": system}, *turns.messages),
        prompt_length=turns.prompt_length + bool(turns.prompt_length),
        texts=turns.texts,
    )


def _from_json(value: Any) -> Any:
    """`value`, parsed where a table keeps it as JSON in a text cell."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value or None if isinstance(value, str) else value


def _from_sharegpt(turns: Any) -> Any:
    """Turns with from and value as turns with role and content; anything else as it is."""
    if not isinstance(turns, list):
        return turns
    return [
        {
            **{key: item for key, item in turn.items() if key not in ("from", "value")},
            "role": ROLE_ALIASES.get(str(turn["from"]), turn["from"]),
            "content": turn["value"],
        }
        if isinstance(turn, dict) and "from" in turn and "value" in turn
        else turn
        for turn in turns
    ]


def _read_prompt_completion(values: Mapping[str, Any], notes: Notes) -> _Turns | None:
    sides: list[tuple[Message, ...]] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = values[name]
        if isinstance(value, list):
            messages = read_messages(value, name, notes)
            if messages is None:
                return None
            sides.append(messages)
        else:
            text = _text_of(values, name, notes)
            if text is None:
                return None
            sides.append(({"role": role, "content": text},))
    prompt, completion = values["prompt"], values["completion"]
    are_texts = isinstance(prompt, str) and isinstance(completion, str)
    return _Turns(
        messages=sides[0] + sides[1],
        prompt_length=len(sides[0]),
        texts=(prompt, completion) if are_texts else None,
    )


def _read_alpaca(values: Mapping[str, Any], notes: Notes) -> _Turns | None:
    instruction = _text_of(values, "instruction", notes)
    output = _text_of(values, "output", notes)
    if instruction is None or output is None:
        return None
    extra = values.get("input")
    if extra is not None and not isinstance(extra, str):
        notes.add("data.column_type", f'The column "input" holds {kind_of(extra)}, not text.')
        return None
    question = f"{instruction}\n\n{extra}" if extra and extra.strip() else instruction
    return _Turns(
        messages=(
            {"role": "user", "content": question},
            {"role": "assistant", "content": output},
        ),
        prompt_length=1,
        texts=(question, output),
    )
