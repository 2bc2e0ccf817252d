import dataclasses
import re
from typing import Any

import pytest

from eightgig.hardware.cards import DRIVER_BYTES
from eightgig.memory.plan import Plan, make_plan
from eightgig.units import GIB, MIB, parse_bytes
from tests.unit.memory import cases


def _advice(size: str = "12B", machine: Any = None, **groups: Any) -> tuple[Plan, str]:
    plan = make_plan(cases.gemma(size), machine or cases.card(), cases.config(**groups))
    return plan, "\n".join(plan.advice)


def test_a_plan_that_fits_needs_no_advice() -> None:
    plan, text = _advice()
    assert plan.fits
    assert text == ""


def test_other_programs_are_named_first() -> None:
    machine = cases.card(display_bytes=6 * GIB)
    plan, _ = _advice(machine=machine, data={"max_length": 4096})
    assert not plan.fits
    assert plan.advice[0].startswith("The least-memory layout needs")
    assert plan.advice[1].startswith("Close programs")
    assert plan.advice[1].endswith("then it fits.")


@pytest.mark.parametrize(
    ("memory", "sentence"),
    [
        ({"layer_slots": 80}, "Set memory.layer_slots: auto"),
        ({"checkpoints": "device", "micro_batches_per_visit": 8}, "Set memory.checkpoints: auto"),
        ({"micro_batch_tokens": 60_000}, "Set memory.micro_batch_tokens: auto"),
        ({"budget": GIB}, "Raise memory.budget to up to"),
    ],
)
def test_a_bound_setting_that_does_not_fit_is_named(memory: dict[str, Any], sentence: str) -> None:
    plan, text = _advice(memory=memory, data={"max_length": 2048})
    assert not plan.fits
    assert sentence in text
    line = next(line for line in plan.advice if sentence in line)
    assert line.endswith("then it fits.")


def test_settings_that_help_only_together_are_said_together() -> None:
    plan, text = _advice(
        memory={"budget": GIB, "layer_slots": 60, "checkpoints": "device"},
        data={"max_length": 4096},
    )
    assert not plan.fits
    assert "Together they make it fit" in text


def test_an_optimizer_on_the_card_moves_before_the_rank_shrinks() -> None:
    plan, text = _advice(
        "31B", cases.card("RTX 3060 Laptop GPU"), lora={"r": 128}, train={"optim": "adamw_8bit"}
    )
    assert not plan.fits
    assert text.index("train.optim: adamw_torch") < text.index("lora.r")


def test_what_changes_training_comes_last_and_is_called_that() -> None:
    plan, text = _advice(data={"max_length": 60_000})
    assert not plan.fits
    found = re.search(r"data\.max_length: (\d+) would fit", text)
    assert found is not None
    assert plan.advice[-1].endswith("longer rows could not be trained on.")
    shorter = make_plan(
        cases.gemma("12B"), cases.card(), cases.config(data={"max_length": int(found.group(1))})
    )
    assert shorter.fits


def test_every_promise_of_a_smaller_rank_holds() -> None:
    machine = cases.card("RTX 3050 Laptop GPU")
    plan, text = _advice("31B", machine, lora={"r": 256})
    assert not plan.fits
    found = re.search(r"lora\.r: (\d+) would fit", text)
    if found is not None:
        smaller = make_plan(
            cases.gemma("31B"), machine, cases.config(lora={"r": int(found.group(1))})
        )
        assert smaller.fits


def test_main_memory_that_is_missing_is_said_in_bytes() -> None:
    machine = cases.card(host_total_bytes=4 * GIB, host_free_bytes=3 * GIB)
    plan, text = _advice(machine=machine)
    assert not plan.fits
    assert "of main memory" in text


def test_where_only_the_disk_is_too_small_nothing_else_is_advised() -> None:
    plan, _ = _advice(machine=dataclasses.replace(cases.card(), disk_free_bytes=GIB))
    assert not plan.fits
    (line,) = plan.advice
    assert re.fullmatch(r"Free [\d.]+ GiB of disk, or set model\.cache_dir .* are needed\.", line)


def test_a_disk_too_small_for_the_checkpoints_can_keep_fewer() -> None:
    machine = dataclasses.replace(cases.card(), disk_free_bytes=40 * GIB)
    lora, run = {"r": 128}, {"save_total_limit": 20}
    plan, text = _advice(machine=machine, lora=lora, run=run)
    assert not plan.fits
    found = re.search(r"run\.save_total_limit: (\d+) would fit, too", text)
    assert found is not None
    for limit, fits in ((int(found[1]), True), (int(found[1]) + 1, False)):
        again, _ = _advice(machine=machine, lora=lora, run={"save_total_limit": limit})
        assert again.fits is fits


def test_with_too_small_a_disk_other_advice_still_holds() -> None:
    machine = dataclasses.replace(cases.card(), disk_free_bytes=GIB)
    plan, text = _advice(machine=machine, memory={"layer_slots": 80})
    assert not plan.fits
    assert "of disk" in text
    assert "Set memory.layer_slots: auto: then it fits." in text


def test_where_nothing_helps_a_smaller_model_is_advised() -> None:
    machine = cases.card(display_bytes=0, context_bytes=0)
    machine = dataclasses.replace(machine, vram_total_bytes=GIB, vram_free_bytes=GIB)
    plan, text = _advice("31B", machine, data={"max_length": 64}, lora={"r": 1})
    assert not plan.fits
    assert "smaller model" in text


def test_a_budget_above_the_card_is_to_be_lowered() -> None:
    plan, text = _advice(memory={"budget": 20 * GIB})
    assert not plan.fits
    (line,) = plan.advice
    assert re.fullmatch(
        r"Lower memory\.budget to 6\.91 GiB, or to auto \(more is not there\): then it fits\.", line
    )
    assert "No setting" not in text


@pytest.mark.parametrize("held_mib", range(0, 40, 4))
def test_a_budget_that_is_advised_fits_to_the_letter(held_mib: int) -> None:
    machine = cases.card(context_bytes=(500 + held_mib) * MIB)
    _, text = _advice(machine=machine, memory={"budget": 20 * GIB})
    found = re.search(r"memory\.budget to ([\d.]+ \w+),", text)
    assert found is not None
    plan, _ = _advice(machine=machine, memory={"budget": parse_bytes(found[1])})
    assert plan.fits


def test_a_budget_that_helps_together_is_that_after_all_else() -> None:
    machine = cases.card(display_bytes=5 * GIB)
    settings: dict[str, Any] = {"data": {"max_length": 16_384}}
    _, text = _advice("12B", machine, memory={"budget": GIB}, **settings)
    assert "Together they make it fit: Close programs" in text
    found = re.search(r"Together.* Raise memory\.budget to up to ([\d.]+ GiB)", text)
    assert found is not None
    after = cases.card(display_bytes=DRIVER_BYTES)
    plan, _ = _advice("12B", after, memory={"budget": parse_bytes(found[1])}, **settings)
    assert plan.fits


def test_a_large_model_on_a_processor_is_called_slow_and_a_small_one_is_not() -> None:
    machine = cases.processor(host_total_bytes=64 * GIB, host_free_bytes=60 * GIB)
    plan, text = _advice("12B", machine, data={"max_length": 512})
    assert plan.fits
    assert plan.tokens_per_second is None
    assert re.search(r"expect around [\d.]+ tokens/s \(a guess", text)
    small = make_plan(cases.small_decoder(), machine, cases.config(data={"max_length": 512}))
    assert small.advice == ()
