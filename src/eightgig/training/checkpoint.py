"""Checkpoints: `checkpoints/step-000120/{manifest.json, adapter_model.safetensors,
optimizer.safetensors, state.json}`; data only, never executed on load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORMAT_VERSION = 1


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
        fingerprints: Hashes a resumed run must agree with: config, data, model, plan.
        versions: Versions of eightgig and the libraries that decide results.
    """

    format_version: int
    step: int
    files: Mapping[str, CheckpointFile]
    fingerprints: Mapping[str, str]
    versions: Mapping[str, str]


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
