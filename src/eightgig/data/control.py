"""Control tokens: those that the template writes, and those that a person typed.

A typed `<turn|>` must never become the real token. Every string of a row gets a mark behind each
character that a control token can begin with; what the template renders then shows, character by
character, which control tokens are its own. Those alone are tokenised as control tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Encoding, Tokenizer, processors

from eightgig.data.turns import Message

# Private-use characters: the first marks strings of a row, the second names of control tokens.
_MARKS = tuple(chr(0xF1E00 + index) for index in range(64))
_ALIAS = "\U000f1eff"
_MARKUP = frozenset("<>[]|")


class ControlTokenLost(Exception):
    """A control token typed in a row cannot be kept apart from the template's own."""


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


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a text, with the token that begins at a character."""

    ids: tuple[int, ...]
    _encoding: Encoding
    _to_encoded: Callable[[int], int]

    def token_at(self, position: int) -> int | None:
        """Index of the token that begins at character `position`; None if none begins there."""
        place = self._to_encoded(position)
        index = self._encoding.char_to_token(place)
        if index is None:
            return None
        span = self._encoding.token_to_chars(index)
        return int(index) if span is not None and span[0] == place else None


class ControlTokens:
    """The control tokens of a tokenizer under a template.

    Args:
        tokenizer_json: The tokenizer, as `tokenizers` writes it.
        template: Source of the chat template; added tokens that it names are control tokens, too.
    """

    def __init__(self, tokenizer_json: str, template: str) -> None:
        self._json = tokenizer_json
        added = json.loads(tokenizer_json).get("added_tokens", [])
        self.ids: Mapping[str, int] = {
            entry["content"]: entry["id"]
            for entry in added
            if entry["special"]
            or (entry["content"] in template and _MARKUP & set(entry["content"]))
        }
        longest_first = sorted(self.ids, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        firsts = sorted({content[0] for content in self.ids})
        self._firsts = re.compile("[" + "".join(map(re.escape, firsts)) + "]" if firsts else "(?!)")
        self._plain = _load_tokenizer(tokenizer_json)
        self._aliased: tuple[Tokenizer, Mapping[int, int]] | None = None

    def typed_in(self, text: str) -> frozenset[int]:
        """Where control tokens stand in a text that a person typed."""
        return frozenset(match.start() for match in self.pattern.finditer(text))

    def real_in(self, rendered: RenderedText) -> list[re.Match[str]]:
        """The control tokens of `rendered` that nobody typed, in order."""
        matches = self.pattern.finditer(rendered.text)
        return [match for match in matches if match.start() not in rendered.typed]

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
        text = rendered.text
        if not rendered.typed:
            encoding = self._plain.encode(text, add_special_tokens=False)
            return Encoded(tuple(encoding.ids), encoding, lambda position: position)
        if _ALIAS in text:
            raise ControlTokenLost(f"the private-use character U+{ord(_ALIAS):X}")
        real = self.real_in(rendered)
        starts = [match.start() for match in real]
        pieces, last = [], 0
        for start in starts:
            pieces.append(text[last : start + 1])
            last = start + 1
        tokenizer, ids = self._alias_tokenizer()
        encoding = tokenizer.encode(_ALIAS.join([*pieces, text[last:]]), add_special_tokens=False)
        found = tuple(ids.get(token, token) for token in encoding.ids)
        control = frozenset(self.ids.values())
        if sum(token in control for token in found) != len(real):
            raise ControlTokenLost("a control token that the tokenizer makes of ordinary text")
        return Encoded(found, encoding, lambda p: p + sum(start < p for start in starts))

    def _alias_tokenizer(self) -> tuple[Tokenizer, Mapping[int, int]]:
        """The tokenizer with other names for its control tokens, and their ids -> true ids."""
        if self._aliased is None:
            aliases = {content: content[0] + _ALIAS + content[1:] for content in self.ids}
            tokenizer = Tokenizer.from_str(_rename_tokens(self._json, aliases))
            _as_it_is(tokenizer)
            ids = {
                number: self.ids[name]
                for name, alias in aliases.items()
                if (number := tokenizer.token_to_id(alias)) is not None
            }
            self._aliased = tokenizer, ids
        return self._aliased


def _load_tokenizer(tokenizer_json: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    _as_it_is(tokenizer)
    return tokenizer


def _as_it_is(tokenizer: Tokenizer) -> None:
    """Neither cut, pad, add tokens, nor leave blanks out of offsets."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.post_processor = processors.Sequence([])


def _rename_tokens(tokenizer_json: str, aliases: Mapping[str, str]) -> str:
    described = json.loads(tokenizer_json)
    for entry in described["added_tokens"]:
        entry["content"] = aliases.get(entry["content"], entry["content"])
    model = described["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {aliases.get(name, name): number for name, number in vocabulary.items()}
    else:
        model["vocab"] = [[aliases.get(name, name), score] for name, score in vocabulary]
    if model.get("unk_token") in aliases:
        model["unk_token"] = aliases[model["unk_token"]]
    described["post_processor"] = None
    return json.dumps(described, ensure_ascii=False)


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
