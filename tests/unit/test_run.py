"""The run folder, its log and its environment."""

import json
import logging
from pathlib import Path

import pytest

import eightgig
from eightgig.config import Config, DataConfig, ModelConfig, RunConfig, read_config
from eightgig.errors import RunError
from eightgig.run import (
    Run,
    append_json_line,
    check_run,
    create_run,
    describe_environment,
    folder,
    from_json,
    log_to,
    mask_secrets,
    to_json,
    write_atomically,
    write_json,
)
from eightgig.run.environment import Environment


def _config(folder: Path, name: str = "first") -> Config:
    return Config(
        model=ModelConfig(name="some/model"),
        data=DataConfig(path="/data.jsonl"),
        run=RunConfig(name=name, output_dir=str(folder / "runs")),
    )


def test_a_run_begins_with_a_copy_of_its_settings(tmp_path: Path) -> None:
    config = _config(tmp_path)
    run = create_run(config, resume=False)
    assert run.folder == tmp_path / "runs" / "first"
    assert read_config(run.config_path) == config


def test_a_run_folder_is_never_taken_twice(tmp_path: Path) -> None:
    run = create_run(_config(tmp_path), resume=False)
    run.metrics_path.write_text("kept", encoding="utf-8")
    with pytest.raises(RunError, match="exists already") as caught:
        create_run(_config(tmp_path), resume=False)
    assert caught.value.exit_code == 2
    assert "--resume" in caught.value.fix
    assert "run.name=first-2" in caught.value.fix
    assert run.metrics_path.read_text(encoding="utf-8") == "kept"


def test_resuming_keeps_the_settings_the_run_began_with(tmp_path: Path) -> None:
    run = create_run(_config(tmp_path), resume=False)
    before = run.config_path.read_bytes()
    again = create_run(
        Config(
            model=ModelConfig(name="other/model"),
            data=DataConfig(path="/data.jsonl"),
            run=RunConfig(name="first", output_dir=str(tmp_path / "runs")),
        ),
        resume=True,
    )
    assert again == run
    assert run.config_path.read_bytes() == before


def test_resuming_before_anything_was_written_begins_anew(tmp_path: Path) -> None:
    run = create_run(_config(tmp_path), resume=True)
    assert run.config_path.is_file()


def test_resuming_completes_a_folder_without_settings(tmp_path: Path) -> None:
    (tmp_path / "runs" / "first").mkdir(parents=True)
    assert create_run(_config(tmp_path), resume=True).config_path.is_file()


@pytest.mark.parametrize("error", [FileNotFoundError(), FileExistsError()])
def test_two_that_resume_a_new_run_at_once_do_not_trip_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def meets_a_rival(*_: object) -> None:
        raise error

    monkeypatch.setattr(folder, "write_atomically", meets_a_rival)
    assert create_run(_config(tmp_path), resume=True).folder.is_dir()
    with pytest.raises(RunError):
        create_run(_config(tmp_path, "second"), resume=False)


@pytest.mark.parametrize("name", ["", "..", "../../etc", "a/b", "a\\b", "C:"])
def test_a_run_name_cannot_leave_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunError, match="cannot be the name of a run"):
        create_run(_config(tmp_path, name), resume=True)
    assert not (tmp_path / "runs").exists()


def test_a_file_in_the_place_of_the_folder_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "first").write_text("mine", encoding="utf-8")
    for resume in (False, True):
        with pytest.raises(RunError, match="there is a file of that name"):
            create_run(_config(tmp_path), resume=resume)


def test_a_run_can_be_checked_before_anything_is_made(tmp_path: Path) -> None:
    run = check_run(_config(tmp_path), resume=False)
    assert not run.folder.parent.exists()
    create_run(_config(tmp_path), resume=False)
    with pytest.raises(RunError, match="exists already"):
        check_run(_config(tmp_path), resume=False)
    assert check_run(_config(tmp_path), resume=True) == run


def test_a_link_that_leads_nowhere_is_no_free_name(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "first").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RunError):
        create_run(_config(tmp_path), resume=False)


def test_an_output_folder_that_cannot_be_made_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file", encoding="utf-8")
    with pytest.raises(RunError) as caught:
        create_run(_config(tmp_path), resume=False)
    assert "run.output_dir" in caught.value.fix


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "plan.json"
    write_atomically(path, "one")
    with pytest.raises(TypeError):
        write_json(path, {"not json": object()})
    assert path.read_text(encoding="utf-8") == "one"
    assert [item.name for item in path.parent.iterdir()] == ["plan.json"]


def test_lines_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_json_line(path, {"step": 1, "text": "ö\n"})
    append_json_line(path, {"step": 2})
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_the_environment_names_versions_and_nobody() -> None:
    environment = describe_environment(device="NVIDIA GeForce RTX 4060")
    assert environment.eightgig == eightgig.__version__
    assert environment.device == "NVIDIA GeForce RTX 4060"
    assert environment.versions["torch"].startswith("2.")
    assert from_json(Environment, json.loads(json.dumps(to_json(environment)))) == environment


SECRETS = [
    "hf_AbCdEfGhIjKlMnOpQrStUvWxYz",
    "ghp_0123456789abcdefghij",
    "sk-proj-0123456789abcdef",
    "opensesame",
]


@pytest.mark.parametrize(
    "line",
    [
        "token hf_AbCdEfGhIjKlMnOpQrStUvWxYz was used",
        "https://me:opensesame@huggingface.co/x",
        "https://opensesame@huggingface.co/x",
        "Authorization: Bearer opensesame",
        "{'hf_token': 'opensesame'}",
        '{"HF_TOKEN": "opensesame"}',
        "HUGGING_FACE_HUB_TOKEN=opensesame",
        "WANDB_API_KEY=opensesame",
        "password = opensesame",
        "https://cdn.host/file?Expires=1&Signature=opensesame&Key-Pair-Id=K",
        "https://cdn.host/file?X-Amz-Credential=opensesame&x=1",
        "git clone with ghp_0123456789abcdefghij",
        "sk-proj-0123456789abcdef",
    ],
)
def test_secrets_are_masked(line: str) -> None:
    masked = mask_secrets(line)
    assert "***" in masked
    assert not any(secret in masked for secret in SECRETS)


@pytest.mark.parametrize(
    "line",
    [
        "step 120, loss_tokens=5120, tokens: 8192",
        "pad_token: <pad>, eos_token=<turn|>",
        "https://huggingface.co/google/gemma-4-12B-it?library=transformers",
        "key k_proj, key: value",
        "the password is not in this line",
        "mail me@example.org",
    ],
)
def test_usual_lines_are_left_alone(line: str) -> None:
    assert mask_secrets(line) == line


def test_the_home_folder_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/somebody"))
    assert mask_secrets("reading /home/somebody/data.jsonl") == "reading ~/data.jsonl"


def test_the_log_holds_messages_and_tracebacks_without_secrets(tmp_path: Path) -> None:
    run = Run(folder=tmp_path)
    logger = logging.getLogger("eightgig.somewhere")
    with log_to(run):
        logger.info("fetching with %s", SECRETS[0])
        try:
            raise ValueError(SECRETS[1])
        except ValueError:
            logger.exception("it failed")
        logger.debug("not in the log")
    logger.info("after the run")
    text = run.log_path.read_text(encoding="utf-8")
    assert "INFO eightgig.somewhere: fetching with ***" in text
    assert "ValueError: ***" in text
    assert not any(secret in text for secret in SECRETS)
    assert "not in the log" not in text
    assert "after the run" not in text


def test_the_log_says_why_a_run_ended_early(tmp_path: Path) -> None:
    run = Run(folder=tmp_path)
    with pytest.raises(RunError), log_to(run):
        raise RunError("The disk is full.", why="A checkpoint is written.", fix="Free space.")
    with pytest.raises(ZeroDivisionError), log_to(run):
        raise ZeroDivisionError
    first, second, *rest = run.log_path.read_text(encoding="utf-8").splitlines()
    assert first.endswith("eightgig: The disk is full. A checkpoint is written. Free space.")
    assert second.endswith("ERROR eightgig: The run ended early.")
    assert rest[-1] == "ZeroDivisionError"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_log_on_a_full_disk_disturbs_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(folder=tmp_path)
    run.log_path.symlink_to("/dev/full")
    with pytest.raises(RunError, match="taken"), log_to(run):
        logging.getLogger("eightgig.somewhere").info("step 1")
        raise RunError("taken", why="", fix="")
    assert capsys.readouterr().err == ""


def test_a_log_that_cannot_be_made_is_said_so(tmp_path: Path) -> None:
    run = Run(folder=tmp_path)
    run.log_path.mkdir()
    with pytest.raises(RunError, match="cannot be written: Is a directory"), log_to(run):
        pass


@pytest.mark.parametrize("end", [KeyboardInterrupt, GeneratorExit])
def test_stopping_by_hand_is_no_error_in_the_log(tmp_path: Path, end: type[BaseException]) -> None:
    run = Run(folder=tmp_path)
    with pytest.raises(end), log_to(run):
        raise end
    assert run.log_path.read_text(encoding="utf-8") == ""
