"""Checkpoints: `checkpoints/step-000120/{manifest.json, adapter_model.safetensors,
optimizer.safetensors, state.json}`; data only, never executed on load.

Here are the records, and how a checkpoint is found and read again: the manifest's hashes are
believed and nothing else. Writing is in `save.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightgig.disk import REPLACED_SUFFIX, Disk, digest_file, failure_cause
from eightgig.errors import Finding, RunError
from eightgig.run import Run, from_json, to_json
from eightgig.training.identity import RunIdentity
from eightgig.training.remembered import check_memory
from eightgig.training.rotation import is_own_folder, list_named, set_aside, step_name
from eightgig.units import MIB, format_bytes

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
ADAPTER_NAME = "adapter_model.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"
STATE_NAME = "state.json"
MAX_JSON_BYTES = 16 * MIB
FILE_NAMES = (ADAPTER_NAME, OPTIMIZER_NAME, STATE_NAME)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointFile:
    """One file of a checkpoint, as it must be found again."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointManifest:
    """`manifest.json`, written last: a folder without it is not a checkpoint.

    Attributes:
        format_version: `FORMAT_VERSION` of the writer.
        step: Optimizer steps done.
        files: By name, every other file of the folder.
        fingerprints: Hashes a resumed run must agree with: config, data, model.
        versions: Versions of eightgig and the libraries that decide results.
        settings: All settings as JSON, to name what differs.
        cpu_threads: Threads that the layers were computed with; 0 on a GPU, or where not known.
        sha256: Of this manifest itself without this field.
    """

    format_version: int
    step: int
    files: Mapping[str, CheckpointFile]
    fingerprints: Mapping[str, str]
    versions: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    cpu_threads: int = 0
    sha256: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingState:
    """`state.json`: what is not a tensor.

    Attributes:
        step: Optimizer steps done.
        rows_seen: Rows trained on so far, all epochs.
        seconds: Training time so far, earlier parts of the run included.
        best_held_out_loss: Lowest held-out loss so far, None before the first evaluation.
        best_step: Step of that evaluation.
        evaluations_without_gain: For early stopping.
        rung: Rungs of the out-of-memory ladder taken, 0 for none.
        guards: State of the guards by name.
        is_finished: No step is left.
        evaluated_step: Step of the newest evaluation, 0 before the first.
    """

    step: int
    rows_seen: int
    seconds: float
    best_held_out_loss: float | None
    best_step: int
    evaluations_without_gain: int
    rung: int
    guards: Mapping[str, Any]
    is_finished: bool
    evaluated_step: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """All that a run needs to go on as if it had not stopped.

    Attributes:
        adapter: Adapter masters by name, `layers.{i}.{module}.lora_A` and `.lora_B`.
        optimizer: Moments of the optimizer by name.
        state: What is not a tensor.
        identity: What the run must have in common with this one.
    """

    adapter: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: TrainingState
    identity: RunIdentity


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundCheckpoint:
    """What `find_checkpoint` found.

    Attributes:
        path: Newest intact checkpoint, None when there is none.
        skipped: One finding for each newer one that is damaged, which was set aside and not
            deleted, or a link.
    """

    path: Path | None
    skipped: tuple[Finding, ...]


def find_checkpoint(run: Run, *, disk: Disk | None = None) -> FoundCheckpoint:
    """The newest intact checkpoint of a run; damaged newer ones are renamed, never deleted.

    Args:
        run: The run.
        disk: The operations to read and rename with.

    Raises:
        RunError: The newest checkpoint is of a newer eightgig, or the folder cannot be read.
    """
    disk = disk or Disk()
    skipped: list[Finding] = []
    try:
        candidates = list_named(run.checkpoints_path)
    except OSError as error:
        raise RunError(
            f"{run.checkpoints_path} cannot be read: {failure_cause(error)}.",
            why="A run goes on from its newest checkpoint.",
            fix="Make the folder readable.",
        ) from error
    for path in candidates:
        if not is_own_folder(path):
            skipped.append(_passed_over(path))
            continue
        damage = find_damage(path, disk)
        if damage is None:
            return FoundCheckpoint(path=path, skipped=tuple(skipped))
        aside = set_aside(path, disk)
        place = "stays where it is" if aside == path else f"is now {aside.name}"
        skipped.append(
            Finding(
                severity="warning",
                code="checkpoint.damaged",
                message=f"Checkpoint {path.name} is damaged: {damage}.",
                why="A run must not go on from numbers that are not those it wrote.",
                fix=f"Nothing to do: an earlier one is used. The damaged one {place}.",
                file=str(aside),
            )
        )
    return FoundCheckpoint(path=None, skipped=tuple(skipped))


def read_checkpoint(path: Path) -> Checkpoint:
    """All of the checkpoint in `path`, verified against its manifest. Nothing is executed.

    Raises:
        RunError: It is damaged.
    """
    from eightgig.adapters.tensors import TensorFileError, read_tensors

    damage = find_damage(path, Disk())
    if damage is not None:
        raise _damaged(path, damage)
    try:
        manifest = read_manifest(path)
        return Checkpoint(
            adapter=read_tensors(path / ADAPTER_NAME),
            optimizer=read_tensors(path / OPTIMIZER_NAME),
            state=_read_state(path),
            identity=RunIdentity(
                fingerprints=manifest.fingerprints,
                versions=manifest.versions,
                settings=manifest.settings,
                cpu_threads=manifest.cpu_threads,
            ),
        )
    except (OSError, ValueError, TensorFileError) as error:
        raise _damaged(path, str(error)) from error


def read_manifest(path: Path) -> CheckpointManifest:
    """The manifest of the checkpoint in `path`, without a look at the other files.

    Raises:
        RunError: It was written by a newer eightgig.
        ValueError: It is damaged.
        OSError: It cannot be read.
    """
    content = _read_bounded(path / MANIFEST_NAME)
    raw = _parse_json(path / MANIFEST_NAME, content)
    is_signed = isinstance(raw, dict) and raw.get("sha256") == manifest_sha256(raw)
    if not is_signed or json_bytes(raw) != content:
        raise ValueError("its manifest is not as it was written")
    if raw.get("format_version") != FORMAT_VERSION:
        raise RunError(
            f"Checkpoint {path.name} has format {raw.get('format_version')!r}.",
            why=f"This eightgig reads format {FORMAT_VERSION}; another version wrote it.",
            fix="Update eightgig, or start a new run.",
        )
    return from_json(CheckpointManifest, raw)


def find_damage(path: Path, disk: Disk) -> str | None:
    """What is wrong with the checkpoint in `path`, in a few words; None when it is intact.

    Raises:
        RunError: It was written by a newer eightgig.
    """
    try:
        manifest = read_manifest(path)
        if set(manifest.files) != set(FILE_NAMES):
            return "its manifest lists other files"
        for name, expected in manifest.files.items():
            _check_file(path / name, expected, disk)
        state = _read_state(path)
        name = path.name.removesuffix(REPLACED_SUFFIX)
        if state.step != manifest.step or name != step_name(state.step):
            return f"it says step {state.step} inside"
    except OSError as error:
        return f"{Path(error.filename or MANIFEST_NAME).name}: {failure_cause(error)}"
    except (ValueError, RecursionError) as error:
        return str(error)
    return None


def _passed_over(path: Path) -> Finding:
    kind = "a link" if path.is_symlink() else "no folder"
    return Finding(
        severity="warning",
        code="checkpoint.passed_over",
        message=f"Checkpoint {path.name} is {kind}: an earlier one is used.",
        why="A run goes on from what lies in its own folder; a link would lead it elsewhere.",
        fix="To go on from it, stop, put the folder itself there and use --resume again; for "
        "another disk, set run.output_dir.",
        file=str(path),
    )


def _check_file(path: Path, expected: CheckpointFile, disk: Disk) -> None:
    """Compare a file with its line of the manifest; a ValueError says how they differ."""
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path.name} is missing")
    size_bytes = path.stat().st_size
    if size_bytes != expected.size_bytes:
        raise ValueError(f"{path.name} has {size_bytes} bytes instead of {expected.size_bytes}")
    if digest_file(path, disk).sha256 != expected.sha256:
        raise ValueError(f"the content of {path.name} is not as it was written")


def json_bytes(value: Any) -> bytes:
    """JSON of `value` (a record or plain JSON) in the one form that checkpoints have it."""
    return (json.dumps(to_json(value), indent=2) + "\n").encode("ascii")


def manifest_sha256(manifest: Mapping[str, Any]) -> str:
    """Hash of a manifest's own content; the rule is the same in every format."""
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json_bytes(content)).hexdigest()


def _read_bounded(path: Path) -> bytes:
    """A file of bounded size; every damage is a ValueError."""
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path.name} is missing")
    size_bytes = path.stat().st_size
    if size_bytes > MAX_JSON_BYTES:
        raise ValueError(f"{path.name} has {format_bytes(size_bytes)}")
    return path.read_bytes()


def _parse_json(path: Path, content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no JSON") from error


def _read_state(path: Path) -> TrainingState:
    """The state in the checkpoint folder `path`; every damage is a ValueError."""
    name = path / STATE_NAME
    state = from_json(TrainingState, _parse_json(name, _read_bounded(name)))
    check_memory(state.guards)
    return state


def _damaged(path: Path, damage: str) -> RunError:
    return RunError(
        f"Checkpoint {path.name} is damaged: {damage}.",
        why="A run must not go on from numbers that are not those it wrote.",
        fix="Run with --resume: it takes the newest intact checkpoint.",
    )
