"""The allocator's settings stand before torch is loaded, whatever command loads it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eightgig.hardware.allocator import VARIABLE

# Stops the import of torch, and tells what the environment was then.
WATCH = """
import importlib.abc, json, os, sys

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("seen:" + json.dumps(os.environ.get("PYTORCH_ALLOC_CONF")), flush=True)
            os._exit(7)

sys.meta_path.insert(0, Watch())
"""
COMMANDS = {
    "train": ["train", "config.yaml"],
    "demo": ["demo"],
    "eval": ["eval", "run"],
    "eval with a null adapter": ["eval", "run", "--null"],
    "chat": ["chat", "run"],
    "export": ["export", "run", "--to", "merged"],
}


def _conf_when_torch_loads(code: str, folder: Path, **environment: str) -> str | None:
    """Value of the variable when torch is first asked for."""
    kept = {name: text for name, text in os.environ.items() if "ALLOC_CONF" not in name}
    done = subprocess.run(
        [sys.executable, "-c", WATCH + code],
        cwd=folder,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        input='{"name": "x", "settings": [], "stores": "x"}',
        check=False,
    )
    assert done.returncode == 7, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("seen:")]
    value: str | None = json.loads(line.removeprefix("seen:"))
    return value


def _command(name: str) -> str:
    return f"from eightgig.cli.app import main\nmain({COMMANDS[name]!r})"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = "model:\n  name: demo\ndata:\n  path: rows.jsonl\n"
    (tmp_path / "config.yaml").write_text(config, encoding="utf-8")
    row = {"prompt": "a", "completion": "b"}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 40, encoding="utf-8")
    return tmp_path


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no expandable segments")
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_sets_up_the_allocator_before_torch(name: str, folder: Path) -> None:
    assert _conf_when_torch_loads(_command(name), folder) == "expandable_segments:True"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no expandable segments")
def test_timed_cases_set_it_up_too(folder: Path) -> None:
    code = (
        "import runpy\n"
        "sys.argv = ['bench', 'time', 'answer.json']\n"
        "runpy.run_module('eightgig.training.bench', run_name='__main__')"
    )
    assert _conf_when_torch_loads(code, folder) == "expandable_segments:True"


def test_what_the_user_has_set_stays(folder: Path) -> None:
    own = "max_split_size_mb:64"
    assert _conf_when_torch_loads(_command("chat"), folder, **{VARIABLE: own}) == own
    # The old name alone: no second setting beside it.
    assert _conf_when_torch_loads(_command("chat"), folder, PYTORCH_CUDA_ALLOC_CONF=own) is None
