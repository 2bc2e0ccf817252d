"""Rows that say almost the same: MinHash signatures, and pairs of similar ones.

Texts are compared by the 8-byte pieces they consist of, whatever their language. What many rows
share (instructions, headings) is left out, so that rows are alike only in what is their own.

Source: Broder 1997, "On the resemblance and containment of documents"; banding as in Leskovec,
Rajaraman and Ullman, "Mining of Massive Datasets", section 3.4.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SIGNATURE_SIZE = 64
SIMILARITY = 0.85
"""Estimated share of common pieces from which two rows count as almost the same."""

_PIECE_BYTES = 8
_MAX_BYTES = 20_000
_MIN_PIECES = 16
_BANDS = 16
_BLOCK_PIECES = 2_048
_SAMPLE_ROWS = 20
_COMMON_SHARE = 0.3


def piece_hashes(text: str) -> NDArray[np.uint64]:
    """Hashes of the 8-byte pieces of `text`, whatever its blanks and letter case, (pieces,)."""
    data = " ".join(text.lower().split()).encode("utf-8", "surrogatepass")[:_MAX_BYTES]
    if len(data) < _PIECE_BYTES:
        return np.zeros(0, np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, np.uint8), _PIECE_BYTES)
    pieces = np.ascontiguousarray(windows).view("<u8").ravel().astype(np.uint64)
    mixed: NDArray[np.uint64] = (pieces ^ (pieces >> np.uint64(31))) * _ODD
    return mixed ^ (mixed >> np.uint64(29))


_ODD = np.uint64(0x9E37_79B9_7F4A_7C15)


def common_pieces(samples: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """Pieces that many of `samples` have, sorted: boilerplate; none where there are few samples."""
    if len(samples) < _SAMPLE_ROWS:
        return np.zeros(0, np.uint64)
    each = [np.unique(sample) for sample in samples]
    found, counts = np.unique(np.concatenate(each), return_counts=True)
    return found[counts > _COMMON_SHARE * len(samples)]


def signature(pieces: NDArray[np.uint64], boilerplate: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """MinHash signature, (SIGNATURE_SIZE,); all zero where too little is left to compare.

    Args:
        pieces: From `piece_hashes`, (pieces,).
        boilerplate: Pieces to leave out, sorted, from `common_pieces`.
    """
    own = pieces
    if len(boilerplate):
        places = np.minimum(np.searchsorted(boilerplate, pieces), len(boilerplate) - 1)
        own = pieces[boilerplate[places] != pieces]
    if len(own) < _MIN_PIECES:
        return np.zeros(SIGNATURE_SIZE, np.uint32)
    hashes = (own >> np.uint64(32)).astype(np.uint32)
    factors, addends = _permutations()  # (SIGNATURE_SIZE, 1) each
    smallest = np.full(SIGNATURE_SIZE, np.iinfo(np.uint32).max, np.uint32)
    for start in range(0, len(hashes), _BLOCK_PIECES):
        block = factors * hashes[start : start + _BLOCK_PIECES]
        block += addends
        np.minimum(smallest, block.min(axis=1), out=smallest)
    return smallest


@functools.cache
def _permutations() -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Odd factors and addends, (SIGNATURE_SIZE, 1) each; processors multiply 32 bits fast."""
    numbers = np.random.Philox(key=8).random_raw(2 * SIGNATURE_SIZE).reshape(2, -1, 1)
    numbers = (numbers >> np.uint64(32)).astype(np.uint32)
    return numbers[0] | np.uint32(1), numbers[1]


def similar_rows(
    signatures: NDArray[np.uint32], content_keys: NDArray[np.uint64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows that are almost the same as an earlier one, and which one.

    Args:
        signatures: From `signature`, (rows, SIGNATURE_SIZE).
        content_keys: Rows with equal keys are the same and not reported, (rows,).

    Returns:
        Row numbers and, for each, an earlier row that it resembles; both (found,).
    """
    usable = np.flatnonzero(signatures.any(axis=1) & (content_keys != 0))
    # One of each kind is enough: repeated rows are found otherwise.
    _, first = np.unique(content_keys[usable], return_index=True)
    usable = usable[np.sort(first)]
    earlier = np.full(len(signatures), -1, np.int64)
    width = SIGNATURE_SIZE // _BANDS
    for band in range(_BANDS):
        part = signatures[usable, band * width : (band + 1) * width].astype(np.uint64)
        keys = np.zeros(len(usable), np.uint64)
        for column in part.T:
            keys = (keys ^ column) * _ODD
        order = np.argsort(keys, kind="stable")
        meets = np.flatnonzero(keys[order][1:] == keys[order][:-1])
        for start in range(0, len(meets), 65_536):
            some = meets[start : start + 65_536]
            former, later = usable[order[some]], usable[order[some + 1]]
            share = (signatures[former] == signatures[later]).mean(axis=1)
            alike = share >= SIMILARITY
            unknown = earlier[later] < 0
            earlier[later[alike & unknown]] = former[alike & unknown]
    found = np.flatnonzero(earlier >= 0)
    return found, earlier[found]
