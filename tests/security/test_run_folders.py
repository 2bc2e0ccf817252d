"""Hostile run folders: nothing is written or read through a link in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from eightgig.config import Config, read_config
from eightgig.errors import ExportError, RunError
from eightgig.evaluation.tuned_run import find_run
from eightgig.export.folder import small_files
from eightgig.run import Run, check_run, create_run, write_atomically, write_json
from eightgig.training.lock import LOCK_NAME, lock_run
from tests.security.watch import SECRET

LINKED = (
    "config.yaml", "config.yaml.tmp", "plan.json", "plan.json.tmp", "environment.json",
    "metrics.jsonl", "metrics.jsonl.tmp", "events.jsonl", "log.txt", LOCK_NAME, "heartbeat.json",
    "heartbeat.tmp", "adapter", "adapter.tmp", "adapter.old", "checkpoints", "report.html",
    "report.html.tmp", "evaluation.json", "data.json", "tensorboard", "checkpoints/x.tmp",
    "checkpoints/latest",
)  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Config:
    words = ["model.name=demo", f"data.path={tmp_path / 'x.jsonl'}", "run.name=first"]
    return read_config(None, [*words, f"run.output_dir={tmp_path / 'runs'}"])


@pytest.fixture
def run(config: Config) -> Run:
    run = create_run(config, resume=False)
    (run.folder / "checkpoints").mkdir()
    run.adapter_path.mkdir()
    (run.adapter_path / "adapter_config.json").write_text("{}")
    return run


@pytest.mark.parametrize("name", LINKED)
@pytest.mark.parametrize("is_folder", [False, True])
def test_a_link_is_refused_before_anything_is_read_or_written(
    name: str, is_folder: bool, run: Run, config: Config, outside: Path
) -> None:
    path = run.folder / name
    if path.is_dir():
        for inner in path.iterdir():
            inner.unlink()
        path.rmdir()
    path.unlink(missing_ok=True)
    path.symlink_to(outside.parent if is_folder else outside)
    with pytest.raises(RunError, match="is a link"):
        create_run(config, resume=True)
    with pytest.raises(RunError):
        find_run(run.folder)
    assert [file.name for file in outside.parent.iterdir()] == ["secret.txt"]


def test_a_run_folder_that_is_itself_a_link_is_the_users(
    run: Run, config: Config, tmp_path: Path
) -> None:
    run.folder.rename(tmp_path / "other-disk")
    run.folder.symlink_to(tmp_path / "other-disk")
    assert check_run(config, resume=True) == run


@pytest.mark.parametrize("write", [write_atomically, write_json])
def test_writing_does_not_follow_a_link_that_came_later(
    write: object, tmp_path: Path, outside: Path
) -> None:
    for name in ("plan.json", "plan.json.tmp"):
        path = tmp_path / "plan.json"
        (tmp_path / name).symlink_to(outside)
        write(path, "new")  # type: ignore[operator]
        assert not path.is_symlink()
        path.unlink()
    assert outside.stat().st_size == len(SECRET) + 1


@pytest.mark.parametrize(
    "held",
    ["", "[" * 1000, "{}", '{"pid": "x"}', '{"pid": 1e400, "host": 1}',
     json.dumps({"pid": 7, "host": "\x1b]52;c;evil\x07\n" * 99})],
)  # fmt: skip
def test_what_a_lock_says_is_shown_without_harm(held: str, run: Run) -> None:
    fcntl = pytest.importorskip("fcntl", reason="Windows locks otherwise")
    path = run.folder / LOCK_NAME
    path.write_text(held)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="in use by") as caught, lock_run(run):
            pass
    assert "\x1b" not in caught.value.message
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize(
    "name", ["LICENSE", "NOTICE.txt", "tokenizer.extra", "chat_template_2.jinja", "config.json"]
)
def test_a_linked_file_is_not_copied_into_an_export(
    name: str, base_model: Path, tmp_path: Path, outside: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base_model, folder)
    assert small_files(folder)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    with pytest.raises(ExportError, match="is a link"):
        small_files(folder)
