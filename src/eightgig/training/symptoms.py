"""What a step's numbers can show: one function for each guard on the course of a training.

Each looks at the remembered windows (plain JSON, see `remember`) and returns an alarm or None. The
thresholds are far from what healthy runs do: a wrong warning costs trust, a wrong stop a night.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from eightgig.errors import Finding, TrainingStopped
from eightgig.training.step import StepReport

Action = Literal["warn", "skip", "finish", "stop"]
Memory = Mapping[str, Any]

FIRST_LOSS_TOKENS = 64
FIRST_LOSS_MARGIN = 1.0
FIRST_LOSS_WARN_RATIO = 0.8
START_STEPS = 10
UNTOUCHED_STEPS = 3
RECENT_STEPS = 20
WORSE_THAN_START = 1.0
WORSE_THAN_BEST = 1.5
NOISE_FACTOR = 7.0
FLAT_STEPS = 50
FLAT_LAST_STEP = 200
FLAT_RATIO = 0.01
FLAT_NOISE_RATIO = 0.05
ZERO_LOSS = 1e-6
ZERO_LOSS_LAST_STEP = 20
LEAK_LOSS = 0.02
LEAK_STEPS = 5
ZERO_GRADIENT = 1e-8
LEARNED_LOSS = 1e-3
COLLAPSE_RATIO = 1e-3
COLLAPSE_LOSS_RATIO = 0.5
SPEED_SKIPPED_STEPS = 2
SPEED_RATIO = 1 / 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Alarm:
    """One guard's word.

    Attributes:
        guard: Its name.
        action: `warn`: show it. `skip`: leave the adapter as it was before this step. `finish`:
            end the run as done. `stop`: save, then end the run with exit code 3.
        finding: What is the case, why it matters, what to do.
    """

    guard: str
    action: Action
    finding: Finding

    @property
    def error(self) -> TrainingStopped:
        """For `stop`, after saving."""
        found = self.finding
        return TrainingStopped(found.message, why=found.why, fix=found.fix, findings=(found,))


def make_alarm(guard: str, action: Action, message: str, *, why: str, fix: str) -> Alarm:
    """An alarm; a stop is an error, all else a warning."""
    severity: Literal["error", "warning"] = "error" if action == "stop" else "warning"
    finding = Finding(severity=severity, code=f"guard.{guard}", message=message, why=why, fix=fix)
    return Alarm(guard=guard, action=action, finding=finding)


def remember(memory: Memory, report: StepReport) -> dict[str, Any]:
    """`memory` with a step in its windows.

    Keys: `steps` seen; `start` (losses, norms of the first steps, and the loss tokens and their
    summed loss); `recent` (losses, norms, loss tokens of the last steps); `best_loss` (lowest mean
    of a full recent window); `speed` (tokens per second of the first and the last steps).
    """
    start = memory.get("start", {"losses": [], "norms": [], "loss_sum": 0.0, "loss_tokens": 0})
    if len(start["losses"]) < START_STEPS:
        start = {
            "losses": [*start["losses"], report.loss],
            "norms": [*start["norms"], report.grad_norm],
            "loss_sum": start["loss_sum"] + report.loss * report.loss_tokens,
            "loss_tokens": start["loss_tokens"] + report.loss_tokens,
        }
    recent = memory.get("recent", {"losses": [], "norms": [], "loss_tokens": []})
    recent = {
        "losses": [*recent["losses"], report.loss][-RECENT_STEPS:],
        "norms": [*recent["norms"], report.grad_norm][-RECENT_STEPS:],
        "loss_tokens": [*recent["loss_tokens"], report.loss_tokens][-RECENT_STEPS:],
    }
    best = memory.get("best_loss")
    if len(recent["losses"]) == RECENT_STEPS:
        mean = statistics.fmean(recent["losses"])
        best = mean if best is None else min(best, mean)
    return {
        **memory,
        "steps": memory.get("steps", 0) + 1,
        "start": start,
        "recent": recent,
        "best_loss": best,
        "speed": _remember_speed(memory, report.tokens_per_second),
    }


def _remember_speed(memory: Memory, tokens_per_second: float) -> dict[str, Any]:
    speed = memory.get("speed", {"steps": 0, "start": [], "recent": []})
    start, recent = speed["start"], speed["recent"]
    # The first steps of a process compile kernels and fill caches.
    if speed["steps"] >= SPEED_SKIPPED_STEPS:
        start = [*start, tokens_per_second][:START_STEPS]
        recent = [*recent, tokens_per_second][-START_STEPS:]
    return {"steps": speed["steps"] + 1, "start": start, "recent": recent}


def judge_zero_loss(memory: Memory) -> Alarm | None:
    """Nothing to learn: no label, or an answer that is known beforehand."""
    tokens, losses = memory["recent"]["loss_tokens"][-2:], memory["recent"]["losses"][-2:]
    if len(tokens) < 2:
        return None
    is_masked = max(tokens) == 0
    is_known = memory["steps"] <= ZERO_LOSS_LAST_STEP and max(losses) < ZERO_LOSS
    if not is_masked and not is_known:
        return None
    what = "no token carried loss" if is_masked else f"the loss was {max(losses):g} at most"
    return make_alarm(
        "zero_loss",
        "stop",
        f"In two steps in a row {what}.",
        why="All labels are masked, or the answer stands in the question: nothing is learned.",
        fix="Run eightgig check and look at the tokens it marks as trained.",
    )


def judge_first_loss(memory: Memory, report: StepReport, vocab_size: int) -> Alarm | None:
    """The untouched model knows less than nothing: it is not the model it should be."""
    start = memory["start"]
    tokens_before = start["loss_tokens"] - report.loss_tokens
    is_due = memory["steps"] <= START_STEPS and tokens_before < FIRST_LOSS_TOKENS
    if not is_due or start["loss_tokens"] < FIRST_LOSS_TOKENS:
        return None
    loss, guessing = start["loss_sum"] / start["loss_tokens"], math.log(vocab_size)
    if loss <= FIRST_LOSS_WARN_RATIO * guessing:
        return None
    return make_alarm(
        "first_loss",
        "stop" if loss > guessing + FIRST_LOSS_MARGIN else "warn",
        f"The loss starts at {loss:.2f}; guessing among {vocab_size:,} tokens gives "
        f"{guessing:.2f}.",
        why="A language model starts far below that: template, tokenizer or weights are wrong.",
        fix="Run eightgig check and read the rendered sample; check model.name.",
    )


def judge_leak(memory: Memory) -> Alarm | None:
    """The answers are known from the start."""
    losses = memory["start"]["losses"]
    if memory["steps"] != LEAK_STEPS or statistics.fmean(losses) >= LEAK_LOSS:
        return None
    return make_alarm(
        "leak",
        "warn",
        f"The loss starts at {statistics.fmean(losses):.4f}.",
        why="The model knows the answers: they stand in the prompts, or it was trained on them.",
        fix="Run eightgig check and read the rendered sample.",
    )


def judge_zero_gradient(memory: Memory) -> Alarm | None:
    """A loss without a gradient."""
    norms, losses = memory["recent"]["norms"][-2:], memory["recent"]["losses"][-2:]
    if len(norms) < 2 or max(norms) >= ZERO_GRADIENT or min(losses) <= LEARNED_LOSS:
        return None
    return make_alarm(
        "zero_gradient",
        "stop",
        f"The gradient norm was {max(norms):g} at most in two steps, at loss {losses[-1]:.3f}.",
        why="There is something to learn, but the adapter is not connected to the loss.",
        fix="Report this as a bug of eightgig, with the model and lora.target_modules.",
    )


def judge_divergence(memory: Memory) -> Alarm | None:
    """The loss left the place it had reached and does not come back."""
    start, recent = memory["start"]["losses"], memory["recent"]["losses"]
    if len(recent) < RECENT_STEPS:
        return None
    last, first = recent[-START_STEPS:], start[:UNTOUCHED_STEPS]
    above_start = statistics.fmean(last) - statistics.fmean(first)
    # Few steps say little about their own noise; the last ones know it better.
    first_noise = _deviation(last) / math.sqrt(len(first))
    start_noise = NOISE_FACTOR * math.hypot(_standard_error(last), first_noise)
    above_best = statistics.fmean(recent) - memory["best_loss"]
    best_noise = NOISE_FACTOR * _standard_error(recent)
    if above_start > max(WORSE_THAN_START, start_noise):
        what = f"{above_start:.2f} above the first {UNTOUCHED_STEPS} steps"
    elif above_best > max(WORSE_THAN_BEST, best_noise):
        what = f"{above_best:.2f} above its best"
    else:
        return None
    return make_alarm(
        "divergence",
        "stop",
        f"The loss has risen to {statistics.fmean(last):.2f}, {what}.",
        why="The learning rate is too high for this data; the adapter gets worse with each step.",
        fix="Halve train.learning_rate, or set train.max_grad_norm: 0.3 and a longer warm-up.",
    )


def is_flat_due(memory: Memory, warmup_steps: int) -> bool:
    """Whether the course after warm-up is long and smooth enough to be called flat or not."""
    steps = memory["steps"] - warmup_steps
    if not FLAT_STEPS <= steps <= FLAT_LAST_STEP:
        return False
    start, recent = memory["start"]["losses"], memory["recent"]["losses"]
    noise = math.hypot(_standard_error(start), _standard_error(recent))
    return 2 * noise <= FLAT_NOISE_RATIO * statistics.fmean(start)


def judge_flat(memory: Memory) -> Alarm | None:
    """The loss does not fall."""
    start = statistics.fmean(memory["start"]["losses"])
    recent = statistics.fmean(memory["recent"]["losses"])
    if recent <= (1 - FLAT_RATIO) * start:
        return None
    return make_alarm(
        "flat",
        "warn",
        f"After {memory['steps']} steps the loss is {recent:.3f}; it began at {start:.3f}.",
        why="The learning rate is too low for LoRA, or there is nothing in the data to learn.",
        fix="Try train.learning_rate: 2e-4, the usual one for LoRA.",
    )


def judge_collapse(memory: Memory) -> Alarm | None:
    """The gradient has faded, the loss has not."""
    losses, norms = memory["start"]["losses"], memory["start"]["norms"]
    if memory["steps"] < 2 * START_STEPS:
        return None
    last_losses = memory["recent"]["losses"][-START_STEPS:]
    last_norms = memory["recent"]["norms"][-START_STEPS:]
    has_faded = statistics.median(last_norms) < COLLAPSE_RATIO * statistics.median(norms)
    has_learned = statistics.fmean(last_losses) <= COLLAPSE_LOSS_RATIO * statistics.fmean(losses)
    if not has_faded or has_learned:
        return None
    return make_alarm(
        "collapse",
        "warn",
        f"The gradient norm fell from {statistics.median(norms):g} to "
        f"{statistics.median(last_norms):g} at loss {statistics.fmean(last_losses):.3f}.",
        why="The adapter has got stuck where no step changes anything.",
        fix="Go on from an earlier checkpoint with a lower train.learning_rate.",
    )


def judge_speed(memory: Memory) -> Alarm | None:
    """Steps take far longer than they did."""
    start, recent = memory["speed"]["start"], memory["speed"]["recent"]
    if memory["speed"]["steps"] < SPEED_SKIPPED_STEPS + 2 * START_STEPS:
        return None
    before, now = statistics.median(start), statistics.median(recent)
    if now >= SPEED_RATIO * before:
        return None
    return make_alarm(
        "speed",
        "warn",
        f"Training has slowed down from {before:,.0f} to {now:,.0f} tokens per second.",
        why="The card is hot, shared with another program, or its memory spills to the host.",
        fix="See eightgig doctor for what uses the GPU; lower memory.budget if memory spills.",
    )


def _deviation(values: Sequence[float]) -> float:
    """Sample standard deviation; statistics.stdev computes in fractions, which takes its time."""
    mean = statistics.fmean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _standard_error(values: Sequence[float]) -> float:
    return _deviation(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
