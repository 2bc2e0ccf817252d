"""A damaged file of the newest checkpoint: it is noticed, set aside, and the one before is used."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from eightgig.errors import RunError
from eightgig.run import Run
from eightgig.training.checkpoint import (
    find_checkpoint,
    json_bytes,
    manifest_sha256,
    read_checkpoint,
)
from eightgig.training.resume import resume_run
from eightgig.training.save import save_checkpoint
from tests.faults.disks import CountingDisk
from tests.faults.saves import IDENTITY, are_equal, make_checkpoint, make_run
from tests.faults.tally import Tally

FILES = ("manifest.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json")
OLDER, NEWEST = make_checkpoint(5), make_checkpoint(10)


def _flip(position: Callable[[int], int], bit: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[position(len(content))] ^= 1 << bit
        path.write_bytes(content)

    return damage


def _swap(path: Path) -> None:
    shutil.copyfile(path.parent.parent / "step-000005" / path.name, path)


def _link(path: Path) -> None:
    outside = path.parents[3] / "outside"  # beside the run folder
    shutil.copyfile(path, outside)
    path.unlink()
    path.symlink_to(outside)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "one byte long": lambda path: path.write_bytes(path.read_bytes() + b"}"),
    "zeros": lambda path: path.write_bytes(b"\0" * path.stat().st_size),
    "first bit": _flip(lambda size: 0, 0),
    "middle bit": _flip(lambda size: size // 2, 3),
    "last bit": _flip(lambda size: size - 3, 6),
    "of an older checkpoint": _swap,
    "a link": _link,
    "a folder": _make_folder,
    "deeply nested": lambda path: path.write_bytes(b"[" * 100_000),
    "huge": lambda path: os.truncate(path, 20 << 20),
}
if hasattr(os, "mkfifo"):
    DAMAGES["a pipe"] = _pipe


@pytest.fixture
def run(folder: Path) -> Run:
    run = make_run(folder / "run")
    for checkpoint in (OLDER, NEWEST):
        save_checkpoint(run, checkpoint, keep=2, disk=CountingDisk())
    return run


def _names(run: Run) -> set[str]:
    return {path.name for path in run.checkpoints_path.iterdir() if path.is_dir()}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_the_one_before_is_used_and_nothing_is_deleted(
    damage: Callable[[Path], object], name: str, run: Run, tally: Tally
) -> None:
    path = run.checkpoints_path / "step-000010"
    before = sorted(file.name for file in path.iterdir())
    damage(path / name)
    with pytest.raises(RunError, match="is damaged"):
        read_checkpoint(path)
    found = find_checkpoint(run)
    assert found.path is not None
    assert are_equal(read_checkpoint(found.path), OLDER)
    assert _names(run) == {"step-000005", "step-000010.broken"}
    kept = {file.name for file in (run.checkpoints_path / "step-000010.broken").iterdir()}
    assert kept | {name} == set(before)
    (skipped,) = found.skipped
    assert skipped.code == "checkpoint.damaged"
    assert "step-000010" in skipped.message
    assert "step-000010.broken" in skipped.fix
    tally.add("one file of the newest checkpoint damaged, in every way")


def test_a_thousand_flipped_bits_are_all_noticed(run: Run, tally: Tally) -> None:
    path = run.checkpoints_path / "step-000010"
    chooser = random.Random(0)
    for _ in range(1000):
        file = path / chooser.choice(FILES)
        content = file.read_bytes()
        position, bit = chooser.randrange(len(content)), chooser.randrange(8)
        file.write_bytes(
            content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]
        )
        with pytest.raises(RunError):
            read_checkpoint(path)
        file.write_bytes(content)
        tally.add("one random bit of a checkpoint flipped")
    assert are_equal(read_checkpoint(path), NEWEST)


def test_when_all_are_damaged_the_run_starts_afresh_and_says_so(run: Run) -> None:
    for name in ("step-000005", "step-000010"):
        (run.checkpoints_path / name / "state.json").unlink()
    found = find_checkpoint(run)
    assert found.path is None
    assert [finding.message.split()[1] for finding in found.skipped] == [
        "step-000010",
        "step-000005",
    ]
    assert _names(run) == {"step-000005.broken", "step-000010.broken"}


def test_a_second_damaged_one_of_the_same_step_gets_its_own_name(run: Run) -> None:
    for _ in range(3):
        save_checkpoint(run, NEWEST, keep=2, disk=CountingDisk())
        (run.checkpoints_path / "step-000010" / "state.json").unlink()
        find_checkpoint(run)
    assert _names(run) == {
        "step-000005",
        "step-000010.broken",
        "step-000010.broken-2",
        "step-000010.broken-3",
    }


def test_damaged_ones_are_not_rotated_away(run: Run) -> None:
    (run.checkpoints_path / "step-000010" / "state.json").unlink()
    find_checkpoint(run)
    for step in (15, 20, 25):
        save_checkpoint(run, make_checkpoint(step), keep=1, disk=CountingDisk())
    assert _names(run) == {"step-000010.broken", "step-000025"}


def test_a_checkpoint_under_another_step_is_not_taken_for_it(run: Run) -> None:
    (run.checkpoints_path / "step-000010").rename(run.checkpoints_path / "step-000012")
    found = find_checkpoint(run)
    assert found.path == run.checkpoints_path / "step-000005"


def test_a_linked_checkpoint_is_not_followed_and_that_is_said(run: Run) -> None:
    outside = run.folder.parent / "outside"
    (run.checkpoints_path / "step-000010").rename(outside)
    (run.checkpoints_path / "step-000010").symlink_to(outside, target_is_directory=True)
    (run.checkpoints_path / "step-000004").symlink_to(outside, target_is_directory=True)
    found = find_checkpoint(run)
    assert found.path == run.checkpoints_path / "step-000005"
    (skipped,) = found.skipped
    assert skipped.message == "Checkpoint step-000010 is a link: an earlier one is used."
    assert (run.checkpoints_path / "step-000010").is_symlink()


def _forge(run: Run, **changes: object) -> None:
    """Change the newest manifest and sign it again."""
    path = run.checkpoints_path / "step-000010" / "manifest.json"
    manifest = {**json.loads(path.read_text()), **changes}
    path.write_bytes(json_bytes({**manifest, "sha256": manifest_sha256(manifest)}))


def test_a_newer_format_is_refused_and_left_alone(run: Run) -> None:
    _forge(run, format_version=2)
    with pytest.raises(RunError, match="has format 2") as caught:
        find_checkpoint(run)
    assert "Update eightgig" in caught.value.fix
    assert _names(run) == {"step-000005", "step-000010"}


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"../../../etc/passwd": {"size_bytes": 1, "sha256": ""}},
        {"state.json": {"size_bytes": "all", "sha256": ""}},
        "none",
    ],
)
def test_a_forged_list_of_files_is_damage(files: object, run: Run) -> None:
    _forge(run, files=files)
    assert find_checkpoint(run).path == run.checkpoints_path / "step-000005"


LOSSES = {"losses": [2.5], "norms": [1.0]}


@pytest.mark.parametrize(
    "guards",
    [
        {"steps": "all"},
        {"said": 3},
        {"best_loss": [1.0]},
        {"start": None},
        {"start": {**LOSSES, "loss_sum": 2.5}},
        {"start": {**LOSSES, "loss_sum": 10**400, "loss_tokens": 1}},
        {"recent": {**LOSSES, "loss_tokens": ["many"]}},
        {"recent": [2.5]},
        {"speed": {"steps": 3, "start": {}, "recent": []}},
        {"non_finite": {"in_a_row": "none", "total": 0}},
        {"dead_layers": {"steps": 1, "silent": [["q_proj"]], "is_open": True}},
    ],
)
def test_guards_that_remember_something_else_are_damage(guards: object, run: Run) -> None:
    """The first step after resuming would end in a traceback."""
    path = run.checkpoints_path / "step-000010"
    state = {**json.loads((path / "state.json").read_text()), "guards": guards}
    content = json_bytes(state)
    (path / "state.json").write_bytes(content)
    files = json.loads((path / "manifest.json").read_text())["files"]
    written = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    _forge(run, files={**files, "state.json": written})
    found = find_checkpoint(run)
    assert found.path == run.checkpoints_path / "step-000005"
    assert [finding.code for finding in found.skipped] == ["checkpoint.damaged"]


def test_a_checkpoint_without_the_number_of_threads_is_whole(run: Run) -> None:
    path = run.checkpoints_path / "step-000010" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["cpu_threads"]
    path.write_bytes(json_bytes({**manifest, "sha256": manifest_sha256(manifest)}))
    assert are_equal(read_checkpoint(path.parent), NEWEST)


class _Taker:
    """Takes what a resumed run loads into adapter and optimizer."""

    def __init__(self) -> None:
        self.taken: list[object] = []

    def load(self, tensors: object) -> None:
        self.taken.append(tensors)

    load_state_tensors = load


def test_resuming_tidies_up_what_a_kill_left(run: Run) -> None:
    """Where the last save of all was killed in its rotation, no later save would."""
    for name in ("step-000003.trash", "step-000011.tmp", "step-000010.old"):
        shutil.copytree(run.checkpoints_path / "step-000005", run.checkpoints_path / name)
    taker = _Taker()
    state = resume_run(run, IDENTITY, taker, taker, lambda _: None)  # type: ignore[arg-type]
    assert state.step == 10
    assert len(taker.taken) == 2
    assert _names(run) == {"step-000005", "step-000010"}


def test_resuming_keeps_the_replaced_one_where_the_new_one_is_damaged(run: Run) -> None:
    newest = run.checkpoints_path / "step-000010"
    shutil.copytree(newest, newest.with_name("step-000010.old"))
    (newest / "state.json").unlink()
    taker = _Taker()
    state = resume_run(run, IDENTITY, taker, taker, lambda _: None)  # type: ignore[arg-type]
    assert state.step == 10
    assert _names(run) == {"step-000005", "step-000010", "step-000010.broken"}
    assert are_equal(read_checkpoint(newest), NEWEST)
