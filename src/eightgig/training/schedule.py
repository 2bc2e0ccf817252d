"""The learning rate of each optimizer step; number for number that of Transformers."""

from __future__ import annotations

import math

from eightgig.config import TrainConfig


def warmup_steps(total_steps: int, train: TrainConfig) -> int:
    """Steps over which the learning rate rises."""
    if train.warmup_steps > 0:
        return train.warmup_steps
    return math.ceil(total_steps * train.warmup_ratio)


def learning_rate(step: int, total_steps: int, train: TrainConfig) -> float:
    """The learning rate used in an optimizer step.

    Args:
        step: 1-based; with warm-up, the first step has rate 0, as in Transformers.
        total_steps: Optimizer steps of the whole run.
        train: Highest rate, course and warm-up.

    Source: transformers/optimization.py, get_constant_schedule_with_warmup,
    get_linear_schedule_with_warmup, get_cosine_schedule_with_warmup.
    """
    return train.learning_rate * _factor(step - 1, total_steps, train)


def _factor(done_steps: int, total_steps: int, train: TrainConfig) -> float:
    """Share of the highest rate after `done_steps`; the operations are in Transformers' order."""
    rising_steps = warmup_steps(total_steps, train)
    if done_steps < rising_steps:
        return done_steps / rising_steps
    falling_steps = max(1, total_steps - rising_steps)
    if train.lr_scheduler_type == "linear":
        return max(0.0, (total_steps - done_steps) / falling_steps)
    if train.lr_scheduler_type == "cosine":
        progress = (done_steps - rising_steps) / falling_steps
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * progress)))
    return 1.0
