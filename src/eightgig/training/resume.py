"""Where a run begins: at the start, from another adapter, or at its newest intact checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from eightgig.adapters.files import read_adapter
from eightgig.adapters.lora import Adapter
from eightgig.config import Config, LoraConfig, write_config
from eightgig.data.batches import Dataset
from eightgig.disk import Disk
from eightgig.errors import ModelError, RunError
from eightgig.models.spec import ModelSpec
from eightgig.quant.store import Store
from eightgig.run import Run, write_atomically, writing_to
from eightgig.training.checkpoint import TrainingState, find_checkpoint, read_checkpoint
from eightgig.training.guards import forget_speed
from eightgig.training.identity import (
    VERSION_CODE,
    RunIdentity,
    explain_differences,
    identify_run,
    model_fingerprint,
)
from eightgig.training.load import Loaded
from eightgig.training.optimizer import Optimizer
from eightgig.training.rotation import sweep

START = TrainingState(
    step=0,
    rows_seen=0,
    seconds=0.0,
    best_held_out_loss=None,
    best_step=0,
    evaluations_without_gain=0,
    rung=0,
    guards={},
    is_finished=False,
)


def begin(  # noqa: PLR0913 - a run goes on if none of these has changed
    run: Run,
    config: Config,
    loaded: Loaded,
    source: tuple[ModelSpec, Store],
    data: tuple[Dataset, Dataset | None],
    observe: Callable[[object], None],
    *,
    allow_changed_versions: bool = False,
) -> Start:
    """Optimizer and state to train with; the adapter is loaded where there is one to go on from.

    Args:
        run: The run.
        config: Its settings.
        loaded: Model, adapter and optimizer.
        source: The base model and its prepared weights.
        data: The rows trained on, and those held out.
        observe: Called with findings.
        allow_changed_versions: Go on also where a library is of another version.

    Raises:
        ModelError: `lora.init_adapter` does not match.
        RunError: The run changed since its checkpoint, or its folder cannot be written.
    """
    spec, store = source
    adapter, optimizer = loaded.engine.adapter, loaded.optimizer
    assert adapter is not None
    start_adapter(adapter, config.lora, spec)
    rows, held_out = data
    identity = identify_run(
        config,
        data_fingerprint=rows.fingerprint,
        held_out_fingerprint=held_out.fingerprint if held_out else "",
        model_key=model_fingerprint(spec.decoder, store.manifest.key),
        cpu_threads=torch.get_num_threads() if loaded.plan.device == "cpu" else 0,
    )
    accepted = {VERSION_CODE} if allow_changed_versions else set[str]()
    state = resume_run(run, identity, adapter, optimizer, observe, accepted=accepted)
    if state is START:
        # Nothing had been done by whoever made the folder; perhaps with other settings.
        with writing_to(run.folder):
            write_atomically(run.config_path, write_config(config))
    return Start(optimizer=optimizer, identity=identity, state=state)


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Where a run begins.

    Attributes:
        optimizer: What moves the adapter; loaded, if the run goes on.
        identity: What a later part of the run must have in common with this one.
        state: Steps done, and what the guards remember.
    """

    optimizer: Optimizer
    identity: RunIdentity
    state: TrainingState


def start_adapter(adapter: Adapter, lora: LoraConfig, spec: ModelSpec) -> None:
    """Load `lora.init_adapter`, where it is set.

    Raises:
        ModelError: It does not match the model or the settings.
    """
    if lora.init_adapter is None:
        return
    found = read_adapter(Path(lora.init_adapter), spec)
    differing = [
        f"{name}: {getattr(found.lora, name)} there, {getattr(lora, name)} here"
        for name in ("r", "lora_alpha", "use_rslora")
        if getattr(found.lora, name) != getattr(lora, name)
    ]
    if differing:
        raise ModelError(
            f"lora.init_adapter has other settings: {'; '.join(differing)}.",
            why="Its numbers mean something else under another rank or scale.",
            fix="Set the settings of lora to those of the adapter.",
        )
    adapter.load(found.tensors)


def resume_run(
    run: Run,
    identity: RunIdentity,
    adapter: Adapter,
    optimizer: Optimizer,
    observe: Callable[[object], None],
    *,
    accepted: Collection[str] = (),
) -> TrainingState:
    """Load the newest intact checkpoint of `run`; `START` where there is none.

    Args:
        run: The run.
        identity: What it is now.
        adapter, optimizer: Take what the checkpoint holds.
        observe: Called with findings.
        accepted: Codes of differences that do not stand in the way.

    Raises:
        RunError: The settings, the data, the model or a library changed since then.
    """
    found = find_checkpoint(run)
    for finding in found.skipped:
        observe(finding)
    if found.path is None:
        return START
    checkpoint = read_checkpoint(found.path)
    differences = explain_differences(checkpoint.identity, identity)
    differences = [
        replace(finding, severity="warning") if finding.code in accepted else finding
        for finding in differences
    ]
    errors = [finding for finding in differences if finding.severity == "error"]
    if errors:
        raise RunError(
            f"The run cannot go on from {found.path.name}: " + "; ".join(f.message for f in errors),
            why=errors[0].why,
            fix=errors[0].fix,
            findings=errors,
        )
    for finding in differences:
        observe(finding)
    adapter.load(checkpoint.adapter)
    if checkpoint.optimizer:
        optimizer.load_state_tensors(checkpoint.optimizer)
    # Only now: all that is damaged has been set aside, so what is swept was replaced by better.
    sweep(run.checkpoints_path, Disk())
    return replace(checkpoint.state, guards=forget_speed(checkpoint.state.guards))
