"""The demo's run can be trained again; the whole demo learns its task from rows it never saw."""

import dataclasses
import json
from pathlib import Path

import pytest

from eightgig.cli import demo
from eightgig.cli.app import main
from eightgig.cli.demo import DemoResult, demo_config, run_demo
from eightgig.cli.progress import TrainingView
from eightgig.evaluation.tuned_run import open_run, plan_rows
from eightgig.run import Run


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    """A demo of three steps."""
    folder = tmp_path_factory.mktemp("demo")
    config = demo_config(folder / "runs")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, cache_dir=str(folder / "cache")),
        data=dataclasses.replace(config.data, held_out=4),
        train=dataclasses.replace(config.train, max_steps=3),
    )
    with TrainingView(config, as_json=True) as view:
        result, pairs = run_demo(config, view)
    assert len(pairs) == 4
    return result


def test_the_config_of_the_demo_trains_again(
    short: DemoResult, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(short.run)
    settings = ("run.name=again", "run.save_steps=3", "train.max_steps=4")
    arguments = [word for setting in settings for word in ("--set", setting)]
    assert main(["train", str(run / "config.yaml"), *arguments, "--json"]) == 0
    again = Run(folder=run.with_name("again"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["run"] == str(again.folder)
    assert [path.name for path in sorted(again.checkpoints_path.iterdir())] == [
        "step-000003",
        "step-000004",
    ]
    first = Run(folder=run).metrics_path.read_text(encoding="utf-8").splitlines()[0]
    second = again.metrics_path.read_text(encoding="utf-8").splitlines()[0]
    assert json.loads(first)["loss"] == json.loads(second)["loss"]


def test_rows_held_out_in_the_demo_are_not_trained_on(short: DemoResult) -> None:
    planned = plan_rows(open_run(Path(short.run), lambda _: None), lambda _: None)
    assert planned.held_out.num_rows == 4
    assert not set(planned.rows.row_ids) & set(planned.held_out.row_ids)
    rows = {tuple(_row(planned.rows, n)) for n in range(planned.rows.num_rows)}
    assert not rows & {tuple(_row(planned.held_out, n)) for n in range(4)}


def _row(rows, number: int) -> list[int]:
    return rows.input_ids[rows.offsets[number] : rows.offsets[number + 1]].tolist()


@pytest.mark.slow
def test_the_demo_learns_its_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["demo", "--output-dir", str(tmp_path / "runs"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["before"]["exact_match"] <= 0.1
    assert result["after"]["exact_match"] >= 0.7
    assert result["after"]["loss"] < 0.1 * result["before"]["loss"]
    assert Path(result["run"]).name == demo.demo_config(tmp_path / "other").run.name
