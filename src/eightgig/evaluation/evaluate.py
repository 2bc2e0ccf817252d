"""Base against tuned on the held-out rows of a run, in one engine: adapter off, adapter on.

Read top to bottom: open the run, let each model do the same work, compare what they did.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from eightgig.adapters.files import read_adapter
from eightgig.disk import failure_cause
from eightgig.engine.assemble import Engine
from eightgig.errors import Finding, RunError
from eightgig.evaluation.comparison import (
    compare_answers,
    compare_forgetting,
    compare_labels,
    compare_loss,
    compare_null,
    compare_perplexity,
    describe_limits,
    pair_answers,
)
from eightgig.evaluation.forgetting import warn_of_forgetting
from eightgig.evaluation.passes import (
    EvaluationOptions,
    ModelPass,
    Work,
    prepare_work,
    run_model,
)
from eightgig.evaluation.records import FORMAT_VERSION, Evaluation, evaluation_path
from eightgig.evaluation.tuned_run import TunedRun, build_engine, open_run, plan_rows
from eightgig.evaluation.verdict import decide
from eightgig.run import hide_home, to_json, write_atomically

Observe = Callable[[object], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Passes:
    """What each model did; `null` is None where it was not asked for."""

    base: ModelPass
    tuned: ModelPass
    null: ModelPass | None


def evaluate_run(
    folder: Path,
    options: EvaluationOptions,
    observe: Observe = lambda _: None,
    *,
    overrides: Sequence[str] = (),
) -> Evaluation:
    """Compare base and tuned model on the held-out rows of a run; writes `evaluation.json`.

    Args:
        folder: The run folder.
        options: How.
        observe: Called with findings, the plan and lines of text on the way.
        overrides: `memory.NAME=VALUE` settings for this machine.

    Raises:
        RunError: There is no run, it has not ended, or its folder cannot be written.
        DataError: No rows were held out, or a file cannot be used.
        DoesNotFitError: The model does not fit this machine.
        ModelError: Model or adapter is damaged, or they do not match.
    """
    start_seconds = time.monotonic()
    findings: list[Finding] = []

    def hear(item: object) -> None:
        if isinstance(item, Finding):
            findings.append(item)
        observe(item)

    tuned = open_run(folder, hear, overrides=overrides)
    work = prepare_work(tuned, plan_rows(tuned, hear), options)
    engine = build_engine(tuned, work.planned.plan, hear)
    try:
        passes = _run_models(work, engine, options.null_adapter, hear)
    finally:
        engine.close()
    evaluation = _compare(work, passes, options, hear)
    evaluation = evaluation.finished(findings, seconds=time.monotonic() - start_seconds)
    _write(evaluation_path(tuned.run), evaluation)
    return evaluation


def _write(path: Path, evaluation: Evaluation) -> None:
    text = json.dumps(to_json(evaluation), indent=2, ensure_ascii=False) + "\n"
    try:
        write_atomically(path, hide_home(text))
    except OSError as error:
        raise RunError(
            f"The evaluation was not written to {path}: {failure_cause(error)}.",
            why="All of it is kept in that file, for the report and for the model card.",
            fix="Free disk space, or make the run folder writable, and evaluate again.",
        ) from error


def _run_models(work: Work, engine: Engine, null_adapter: Path | None, observe: Observe) -> _Passes:
    base = run_model(work, engine, "base", observe, has_adapter=False)
    tuned = run_model(work, engine, "tuned", observe, has_adapter=True)
    null = None
    if null_adapter is not None:
        _exchange_adapter(engine, null_adapter, work.tuned)
        null = run_model(work, engine, "null adapter", observe, has_adapter=True)
    return _Passes(base=base, tuned=tuned, null=null)


def _exchange_adapter(engine: Engine, folder: Path, tuned: TunedRun) -> None:
    assert engine.adapter is not None
    engine.adapter.load(read_adapter(folder, tuned.base.spec).tensors)
    engine.model.ring.invalidate_changing()


def _compare(
    work: Work, passes: _Passes, options: EvaluationOptions, observe: Observe
) -> Evaluation:
    base, tuned, seed = passes.base, passes.tuned, options.seed
    loss = compare_loss(work, base, tuned, seed=seed)
    answers, json_schema = compare_answers(work, base, tuned, seed=seed)
    labels = compare_labels(work, base, tuned, seed=seed)
    forgetting = compare_forgetting(work, base, tuned, options)
    warning = None if forgetting is None else warn_of_forgetting(forgetting)
    if warning is not None:
        observe(warning)
    deciding = [loss]
    if labels is not None:
        deciding.append(labels.accuracy)
    else:
        deciding.extend(measure for measure in answers if measure.name == "exact_match")
    null = None
    if passes.null is not None:
        null = compare_null(work, base, tuned, passes.null, seed=seed)
    return Evaluation(
        format_version=FORMAT_VERSION,
        run=str(work.tuned.run.folder),
        model=work.tuned.base.spec.name,
        num_rows=work.planned.held_out.num_rows,
        num_answers=len(work.questions),
        loss_tokens=int(base.losses.tokens.sum()),
        loss=loss,
        perplexity=compare_perplexity(work, base, tuned, seed=seed),
        answers=answers,
        json_schema=json_schema,
        labels=labels,
        forgetting=forgetting,
        null=null,
        verdict=decide(deciding),
        notes=describe_limits(work, (("base", base), ("tuned", tuned))),
        pairs=pair_answers(work, base, tuned),
        settings={
            "max_answers": options.max_answers,
            "max_new_tokens": work.max_new_tokens,
            "seed": seed,
        },
    )
