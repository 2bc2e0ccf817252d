"""`eightgig demo`: the usual commands one after the other, on the embedded model and its data."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eightgig.cli.progress import TrainingView
from eightgig.config import (
    DEMO_MODEL,
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from eightgig.demo import demo_data_path
from eightgig.finetune import finetune
from eightgig.run import Run

if TYPE_CHECKING:
    from eightgig.evaluation.records import AnswerPair, Evaluation

HELD_OUT_ROWS = 60
SYSTEM_TURN = "You file tickets for Kestrel Bikes."
_ANSWER_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What a model reaches on the held-out rows."""

    loss: float
    exact_match: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """How the demo ended.

    Attributes:
        before, after: Scores of the base and of the tuned model.
        verdict: Whether the tuned model is better, in words.
        question, answer: What the tuned model was asked in a chat, and what it said.
        run: The run folder.
        report: The page about it.
        export: Folder of the merged model.
        training_seconds, seconds: Time for the training, and for everything.
    """

    before: Scores
    after: Scores
    verdict: str
    question: str
    answer: str
    run: str
    report: str
    export: str
    training_seconds: float
    seconds: float


def demo_config(output_dir: Path) -> Config:
    """Settings of the demo, for a run folder in `output_dir` that does not exist yet."""
    names = (f"demo-{number}" if number else "demo" for number in (0, *range(2, 10_000)))
    name = next(name for name in names if not (output_dir / name).exists())
    return Config(
        model=ModelConfig(name=DEMO_MODEL),
        data=DataConfig(path=str(demo_data_path()), held_out=HELD_OUT_ROWS),
        lora=LoraConfig(r=16, lora_alpha=32),
        # A model this small wants twenty times the learning rate of a large one.
        train=TrainConfig(num_train_epochs=4, learning_rate=5e-3, warmup_ratio=0.05),
        run=RunConfig(name=name, output_dir=str(output_dir), eval_steps=73, save_epochs=False),
    )


def run_demo(config: Config, view: TrainingView) -> tuple[DemoResult, tuple[AnswerPair, ...]]:
    """Train; evaluate on the rows held out; ask one question; write the report; export.

    Args:
        config: From `demo_config`.
        view: Shows the course of it.

    Returns:
        What came of it, and all answers side by side.
    """
    start_seconds = time.monotonic()
    # Read when torch is loaded. So small a model gains nothing from a second thread, and loses what
    # starting it costs.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for report in finetune(config, observe=view.notice):
        view.step(report)
    training_seconds = time.monotonic() - start_seconds
    # Not before: these load torch, and `finetune` sets up its allocator first.
    from eightgig.evaluation.evaluate import evaluate_run
    from eightgig.evaluation.passes import EvaluationOptions
    from eightgig.export.export import ExportOptions, export_run
    from eightgig.training.card import add_evaluation
    from eightgig.web.report import write_report

    run = Run(folder=Path(config.run.output_dir, config.run.name))
    options = EvaluationOptions(max_answers=HELD_OUT_ROWS, has_general_text=False)
    evaluation = evaluate_run(run.folder, options, view.notice)
    add_evaluation(run, evaluation)
    question = evaluation.pairs[0].question
    answer = _ask(run, question, view)
    page = write_report(run)
    export = export_run(run.folder, ExportOptions(kind="merged"), view.notice)
    result = DemoResult(
        before=_scores(evaluation, "first"),
        after=_scores(evaluation, "second"),
        verdict=evaluation.verdict.word,
        question=question,
        answer=answer,
        run=str(run.folder),
        report=str(page),
        export=str(export.folder),
        training_seconds=training_seconds,
        seconds=time.monotonic() - start_seconds,
    )
    return result, evaluation.pairs


def _ask(run: Run, question: str, view: TrainingView) -> str:
    """What the tuned model says in a chat."""
    from eightgig.chat import ChatOptions, open_conversation

    options = ChatOptions(system=SYSTEM_TURN, max_new_tokens=_ANSWER_TOKENS)
    with open_conversation(run.folder, options, view.notice) as conversation:
        return "".join(conversation.ask(question))


def _scores(evaluation: Evaluation, model: str) -> Scores:
    matches = {measure.name: measure for measure in evaluation.answers}
    return Scores(
        loss=getattr(evaluation.loss, model).value,
        exact_match=getattr(matches["exact_match"], model).value,
    )
