"""What a trial's numbers show, at and beside each threshold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from eightgig.evaluation.loss import RowLosses
from eightgig.training import verdicts
from eightgig.training.selftest import GradientCheck
from tests.engines import make_plan


def _code(finding: Any) -> str | None:
    if finding is None:
        return None
    assert all((finding.message, finding.why, finding.fix))
    return f"{finding.severity} {finding.code.removeprefix('trial.')}"


@pytest.mark.parametrize(
    ("loss", "norm", "code"),
    [(1.0, 2.0, None), (math.nan, 1.0, "error non_finite"), (1.0, math.inf, "error non_finite")],
)
def test_numbers_must_be_finite(loss: float, norm: float, code: str | None) -> None:
    assert _code(verdicts.judge_finite(loss, norm)) == code


@pytest.mark.parametrize(
    ("before", "after", "steps", "tokens", "code"),
    [
        (3.0, 2.9, 10, 500, None),
        (3.0, 3.0, 10, 500, "warning loss_flat"),
        (3.0, 3.1, 10, 500, "warning loss_flat"),
        (3.0, 3.2, 10, 500, "error loss_rises"),
        (0.01, 0.05, 10, 500, "warning loss_flat"),
        (0.01, 0.2, 10, 500, "error loss_rises"),
        (3.0, math.nan, 10, 500, "error loss_rises"),
        (3.0, 9.0, 2, 500, "note too_small"),
        (3.0, 9.0, 10, 63, "note too_small"),
    ],
)
def test_the_loss_must_fall(
    before: float, after: float, steps: int, tokens: int, code: str | None
) -> None:
    found = verdicts.judge_course(before, after, steps=steps, loss_tokens=tokens)
    assert _code(found) == code


@pytest.mark.parametrize(
    ("frozen", "steps", "code"),
    [(20, 3, None), (21, 3, "error frozen"), (100, 2, None)],
)
def test_numbers_must_move(frozen: int, steps: int, code: str | None) -> None:
    before = torch.arange(100.0)
    after = before + 1
    after[:frozen] = before[:frozen]
    assert _code(verdicts.judge_moved([before], [after], steps)) == code


def test_what_is_kept_is_kept_in_float32() -> None:
    good = {"the adapter": torch.zeros(3)}
    codes = {"state1": torch.zeros(3, dtype=torch.uint8)}
    assert verdicts.judge_dtypes(good, codes) is None
    assert _code(verdicts.judge_dtypes({"the adapter": torch.zeros(3).half()}, codes)) == (
        "error dtype"
    )
    assert _code(verdicts.judge_dtypes(good, {"m": torch.zeros(3).bfloat16()})) == "error dtype"


def test_a_checkpoint_gives_back_every_bit() -> None:
    saved = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    assert verdicts.judge_restored(saved, {name: t.clone() for name, t in saved.items()}) is None
    other = {**saved, "b": torch.nextafter(saved["b"], torch.tensor(9.0))}
    assert _code(verdicts.judge_restored(saved, other)) == "error resume"
    assert _code(verdicts.judge_restored(saved, {"a": saved["a"]})) == "error resume"
    assert _code(verdicts.judge_restored({}, saved)) == "error resume"


@pytest.mark.parametrize(
    ("nats", "dtype", "code"),
    [
        (0.001, "float32", None),
        (0.005, "float32", "error packing"),
        (0.1, "bfloat16", None),
        (0.3, "bfloat16", "error packing"),
        (math.nan, "bfloat16", "error packing"),
    ],
)
def test_a_row_has_the_loss_it_has_alone(nats: float, dtype: str, code: str | None) -> None:
    tokens = np.array([10, 20, 0])
    alone = RowLosses(sums=np.array([30.0, 60.0, 0.0]), tokens=tokens)
    together = RowLosses(sums=alone.sums + nats * tokens, tokens=tokens)
    assert _code(verdicts.judge_packing(together, alone, dtype)) == code


def test_one_wrong_gradient_is_enough() -> None:
    right = GradientCheck(name="layers.0.mlp.up_proj.lora_B", ratio=1.01, is_wrong=False)
    hidden = GradientCheck(name="layers.1.mlp.up_proj.lora_B", ratio=None, is_wrong=False)
    wrong = GradientCheck(name="layers.2.mlp.up_proj.lora_B", ratio=0.5, is_wrong=True)
    assert verdicts.judge_gradients((right, hidden)) is None
    found = verdicts.judge_gradients((right, wrong))
    assert found is not None
    assert "layers.2.mlp.up_proj.lora_B" in found.message
    assert "0.5" in found.message


def test_the_peak_is_held_to_the_plan() -> None:
    plan = make_plan(peak_bytes=1_000)
    assert verdicts.judge_peak(plan, 1_000) is None
    assert _code(verdicts.judge_peak(plan, 1_001)) == "warning peak"


@pytest.mark.parametrize(
    ("seconds", "minutes", "code"),
    [(12.0, 10.0, None), (12.1, 10.0, "warning slow_save"), (99.0, 0.0, None)],
)
def test_saving_is_a_small_share(seconds: float, minutes: float, code: str | None) -> None:
    assert _code(verdicts.judge_save(seconds, minutes)) == code
