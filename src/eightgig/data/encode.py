"""Texts as tokens: cut at control tokens, every piece tokenised once.

A tokenizer cuts a text at its control tokens before it does anything else, so the pieces between
them become the same tokens in whatever text they stand. Rows that begin alike (one system text, the
earlier turns of a conversation) share their pieces; the last ones are remembered.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from tokenizers import AddedToken, Encoding, Tokenizer, processors

from eightgig.data.template import RenderingLimit
from eightgig.data.words import WordPiece, WordTokens, can_split

_KEPT_PIECES = 128
_KEPT_PIECE_CHARS = 16_000
# A private-use character that makes other names of control tokens.
_ALIAS = "\U000f1eff"


class ControlTokenLost(Exception):
    """A control token typed in a row cannot be kept apart from the template's own."""


class _Piece(NamedTuple):
    """Tokens of a piece of text, and where control tokens begin whose names are longer in it."""

    ids: tuple[int, ...]
    encoding: Encoding
    renamed: Sequence[int] = ()

    def token_at(self, position: int) -> int | None:
        place = position + bisect.bisect_left(self.renamed, position)
        index = self.encoding.char_to_token(place)
        if index is None:
            return None
        span = self.encoding.token_to_chars(index)
        return int(index) if span is not None and span[0] == place else None


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a text, with the token that begins at a character."""

    ids: tuple[int, ...]
    _pieces: Sequence[_Piece | WordPiece]
    _starts: Sequence[int]
    _firsts: Sequence[int]

    def token_at(self, position: int) -> int | None:
        """Index of the token that begins at character `position`; None if none begins there."""
        number = bisect.bisect_right(self._starts, position) - 1
        index = self._pieces[number].token_at(position - self._starts[number])
        return None if index is None else self._firsts[number] + index


class TextEncoder:
    """Tokenises rendered texts as a server does.

    Args:
        tokenizer_json: The tokenizer, as `tokenizers` writes it.
        template: Source of the chat template; added tokens that it names are control tokens, too.
    """

    def __init__(self, tokenizer_json: str, template: str) -> None:
        self._json = tokenizer_json
        self._plain = _load_tokenizer(tokenizer_json)
        added = self._plain.get_added_tokens_decoder()
        self.control_ids: Mapping[str, int] = {
            token.content: number
            for number, token in added.items()
            if token.special or (token.content in template and _MARKUP & set(token.content))
        }
        self._words = WordTokens(self._plain) if can_split(self._plain) else None
        self._can_cut = _can_cut(added.values(), self.control_ids)
        self._remembered = lru_cache(_KEPT_PIECES)(self._encode_piece)
        self._aliased: tuple[Tokenizer, Mapping[int, int]] | None = None

    def encode(self, text: str, control: Sequence[int]) -> Encoded:
        """Tokens of `text`.

        Args:
            text: A rendered text in which nobody typed the name of a control token.
            control: Where its control tokens begin, in order.

        Raises:
            RenderingLimit: The tokenizer gives up on it.
        """
        starts = [0, *(place for place in control if place)] if self._can_cut else [0]
        ends = [*starts[1:], len(text)]
        pieces: list[_Piece | WordPiece] = []
        ids: list[int] = []
        firsts: list[int] = []
        for start, end in zip(starts, ends, strict=True):
            is_short = end - start <= _KEPT_PIECE_CHARS
            piece = (self._remembered if is_short else self._encode_piece)(text[start:end])
            pieces.append(piece)
            firsts.append(len(ids))
            ids += piece.ids
        return Encoded(tuple(ids), pieces, starts, firsts)

    def _encode_piece(self, text: str) -> _Piece | WordPiece:
        if self._words is not None:
            return self._words.encode(text)
        encoding = _encode(self._plain, text)
        return _Piece(tuple(encoding.ids), encoding)

    def encode_typed(self, text: str, control: Sequence[int]) -> Encoded:
        """Tokens of a text in which somebody typed names of control tokens, those as ordinary text.

        Args:
            text: The text.
            control: Where the control tokens begin that nobody typed, in order.

        Raises:
            ControlTokenLost: The text holds the character that is set aside for this.
            RenderingLimit: The tokenizer gives up on it.
        """
        if _ALIAS in text:
            raise ControlTokenLost(f"the private-use character U+{ord(_ALIAS):X}")
        cuts = [0, *(start + 1 for start in control), len(text)]
        pieces = [text[start:end] for start, end in itertools.pairwise(cuts)]
        tokenizer, ids = self._alias_tokenizer()
        encoding = _encode(tokenizer, _ALIAS.join(pieces))
        found = tuple(ids.get(token, token) for token in encoding.ids)
        real = frozenset(self.control_ids.values())
        if sum(token in real for token in found) != len(control):
            raise ControlTokenLost("a control token that the tokenizer makes of ordinary text")
        return Encoded(found, [_Piece(found, encoding, control)], [0], [0])

    def _alias_tokenizer(self) -> tuple[Tokenizer, Mapping[int, int]]:
        """The tokenizer with other names for its control tokens, and their ids -> true ids."""
        if self._aliased is None:
            aliases = {content: content[0] + _ALIAS + content[1:] for content in self.control_ids}
            tokenizer = _load_tokenizer(_rename_tokens(self._json, aliases))
            ids = {
                number: self.control_ids[name]
                for name, alias in aliases.items()
                if (number := tokenizer.token_to_id(alias)) is not None
            }
            self._aliased = tokenizer, ids
        return self._aliased


_MARKUP = frozenset("<>[]|")


def _encode(tokenizer: Tokenizer, text: str) -> Encoding:
    """Tokens of `text` alone.

    Raises:
        RenderingLimit: The library gives up: a pattern of the tokenizer takes too many steps.
    """
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # Rust's; it cannot be imported
            raise
        raise RenderingLimit(f"the tokenizer gives up on its text ({error})") from None


def _can_cut(added: Collection[AddedToken], control: Collection[str]) -> bool:
    """Whether pieces behind control tokens become the same tokens alone as in the whole text."""
    own = [token for token in added if token.content in control]
    if any(token.lstrip or token.single_word or token.normalized for token in own):
        return False
    others = [token.content for token in added if token.content not in control]
    return not any(name in other for other in others for name in control)


def _load_tokenizer(tokenizer_json: str) -> Tokenizer:
    """The tokenizer, which neither cuts, pads, adds tokens, nor leaves blanks out of offsets."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.post_processor = processors.Sequence([])
    return tokenizer


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
