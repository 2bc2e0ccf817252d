"""`eightgig eval`: base against tuned on a run that learned something, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eightgig.cli.app import main
from eightgig.evaluation.evaluate import evaluate_run
from eightgig.evaluation.passes import EvaluationOptions
from eightgig.evaluation.records import Evaluation, evaluation_path
from eightgig.evaluation.tuned_run import open_run, plan_rows
from eightgig.run import Run, from_json
from tests import tiny_run

STEPS = 30


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    return tiny_run.make_run(root, settings=[f"train.max_steps={STEPS}"])


@pytest.fixture(scope="module")
def evaluation(run: Path) -> Evaluation:
    return evaluate_run(run, EvaluationOptions())


def _loss_events(run: Path) -> list[float]:
    lines = Run(folder=run).events_path.read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    return [event["values"]["held_out_loss"] for event in events if event["kind"] == "eval"]


def test_losses_are_those_of_the_training(run: Path, evaluation: Evaluation) -> None:
    first, *_, last = _loss_events(run)
    assert evaluation.loss.first.value == pytest.approx(first, rel=1e-6)
    assert evaluation.loss.second.value == pytest.approx(last, rel=1e-6)
    assert evaluation.perplexity.second.value == pytest.approx(np.exp(last), rel=1e-6)


def test_what_was_learned_is_better(evaluation: Evaluation) -> None:
    exact = evaluation.measure("exact_match")
    assert exact is not None
    assert exact.first.value < 0.2
    assert exact.second.value > 0.9
    assert evaluation.loss.verdict == exact.verdict == evaluation.verdict.word == "better"
    assert evaluation.num_rows == evaluation.num_answers == len(evaluation.pairs) == 18


def test_answers_stand_side_by_side_with_their_rows(run: Path, evaluation: Evaluation) -> None:
    rows = (run.parents[1] / "data.jsonl").read_text(encoding="utf-8").splitlines()
    for pair in evaluation.pairs:
        assert pair.line is not None
        question, answer = json.loads(rows[pair.line - 1])["messages"]
        assert (pair.question, pair.reference) == (question["content"], answer["content"])
        assert not pair.is_tuned_cut


def test_labels_are_found_and_answers_held_to_them(evaluation: Evaluation) -> None:
    labels = evaluation.labels
    assert labels is not None
    assert labels.labels == ("blue", "green", "red")
    for scores in (labels.base, labels.tuned):
        assert sum(map(sum, scores.confusion)) == 18
    wanted = [pair.reference for pair in evaluation.pairs]
    rows = [sum(row) for row in labels.tuned.confusion]
    assert rows == [wanted.count(label) for label in labels.labels]
    assert labels.tuned.accuracy > labels.base.accuracy
    assert labels.accuracy.second.value == labels.tuned.accuracy


def test_forgetting_is_measured_on_the_shipped_text(evaluation: Evaluation) -> None:
    assert evaluation.forgetting is not None
    assert evaluation.forgetting.source == "shipped"
    assert evaluation.forgetting.num_texts == 60
    assert evaluation.forgetting.loss.first.value > 1.0


def test_the_evaluation_is_written_into_the_run(run: Path, evaluation: Evaluation) -> None:
    text = evaluation_path(Run(folder=run)).read_text(encoding="utf-8")
    assert from_json(Evaluation, json.loads(text)) == evaluation


def test_streamed_layers_and_little_memory_change_nothing(
    run: Path, evaluation: Evaluation
) -> None:
    options = EvaluationOptions(has_general_text=False)
    streamed = evaluate_run(run, options, overrides=["memory.layer_slots=2"])
    assert streamed.pairs == evaluation.pairs
    assert streamed.loss.second.value == pytest.approx(evaluation.loss.second.value, rel=1e-6)


def test_fewer_answers_are_spread_over_the_rows_and_said(run: Path) -> None:
    options = EvaluationOptions(max_answers=5, max_new_tokens=2, has_general_text=False)
    few = evaluate_run(run, options)
    assert [note for note in few.notes if "5 of 18" in note]
    assert [note for note in few.notes if note.startswith("tuned: 5 of 5 answers had not ended")]
    assert all(pair.is_tuned_cut for pair in few.pairs)
    assert few.forgetting is None
    exact = few.measure("exact_match")
    assert exact is not None
    assert exact.verdict == "not enough rows to tell"


def test_held_out_rows_are_none_of_the_trained_ones(run: Path) -> None:
    planned = plan_rows(open_run(run, lambda _: None), lambda _: None)
    assert not set(planned.rows.row_ids) & set(planned.held_out.row_ids)
    assert planned.rows.num_rows + planned.held_out.num_rows == 60


def test_changed_data_are_warned_of(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    data = tmp_path / "other.jsonl"
    rows = [json.dumps(row) for row in tiny_run.colour_rows(61)]
    data.write_text("\n".join(rows) + "\n", encoding="utf-8")
    config = (copy / "config.yaml").read_text(encoding="utf-8")
    old = str(run.parents[1] / "data.jsonl")
    assert old in config
    (copy / "config.yaml").write_text(config.replace(old, str(data)), encoding="utf-8")
    heard: list[Any] = []
    plan_rows(open_run(copy, heard.append), heard.append)
    codes = [getattr(item, "code", "") for item in heard]
    assert "evaluation.data_changed" in codes
    heard.clear()
    plan_rows(open_run(run, heard.append), heard.append)
    assert "evaluation.data_changed" not in [getattr(item, "code", "") for item in heard]


def test_the_null_adapter_shows_what_the_form_of_answers_is_worth(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", str(run), "--null", "--max-answers", "12", "--json"]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    null = json.loads(shown.out)["null"]
    assert null["loss"]["verdict"] == "better"  # the form alone helps
    assert null["tuned_loss"]["verdict"] == "better"  # and the content more
    assert null["exact_match"]["second"]["value"] < 0.8
    assert f"step {STEPS}" in shown.err
    assert main(arguments) == 0  # what was trained once is not trained again
    assert "null adapter: step" not in capsys.readouterr().err


def test_rows_without_prompts_have_loss_alone(tmp_path: Path) -> None:
    rows = [{"text": f"{'the sky and ' * (n % 7)}the other side of {n}"} for n in range(30)]
    run = tiny_run.make_run(tmp_path, rows=rows, settings=["train.max_steps=2"])
    evaluation = evaluate_run(run, EvaluationOptions(has_general_text=False))
    assert evaluation.answers == ()
    assert evaluation.labels is None
    assert evaluation.notes == ("No answers were generated: no held-out row has a question.",)
    assert evaluation.loss.num_rows == 18


def _shown_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line[:5] for line in lines[-3:]] == ["error", "why: ", "fix: "]
    return lines[-3]


def test_an_unfinished_run_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("adapter"))
    error = _shown_error(["eval", str(tmp_path / "copy")], capsys)
    assert error.endswith("has no adapter.")
    assert not (tmp_path / "copy" / "evaluation.json.tmp").exists()


def test_a_damaged_adapter_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "copy")
    path = tmp_path / "copy" / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert "is not usable" in _shown_error(["eval", str(tmp_path / "copy")], capsys)


def test_a_run_without_held_out_rows_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "copy")
    path = tmp_path / "copy" / "config.yaml"
    text = path.read_text(encoding="utf-8")
    assert "held_out: 18.0" in text
    path.write_text(text.replace("held_out: 18.0", "held_out: 0"), encoding="utf-8")
    assert "no held-out rows" in _shown_error(["eval", str(tmp_path / "copy")], capsys)


def test_settings_that_have_no_effect_are_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = _shown_error(["eval", str(run), "--set", "train.seed=3"], capsys)
    assert "train.seed=3 has no effect" in error
