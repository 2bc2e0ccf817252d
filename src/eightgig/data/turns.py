"""The turns of a conversation, in the one form that chat templates read.

Each message becomes {"role", "content", ...} with text content, tool arguments as objects and
reasoning under every name that templates know; keys that no server sends are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from eightgig.data.rules import Notes

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
ROLE_ALIASES: Mapping[str, str] = MappingProxyType(
    {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
)
"""Roles of ShareGPT, and what they mean."""
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")

_MEANT = {
    **ROLE_ALIASES,
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "agent": "assistant",
    "customer": "user",
    "function": "tool",
    "ipython": "tool",
}
_KNOWN_KEYS = frozenset({"role", "content", "tool_calls", "tool_call_id", "name", "weight"})
_TURN_START = ("system", "developer")


def texts_of(message: Message) -> list[str]:
    """The texts that the content of `message` consists of."""
    content = message["content"]
    return [part["text"] for part in content] if isinstance(content, list) else [content]


def read_messages(turns: Any, column: str, notes: Notes) -> tuple[Message, ...] | None:
    """The messages of one row; None, and an error in `notes`, if one of them is none."""
    if not isinstance(turns, list):
        kind = "text that is no JSON list" if isinstance(turns, str) else kind_of(turns)
        notes.add("data.message_type", f'The column "{column}" holds {kind}, not a list of turns.')
        return None
    if not turns:
        notes.add("data.no_messages", f'The column "{column}" is an empty list.')
        return None
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        message = _read_message(turn, number, notes)
        if message is None:
            return None
        is_blank = message["role"] in _TURN_START and not str(message["content"]).strip()
        if not is_blank:
            messages.append(message)
    if not messages:
        notes.add("data.no_answer", "The row has an empty system turn and nothing else.")
        return None
    return tuple(messages)


def _read_message(turn: Any, number: int, notes: Notes) -> Message | None:
    if not isinstance(turn, dict):
        notes.add("data.message_type", f"Turn {number} is no object.")
        return None
    role = _read_role(turn, number, notes)
    if role is None:
        return None
    calls = _read_calls(turn.get("tool_calls"), f"Turn {number}", notes)
    if calls is None:
        return None
    content = _read_content(turn, role, number, notes, has_calls=bool(calls))
    if content is None:
        return None
    message: dict[str, Any] = {"role": role, "content": content}
    reasoning = next((turn[key] for key in REASONING_KEYS if turn.get(key)), None)
    if reasoning is not None:
        if not isinstance(reasoning, str) or role != "assistant":
            where = "is no text" if role == "assistant" else f"stands in a {role} turn"
            notes.add("data.content_type", f"The reasoning of turn {number} {where}.")
            return None
        message.update(dict.fromkeys(REASONING_KEYS, reasoning))
    if calls:
        message["tool_calls"] = calls
    message.update({key: turn[key] for key in ("tool_call_id", "name", "weight") if key in turn})
    unknown = sorted(set(turn) - _KNOWN_KEYS - set(REASONING_KEYS))
    if any(turn[key] not in (None, [], {}, "") for key in unknown):
        notes.add("data.message_keys", f'Turn {number} has the key "{unknown[0]}".')
    return message


def _read_role(turn: Mapping[str, Any], number: int, notes: Notes) -> str | None:
    role = turn.get("role")
    if role in ROLES:
        return str(role)
    if role is None:
        hint = " It has from and value, as ShareGPT rows do." if "from" in turn else ""
        notes.add("data.role", f"Turn {number} has no role.{hint}")
        return None
    meant = str(role).strip().lower()
    meant = _MEANT.get(meant, meant)
    fix = f'Write "{meant}".' if meant in ROLES else ""
    notes.add("data.role", f'Turn {number} has the unknown role "{str(role)[:40]}".', fix=fix)
    return None


def _read_content(
    turn: Mapping[str, Any], role: str, number: int, notes: Notes, *, has_calls: bool
) -> str | list[dict[str, str]] | None:
    """Text, or text parts; None, and an error in `notes`, if it is neither."""
    content = turn.get("content")
    if content is None and has_calls:
        return ""
    if content is None:
        state = "null" if "content" in turn else "missing"
        notes.add("data.content_missing", f"The content of turn {number} ({role}) is {state}.")
        return None
    if isinstance(content, list):
        return _read_parts(content, number, notes)
    if not isinstance(content, str):
        message = f"The content of turn {number} ({role}) is {kind_of(content)}, not text."
        notes.add("data.content_type", message)
        return None
    may_be_empty = has_calls or role in ("tool", *_TURN_START)
    if not content.strip() and not may_be_empty:
        state = "only blanks" if content else "empty"
        notes.add("data.empty_turn", f"Turn {number} ({role}) is {state}.")
        return None
    return content


def kind_of(value: Any) -> str:
    """What `value` is, in the words of JSON."""
    kinds = {bool: "true or false", int: "a number", float: "a number", dict: "an object",
             list: "a list", str: "text", type(None): "null"}  # fmt: skip
    return kinds.get(type(value), type(value).__name__)


def _read_parts(parts: list[Any], number: int, notes: Notes) -> str | list[dict[str, str]] | None:
    texts: list[str] = []
    for part in parts:
        if isinstance(part, dict) and part.get("type") in ("text", None):
            text = part.get("text")
        elif isinstance(part, dict):
            kind = str(part.get("type"))[:20]
            notes.add("data.media", f'Turn {number} has a part of the type "{kind}".')
            return None
        else:
            text = None
        if not isinstance(text, str):
            notes.add("data.content_type", f"A part of turn {number} is no text part.")
            return None
        texts.append(text)
    if not "".join(texts).strip():
        notes.add("data.empty_turn", f"Turn {number} has no text.")
        return None
    if len(texts) == 1:
        return texts[0]
    return [{"type": "text", "text": text} for text in texts]


def _read_calls(calls: Any, place: str, notes: Notes) -> list[dict[str, Any]] | None:
    """Tool calls with arguments as objects; None, and an error in `notes`, if one is none."""
    if calls in (None, [], ""):
        return []
    if not isinstance(calls, list):
        notes.add("data.tool_call", f"The tool calls of {place.lower()} are no list.")
        return None
    read: list[dict[str, Any]] = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            notes.add("data.tool_call", f"{place} has a tool call without a function name.")
            return None
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(arguments, dict):
            message = f'The arguments of the call to "{function["name"]}" are no JSON object.'
            notes.add("data.tool_call", message)
            return None
        entry = {
            "type": "function",
            "function": {"name": function["name"], "arguments": arguments},
        }
        if call.get("id") is not None:
            entry["id"] = call["id"]
        read.append(entry)
    return read


def read_tools(tools: Any, notes: Notes) -> tuple[Mapping[str, Any], ...] | None:
    """Tools as JSON schemas; None, and an error in `notes`, if they are none."""
    if tools in (None, [], ""):
        return ()
    if not isinstance(tools, list):
        notes.add("data.tools", "The column tools is no JSON list.")
        return None
    read: list[Mapping[str, Any]] = []
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            notes.add("data.tools", "A tool has no function name.")
            return None
        read.append({"type": "function", "function": function})
    return tuple(read)


def check_order(messages: tuple[Message, ...], notes: Notes) -> tuple[Message, ...] | None:
    """`messages` up to the last assistant turn; None, and an error in `notes`, if out of order."""
    roles = [str(message["role"]) for message in messages]
    if "assistant" not in roles:
        notes.add("data.no_answer", "The row has no assistant turn.")
        return None
    start = int(roles[0] in _TURN_START)
    before = "start"
    for number, message in enumerate(messages[start:], start=start + 1):
        role = str(message["role"])
        if role not in _FOLLOWERS[before]:
            notes.add("data.role_order", _describe_order(before, role, number))
            return None
        before = "call" if message.get("tool_calls") else role
    end = len(roles) - roles[::-1].index("assistant")
    if end < len(roles):
        follow = "1 turn follows" if end == len(roles) - 1 else f"{len(roles) - end} turns follow"
        notes.add("data.trailing_turn", f"{follow} the last answer.")
    return messages[:end]


_FOLLOWERS: Mapping[str, tuple[str, ...]] = {
    "start": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "call": ("tool",),
    "tool": ("tool", "assistant"),
}


def _describe_order(before: str, role: str, number: int) -> str:
    if before == "start":
        return f"The first turn is {role}, not user."
    if role in _TURN_START:
        return f"Turn {number} is {role}; only the first turn may be."
    named = "an assistant turn with tool calls" if before == "call" else f"a {before} turn"
    return f"Turn {number} ({role}) follows {named}."
