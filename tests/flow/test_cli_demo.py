"""`demo`, and `eval`, `chat`, `export` on its run; it is cut to a few steps and learns little."""

import dataclasses
import io
import json
import math
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from eightgig.cli import demo
from eightgig.cli.app import main
from eightgig.cli.demo import DemoResult
from eightgig.cli.evaluation_view import show_demo, show_evaluation
from eightgig.config import Config, read_config
from eightgig.demo import demo_data_path
from eightgig.evaluation.records import Evaluation
from eightgig.run import from_json

FULL_CONFIG = demo.demo_config


def _short_config(output_dir: Path) -> Config:
    config = FULL_CONFIG(output_dir)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, held_out=4),
        train=dataclasses.replace(config.train, max_steps=2),
    )


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Standard output of a short demo."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "demo_config", _short_config)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        lines: list[str] = []
        patch.setattr("builtins.print", lambda line, **_: lines.append(line))
        assert main(["demo", "--output-dir", str(folder / "runs"), "--json"]) == 0
    return lines


def test_the_demo_ends_with_one_line_of_scores(shown: list[str]) -> None:
    result = json.loads(shown[-1])
    assert set(result) == {
        "before", "after", "verdict", "question", "answer", "run", "report", "export",
        "training_seconds", "seconds",
    }  # fmt: skip
    for scores in (result["before"], result["after"]):
        assert set(scores) == {"loss", "exact_match"}
        assert 0 <= scores["exact_match"] <= 1
    assert result["after"]["loss"] < result["before"]["loss"]
    assert [json.loads(line)["step"] for line in shown[:-1]] == [1, 2]


def test_the_demo_evaluates_asks_reports_and_exports(shown: list[str]) -> None:
    result = json.loads(shown[-1])
    run = Path(result["run"])
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    asked = evaluation["pairs"][0]
    # The chat writes the prompt of the row, and takes the likeliest tokens, as the evaluation does.
    assert result["question"] == asked["question"]
    assert result["answer"].strip().startswith(asked["tuned"])
    assert result["verdict"] == evaluation["verdict"]["word"]
    page = Path(result["report"]).read_text(encoding="utf-8")
    for part in ("curves", "evaluation", "answers", "data", "memory", "settings", "environment"):
        assert f'<section id="{part}"' in page
    assert "A row as the model sees it" in page
    assert "<mark>" in page
    record = json.loads((Path(result["export"]) / "export.json").read_text(encoding="utf-8"))
    assert record["kind"] == "merged"
    assert record["verification"]["is_verified"]
    assert 0 < result["training_seconds"] < result["seconds"]


def test_the_card_tells_of_the_data_and_the_evaluation_but_shows_no_row(
    shown: list[str],
) -> None:
    run = Path(json.loads(shown[-1])["run"])
    card = (run / "adapter" / "README.md").read_text(encoding="utf-8")
    assert card.count("## Evaluation") == 1
    assert "| exact match | " in card
    assert "bnb_4bit_use_double_quant=True" in card  # the base as it was trained on
    headings = [line for line in card.splitlines() if line.startswith("## ")]
    assert headings == [
        "## Data", "## Held-out loss", "## Evaluation", "## Use", "## Settings",
    ]  # fmt: skip
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    for pair in evaluation["pairs"]:
        assert pair["question"] not in card
        assert pair["reference"] not in card


def test_what_is_shown_in_the_end_names_everything(
    shown: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    result = from_json(DemoResult, json.loads(shown[-1]))
    show_demo(result, (), as_json=False)
    text = capsys.readouterr().out
    for words in (result.question, result.answer, result.run, result.report, result.export):
        assert words in text
    assert f"The tuned model: {result.verdict}" in text


def test_the_system_turn_of_the_demo_is_that_of_its_rows() -> None:
    lines = demo_data_path().read_text(encoding="utf-8").splitlines()
    said = {turn["content"] for line in lines for turn in json.loads(line)["messages"][:1]}
    assert said == {demo.SYSTEM_TURN}


def test_the_log_of_a_run_that_went_well_tells_its_course(shown: list[str]) -> None:
    text = Path(json.loads(shown[-1])["run"], "log.txt").read_text(encoding="utf-8")
    for words in (
        "trainable params: ",
        "kernels: ",
        "step 0  eval  held out loss",
        "2  save  path",
    ):
        assert words in text
    assert " ERROR " not in text


def test_the_run_of_the_demo_can_be_read_and_evaluated_again(
    shown: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = json.loads(shown[-1])
    run = Path(result["run"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(run.parents[1] / "cache"))
    assert read_config(run / "config.yaml").run.name == "demo"
    assert main(["eval", str(run), "--max-answers", "2", "--json"]) == 0
    evaluation = json.loads(capsys.readouterr().out)
    assert evaluation["loss"]["first"]["value"] == pytest.approx(result["before"]["loss"])
    assert evaluation["num_answers"] == 2
    assert "2 of them were answered" in (run / "adapter" / "README.md").read_text(encoding="utf-8")
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "loss on general text" in report
    assert report.count('<article class="pair">') == 2
    show_evaluation(from_json(Evaluation, evaluation), Path("report.html"), as_json=False)
    text = capsys.readouterr().out
    assert "exact match" in text
    assert "  wanted  " in text
    verdict, where = text.splitlines()[-2:]
    assert verdict.startswith("The tuned model: ")
    assert where == "Report: report.html"


def test_the_null_adapter_may_begin_worse_than_guessing(
    shown: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(json.loads(shown[-1])["run"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(run.parents[1] / "cache"))
    assert main(["eval", str(run), "--null", "--max-answers", "2", "--json"]) == 0
    evaluation = json.loads(capsys.readouterr().out)
    first = (run / "null-adapter" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0]
    assert json.loads(first)["loss"] > math.log(1024) + 0.5  # the names are of other messages
    assert evaluation["null"]["tuned_loss"]["num_rows"] == 4
    assert "Null adapter" in (run / "report.html").read_text(encoding="utf-8")


def test_a_folder_that_is_no_run_cannot_be_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(tmp_path)]) == 2
    assert [line[:4] for line in capsys.readouterr().err.splitlines()] == ["erro", "why:", "fix:"]


def test_a_second_demo_gets_a_name_of_its_own(tmp_path: Path) -> None:
    assert FULL_CONFIG(tmp_path).run.name == "demo"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo-2").mkdir()
    assert FULL_CONFIG(tmp_path).run.name == "demo-3"


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ([], "Nothing was written yet"),
        (["config.yaml"], "Go on with: eightgig train {run}/config.yaml --resume"),
        (["config.yaml", "adapter"], "The adapter is trained; talk with it: eightgig chat {run}"),
    ],
)
def test_an_interrupted_demo_says_what_can_be_done_with_it(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    written: list[str],
    words: str,
) -> None:
    run = tmp_path / "demo"

    def interrupted(*_: object) -> NoReturn:
        for name in written:
            (run / name).mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", interrupted)
    assert main(["demo", "--output-dir", str(tmp_path)]) == 130
    assert f"Interrupted. {words.format(run=run)}" in capsys.readouterr().err


def test_one_question_can_be_asked(
    shown: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(json.loads(shown[-1])["run"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(run.parents[1] / "cache"))
    assert main(["chat", str(run), "--prompt", "Hello", "--max-tokens", "8", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["model"], answer["question"]) == ("tuned", "Hello")
    assert answer["answer"]


def test_a_conversation_ends_with_its_input(
    shown: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(json.loads(shown[-1])["run"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(run.parents[1] / "cache"))
    lines = iter(["Hello", "/base", ""])
    prompts: list[str] = []

    def read(prompt: str) -> str:
        prompts.append(prompt)
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    for stream in (sys.stdin, sys.stdout):  # only in a terminal lines are edited
        monkeypatch.setattr(stream, "isatty", lambda: True)
    assert main(["chat", str(run), "--max-tokens", "8"]) == 0
    assert prompts == ["tuned> ", "tuned> ", "base> ", "base> "]
    assert "The base model answers." in capsys.readouterr().err


def test_the_adapter_can_be_exported(
    shown: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = json.loads(shown[-1])["run"]
    output = tmp_path / "adapter"
    assert main(["export", run, "--to", "adapter", "--output", str(output)]) == 0
    assert (output / "adapter_model.safetensors").is_file()
    assert f"Exported: {output}" in capsys.readouterr().out
    assert main(["export", run, "--to", "elsewhere"]) == 2
