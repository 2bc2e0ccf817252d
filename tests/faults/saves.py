"""Small checkpoints, and situations in which one is saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from eightgig.disk import Disk
from eightgig.run import Run
from eightgig.training.checkpoint import Checkpoint, TrainingState, find_checkpoint, read_checkpoint
from eightgig.training.identity import RunIdentity
from eightgig.training.save import SavedCheckpoint, SaveFailure, save_checkpoint

KEEP = 2
IDENTITY = RunIdentity(
    fingerprints={"config": "c", "data": "d", "model": "m"},
    versions={"torch": "2.13.0"},
    settings={"train": {"learning_rate": 2e-4, "seed": 42}},
)


def make_checkpoint(step: int, *, seed: int | None = None, best_step: int = 0) -> Checkpoint:
    """A checkpoint of `step` whose numbers depend on `seed` (the step, if None)."""
    generator = torch.Generator().manual_seed(step if seed is None else seed)
    adapter = {
        "layers.0.self_attn.q_proj.lora_A": torch.randn(2, 7, generator=generator),
        "layers.0.self_attn.q_proj.lora_B": torch.randn(5, 2, generator=generator),
    }
    moments = {f"{name}.exp_avg": 0.1 * tensor for name, tensor in adapter.items()}
    codes = torch.randint(0, 256, (3,), generator=generator).to(torch.uint8)
    return Checkpoint(
        adapter=adapter,
        optimizer={**moments, "state1": codes, "step": torch.tensor(float(step))},
        state=TrainingState(
            step=step,
            rows_seen=8 * step,
            seconds=1.5 * step,
            best_held_out_loss=None,
            best_step=best_step,
            evaluations_without_gain=0,
            rung=0,
            guards={"non_finite": {"in_a_row": 0, "total": step}, "seed": seed},
            is_finished=False,
        ),
        identity=IDENTITY,
    )


def save(run: Run, checkpoint: Checkpoint, disk: Disk) -> SavedCheckpoint | SaveFailure:
    return save_checkpoint(run, checkpoint, keep=KEEP, disk=disk)


def are_equal(found: Checkpoint, expected: Checkpoint) -> bool:
    """Whether two checkpoints are the same bit for bit."""
    return (
        found.state == expected.state
        and found.identity == expected.identity
        and _have_equal_tensors(found.adapter, expected.adapter)
        and _have_equal_tensors(found.optimizer, expected.optimizer)
    )


def _have_equal_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return set(found) == set(expected) and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in expected.items()
    )


@dataclasses.dataclass(frozen=True)
class Situation:
    """A run folder and the save that fails in it.

    Attributes:
        prepare: Fills the run folder.
        before: The checkpoint that a resumed run takes without this save, if any.
        saved: The checkpoint that is saved.
    """

    prepare: Callable[[Run], None]
    before: Checkpoint | None
    saved: Checkpoint

    def outcome(self, run: Run) -> str:
        """`before` or `saved`: which checkpoint a resumed run goes on from; else what is wrong."""
        found = find_checkpoint(run)
        if found.path is None:
            return "before" if self.before is None else "nothing was found"
        read = read_checkpoint(found.path)
        if are_equal(read, self.saved):
            return "saved"
        if self.before is not None and are_equal(read, self.before):
            return "before"
        return f"{found.path.name} holds something else"


def _save_all(run: Run, *checkpoints: Checkpoint) -> None:
    for checkpoint in checkpoints:
        assert isinstance(save(run, checkpoint, Disk()), SavedCheckpoint)


def _leave_rubbish(run: Run) -> None:
    """What an earlier killed save and an earlier killed rotation leave behind."""
    _save_all(run, make_checkpoint(5), make_checkpoint(10))
    for name in ("step-000015.tmp", "step-000003.trash"):
        folder = run.checkpoints_path / name
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"half")


def _replace_half(run: Run) -> None:
    """A save of the same step was killed between its two renames."""
    _save_all(run, make_checkpoint(5), make_checkpoint(10))
    path = run.checkpoints_path / "step-000010"
    path.rename(path.with_name("step-000010.old"))


SITUATIONS: Mapping[str, Situation] = {
    "the first": Situation(lambda run: None, None, make_checkpoint(5)),
    "the second": Situation(
        lambda run: _save_all(run, make_checkpoint(5)), make_checkpoint(5), make_checkpoint(10)
    ),
    "with rotation": Situation(
        lambda run: _save_all(run, make_checkpoint(5), make_checkpoint(10)),
        make_checkpoint(10),
        make_checkpoint(15),
    ),
    "beside the best": Situation(
        lambda run: _save_all(run, *(make_checkpoint(step, best_step=5) for step in (5, 10, 15))),
        make_checkpoint(15, best_step=5),
        make_checkpoint(20, best_step=5),
    ),
    "the same step again": Situation(
        lambda run: _save_all(run, make_checkpoint(5), make_checkpoint(10)),
        make_checkpoint(10),
        make_checkpoint(10, seed=99),
    ),
    "over rubbish": Situation(_leave_rubbish, make_checkpoint(10), make_checkpoint(15)),
    "after a half replacement": Situation(
        _replace_half, make_checkpoint(10), make_checkpoint(10, seed=99)
    ),
}


def make_run(folder: Path) -> Run:
    """An empty run folder."""
    folder.mkdir(parents=True)
    return Run(folder=folder)
