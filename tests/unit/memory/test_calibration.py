import dataclasses
import json
from pathlib import Path

import pytest

from eightgig.memory.calibration import (
    MeasuredPeak,
    compare_with_plan,
    judge_peaks,
    judge_speeds,
    predict_peak,
    predict_time,
    read_measured_peaks,
)
from eightgig.memory.plan import make_plan
from eightgig.memory.speed import speed_range
from eightgig.models.shapes import find_shape
from eightgig.run import to_json
from eightgig.units import GIB
from tests.unit.memory import cases

TABLE = Path(__file__).parents[2] / "data" / "measured_peaks.jsonl"
ROW = MeasuredPeak(
    case="12b 1x2048 16 streamed none host",
    model="12b",
    tokens=2048,
    rows=1,
    rank=16,
    lora_dropout=0.0,
    placement="streamed",
    offload=(),
    optim="adamw_torch",
    micro_batch_tokens=2048,
    micro_batches_per_visit=1,
    layer_slots=3,
    mlp_tile_tokens=1024,
    head_tile_tokens=1024,
    checkpoints="host",
    kernels="triton",
    compute_capability=(9, 0),
    budget_bytes=7_247_757_312,
    rates=cases.rates(),
    predicted_bytes=2_000_000_000,
    measured_bytes=1_950_000_000,
    allocated_bytes=1_700_000_000,
    predicted_tokens_per_second=900.0,
    measured_tokens_per_second=950.0,
    used_for_tuning=False,
    machine="NVIDIA H100 80GB HBM3",
    versions={"torch": "2.11.0"},
    date="2026-11-24",
)
FEWEST_ROWS, FEWEST_UNSEEN = 60, 20
LAYOUT = (
    "micro_batch_tokens",
    "micro_batches_per_visit",
    "layer_slots",
    "mlp_tile_tokens",
    "head_tile_tokens",
    "checkpoints",
    "kernels",
)


def test_a_measured_peak_below_the_plan_is_an_excess() -> None:
    plan = make_plan(cases.gemma("12B"), cases.card(), cases.config(train={"max_steps": 100}))
    assert plan.tokens_per_second is not None
    assert plan.run_seconds is not None
    measured = [plan.tokens_per_second * share for share in (0.9, 1.0, 0.8)]
    correction = compare_with_plan(
        plan, peak_bytes=int(plan.peak_bytes / 1.02), tokens_per_second=measured
    )
    assert correction.peak_excess_ratio == pytest.approx(0.02, abs=1e-6)
    assert correction.speed_ratio == pytest.approx(0.9)
    assert correction.run_seconds == pytest.approx(plan.run_seconds / 0.9)
    assert not correction.is_peak_too_low
    assert not correction.is_speed_off


def test_a_peak_above_the_plan_and_a_speed_far_off_are_called_that() -> None:
    plan = make_plan(cases.gemma("12B"), cases.card(), cases.config())
    assert plan.tokens_per_second is not None
    correction = compare_with_plan(
        plan, peak_bytes=plan.peak_bytes + 1, tokens_per_second=[plan.tokens_per_second / 2]
    )
    assert correction.is_peak_too_low
    assert correction.is_speed_off


def test_a_processor_has_nothing_to_compare_its_peak_with() -> None:
    plan = make_plan(cases.small_decoder(), cases.processor(), cases.config())
    correction = compare_with_plan(plan, peak_bytes=0, tokens_per_second=[])
    assert correction.measured_peak_bytes is None
    assert correction.peak_excess_ratio is None
    assert correction.speed_ratio is None
    assert not correction.is_peak_too_low


def test_rows_are_read_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "peaks.jsonl"
    path.write_text(json.dumps(to_json(ROW)) + "\n\n", encoding="utf-8")
    assert read_measured_peaks(path) == (ROW,)


def test_a_line_that_is_no_row_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "peaks.jsonl"
    path.write_text('{"model": "x"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="missing field"):
        read_measured_peaks(path)


def test_a_row_is_predicted_from_its_own_layout() -> None:
    spec = cases.gemma("12B")
    streamed = predict_peak(ROW, spec)
    resident = predict_peak(dataclasses.replace(ROW, layer_slots=20), spec)
    wide = predict_peak(dataclasses.replace(ROW, rank=128), spec)
    dropped = predict_peak(dataclasses.replace(ROW, lora_dropout=0.05), spec)
    assert streamed < wide < resident
    assert streamed < dropped


@pytest.mark.parametrize("model", ["e2b", "12b", "llama8b", "qwen14b"])
@pytest.mark.parametrize("optim", ["adamw_torch", "paged_adamw_8bit"])
def test_a_row_predicts_what_its_plan_said(model: str, optim: str) -> None:
    spec = find_shape(model)
    hopper = cases.card(
        "RTX 3090", compute_capability=(9, 0), host_free_bytes=120 * GIB, rates=ROW.rates
    )
    plan = make_plan(
        spec,
        hopper,
        cases.config(
            data={"max_length": 1024},
            train={"optim": optim, "gradient_accumulation_steps": 4},
            memory={"offload": ("down_proj",), "checkpoints": "host"},
        ),
    )
    layout = {name: getattr(plan, name) for name in LAYOUT}
    row = dataclasses.replace(ROW, tokens=1024, rows=4, offload=plan.offload, optim=optim, **layout)
    assert predict_peak(row, spec) == plan.peak_bytes
    assert predict_time(row, spec).tokens_per_second == pytest.approx(plan.tokens_per_second)


@pytest.mark.parametrize(
    ("predicted", "holds"),
    [
        ([100, 102, 104], True),
        ([99, 102, 103], False),
        ([101, 102, 107], False),
        ([104, 105, 104], False),
    ],
)
def test_accuracy_needs_no_low_row_a_near_median_and_a_near_worst(
    predicted: list[int], holds: bool
) -> None:
    rows = [dataclasses.replace(ROW, measured_bytes=100)] * 3
    accuracy = judge_peaks(rows, predicted)
    assert accuracy.holds is holds
    assert accuracy.num_unseen == 3
    assert len(accuracy.too_low) == sum(value < 100 for value in predicted)


def test_an_empty_table_proves_nothing() -> None:
    with pytest.raises(ValueError, match="no measured rows"):
        judge_peaks([], [])


def test_speeds_further_off_than_promised_are_named() -> None:
    rows = [
        dataclasses.replace(ROW, case=case, measured_tokens_per_second=speed)
        for case, speed in (("near", 110.0), ("far", 80.0), ("high", 120.0))
    ]
    accuracy = judge_speeds(rows, [100.0] * 3)
    assert accuracy.num_rows == 3
    assert accuracy.median_ratio == pytest.approx(1.1)
    assert accuracy.off == {"far": pytest.approx(0.8), "high": pytest.approx(1.2)}


def _table() -> tuple[MeasuredPeak, ...]:
    return read_measured_peaks(TABLE)


def test_enough_runs_are_measured_and_held_back() -> None:
    rows = _table()
    assert len({row.case for row in rows}) == len(rows) >= FEWEST_ROWS
    assert sum(not row.used_for_tuning for row in rows) >= FEWEST_UNSEEN
    assert {row.model for row in rows} >= {"e2b", "e4b", "12b", "31b", "llama8b", "qwen14b"}


def test_the_formulas_hold_for_every_measured_run() -> None:
    rows = _table()
    accuracy = judge_peaks(rows, [predict_peak(row, find_shape(row.model)) for row in rows])
    assert accuracy.too_low == ()
    assert accuracy.holds, accuracy


def test_speeds_are_within_the_range_that_a_plan_gives() -> None:
    for row in _table():
        time = predict_time(row, find_shape(row.model))
        low, high = speed_range(time, row.rates)
        if row.measured_tokens_per_second is not None:
            assert low <= row.measured_tokens_per_second / time.tokens_per_second <= high, row.case


def test_speeds_are_within_15_percent() -> None:
    rows = _table()
    times = [predict_time(row, find_shape(row.model)) for row in rows]
    accuracy = judge_speeds(rows, [time.tokens_per_second for time in times])
    assert accuracy.num_rows >= FEWEST_ROWS
    assert sum(time.is_launch_bound for time in times) > 10
    assert not accuracy.off, accuracy
    assert accuracy.median_ratio == pytest.approx(1, abs=0.03)
