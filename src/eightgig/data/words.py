"""Tokens word by word, for tokenizers that never join what stands before a blank with it.

Gemma's tokenizer looks for its half a million merges in the whole text at once. Yet none of its
tokens has a blank behind another character, so no merge reaches from one word into the next, and
the tokens of a text are those of its words. Most words come again and again: they are looked up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, models

# Blanks with what follows them, up to the next blank; the normalizer writes blanks as underlines.
_WORD = re.compile("[ \u2581]*[^ \u2581]+|[ \u2581]+")
_JOINED = re.compile("[^ \u2581][ \u2581]")
_NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
_KEPT_WORDS = 200_000
_KEPT_WORD_CHARS = 48


@dataclass(frozen=True, slots=True)
class WordPiece:
    """Tokens of some words, one behind the other."""

    ids: tuple[int, ...]
    _words: Sequence[str]
    _tokens: WordTokens

    def token_at(self, position: int) -> int | None:
        """Index of the token that begins at character `position`; None if none begins there."""
        start = index = 0
        for word in self._words:
            if position < start + len(word):
                break
            start += len(word)
            index += len(self._tokens.ids_of(word))
        else:
            return None
        starts = self._tokens.starts_in(word)
        inside = position - start
        return index + starts.index(inside) if inside in starts else None


class WordTokens:
    """The tokens of words.

    Args:
        tokenizer: One for which `can_split` holds.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> WordPiece:
        """Tokens of `text`."""
        words = _WORD.findall(text)
        ids: list[int] = []
        known = self._known
        for word in words:
            ids += known[word] if word in known else self.ids_of(word)
        return WordPiece(tuple(ids), words, self)

    def ids_of(self, word: str) -> tuple[int, ...]:
        """Token ids of one word."""
        found = self._known.get(word)
        if found is None:
            found = tuple(self._tokenizer.encode(word, add_special_tokens=False).ids)
            if len(word) <= _KEPT_WORD_CHARS:
                if len(self._known) >= _KEPT_WORDS:
                    self._known.clear()
                self._known[word] = found
        return found

    def starts_in(self, word: str) -> list[int]:
        """The characters of `word` at which its tokens begin."""
        encoding = self._tokenizer.encode(word, add_special_tokens=False)
        return [start for start, _ in encoding.offsets]


def can_split(tokenizer: Tokenizer) -> bool:
    """Whether the tokens of any text are those of its words, one word behind the other."""
    model = tokenizer.model
    if not isinstance(model, models.BPE) or _state(tokenizer.normalizer) != _NORMALIZER:
        return False
    has_own_ways = (
        model.dropout
        or model.ignore_merges
        or model.continuing_subword_prefix
        or model.end_of_word_suffix
    )
    if has_own_ways or not _leaves_whole(_state(tokenizer.pre_tokenizer)):
        return False
    added = tokenizer.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip or token.single_word for token in added):
        return False
    names = [token.content for token in added]
    vocabulary = tokenizer.get_vocab()
    return "\u2581" in vocabulary and not any(map(_JOINED.search, [*names, *vocabulary]))


def _state(part: Any) -> Any:
    return None if part is None else json.loads(part.__getstate__())


def _leaves_whole(pre_tokenizer: Any) -> bool:
    """Whether the text reaches the merges uncut: no blank is left that it could be cut at."""
    if pre_tokenizer is None:
        return True
    if pre_tokenizer["type"] == "Sequence":
        return all(map(_leaves_whole, pre_tokenizer["pretokenizers"]))
    return bool(pre_tokenizer["type"] == "Split" and pre_tokenizer["pattern"] == {"String": " "})
