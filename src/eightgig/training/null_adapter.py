"""The null adapter: trained as the run was, on answers shuffled among its rows.

Shuffled answers look like the right ones and have nothing to do with their questions. What such an
adapter gains over the base model is form; only what the tuned adapter gains over it is content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from eightgig.data.batches import IGNORE_INDEX, Dataset, random_order
from eightgig.errors import DataError
from eightgig.evaluation.questions import read_questions
from eightgig.evaluation.tuned_run import open_run, plan_rows
from eightgig.quant.fetch import checkpoint_of
from eightgig.quant.store import open_store
from eightgig.run import Run, create_run, log_to
from eightgig.training.deliver import deliver_adapter
from eightgig.training.load import load_engine
from eightgig.training.lock import lock_run
from eightgig.training.loop import Job, train
from eightgig.training.resume import Start, begin
from eightgig.training.step import StepReport

NULL_NAME = "null-adapter"
"""Run folder inside that of the run."""

_STREAM = 0x5417_FFED
# What these guards take for a fault is to be expected of answers to other questions: a loss above
# that of guessing in the beginning, and one that hardly falls.
_EXCUSED_GUARDS = frozenset({"first_loss", "flat"})


def null_adapter_path(folder: Path) -> Path:
    """Where the null adapter of the run in `folder` lies."""
    return Run(folder=folder.absolute() / NULL_NAME).adapter_path


def train_null_adapter(
    folder: Path, observe: Callable[[object], None], *, overrides: Sequence[str] = ()
) -> Iterator[StepReport]:
    """Train the null adapter of a run; one that is there is left as it is.

    Args:
        folder: The run folder; the null adapter's is inside it.
        observe: As for `finetune`.
        overrides: `memory.NAME=VALUE` settings for this machine.

    Yields:
        One report per optimizer step.

    Raises:
        EightgigError: As `finetune` and `open_run` do.
    """
    if null_adapter_path(folder).is_dir():
        return
    tuned = open_run(folder, observe, overrides=overrides)
    config = replace(
        tuned.config,
        # What shuffled answers do to a loss is no trial of anything.
        train=replace(tuned.config.train, trial=False),
        run=replace(tuned.config.run, name=NULL_NAME, output_dir=str(tuned.run.folder)),
    )
    rows, held_out, plan = plan_rows(
        tuned, observe, change=partial(shuffle_answers, seed=config.train.seed)
    )
    observe(f"null adapter: {rows.num_rows:,} rows with shuffled answers")
    run = create_run(config, resume=True)
    with lock_run(run), log_to(run):
        spec = tuned.base.spec
        store = open_store(
            spec, checkpoint_of(tuned.base), config.model, device=plan.device, progress=observe
        )
        loaded = load_engine(run, config, (spec, store), plan, observe)
        start = _excused(begin(run, config, loaded, (spec, store), (rows, None), observe))
        job = Job(run, config, spec, loaded.plan, rows, held_out, store, loaded.engine, start)
        yield from train(job, observe)
        deliver_adapter(job, tuned.tokenizer)


def _excused(start: Start) -> Start:
    """`start` with guards that have said already what the shuffled answers would make them say."""
    guards = start.state.guards
    said = sorted(_EXCUSED_GUARDS.union(guards.get("said", ())))
    return replace(start, state=replace(start.state, guards={**guards, "said": said}))


def shuffle_answers(rows: Dataset, *, seed: int) -> Dataset:
    """`rows` with their last answers exchanged at random; only these are trained.

    Rows without a question are left out.

    Args:
        rows: Training rows.
        seed: Of the order.

    Raises:
        DataError: Fewer than two rows have a question.
    """
    questions = read_questions(rows)
    if len(questions) < 2:
        raise DataError(
            "There is no null adapter for these rows: they have no questions.",
            why="It is trained on answers exchanged among rows; plain text has none.",
            fix="Leave out --null.",
        )
    order = random_order(len(questions), seed=seed, stream=_STREAM)
    # Each row takes the answer of its neighbour in a random order: never its own.
    given = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    ids: list[int] = []
    labels: list[int] = []
    offsets = [0]
    for number, question in enumerate(questions):
        answer = questions[given[number]].answer
        ids += (*question.prompt, *answer)
        labels += (*[IGNORE_INDEX] * len(question.prompt), *answer)
        offsets.append(len(ids))
    input_ids = np.array(ids, np.int32)
    kept = [question.row for question in questions]
    return Dataset(
        input_ids=input_ids,
        labels=np.array(labels, np.int32),
        offsets=np.array(offsets, np.int64),
        row_ids=rows.row_ids[kept],
        fingerprint=hashlib.sha256(input_ids.tobytes()).hexdigest(),
        summary=rows.summary,
        lines=None if rows.lines is None else rows.lines[kept],
    )
