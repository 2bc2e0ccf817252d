"""Rows of files, one at a time: each as the bytes of one JSON value, with file and line.

Rows are handed on unparsed, so that other processes can parse, check and render them. Nothing is
held but the row that is read; what cannot be read is a finding with file and line.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from eightgig.data.rules import make_finding
from eightgig.data.sources import Source
from eightgig.errors import Finding
from eightgig.units import MIB, format_bytes

MAX_ROW_BYTES = 64 * MIB
MAX_ROWS = 10_000_000
MAX_COLUMNS = 256

_READ_CHARS = 1 << 20
_TABLE_ROWS = 256
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRow:
    """One row before parsing.

    Attributes:
        line: 1-based line the row begins at; for Parquet, Arrow and `datasets` the 1-based row.
        data: One JSON value in UTF-8, or what stands in its place.
    """

    line: int
    data: bytes


def read_rows(source: Source) -> Iterator[RawRow | Finding]:
    """The rows of `source` in order; findings where something cannot be read.

    Reading goes on behind a finding where that is possible.
    """
    if source.kind == "datasets":
        yield from _limit_rows(source.name, _read_datasets(source))
        return
    try:
        yield from _limit_rows(source.name, _read_file(source))
    except PermissionError:
        yield make_finding("data.unreadable", "You may not read this file.", file=source.name)
    except (OSError, EOFError, zlib.error) as error:
        message = f"The file is damaged or cannot be read: {error}."
        yield make_finding("data.damaged_file", message, file=source.name)


def _limit_rows(name: str, rows: Iterator[RawRow | Finding]) -> Iterator[RawRow | Finding]:
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


def _read_file(source: Source) -> Iterator[RawRow | Finding]:
    path = Path(source.name)
    readers: dict[str, Callable[[Path], Iterator[RawRow | Finding]]] = {
        "parquet": _read_parquet,
        "arrow": _read_arrow,
    }
    if source.kind in readers:
        yield from readers[source.kind](path)
        return
    with _open(path) as (head, file):
        if head[:2] in _UTF16_MARKS or (len(head) >= 2 and 0 in head[:2]):
            message = "The file is UTF-16, not UTF-8."
            fix = "Convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW."
            yield make_finding("data.encoding", message, file=source.name, line=1, fix=fix)
        elif source.kind == "jsonl":
            yield from _read_lines(file, source.name)
        elif source.kind == "json":
            yield from _read_json(file, source.name)
        else:
            yield from _read_csv(file, source)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[bytes, IO[bytes]]]:
    """The first bytes and the file `path`, unpacked if it is packed, whatever its name says."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic.startswith(_GZIP_MAGIC):
        with gzip.open(path, "rb") as packed:
            yield packed.peek(4), cast("IO[bytes]", packed)
    elif magic == _ZSTD_MAGIC:
        from pyarrow import input_stream

        with input_stream(str(path), compression="zstd") as stream:
            unpacked = io.BufferedReader(stream, 1 << 20)
            yield unpacked.peek(4), unpacked
    else:
        with path.open("rb") as file:
            yield magic, file


def _read_lines(file: IO[bytes], name: str) -> Iterator[RawRow | Finding]:
    """JSONL: one row a line; blank lines are skipped, a byte order mark is dropped."""
    for line, data in _lines(file):
        row = data.removeprefix(codecs.BOM_UTF8) if line == 1 else data
        if len(row) > MAX_ROW_BYTES:
            yield _too_large(name, line)
        elif row := row.strip(b" \t\r\n"):
            yield RawRow(line=line, data=row)


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines with their number; of a longer one than a row may be, the beginning."""
    line = 0
    while data := file.readline(MAX_ROW_BYTES + 2):
        line += 1
        yield line, data
        while not data.endswith(b"\n") and len(data) > MAX_ROW_BYTES:
            data = file.readline(MAX_ROW_BYTES + 2)


def _too_large(name: str, line: int) -> Finding:
    message = f"The row is larger than {format_bytes(MAX_ROW_BYTES)}."
    return make_finding("data.row_too_large", message, file=name, line=line)


class _NotUtf8(Exception):
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


class _Decoded:
    """Text of a UTF-8 file, read piece by piece, with the line that its beginning lies in."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self.text = ""
        self.line = 1
        self.is_complete = False

    def read_more(self) -> None:
        """Read on, as much again as is there already.

        Raises:
            _NotUtf8: The file is not UTF-8.
        """
        data = self._file.read(max(_READ_CHARS, len(self.text)))
        self.is_complete = not data
        try:
            self.text += self._decode.decode(data, final=self.is_complete)
        except UnicodeDecodeError as error:
            raise _NotUtf8(self.line + self.text.count("\n"), error) from None

    def drop(self, count: int) -> None:
        """Drop the first `count` characters."""
        self.line += self.text.count("\n", 0, count)
        self.text = self.text[count:]


def _read_json(file: IO[bytes], name: str) -> Iterator[RawRow | Finding]:
    """One array of rows, or rows one behind the other (JSONL is a case of that)."""
    decoded = _Decoded(file)
    try:
        decoded.read_more()
        _skip(decoded, " \t\r\n")
        is_array = decoded.text.startswith("[")
        if is_array:
            decoded.drop(1)
        yield from _read_values(decoded, name, is_array=is_array)
    except _NotUtf8 as error:
        yield make_finding("data.encoding", error.message, file=name, line=error.line)


def _skip(decoded: _Decoded, characters: str) -> None:
    while True:
        stripped = decoded.text.lstrip(characters)
        decoded.drop(len(decoded.text) - len(stripped))
        if decoded.text or decoded.is_complete:
            return
        decoded.read_more()


def _read_values(decoded: _Decoded, name: str, *, is_array: bool) -> Iterator[RawRow | Finding]:
    decoder = json.JSONDecoder()
    is_first = True
    while True:
        _skip(decoded, " \t\r\n")
        if is_array and not is_first and decoded.text.startswith(","):
            decoded.drop(1)
            _skip(decoded, " \t\r\n")
        elif is_array and decoded.text.startswith("]"):
            return
        elif is_array and not is_first:
            message = "A comma or the closing ] of the array is missing here."
            yield make_finding("data.json", message, file=name, line=decoded.line)
            return
        if not decoded.text:
            return
        end = _value_end(decoder, decoded)
        if isinstance(end, str):
            yield _value_finding(decoded, end, name)
            return
        yield RawRow(line=decoded.line, data=decoded.text[:end].encode("utf-8", "surrogatepass"))
        decoded.drop(end)
        is_first = False


def _value_end(decoder: json.JSONDecoder, decoded: _Decoded) -> int | str:
    """Where the value at the beginning ends, or what is wrong with it."""
    while True:
        try:
            end = decoder.raw_decode(decoded.text)[1]
            # A number may go on behind what was read so far.
            if end < len(decoded.text) or decoded.is_complete:
                return end
        except json.JSONDecodeError as error:
            far_from_end = error.pos < len(decoded.text) - _READ_CHARS
            if decoded.is_complete or far_from_end:
                return f"{error.msg} (column {error.colno}, {error.lineno} lines into the row)"
        except RecursionError:
            return "it is nested too deeply"
        if len(decoded.text) > MAX_ROW_BYTES:
            return "too large"
        decoded.read_more()


def _value_finding(decoded: _Decoded, problem: str, name: str) -> Finding:
    if problem == "too large":
        return _too_large(name, decoded.line)
    code = "data.too_deep" if "deeply" in problem else "data.json"
    message = f"The row that begins here is no valid JSON: {problem}."
    return make_finding(code, message, file=name, line=decoded.line)


def _text_lines(file: IO[bytes]) -> Iterator[str]:
    for line, data in _lines(file):
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _NotUtf8(line, error) from None
        yield text.removeprefix("\ufeff") if line == 1 else text


def _read_csv(file: IO[bytes], source: Source) -> Iterator[RawRow | Finding]:
    name = source.name
    lines = _text_lines(file)
    previous_limit = csv.field_size_limit(MAX_ROW_BYTES)
    try:
        header_line = next(lines, "")
        if not header_line.strip():
            return
        delimiter = "\t" if source.kind == "tsv" else _delimiter(header_line)
        header = next(csv.reader([header_line], delimiter=delimiter, strict=True))
        problem = _header_problem(header)
        if problem:
            yield make_finding("data.csv", problem, file=name, line=1)
            return
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        yield from _read_records(reader, header, name)
    except csv.Error as error:
        yield make_finding("data.csv", f"The header cannot be read: {error}.", file=name, line=1)
    except _NotUtf8 as error:
        yield make_finding("data.encoding", error.message, file=name, line=error.line)
    finally:
        csv.field_size_limit(previous_limit)


def _delimiter(header: str) -> str:
    counts = {delimiter: header.count(delimiter) for delimiter in ",;\t|"}
    best = max(counts, key=lambda delimiter: counts[delimiter])
    return best if counts[best] else ","


def _header_problem(header: list[str]) -> str:
    if len(header) > MAX_COLUMNS:
        return f"The header has {len(header):,} columns; at most {MAX_COLUMNS} are read."
    double = next((column for column in header if header.count(column) > 1), None)
    return "" if double is None else f'The column "{double}" stands in the header twice.'


def _read_records(reader: Any, header: list[str], name: str) -> Iterator[RawRow | Finding]:
    """Records behind a header; `reader` counts lines from the second of the file."""
    while True:
        line = reader.line_num + 2
        try:
            cells = next(reader, None)
        except csv.Error as error:
            message = f"The row cannot be read: {error}."
            yield make_finding("data.csv", message, file=name, line=line)
            return
        if cells is None:
            return
        if not cells:
            continue
        if len(cells) != len(header):
            message = f"The row has {len(cells)} cells, the header {len(header)}."
            yield make_finding("data.csv", message, file=name, line=line)
            continue
        yield _table_row(line, dict(zip(header, cells, strict=True)))


def _table_row(line: int, row: Any) -> RawRow:
    data = json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
    return RawRow(line=line, data=data)


def _without_nulls(value: Any) -> Any:
    """`value` without null entries: a table fills every key that any other row has."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _read_parquet(path: Path) -> Iterator[RawRow | Finding]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield from _read_batches(file.schema_arrow, file.iter_batches(_TABLE_ROWS), str(path))
    except pyarrow.ArrowException as error:
        message = f"The Parquet file is damaged: {_first_line(error)}."
        yield make_finding("data.damaged_file", message, file=str(path))


def _read_arrow(path: Path) -> Iterator[RawRow | Finding]:
    import pyarrow
    from pyarrow import ipc

    try:
        with pyarrow.memory_map(str(path)) as file:
            try:
                reader = ipc.open_stream(file)
                batches = iter(reader)
            except pyarrow.ArrowInvalid:
                whole = ipc.open_file(file)
                reader = whole
                batches = (whole.get_batch(index) for index in range(whole.num_record_batches))
            yield from _read_batches(reader.schema, batches, str(path))
    except pyarrow.ArrowException as error:
        message = f"The Arrow file is damaged: {_first_line(error)}."
        yield make_finding("data.damaged_file", message, file=str(path))


def _read_batches(schema: Any, batches: Iterator[Any], name: str) -> Iterator[RawRow | Finding]:
    if len(schema) > MAX_COLUMNS:
        message = f"The table has {len(schema):,} columns; at most {MAX_COLUMNS} are read."
        yield make_finding("data.too_many_columns", message, file=name)
        return
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _TABLE_ROWS):
            for row in batch.slice(start, _TABLE_ROWS).to_pylist():
                number += 1
                yield _table_row(number, {key: _without_nulls(row[key]) for key in row})


def _read_datasets(source: Source) -> Iterator[RawRow | Finding]:
    """Rows of a `datasets` name on the hub; its loading scripts are refused by the library."""
    try:
        import datasets
    except ImportError:
        message = f'"{source.name}" is no file, and the library `datasets` is not installed.'
        fix = "Correct `data.path`, or run: pip install 'eightgig[datasets]'."
        yield make_finding("data.datasets", message, file=source.name, fix=fix)
        return
    try:
        rows = datasets.load_dataset(source.name, split=source.split)
    # The library raises its own errors, those of the hub and those of the network.
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        message = f'The data set "{source.name}" cannot be loaded: {_first_line(error)}.'
        yield make_finding("data.datasets", message, file=source.name)
        return
    for number, row in enumerate(rows, start=1):
        yield _table_row(number, {key: _without_nulls(row[key]) for key in row})


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:300] if lines else type(error).__name__
