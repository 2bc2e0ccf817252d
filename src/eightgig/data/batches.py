"""Tokenised rows, and optimizer steps cut from them.

An optimizer step is a fixed number of rows in an order fixed by the seed. Inside it, rows are
packed without padding into micro-batches; nothing here depends on the card but how they are cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

IGNORE_INDEX = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """Tokenised rows, one behind the other.

    Attributes:
        input_ids: Token ids of all rows, (total,), int32.
        labels: `input_ids` where a token is trained, else `IGNORE_INDEX`; not shifted, (total,).
        offsets: Start of each row and the end of the last, (rows + 1,), int64.
        row_ids: 0-based number of each row in its source, (rows,), int64.
        fingerprint: Hash of the source files, the template and the settings that made the tokens.
        summary: Facts for people and the report: format, files, counts, lengths.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    offsets: NDArray[np.int64]
    row_ids: NDArray[np.int64]
    fingerprint: str
    summary: Mapping[str, Any]

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.row_ids)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, (rows,)."""
        return np.diff(self.offsets)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One micro-batch: whole rows, one behind the other, N tokens in all.

    Attributes:
        input_ids: (N,), int32.
        labels: Id of the next token where it is trained, else `IGNORE_INDEX`; already shifted,
            (N,), int32.
        row_ids: Row number of each token, (N,), int64.
        positions: 0-based position of each token in its row, (N,), int32.
        cu_seqlens: Start of each row and N, (rows + 1,), int32.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    row_ids: NDArray[np.int64]
    positions: NDArray[np.int32]
    cu_seqlens: NDArray[np.int32]

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.input_ids)

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that carry loss."""
        return int(np.count_nonzero(self.labels != IGNORE_INDEX))

    @property
    def max_length(self) -> int:
        """Tokens of the longest row."""
        return int(np.diff(self.cu_seqlens).max(initial=0))
