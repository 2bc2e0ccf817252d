"""Tables: CSV, Parquet, Arrow and `datasets`, each row as one JSON object."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from eightgig.data.raw import (
    MAX_COLUMNS,
    MAX_ROW_BYTES,
    NotUtf8,
    Read,
    read_lines,
    table_row,
)
from eightgig.data.rules import make_finding
from eightgig.data.sources import Source

_TABLE_ROWS = 256


def read_csv(file: IO[bytes], source: Source) -> Read:
    """Records behind a header; the separator is the one that the header has most of."""
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
    except NotUtf8 as error:
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


def _read_records(reader: Any, header: list[str], name: str) -> Read:
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
        yield table_row(line, dict(zip(header, cells, strict=True)))


def _text_lines(file: IO[bytes]) -> Iterator[str]:
    for line, data in read_lines(file):
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise NotUtf8(line, error) from None
        yield text.removeprefix("\ufeff") if line == 1 else text


def _without_nulls(value: Any) -> Any:
    """`value` without null entries: a table fills every key that any other row has."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def read_parquet(path: Path, name: str) -> Read:
    """Rows of a Parquet file, some at a time; `name` stands in findings."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield from _read_batches(file.schema_arrow, file.iter_batches(_TABLE_ROWS), name)
    except pyarrow.ArrowException as error:
        message = f"The Parquet file is damaged: {_first_line(error)}."
        yield make_finding("data.damaged_file", message, file=name)


def read_arrow(path: Path, name: str) -> Read:
    """Rows of an Arrow stream or file, which is mapped; `name` stands in findings."""
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
            yield from _read_batches(reader.schema, batches, name)
    except pyarrow.ArrowException as error:
        message = f"The Arrow file is damaged: {_first_line(error)}."
        yield make_finding("data.damaged_file", message, file=name)


def _read_batches(schema: Any, batches: Iterator[Any], name: str) -> Read:
    if len(schema) > MAX_COLUMNS:
        message = f"The table has {len(schema):,} columns; at most {MAX_COLUMNS} are read."
        yield make_finding("data.too_many_columns", message, file=name)
        return
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _TABLE_ROWS):
            for row in batch.slice(start, _TABLE_ROWS).to_pylist():
                number += 1
                yield table_row(number, {key: _without_nulls(row[key]) for key in row})


def read_datasets(source: Source) -> Read:
    """Rows of a `datasets` name on the hub; its loading scripts are refused by the library."""
    try:
        import datasets
    except ImportError:
        message = f'"{source.name}" is no file, and the library `datasets` is not installed.'
        fix = "Correct `data.path`, or run: pip install 'eightgig[datasets]'."
        yield make_finding("data.datasets", message, file=source.name, fix=fix)
        return
    name, _, subset = source.name.partition(":")
    try:
        rows = datasets.load_dataset(name, subset or None, split=source.split)
        for number, row in enumerate(rows, start=1):
            yield table_row(number, {key: _without_nulls(row[key]) for key in row})
    # The library raises its own errors, those of the hub, of the network and of decoders.
    except (datasets.exceptions.DatasetsError, ImportError, OSError, ValueError,
            RuntimeError) as error:  # fmt: skip
        message = f'The data set "{source.name}" cannot be loaded: {_first_line(error)}.'
        yield make_finding("data.datasets", message, file=source.name)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:300] if lines else type(error).__name__
