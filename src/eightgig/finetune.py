"""The whole tool on one page: from a config and data to an adapter.

Each line is one part; each part lives in the module it is imported from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from eightgig.config import Config, store_folder
from eightgig.hardware.allocator import prepare_allocator
from eightgig.run import check_run, create_run, describe_environment, log_to, write_json, writing_to

if TYPE_CHECKING:
    from eightgig.training.step import StepReport

Observe = Callable[[object], None]


def finetune(
    config: Config,
    *,
    resume: bool = False,
    allow_changed_versions: bool = False,
    observe: Observe = lambda _: None,
) -> Iterator[StepReport]:
    """Fine-tune as `config` says; afterwards the run folder holds the adapter.

    Args:
        config: All settings.
        resume: Go on from the newest intact checkpoint of the run.
        allow_changed_versions: Go on also where a library is of another version than before.
        observe: Called with every finding, choice, plan, event and line of text on the way.

    Yields:
        One report per optimizer step.

    Raises:
        EightgigError: Something the user can act on; see its subclasses.
        KeyboardInterrupt: A signal stopped the run, after saving it.
    """
    prepare_allocator()  # before torch is imported

    from eightgig.data.load import load_dataset
    from eightgig.data.tokenizer import load_tokenizer
    from eightgig.engine.assemble import describe_trainable
    from eightgig.hardware.calibrate import with_measured_rates
    from eightgig.hardware.probe import probe
    from eightgig.memory.fit import bind_layout, fit_rows, refuse_misfit
    from eightgig.memory.ladder import keep_rungs
    from eightgig.models.find import find_base_model
    from eightgig.quant.fetch import checkpoint_of
    from eightgig.quant.store import check_store, is_prepared, open_store
    from eightgig.training.card import data_facts
    from eightgig.training.deliver import deliver_adapter
    from eightgig.training.load import load_engine
    from eightgig.training.lock import lock_run
    from eightgig.training.loop import Job, train
    from eightgig.training.monitor import require_reporting
    from eightgig.training.resume import begin

    require_reporting(config.run.report_to)
    planned_before = check_run(config, resume=resume).plan_path
    stores = store_folder(config.model)
    found = find_base_model(config.model, store_folder=stores, show=observe)
    tokenizer = load_tokenizer(found.folder, config.data.chat_template)
    rows, held_out, findings = load_dataset(
        config.data, tokenizer, seed=config.train.seed, cache_dir=stores / "tokens"
    )
    hardware = with_measured_rates(probe(config.memory.device, stores))
    plan, rows, held_out, cuts = fit_rows(
        found.spec,
        hardware,
        bind_layout(config, planned_before),
        (rows, held_out),
        is_prepared=is_prepared(found, config.model),
    )
    plan = keep_rungs(plan, config, planned_before)
    for item in (*findings, *cuts, plan):
        observe(item)
    refuse_misfit(plan, hardware)
    check_store(found.spec, checkpoint_of(found), config.model)

    run = create_run(config, resume=resume)
    with lock_run(run), log_to(run):
        with writing_to(run.folder):
            write_json(run.plan_path, plan)
            write_json(run.environment_path, describe_environment(device=hardware.name))
        store = open_store(
            found.spec,
            checkpoint_of(found),
            config.model,
            device=plan.device,
            progress=observe,
        )
        source = (found.spec, store)
        loaded = load_engine(run, config, source, plan, observe)
        engine, plan = loaded.engine, loaded.plan
        for item in (*engine.choices, describe_trainable(engine, found.spec.decoder)):
            observe(item)
        allow, data = allow_changed_versions, (rows, held_out)
        start = begin(run, config, loaded, source, data, observe, allow_changed_versions=allow)
        with writing_to(run.folder):
            write_json(run.data_path, data_facts(rows, held_out, tokenizer))
        job = Job(run, config, found.spec, plan, rows, held_out, store, engine, start)
        yield from train(job, observe)
        deliver_adapter(job, tokenizer)
