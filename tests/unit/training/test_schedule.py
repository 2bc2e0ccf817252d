"""The learning rate is that of Transformers, number for number."""

from __future__ import annotations

import pytest
import torch

from eightgig.config import TrainConfig
from eightgig.training.schedule import learning_rate, warmup_steps

_NAMES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def _transformers_rates(train: TrainConfig, total_steps: int) -> list[float]:
    from transformers import get_scheduler

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=train.learning_rate)
    schedule = get_scheduler(
        _NAMES[train.lr_scheduler_type],
        optimizer,
        num_warmup_steps=warmup_steps(total_steps, train),
        num_training_steps=total_steps,
    )
    rates = []
    for _ in range(total_steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("course", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("total_steps", [1, 7, 100, 2051])
@pytest.mark.parametrize(
    "warmup",
    [
        {"warmup_ratio": 0.0},
        {"warmup_ratio": 0.03},
        {"warmup_ratio": 1.0},
        {"warmup_steps": 5},
        {"warmup_steps": 3000},
    ],
)
def test_every_step_equals_transformers(
    course: str, total_steps: int, warmup: dict[str, float]
) -> None:
    train = TrainConfig(learning_rate=2e-4, lr_scheduler_type=course, **warmup)
    rates = [learning_rate(step, total_steps, train) for step in range(1, total_steps + 1)]
    assert rates == _transformers_rates(train, total_steps)


@pytest.mark.parametrize("total_steps", [1, 33, 34, 100, 1000, 1001])
@pytest.mark.parametrize("ratio", [0.03, 0.07, 0.1, 0.5])
def test_a_ratio_of_warmup_is_rounded_as_in_transformers(total_steps: int, ratio: float) -> None:
    from transformers import TrainingArguments

    arguments = TrainingArguments("unused", warmup_steps=ratio)
    expected = arguments.get_warmup_steps(total_steps)
    assert warmup_steps(total_steps, TrainConfig(warmup_ratio=ratio)) == expected


def test_steps_of_warmup_override_the_ratio() -> None:
    assert warmup_steps(100, TrainConfig(warmup_ratio=0.5, warmup_steps=3)) == 3
