"""A timed case and the doctor's kernel on a real card."""

from pathlib import Path

import pytest
import torch

from eightgig.hardware.bench import measure_pin_limit, triton_kernel
from eightgig.training.bench_cases import make_cases, run_cases

pytestmark = pytest.mark.gpu


def test_a_case_is_timed_below_its_plan(tmp_path: Path) -> None:
    settings = ["tokens=256", "rows=2", "lora.r=8", "device=cuda"]
    cases = make_cases("demo", settings, [], timed_steps=3, stores=tmp_path)
    (outcome,) = run_cases(cases)
    assert outcome.error is None, (outcome.error.message, outcome.error.why)
    result = outcome.result
    assert result is not None
    assert result.copy_wait_ratio is not None
    assert 0 <= result.copy_wait_ratio < 1
    assert result.reserved_peak_bytes is not None
    assert result.predicted_peak_bytes is not None
    assert 0 < result.reserved_peak_bytes <= result.predicted_peak_bytes
    assert result.last_loss < result.first_loss


def test_pinned_memory_that_was_tried_is_given_back() -> None:
    total = 8 << 30
    before = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
    assert measure_pin_limit(4 << 30, host_total_bytes=total) == 4 << 30
    assert torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) <= before


def test_triton_compiles_the_doctor_s_kernel() -> None:
    assert triton_kernel("cuda")["is_right"]
