"""Rows come out of files with their lines, in bounded memory, from nowhere else."""

import csv
import gzip
import io
import json
import sys
import tracemalloc
import types

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from eightgig.config import DataConfig
from eightgig.data.checks import check_data
from eightgig.data.raw import MAX_ROW_BYTES, RawRow
from eightgig.data.read import read_rows
from eightgig.data.sources import Source, find_sources
from eightgig.errors import Finding
from tests.chats import make_chat_tokenizer
from tests.unit.data.rows import chat_row, pair_row, write_lines


def read(path, kind="jsonl"):
    found = list(read_rows(Source(name=str(path), kind=kind)))
    rows = [item for item in found if isinstance(item, RawRow)]
    return rows, [item for item in found if isinstance(item, Finding)]


def _zstd(data):
    return pa.compress(data, codec="zstd", asbytes=True)


def _file_of(name, rows):
    """The bytes of a file of `rows` whose kind is that of `name`."""
    table, output = pa.Table.from_pylist(rows), io.BytesIO()
    if name.endswith(".parquet"):
        parquet.write_table(table, output)
    elif name.endswith(".arrow"):
        with ipc.new_stream(output, table.schema) as writer:
            writer.write_table(table)
    elif name.endswith(".csv"):
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        output.write(text.getvalue().encode())
    else:
        lines = map(json.dumps, rows)
        text = "\n".join(lines) if name.endswith(".jsonl") else f"[{', '.join(lines)}]"
        output.write(text.encode())
    return output.getvalue()


def test_lines_are_counted_from_1_with_blank_ones(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", ["", {"a": 1}, " ", {"a": 2}])
    rows, _ = read(path)
    assert [row.line for row in rows] == [2, 4]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_row_that_is_too_large_is_left_out_and_reading_goes_on(tmp_path, kind, monkeypatch):
    for module in ("raw", "read", "read_json", "read_tables"):
        monkeypatch.setattr(f"eightgig.data.{module}.MAX_ROW_BYTES", 3_000, raising=False)
    monkeypatch.setattr("eightgig.data.read_json._READ_CHARS", 500)
    large = "x" * 10_000
    text = {
        "jsonl": f'{{"a": 1}}\n{{"a": "{large}"}}\n{{"a": 3}}\n',
        "json": f'[{{"a": 1}},\n{{"a": "{large}"}},\n{{"a": 3}}]',
        "csv": f"a,b\n1,1\n{large},2\n3,3\n",
    }[kind]
    path = tmp_path / f"rows.{kind}"
    path.write_text(text)
    rows, findings = read(path, kind)
    assert [finding.line for finding in findings] == [3 if kind == "csv" else 2]
    assert findings[0].code == ("data.csv" if kind == "csv" else "data.row_too_large")
    # Only lines say where the next row begins.
    assert len(rows) == (2 if kind == "jsonl" else 1)


def test_more_rows_than_anybody_has_stop_the_reading(tmp_path, monkeypatch):
    monkeypatch.setattr("eightgig.data.read.MAX_ROWS", 3)
    path = write_lines(tmp_path / "rows.jsonl", [{"a": n} for n in range(9)])
    rows, findings = read(path)
    assert len(rows) == 3
    assert [finding.code for finding in findings] == ["data.too_many_rows"]


def test_a_packed_bomb_takes_no_memory(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b"0" * (300 << 20), compresslevel=1))
    tracemalloc.start()
    rows, findings = read(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == []
    assert [finding.code for finding in findings] == ["data.row_too_large"]
    assert peak_bytes < 5 * MAX_ROW_BYTES


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_reading_holds_a_few_rows_only(tmp_path, kind):
    rows = [{"prompt": "a" * 900, "completion": str(n)} for n in range(20_000)]
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=1_000)
    elif kind == "csv":
        path.write_text("prompt,completion\n" + "".join(
            f"{row['prompt']},{row['completion']}\n" for row in rows))  # fmt: skip
    else:
        joined = ("\n" if kind == "jsonl" else ",\n").join(map(json.dumps, rows))
        path.write_text(joined if kind == "jsonl" else f"[{joined}]")
    del rows
    tracemalloc.start()
    count = sum(1 for _ in read_rows(Source(name=str(path), kind=kind)))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak_bytes < 8 << 20


def test_an_array_may_be_cut_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr("eightgig.data.read_json._READ_CHARS", 7)
    rows = [{"a": n, "b": ["ü" * n, {"c": None}]} for n in range(40)] + [12345678901, "x", 1.5]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    found, findings = read(path, "json")
    assert [json.loads(row.data) for row in found] == rows
    assert findings == []
    lines = path.read_text(encoding="utf-8").splitlines()
    assert all(lines[row.line - 1].strip()[:1] in '{1"' for row in found)


def test_records_over_several_lines_have_the_line_they_begin_at(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\n"a\nb",c\nd,e\n"f\n\n\ng",h\ni,j\n')
    rows, _ = read(path, "csv")
    assert [row.line for row in rows] == [2, 4, 5, 9]


def test_nulls_that_a_table_fills_in_are_left_out(tmp_path):
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "name": "x"},
    ]
    parquet.write_table(pa.Table.from_pylist([{"messages": turns}]), tmp_path / "rows.parquet")
    rows, _ = read(tmp_path / "rows.parquet", "parquet")
    assert json.loads(rows[0].data) == {"messages": turns}


@pytest.mark.parametrize(
    ("text", "is_hub"),
    [("squad", True), ("owner/name", True), ("owner/name:main", True), ("C:rows.jsonl", False),
     ("owner/name:", False), ("a:b/c", False), ("data/rows.jsonl", False), ("a/b/c", False),
     ("../name", False), ("rows.parquet", False), ("name with blanks", False)],
)  # fmt: skip
def test_only_names_of_the_hub_are_asked_for_there(text, is_hub):
    sources, findings = find_sources(text, split="test")
    assert bool(sources) == is_hub != bool(findings)
    if is_hub:
        assert sources == (Source(name=text, kind="datasets", split="test"),)


@pytest.mark.parametrize("asset", ["../secret.arrow", "/etc/passwd", "sub/../../secret.arrow"])
def test_a_saved_data_set_cannot_name_files_outside(tmp_path, asset):
    folder = tmp_path / "saved"
    folder.mkdir()
    (tmp_path / "secret.arrow").write_bytes(b"")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": asset}]}))
    sources, (finding,) = find_sources(str(folder))
    assert sources == ()
    assert finding.code == "data.folder"


def test_a_file_named_twice_is_read_once(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [chat_row(1)])
    sources, _ = find_sources((str(path), f"{tmp_path}/*.jsonl", str(path)))
    assert len(sources) == 1


def _fake_datasets(load):
    module = types.ModuleType("datasets")
    module.load_dataset = load
    module.exceptions = types.SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))
    return module


def test_rows_of_a_hub_name_come_from_the_library(monkeypatch):
    asked = []

    def load(name, subset, split):
        asked.append((name, subset, split))
        return [chat_row(1), {**chat_row(2), "note": None}]

    monkeypatch.setitem(sys.modules, "datasets", _fake_datasets(load))
    tokenizer = make_chat_tokenizer("llama3")
    config = DataConfig(path="owner/name", split="dev")
    report = check_data(config, tokenizer, workers=0)
    assert asked == [("owner/name", None, "dev")] * 2  # once to look for boilerplate
    assert report.summary["good_rows"] == 2
    assert not report.has_errors


def test_a_hub_name_that_does_not_load_is_a_finding(monkeypatch):
    def load(name, subset, split):
        raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")

    monkeypatch.setitem(sys.modules, "datasets", _fake_datasets(load))
    report = check_data(DataConfig(path="owner/nam"), make_chat_tokenizer("llama3"), workers=0)
    assert report.findings[0].code == "data.datasets"
    assert "owner/nam" in report.findings[0].message


def test_without_the_library_the_fix_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    report = check_data(DataConfig(path="owner/nam"), make_chat_tokenizer("llama3"), workers=0)
    assert "eightgig[datasets]" in report.findings[0].fix


def test_a_hub_name_may_have_a_subset(monkeypatch):
    asked = []

    def load(name, subset, split):
        asked.append((name, subset, split))
        return [{"question": "1 + 1", "answer": "2"}]

    monkeypatch.setitem(sys.modules, "datasets", _fake_datasets(load))
    config = DataConfig(
        path="openai/gsm8k:main", columns={"prompt": "question", "completion": "answer"}
    )
    report = check_data(config, make_chat_tokenizer("llama3"), workers=0)
    assert asked == [("openai/gsm8k", "main", "train")] * 2
    assert report.summary["files"][0]["path"] == "openai/gsm8k:main"
    assert report.summary["good_rows"] == 1


def test_rows_of_the_hub_that_cannot_be_decoded_are_a_finding(monkeypatch):
    def load(name, subset, split):
        yield chat_row(1)
        raise ImportError("To support decoding images, please install 'Pillow'.")

    monkeypatch.setitem(sys.modules, "datasets", _fake_datasets(load))
    report = check_data(DataConfig(path="owner/name"), make_chat_tokenizer("llama3"), workers=0)
    assert report.findings[0].code == "data.datasets"
    assert "Pillow" in report.findings[0].message


@pytest.mark.parametrize("pack", [gzip.compress, _zstd])
@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows.arrow"]
)
def test_every_kind_of_file_may_be_packed(tmp_path, name, pack):
    data = _file_of(name, [pair_row(number) for number in range(1, 25)])
    suffix = ".gz" if pack is gzip.compress else ".zst"
    for number in range(3):
        (tmp_path / f"{number}-{name}{suffix}").write_bytes(pack(data))
    config = DataConfig(path=f"{tmp_path}/*-{name}{suffix}")
    report = check_data(config, make_chat_tokenizer("llama3"), workers=0)
    assert [file["rows"] for file in report.summary["files"]] == [24, 24, 24]
    assert not report.has_errors


def test_a_packed_table_that_is_damaged_is_named_as_the_user_did(tmp_path):
    data = _file_of("rows.parquet", [pair_row(1)])
    path = tmp_path / "rows.parquet.gz"
    path.write_bytes(gzip.compress(data[:-20]))
    report = check_data(DataConfig(path=str(path)), make_chat_tokenizer("llama3"), workers=0)
    assert [(f.code, f.file) for f in report.findings] == [("data.damaged_file", str(path))]
