"""`eightgig check`: what it shows and how it ends; the checks themselves have their own tests."""

import json
from pathlib import Path

import pytest

from eightgig.cli.app import main

ROWS = [
    {"prompt": f"What is the colour of number {number}?", "completion": f"Shade {number * 7}."}
    for number in range(12)
]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("model: {name: demo}\ndata: {path: data.jsonl}\n", encoding="utf-8")
    _write_rows(tmp_path, *ROWS)
    return path


def _write_rows(folder: Path, *rows: object) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_good_data_are_counted_shown_and_end_with_0(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(config)]) == 0
    shown = capsys.readouterr().out
    assert "data.jsonl: 12 rows of the form prompt_completion" in shown
    assert "What is the colour of number 0?" in shown
    assert ">>Shade 0.<turn|><<" in shown
    assert shown.splitlines()[-1].startswith("The data can be trained on")


def test_a_faulty_row_is_named_with_its_line_and_ends_with_2(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write_rows(config.parent, *ROWS, '{"prompt": "?", ')
    assert main(["check", str(config)]) == 2
    shown = capsys.readouterr().out
    assert f"error: {config.parent / 'data.jsonl'}:13: " in shown
    assert shown.splitlines()[-1].startswith("The data cannot be trained on")


def test_strict_takes_warnings_for_errors(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write_rows(config.parent, *ROWS, ROWS[0])
    assert main(["check", str(config)]) == 0
    assert "warning: " in capsys.readouterr().out
    assert main(["check", str(config), "--strict"]) == 2


def test_json_has_findings_summary_and_sample(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(config), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert set(shown) == {"findings", "summary", "preview"}
    assert shown["summary"]["rows"] == 12
    tokens = shown["preview"][0]["tokens"]
    assert set(tokens[0]) == {"text", "is_trained", "token_id"}
    assert "".join(token["text"] for token in tokens if token["is_trained"]) == "Shade 0.<turn|>"


def test_token_ids_are_shown_on_demand(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(config), "--token-ids"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(">>") and line.endswith("'<turn|>'") for line in lines)


def test_a_model_that_is_not_there_is_said_so(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(config), "--set", "model.name=./nowhere"]) == 2
    assert capsys.readouterr().err.startswith("error: There is no model folder")


def test_of_many_faults_the_first_are_listed_and_the_reason_is_said_once(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write_rows(config.parent, *ROWS, *["{"] * 340, {"prompt": "?"})
    assert main(["check", str(config)]) == 2
    shown = capsys.readouterr().out
    assert shown.count("no valid JSON") + shown.count("the line ends before") == 10
    assert "and 330 more" in shown
    assert shown.count("why: The row cannot be read.") == 1
    assert f'{config.parent / "data.jsonl"}:353: The column "completion" is missing.' in shown


def test_fixes_of_one_kind_that_differ_stand_with_their_rows(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"messages": [{"role": role, "content": "Hi"}]} for role in ("bot", "human", "x")]
    good = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    _write_rows(config.parent, good, *rows)
    assert main(["check", str(config)]) == 2
    lines = capsys.readouterr().out.splitlines()
    named = [index for index, line in enumerate(lines) if "unknown role" in line]
    assert len(named) == 3
    assert 'fix: Write "assistant".' in lines[named[0] + 1]
    assert 'fix: Write "user".' in lines[named[1] + 1]
    assert "why: " in lines[named[2] + 1]
    assert "fix: Use system, developer" in lines[named[2] + 2]
