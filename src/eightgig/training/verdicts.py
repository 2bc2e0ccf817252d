"""What a trial's numbers show: one function for each of its judgements.

Each returns a finding or None. An error keeps the run from beginning; a note is said where the
sample is too small to tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from eightgig.errors import Finding, Severity
from eightgig.evaluation.loss import RowLosses
from eightgig.memory.plan import Plan
from eightgig.training.selftest import GradientCheck
from eightgig.units import format_bytes

SAVE_RATIO = 0.02
"""Share of the time between two checkpoints that writing one may take."""

FROZEN_RATIO = 0.2
PACKING_TOLERANCES = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.05}
"""By how much of (1 + loss) a row's loss may change with the rows beside it: rounding."""

MIN_STEPS = 3
MIN_LOSS_TOKENS = 64
"""Fewer steps or loss tokens say nothing about where the loss goes."""

_RISE_RATIO = 0.05
_RISE_NATS = 0.05
_OUR_BUG = "Report this as a bug of eightgig, with train.optim and the versions."


def judge_finite(loss: float, grad_norm: float) -> Finding | None:
    """Loss and gradient are numbers."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return None
    return make_finding(
        "error",
        "non_finite",
        f"A step of the trial gave loss {loss:g} and gradient norm {grad_norm:g}.",
        why="NaN or infinity in one step would be in every weight of the adapter afterwards.",
        fix="Look at the longest rows; try memory.kernels: plain, or train.max_grad_norm.",
    )


def judge_dtypes(kept: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> Finding | None:
    """Masters and gradient sums are float32, moments float32 or 8-bit codes."""
    wrong = [name for name, value in kept.items() if value.dtype != torch.float32]
    allowed = (torch.float32, torch.uint8)
    wrong += [name for name, value in moments.items() if value.dtype not in allowed]
    if not wrong:
        return None
    return make_finding(
        "error",
        "dtype",
        f"These are not kept in float32: {', '.join(wrong[:3])}.",
        why="Steps are smaller than what a narrower number can take up: they would be lost.",
        fix=_OUR_BUG,
    )


def judge_moved(before: Iterable[Tensor], after: Iterable[Tensor], steps: int) -> Finding | None:
    """The adapter's numbers have moved."""
    if steps < MIN_STEPS:
        return None
    count = frozen = 0
    for one, other in zip(before, after, strict=True):
        count += one.numel()
        frozen += int((one == other).sum())
    if frozen <= FROZEN_RATIO * count:
        return None
    return make_finding(
        "error",
        "frozen",
        f"{frozen / count:.0%} of the adapter's numbers did not move in {steps} steps.",
        why="They are rounded back to where they were, or are not trained.",
        fix="Raise train.learning_rate; otherwise report this as a bug of eightgig.",
    )


def judge_restored(expected: Mapping[str, str], found: Mapping[str, str]) -> Finding | None:
    """What a checkpoint gives back is what was saved: the same hash by name of tensor."""
    names = set(expected) | set(found)
    differing = sorted(name for name in names if expected.get(name) != found.get(name))
    if not differing:
        return None
    return make_finding(
        "error",
        "resume",
        f"What was read from a checkpoint is not what was saved: {', '.join(differing[:3])}.",
        why="A run that goes on would not be the run that stopped.",
        fix=_OUR_BUG,
    )


def judge_packing(together: RowLosses, alone: RowLosses, compute_dtype: str) -> Finding | None:
    """A row has the loss that it has alone."""
    tokens = np.maximum(alone.tokens, 1)
    difference = np.abs(together.sums - alone.sums) / tokens
    worst = int(np.argmax(difference))
    allowed = PACKING_TOLERANCES[compute_dtype] * (1 + np.abs(alone.sums) / tokens)
    # A comparison with NaN is false: what cannot be compared is not found to be right.
    if bool(np.all(difference <= allowed)):
        return None
    return make_finding(
        "error",
        "packing",
        f"A row's loss is {difference[worst]:.3g} nat off beside other rows from what it is alone.",
        why="Rows of one micro-batch see each other: the model learns what is not there.",
        fix="Set data.packing: false, and report this as a bug of eightgig.",
    )


def judge_gradients(checks: Sequence[GradientCheck]) -> Finding | None:
    """Every gradient says how the loss changes."""
    wrong = [check for check in checks if check.is_wrong]
    if not wrong:
        return None
    more = f" ({len(wrong)} of {len(checks)} are wrong)" if len(wrong) > 1 else ""
    return make_finding(
        "error",
        "gradient",
        f"The gradient of {wrong[0].name} is wrong: along it the loss changes by "
        f"{wrong[0].ratio or 0.0:.3g} of what it says{more}.",
        why="Such a training ends somewhere, but not where the data leads it.",
        fix="Set memory.kernels: plain and try again; report this as a bug of eightgig.",
    )


def judge_course(before: float, after: float, *, steps: int, loss_tokens: int) -> Finding | None:
    """The loss of rows that were trained on has fallen."""
    course = f"from {before:.4f} to {after:.4f} in {steps} steps"
    if steps < MIN_STEPS or loss_tokens < MIN_LOSS_TOKENS:
        return make_finding(
            "note",
            "too_small",
            f"The loss of the trial went {course}: too little to say whether it falls.",
            why=f"It takes {MIN_STEPS} steps and {MIN_LOSS_TOKENS} loss tokens; there were "
            f"{loss_tokens:,} tokens.",
            fix="Look at the loss of the first steps of the run.",
        )
    if not after <= before + max(_RISE_NATS, _RISE_RATIO * before):
        return make_finding(
            "error",
            "loss_rises",
            f"The loss of rows that the trial trained on rose {course}.",
            why="The learning rate is too high for this data.",
            fix="Lower train.learning_rate, to a third for a start.",
        )
    if after >= before:
        return make_finding(
            "warning",
            "loss_flat",
            f"The loss of rows that the trial trained on did not fall: {course}.",
            why="The learning rate is too low, or there is nothing in the rows to learn.",
            fix="Try train.learning_rate: 2e-4, the usual one for LoRA.",
        )
    return None


def judge_peak(plan: Plan, peak_bytes: int) -> Finding | None:
    """No more memory was taken than planned."""
    if peak_bytes <= plan.peak_bytes:
        return None
    return make_finding(
        "warning",
        "peak",
        f"The trial took {format_bytes(peak_bytes)} of the device, "
        f"{format_bytes(peak_bytes - plan.peak_bytes)} more than planned.",
        why=f"{format_bytes(plan.budget_bytes)} may be taken; beyond that the run gives "
        "something up.",
        fix="Set memory.budget lower to be on the safe side, and report it with plan.json.",
    )


def judge_save(seconds: float, save_minutes: float) -> Finding | None:
    """Saving takes a small share of the time."""
    if not save_minutes or seconds <= SAVE_RATIO * 60 * save_minutes:
        return None
    return make_finding(
        "warning",
        "slow_save",
        f"A checkpoint takes {seconds:.0f} s, more than {SAVE_RATIO:.0%} of "
        f"run.save_minutes: {save_minutes:g}.",
        why="The training waits meanwhile.",
        fix="Set run.save_minutes higher, or run.output_dir to a faster disk.",
    )


def make_finding(severity: Severity, code: str, message: str, *, why: str, fix: str) -> Finding:
    """A finding of the trial."""
    return Finding(severity=severity, code=f"trial.{code}", message=message, why=why, fix=fix)
