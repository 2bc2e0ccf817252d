"""What an evaluation finds: `evaluation.json` of a run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from eightgig.errors import Finding
from eightgig.evaluation.labels import LabelScores
from eightgig.evaluation.statistics import Measure, Word
from eightgig.run import Run

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerPair:
    """One question, its reference, and what both models answer.

    Attributes:
        file, line: Where the row was written, as far as known.
        question: The last turn before the answer.
        reference, base, tuned: Texts of the answers.
        is_base_cut, is_tuned_cut: Whether the answer had not ended at the most tokens allowed.
    """

    file: str | None
    line: int | None
    question: str
    reference: str
    base: str
    tuned: str
    is_base_cut: bool
    is_tuned_cut: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelComparison:
    """Answers held to the labels that the references consist of.

    Attributes:
        labels: In the order of the confusion matrices.
        base, tuned: Scores of each model.
        accuracy: Their accuracy, compared.
    """

    labels: tuple[str, ...]
    base: LabelScores
    tuned: LabelScores
    accuracy: Measure


@dataclass(frozen=True, kw_only=True, slots=True)
class Forgetting:
    """Loss on general text, which nobody trained on.

    Attributes:
        source: `shipped`, or the file given.
        loss: Of all its tokens, base against tuned.
        num_texts: Paragraphs.
    """

    source: str
    loss: Measure
    num_texts: int


@dataclass(frozen=True, kw_only=True, slots=True)
class NullComparison:
    """An adapter trained in the same way on answers shuffled among the rows.

    What it gains over the base model comes from the look of the answers alone; what the tuned
    adapter gains over it comes from what they have to do with the questions.

    Attributes:
        loss: Base against null adapter.
        tuned_loss: Null adapter against tuned.
        exact_match, tuned_exact_match: The same of exact matches, where answers were generated.
    """

    loss: Measure
    tuned_loss: Measure
    exact_match: Measure | None
    tuned_exact_match: Measure | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether the tuned model is better, in words.

    Attributes:
        word: The verdict.
        reason: The measures that decided.
        rule: How it was decided.
    """

    word: Word
    reason: str
    rule: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Base against tuned on the held-out rows of a run; in measures base is first, tuned second.

    Attributes:
        format_version: `FORMAT_VERSION` of the writer.
        run: The run folder.
        model: The base model.
        num_rows: Held-out rows.
        num_answers: Rows whose answers were generated.
        loss_tokens: Trained tokens of the held-out rows.
        loss, perplexity: Of these tokens.
        answers: Measures of generated answers: exact_match, normalised_match, rouge_l, and with
            JSON references json_valid and schema_match.
        json_schema: What schema_match asked for, None without JSON references.
        labels: Answers held to the labels, None where answers are no labels.
        forgetting: Loss on general text, None where it was not asked for.
        null: The null adapter, None where it was not asked for.
        verdict: The verdict.
        notes: What was left out or cut, in words.
        pairs: All answers, side by side.
        settings: How it was evaluated.
        findings: Warnings: forgetting, changed data.
        seconds: Time it took.
    """

    format_version: int
    run: str
    model: str
    num_rows: int
    num_answers: int
    loss_tokens: int
    loss: Measure
    perplexity: Measure
    answers: tuple[Measure, ...]
    json_schema: str | None
    labels: LabelComparison | None
    forgetting: Forgetting | None
    null: NullComparison | None
    verdict: Verdict
    notes: tuple[str, ...]
    pairs: tuple[AnswerPair, ...]
    settings: Mapping[str, int]
    findings: tuple[Finding, ...] = ()
    seconds: float = 0.0

    def finished(self, findings: Sequence[Finding], *, seconds: float) -> Evaluation:
        """The same with what was noticed on the way, and the time it took."""
        return replace(self, findings=tuple(findings), seconds=seconds)

    def measure(self, name: str) -> Measure | None:
        """The measure called `name`, if it was taken."""
        every = (self.loss, self.perplexity, *self.answers)
        return next((measure for measure in every if measure.name == name), None)


def evaluation_path(run: Run) -> Path:
    """Where the evaluation of `run` is written."""
    return run.folder / "evaluation.json"
