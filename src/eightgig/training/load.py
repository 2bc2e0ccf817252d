"""The engine and its optimizer, on the highest rung that there is memory for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from eightgig.config import Config
from eightgig.engine.assemble import Engine, assemble
from eightgig.memory.plan import Plan
from eightgig.models.spec import ModelSpec
from eightgig.quant.store import Store
from eightgig.run import Event, Run, append_json_line
from eightgig.training.memory import OutOfMemory, attempt, go_down
from eightgig.training.optimizer import Optimizer, make_optimizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """What trains, in memory.

    Attributes:
        engine: Model, adapter and gradients.
        optimizer: What moves the adapter, with its moments.
        plan: The layout that there was memory for.
    """

    engine: Engine
    optimizer: Optimizer
    plan: Plan


def load_engine(
    run: Run,
    config: Config,
    source: tuple[ModelSpec, Store],
    plan: Plan,
    observe: Callable[[object], None],
) -> Loaded:
    """Assemble what `plan` says; out of memory, one rung further down.

    Args:
        run: Where a lower rung is written down.
        config: Settings of adapter and optimizer.
        source: The model and its prepared weights.
        plan: What lies where.
        observe: Called with an `Event` for each rung.

    Raises:
        DoesNotFitError: There is nothing left to give up.
        ModelError: `lora.target_modules` matches nothing, or the store is damaged.
        HardwareError: An operation or the optimizer cannot run on this device.
    """
    while True:
        result = attempt(partial(_load, config, source, plan))
        if not isinstance(result, OutOfMemory):
            return result
        rung = go_down(run, plan, result, where="while loading")
        plan = rung.plan
        event = Event(step=0, kind="oom", values=rung.values)
        with suppress(OSError):  # a full disk costs the line, not the run
            append_json_line(run.events_path, event)
        observe(event)


def _load(config: Config, source: tuple[ModelSpec, Store], plan: Plan) -> Loaded:
    spec, store = source
    engine = assemble(spec, store, plan, config.lora, seed=config.train.seed)
    assert engine.adapter is not None and engine.gradients is not None
    optimizer = make_optimizer(engine.adapter, engine.gradients, config.train)
    return Loaded(engine=engine, optimizer=optimizer, plan=plan)
