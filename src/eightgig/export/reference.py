"""The trained model's own answers: what every export is compared with.

Two engines may stand for it. The one that was trained, with its base weights in 4 bit where the
run had them so; and the one with the weights that were exported, unquantised, which an export must
equal up to rounding. The first is there always, the second costs the disk a copy of the layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eightgig.data.batches import Dataset
from eightgig.engine.assemble import Engine, assemble
from eightgig.engine.generate import generate, row_bytes
from eightgig.errors import DataError
from eightgig.evaluation.loss import measure_loss
from eightgig.evaluation.questions import pick_questions, read_questions
from eightgig.evaluation.tuned_run import (
    PlannedRows,
    TunedRun,
    answer_bytes,
    build_engine,
    plan_conversation,
    plan_rows,
    with_room,
)
from eightgig.export.answers import Answer, Precision, divergence_of, log_softmax
from eightgig.memory.plan import Plan
from eightgig.models.checkpoint import read_config, read_model_spec
from eightgig.quant.store import open_store

NUM_PROMPTS = 8
NUM_ANSWER_TOKENS = 16
_MOST_PROMPT_TOKENS = 512
_MOST_LOSS_TOKENS = 200_000
_PLACEHOLDER = re.compile(r"(image|video|audio|boi|eoi|boa|eoa)_token_(id|index)")
_ARITHMETIC: Mapping[str, Precision] = {
    "float32": "float32",
    "float16": "16 bit",
    "bfloat16": "bfloat16",
}
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# For runs whose data cannot be read any more.
_OWN_QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Write one sentence about the sea.",
    "What is 7 times 8?",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """What the models are asked.

    Attributes:
        ids: Token ids of each prompt.
        source: Where they come from, in words.
        end_ids: Tokens that end an answer: stops, and placeholders of images and sounds, behind
            which Transformers would look for some.
        held_out: The held-out rows, None where there are none.
    """

    ids: tuple[tuple[int, ...], ...]
    source: str
    end_ids: frozenset[int]
    held_out: Dataset | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """A trained model's answers.

    Attributes:
        answers: To each prompt.
        precision: Of its weights and of its arithmetic, the coarser of the two.
        effect: How far the base model without the adapter diverges from these answers, in nats a
            token: what the training has changed in them.
        loss: Of the held-out rows, None where they were not measured.
        words: What it is, in words.
    """

    answers: tuple[Answer, ...]
    precision: Precision
    effect: float
    loss: float | None
    words: str


def choose_prompts(tuned: TunedRun, observe: Callable[[object], None]) -> tuple[Prompts, Plan]:
    """Prompts of held-out rows, and the plan for a model that answers them.

    Raises:
        DoesNotFitError: The model does not fit this machine.
    """
    end_ids = tuned.stop_ids | _placeholder_ids(tuned.base.folder)
    try:
        planned = plan_rows(tuned, observe)
    except DataError:
        own = Prompts(ids=_own_prompts(tuned), source="questions of eightgig", end_ids=end_ids)
        return own, plan_conversation(tuned)
    ids, source = _row_prompts(planned)
    prompts = Prompts(ids=ids, source=source, end_ids=end_ids, held_out=planned.held_out)
    return prompts, planned.plan


def measure_reference(
    tuned: TunedRun, plan: Plan, prompts: Prompts, observe: Callable[[object], None]
) -> Reference:
    """The answers of the trained model as it was trained.

    Raises:
        EightgigError: The model cannot be loaded.
    """
    is_four_bit = tuned.config.model.quantization == "nf4"
    return _ask(
        tuned,
        plan,
        prompts,
        "4 bit" if is_four_bit else _arithmetic(plan),
        "the model as it was trained" + (", its base in 4 bit" if is_four_bit else ""),
        observe,
    )


def measure_unquantised(
    tuned: TunedRun, plan: Plan, prompts: Prompts, folder: Path, observe: Callable[[object], None]
) -> Reference:
    """The answers of the same adapter on the base weights as their checkpoint holds them.

    Args:
        tuned: With the base model that is exported.
        plan: For these weights.
        prompts: What to ask.
        folder: For the prepared weights; the caller deletes it.
        observe: Told about the preparation.

    Raises:
        EightgigError: The model cannot be loaded.
    """
    model = replace(tuned.config.model, quantization="none", cache_dir=str(folder))
    plain = replace(tuned, config=replace(tuned.config, model=model))
    return _ask(
        plain, plan, prompts, _arithmetic(plan), "the adapter on unquantised weights", observe
    )


def score_merged(
    exported: TunedRun,
    plan: Plan,
    prompts: Prompts,
    answers: Sequence[Answer],
    *,
    merged: Path,
    folder: Path,
) -> tuple[list[NDArray[np.float32]], Precision]:
    """How likely merged weights, read by eightgig's own engine, find each token of `answers`.

    Args:
        exported: The run with the base model that was exported.
        plan: For unquantised weights.
        prompts: What was asked.
        answers: What the trained model answered.
        merged: Folder of the merged model.
        folder: For the prepared weights; the caller deletes it.

    Returns:
        Log-probabilities (T, V) of each answer, and the precision of the arithmetic.

    Raises:
        EightgigError: The model cannot be loaded.
    """
    config = replace(exported.config.model, quantization="none", cache_dir=str(folder))
    spec = read_model_spec(merged)
    plan = with_room(plan, exported, max(map(len, prompts.ids)), NUM_ANSWER_TOKENS)
    store = open_store(spec, merged, config, device=plan.device)
    engine = assemble(spec, store, plan, None)
    try:
        scores = _score(engine, prompts, answers, rows_at_a_time(exported, plan, prompts))
    finally:
        engine.close()
    return scores, _arithmetic(plan)


def rows_at_a_time(tuned: TunedRun, plan: Plan, prompts: Prompts) -> int:
    """Prompts that may be answered together within the plan's memory."""
    each = row_bytes(
        tuned.base.spec.decoder,
        max(map(len, prompts.ids)),
        NUM_ANSWER_TOKENS,
        _ITEM_BYTES[plan.compute_dtype],
    )
    return max(1, min(len(prompts.ids), answer_bytes(plan) // each))


def _ask(
    tuned: TunedRun,
    plan: Plan,
    prompts: Prompts,
    precision: Precision,
    words: str,
    observe: Callable[[object], None],
) -> Reference:
    plan = with_room(plan, tuned, max(map(len, prompts.ids)), NUM_ANSWER_TOKENS)
    engine = build_engine(tuned, plan, observe)
    try:
        rows = rows_at_a_time(tuned, plan, prompts)
        answers = _answer(engine, prompts, rows)
        loss = None
        held_out = prompts.held_out
        if held_out is not None and len(held_out.input_ids) <= _MOST_LOSS_TOKENS:
            loss = measure_loss(engine.model, held_out, plan, tuned.config.data.packing).loss
        engine.model.use_adapter(False)
        base = _score(engine, prompts, answers, rows)
    finally:
        engine.close()
    pairs = zip(answers, base, strict=True)
    effect = np.concatenate([divergence_of(answer.log_probs, other) for answer, other in pairs])
    return Reference(
        answers=tuple(answers),
        precision=precision,
        effect=float(effect.mean()),
        loss=loss,
        words=words,
    )


def _answer(engine: Engine, prompts: Prompts, rows: int) -> list[Answer]:
    """Greedy answers, `rows` prompts at a time."""
    answers: list[Answer] = []
    for start in range(0, len(prompts.ids), rows):
        asked = prompts.ids[start : start + rows]
        made, logits = _generate(engine, asked, prompts.end_ids)
        answers += [
            Answer(ids=tuple(ids), log_probs=log_softmax(values[: len(ids)]))
            for ids, values in zip(made, logits, strict=True)
        ]
    return answers


def _score(
    engine: Engine, prompts: Prompts, answers: Sequence[Answer], rows: int
) -> list[NDArray[np.float32]]:
    """Log-probabilities (T, V) at each place of `answers`, `rows` prompts at a time."""
    scores: list[NDArray[np.float32]] = []
    for start in range(0, len(prompts.ids), rows):
        part = slice(start, start + rows)
        given = [answer.ids for answer in answers[part]]
        _, logits = _generate(engine, prompts.ids[part], frozenset(), given)
        scores += [
            log_softmax(values[: len(ids)]) for ids, values in zip(given, logits, strict=True)
        ]
    return scores


def _generate(
    engine: Engine,
    asked: Sequence[tuple[int, ...]],
    end_ids: frozenset[int],
    given: Sequence[Sequence[int]] | None = None,
) -> tuple[list[list[int]], list[NDArray[np.float32]]]:
    """Tokens that follow on each prompt, and the logits (T, V) before each of them.

    Args:
        engine: With or without its adapter.
        asked: Prompts of one batch.
        end_ids: Tokens that end an answer; the tokens behind it mean nothing.
        given: The tokens that shall follow; None: the likeliest.
    """
    steps: list[NDArray[np.float32]] = []

    def record(made: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
        steps.append(logits.float().cpu().numpy())
        if given is None:
            return logits
        place = len(made[0])
        forced = [ids[min(place, len(ids) - 1)] for ids in given]
        only = torch.full_like(logits, float("-inf"))
        only[torch.arange(len(forced)), forced] = 0.0
        return only

    made: list[list[int]] = [[] for _ in asked]
    num_tokens = NUM_ANSWER_TOKENS if given is None else max(map(len, given))
    tokens = generate(
        engine.model,
        engine.ops,
        asked,
        max_new_tokens=num_tokens,
        stop_ids=end_ids,
        allowed=record,
    )
    with torch.no_grad():
        for step in tokens:
            for ids, token in zip(made, step, strict=True):
                if token is not None:
                    ids.append(token)
    logits = np.stack(steps, axis=1)  # (rows, T, V)
    return made, list(logits)


def _arithmetic(plan: Plan) -> Precision:
    return _ARITHMETIC[plan.compute_dtype]


def _row_prompts(planned: PlannedRows) -> tuple[tuple[tuple[int, ...], ...], str]:
    """Prompts from held-out rows, else from rows trained on, and where they are from."""
    for rows, source in ((planned.held_out, "held-out rows"), (planned.rows, "training rows")):
        short = [q for q in read_questions(rows) if len(q.prompt) <= _MOST_PROMPT_TOKENS]
        if short:
            picked = pick_questions(short, NUM_PROMPTS)
            return tuple(question.prompt for question in picked), source
    # Plain text has no questions: its first half is one.
    return tuple(_beginnings(planned.held_out)), "beginnings of held-out rows"


def _placeholder_ids(folder: Path) -> frozenset[int]:
    """Tokens that stand for an image or a sound, by the model's config."""
    config = read_config(folder)
    named = (value for key, value in config.items() if _PLACEHOLDER.match(key))
    return frozenset(value for value in named if isinstance(value, int))


def _own_prompts(tuned: TunedRun) -> tuple[tuple[int, ...], ...]:
    tokenizer = tuned.tokenizer
    if tokenizer.chat_template is None:
        return tuple(tuple(tokenizer(text)["input_ids"]) for text in _OWN_QUESTIONS)
    return tuple(
        tuple(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
        )
        for text in _OWN_QUESTIONS
    )


def _beginnings(rows: Dataset) -> list[tuple[int, ...]]:
    count = min(NUM_PROMPTS, rows.num_rows)
    places = [number * rows.num_rows // count for number in range(count)]
    beginnings = []
    for row in places:
        ids = rows.input_ids[int(rows.offsets[row]) : int(rows.offsets[row + 1])].tolist()
        beginnings.append(tuple(ids[: min(_MOST_PROMPT_TOKENS, max(1, len(ids) // 2))]))
    return beginnings
