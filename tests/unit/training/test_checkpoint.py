"""What a checkpoint is: its files, how long it is kept, what a failed save says."""

from __future__ import annotations

import errno
import json
import os
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eightgig.disk import Disk
from eightgig.run import Run
from eightgig.training.checkpoint import find_checkpoint, read_checkpoint
from eightgig.training.save import SavedCheckpoint, SaveFailure, checkpoint_bytes, save_checkpoint
from tests.faults.disks import CountingDisk, ShortDisk
from tests.faults.saves import are_equal, make_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(folder=tmp_path)


def _saved(run: Run, step: int, *, keep: int = 3, best_step: int = 0) -> SavedCheckpoint:
    result = save_checkpoint(run, make_checkpoint(step, best_step=best_step), keep=keep)
    assert isinstance(result, SavedCheckpoint)
    return result


def _steps(run: Run) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in run.checkpoints_path.iterdir())


def test_what_is_read_is_what_was_saved(run: Run) -> None:
    saved = _saved(run, 120)
    assert saved.path == run.folder / "checkpoints" / "step-000120"
    assert find_checkpoint(run).path == saved.path
    assert are_equal(read_checkpoint(saved.path), make_checkpoint(120))


def test_the_files_are_those_of_the_design(run: Run) -> None:
    saved = _saved(run, 7)
    files = {path.name: path for path in saved.path.iterdir()}
    assert sorted(files) == [
        "adapter_model.safetensors", "manifest.json", "optimizer.safetensors", "state.json",
    ]  # fmt: skip
    assert saved.size_bytes == sum(path.stat().st_size for path in files.values())
    adapter = load_file(files["adapter_model.safetensors"])
    for name, tensor in make_checkpoint(7).adapter.items():
        assert torch.equal(adapter[name], tensor)
    assert json.loads(files["manifest.json"].read_text())["step"] == 7


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(0), torch.zeros(3, 0), torch.tensor(2.5), torch.ones(7, dtype=torch.bool),
        torch.arange(5, dtype=torch.int64), torch.arange(3, dtype=torch.int8),
        torch.randn(3, 5).bfloat16(), torch.randn(5).half(), torch.randn(4, 6).t(),
        torch.randn(9)[::2], torch.randn(2, dtype=torch.float64),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.shape)}",
)  # fmt: skip
def test_every_kind_of_tensor_comes_back(tensor: torch.Tensor, run: Run) -> None:
    optimizer = {"odd": torch.arange(3, dtype=torch.uint8), "x": tensor, "empty": torch.zeros(0)}
    saved = save_checkpoint(run, replace(make_checkpoint(1), optimizer=optimizer), keep=1)
    assert isinstance(saved, SavedCheckpoint)
    read = read_checkpoint(saved.path).optimizer
    assert read["x"].dtype == tensor.dtype
    assert torch.equal(read["x"], tensor)


def test_the_newest_are_kept(run: Run) -> None:
    for step in (5, 10, 15, 20):
        saved = _saved(run, step, keep=2)
    assert _steps(run) == [15, 20]
    assert saved.removed == ("step-000010",)


def test_the_best_is_kept_besides(run: Run) -> None:
    for step in (5, 10, 15, 20):
        _saved(run, step, keep=1, best_step=10 if step > 5 else 5)
    assert _steps(run) == [10, 20]


@pytest.mark.parametrize("keep", [0, -1, 1])
def test_the_one_just_saved_is_always_kept(keep: int, run: Run) -> None:
    for step in (5, 10):
        _saved(run, step, keep=keep)
    assert _steps(run) == [10]


def test_an_earlier_step_than_those_there_survives_its_own_rotation(run: Run) -> None:
    for step in (10, 20, 5):
        _saved(run, step, keep=1)
    assert _steps(run) == [5]


def test_numbers_beyond_six_digits_sort_as_numbers(run: Run) -> None:
    for step in (999_999, 1_000_000):
        _saved(run, step)
    assert find_checkpoint(run).path == run.checkpoints_path / "step-1000000"


def test_the_same_step_saved_again_replaces_it(run: Run) -> None:
    _saved(run, 5)
    save_checkpoint(run, make_checkpoint(5, seed=1), keep=3)
    assert _steps(run) == [5]
    path = run.checkpoints_path / "step-000005"
    assert are_equal(read_checkpoint(path), make_checkpoint(5, seed=1))


def test_without_any_checkpoint_nothing_is_found(run: Run) -> None:
    found = find_checkpoint(run)
    assert found.path is None
    assert found.skipped == ()


def test_older_ones_are_deleted_only_after_the_new_one_was_read_back(run: Run) -> None:
    for step in (5, 10):
        _saved(run, step, keep=2)
    disk = CountingDisk()
    save_checkpoint(run, make_checkpoint(15), keep=2, disk=disk)
    done = disk.operations
    published = done.index("rename step-000015.tmp")
    read_back = max(index for index, name in enumerate(done) if name.startswith("read "))
    deleted = next(index for index, name in enumerate(done) if name.startswith("remove_file"))
    assert published < read_back < done.index("rename step-000005") < deleted


def test_everything_is_flushed_before_it_appears(run: Run) -> None:
    disk = CountingDisk()
    save_checkpoint(run, make_checkpoint(5), keep=2, disk=disk)
    done = disk.operations
    published = done.index("rename step-000005.tmp")
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "state.json"):
        assert done.index(f"flush {name}") < done.index("create manifest.json")
    assert done.index("flush manifest.json") < done.index("flush_folder step-000005.tmp")
    assert done.index("flush_folder step-000005.tmp") < published
    assert "flush_folder checkpoints" in done[published:]
    assert done[:3] == ["make_folder checkpoints", f"flush_folder {run.folder.name}", done[2]]


def test_a_disk_that_takes_less_than_offered_gets_it_all(run: Run) -> None:
    saved = save_checkpoint(run, make_checkpoint(5), keep=1, disk=ShortDisk())
    assert isinstance(saved, SavedCheckpoint)
    assert are_equal(read_checkpoint(saved.path), make_checkpoint(5))


class _SmallDisk(Disk):
    def __init__(self, free_bytes: int) -> None:
        self.room = free_bytes

    def free_bytes(self, path: Path) -> int:
        return self.room


def test_too_little_space_is_noticed_before_a_byte_is_written(run: Run) -> None:
    checkpoint = make_checkpoint(5)
    needed_bytes = checkpoint_bytes(checkpoint)
    assert isinstance(
        save_checkpoint(run, checkpoint, keep=1, disk=_SmallDisk(needed_bytes)), SavedCheckpoint
    )
    failure = save_checkpoint(
        run, make_checkpoint(6), keep=1, disk=_SmallDisk(needed_bytes - 30_000)
    )
    assert isinstance(failure, SaveFailure)
    assert (failure.cause, failure.missing_bytes) == ("the disk is full", 30_000)
    assert failure.message == (
        "The checkpoint of step 6 was not saved: the disk is full; 29.3 KiB are missing."
    )
    assert "Free 29.3 KiB" in failure.fix
    assert _steps(run) == [5]


def test_a_checkpoint_takes_no_more_than_it_asked_for(run: Run) -> None:
    assert _saved(run, 5).size_bytes <= checkpoint_bytes(make_checkpoint(5))


class _FailingDisk(Disk):
    def __init__(self, number: int) -> None:
        self.number = number

    def flush(self, file: Any) -> None:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "your disk quota is used up"),
        (errno.EIO, "the disk reports an input/output error"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "writing there is not permitted"),
        (errno.ESTALE, "the network drive is gone"),
        (errno.ENOTCONN, os.strerror(errno.ENOTCONN)),
    ],
)
def test_a_failed_save_names_the_cause_and_keeps_what_was_there(
    number: int, cause: str, run: Run
) -> None:
    _saved(run, 5)
    failure = save_checkpoint(run, make_checkpoint(10), keep=1, disk=_FailingDisk(number))
    assert isinstance(failure, SaveFailure)
    assert failure.cause == cause
    assert (failure.missing_bytes > 0) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert (failure.finding.severity, failure.finding.code) == ("warning", "checkpoint.not_saved")
    assert cause in failure.error.message
    assert "--resume" in failure.error.fix
    assert failure.error.exit_code == 2
    assert _steps(run) == [5]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_adapter_is_never_saved(value: float, run: Run) -> None:
    checkpoint = make_checkpoint(10)
    checkpoint.adapter["layers.0.self_attn.q_proj.lora_B"][1, 1] = value
    failure = save_checkpoint(run, checkpoint, keep=1)
    assert isinstance(failure, SaveFailure)
    assert "lora_B holds NaN or infinity" in failure.message
    assert find_checkpoint(run).path is None


def test_nothing_is_unpickled_and_no_file_is_a_pickle(run: Run) -> None:
    _saved(run, 5)
    read_checkpoint(run.checkpoints_path / "step-000005")
    seen: list[str] = []
    is_listening = True

    def listen(event: str, _: tuple[Any, ...]) -> None:
        if is_listening and event.startswith(("pickle.", "marshal.", "subprocess.", "os.exec")):
            seen.append(event)

    # An audit hook stays for ever; it must fall silent.
    sys.addaudithook(listen)
    try:
        path = _saved(run, 10).path
        found = find_checkpoint(run)
        read_checkpoint(path)
        assert found.path == path
        assert seen == []
        pickle.loads(pickle.dumps(Path))
        assert seen == ["pickle.find_class"], "the hook hears nothing"
    finally:
        is_listening = False
    for file in path.iterdir():
        # Pickles of protocol 2 and later begin with 0x80, torch.save's archives with PK.
        assert not file.read_bytes().startswith((b"\x80", b"PK")), file.name
