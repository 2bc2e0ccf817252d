"""One row before parsing, and how large a row may be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from eightgig.data.rules import make_finding
from eightgig.errors import Finding
from eightgig.units import MIB, format_bytes

MAX_ROW_BYTES = 64 * MIB
MAX_ROWS = 10_000_000
MAX_COLUMNS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRow:
    """One row before parsing.

    Attributes:
        line: 1-based line the row begins at; for Parquet, Arrow and `datasets` the 1-based row.
        data: One JSON value in UTF-8, or what stands in its place.
    """

    line: int
    data: bytes


Read = Iterator[RawRow | Finding]
"""Rows in order, with findings where something cannot be read."""


class NotUtf8(Exception):
    """A file is not UTF-8.

    Args:
        line: Line that the undecoded bytes begin in.
        error: Where in them the first wrong byte is.
    """

    def __init__(self, line: int, error: UnicodeDecodeError) -> None:
        super().__init__(line)
        before = error.object[: error.start]
        column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8", "replace")) + 1
        byte = error.object[error.start]
        self.message = f"Column {column} is not UTF-8 (byte 0x{byte:02x})."
        self.line = line + before.count(b"\n")


def read_lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines with their number; of a longer one than a row may be, the beginning."""
    line = 0
    while data := file.readline(MAX_ROW_BYTES + 2):
        line += 1
        yield line, data
        while not data.endswith(b"\n") and len(data) > MAX_ROW_BYTES:
            data = file.readline(MAX_ROW_BYTES + 2)


def too_large(name: str, line: int) -> Finding:
    """The finding that a row is larger than any may be."""
    message = f"The row is larger than {format_bytes(MAX_ROW_BYTES)}."
    return make_finding("data.row_too_large", message, file=name, line=line)


def table_row(line: int, row: Any) -> RawRow:
    """A row that was no JSON before."""
    data = json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
    return RawRow(line=line, data=data)
