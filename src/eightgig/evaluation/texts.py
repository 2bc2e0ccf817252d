"""How near an answer is to its reference: equal, equal but for form, or with words in common."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

_WORD = re.compile(r"\w+")
_EDGES = " .,;:!?\"'`*\u2018\u2019\u201c\u201d\u201e\xab\xbb"


def is_exact(answer: str, reference: str) -> bool:
    """Whether both are the same text; blanks around them do not count."""
    return answer.strip() == reference.strip()


def is_match(answer: str, reference: str) -> bool:
    """Whether both are the same but for case, blanks, punctuation at the ends, or JSON layout."""
    if normalised(answer) == normalised(reference):
        return True
    first, second = parse_json(answer), parse_json(reference)
    return isinstance(first, (dict, list)) and first == second


def normalised(text: str) -> str:
    """`text` in one case and Unicode form, single blanks, no punctuation at its ends."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).strip(_EDGES)


def parse_json(text: str) -> Any:
    """The value that `text` is; None where it is no JSON (or null)."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L: the F1 of the longest common subsequence of words, 0 to 1.

    Words are runs of letters and digits of any script, in lower case and not stemmed. Two texts
    without a word are 1 if they are equal.

    Source: Lin 2004, https://aclanthology.org/W04-1013. Differs: words of every script.
    """
    first, second = _words(answer), _words(reference)
    if not first or not second:
        return float(is_exact(answer, reference))
    common = longest_common_length(first, second)
    return 2 * common / (len(first) + len(second))


def longest_common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    Bit i of `row` is 0 where the best length grows with word i of `first`: one addition does a
    whole row of the table.

    Source: Hyyrö 2004, bit-parallel LCS-length computation revisited.
    """
    places: dict[str, int] = {}
    for index, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << index
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        matches = row & places.get(word, 0)
        row = (row + matches) | (row - matches)
        row &= full
    return len(first) - row.bit_count()


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
