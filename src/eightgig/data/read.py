"""Rows of files, one at a time: each as the bytes of one JSON value, with file and line.

Rows are handed on unparsed, so that other processes can parse, check and render them. Nothing is
held but the row that is read; what cannot be read is a finding with file and line.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal, cast

from eightgig.data.raw import MAX_ROW_BYTES, MAX_ROWS, RawRow, Read, read_lines, too_large
from eightgig.data.read_json import read_json
from eightgig.data.read_tables import read_arrow, read_csv, read_datasets, read_parquet
from eightgig.data.rules import make_finding
from eightgig.data.sources import Source

_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_rows(source: Source) -> Read:
    """The rows of `source` in order; findings where something cannot be read.

    Reading goes on behind a finding where that is possible.
    """
    if source.kind == "datasets":
        yield from _limit_rows(source.name, read_datasets(source))
        return
    try:
        yield from _limit_rows(source.name, _read_file(source))
    except PermissionError:
        yield make_finding("data.unreadable", "You may not read this file.", file=source.name)
    except (OSError, EOFError, zlib.error) as error:
        message = f"The file is damaged or cannot be read: {error}."
        yield make_finding("data.damaged_file", message, file=source.name)


def _limit_rows(name: str, rows: Read) -> Read:
    count, is_empty = 0, True
    for row in rows:
        is_empty = False
        count += isinstance(row, RawRow)
        if count > MAX_ROWS:
            message = f"There are more than {MAX_ROWS:,} rows."
            yield make_finding("data.too_many_rows", message, file=name, line=count)
            return
        yield row
    if is_empty:
        yield make_finding("data.empty_file", "The file has no rows.", file=name)


def _read_file(source: Source) -> Read:
    path = Path(source.name)
    if source.kind in ("parquet", "arrow"):
        read = read_parquet if source.kind == "parquet" else read_arrow
        with _unpacked(path) as plain:
            yield from read(plain, source.name)
        return
    with _open(path) as (head, file):
        if head[:2] in _UTF16_MARKS or (len(head) >= 2 and 0 in head[:2]):
            message = "The file is UTF-16, not UTF-8."
            fix = "Convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW."
            yield make_finding("data.encoding", message, file=source.name, line=1, fix=fix)
        elif source.kind == "jsonl":
            yield from _read_lines(file, source.name)
        elif source.kind == "json":
            yield from read_json(file, source.name)
        else:
            yield from read_csv(file, source)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[bytes, IO[bytes]]]:
    """The first bytes and the file `path`, unpacked if it is packed, whatever its name says."""
    packing = _packing(path)
    if packing == "gzip":
        with gzip.open(path, "rb") as packed:
            yield packed.peek(4), cast("IO[bytes]", packed)
    elif packing == "zstd":
        from pyarrow import input_stream

        with input_stream(str(path), compression="zstd") as stream:
            unpacked = io.BufferedReader(stream, 1 << 20)
            yield unpacked.peek(4), unpacked
    else:
        with path.open("rb") as file:
            yield file.peek(4), file


def _packing(path: Path) -> Literal["gzip", "zstd"] | None:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic.startswith(_GZIP_MAGIC):
        return "gzip"
    return "zstd" if magic == _ZSTD_MAGIC else None


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """`path`, or an unpacked copy of it: tables are not read from beginning to end."""
    if _packing(path) is None:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "table"
        with _open(path) as (_, packed), plain.open("wb") as file:
            shutil.copyfileobj(packed, file)
        yield plain


def _read_lines(file: IO[bytes], name: str) -> Read:
    """JSONL: one row a line; blank lines are skipped, a byte order mark is dropped."""
    for line, data in read_lines(file):
        row = data.removeprefix(codecs.BOM_UTF8) if line == 1 else data
        if len(row) > MAX_ROW_BYTES:
            yield too_large(name, line)
        elif row := row.strip(b" \t\r\n"):
            yield RawRow(line=line, data=row)
