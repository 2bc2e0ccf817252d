"""What the texts of a row look like: their similarity, answers, scripts and languages."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from eightgig.data.formats import Example
from eightgig.data.near import piece_hashes, signature
from eightgig.data.patterns import check_plain_text, check_text, is_about_placeholders
from eightgig.data.rules import Notes
from eightgig.data.turns import texts_of

SHORT_ANSWER_CHARS = 80

# First and last code point of the letters of each script.
_SCRIPTS: Sequence[tuple[int, int, str]] = (
    (0x41, 0x5A, "Latin"), (0x61, 0x7A, "Latin"), (0xC0, 0x24F, "Latin"),
    (0x370, 0x3FF, "Greek"), (0x400, 0x52F, "Cyrillic"), (0x531, 0x58F, "Armenian"),
    (0x590, 0x5FF, "Hebrew"), (0x600, 0x77F, "Arabic"), (0x900, 0x97F, "Devanagari"),
    (0x980, 0x9FF, "Bengali"), (0xB80, 0xBFF, "Tamil"), (0xC00, 0xC7F, "Telugu"),
    (0xE00, 0xE7F, "Thai"), (0x10A0, 0x10FF, "Georgian"), (0x1100, 0x11FF, "Hangul"),
    (0x1200, 0x137F, "Ethiopic"), (0x1E00, 0x1EFF, "Latin"), (0x3040, 0x30FF, "Kana"),
    (0x3400, 0x9FFF, "Han"), (0xAC00, 0xD7AF, "Hangul"), (0x20000, 0x2FA1F, "Han"),
)  # fmt: skip
_EDGES = np.array([edge for first, last, _ in _SCRIPTS for edge in (first, last + 1)], np.uint32)

_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "English": "the and of is that for with this are you to what how a",
        "German": "der die und das ist nicht mit ein eine sie",
        "French": "le les des est une dans pour que vous sur",
        "Spanish": "el los las una por que con para del como",
        "Italian": "il gli che una per con sono della nel come",
        "Portuguese": "os uma que para com dos como mais por na",
        "Dutch": "het een van dat niet met zijn voor ook wordt",
        "Polish": "nie jest na że się jak dla przez oraz są",
        "Turkish": "bir ve bu için ile olarak daha çok gibi olan",
    }
)
_FREQUENT_WORDS = MappingProxyType({name: frozenset(w.split()) for name, w in _WORDS.items()})


@dataclass(frozen=True, kw_only=True, slots=True)
class RowText:
    """Facts about the texts of one row.

    Attributes:
        signature: MinHash signature of all it says, (SIGNATURE_SIZE,), uint32.
        answer_key: Hash of its answers; 0 for plain text.
        answer: That answer where it is short, else "".
        scripts: Letters per script.
        language: Language that its words look like; "" where they look like none.
    """

    signature: NDArray[np.uint32]
    answer_key: int
    answer: str
    scripts: Mapping[str, int]
    language: str


def describe_text(example: Example, boilerplate: NDArray[np.uint64], notes: Notes) -> RowText:
    """Look at the texts of `example`; what is wrong with them is added to `notes`.

    Args:
        example: The row.
        boilerplate: Pieces that many rows share, from `near.common_pieces`.
        notes: Findings are added here, at most one of a code.
    """
    own = Notes(file=notes.file, line=notes.line)
    if example.text is not None:
        check_text(example.text, "the row", own)
        check_plain_text(example.text, own)
    for number, message in enumerate(example.messages, start=1):
        for text in texts_of(message):
            check_text(text, f"turn {number}", own)
    said = said_text(example)
    seen = {finding.code: finding for finding in reversed(own.findings)}
    if "data.placeholder" in seen and is_about_placeholders(said):
        del seen["data.placeholder"]
    notes.findings.extend(reversed(seen.values()))
    # Of a conversation all answers: many end with the same thanks.
    answers = (" ".join(texts_of(example.messages[index])) for index in example.trained)
    answer = "\n".join(answers).strip()
    return RowText(
        signature=signature(piece_hashes(said), boilerplate),
        answer_key=hash_text(answer.lower()) if answer else 0,
        answer=answer if len(answer) <= SHORT_ANSWER_CHARS else "",
        scripts=count_scripts(said),
        language=guess_language(said),
    )


def said_text(example: Example) -> str:
    """All that user and assistant say in a row, or its plain text."""
    if example.text is not None:
        return example.text
    return "\n".join(
        text
        for message in example.messages
        if message["role"] in ("user", "assistant")
        for text in texts_of(message)
    )


def count_scripts(text: str) -> Mapping[str, int]:
    """Letters of `text` per script; other characters are not counted."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    places = np.searchsorted(_EDGES, points, side="right")
    counts = np.bincount(places, minlength=len(_EDGES) + 1)
    found: Counter[str] = Counter()
    for index, (_, _, name) in enumerate(_SCRIPTS):
        # Between the edges of a script places are odd.
        found[name] += int(counts[2 * index + 1])
    return {name: count for name, count in found.items() if count}


def guess_language(text: str) -> str:
    """The language whose most frequent words `text` has most of; "" where it has few."""
    words = Counter(text[:4_000].lower().split())
    scores = {name: sum(words[w] for w in own) for name, own in _FREQUENT_WORDS.items()}
    best = max(scores, key=lambda name: scores[name])
    return best if scores[best] >= max(2, 0.04 * words.total()) else ""


def hash_text(text: str) -> int:
    """Hash of `text` in 64 bits; never 0."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1
