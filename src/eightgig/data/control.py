"""Control tokens: those that the template writes, and those that a person typed.

A typed `<turn|>` must never become the real token. Every string of a row gets a mark behind each
character that a control token can begin with; what the template renders then shows, character by
character, which control tokens are its own. Those alone are tokenised as control tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from eightgig.data.encode import ControlTokenLost, Encoded, TextEncoder
from eightgig.data.turns import Message

# Private-use characters; one that a row does not hold marks its strings.
_MARKS = tuple(chr(0xF1E00 + index) for index in range(64))


@dataclass(frozen=True, slots=True)
class RenderedText:
    """A rendered text, and where in it a person typed the name of a control token."""

    text: str
    typed: frozenset[int] = frozenset()

    def __add__(self, other: RenderedText) -> RenderedText:
        """`other` behind this text."""
        shift = len(self.text)
        moved = frozenset(position + shift for position in other.typed)
        return RenderedText(self.text + other.text, self.typed | moved)

    def part(self, start: int, end: int | None = None) -> RenderedText:
        """The text from `start` to `end`."""
        text = self.text[start:end]
        kept = (position - start for position in self.typed)
        return RenderedText(text, frozenset(p for p in kept if 0 <= p < len(text)))


class ControlTokens:
    """The control tokens of a tokenizer under a template.

    Args:
        tokenizer_json: The tokenizer, as `tokenizers` writes it.
        template: Source of the chat template; added tokens that it names are control tokens, too.
    """

    def __init__(self, tokenizer_json: str, template: str) -> None:
        self._encoder = TextEncoder(tokenizer_json, template)
        self.ids: Mapping[str, int] = self._encoder.control_ids
        longest_first = sorted(self.ids, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        firsts = sorted({content[0] for content in self.ids})
        # A prompt and what it answers are looked at several times one after the other.
        self._found = lru_cache(8)(self._find)
        self._firsts = re.compile("[" + "".join(map(re.escape, firsts)) + "]" if firsts else "(?!)")

    def typed_in(self, text: str) -> frozenset[int]:
        """Where control tokens stand in a text that a person typed."""
        return frozenset(match.start() for match in self.pattern.finditer(text))

    def real_in(self, rendered: RenderedText) -> tuple[re.Match[str], ...]:
        """The control tokens of `rendered` that nobody typed, in order."""
        return self._found(rendered)

    def _find(self, rendered: RenderedText) -> tuple[re.Match[str], ...]:
        matches = self.pattern.finditer(rendered.text)
        return tuple(match for match in matches if match.start() not in rendered.typed)

    def render(
        self, render: Callable[[Any, Any], str], messages: Sequence[Message], tools: Sequence[Any]
    ) -> RenderedText:
        """What `render` makes of a conversation, with typed control tokens told apart.

        Raises:
            ControlTokenLost: The template reacts to a typed control token.
        """
        plain = render(messages, tools)
        strings = _strings([messages, tools])
        if not any(map(self._firsts.search, strings)):
            return RenderedText(plain)
        mark = _free_mark("".join([plain, *strings]))
        marked = render(*self._mark(messages, tools, mark))
        if marked.replace(mark, "") == plain:
            return self._told_apart(plain, marked, mark)
        if self.pattern.findall(plain) == self.pattern.findall(marked):
            return RenderedText(plain)
        # The template looks for some of the names in answers, as for `</think>`: those are its own.
        read = frozenset(
            content
            for content in self.ids
            if any(content in text for text in _strings(messages))
            and render(*self._mark(messages, tools, mark, only=content)).replace(mark, "") != plain
        )
        marked = render(*self._mark(messages, tools, mark, keep=read))
        if marked.replace(mark, "") == plain:
            return self._told_apart(plain, marked, mark)
        raise ControlTokenLost(", ".join(sorted(read)) or "a control token")

    def _told_apart(self, plain: str, marked: str, mark: str) -> RenderedText:
        places = (match.start() for match in re.finditer(mark, marked))
        behind = {place - number - 1 for number, place in enumerate(places)}
        return RenderedText(plain, frozenset(behind & self.typed_in(plain)))

    def _mark(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any],
        mark: str,
        *,
        keep: frozenset[str] = frozenset(),
        only: str | None = None,
    ) -> tuple[list[Message], list[Any]]:
        """Copies with `mark` in every string, but in roles, and `keep` in answers."""
        every = self._firsts if only is None else re.compile(re.escape(only))
        kept = re.compile("|".join([*map(re.escape, sorted(keep)), self._firsts.pattern]))

        def put(match: re.Match[str]) -> str:
            found = match.group()
            return found if found in keep else found[0] + mark + found[1:]

        def change(value: Any, pattern: re.Pattern[str]) -> Any:
            if isinstance(value, str):
                return pattern.sub(put, value)
            if isinstance(value, Mapping):
                return {change(k, pattern): change(item, pattern) for k, item in value.items()}
            if isinstance(value, (list, tuple)):
                return [change(item, pattern) for item in value]
            return value

        marked: list[Message] = [
            {
                key: item
                if key == "role"
                else change(item, kept if message["role"] == "assistant" and keep else every)
                for key, item in message.items()
            }
            for message in messages
        ]
        return marked, [change(tool, every) for tool in tools]

    def encode(self, rendered: RenderedText) -> Encoded:
        """Tokens of `rendered`, as a server makes them; typed control tokens as ordinary text.

        Raises:
            ControlTokenLost: The text holds the character that is set aside for this.
        """
        control = [match.start() for match in self.real_in(rendered)]
        encode = self._encoder.encode_typed if rendered.typed else self._encoder.encode
        return encode(rendered.text, control)


def _free_mark(text: str) -> str:
    mark = next((mark for mark in _MARKS if mark not in text), None)
    if mark is None:
        raise ControlTokenLost("every private-use character that is set aside")
    return mark


def _strings(value: Any) -> list[str]:
    """Every string in `value`, keys too."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for text in _strings(list(pair))]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _strings(item)]
    return []
