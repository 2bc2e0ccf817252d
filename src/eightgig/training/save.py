"""Saving a checkpoint so that no crash, full disk or power cut can cost an earlier one.

Staging folder on the same file system, every file flushed, the manifest last, the folder flushed,
one rename, its parent flushed, read back; only then older checkpoints are deleted. Disk trouble is
a result here, not an exception: training goes on without the checkpoint.
"""

from __future__ import annotations

import dataclasses
import errno
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from eightgig.adapters.files import first_non_finite
from eightgig.adapters.tensors import tensor_bytes, tensor_parts
from eightgig.disk import Disk, StagedFolder, failure_cause, make_folders
from eightgig.errors import Finding, RunError
from eightgig.run import Run, to_json
from eightgig.training.checkpoint import (
    ADAPTER_NAME,
    FORMAT_VERSION,
    MANIFEST_NAME,
    OPTIMIZER_NAME,
    STATE_NAME,
    Checkpoint,
    CheckpointFile,
    CheckpointManifest,
    find_damage,
    json_bytes,
    manifest_sha256,
)
from eightgig.training.rotation import rotate, set_aside, step_name, sweep
from eightgig.units import KIB, format_bytes

# State, manifest and safetensors headers of a small model; 2 % more covers those of a large one.
_JSON_BYTES = 64 * KIB
_SPACE_ERRORS = (errno.ENOSPC, errno.EDQUOT)
_FIX_DISK = "See what the system says about the disk, and whether the run folder is writable."
_FIX_NON_FINITE = "Go on from an earlier checkpoint with a lower train.learning_rate."


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedCheckpoint:
    """A checkpoint that was written, read back and found intact.

    Attributes:
        path: Its folder.
        size_bytes: Of all its files.
        seconds: Time it took.
        removed: Names of older checkpoints deleted afterwards.
        rotation_problem: Why older ones could not be deleted, empty when they could.
    """

    path: Path
    size_bytes: int
    seconds: float
    removed: tuple[str, ...] = ()
    rotation_problem: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveFailure:
    """A checkpoint that could not be written. The earlier ones are as they were.

    Attributes:
        step: Optimizer steps done.
        cause: In a few words: `the disk is full`.
        needed_bytes: What the checkpoint takes.
        free_bytes: What the disk has; None where space is not the trouble.
        missing_bytes: What must be freed, 0 when space is not the trouble.
        path: Where it was to be written.
        fix: What to do, one sentence.
    """

    step: int
    cause: str
    needed_bytes: int
    free_bytes: int | None
    missing_bytes: int
    path: Path
    fix: str

    @classmethod
    def of_memory(cls, run: Run, step: int, cause: str) -> SaveFailure:
        """Memory, not the disk, ran out."""
        return cls(
            step=step,
            cause=f"memory ran out ({cause})",
            needed_bytes=0,
            free_bytes=None,
            missing_bytes=0,
            path=run.checkpoints_path / step_name(step),
            fix="Close other programs.",
        )

    @property
    def message(self) -> str:
        """One sentence with the cause and the bytes missing."""
        missing = f"; {format_bytes(self.missing_bytes)} are missing" if self.missing_bytes else ""
        return f"The checkpoint of step {self.step} was not saved: {self.cause}{missing}."

    @property
    def finding(self) -> Finding:
        """For a save during training, which goes on."""
        return Finding(
            severity="warning",
            code="checkpoint.not_saved",
            message=self.message,
            why="Training goes on; earlier checkpoints are kept; the next save tries again.",
            fix=self.fix,
            file=str(self.path),
        )

    @property
    def error(self) -> RunError:
        """For the final save, after which nothing is tried again."""
        return RunError(
            self.message,
            why="It was the last save of the run; earlier checkpoints are kept.",
            fix=f"{self.fix} Then run the same command with --resume.",
        )


def save_checkpoint(
    run: Run, checkpoint: Checkpoint, *, keep: int, disk: Disk | None = None
) -> SavedCheckpoint | SaveFailure:
    """Write a checkpoint, read it back, then delete the ones that are too many.

    Args:
        run: The run it belongs to.
        checkpoint: What to write; tensors may be on any device.
        keep: Checkpoints to keep, at least this one; the one of `state.best_step` stays as well.
        disk: The operations to write with.

    Returns:
        Where it lies, or why it could not be written: no disk trouble is raised.
    """
    disk, start = disk or Disk(), time.monotonic()
    target = run.checkpoints_path / step_name(checkpoint.state.step)
    wrong = _first_non_finite(checkpoint)
    if wrong is not None:
        return _failure(checkpoint, target, f"{wrong} holds NaN or infinity", fix=_FIX_NON_FINITE)
    try:
        make_folders(run.checkpoints_path, disk)
        sweep(run.checkpoints_path, disk)
        if disk.free_bytes(run.checkpoints_path) < checkpoint_bytes(checkpoint):
            return _no_space(checkpoint, target, failure_cause(OSError(errno.ENOSPC, "")), disk)
        staged = StagedFolder(target, disk)
        try:
            size_bytes = _write_files(staged, checkpoint)
            staged.publish()
        except OSError:
            staged.discard()
            raise
    except OSError as error:
        if error.errno in _SPACE_ERRORS:
            return _no_space(checkpoint, target, failure_cause(error), disk)
        return _failure(checkpoint, target, failure_cause(error), fix=_FIX_DISK)
    damage = find_damage(target, disk)
    if damage is not None:
        set_aside(target, disk)
        return _failure(checkpoint, target, f"read back, {damage}", fix=_FIX_DISK)
    state = checkpoint.state
    removed, problem = rotate(
        run.checkpoints_path,
        current_step=state.step,
        best_step=state.best_step,
        keep=keep,
        disk=disk,
    )
    return SavedCheckpoint(
        path=target,
        size_bytes=size_bytes,
        seconds=time.monotonic() - start,
        removed=removed,
        rotation_problem=problem,
    )


def checkpoint_bytes(checkpoint: Checkpoint) -> int:
    """Free bytes that saving `checkpoint` asks for."""
    size_bytes = tensor_bytes(checkpoint.adapter) + tensor_bytes(checkpoint.optimizer)
    return size_bytes + size_bytes // 50 + _JSON_BYTES


def _write_files(staged: StagedFolder, checkpoint: Checkpoint) -> int:
    """Write all files, the manifest last; returns their bytes."""
    contents: dict[str, Iterable[bytes | memoryview]] = {
        ADAPTER_NAME: tensor_parts(checkpoint.adapter),
        OPTIMIZER_NAME: tensor_parts(checkpoint.optimizer),
        STATE_NAME: [json_bytes(checkpoint.state)],
    }
    digests = {name: staged.write(name, parts) for name, parts in contents.items()}
    manifest = CheckpointManifest(
        format_version=FORMAT_VERSION,
        step=checkpoint.state.step,
        files={
            name: CheckpointFile(size_bytes=digest.size_bytes, sha256=digest.sha256)
            for name, digest in digests.items()
        },
        fingerprints=checkpoint.identity.fingerprints,
        versions=checkpoint.identity.versions,
        settings=checkpoint.identity.settings,
        cpu_threads=checkpoint.identity.cpu_threads,
    )
    signed = dataclasses.replace(manifest, sha256=manifest_sha256(to_json(manifest)))
    last = staged.write(MANIFEST_NAME, [json_bytes(signed)])
    return last.size_bytes + sum(digest.size_bytes for digest in digests.values())


def _first_non_finite(checkpoint: Checkpoint) -> str | None:
    return first_non_finite(checkpoint.adapter) or first_non_finite(checkpoint.optimizer)


def _no_space(checkpoint: Checkpoint, target: Path, cause: str, disk: Disk) -> SaveFailure:
    """The failure of a disk that holds no more, with the bytes to free."""
    needed_bytes = checkpoint_bytes(checkpoint)
    try:
        free_bytes = disk.free_bytes(target.parent)
    except OSError:
        free_bytes = 0
    # A quota or a reserve may hold back what the disk calls free: then all of it is missing.
    missing_bytes = needed_bytes - free_bytes if free_bytes < needed_bytes else needed_bytes
    fix = (
        f"Free {format_bytes(missing_bytes)} where {target.parent} lies, "
        "or lower run.save_total_limit."
    )
    return _failure(
        checkpoint, target, cause, fix=fix, free_bytes=free_bytes, missing_bytes=missing_bytes
    )


def _failure(
    checkpoint: Checkpoint,
    target: Path,
    cause: str,
    *,
    fix: str,
    free_bytes: int | None = None,
    missing_bytes: int = 0,
) -> SaveFailure:
    return SaveFailure(
        step=checkpoint.state.step,
        cause=cause,
        needed_bytes=checkpoint_bytes(checkpoint),
        free_bytes=free_bytes,
        missing_bytes=missing_bytes,
        path=target,
        fix=fix,
    )
