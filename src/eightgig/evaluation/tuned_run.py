"""A finished run opened again: its settings, rows, base model, adapter, and an engine with both.

Everything comes from the run folder (`config.yaml`, `adapter/`); the plan is made anew, for the
machine as it is now.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from eightgig.adapters.files import AdapterFolder, read_adapter
from eightgig.config import Config, read_config, store_folder
from eightgig.data.batches import Dataset
from eightgig.data.formats import Example
from eightgig.data.load import load_dataset
from eightgig.data.render import Renderer
from eightgig.data.rules import Notes
from eightgig.data.tokenizer import RenderSettings, load_tokenizer, render_settings, stop_ids
from eightgig.engine.assemble import Engine, assemble
from eightgig.engine.generate import row_bytes
from eightgig.errors import DataError, Finding, RunError
from eightgig.hardware.probe import probe
from eightgig.memory.fit import fit_rows, refuse_misfit
from eightgig.memory.plan import Plan, make_plan
from eightgig.models.find import FoundModel, find_base_model
from eightgig.quant.fetch import checkpoint_of
from eightgig.quant.store import is_prepared, open_store
from eightgig.run import Run, refuse_links

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Observe = Callable[[object], None]

_MEMORY_GROUP = "memory."
# The ring needs as many to copy one layer while another computes.
_FEWEST_SLOTS = 3
# Rows that are answered together where memory allows; layers give way to them.
_WANTED_ROWS = 16
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class TunedRun:
    """A run that has ended, and what belongs to it.

    Attributes:
        run: Its folder.
        config: Its settings.
        base: The model it was trained on.
        adapter: What was trained.
        tokenizer: As saved with the adapter, with the template that rows were rendered with.
        settings: The same, as rendering wants it.
        stop_ids: Tokens that end an answer.
    """

    run: Run
    config: Config
    base: FoundModel
    adapter: AdapterFolder
    tokenizer: PreTrainedTokenizerFast
    settings: RenderSettings
    stop_ids: frozenset[int]


class PlannedRows(NamedTuple):
    """The rows of a run as it was trained, and a plan for this machine."""

    rows: Dataset
    held_out: Dataset
    plan: Plan


def find_run(folder: Path) -> Run:
    """The run in `folder`, which must have ended.

    Raises:
        RunError: There is none, it has no adapter yet, or holds links.
    """
    run = Run(folder=folder.absolute())
    if not run.config_path.is_file():
        raise RunError(
            f"There is no run in {folder}.",
            why="The folder of a run holds its config.yaml.",
            fix="Name the folder that eightgig train wrote, such as runs/first.",
        )
    if not (run.adapter_path / "adapter_config.json").is_file():
        raise RunError(
            f"The run in {folder} has no adapter.",
            why="It is written when the run has reached its end.",
            fix=f"Let the run end: eightgig train {run.config_path} --resume",
        )
    refuse_links(run.folder)
    return run


def open_run(folder: Path, observe: Observe, *, overrides: Sequence[str] = ()) -> TunedRun:
    """Everything of a run but its rows and its weights.

    Args:
        folder: The run folder.
        observe: Called with lines of text on the way.
        overrides: `memory.NAME=VALUE` settings for this machine; no other group has an effect.

    Raises:
        EightgigError: The run has not ended, or something of it is missing or damaged.
    """
    run = find_run(folder)
    foreign = [text for text in overrides if not text.strip().startswith(_MEMORY_GROUP)]
    if foreign:
        raise RunError(
            f"--set {foreign[0]} has no effect on a run that has ended.",
            why="Only settings of the group memory may differ from the training.",
            fix="Leave it out, or set memory.device, memory.budget or the like.",
        )
    config = read_config(run.config_path, overrides)
    base = find_base_model(config.model, store_folder=store_folder(config.model), show=observe)
    # The template was saved with the tokenizer; a setting matters only where it is `none`.
    template = config.data.chat_template
    tokenizer = load_tokenizer(run.adapter_path, template if template == "none" else None)
    settings = render_settings(tokenizer, template)
    stops = stop_ids(tokenizer) | frozenset(base.spec.eos_token_ids) | _end_of_turn(settings)
    return TunedRun(
        run=run,
        config=config,
        base=base,
        adapter=read_adapter(run.adapter_path, base.spec),
        tokenizer=tokenizer,
        settings=settings,
        stop_ids=stops,
    )


def plan_rows(
    tuned: TunedRun,
    observe: Observe,
    *,
    change: Callable[[Dataset], Dataset] | None = None,
) -> PlannedRows:
    """The rows of a run, split as they were for training, and a plan for them.

    Args:
        tuned: The run.
        observe: Called with the plan, and with a finding where the rows are not those trained on.
        change: Makes other training rows of them; those that grew too long are left out.

    Raises:
        DataError: The data cannot be read any more, or no row was held out.
        DoesNotFitError: The model does not fit this machine.
    """
    config = tuned.config
    rows, held_out, _ = load_dataset(config.data, tuned.tokenizer, seed=config.train.seed)
    if held_out is None:
        raise DataError(
            f"The run in {tuned.run.folder} has no held-out rows.",
            why="Rows that were trained on say nothing about how the model answers others.",
            fix="Train with `data.held_out` above 0, or with `data.held_out_path`.",
        )
    if change is not None:
        rows = change(rows)
        config = replace(config, data=replace(config.data, too_long="drop"))
    hardware = probe(config.memory.device, store_folder(config.model))
    plan, rows, held_out, _ = fit_rows(
        tuned.base.spec,
        hardware,
        config,
        (rows, held_out),
        is_prepared=is_prepared(tuned.base, config.model),
    )
    observe(plan)
    refuse_misfit(plan, hardware)
    assert held_out is not None
    trained_on = _trained_fingerprint(tuned.run)
    if change is None and trained_on not in (None, rows.fingerprint):
        observe(
            Finding(
                severity="warning",
                code="evaluation.data_changed",
                message="The rows are not those of the training: data or settings have changed.",
                why="Rows that are held out now may have been trained on.",
                fix="Restore the data file of the training, or do not trust the result.",
                file=str(tuned.run.config_path),
            )
        )
    return PlannedRows(rows=rows, held_out=held_out, plan=plan)


def plan_conversation(tuned: TunedRun) -> Plan:
    """A plan for rows as long as the settings allow, or as fit.

    Raises:
        DoesNotFitError: The model does not fit this machine.
    """
    config = tuned.config
    hardware = probe(config.memory.device, store_folder(config.model))
    plan = make_plan(
        tuned.base.spec, hardware, config, is_prepared=is_prepared(tuned.base, config.model)
    )
    refuse_misfit(plan, hardware)
    return plan


def build_engine(tuned: TunedRun, plan: Plan, observe: Observe) -> Engine:
    """The base model with the run's adapter on it; `Model.use_adapter` switches between them.

    Raises:
        ModelError: The store or the adapter is damaged, or does not match.
    """
    spec, config = tuned.base.spec, tuned.config.model
    store = open_store(
        spec, checkpoint_of(tuned.base), config, device=plan.device, progress=observe
    )
    engine = assemble(spec, store, plan, tuned.adapter.lora)
    assert engine.adapter is not None
    engine.adapter.load(tuned.adapter.tensors)
    return engine


def answer_bytes(plan: Plan) -> int:
    """Device bytes that answers may take: the free part of the budget, and what only a backward
    pass needs.
    """
    only_training = plan.breakdown.get("hidden", 0) + plan.breakdown.get("checkpoints", 0)
    return plan.budget_bytes - plan.peak_bytes + only_training


def with_room(
    plan: Plan,
    tuned: TunedRun,
    prompt_tokens: int,
    new_tokens: int,
    *,
    num_rows: int = _WANTED_ROWS,
) -> Plan:
    """`plan` with fewer resident layers, where their memory lets more answers run together.

    Every token of an answer takes one visit of all weights, shared by all rows of a batch: rows
    are worth more than layers that need not be copied.

    Args:
        plan: As made for training.
        tuned: The run.
        prompt_tokens, new_tokens: Of the longest row.
        num_rows: Rows that shall run together.
    """
    slot_bytes = (
        plan.breakdown.get("layer_slots", 0) + plan.breakdown.get("resident_layers", 0)
    ) // plan.layer_slots
    item_bytes = _ITEM_BYTES[plan.compute_dtype]
    each = row_bytes(tuned.base.spec.decoder, prompt_tokens, new_tokens, item_bytes)
    missing = num_rows * each - answer_bytes(plan)
    if missing <= 0 or plan.layer_slots <= _FEWEST_SLOTS or not slot_bytes:
        return plan
    given = min(-(-missing // slot_bytes), plan.layer_slots - _FEWEST_SLOTS)
    return replace(
        plan,
        layer_slots=plan.layer_slots - given,
        peak_bytes=plan.peak_bytes - given * slot_bytes,
    )


def _end_of_turn(settings: RenderSettings) -> frozenset[int]:
    """The token that a trained answer ends with; none where turns have no end of their own."""
    if settings.chat_template is None:
        return frozenset()
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    rows = Renderer(settings).render(Example(messages=turns, trained=(1,)), Notes(file="", line=0))
    return frozenset(int(row.input_ids[row.is_trained][-1]) for row in rows)


def _trained_fingerprint(run: Run) -> str | None:
    """Fingerprint of the rows that the run was trained on; None where no checkpoint says it."""
    manifests = sorted(run.checkpoints_path.glob("step-*/manifest.json"))
    if not manifests:
        return None
    try:
        found = json.loads(manifests[-1].read_text(encoding="utf-8"))["fingerprints"]["data"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return found if isinstance(found, str) else None
