"""What every model does in an evaluation: loss of rows and of general text, answers, labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from eightgig.data.batches import Dataset
from eightgig.engine.assemble import Engine
from eightgig.engine.generate import Allowed, AnswerLimits, answer_prompts
from eightgig.evaluation.forgetting import general_rows, read_general_text
from eightgig.evaluation.labels import LabelTrie, find_labels
from eightgig.evaluation.loss import RowLosses, measure_row_losses
from eightgig.evaluation.questions import Question, TokenText, pick_questions, read_questions
from eightgig.evaluation.tuned_run import PlannedRows, TunedRun, answer_bytes, with_room

Observe = Callable[[object], None]

# Training rows that are looked at for labels and for the form of JSON answers.
_MOST_REFERENCES = 5000
# Every token of an answer costs a visit of all weights.
_MOST_ANSWER_TOKENS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationOptions:
    """How a run is evaluated.

    Attributes:
        max_answers: Held-out rows whose answers are generated, spread over all; 0: none.
        max_new_tokens: Tokens of an answer; None: a quarter more than the longest reference.
        has_general_text: Whether forgetting is measured.
        general_text: Text to measure it on; None: the shipped one.
        null_adapter: Folder of an adapter trained on shuffled answers, to compare with.
        seed: Of the resampling.
    """

    max_answers: int = 200
    max_new_tokens: int | None = None
    has_general_text: bool = True
    general_text: Path | None = None
    null_adapter: Path | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What there is to do.

    Attributes:
        tuned: The run.
        planned: Its rows, and the plan of the engine.
        general: Rows of general text, None where forgetting is not measured.
        questions: What is answered.
        references: Texts of the right answers.
        known_answers: Texts of answers that were trained, and of the right ones.
        labels: Tokens of each label, None where answers are no labels.
        text: Tokens to text.
        max_new_tokens: Of an answer.
    """

    tuned: TunedRun
    planned: PlannedRows
    general: Dataset | None
    questions: tuple[Question, ...]
    references: tuple[str, ...]
    known_answers: tuple[str, ...]
    labels: Mapping[str, tuple[int, ...]] | None
    text: TokenText
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPass:
    """What one model did.

    Attributes:
        losses: Of the held-out rows.
        general: Of the general text.
        answers: Texts, one for each question.
        is_cut: Whether each had not ended at the most tokens allowed.
        labels: The same answers, held to the labels; empty where there are none.
    """

    losses: RowLosses
    general: RowLosses | None
    answers: tuple[str, ...]
    is_cut: tuple[bool, ...]
    labels: tuple[str, ...]


def prepare_work(tuned: TunedRun, planned: PlannedRows, options: EvaluationOptions) -> Work:
    """Questions, labels and texts that the rows of a run give.

    Raises:
        DataError: The general text cannot be read.
    """
    questions = pick_questions(read_questions(planned.held_out), options.max_answers)
    text = TokenText(tuned.tokenizer, tuned.stop_ids)
    references = tuple(text.answer(question.answer) for question in questions)
    trained = pick_questions(read_questions(planned.rows), _MOST_REFERENCES)
    known = [(text.answer(question.answer), question.answer) for question in trained]
    longest = max((len(question.answer) for question in questions), default=0)
    most = options.max_new_tokens or min(longest + longest // 4 + 1, _MOST_ANSWER_TOKENS)
    general = None
    if options.has_general_text:
        paragraphs = read_general_text(options.general_text)
        general = general_rows(paragraphs, tuned.settings, max_length=planned.plan.max_length)
    prompt_tokens = max((len(question.prompt) for question in questions), default=1)
    return Work(
        tuned=tuned,
        planned=planned._replace(plan=with_room(planned.plan, tuned, prompt_tokens, most)),
        general=general,
        questions=questions,
        references=references,
        known_answers=(*(reference for reference, _ in known), *references),
        labels=find_labels(known, references),
        text=text,
        max_new_tokens=most,
    )


def run_model(
    work: Work, engine: Engine, name: str, observe: Observe, *, has_adapter: bool
) -> ModelPass:
    """Everything in `work`, by one model.

    Args:
        work: What there is to do.
        engine: Base model and adapter.
        name: Of the model, for people.
        observe: Called with lines of text on the way.
        has_adapter: Whether the adapter is on.
    """
    engine.model.use_adapter(has_adapter)
    plan, packing = work.planned.plan, work.tuned.config.data.packing
    observe(f"{name}: loss of {work.planned.held_out.num_rows:,} held-out rows")
    losses = measure_row_losses(engine.model, work.planned.held_out, plan, packing)
    general = None
    if work.general is not None:
        general = measure_row_losses(engine.model, work.general, plan)
    answers = _answer(work, engine, name, observe, max_new_tokens=work.max_new_tokens)
    labels: list[list[int]] = []
    if work.labels is not None:
        allowed = LabelTrie(work.labels).allowed
        most = max(map(len, work.labels.values()))
        labels = _answer(
            work, engine, f"{name}, labels", observe, max_new_tokens=most, allowed=allowed
        )
    return ModelPass(
        losses=losses,
        general=general,
        answers=tuple(map(work.text.answer, answers)),
        is_cut=tuple(ids[-1] not in work.tuned.stop_ids for ids in answers),
        labels=tuple(map(work.text.answer, labels)),
    )


def _answer(
    work: Work,
    engine: Engine,
    name: str,
    observe: Observe,
    *,
    max_new_tokens: int,
    allowed: Allowed | None = None,
) -> list[list[int]]:
    count = len(work.questions)
    return answer_prompts(
        engine.model,
        engine.ops,
        [question.prompt for question in work.questions],
        AnswerLimits(
            max_new_tokens=max_new_tokens,
            stop_ids=work.tuned.stop_ids,
            memory_bytes=answer_bytes(work.planned.plan),
            micro_batch_tokens=work.planned.plan.micro_batch_tokens,
        ),
        allowed=allowed,
        progress=lambda done: observe(f"{name}: {done:,} of {count:,} answers"),
    )
