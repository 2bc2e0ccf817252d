"""Saving fails at every single operation, in every way: nothing is ever lost by it.

The faults are injected at the operations of `eightgig.disk.Disk`; that a killed process behaves
like this is shown with real SIGKILLs in `test_sigkill.py`.
"""

from __future__ import annotations

import errno
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path

import pytest
import torch

from eightgig.adapters.files import read_adapter, write_adapter
from eightgig.config import LoraConfig
from eightgig.disk import Disk
from eightgig.errors import RunError
from eightgig.models.spec import DecoderSpec, LayerSpec, ModelSpec, RopeSpec
from eightgig.run import Run
from eightgig.training.rotation import step_name
from eightgig.training.save import SavedCheckpoint, SaveFailure
from tests.faults.disks import FAULTS, CountingDisk, Fault, FaultyDisk, Killed, PowerCutDisk
from tests.faults.saves import SITUATIONS, Situation, make_checkpoint, make_run, save
from tests.faults.tally import Tally

COUNTED = {
    0: "a save and its rotation, killed at every operation, or in the middle of a write",
    errno.ENOSPC: "a save and its rotation, disk full at every operation",
    errno.EIO: "a save and its rotation, input/output error at every operation, reading included",
    errno.EROFS: "a save and its rotation, disk read-only from every operation on",
}
POWER_CUT = "a save and its rotation, power cut before every operation, 4 outcomes each"
ADAPTER = "the final adapter folder, all of these faults at every operation"

situations = pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS)
faults = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)


def _copies(situation: Situation, folder: Path) -> Iterator[Run]:
    """Endless fresh copies of the situation's run folder."""
    run = make_run(folder / "prepared")
    situation.prepare(run)
    while True:
        copy = Run(folder=folder / "run")
        shutil.copytree(run.folder, copy.folder)
        yield copy
        shutil.rmtree(copy.folder)


def _count_operations(situation: Situation, run: Run) -> int:
    disk = CountingDisk()
    assert isinstance(save(run, situation.saved, disk), SavedCheckpoint)
    return len(disk.operations)


def _assert_next_save_works(run: Run, *, set_aside: str) -> None:
    """The next save on a sound disk works and leaves checkpoints only (or what is set aside)."""
    assert isinstance(save(run, make_checkpoint(100), CountingDisk()), SavedCheckpoint)
    names = {path.name for path in run.checkpoints_path.iterdir()}
    odd = {name for name in names if not re.fullmatch(r"step-\d{6}", name)}
    assert odd <= {set_aside}, names


@situations
@faults
def test_a_failed_save_costs_nothing(
    situation: Situation, fault: Fault, folder: Path, tally: Tally
) -> None:
    copies = _copies(situation, folder)
    hits = 0
    for at in range(_count_operations(situation, next(copies))):
        run, disk, result = next(copies), FaultyDisk(fault, at), None
        with suppress(Killed):
            result = save(run, situation.saved, disk)
        hits += disk.has_failed
        where = f"{fault.name} at {at}: {disk.operations[at]}"
        outcome = situation.outcome(run)
        assert outcome in ("before", "saved"), f"{outcome}, {where}"
        if isinstance(result, SavedCheckpoint):
            assert outcome == "saved", where
        if isinstance(result, SaveFailure) and fault.number == errno.ENOSPC:
            assert result.cause == "the disk is full", where
            assert result.missing_bytes > 0, where
        # A checkpoint that could not be read back is set aside, not deleted.
        is_read_error = fault.number == errno.EIO
        aside = f"{step_name(situation.saved.state.step)}.broken" if is_read_error else ""
        _assert_next_save_works(run, set_aside=aside)
        if disk.has_failed:
            tally.add(COUNTED[fault.number])
    assert hits > 3


def test_there_are_enough_points(folder: Path) -> None:
    points = 0
    for name, situation in SITUATIONS.items():
        operations = CountingDisk()
        run = make_run(folder / name)
        situation.prepare(run)
        save(run, situation.saved, operations)
        for fault in FAULTS:
            points += sum(step.startswith(fault.operations) for step in operations.operations)
    assert points >= 300


@situations
def test_a_power_cut_costs_one_save_at_most(
    situation: Situation, folder: Path, tally: Tally
) -> None:
    copies = _copies(situation, folder)
    for at in range(_count_operations(situation, next(copies)) + 1):
        for seed in range(4):
            run, disk, result = next(copies), PowerCutDisk(at), None
            with suppress(Killed):
                result = save(run, situation.saved, disk)
            disk.cut(random.Random(1000 * at + seed))
            outcome = situation.outcome(run)
            where = f"cut at {at}, seed {seed}: {disk.operations[-1]}"
            assert outcome in ("before", "saved"), f"{outcome}, {where}"
            if isinstance(result, SavedCheckpoint):
                assert outcome == "saved", where
            tally.add(POWER_CUT)


class _ForgetfulDisk(PowerCutDisk):
    """Says that a file is flushed when it is not."""

    def flush(self, file: FileIO) -> None:
        self._count("flush", Path(file.name))


class _NamelessDisk(PowerCutDisk):
    """Says that the names in a folder are flushed when they are not."""

    def flush_folder(self, path: Path) -> None:
        self._count("flush_folder", path)


@pytest.mark.parametrize("kind", [_ForgetfulDisk, _NamelessDisk])
def test_the_power_cut_finds_a_flush_that_is_missing(
    kind: type[PowerCutDisk], folder: Path
) -> None:
    situation = SITUATIONS["with rotation"]
    copies = _copies(situation, folder)
    last = _count_operations(situation, next(copies))
    outcomes = set()
    for seed in range(20):
        run, disk = next(copies), kind(last)
        assert isinstance(save(run, situation.saved, disk), SavedCheckpoint)
        disk.cut(random.Random(seed))
        outcomes.add(situation.outcome(run))
    assert outcomes != {"saved"}


def _make_spec() -> ModelSpec:
    layer = LayerSpec(
        index=0, sliding_window=None, num_heads=2, num_kv_heads=1, head_dim=3,
        intermediate_size=5, rope=RopeSpec(theta=1e4, parameters={}),
    )  # fmt: skip
    decoder = DecoderSpec(
        hidden_size=4, vocab_size=11, layers=(layer,), rms_norm_eps=1e-6, activation="silu",
        attention_scale=1.0, tie_word_embeddings=True, max_positions=64,
    )  # fmt: skip
    return ModelSpec(
        name="m", family="llama", model_type="llama", architecture="LlamaForCausalLM",
        decoder=decoder, dtype="float32", module_prefix="model", tensor_prefix="model.", tensors={},
    )  # fmt: skip


def _write_adapter(path: Path, value: float, disk: Disk) -> None:
    name = "layers.0.self_attn.q_proj"
    tensors = {
        f"{name}.lora_A": torch.full((2, 4), value),
        f"{name}.lora_B": torch.full((6, 2), value),
    }
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=("q_proj",))
    files = {"README.md": b"# card", "tokenizer.json": b"{}"}
    write_adapter(path, spec=_make_spec(), lora=lora, tensors=tensors, files=files, disk=disk)


def _read_value(path: Path) -> float:
    tensors = read_adapter(path, _make_spec()).tensors
    values = {float(value) for tensor in tensors.values() for value in tensor.flatten()}
    assert len(values) == 1
    return values.pop()


@faults
@pytest.mark.parametrize("is_first", [True, False])
def test_the_final_adapter_is_there_whole_or_as_before(
    is_first: bool, fault: Fault, folder: Path, tally: Tally
) -> None:
    def prepare(name: str) -> Path:
        path = folder / name / "adapter"
        if not is_first:
            _write_adapter(path, 1.0, CountingDisk())
        return path

    counting = CountingDisk()
    _write_adapter(prepare("counted"), 2.0, counting)
    for at in range(len(counting.operations)):
        path, disk, is_written = prepare(str(at)), FaultyDisk(fault, at), False
        try:
            _write_adapter(path, 2.0, disk)
            is_written = True
        except Killed:
            pass
        except RunError as error:
            assert "--resume" in error.fix
            assert disk.has_failed
        kept = path if path.exists() else path.with_name("adapter.old")
        if kept.exists():
            assert _read_value(kept) in ((2.0,) if is_written else (1.0, 2.0))
        else:
            assert is_first
            assert not is_written
        _write_adapter(path, 3.0, CountingDisk())
        assert _read_value(path) == 3.0
        assert [inner.name for inner in path.parent.iterdir()] == ["adapter"]
        if disk.has_failed:
            tally.add(ADAPTER)
