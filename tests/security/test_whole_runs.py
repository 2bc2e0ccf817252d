"""Train, resume, evaluate, chat and export under an audit hook, with tokens in the environment."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny_run
from tests.faults.server import Server
from tests.security.watch import SECRET

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

# Settings and the adapter say where things lie on this machine, since they are found again there.
_HOLDS_PATHS = {"config.yaml", "manifest.json", "adapter_config.json"}
_PICKLE = re.compile(rb"\x80[\x02-\x05]\x95.{3}\x00{5}|^\x80[\x02-\x05]|\.pkl|cposix\nsystem", re.S)


class _Work:
    """A home folder with a model, data and a run, and what was seen of each command."""

    def __init__(self, server: Server, home: Path, outside: Path) -> None:
        self.home, self.notes = home, home.parent / "notes.txt"
        self.outputs: list[str] = []
        places = [str(home.resolve()), "/tmp/tmp", "/tmp/torchinductor"]
        self._plant = ["watched", places, [str(outside)], str(home), str(self.notes)]
        self._server = server

    def do(self, *words: str) -> None:
        """A command that must end well."""
        code, text = self._server.run(words, plant=self._plant, cwd=self.home)
        self.outputs.append(text)
        assert code == 0, text

    @property
    def run(self) -> Path:
        return self.home / "runs" / "first"

    @property
    def files(self) -> list[Path]:
        """Everything that was written."""
        given = {self.home / "data.jsonl", self.home / "config.yaml"}
        return [
            path
            for path in sorted(self.home.rglob("*"))
            if path.is_file() and path not in given and self.home / "model" not in path.parents
        ]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Work]:
    folder = tmp_path_factory.mktemp("work")
    home = folder / "homeofcanary"
    home.mkdir()
    (folder / "secret.txt").write_text(SECRET)
    tiny_run.make_tame_model("llama", home / "model")
    tiny_run.write_config(home, tiny_run.colour_rows(30), [])
    with Server(folder) as server:
        work = _Work(server, home, folder / "secret.txt")
        work.do("train", "config.yaml", "--set", "train.max_steps=4", "--set", "run.save_steps=2")
        shutil.rmtree(work.run / "checkpoints" / "step-000004")
        shutil.rmtree(work.run / "adapter")
        words = ("--set", "train.max_steps=4", "--set", "run.save_steps=2")
        work.do("train", "config.yaml", "--resume", *words)
        work.do("eval", "runs/first", "--max-answers", "4")
        work.do("chat", "runs/first", "--prompt", "which colour has grass?", "--max-tokens", "4")
        for kind in ("merged", "adapter", "gguf"):
            work.do("export", "runs/first", "--to", kind, "--no-verify")
        yield work


def test_nothing_was_unpickled_run_or_written_elsewhere(work: _Work) -> None:
    seen = work.notes.read_text().splitlines() if work.notes.exists() else []
    assert seen == []


def test_no_file_that_is_written_holds_a_pickle(work: _Work) -> None:
    files = work.files
    assert len(files) > 30
    suffixes = {path.suffix for path in files}
    assert not suffixes & {".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib", ".npz"}
    for path in files:
        content = path.read_bytes()
        assert _PICKLE.search(content) is None, path
        assert not content.startswith(b"PK\x03\x04"), path


def test_the_token_is_in_no_file_and_on_no_screen(work: _Work) -> None:
    assert not any(SECRET in text for text in work.outputs)
    assert [path for path in work.files if SECRET.encode() in path.read_bytes()] == []


def test_the_home_folder_is_in_no_log_report_or_card(work: _Work) -> None:
    telling = [
        str(path.relative_to(work.home))
        for path in work.files
        if path.name not in _HOLDS_PATHS and b"homeofcanary" in path.read_bytes()
    ]
    assert " ".join(name for name in telling if not name.startswith("cache/")) == ""


def test_a_pickle_is_noticed(tmp_path: Path) -> None:
    """What these tests look for is what a pickle looks like."""
    import pickle

    import torch

    for protocol in range(2, 6):
        assert _PICKLE.search(pickle.dumps({"a": [1.5] * 99}, protocol=protocol))
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes().startswith(b"PK\x03\x04")
