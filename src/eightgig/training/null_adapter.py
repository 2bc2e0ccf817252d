"""The null adapter: trained as the run was, on answers shuffled among its rows.

Shuffled answers look like the right ones and have nothing to do with their questions. What such an
adapter gains over the base model is form; only what the tuned adapter gains over it is content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from eightgig.data.batches import IGNORE_INDEX, Dataset, random_order
from eightgig.engine.assemble import assemble
from eightgig.errors import DataError
from eightgig.evaluation.questions import read_questions
from eightgig.evaluation.tuned_run import open_run, plan_rows
from eightgig.quant.fetch import checkpoint_of
from eightgig.quant.store import open_store
from eightgig.run import Run, create_run, log_to
from eightgig.training.deliver import deliver_adapter
from eightgig.training.lock import lock_run
from eightgig.training.loop import Job, train
from eightgig.training.resume import begin
from eightgig.training.step import StepReport

NULL_NAME = "null-adapter"
"""Run folder inside that of the run."""

_STREAM = 0x5417_FFED


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
    planned = plan_rows(tuned, observe)
    config = replace(
        tuned.config,
        run=replace(tuned.config.run, name=NULL_NAME, output_dir=str(tuned.run.folder)),
    )
    rows = shuffle_answers(planned.rows, seed=config.train.seed, max_length=planned.plan.max_length)
    observe(f"null adapter: {rows.num_rows:,} rows with shuffled answers")
    run = create_run(config, resume=True)
    with lock_run(run), log_to(run):
        spec, plan = tuned.base.spec, planned.plan
        store = open_store(
            spec, checkpoint_of(tuned.base), config.model, device=plan.device, progress=observe
        )
        engine = assemble(spec, store, plan, config.lora, seed=config.train.seed)
        start = begin(run, config, engine, (spec, store), rows, observe)
        job = Job(run, config, spec, plan, rows, planned.held_out, engine, start)
        yield from train(job, observe)
        deliver_adapter(job, tuned.tokenizer)
        engine.close()


def shuffle_answers(rows: Dataset, *, seed: int, max_length: int) -> Dataset:
    """`rows` with their last answers exchanged at random; only these are trained.

    Rows without a question, and those that grow beyond `max_length`, are left out.

    Args:
        rows: Training rows.
        seed: Of the order.
        max_length: Longest row in tokens.

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
    ids: list[tuple[int, ...]] = []
    labels: list[tuple[int, ...]] = []
    kept: list[int] = []
    for number, question in enumerate(questions):
        answer = questions[given[number]].answer
        row = (*question.prompt, *answer)
        if len(row) <= max_length:
            ids.append(row)
            labels.append((*(IGNORE_INDEX for _ in question.prompt), *answer))
            kept.append(question.row)
    lengths = [len(row) for row in ids]
    input_ids = np.concatenate([np.array(row, np.int32) for row in ids])
    return Dataset(
        input_ids=input_ids,
        labels=np.concatenate([np.array(row, np.int32) for row in labels]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        row_ids=rows.row_ids[kept],
        fingerprint=hashlib.sha256(input_ids.tobytes()).hexdigest(),
        summary=rows.summary,
        lines=None if rows.lines is None else rows.lines[kept],
    )
