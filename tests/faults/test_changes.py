"""A run that is resumed with anything changed: refused, and the difference named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from eightgig.config import setting_groups
from tests.faults.tally import Tally
from tests.faults.trials import Bench, Trial

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

CHANGED = "run resumed with a setting, data, template, tokenizer, model or library changed"
UNCHANGED = "run resumed with settings changed that decide no number"

DECIDING = {
    "model.quantization": "none",
    "data.split": "other",
    "data.format": "messages",
    "data.columns": "{messages: messages}",
    "data.chat_template": "MODEL",
    "data.train_on": "all",
    "data.max_length": "100",
    "data.too_long": "drop",
    "data.packing": "false",
    "data.held_out": "5",
    "data.group_column": "messages",
    "lora.r": "8",
    "lora.lora_alpha": "16",
    "lora.lora_dropout": "0.2",
    "lora.target_modules": "[q_proj, k_proj]",
    "lora.use_rslora": "true",
    "lora.init_adapter": "ADAPTER",
    "train.num_train_epochs": "7",
    "train.max_steps": "20",
    "train.per_device_train_batch_size": "3",
    "train.gradient_accumulation_steps": "2",
    "train.learning_rate": "0.01",
    "train.lr_scheduler_type": "cosine",
    "train.warmup_ratio": "0.5",
    "train.warmup_steps": "3",
    "train.optim": "adamw_8bit",
    "train.weight_decay": "0.1",
    "train.adam_beta1": "0.8",
    "train.adam_beta2": "0.99",
    "train.adam_epsilon": "1e-6",
    "train.max_grad_norm": "0.5",
    "train.seed": "43",
    "train.early_stopping_patience": "2",
}
FREE = {
    "model.cache_dir": "other-cache",
    "train.trial": "true",
    "memory.host_budget": "4GiB",
    "memory.micro_batch_tokens": "64",
    "memory.kernels": "plain",
    "run.save_steps": "4",
    "run.save_minutes": "1",
    "run.save_epochs": "false",
    "run.save_total_limit": "5",
    "run.eval_steps": "5",
    "run.pause_above_celsius": "0",
}
_SOME = ("train.learning_rate", "lora.r", "train.seed")
# Judged by what lies there, or cannot be tried on this machine.
_ELSEWHERE = {
    "model.name", "model.revision", "model.delete_download", "data.path", "data.held_out_path",
    "memory.device", "memory.budget", "memory.layer_slots", "memory.micro_batches_per_visit",
    "memory.mlp_tile_tokens", "memory.checkpoints", "memory.offload", "memory.host_weights",
    "run.name", "run.output_dir", "run.report_to",
}  # fmt: skip
# With these the config itself is refused: they need another setting, or make one of no effect.
_REFUSED_BEFORE = {"data.split", "data.columns", "train.num_train_epochs"}


def _slow(names: Iterator[str] | list[str], some: tuple[str, ...]) -> list[Any]:
    return [pytest.param(n, marks=() if n in some else pytest.mark.slow) for n in names]


def _stopped(bench: Bench) -> Trial:
    """A copy of a run that was killed after two checkpoints."""
    prepared = getattr(bench, "stopped", None)
    if prepared is None:
        prepared = bench.stopped = bench.stopped_trial()  # type: ignore[attr-defined]
    trial = bench.trial()
    shutil.copytree(prepared.folder, trial.folder)
    return trial


def _refuses(trial: Trial, words: list[str], named: str, *, plant: list[object]) -> list[str]:
    """What is wrong with how a changed run is refused."""
    before = _contents(trial)
    code, text = trial.run(*words, plant=plant)
    problems = [] if code == 2 else [f"exit code {code}: {text[-1500:]}"]
    if named not in text:
        problems.append(f"{named!r} was not said: {text[-1500:]}")
    if _contents(trial) != before:
        problems.append("the run folder is another now")
    return problems


def _contents(trial: Trial) -> dict[str, bytes]:
    files = [path for path in trial.folder.rglob("*") if path.is_file()]
    # What every process writes that looks at a run: who holds it, and what it said.
    own = {"lock", "log.txt", "plan.json", "environment.json", "heartbeat.json"}
    return {str(path): path.read_bytes() for path in files if path.name not in own}


def test_every_setting_is_tried_or_said_to_be_free() -> None:
    known = {f"{group}.{name}" for group, names in setting_groups().items() for name in names}
    assert set(DECIDING) | set(FREE) | _ELSEWHERE == known


@pytest.mark.parametrize("setting", _slow(list(DECIDING), _SOME))
def test_a_changed_setting_is_refused(setting: str, bench: Bench, tally: Tally) -> None:
    trial = _stopped(bench)
    value = DECIDING[setting].replace("ADAPTER", str(bench.undisturbed.folder / "adapter"))
    value = value.replace("MODEL", str(bench.folder / "model"))
    named = setting.partition(".")[2] if setting in _REFUSED_BEFORE else f"{setting}: "
    problems = _refuses(trial, ["--set", f"{setting}={value}"], named, plant=[])
    tally.add(CHANGED, passed=not problems)
    assert not problems
    trial.remove()


@pytest.mark.parametrize("setting", _slow(list(FREE), ("run.save_steps",)))
def test_a_setting_that_decides_no_number_may_change(
    setting: str, bench: Bench, tally: Tally
) -> None:
    trial = _stopped(bench)
    value = FREE[setting].replace("other-cache", str(bench.folder / "other-cache"))
    code, text = trial.run("--set", f"{setting}={value}")
    problems = [] if code == 0 else [f"exit code {code}: {text[-1500:]}"]
    if setting != "memory.micro_batch_tokens":  # the sums of a step are cut in another way
        problems += trial.problems()
    tally.add(UNCHANGED, passed=not problems)
    assert not problems
    trial.remove()


@contextmanager
def _changed(path: Path, change: Callable[[bytes], bytes]) -> Iterator[None]:
    before, stat = path.read_bytes(), path.stat()
    path.write_bytes(change(before))
    try:
        yield
    finally:
        path.write_bytes(before)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _one_weight(content: bytes) -> bytes:
    return content[:-7] + bytes([content[-7] ^ 1]) + content[-6:]


def _json_change(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    def changed(content: bytes) -> bytes:
        value = json.loads(content)
        change(value)
        return json.dumps(value).encode()

    return changed


FILES: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "a row": ("data.jsonl", lambda c: c.replace(b"grass?", b"grass!", 1), "data changed"),
    "an answer": ("data.jsonl", lambda c: c.replace(b"green", b"brown", 1), "data changed"),
    "a row more": ("data.jsonl", lambda c: c + c.splitlines(keepends=True)[0], "data changed"),
    "a row less": ("data.jsonl", lambda c: c.split(b"\n", 1)[1], "data changed"),
    "two rows swapped": (
        "data.jsonl",
        lambda c: b"".join([*c.splitlines(True)[1::-1], *c.splitlines(True)[2:]]),
        "data changed",
    ),
    "one bit of a weight": ("model/model.safetensors", _one_weight, "base model changed"),
    "the model's config": (
        "model/config.json",
        _json_change(lambda value: value.update(rms_norm_eps=1e-4)),
        "base model changed",
    ),
    "the chat template": (
        "model/chat_template.jinja",
        lambda c: b"x" + c,
        "data changed",
    ),
    "the tokenizer": (
        "model/tokenizer.json",
        _json_change(lambda value: value["model"]["merges"].remove(["o", "u"])),
        "data changed",
    ),
}


@pytest.mark.parametrize("what", _slow(list(FILES), ("an answer", "one bit of a weight")))
def test_changed_files_are_refused(what: str, bench: Bench, tally: Tally) -> None:
    trial = _stopped(bench)
    name, change, named = FILES[what]
    with _changed(bench.folder / name, change):
        problems = _refuses(trial, [], named, plant=[])
    code, text = trial.run()
    problems += trial.problems() if code == 0 else [f"restored, it says {text[-1500:]}"]
    tally.add(CHANGED, passed=not problems)
    assert not problems
    trial.remove()


@pytest.mark.slow
def test_changed_held_out_rows_are_refused(bench: Bench, tally: Tally) -> None:
    held_out = bench.folder / "held.jsonl"
    lines = (bench.folder / "data.jsonl").read_bytes().splitlines(keepends=True)
    held_out.write_bytes(b"".join(lines[:5]).replace(b"which", b"what"))
    words = ["--set", "data.held_out=0", "--set", f"data.held_out_path={held_out}"]
    trial = bench.trial()
    process = trial.start(*words)
    trial.wait_for_step(8, process)
    process.signal(9)
    process.wait()
    with _changed(held_out, lambda content: content.replace(b"what", b"tell", 1)):
        problems = _refuses(trial, words, "held-out rows changed", plant=[])
    tally.add(CHANGED, passed=not problems)
    assert not problems
    assert trial.run(*words)[0] == 0


@pytest.mark.parametrize(
    "library",
    _slow(["eightgig", "torch", "transformers", "tokenizers", "bitsandbytes", "numpy"], ("torch",)),
)
def test_another_version_is_refused(library: str, bench: Bench, tally: Tally) -> None:
    trial = _stopped(bench)
    plant: list[object] = ["pretend_version", library, "99.1"]
    problems = _refuses(trial, [], "-> 99.1", plant=plant)
    tally.add(CHANGED, passed=not problems)
    assert not problems
    trial.remove()


@pytest.mark.slow
def test_another_model_is_refused(bench: Bench, tally: Tally) -> None:
    from tests import tiny_run

    trial = _stopped(bench)
    other = bench.folder / "other-model"
    tiny_run.make_tame_model("llama", other, seed=5)
    problems = _refuses(trial, ["--set", f"model.name={other}"], "base model changed", plant=[])
    tally.add(CHANGED, passed=not problems)
    assert not problems


@pytest.mark.slow
def test_a_moved_model_and_moved_data_are_the_same(bench: Bench, tally: Tally) -> None:
    trial = _stopped(bench)
    shutil.copyfile(bench.folder / "data.jsonl", bench.folder / "moved.jsonl")
    code, text = trial.run("--set", f"data.path={bench.folder / 'moved.jsonl'}")
    problems = trial.problems() if code == 0 else [text[-1500:]]
    tally.add(UNCHANGED, passed=not problems)
    assert not problems
