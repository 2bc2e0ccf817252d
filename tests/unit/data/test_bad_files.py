"""Files with one fault each: every one is acted on, and the fault is found where it is."""

import csv
import gzip
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from eightgig.config import DataConfig
from eightgig.data.checks import check_data
from eightgig.data.rules import RULES
from tests.chats import make_chat_tokenizer
from tests.unit.data.rows import chat_row, pair_row, words, write_lines

ROWS = 24
FAULTY = 13
"""Line of the faulty row."""


@dataclass(frozen=True)
class Bad:
    """A file with one fault.

    Attributes:
        make: Writes it into a folder and returns its path.
        code: The rule that is met.
        line: Where; None where the fault is that of the whole file.
        chat: Whose template.
        config: Settings of `data`.
    """

    make: Callable[[Path], object]
    code: str
    line: int | None = FAULTY
    chat: str = "llama3"
    config: dict = field(default_factory=dict)


def lines(faulty: object, row: Callable[[int], dict] = chat_row) -> Callable[[Path], Path]:
    """JSONL whose line FAULTY is `faulty`."""

    def make(folder: Path) -> Path:
        rows = [row(number) for number in range(1, ROWS + 1)]
        rows[FAULTY - 1] = faulty
        return write_lines(folder / "rows.jsonl", rows)

    return make


def messages(*turns: object) -> Callable[[Path], Path]:
    """JSONL with one row of other turns."""
    return lines({"messages": list(turns)})


def pair(**columns: object) -> Callable[[Path], Path]:
    """JSONL of prompt and completion with one row of other columns."""
    row = {**pair_row(FAULTY), **columns}
    return lines({key: item for key, item in row.items() if item != "DELETE"}, pair_row)


def text(value: object) -> Callable[[Path], Path]:
    """JSONL of plain text with one other."""
    return lines({"text": value}, lambda seed: {"text": words(30, seed)})


def alpaca(**columns: object) -> Callable[[Path], Path]:
    """JSONL of instruction, input and output with one row of other columns."""

    def good(seed: int) -> dict:
        return {"instruction": words(9, seed), "input": words(5, seed + 70_000),
                "output": words(9, seed + 80_000)}  # fmt: skip

    row = {**good(FAULTY), **columns}
    return lines({key: item for key, item in row.items() if item != "DELETE"}, good)


def every(row: Callable[[int], object]) -> Callable[[Path], Path]:
    """JSONL of such rows only."""
    return lambda folder: write_lines(
        folder / "rows.jsonl", [row(number) for number in range(1, ROWS + 1)]
    )


def raw(name: str, data: bytes) -> Callable[[Path], Path]:
    """A file of these bytes."""

    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def table(
    change: Callable[[list], None], name: str = "rows.csv", encoding: str = "utf-8"
) -> Callable[[Path], Path]:
    """CSV of prompt and completion after `change` of its records."""

    def make(folder: Path) -> Path:
        records = [["prompt", "completion"]]
        records += [list(pair_row(number).values()) for number in range(1, ROWS + 1)]
        change(records)
        output = io.StringIO()
        csv.writer(output).writerows(records)
        (folder / name).write_bytes(output.getvalue().encode(encoding, "surrogateescape"))
        return folder / name

    return make


def set_cells(record: int, cells: list) -> Callable[[list], None]:
    """Replace a record."""

    def change(records: list) -> None:
        records[record] = cells

    return change


def user(content: object = "Who?", **more: object) -> dict:
    return {"role": "user", "content": content, **more}


def assistant(content: object = "Me.", **more: object) -> dict:
    return {"role": "assistant", "content": content, **more}


def calls(*functions: object) -> dict:
    return assistant("", tool_calls=[{"type": "function", "function": f} for f in functions])


def column_file(rows: list, name: str = "rows.parquet") -> Callable[[Path], Path]:
    """A Parquet file of these rows."""

    def make(folder: Path) -> Path:
        parquet.write_table(pa.Table.from_pylist(rows), folder / name)
        return folder / name

    return make


def cut(make: Callable[[Path], Path], share: float = 0.6) -> Callable[[Path], Path]:
    """The file that `make` writes, without its end."""

    def make_cut(folder: Path) -> Path:
        path = make(folder)
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
        return path

    return make_cut


def _link(folder: Path) -> str:
    inside = folder / "data"
    inside.mkdir()
    secret = write_lines(folder / "secret.jsonl", [chat_row(1)])
    (inside / "link.jsonl").symlink_to(secret)
    return str(inside / "*.jsonl")


def _folder_with_readme(folder: Path) -> str:
    (folder / "README.md").write_text("---\nconfigs:\n- data_files: ../*.jsonl\n---\n")
    return str(folder)


def _with_held_out(folder: Path) -> Path:
    write_lines(folder / "held.jsonl", [chat_row(7), chat_row(99)])
    return write_lines(folder / "rows.jsonl", [chat_row(number) for number in range(1, 20)])


def _repeated(folder: Path) -> Path:
    rows = [chat_row(number) for number in range(1, ROWS + 1)]
    rows[FAULTY - 1] = rows[2]
    return write_lines(folder / "rows.jsonl", rows)


def _almost_repeated(folder: Path) -> Path:
    rows = [{"text": words(90, number)} for number in range(1, ROWS + 1)]
    rows[FAULTY - 1] = {"text": rows[2]["text"] + " indeed"}
    return write_lines(folder / "rows.jsonl", rows)


_GOOD_LINE = json.dumps(chat_row(FAULTY))
_GOOD_ROWS = [chat_row(number) for number in range(1, ROWS + 1)]
_GOOD_DATA = "\n".join(json.dumps(row) for row in _GOOD_ROWS).encode()
_LONG = {"messages": [user(words(400, 1)), assistant(words(200, 2))]}

BAD = {
    # Bytes and JSON
    "brace missing": Bad(lines(_GOOD_LINE[:-1]), "data.json"),
    "bracket missing": Bad(lines(_GOOD_LINE[:-2] + "}"), "data.json"),
    "quote missing": Bad(lines(_GOOD_LINE.replace('"user"', '"user')), "data.json"),
    "trailing comma": Bad(lines('{"messages": [],}'), "data.json"),
    "single quotes": Bad(lines(_GOOD_LINE.replace('"', "'")), "data.json"),
    "python literals": Bad(lines('{"messages": None}'), "data.json"),
    "comment": Bad(lines("// the second half"), "data.json"),
    "two rows on a line": Bad(lines(_GOOD_LINE + _GOOD_LINE), "data.json"),
    "leading zero": Bad(lines('{"id": 007, "messages": []}'), "data.json"),
    "raw tab in a text": Bad(lines('{"messages": "a\tb"}'), "data.json"),
    "mark inside the file": Bad(lines("\ufeff" + _GOOD_LINE), "data.json"),
    "endless number": Bad(lines('{"messages": ' + "9" * 5_000 + "}"), "data.json"),
    "markdown fence": Bad(lines("```json"), "data.json"),
    "end of the file missing": Bad(
        raw("rows.jsonl", _GOOD_DATA[: _GOOD_DATA.rindex(b'"content"')]), "data.json", ROWS
    ),
    "array as a row": Bad(lines([1, 2]), "data.not_an_object"),
    "text as a row": Bad(lines('"hello"'), "data.not_an_object"),
    "number as a row": Bad(lines("17"), "data.not_an_object"),
    "null as a row": Bad(lines("null"), "data.not_an_object"),
    "true as a row": Bad(lines("true"), "data.not_an_object"),
    "byte that is not UTF-8": Bad(lines(_GOOD_LINE.encode() + b"\xe9"), "data.encoding"),
    "Latin-1 text": Bad(
        lines(b'{"messages": [{"role": "user", "content": "Gr\xfc\xdfe"}]}'), "data.encoding"
    ),
    "UTF-16": Bad(raw("rows.jsonl", _GOOD_DATA.decode().encode("utf-16")), "data.encoding", 1),
    "UTF-16 without a mark": Bad(
        raw("rows.jsonl", _GOOD_DATA.decode().encode("utf-16-le")), "data.encoding", 1
    ),
    "half a character": Bad(messages(user("a \ud83d b"), assistant()), "data.encoding"),
    "half a character, escaped": Bad(
        lines('{"messages": [{"role": "user", "content": "\\ud83d"}, '
              '{"role": "assistant", "content": "b"}]}'),
        "data.surrogate",
    ),
    "key twice": Bad(
        lines('{"messages": [], ' + _GOOD_LINE.removeprefix("{")), "data.duplicate_key"
    ),
    "role twice": Bad(
        lines('{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}'),
        "data.duplicate_key",
    ),
    "nested deeply": Bad(lines('{"messages": ' + "[" * 80 + "]" * 80 + "}"), "data.too_deep"),
    "nested very deeply": Bad(
        lines('{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}"), "data.too_deep"
    ),
    "300 columns": Bad(
        lines({f"column {number}": number for number in range(300)}), "data.too_many_columns"
    ),
    "NaN": Bad(lines(_GOOD_LINE[:-1] + ', "score": NaN}'), "data.json_constant"),
    "empty file": Bad(raw("rows.jsonl", b""), "data.empty_file", None),
    "blank file": Bad(raw("rows.jsonl", b"\n \n\r\n"), "data.empty_file", None),
    "CSV in a JSONL file": Bad(raw("rows.jsonl", b"prompt,completion\na,b\n"), "data.json", 1),
    # Files
    "no such file": Bad(lambda folder: folder / "none.jsonl", "data.not_found", None),
    "glob without a file": Bad(lambda folder: f"{folder}/*.jsonl", "data.not_found", None),
    "folder": Bad(_folder_with_readme, "data.folder", None),
    "link out of the folder": Bad(_link, "data.outside_link", None),
    "pickle": Bad(raw("rows.pkl", b"\x80\x04N."), "data.file_kind", None),
    "text file": Bad(raw("rows.txt", b"Hello"), "data.file_kind", None),
    "spreadsheet": Bad(raw("rows.xlsx", b"PK\x03\x04"), "data.file_kind", None),
    "archive": Bad(raw("rows.zip", b"PK\x03\x04"), "data.file_kind", None),
    "packed file without its end": Bad(
        raw("rows.jsonl.gz", gzip.compress(_GOOD_DATA)[:-40]), "data.damaged_file", None
    ),
    "packed file with a wrong byte": Bad(
        raw("rows.jsonl.gz", gzip.compress(_GOOD_DATA)[:60] + b"\xff" * 200),
        "data.damaged_file",
        None,
    ),
    "Parquet without its end": Bad(cut(column_file(_GOOD_ROWS)), "data.damaged_file", None),
    "text as Parquet": Bad(raw("rows.parquet", b"hello, I am text"), "data.damaged_file", None),
    "Parquet of other columns": Bad(column_file([{"a": "b"}] * 5), "data.columns", 1),
    "Parquet with a null": Bad(
        column_file([{**row, "messages": None} if n == 12 else row
                     for n, row in enumerate(_GOOD_ROWS)]),
        "data.missing_column",
    ),
    "Parquet of 300 columns": Bad(
        column_file([{f"c{n}": n for n in range(300)}]), "data.too_many_columns", None
    ),
    "array without a comma": Bad(
        raw("rows.json", b"[\n" + _GOOD_DATA.replace(b"\n", b",\n").replace(b",\n", b"\n", 1)
            + b"\n]"),
        "data.json",
        3,
    ),
    "array without its end": Bad(
        raw("rows.json", b"[\n" + _GOOD_DATA.replace(b"\n", b",\n")), "data.json", ROWS + 1
    ),
    "array with a broken row": Bad(
        raw("rows.json", b'[\n{"messages": []},\n{"messages" []}\n]'), "data.json", 3
    ),
    "array of texts": Bad(raw("rows.json", b'["a",\n"b"]'), "data.not_an_object", 1),
    "array in an object": Bad(raw("rows.json", b'{"data": [{"prompt": "a"}]}'), "data.columns", 1),
    "array with a null": Bad(
        raw("rows.json", b"[\n" + _GOOD_DATA.replace(b"\n", b",\n") + b",\nnull]"),
        "data.not_an_object",
        ROWS + 2,
    ),
    "JSON that is not UTF-8": Bad(raw("rows.json", b'[\n{"a": "\xe9"}]'), "data.encoding", 2),
    # CSV
    "cell missing": Bad(table(set_cells(12, ["only one"])), "data.csv"),
    "cell too many": Bad(table(set_cells(12, ["a", "b", "c"])), "data.csv"),
    "column twice": Bad(table(set_cells(0, ["prompt", "prompt"])), "data.csv", 1),
    "quote open": Bad(raw("rows.csv", b'prompt,completion\na,b\n"c,d\n'), "data.csv", 3),
    "quote inside": Bad(raw("rows.csv", b'prompt,completion\na,b\n"c"x,d\n'), "data.csv", 3),
    "no header": Bad(table(lambda records: records.pop(0)), "data.columns", 2),
    "only a header": Bad(raw("rows.csv", b"prompt,completion\n"), "data.empty_file", None),
    "empty cell": Bad(table(set_cells(12, ["a", ""])), "data.empty_turn"),
    "Latin-1 table": Bad(
        table(set_cells(12, ["Größe", "b"]), encoding="latin-1"), "data.encoding"
    ),
    "many columns": Bad(raw("rows.csv", b",".join(b"c%d" % n for n in range(300)) + b"\n1\n"),
                        "data.csv", 1),
    # Columns
    "question and answer": Bad(
        every(lambda n: {"question": words(9, n), "answer": words(5, n)}), "data.columns", 1
    ),
    "misspelt messages": Bad(
        every(lambda n: {"mesages": chat_row(n)["messages"]}), "data.columns", 1
    ),
    "capital Messages": Bad(
        every(lambda n: {"Messages": chat_row(n)["messages"]}), "data.columns", 1
    ),
    "numbers only": Bad(every(lambda n: {"x": n, "y": 2 * n}), "data.columns", 1),
    "token ids": Bad(
        every(lambda n: {"input_ids": [1, n], "labels": [1]}), "data.tokens_column", 1
    ),
    "messages missing": Bad(lines({"id": 3}), "data.missing_column"),
    "no columns": Bad(lines({}), "data.missing_column"),
    "messages null": Bad(lines({"messages": None}), "data.missing_column"),
    "messages misspelt once": Bad(
        lines({"message": chat_row(3)["messages"]}), "data.missing_column"
    ),
    "ShareGPT row": Bad(
        lines({"conversations": [{"from": "human", "value": "a"}]}), "data.mixed_format"
    ),
    "pair among conversations": Bad(lines(pair_row(5)), "data.mixed_format"),
    "prompt missing": Bad(pair(prompt="DELETE"), "data.missing_column"),
    "completion null": Bad(pair(completion=None), "data.missing_column"),
    "completion empty": Bad(pair(completion=""), "data.empty_turn"),
    "prompt blank": Bad(pair(prompt=" \n\t"), "data.empty_turn"),
    "completion a number": Bad(pair(completion=42), "data.column_type"),
    "prompt a list of texts": Bad(pair(prompt=["a", "b"]), "data.message_type"),
    "text null": Bad(text(None), "data.missing_column"),
    "text a number": Bad(text(3), "data.column_type"),
    "text empty": Bad(text(""), "data.empty_turn"),
    "text blank": Bad(text(" \n"), "data.empty_turn"),
    "output missing": Bad(alpaca(output="DELETE"), "data.missing_column"),
    "instruction empty": Bad(alpaca(instruction=""), "data.empty_turn"),
    "input a number": Bad(alpaca(input=7), "data.column_type"),
    "template in a row": Bad(
        lines({**chat_row(FAULTY), "chat_template": "PWNED"}), "data.template_column"
    ),
    "template arguments in a row": Bad(
        lines({**chat_row(FAULTY), "chat_template_kwargs": {"chat_template": "PWNED"}}),
        "data.template_column",
    ),
    "thinking set by a row": Bad(
        lines({**chat_row(FAULTY), "enable_thinking": True}), "data.template_column"
    ),
    "group missing": Bad(
        every(lambda n: {**chat_row(n), **({"case": n} if n != FAULTY else {})}),
        "data.missing_column",
        config={"group_column": "case"},
    ),
    # Turns
    "messages a text": Bad(lines({"messages": "hello"}), "data.message_type"),
    "messages an object": Bad(lines({"messages": {"role": "user"}}), "data.message_type"),
    "messages empty": Bad(lines({"messages": []}), "data.no_messages"),
    "turn a text": Bad(messages("Hi", "Hello"), "data.message_type"),
    "turn null": Bad(messages(None, assistant()), "data.message_type"),
    "role missing": Bad(messages({"content": "Hi"}, assistant()), "data.role"),
    "role null": Bad(messages({"role": None, "content": "Hi"}, assistant()), "data.role"),
    "role a number": Bad(messages({"role": 1, "content": "Hi"}, assistant()), "data.role"),
    "role bot": Bad(messages(user(), {"role": "bot", "content": "Hi"}), "data.role"),
    "role User": Bad(messages({"role": "User", "content": "Hi"}, assistant()), "data.role"),
    "role human": Bad(messages({"role": "human", "content": "Hi"}, assistant()), "data.role"),
    "role model": Bad(messages(user(), {"role": "model", "content": "Hi"}), "data.role"),
    "content missing": Bad(messages({"role": "user"}, assistant()), "data.content_missing"),
    "content null": Bad(messages(user(None), assistant()), "data.content_missing"),
    "answer null": Bad(messages(user(), assistant(None)), "data.content_missing"),
    "content a number": Bad(messages(user(42), assistant()), "data.content_type"),
    "content true": Bad(messages(user(True), assistant()), "data.content_type"),
    "content an object": Bad(messages(user({"text": "Hi"}), assistant()), "data.content_type"),
    "content NaN": Bad(
        lines('{"messages": [{"role": "user", "content": NaN}]}'), "data.content_type"
    ),
    "part a number": Bad(messages(user([1]), assistant()), "data.content_type"),
    "picture": Bad(
        messages(user([{"type": "image", "url": "a.png"}]), assistant()), "data.media"
    ),
    "no parts": Bad(messages(user([]), assistant()), "data.empty_turn"),
    "question empty": Bad(messages(user(""), assistant()), "data.empty_turn"),
    "answer empty": Bad(messages(user(), assistant("")), "data.empty_turn"),
    "answer blank": Bad(messages(user(), assistant(" \n ")), "data.empty_turn"),
    "answer first": Bad(messages(assistant(), user(), assistant()), "data.role_order"),
    "two questions": Bad(messages(user(), user(), assistant()), "data.role_order"),
    "two answers": Bad(messages(user(), assistant(), assistant()), "data.role_order"),
    "system in the middle": Bad(
        messages(user(), {"role": "system", "content": "Be."}, assistant()), "data.role_order"
    ),
    "two systems": Bad(
        messages(*[{"role": "system", "content": "Be."}] * 2, user(), assistant()),
        "data.role_order",
    ),
    "only a question": Bad(messages(user()), "data.no_answer"),
    "only a system turn": Bad(
        messages({"role": "system", "content": "Be brief."}), "data.no_answer"
    ),
    "nothing weighs": Bad(messages(user(), assistant(weight=0)), "data.no_answer"),
    "question at the end": Bad(messages(user(), assistant(), user("And?")), "data.trailing_turn"),
    "system where there is none": Bad(
        messages({"role": "developer", "content": "Be brief."}, user(), assistant()),
        "data.system_unsupported",
        chat="mistral",
    ),
    # Tools and reasoning
    "result without a call": Bad(
        messages(user(), {"role": "tool", "content": "4"}, assistant()), "data.role_order"
    ),
    "question behind a call": Bad(
        messages(user(), calls({"name": "f", "arguments": {}}), user(), assistant()),
        "data.role_order",
    ),
    "calls no list": Bad(messages(user(), assistant("", tool_calls="f()")), "data.tool_call"),
    "call without a name": Bad(messages(user(), calls({"arguments": {}})), "data.tool_call"),
    "arguments no JSON": Bad(
        messages(user(), calls({"name": "f", "arguments": "{a: 1}"})), "data.tool_call"
    ),
    "arguments a list": Bad(
        messages(user(), calls({"name": "f", "arguments": [1]})), "data.tool_call"
    ),
    "two calls at once": Bad(
        messages(user(), calls(*[{"name": "f", "arguments": {}}] * 2)), "data.template_refused"
    ),
    "calls that are not rendered": Bad(
        messages(user(), calls({"name": "sun", "arguments": {}})),
        "data.content_lost",
        chat="smollm2",
    ),
    "tools no JSON": Bad(lines({**chat_row(3), "tools": "[{"}), "data.tools"),
    "tools without names": Bad(lines({**chat_row(3), "tools": [{"a": 1}]}), "data.tools"),
    "tools that are not rendered": Bad(
        lines({**chat_row(3), "tools": [{"name": "sun"}]}), "data.tools_lost", chat="smollm2"
    ),
    "reasoning of a user": Bad(messages(user(reasoning="a"), assistant()), "data.content_type"),
    "reasoning a number": Bad(messages(user(), assistant(reasoning=3)), "data.content_type"),
    "reasoning that is not rendered": Bad(
        messages(user(), assistant(reasoning="Because.")), "data.reasoning_lost"
    ),
    "reasoning in tags": Bad(
        messages(user(), assistant("<think>So.</think>Me.")), "data.reasoning_tags"
    ),
    # Control tokens
    "control token in a question": Bad(
        messages(user("a <|eot_id|> b"), assistant()), "data.control_token"
    ),
    "beginning token in a question": Bad(
        messages(user("<|begin_of_text|>Hi"), assistant()), "data.control_token"
    ),
    "control token in an answer": Bad(
        messages(user(), assistant("a <|eot_id|> b")), "data.control_token"
    ),
    "control token in a tool's name": Bad(
        lines({**chat_row(3), "tools": [{"name": "<|eot_id|>"}]}), "data.control_token"
    ),
    "end token in an answer": Bad(
        messages(user(), assistant("Me.<|eot_id|>")), "data.doubled_end"
    ),
    "rendered prompt": Bad(
        pair(prompt="<|begin_of_text|><|start_header_id|>user"), "data.prerendered"
    ),
    "rendered text": Bad(text("<|begin_of_text|>Once upon a time"), "data.prerendered"),
    "text with the end token": Bad(text("Once upon a time<|eot_id|>"), "data.control_token"),
    # Texts
    "placeholder": Bad(messages(user("Dear {{name}},"), assistant()), "data.placeholder"),
    "prompt variable": Bad(messages(user("Answer: {question}"), assistant()), "data.placeholder"),
    "insert here": Bad(messages(user(), assistant("Dear [YOUR NAME]")), "data.placeholder"),
    "lorem ipsum": Bad(messages(user(), assistant("Lorem ipsum dolor sit")), "data.placeholder"),
    "AWS key": Bad(messages(user("AKIAIOSFODNN7EXAMPLE"), assistant()), "data.secret"),
    "private key": Bad(
        messages(user("-----BEGIN RSA PRIVATE KEY-----"), assistant()), "data.secret"
    ),
    "hub token": Bad(messages(user(), assistant("hf_" + "aB3" * 12)), "data.secret"),
    "GitHub token": Bad(messages(user(), assistant("ghp_" + "aB3d" * 9)), "data.secret"),
    "address with a password": Bad(
        messages(user("postgres://me:hunter2@db.internal/x"), assistant()), "data.secret"
    ),
    "e-mail": Bad(messages(user("Ask jo.doe@acme.co"), assistant()), "data.personal"),
    "card": Bad(messages(user("4111 1111 1111 1234 or 4539 1488 0343 6467"), assistant()),
                "data.personal"),
    "bank account": Bad(messages(user("DE89 3704 0044 0532 0130 00"), assistant()),
                        "data.personal"),
    "broken umlauts": Bad(messages(user("GrÃ¶ÃŸe"), assistant()), "data.mojibake"),
    "broken quote": Bad(messages(user("itâ€™s"), assistant()), "data.mojibake"),
    "lost character": Bad(messages(user("na\ufffdve"), assistant()), "data.mojibake"),
    "zero character": Bad(messages(user("a\x00b"), assistant()), "data.control_character"),
    "nan as an answer": Bad(messages(user(), assistant("nan")), "data.stand_in"),
    "null as a completion": Bad(pair(completion="NULL"), "data.stand_in"),
    "conversation as text": Bad(text("### Instruction:\nAdd.\n### Response:\n4"),
                                "data.prompt_in_text"),
    # All rows together
    "row twice": Bad(_repeated, "data.duplicates"),
    "half of the rows twice": Bad(every(lambda n: chat_row(n // 2)), "data.duplicates", 3),
    "one row only": Bad(every(lambda _: chat_row(1)), "data.duplicates", 2),
    "row almost twice": Bad(_almost_repeated, "data.near_duplicates"),
    "one answer": Bad(
        every(lambda n: {**pair_row(n), "completion": "no" if n > 3 else f"yes {n}"}),
        "data.dominant_answer",
        None,
    ),
    "held-out row trained": Bad(_with_held_out, "data.leak", 1),
    "row too long": Bad(lines(_LONG), "data.too_long", config={"max_length": 500}),
    "rows too long, dropped": Bad(
        lines(_LONG), "data.dropped", None, config={"max_length": 500, "too_long": "drop"}
    ),
    "answer cut": Bad(
        lines(_LONG), "data.answer_cut", config={"max_length": 3_000, "too_long": "truncate"}
    ),
    "all rows too long, dropped": Bad(
        lines(_LONG), "data.no_rows", None, config={"max_length": 5, "too_long": "drop"}
    ),
    "all answers cut": Bad(
        lines(_LONG), "data.no_rows", None, config={"max_length": 5, "too_long": "truncate"}
    ),
    "more held out than there is": Bad(
        every(chat_row), "data.held_out", None, config={"held_out": 100}
    ),
    "stop token unknown": Bad(every(chat_row), "data.stop_token", None, chat="other end"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers():
    made = {chat: make_chat_tokenizer(chat) for chat in ("llama3", "mistral", "smollm2")}
    made["other end"] = make_chat_tokenizer("llama3")
    made["other end"].eos_token = "<|end_of_text|>"
    return made


def _check(case: Bad, folder: Path, tokenizers: dict):
    path = str(case.make(folder))
    held = folder / "held.jsonl"
    more = {"held_out_path": str(held)} if held.exists() else {}
    config = DataConfig(path=path, **{**more, **case.config})
    return check_data(config, tokenizers[case.chat], workers=0)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_acted_on(name, tmp_path, tokenizers):
    case = BAD[name]
    report = _check(case, tmp_path, tokenizers)
    codes = [f.code for f in report.findings if f.severity != "note"]
    assert case.code in codes, codes
    found = [finding for finding in report.findings if finding.code == case.code]
    assert all(finding.why and finding.fix and finding.message for finding in found)
    if case.line is not None:
        assert case.line in [finding.line for finding in found]
        assert all(finding.file for finding in found if finding.line)


def test_nearly_all_faults_of_rows_are_found_at_their_line():
    located = [case for case in BAD.values() if case.line is not None]
    of_files = {"data.not_found", "data.folder", "data.file_kind", "data.empty_file",
                "data.damaged_file", "data.outside_link", "data.held_out"}  # fmt: skip
    of_rows = [case for case in BAD.values() if case.code not in of_files]
    assert len(BAD) >= 100
    assert len(located) >= 0.97 * (len(of_rows) - 4)  # four are of all rows together


def test_every_case_names_a_rule():
    assert {case.code for case in BAD.values()} <= set(RULES)


def test_a_fault_does_not_hide_another(tmp_path, tokenizers):
    rows = [chat_row(1), "{", {"messages": []}, chat_row(2), b"\xff", {"messages": [user()]}]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    report = check_data(DataConfig(path=str(path)), tokenizers["llama3"], workers=0)
    errors = {(f.line, f.code) for f in report.findings if f.severity == "error"}
    assert errors == {
        (2, "data.json"),
        (3, "data.no_messages"),
        (5, "data.encoding"),
        (6, "data.no_answer"),
    }


def test_counts_go_on_where_examples_end(tmp_path, tokenizers):
    path = write_lines(tmp_path / "rows.jsonl", [chat_row(1), *["{"] * 350])
    report = check_data(DataConfig(path=str(path)), tokenizers["llama3"], workers=0)
    assert report.summary["counts"]["data.json"] == 350
    assert len([f for f in report.findings if f.code == "data.json"]) == 100


def test_an_archive_inside_a_good_name_is_refused(tmp_path, tokenizers):
    path = tmp_path / "rows.jsonl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("rows.jsonl", _GOOD_DATA)
    report = check_data(DataConfig(path=str(path)), tokenizers["llama3"], workers=0)
    assert report.has_errors
