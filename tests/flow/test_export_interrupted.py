"""Ctrl-C in the middle of an export: exit code 130, nothing half-written, the next one works.

A real SIGINT arrives behind one chosen operation on the disk after another, so that every moment
of writing and publishing has its turn; and while the models are asked.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from eightgig.cli.app import main
from eightgig.disk import Disk
from eightgig.export import candidates, forms, reference, verify
from eightgig.export.folder import RECORD_NAME
from eightgig.run import Run
from tests.runs import train_tiny

# Not `create`: a file that nobody holds yet is closed with a warning, as everywhere in Python.
_OPERATIONS = (
    "write", "flush", "close", "make_folder", "rename", "flush_folder", "remove_file",
    "remove_folder",
)  # fmt: skip
KINDS = {"merged": ["--to", "merged"], "gguf": ["--to", "gguf", "--type", "q8_0"]}


@pytest.fixture(autouse=True)
def _listening() -> Iterator[None]:
    """Take SIGINT, which a process that was started in the background ignores."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_tiny(tmp_path_factory.mktemp("trained"), "llama", dtype="bfloat16")


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    shutil.copytree(trained.folder, tmp_path / "first")
    return Run(folder=tmp_path / "first")


class Interrupting:
    """Sends this process a SIGINT behind the operation of a number; counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.at: int | None = None
        for name in _OPERATIONS:
            monkeypatch.setattr(Disk, name, self._counted(getattr(Disk, name)))

    def start(self, at: int | None) -> None:
        """Count anew, and interrupt behind the operation number `at`."""
        self.count, self.at = 0, at

    def _counted(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            result = operation(*arguments)
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGINT)
            return result

        return counted


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Interrupting:
    return Interrupting(monkeypatch)


def export(run: Run, kind: str, *more: str) -> int:
    return main(["export", str(run.folder), *KINDS[kind], *more])


def entries(run: Run) -> list[Path]:
    folder = run.folder / "export"
    return sorted(folder.iterdir()) if folder.is_dir() else []


def check_whole(folder: Path) -> None:
    """Every file of an export is there with the size and hash that its record says."""
    files = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))["files"]
    assert {path.name for path in folder.iterdir()} == {*files, RECORD_NAME}
    for name, digest in files.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest["sha256"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_first_export_leaves_nothing(
    run: Run, kind: str, disk: Interrupting
) -> None:
    assert export(run, kind, "--no-verify") == 0
    (folder,) = entries(run)
    total = disk.count
    for at in range(1, total):
        shutil.rmtree(run.folder / "export")
        disk.start(at)
        assert export(run, kind, "--no-verify") == 130, at
        for whole in entries(run):  # it had appeared already
            assert whole == folder
            check_whole(whole)
    disk.start(None)
    assert export(run, kind, "--no-verify") == 0
    check_whole(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_later_export_leaves_the_earlier_one_or_the_new_one(
    run: Run, kind: str, disk: Interrupting
) -> None:
    assert export(run, kind, "--no-verify") == 0
    assert export(run, kind, "--no-verify") == 0
    (folder,) = entries(run)
    at = 1
    while True:
        disk.start(at)
        code = export(run, kind, "--no-verify")
        assert folder in entries(run), at
        check_whole(folder)
        if code == 0:
            break
        assert code == 130
        at += 1
    assert at > 10
    assert entries(run) == [folder]


@pytest.mark.parametrize(
    ("kind", "module", "name"),
    [
        ("merged", reference, "generate"),
        ("merged", forms, "write_merged"),
        ("merged", verify, "score_by_transformers"),
        ("gguf", reference, "generate"),
        ("gguf", forms, "check_gguf"),
        ("gguf", verify, "LlamaCpp"),
    ],
)
def test_an_export_interrupted_while_models_are_asked_leaves_nothing(
    run: Run, kind: str, module: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the signal has not arrived")

    monkeypatch.setattr(verify, "has_llama_cpp", lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupt)
        assert export(run, kind) == 130
    assert entries(run) == []
    monkeypatch.setattr(verify, "has_llama_cpp", candidates.has_llama_cpp)
    assert export(run, kind) == 0
    (folder,) = entries(run)
    check_whole(folder)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_other_signals_leave_as_little_as_ctrl_c(
    run: Run, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = getattr(signal, name, None)
    if number is None:
        pytest.skip(f"this system has no {name}")
    before = signal.signal(number, lambda *_: pytest.fail("the export takes no notice of it"))

    def end(*_: Any, **__: Any) -> None:
        assert [path.name for path in entries(run)] == ["merged.tmp"]
        os.kill(os.getpid(), number)

    try:
        monkeypatch.setattr(verify, "score_by_transformers", end)
        assert export(run, "merged") == 130
    finally:
        signal.signal(number, before)
    assert entries(run) == []


def test_what_a_killed_export_left_is_deleted_before_room_is_looked_for(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = run.folder / "export" / "merged.tmp"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    monkeypatch.setattr(Disk, "free_bytes", lambda *_: 0 if left.exists() else 1 << 40)
    assert export(run, "merged", "--no-verify") == 0
    assert [path.name for path in entries(run)] == ["merged"]


def test_what_a_killed_export_of_another_form_left_is_named(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    left = run.folder / "export" / "gguf-q8_0.tmp"
    left.mkdir(parents=True)
    assert export(run, "merged", "--no-verify") == 0
    assert (
        f"note: {left}: Another export is writing this, or was killed." in capsys.readouterr().err
    )
    assert left.exists(), "it may be written at this moment"


# Python itself does not wait for a child process that it has killed after Ctrl-C.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_llama_quantize_is_ended_with_the_export(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    program = tmp_path / "bin" / "llama-quantize"
    program.parent.mkdir()
    program.write_text(
        f"#!/bin/sh\ntouch {marks}/$$\nkill -INT {os.getpid()}\nexec sleep 60\n", encoding="utf-8"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    arguments = ["export", str(run.folder), "--to", "gguf", "--type", "q4_k_m", "--no-verify"]
    assert main(arguments) == 130
    assert entries(run) == []
    (process,) = marks.iterdir()
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(process.name)).wait(timeout=10)
