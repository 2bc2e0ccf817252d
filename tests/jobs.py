"""Trainings of tiny models without tokenizer and planner: tenths of a second each, on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eightgig.config import Config, DataConfig, LoraConfig, ModelConfig, RunConfig, TrainConfig
from eightgig.data.batches import IGNORE_INDEX, Dataset
from eightgig.memory.plan import Plan
from eightgig.models.checkpoint import read_model_spec
from eightgig.models.spec import ModelSpec
from eightgig.quant.store import Store, open_store
from eightgig.run import create_run
from eightgig.training.load import load_engine
from eightgig.training.loop import Job, train
from eightgig.training.resume import begin
from eightgig.training.step import StepReport
from tests import engines
from tests.tiny_run import make_tame_model

_FIRST_TEXT_ID = 32
PERIOD = 5


def make_base(folder: Path, family: str = "gemma4_e2b") -> Path:
    """A tiny model that guesses at first, as the guards want it."""
    return make_tame_model(family, folder)


def make_rows(count: int, *, seed: int = 0, vocab_size: int = 128, shortest: int = 9) -> Dataset:
    """Rows of `shortest` to twice as many tokens that repeat a pattern, half of them trained."""
    rng = np.random.default_rng(seed)
    ids, labels, offsets = [], [], [0]
    for number in range(count):
        length = shortest + number % shortest
        pattern = rng.integers(_FIRST_TEXT_ID, vocab_size, PERIOD)
        row = np.resize(pattern, length)
        ids.append(row)
        labels.append(np.where(np.arange(length) >= length // 2, row, IGNORE_INDEX))
        offsets.append(offsets[-1] + length)
    return Dataset(
        input_ids=np.concatenate(ids).astype(np.int32),
        labels=np.concatenate(labels).astype(np.int32),
        offsets=np.array(offsets, np.int64),
        row_ids=np.arange(count, dtype=np.int64),
        fingerprint=f"rows {count} {seed} {shortest}",
        summary={},
    )


def make_config(
    base: Path,
    output_dir: Path,
    *,
    lora: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    **train_options: Any,
) -> Config:
    """A run of 6 steps of 6 rows."""
    options = {
        "max_steps": 6,
        "gradient_accumulation_steps": 6,
        "learning_rate": 5e-3,
        "trial": False,
        **train_options,
    }
    return Config(
        model=ModelConfig(name=str(base), quantization="none", cache_dir=str(base.parent)),
        data=DataConfig(path="rows", **(data or {})),
        lora=LoraConfig(**{"r": 4, "lora_alpha": 8, **(lora or {})}),
        train=TrainConfig(**options),
        run=RunConfig(**{"name": "run", "output_dir": str(output_dir), **(run or {})}),
    )


def make_job(
    config: Config,
    *,
    rows: Dataset | None = None,
    held_out: Dataset | None = None,
    plan: Mapping[str, Any] | None = None,
    resume: bool = False,
    observe: Callable[[object], None] = lambda _: None,
    allow_changed_versions: bool = False,
) -> Job:
    """The job of `config`, as `finetune` makes it."""
    base = Path(config.model.name)
    spec = read_model_spec(base)
    rows = make_rows(60) if rows is None else rows
    layout = {"micro_batch_tokens": 40, "layer_slots": 4, **(plan or {})}
    planned = engines.make_plan(**layout)
    store = open_store(spec, base, config.model, device=planned.device)
    return assemble_job(
        config,
        (spec, store),
        planned,
        (rows, held_out),
        resume=resume,
        observe=observe,
        allow_changed_versions=allow_changed_versions,
    )


def assemble_job(
    config: Config,
    source: tuple[ModelSpec, Store],
    plan: Plan,
    data: tuple[Dataset, Dataset | None],
    *,
    resume: bool = False,
    observe: Callable[[object], None] = lambda _: None,
    allow_changed_versions: bool = False,
) -> Job:
    """The job of a model and its prepared weights, whatever they are."""
    run = create_run(config, resume=resume)
    loaded = load_engine(run, config, source, plan, observe)
    allow = allow_changed_versions
    start = begin(run, config, loaded, source, data, observe, allow_changed_versions=allow)
    (spec, store), (rows, held_out) = source, data
    return Job(run, config, spec, loaded.plan, rows, held_out, store, loaded.engine, start)


def finish(job: Job, observe: Callable[[object], None] = lambda _: None) -> list[StepReport]:
    """Train to the end."""
    return list(train(job, observe))


def adapter_of(job: Job) -> torch.Tensor:
    """All numbers of the adapter, copied."""
    assert job.engine.adapter is not None
    return job.engine.adapter.whole.clone()


def codes(seen: Sequence[object]) -> list[str]:
    """Codes of the findings among what was observed."""
    return [item.code for item in seen if hasattr(item, "code")]


def events(seen: Sequence[object], kind: str) -> list[Mapping[str, Any]]:
    """Values of the events of a kind."""
    return [item.values for item in seen if getattr(item, "kind", None) == kind]
