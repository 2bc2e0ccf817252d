"""Files without a fault: nothing is said about them but notes, and every row is read."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import feather, ipc, parquet

from eightgig.config import DataConfig
from eightgig.data.checks import check_data
from tests.chats import make_chat_tokenizer
from tests.unit.data.rows import chat_row, pair_row, words, write_lines

ROWS = [chat_row(number) for number in range(1, 25)]
PAIRS = [pair_row(number) for number in range(1, 25)]
DATA = "\n".join(json.dumps(row) for row in ROWS).encode() + b"\n"


def raw(name: str, data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def lines(rows: list) -> Callable[[Path], Path]:
    return lambda folder: write_lines(folder / "rows.jsonl", rows)


def changed(change: Callable[[dict, int], dict]) -> Callable[[Path], Path]:
    return lines([change(chat_row(number), number) for number in range(1, 25)])


def said(question: str = "Who?", answer: str = "Me.") -> Callable[[Path], Path]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return lines([*ROWS, {"messages": turns}])


def table(name: str, **options: str) -> Callable[[Path], Path]:
    output = io.StringIO()
    writer = csv.DictWriter(output, ["prompt", "completion"], **options)
    writer.writeheader()
    writer.writerows([*PAIRS, {"prompt": 'Say "a,b;c"\nand\tmore', "completion": "a,\n\nb"}])
    return raw(name, output.getvalue().encode())


def sharegpt(row: dict) -> dict:
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names[m["role"]], "value": m["content"]} for m in row["messages"]]
    return {"id": "x", "conversations": turns}


def parquet_file(folder: Path) -> Path:
    parquet.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet")
    return folder / "rows.parquet"


def arrow_file(folder: Path) -> Path:
    made = pa.Table.from_pylist(ROWS)
    with (
        pa.OSFile(str(folder / "rows.arrow"), "wb") as file,
        ipc.new_stream(file, made.schema) as writer,
    ):
        writer.write_table(made)
    return folder / "rows.arrow"


def feather_file(folder: Path) -> Path:
    feather.write_feather(pa.Table.from_pylist(ROWS), folder / "rows.arrow", "uncompressed")
    return folder / "rows.arrow"


def saved_dataset(folder: Path) -> Path:
    saved = folder / "saved"
    saved.mkdir()
    arrow_file(saved)
    state = {"_data_files": [{"filename": "rows.arrow"}]}
    (saved / "state.json").write_text(json.dumps(state))
    (saved / "README.md").write_text("---\nconfigs:\n- data_files: /etc/*\n---\n")
    return saved


def two_files(folder: Path) -> str:
    write_lines(folder / "a.jsonl", ROWS[:12])
    write_lines(folder / "b.jsonl", ROWS[12:])
    return f"{folder}/*.jsonl"


GOOD: dict[str, tuple[Callable[[Path], object], int]] = {
    "JSONL": (raw("rows.jsonl", DATA), 24),
    "byte order mark": (raw("rows.jsonl", b"\xef\xbb\xbf" + DATA), 24),
    "Windows line ends": (raw("rows.jsonl", DATA.replace(b"\n", b"\r\n")), 24),
    "blank lines": (raw("rows.jsonl", b"\n" + DATA.replace(b"\n", b"\n \n\n")), 24),
    "no line end at the end": (raw("rows.jsonl", DATA.rstrip()), 24),
    "NDJSON": (raw("rows.ndjson", DATA), 24),
    "gzip": (raw("rows.jsonl.gz", gzip.compress(DATA)), 24),
    "gzip under a plain name": (raw("rows.jsonl", gzip.compress(DATA)), 24),
    "zstd": (raw("rows.jsonl.zst", pa.compress(DATA, codec="zstd", asbytes=True)), 24),
    "JSON array": (raw("rows.json", json.dumps(ROWS).encode()), 24),
    "JSON array over many lines": (raw("rows.json", json.dumps(ROWS, indent=2).encode()), 24),
    "JSON lines in a JSON file": (raw("rows.json", DATA), 24),
    "JSON rows over many lines": (
        raw("rows.json", "\n".join(json.dumps(row, indent=1) for row in ROWS).encode()),
        24,
    ),
    "CSV": (table("rows.csv"), 25),
    "CSV with a byte order mark": (
        lambda f: raw("b.csv", b"\xef\xbb\xbf" + table("rows.csv")(f).read_bytes())(f),
        25,
    ),
    "CSV with semicolons": (table("rows.csv", delimiter=";"), 25),
    "TSV": (table("rows.tsv", delimiter="\t"), 25),
    "Parquet": (parquet_file, 24),
    "Arrow stream": (arrow_file, 24),
    "Arrow file": (feather_file, 24),
    "folder of datasets": (saved_dataset, 24),
    "glob": (two_files, 24),
    "ShareGPT": (lines([sharegpt(row) for row in ROWS]), 24),
    "conversations with roles": (
        lines([{"conversations": row["messages"]} for row in ROWS]),
        24,
    ),
    "pairs": (lines(PAIRS), 24),
    "pairs of turns": (
        lines([{"prompt": r["messages"][:1], "completion": r["messages"][1:]} for r in ROWS]),
        24,
    ),
    "instructions": (
        lines([{"instruction": words(8, n), "input": words(4, -n % 99) if n % 2 else "",
                "output": words(7, n + 300)} for n in range(1, 25)]),
        24,
    ),
    "texts": (lines([{"text": words(40, n)} for n in range(1, 25)]), 24),
    "more columns": (changed(lambda row, n: {**row, "id": n, "meta": {"a": [1, None]}}), 24),
    "empty system turn": (
        changed(lambda row, _: {"messages": [{"role": "system", "content": ""}, *row["messages"]]}),
        24,
    ),
    "system column": (changed(lambda row, n: {**row, "system": words(3, n)}), 24),
    "text parts": (
        changed(lambda row, _: {"messages": [
            {**m, "content": [{"type": "text", "text": m["content"]}]} for m in row["messages"]]}),
        24,
    ),
    "weights": (
        lines([{"messages": [*chat_row(n, 2)["messages"][:1],
                             {**chat_row(n, 2)["messages"][1], "weight": 0},
                             *chat_row(n, 2)["messages"][2:]]} for n in range(1, 25)]),
        24,
    ),
    "four turns": (lines([chat_row(number, 4) for number in range(1, 25)]), 24),
    "markup": (said("What is <b>x</b> in [a] {b}?", "It is &lt;b&gt; | <i>."), 25),
    "code": (said("Why?", "```python\nprint(f'{input} {{x}}')\n```"), 25),
    "inline code": (said("Write `{{name}}`.", "`[INSERT X]`"), 25),
    "all scripts": (said("Ελληνικά, русский, 日本語, العربية, हिन्दी", "ß🙂é ﬁ \u200d \u00a0"), 25),
    "sample address": (said("Write to jo@example.com", "Done: a@b.example"), 25),
    "numbers": (said("Add 1234567 and 4111111111111112", "2026-11-24 10:00"), 25),
    "answer first blank": (said("Go on", "  and so on"), 25),
    "yes and no": (
        lines([{**pair, "completion": "yes" if n % 2 else "no"} for n, pair in enumerate(PAIRS)]),
        24,
    ),
    "long row": (said("x " * 5_000, "y " * 5_000), 25),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return make_chat_tokenizer("llama3")


@pytest.mark.parametrize("name", GOOD)
def test_a_good_file_is_read_without_a_word(name, tmp_path, tokenizer):
    make, rows = GOOD[name]
    report = check_data(DataConfig(path=str(make(tmp_path))), tokenizer, workers=0)
    said = [(f.code, f.line, f.message) for f in report.findings if f.severity != "note"]
    assert said == []
    assert report.summary["good_rows"] == rows


def test_there_are_enough_good_files():
    assert len(GOOD) >= 20


def test_columns_of_other_names_are_mapped(tmp_path, tokenizer):
    rows = [{"frage": p["prompt"], "antwort": p["completion"]} for p in PAIRS]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    columns = {"prompt": "frage", "completion": "antwort"}
    report = check_data(DataConfig(path=str(path), columns=columns), tokenizer, workers=0)
    assert not report.has_warnings
    assert report.summary["format"] == "prompt_completion"
    assert report.summary["rows"] == 24


def test_the_fix_for_unknown_columns_names_those_that_were_meant(tmp_path, tokenizer):
    rows = [{"question": p["prompt"], "answer": p["completion"]} for p in PAIRS]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    (finding,) = check_data(DataConfig(path=str(path)), tokenizer, workers=0).findings[:1]
    assert "data.columns: {prompt: question, completion: answer}" in finding.fix


@pytest.mark.parametrize(
    ("rows", "columns", "message", "fix"),
    [(PAIRS, {"promt": "prompt"}, 'maps "promt", which is not read', 'Write "prompt" there'),
     (PAIRS, {"prompt": "ask", "completion": "completion"}, 'names "ask"; the columns', "Correct"),
     ([{"data": PAIRS}], None, 'a list inside of one object, under "data"', "jq -c '.data[]'"),
     ([{"train": 1, "test": [1]}], None, 'not known: "test", "train"', "Use messages")],
)  # fmt: skip
def test_columns_that_are_not_there_are_said(tmp_path, tokenizer, rows, columns, message, fix):
    path = write_lines(tmp_path / "rows.jsonl", rows)
    config = DataConfig(path=str(path), columns=columns)
    (finding, *_) = check_data(config, tokenizer, workers=0).findings
    assert (finding.severity, finding.code) == ("error", "data.columns")
    assert message in finding.message
    assert fix in finding.fix


def test_a_split_of_files_has_no_effect_and_is_said(tmp_path, tokenizer):
    path = str(write_lines(tmp_path / "rows.jsonl", ROWS))
    report = check_data(DataConfig(path=path, split="test"), tokenizer, workers=0)
    assert [f.code for f in report.findings if f.severity == "error"] == ["data.split_unused"]


def test_the_split_of_a_saved_folder_is_used(tmp_path, tokenizer):
    saved = saved_dataset(tmp_path)
    (tmp_path / "both").mkdir()
    saved.rename(tmp_path / "both" / "test")
    held = str(write_lines(tmp_path / "held.jsonl", [chat_row(99)]))
    config = DataConfig(path=str(tmp_path / "both"), split="test", held_out_path=held)
    report = check_data(config, tokenizer, workers=0)
    assert not report.has_errors
    assert report.summary["good_rows"] == 24


def test_a_set_format_is_taken(tmp_path, tokenizer):
    rows = [{**pair, "text": words(20, n)} for n, pair in enumerate(PAIRS)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    report = check_data(DataConfig(path=str(path), format="text"), tokenizer, workers=0)
    assert report.summary["format"] == "text"


def test_files_of_different_formats_may_be_mixed(tmp_path, tokenizer):
    paths = (
        str(write_lines(tmp_path / "a.jsonl", ROWS)),
        str(write_lines(tmp_path / "b.jsonl", PAIRS)),
    )
    report = check_data(DataConfig(path=paths), tokenizer, workers=0)
    assert not report.has_errors
    assert report.summary["format"] == "messages, prompt_completion"
    assert [file["rows"] for file in report.summary["files"]] == [24, 24]
