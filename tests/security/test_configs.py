"""Hostile configs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eightgig.config import read_config
from eightgig.errors import ConfigError, EightgigError
from eightgig.run import check_run

GOOD = "model: {name: demo}\ndata: {path: rows.jsonl}\n"

YAML: dict[str, str] = {
    "a tag that runs": "run: {name: !!python/object/apply:os.mkdir [PWNED]}\n",
    "a tag that makes": "run: {name: !!python/object/new:os.mkdir {args: [PWNED]}}\n",
    "a tag that imports": "run: {name: !!python/module:antigravity ''}\n",
    "a tag that names": "run: {name: !!python/name:os.system ''}\n",
    "a tag at the root": "!!python/object/apply:os.mkdir [PWNED]\n",
    "a tag on a key": "? !!python/object/apply:os.mkdir [PWNED]\n: x\n",
    "a tag of one's own": "run: {name: !evil x}\n",
    "a directive": "%TAG ! tag:yaml.org,2002:python/\n---\nrun: !object/apply:os.mkdir [P]\n",
    "aliases": "run: &a {name: x}\ntrain: *a\n",
    "an alias of itself": "run: &a {name: *a}\n",
    "aliases in aliases": "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\n",
    "a merge": "run: {<<: {name: x}}\n",
    "deeply nested": "[" * 10_000,
    "deeply nested groups": "{a: " * 10_000,
    "two documents": GOOD + "---\n" + GOOD,
    "a list": "- model\n",
    "a large file": "# " + "x" * 300_000,
    "a null character": "run: {name: 'a\0b'}\n",
    "an escape character": "run: {name: 'a\x1b[2Jb'}\n",
    "environment": "env: {LD_PRELOAD: /tmp/evil.so}\n",
    "environment of a run": "run: {env: {LD_PRELOAD: /tmp/evil.so}}\n",
    "trust": "model: {name: demo, trust_remote_code: true}\n",
    "a command": "run: {before: 'touch PWNED'}\n",
    "attention code": "model: {name: demo, attn_implementation: evil/kernels}\n",
    "a number of a million digits": "train: {learning_rate: " + "9" * 100_000 + "}\n",
    "a base 60 number": "train: {learning_rate: 190:20:30}\n",
    "infinity": "train: {learning_rate: .inf}\n",
    "no number": "train: {learning_rate: .nan}\n",
    "a date": "run: {name: 2001-01-01}\n",
    "a set": "run: {name: !!set {a, b}}\n",
    "a binary": "run: {name: !!binary aGVsbG8=}\n",
}


@pytest.mark.parametrize("text", YAML.values(), ids=YAML)
def test_hostile_yaml_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError):
        read_config(path)


@pytest.mark.parametrize(
    "text",
    [
        "run.name=!!python/object/apply:os.mkdir [PWNED]",
        "run.name=&a [*a]",
        "data.path=" + "[" * 5_000,
        "__class__.__init__=1",
        "run.__class__=x",
        "run=x",
        "=x",
        "run.name",
        "train.seed=" + "9" * 50_000,
    ],
)
def test_hostile_overrides_are_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(GOOD, encoding="utf-8")
    with pytest.raises(ConfigError):
        read_config(path, [text])


NAMES = (
    "../evil", "..", ".", "a/../../b", "/etc/cron.d/evil", "a\\..\\b", "C:\\evil", "C:evil", "~",
    "~root", "a\nb", "a\x1b[2J", "a\x7f", "a\u202eb", "a\u200bb", "-rf", "--help", "con", "NUL.txt",
    "com1", "a.", "a ", " a", ".hidden", "$(id)", "`id`", "a;id", "a|b", "a&b", "a*", "a?", "a:b",
    "a<b>", 'a"b', "a'b", "x" * 300, "", "%2e%2e%2f", "file:///etc",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_run_cannot_be_named_so(name: str, tmp_path: Path) -> None:
    words = ["model.name=demo", "data.path=x.jsonl", f"run.output_dir={tmp_path / 'runs'}"]
    with pytest.raises(EightgigError):
        config = read_config(None, [*words, f"run.name={json.dumps(name)}"])
        check_run(config, resume=False)
    assert not (tmp_path / "runs").exists()
