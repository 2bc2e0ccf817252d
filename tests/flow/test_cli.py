"""The command line: what it prints where, and how it ends."""

import io
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NoReturn

import pytest
from rich.console import Console

import eightgig
from eightgig.cli.app import main
from eightgig.cli.commands import ALL
from eightgig.cli.progress import TrainingView
from eightgig.config import Choice, Config, read_config
from eightgig.errors import DataError, Finding, TrainingStopped
from eightgig.quant.build import StoreProgress
from eightgig.run import Event
from eightgig.training.step import StepReport

CONFIG = "model:\n  name: demo\ndata:\n  path: data.jsonl\nrun:\n  name: first\n"
# Nothing of this may be loaded to show a help text.
HEAVY = ("torch", "transformers", "bitsandbytes", "numpy", "pyarrow", "datasets", "tokenizers")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def _report(step: int) -> StepReport:
    return StepReport(
        step=step,
        epoch=step * 1.5,
        loss=2.0 / step,
        grad_norm=1.0,
        learning_rate=2e-4,
        loss_tokens=100,
        tokens=400,
        tokens_per_second=1234.5,
        vram_peak_bytes=3 << 30,
        seconds=0.5,
    )


class FakeTraining:
    """Stands in for `eightgig.finetune`, whose own tests train for real."""

    def __init__(self) -> None:
        self.seen: list[tuple[Config, bool]] = []
        self.end: BaseException | None = None
        self.work: list[StoreProgress] = []

    def finetune(
        self,
        config: Config,
        *,
        resume: bool = False,
        allow_changed_versions: bool = False,
        observe: object = None,
    ) -> Iterator[StepReport]:
        assert callable(observe)
        for work in self.work:
            observe(work)
        self.seen.append((config, resume))
        self.allowed = allow_changed_versions
        observe("trainable params: 1 || all params: 2 || trainable%: 50.0")
        observe(Choice(name="kernels", value="plain", reason="there is no GPU"))
        yield _report(1)
        observe(Event(step=1, kind="eval", values={"held_out_loss": 1.25}))
        if self.end is not None:
            raise self.end
        yield _report(2)


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> FakeTraining:
    fake = FakeTraining()
    module = types.ModuleType("eightgig.finetune")
    module.finetune = fake.finetune  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "eightgig.finetune", module)
    return fake


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"eightgig {eightgig.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from eightgig.cli.app import main\n"
        f"assert main({arguments}) == 0\n"
        f"sys.exit(', '.join(name for name in {HEAVY} if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "eightgig" in done.stdout


@pytest.mark.parametrize("command", ["", *ALL])
def test_help_shows_no_value_behind_what_takes_none(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.split(), "--help"]) == 0
    flags = [line for line in capsys.readouterr().out.splitlines() if "bool" in line]
    assert all("--help" in line for line in flags)  # typer's own


def test_help_takes_less_than_half_a_second_of_processor_time() -> None:
    spent = []
    for _ in range(3):
        before = os.times()
        subprocess.run(
            [sys.executable, "-m", "eightgig", "--help"], capture_output=True, check=True
        )
        after = os.times()
        spent.append(after.children_user - before.children_user)
    assert min(spent) < 0.5


def test_an_unknown_command_is_the_users_to_mend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "train" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "run", "--max-answers", "-1"],
        ["eval", "run", "--max-new-tokens", "0"],
        ["chat", "run", "--temperature", "-1"],
        ["chat", "run", "--temperature", "nan"],
        ["chat", "run", "--temperature", "inf"],
        ["chat", "run", "--max-tokens", "0"],
        ["chat", "run", "--seed", "99999999999999999999"],
    ],
)
def test_numbers_that_make_no_sense_are_refused_by_name(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert f"Invalid value for '{words[2]}'" in capsys.readouterr().err


def test_a_faulty_config_gives_three_lines_and_exit_2(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(CONFIG + "train:\n  num_epochs: 3\n", encoding="utf-8")
    assert main(["train", str(config)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        f'error: {config}:8: unknown key "num_epochs".',
        "why:   Unknown settings are refused: a typo must not become a silent default.",
        'fix:   Write "num_train_epochs".',
    ]
    assert not (config.parent / "runs").exists()


def test_several_faults_are_listed_between_the_lines(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config), "--set", "lora.r=0", "--set", "lora.rank=8"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"error: {config}: 2 settings cannot be used."
    assert lines[1].startswith("  --set lora.rank: unknown key")
    assert lines[2].startswith('  --set lora.r: "r" is 0. Write')
    assert [line[:4] for line in lines[3:]] == ["why:", "fix:"]


def test_errors_are_json_where_json_is_asked_for(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config), "--json", "--set", "lora.rank=8"]) == 2
    shown = capsys.readouterr()
    error = json.loads(shown.out)["error"]
    assert set(error) == {"message", "why", "fix", "findings"}
    assert error["findings"][0]["code"] == "config.unknown_key"
    assert shown.err.startswith("error: ")


def test_a_missing_config_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "nothing.yaml")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_training_shows_a_line_a_step_and_where_the_adapter_is(
    config: Path, training: FakeTraining, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config), "--set", "train.seed=7"]) == 0
    ((settings, resume),) = training.seen
    assert settings == read_config(config, ["train.seed=7"])
    assert not resume
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("trainable params: 1 ||")
    assert lines[1] == "kernels: plain (there is no GPU)"
    assert lines[2].startswith("step 1/2  epoch 1.50  loss 2.0000  lr 2.0e-04  1,234 tokens/s")
    assert "VRAM 3.00 GiB" in lines[2]
    assert lines[2].endswith(" left")
    assert lines[3] == "step 1  eval  held out loss 1.25"
    assert lines[4].startswith("step 2/2")
    assert lines[5] == f"Adapter: {config.parent / 'runs' / 'first' / 'adapter'}"


def test_training_as_json_is_a_line_a_step_and_a_last_line(
    config: Path, training: FakeTraining, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config), "--resume", "--json"]) == 0
    assert training.seen[0][1]
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2]
    run = config.parent / "runs" / "first"
    assert lines[-1] == {"run": str(run), "adapter": str(run / "adapter"), "step": 2, "loss": 1.0}


def test_an_interrupted_training_ends_with_130_and_says_how_to_go_on(
    config: Path, training: FakeTraining, capsys: pytest.CaptureFixture[str]
) -> None:
    training.end = KeyboardInterrupt()
    assert main(["train", str(config)]) == 130
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [f"Interrupted. Go on with: eightgig train {config} --resume"]
    assert "Adapter" not in shown.out


def test_a_second_interruption_during_the_report_hides_not_how_to_go_on(
    config: Path,
    training: FakeTraining,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("eightgig.web.report.write_report", interrupted)
    training.end = KeyboardInterrupt()
    assert main(["train", str(config)]) == 130
    assert f"eightgig train {config} --resume" in capsys.readouterr().err


def test_an_interruption_that_python_wrapped_is_one_still(
    config: Path, training: FakeTraining, capsys: pytest.CaptureFixture[str]
) -> None:
    # Python 3.11 does so where Ctrl-C meets a class that is being made, in an import for example.
    training.end = RuntimeError("Error calling __set_name__")
    training.end.__cause__ = KeyboardInterrupt()
    assert main(["train", str(config)]) == 130
    assert "fault of eightgig" not in capsys.readouterr().err


def test_going_on_takes_the_settings_that_were_put_over_the_files(
    config: Path, training: FakeTraining, capsys: pytest.CaptureFixture[str]
) -> None:
    training.end = KeyboardInterrupt()
    assert main(["train", str(config), "--set", "train.seed=1", "--set", "run.name=a b"]) == 130
    words = f"eightgig train {config} --set train.seed=1 --set 'run.name=a b' --resume"
    assert capsys.readouterr().err.splitlines() == [f"Interrupted. Go on with: {words}"]


@pytest.mark.parametrize("is_allowed", [False, True])
def test_other_versions_must_be_allowed_by_name(
    config: Path, training: FakeTraining, is_allowed: bool
) -> None:
    options = ["--allow-changed-versions"] if is_allowed else []
    assert main(["train", str(config), "--resume", *options]) == 0
    assert training.allowed == is_allowed


def _pipe_without_a_reader() -> IO[str]:
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


def _full_disk() -> IO[str]:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    return Path("/dev/full").open("w", encoding="utf-8")


@pytest.fixture(params=[_pipe_without_a_reader, _full_disk])
def lost(request: pytest.FixtureRequest) -> Iterator[IO[str]]:
    """A stream that takes nothing."""
    with request.param() as stream:
        yield stream


@pytest.mark.parametrize("options", [[], ["--json"]])
@pytest.mark.parametrize("streams", [["stdout"], ["stderr"], ["stdout", "stderr"]])
def test_a_training_outlives_whoever_reads_it(
    config: Path,
    training: FakeTraining,
    monkeypatch: pytest.MonkeyPatch,
    lost: IO[str],
    options: list[str],
    streams: list[str],
) -> None:
    for name in streams:
        monkeypatch.setattr(sys, name, lost)
    training.end = KeyboardInterrupt()
    assert main(["train", str(config), *options]) == 130, "the loop must hear of it and save"
    training.end = None
    assert main(["train", str(config), *options]) == 0


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_result_that_cannot_be_written_is_said_so(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
) -> None:
    with _full_disk() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        asked = ["plan", "--model", "google/gemma-4-12B-it", "--vram", "8GiB", *options]
        assert main(asked) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: The result cannot be written: No space left on device.\nwhy: ")


def test_a_guard_ends_with_3(
    config: Path, training: FakeTraining, capsys: pytest.CaptureFixture[str]
) -> None:
    training.end = TrainingStopped("The loss is NaN.", why="It cannot recover.", fix="Resume.")
    assert main(["train", str(config)]) == 3
    assert capsys.readouterr().err.startswith("error: The loss is NaN.\nwhy:   It cannot")


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "Go on with: "),
        (TrainingStopped("It is NaN.", why="", fix=""), 3, "error: It is NaN."),
    ],
)
def test_a_report_that_cannot_be_written_hides_not_why_a_run_stopped(
    config: Path,
    training: FakeTraining,
    capsys: pytest.CaptureFixture[str],
    end: BaseException,
    code: int,
    words: str,
) -> None:
    (config.parent / "runs" / "first" / "report.html").mkdir(parents=True)
    training.end = end
    assert main(["train", str(config), "--resume"]) == code
    shown = capsys.readouterr().err
    assert "The report was not written to " in shown
    assert words in shown


def test_a_fault_of_ours_ends_with_1_and_a_traceback_without_secrets(
    config: Path, training: FakeTraining, capsys: pytest.CaptureFixture[str]
) -> None:
    training.end = ZeroDivisionError("token hf_AbCdEfGhIjKlMnOp")
    assert main(["train", str(config)]) == 1
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert "ZeroDivisionError: token ***" in shown
    assert "hf_AbC" not in shown
    assert "fault of eightgig" in shown


def test_findings_of_an_error_show_brackets_and_long_paths_as_they_are(
    config: Path, training: FakeTraining, capsys: pytest.CaptureFixture[str]
) -> None:
    path = "[red]/a/" + "long/" * 60 + "data.jsonl"
    findings = [
        Finding(severity="error", code="d", message=f"m{i}", why="w", fix="f", file=path, line=i)
        for i in (1, 2)
    ]
    training.end = DataError("[bold]", why="w", fix="f", findings=findings)
    assert main(["train", str(config)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: [bold]"
    assert lines[1] == f"  {path}:1: m1 f"


def test_init_writes_a_config_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("", encoding="utf-8")
    output = tmp_path / "new" / "config.yaml"
    assert (
        main(["init", "--model", "some/model", "--data", "rows.jsonl", "--output", str(output)])
        == 0
    )
    assert f"Wrote {output}" in capsys.readouterr().out
    config = read_config(output)
    assert config.model.name == "some/model"
    assert isinstance(config.data.path, str)
    assert Path(config.data.path).resolve() == tmp_path / "rows.jsonl"


def test_init_keeps_a_folder_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert main(["init", "--model", "models/mine"]) == 0
    config = read_config(tmp_path / "config.yaml")
    assert Path(config.model.name).resolve() == tmp_path / "models" / "mine"
    assert config.data.path == str(tmp_path / "data.jsonl")


def test_init_never_writes_over_a_file(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--output", str(config)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert config.read_text(encoding="utf-8") == CONFIG


def test_init_as_json_names_the_file_and_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["config"] == "config.yaml"
    assert shown["machine"]["host_total_bytes"] > 0
    assert (tmp_path / "config.yaml").is_file()


def test_work_is_shown_now_and_then_and_when_it_is_done(
    config: Path, training: FakeTraining, capsys: pytest.CaptureFixture[str]
) -> None:
    training.work = [
        StoreProgress(model="some/model", done_bytes=done << 30, total_bytes=8 << 30)
        for done in range(9)
    ]
    assert main(["train", str(config)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "preparing" in line]
    assert len(lines) == 1
    assert lines[0].startswith("preparing some/model: 8.00 GiB of 8.00 GiB")


def test_a_terminal_gets_one_live_line(config: Path) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120, color_system=None)
    with TrainingView(read_config(config), as_json=False, console=console) as view:
        view.notice(StoreProgress(model="some/model", done_bytes=1 << 30, total_bytes=8 << 30))
        view.step(_report(1))
        view.notice(Event(step=1, kind="save", values={"path": "step-1", "size_bytes": 5 << 20}))
        view.step(_report(2))
    shown = text.getvalue()
    assert "step 1  save  path step-1, size 5.0 MiB" in shown
    assert "step 2/2  epoch 3.00  loss 1.0000" in shown


def test_the_view_of_a_training_loads_no_torch() -> None:
    """The allocator is set up in `finetune`, before torch is imported."""
    code = "import sys, eightgig.cli.progress; sys.exit('torch' if 'torch' in sys.modules else 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_event_shows_what_is_known_and_so(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"measured_peak_bytes": None, "is_peak_too_low": False, "is_speed_off": True}
    with TrainingView(read_config(config), as_json=False) as view:
        view.notice(Event(step=6, kind="plan", values={"speed_ratio": 0.5, **values}))
    assert "step 6  plan  speed ratio 0.5, speed off\n" in capsys.readouterr().out


def test_what_has_no_picture_is_a_fault(config: Path) -> None:
    with TrainingView(read_config(config), as_json=True) as view, pytest.raises(TypeError):
        view.notice(object())


def test_a_plan_for_a_known_model_needs_neither_weights_nor_network(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["plan", "--model", "google/gemma-4-12B-it", "--vram", "8GiB", "--max-tokens", "2048"]
    assert main(asked) == 0
    shown = capsys.readouterr().out
    assert "It fits: " in shown
    assert "layer_slots" in shown
    assert main([*asked, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"]
    assert sum(plan["breakdown"].values()) == plan["peak_bytes"] <= plan["budget_bytes"]
    assert plan["max_length"] == 2048


def test_planning_does_not_load_torch() -> None:
    code = (
        "import sys; from eightgig.cli.app import main\n"
        "assert main(['plan', '--model', 'google/gemma-4-E2B', '--vram', '8GiB']) == 0\n"
        "sys.exit('torch is loaded' if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_plan_that_does_not_fit_is_shown_and_ends_with_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["plan", "--model", "google/gemma-4-31B", "--vram", "2GiB", "--max-tokens", "65536"]
    assert main(asked) == 2
    shown = capsys.readouterr()
    assert "It does not fit: " in shown.out
    assert shown.err == ""


def test_a_plan_takes_the_settings_of_a_config(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--set", "model.name=google/gemma-4-E2B-it", "--set", "data.max_length=512"]
    assert main(["plan", str(config), *model, "--vram", "RTX 4060", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["max_length"] == 512


def test_a_sweep_is_one_line_for_each_value(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "--model", "google/gemma-4-E2B", "--vram", "8GiB"]
    assert main([*asked, "--sweep", "max_length=512,1024"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines() if "yes" in line] == [
        ["512", "yes"],
        ["1024", "yes"],
    ]
    assert main([*asked, "--sweep", "max_length=512", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["points"][0]["plan"]["max_length"] == 512
    for broken in ("max_length", "max_length=", "=1", "nothing=1"):
        assert main([*asked, "--sweep", broken]) == 2


def test_a_plan_can_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plan.svg"
    asked = ["plan", "--model", "google/gemma-4-E2B", "--vram", "8GiB", "--picture", str(picture)]
    assert main(asked) == 0
    assert picture.read_text(encoding="utf-8").startswith("<svg")
    assert "It fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "There is nothing to plan for."),
        (["plan", "--model", "./nowhere"], "There is no model folder"),
        (["plan", "--model", "google/gemma-4-E2B", "--vram", "lots"], "lots"),
        (["plan", "--model", "google/gemma-4-E2B", "--max-tokens", "0"], "max_length"),
    ],
)
def test_what_cannot_be_planned_gives_three_lines(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[0]
    assert [line[:4] for line in lines] == ["erro", "why:", "fix:"]
