"""Guards: what is watched in a running training, by which rule, and what happens then.

Judging is pure: from what the guards remember and what was just measured to what they remember now
and, perhaps, alarms. What they remember is plain JSON and goes into the checkpoint. The guards on
the course of the loss are in `symptoms.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from eightgig.training.step import StepReport
from eightgig.training.symptoms import (
    COLLAPSE_LOSS_RATIO,
    COLLAPSE_RATIO,
    FIRST_LOSS_MARGIN,
    FIRST_LOSS_TOKENS,
    FIRST_LOSS_WARN_RATIO,
    FLAT_RATIO,
    FLAT_STEPS,
    LEAK_LOSS,
    LEAK_STEPS,
    LEARNED_LOSS,
    NOISE_FACTOR,
    RECENT_STEPS,
    SPEED_SKIPPED_STEPS,
    START_STEPS,
    UNTOUCHED_STEPS,
    WORSE_THAN_BEST,
    WORSE_THAN_START,
    ZERO_GRADIENT,
    ZERO_LOSS,
    ZERO_LOSS_LAST_STEP,
    Action,
    Alarm,
    Memory,
    is_flat_due,
    judge_collapse,
    judge_divergence,
    judge_first_loss,
    judge_flat,
    judge_leak,
    judge_speed,
    judge_zero_gradient,
    judge_zero_loss,
    make_alarm,
    remember,
)

MAX_NON_FINITE_IN_A_ROW = 3
MAX_NON_FINITE = 20
DEAD_STEPS = 5
OVERFIT_RATIO = 0.05
OVERFIT_EVALUATIONS = 2
_STRENGTH: Mapping[Action, int] = {"warn": 0, "skip": 1, "finish": 2, "stop": 3}


@dataclass(frozen=True, kw_only=True, slots=True)
class Guard:
    """What one guard watches for.

    Attributes:
        name: Its key in the memory; findings have the code `guard.NAME`.
        rule: When it raises an alarm, with the threshold.
        action: What happens then.
        source: Where rule and threshold come from.
    """

    name: str
    rule: str
    action: str
    source: str


GUARDS = (
    Guard(
        name="non_finite",
        rule="Loss or gradient norm of a step is NaN or infinite.",
        action=f"skip the step; stop after {MAX_NON_FINITE_IN_A_ROW} in a row or "
        f"{MAX_NON_FINITE} in all",
        source="Transformers logs such a step as loss 0.0 and goes on (logging_nan_inf_filter)",
    ),
    Guard(
        name="first_loss",
        rule=f"Mean loss of the first {FIRST_LOSS_TOKENS} or more loss tokens is above "
        f"ln(V) + {FIRST_LOSS_MARGIN:g}: worse than guessing.",
        action=f"stop; warn above {FIRST_LOSS_WARN_RATIO:g} ln(V)",
        source="transformers#45242: 16.2 instead of 6.8 nats with a wrong forward",
    ),
    Guard(
        name="divergence",
        rule=f"Mean loss of {START_STEPS} steps is {WORSE_THAN_START:g} nat above the first "
        f"{UNTOUCHED_STEPS}, or of {RECENT_STEPS} steps {WORSE_THAN_BEST:g} nat above the best "
        f"{RECENT_STEPS}; and by {NOISE_FACTOR:g} standard errors.",
        action="stop",
        source="own simulations: tests/unit/training/test_guards.py",
    ),
    Guard(
        name="flat",
        rule=f"{FLAT_STEPS} steps after warm-up (later where steps are noisy) the mean loss is "
        f"less than {FLAT_RATIO:.0%} below the first {START_STEPS} steps.",
        action="warn",
        source="LoRA wants about ten times the learning rate of full fine-tuning",
    ),
    Guard(
        name="zero_loss",
        rule=f"No loss tokens in 2 steps in a row, or loss below {ZERO_LOSS:g} in 2 of the first "
        f"{ZERO_LOSS_LAST_STEP}.",
        action="stop",
        source="TRL trains at loss 0.0 when every label is masked",
    ),
    Guard(
        name="leak",
        rule=f"Mean loss of the first {LEAK_STEPS} steps is below {LEAK_LOSS:g}.",
        action="warn",
        source="untuned models are rarely 98 % sure of every token",
    ),
    Guard(
        name="zero_gradient",
        rule=f"Gradient norm below {ZERO_GRADIENT:g} in 2 steps in a row, loss above "
        f"{LEARNED_LOSS:g}.",
        action="stop",
        source="unsloth#5230: fine loss and no gradient",
    ),
    Guard(
        name="collapse",
        rule=f"Median gradient norm of {START_STEPS} steps below {COLLAPSE_RATIO:g} of the first "
        f"{START_STEPS}, mean loss still above {COLLAPSE_LOSS_RATIO:g} of theirs.",
        action="warn",
        source="own simulations: tests/unit/training/test_guards.py",
    ),
    Guard(
        name="dead_layers",
        rule=f"An adapted linear has had gradient exactly 0 in {DEAD_STEPS} steps.",
        action="stop",
        source="transformers#45242; reentrant checkpointing loses gradients of shared K and V",
    ),
    Guard(
        name="speed",
        rule=f"Median tokens per second of {START_STEPS} steps below a third of the first "
        f"{START_STEPS} (without the first {SPEED_SKIPPED_STEPS}).",
        action="warn",
        source="Windows' driver spills VRAM to host memory instead of failing",
    ),
    Guard(
        name="held_out",
        rule=f"Held-out loss more than {OVERFIT_RATIO:.0%} above the best, which is "
        f"{OVERFIT_EVALUATIONS} or more evaluations old.",
        action="warn; finish after train.early_stopping_patience evaluations without a better one",
        source="early stopping as in Transformers' EarlyStoppingCallback",
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """What the guards make of a step.

    Attributes:
        memory: What they remember now; to be passed in next time.
        alarms: Strongest first.
    """

    memory: Memory
    alarms: tuple[Alarm, ...] = ()

    @property
    def action(self) -> Action | None:
        """The strongest action asked for."""
        return self.alarms[0].action if self.alarms else None


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """How the held-out loss has gone so far; fields as in `TrainingState`.

    Attributes:
        best_loss: Lowest so far, None before the first evaluation.
        best_step: Step of that evaluation.
        evaluations_without_gain: Evaluations since then.
    """

    best_loss: float | None = None
    best_step: int = 0
    evaluations_without_gain: int = 0


def judge_gradient(memory: Memory, *, step: int, loss: float, grad_norm: float) -> Judgement:
    """Judge a step after its backward passes, before the optimizer moves the adapter.

    Args:
        memory: What the guards remember; empty at the start of a run.
        step: The optimizer step, 1-based.
        loss: Mean loss of the step.
        grad_norm: Norm of the whole gradient before clipping.

    Returns:
        Action `skip` or `stop` where the step must not be taken: the adapter stays as it is.
    """
    count = {"in_a_row": 0, "total": 0, **memory.get("non_finite", {})}
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return Judgement(memory={**memory, "non_finite": {**count, "in_a_row": 0}})
    count = {"in_a_row": count["in_a_row"] + 1, "total": count["total"] + 1}
    is_last = count["in_a_row"] >= MAX_NON_FINITE_IN_A_ROW or count["total"] >= MAX_NON_FINITE
    alarm = make_alarm(
        "non_finite",
        "stop" if is_last else "skip",
        f"Step {step} gave loss {loss:g} and gradient norm {grad_norm:g}"
        + (f", the {count['total']}. such step." if is_last else "; it was skipped."),
        why="NaN or infinity in one step would be in every weight of the adapter afterwards.",
        fix="Lower train.learning_rate, or set train.max_grad_norm; look at the rows of this step.",
    )
    return Judgement(memory={**memory, "non_finite": count}, alarms=(alarm,))


def judge_step(
    memory: Memory, report: StepReport, *, vocab_size: int, warmup_steps: int
) -> Judgement:
    """Judge a step after the optimizer has moved the adapter.

    Args:
        memory: What the guards remember.
        report: The step. One that was skipped (loss not finite) is not judged again.
        vocab_size: V: ln(V) is the loss of guessing.
        warmup_steps: Steps over which the learning rate rises; a flat loss is judged after them.
    """
    if not (math.isfinite(report.loss) and math.isfinite(report.grad_norm)):
        return Judgement(memory=memory)
    after = remember(memory, report)
    found = [
        judge_zero_loss(after),
        judge_first_loss(after, report, vocab_size),
        judge_leak(after),
        judge_zero_gradient(after),
        judge_divergence(after),
        judge_collapse(after),
        judge_speed(after),
    ]
    if not after.get("is_flat_judged", False) and is_flat_due(after, warmup_steps):
        after["is_flat_judged"] = True
        found.append(judge_flat(after))
    said = set(memory.get("said", ()))
    alarms = [alarm for alarm in found if alarm is not None and alarm.guard not in said]
    # A warning is given once in a run: what it says holds on.
    said |= {alarm.guard for alarm in alarms if alarm.action == "warn"}
    alarms.sort(key=lambda alarm: -_STRENGTH[alarm.action])
    return Judgement(memory={**after, "said": sorted(said)}, alarms=tuple(alarms))


def wants_layers(memory: Memory) -> bool:
    """Whether `judge_layers` still has something to learn from the norms of single linears."""
    return bool(memory.get("dead_layers", {}).get("is_open", True))


def judge_layers(memory: Memory, *, step: int, norms: Mapping[str, float]) -> Judgement:
    """Judge the gradients of the single adapted linears; once each had one, nothing is left.

    Args:
        memory: What the guards remember.
        step: The optimizer step.
        norms: By linear, norm of the gradients of its A and B together. (A alone has none in the
            first step, as B starts at zero.)
    """
    if not wants_layers(memory):
        return Judgement(memory=memory)
    watch = memory.get("dead_layers", {"steps": 0, "silent": sorted(norms)})
    silent = [name for name in watch["silent"] if norms.get(name, 0.0) == 0.0]
    steps = watch["steps"] + (1 if any(norms.values()) else 0)
    is_open = bool(silent) and steps < DEAD_STEPS
    now = {**memory, "dead_layers": {"steps": steps, "silent": silent, "is_open": is_open}}
    if not silent or is_open:
        return Judgement(memory=now)
    shown = ", ".join(silent[:3]) + (", ..." if len(silent) > 3 else "")
    alarm = make_alarm(
        "dead_layers",
        "stop",
        f"{len(silent)} of {len(norms)} adapted linears got no gradient up to step {step}: "
        f"{shown}.",
        why="They are not trained; an exact zero in every step does not come from the data.",
        fix="Leave them out of lora.target_modules, and report this as a bug of eightgig.",
    )
    return Judgement(memory=now, alarms=(alarm,))


def judge_evaluation(
    progress: HeldOut, *, step: int, loss: float, patience: int
) -> tuple[HeldOut, tuple[Alarm, ...]]:
    """Judge a held-out loss.

    Args:
        progress: The evaluations before.
        step: Optimizer steps done.
        loss: Mean held-out loss; NaN counts as no gain.
        patience: `train.early_stopping_patience`; 0 never ends the run.

    Returns:
        The progress now, and alarms; the best checkpoint is that of `best_step`.
    """
    if math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss):
        return HeldOut(best_loss=loss, best_step=step), ()
    now = HeldOut(
        best_loss=progress.best_loss,
        best_step=progress.best_step,
        evaluations_without_gain=progress.evaluations_without_gain + 1,
    )
    best = math.inf if now.best_loss is None else now.best_loss
    if patience and now.evaluations_without_gain >= patience:
        alarm = make_alarm(
            "held_out",
            "finish",
            f"Held-out loss has not fallen below {best:.4f} (step {now.best_step}) in "
            f"{patience} evaluations.",
            why="More steps would fit the training rows and nothing else.",
            fix="Nothing to do: the run ends early, as train.early_stopping_patience asks.",
        )
        return now, (alarm,)
    is_high = loss > best * (1 + OVERFIT_RATIO) or not math.isfinite(loss)
    if is_high and now.evaluations_without_gain >= OVERFIT_EVALUATIONS:
        alarm = make_alarm(
            "held_out",
            "warn",
            f"Held-out loss is {loss:.4f}, up from {best:.4f} at step {now.best_step}.",
            why="The adapter learns the training rows by heart and answers others worse.",
            fix="Set train.early_stopping_patience: 2, or fewer train.num_train_epochs.",
        )
        return now, (alarm,)
    return now, ()


def forget_speed(memory: Memory) -> Memory:
    """`memory` for a run that goes on in another process, perhaps on another machine."""
    said = [name for name in memory.get("said", ()) if name != "speed"]
    return {**{name: value for name, value in memory.items() if name != "speed"}, "said": said}
