import dataclasses
import json
from pathlib import Path

import pytest

from eightgig.memory.calibration import (
    MeasuredPeak,
    compare_with_plan,
    judge_peaks,
    predict_peak,
    read_measured_peaks,
)
from eightgig.memory.plan import make_plan
from eightgig.run import to_json
from tests.unit.memory import cases

TABLE = Path(__file__).parents[2] / "data" / "measured_peaks.jsonl"
ROW = MeasuredPeak(
    model="google/gemma-4-12B-it",
    tokens=2048,
    rank=16,
    placement="streamed",
    layer_slots=3,
    mlp_tile_tokens=1024,
    head_tile_tokens=1024,
    checkpoints="host",
    optim="adamw_torch",
    predicted_bytes=2_000_000_000,
    measured_bytes=1_950_000_000,
    used_for_tuning=False,
    machine="NVIDIA H100 80GB HBM3",
    versions="torch 2.11.0",
    date="2026-11-24",
)
# Shapes of the table that are not among the five sizes, by name.
SHAPES = {
    "llama-3.1-8b": {
        "num_layers": 32,
        "hidden": 4096,
        "heads": 32,
        "kv_heads": 8,
        "size": 14_336,
        "vocab": 128_256,
    },
    "qwen3-14b": {
        "num_layers": 40,
        "hidden": 5120,
        "heads": 40,
        "kv_heads": 8,
        "size": 17_408,
        "vocab": 151_936,
    },
}


def _spec(model: str) -> object:
    if model not in SHAPES:
        return cases.gemma(model.removeprefix("google/gemma-4-").removesuffix("-it"))
    shape = SHAPES[model]
    decoder = cases.small_decoder(
        shape["num_layers"], hidden_size=shape["hidden"], vocab_size=shape["vocab"]
    )
    layers = tuple(
        dataclasses.replace(
            layer,
            num_heads=shape["heads"],
            num_kv_heads=shape["kv_heads"],
            head_dim=128,
            intermediate_size=shape["size"],
        )
        for layer in decoder.layers
    )
    return dataclasses.replace(decoder, layers=layers, has_qk_norm=model.startswith("qwen3"))


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
    assert streamed < wide < resident


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


@pytest.mark.skipif(not TABLE.exists(), reason="no run has been measured yet")
def test_the_formulas_hold_for_every_measured_run() -> None:
    rows = read_measured_peaks(TABLE)
    accuracy = judge_peaks(rows, [predict_peak(row, _spec(row.model)) for row in rows])
    assert accuracy.too_low == ()
    assert accuracy.holds, accuracy
