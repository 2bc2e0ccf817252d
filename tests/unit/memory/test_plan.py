import dataclasses
import re
import subprocess
import sys
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eightgig.config import AUTO, Config
from eightgig.errors import ConfigError
from eightgig.hardware.cards import hardware_from_card
from eightgig.hardware.probe import Hardware
from eightgig.memory import estimate, host_estimate
from eightgig.memory.plan import Plan, RowLengths, make_plan
from eightgig.run import from_json, to_json
from eightgig.units import GIB, MIB
from tests.unit.memory import cases

ROWS = RowLengths(
    longest_tokens=1500, mean_tokens=400.0, num_rows=1000, loss_share=0.3, step_loss_tokens=3000
)


def _plan(
    size: str = "12B",
    machine: Hardware | None = None,
    rows: RowLengths | None = None,
    **groups: Any,
) -> Plan:
    return make_plan(cases.gemma(size), machine or cases.card(), cases.config(**groups), rows=rows)


def _choice(plan: Plan, name: str) -> tuple[str, str, str]:
    (choice,) = [choice for choice in plan.choices if choice.name == name]
    return choice.value, choice.reason, choice.rejected


@pytest.mark.parametrize("size", cases.SIZES)
def test_every_size_fits_an_8_gib_card(size: str) -> None:
    plan = _plan(size, hardware_from_card("8GiB"))
    assert plan.fits
    assert plan.peak_bytes <= plan.budget_bytes
    assert plan.tokens_per_second is not None


def test_the_breakdown_adds_up_and_has_the_items_of_the_design() -> None:
    plan = _plan()
    assert sum(plan.breakdown.values()) == plan.peak_bytes
    assert sum(plan.budget_breakdown.values()) == plan.budget_bytes
    assert sum(plan.host_breakdown.values()) == plan.host_bytes
    assert tuple(plan.breakdown) == estimate.BREAKDOWN_ITEMS


def test_a_plan_survives_json() -> None:
    plan = _plan(rows=ROWS)
    assert from_json(Plan, to_json(plan)) == plan


def test_planning_all_sizes_takes_less_than_a_second_of_work() -> None:
    start = time.process_time()
    for size in cases.SIZES:
        _plan(size, hardware_from_card("8GiB"))
    assert time.process_time() - start < 1.0


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from eightgig.config import Config, DataConfig, ModelConfig\n"
        "from eightgig.hardware.cards import hardware_from_card\n"
        "from eightgig.hardware.probe import probe\n"
        "from eightgig.memory.picture import draw_plan\n"
        "from eightgig.memory.plan import make_plan\n"
        "from eightgig.memory.sweep import sweep\n"
        "from eightgig.models.known import known_model_spec\n"
        "name = 'google/gemma-4-12B-it'\n"
        "config = Config(model=ModelConfig(name=name), data=DataConfig(path='x'))\n"
        "spec = known_model_spec(name)\n"
        "draw_plan(make_plan(spec, hardware_from_card('8GiB'), config))\n"
        "make_plan(spec, probe(), config)\n"
        "heavy = {'torch', 'transformers', 'bitsandbytes', 'triton'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_12b_streams_on_a_4060_because_copies_hide() -> None:
    plan = _plan()
    assert plan.layer_slots == 3
    assert plan.resident_layers == 0
    assert plan.waiting_ratio == pytest.approx(0, abs=0.01)
    value, reason, rejected = _choice(plan, "layer_slots")
    assert value == "3"
    assert reason.startswith("copies hide behind the computation")
    assert "all resident" in rejected
    assert 1 * GIB < plan.peak_bytes < 2.6 * GIB


def test_layers_that_stay_are_counted() -> None:
    plan = _plan(memory={"layer_slots": 20})
    assert plan.resident_layers == 17
    assert "17 of 48 layers stay" in _choice(plan, "layer_slots")[1]
    assert "layers stay" not in _choice(_plan(), "layer_slots")[1]


def test_a_slow_link_buys_resident_layers() -> None:
    machine = cases.card(
        rates=cases.rates(
            host_to_device_bytes_per_second=1e9,
            device_to_host_bytes_per_second=1e9,
            both_ways_bytes_per_second=1e9,
        )
    )
    plan = _plan(machine=machine, train={"gradient_accumulation_steps": 1})
    assert plan.layer_slots > 10
    assert plan.resident_layers == plan.layer_slots - 3
    assert "waits for copies" in _choice(plan, "layer_slots")[1]


def test_a_large_card_with_a_slow_link_keeps_everything() -> None:
    machine = cases.card("RTX 3090", rates=cases.rates(host_to_device_bytes_per_second=3e7))
    plan = _plan("E2B", machine, train={"gradient_accumulation_steps": 1})
    work = cases.workload(cases.gemma("E2B"))
    assert plan.layer_slots == estimate.slots_for_everything(work)
    assert plan.resident_layers == 35
    assert plan.host_weights == "mapped"
    assert "stay" in _choice(plan, "host_weights")[1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layer_slots", 9),
        ("micro_batch_tokens", 3000),
        ("micro_batches_per_visit", 3),
        ("mlp_tile_tokens", 700),
        ("checkpoints", "device"),
        ("host_weights", "mapped"),
        ("kernels", "plain"),
    ],
)
def test_a_number_binds_what_auto_would_decide(name: str, value: Any) -> None:
    plan = _plan("E2B", memory={name: value})
    assert getattr(plan, name) == value
    assert plan.fits


def test_a_bound_budget_is_kept() -> None:
    plan = _plan(memory={"budget": 3 * GIB})
    assert plan.budget_bytes == 3 * GIB
    assert plan.fits
    assert plan.peak_bytes <= 3 * GIB


def test_a_budget_beyond_the_card_does_not_fit() -> None:
    plan = _plan("E2B", memory={"budget": 20 * GIB})
    assert not plan.fits
    assert any("memory.budget" in line and "not there" in line for line in plan.advice)


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"offload": ("down_proj", "gate_proj")}, "memory.offload: gate_proj"),
        ({"layer_slots": 1}, "memory.layer_slots is 1"),
        ({"micro_batch_tokens": 512}, "memory.micro_batch_tokens is 512"),
    ],
)
def test_settings_that_cannot_be_are_refused(memory: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        _plan(memory=memory, data={"max_length": 1024})
    assert caught.value.why
    assert caught.value.fix


def test_outputs_are_kept_where_the_link_has_time_and_the_reason_is_said() -> None:
    plan = _plan()
    assert plan.checkpoints == "host"
    assert plan.offload == ("down_proj", "o_proj", "attention")
    value, reason, rejected = _choice(plan, "offload")
    assert value == "down_proj, o_proj, attention"
    assert "instead of being recomputed" in reason
    assert re.fullmatch(r"down_proj, o_proj: \d+% slower, [\d.]+ MiB less", rejected)
    assert plan.host_breakdown["offload"] > GIB


def test_no_output_is_kept_over_a_slow_link_and_the_reason_is_said() -> None:
    slow = cases.rates(
        host_to_device_bytes_per_second=5e8,
        device_to_host_bytes_per_second=5e8,
        both_ways_bytes_per_second=5e8,
    )
    plan = _plan(machine=cases.card(rates=slow), memory={"checkpoints": "host"})
    assert plan.offload == ()
    value, reason, rejected = _choice(plan, "offload")
    assert value == "none"
    assert "recomputed" in reason
    assert rejected.startswith("down_proj")


def test_no_output_is_kept_beside_layer_inputs_on_the_device() -> None:
    plan = _plan("E2B", memory={"checkpoints": "device"})
    assert plan.offload == ()
    assert "on the device" in _choice(plan, "offload")[1]


def test_outputs_that_are_set_are_kept() -> None:
    plan = _plan(memory={"offload": ("o_proj",)})
    assert plan.offload == ("o_proj",)
    assert _choice(plan, "offload")[1] == "set in the config"


def test_known_rows_make_the_plan_smaller_and_give_a_time() -> None:
    guessed, known = _plan(data={"max_length": 4096}), _plan(rows=ROWS)
    assert known.max_length == 1500
    assert known.peak_bytes < guessed.peak_bytes
    assert guessed.num_steps is None
    assert known.num_steps == 375
    assert known.run_seconds is not None
    assert known.run_seconds_range is not None
    low, high = known.run_seconds_range
    assert low < known.run_seconds < high
    assert known.tokens_per_second_range is not None
    assert known.tokens_per_second is not None
    slow, fast = known.tokens_per_second_range
    assert slow < known.tokens_per_second < fast


@pytest.mark.parametrize(("num_rows", "epochs", "steps"), [(9, 7, 14), (20, 4, 12), (8, 0.5, 1)])
def test_each_epoch_ends_with_a_step_as_in_training(
    num_rows: int, epochs: float, steps: int
) -> None:
    train = {"num_train_epochs": epochs, "gradient_accumulation_steps": 8}
    plan = _plan(rows=dataclasses.replace(ROWS, num_rows=num_rows), train=train)
    assert plan.num_steps == steps


def test_max_steps_is_a_time_without_rows() -> None:
    plan = _plan(train={"max_steps": 10})
    assert plan.num_steps == 10
    assert plan.run_seconds is not None


def test_measured_rates_narrow_the_range() -> None:
    table = _plan()
    measured = _plan(machine=cases.card(rates=cases.rates(is_measured=True)))

    def width(plan: Plan) -> float:
        assert plan.tokens_per_second_range is not None
        low, high = plan.tokens_per_second_range
        return high / low

    assert width(measured) < width(table)


def test_nothing_is_forecast_without_rates() -> None:
    plan = _plan(machine=cases.card(rates=None))
    assert plan.fits
    assert plan.tokens_per_second is None
    assert plan.run_seconds is None


def test_without_packing_a_row_is_a_micro_batch() -> None:
    plan = _plan(data={"packing": False}, rows=ROWS)
    assert plan.micro_batch_tokens == 1500


def test_short_rows_are_packed_into_larger_micro_batches() -> None:
    plan = _plan(rows=dataclasses.replace(ROWS, longest_tokens=300, mean_tokens=200.0))
    assert plan.max_length == 300
    assert plan.micro_batch_tokens > 300


def test_auto_length_takes_the_longest_row_that_fits_and_says_so() -> None:
    rows = dataclasses.replace(ROWS, longest_tokens=100_000, mean_tokens=3000.0)
    plan = _plan(rows=rows)
    assert plan.fits
    assert plan.max_length == plan.longest_row_tokens
    assert 10_000 < plan.max_length < 100_000
    assert any("100,000" in line and "data.too_long" in line for line in plan.advice)
    assert "100,000" in _choice(plan, "max_length")[1]


def test_a_set_length_is_never_shortened_silently() -> None:
    plan = _plan(data={"max_length": 100_000})
    assert plan.max_length == 100_000
    assert not plan.fits
    assert any("data.max_length" in line for line in plan.advice)


def test_the_longest_row_that_is_promised_fits_and_a_longer_one_does_not() -> None:
    longest = _plan("E4B").longest_row_tokens
    assert longest is not None
    assert _plan("E4B", data={"max_length": longest}).fits
    assert not _plan("E4B", data={"max_length": longest + 64}).fits


def test_an_old_card_computes_in_float16() -> None:
    plan = _plan("E2B", cases.card("RTX 2070"))
    assert plan.compute_dtype == "float16"
    assert "float32" in _choice(plan, "compute_dtype")[1]


def test_without_triton_the_kernels_are_plain_and_it_is_said() -> None:
    plan = _plan("E2B", cases.card(has_triton=False))
    assert plan.kernels == "plain"
    assert "Triton is not installed" in _choice(plan, "kernels")[1]


def test_too_little_pinnable_memory_takes_a_detour() -> None:
    plan = _plan(machine=cases.card(pin_limit_bytes=512 * MIB))
    assert plan.host_weights == "pageable"
    assert "512.0 MiB" in _choice(plan, "host_weights")[1]


def test_too_little_main_memory_maps_layers_from_the_disk() -> None:
    machine = cases.card(host_total_bytes=16 * GIB, host_free_bytes=9 * GIB)
    plan = _plan(machine=machine)
    assert plan.fits
    assert plan.host_weights == "mapped"
    assert plan.host_bytes <= plan.host_budget_bytes
    assert plan.mapped_bytes > 7 * GIB
    assert "layers" not in plan.host_breakdown
    assert "disk" in _choice(plan, "host_weights")[1]


def test_the_disk_is_needed_until_the_store_is_there() -> None:
    machine = cases.card(disk_free_bytes=6 * GIB)
    plan = make_plan(cases.gemma("12B"), machine, cases.config())
    assert not plan.fits
    assert any("model.cache_dir" in line for line in plan.advice)
    prepared = make_plan(cases.gemma("12B"), machine, cases.config(), is_prepared=True)
    assert prepared.fits
    assert prepared.disk_bytes < 6 * GIB < plan.disk_bytes


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_optimizers_live_on_the_device(optim: str) -> None:
    plan = _plan(train={"optim": optim})
    assert plan.optimizer_place == "device"
    assert plan.breakdown["lora"] > _plan().breakdown["lora"]
    is_paged = optim == "paged_adamw_8bit"
    assert ("managed_optimizer" in plan.budget_breakdown) == is_paged
    assert ("managed memory" in _choice(plan, "optimizer")[1]) == is_paged


def test_a_processor_computes_in_float32_with_everything_resident() -> None:
    decoder = cases.small_decoder()
    plan = make_plan(decoder, cases.processor(), cases.config())
    assert plan.fits
    assert (plan.device, plan.compute_dtype, plan.kernels) == ("cpu", "float32", "plain")
    assert plan.resident_layers == 4
    assert plan.layer_slots == estimate.slots_for_everything(cases.workload(decoder))
    assert plan.host_bytes == plan.peak_bytes
    assert plan.budget_bytes == plan.host_budget_bytes
    assert plan.head_tile_tokens >= plan.micro_batch_tokens


def test_a_processor_without_room_streams_from_the_disk() -> None:
    machine = cases.processor(host_total_bytes=16 * GIB, host_free_bytes=10 * GIB)
    plan = _plan("12B", machine, data={"max_length": 512})
    assert plan.fits
    assert plan.resident_layers < 48


def test_experts_are_planned_and_said_not_to_train_yet() -> None:
    plan = _plan("26B-A4B")
    assert any("Mixture-of-experts" in line for line in plan.advice)
    assert plan.breakdown["layer_slots"] > 3 * 400 * MIB


def test_an_untied_head_counts_as_a_table_of_its_own() -> None:
    decoder = cases.small_decoder()
    tied = dataclasses.replace(decoder, tie_word_embeddings=True)
    machine = cases.card(pin_limit_bytes=0)
    sizes = [
        make_plan(each, machine, cases.config(memory={"host_weights": "mapped"})).mapped_bytes
        for each in (decoder, tied)
    ]
    assert sizes[0] - sizes[1] == 32_000 * 512 * 2


def test_every_choice_has_a_reason() -> None:
    for plan in (_plan(), _plan("E2B", cases.processor()), _plan(memory={"layer_slots": 5})):
        assert all(choice.reason for choice in plan.choices)
        names = [choice.name for choice in plan.choices]
        assert len(names) == len(set(names))


def test_alternatives_say_why_they_lost() -> None:
    plan = _plan("12B", data={"max_length": 4096})
    rejected = {choice.name: choice.rejected for choice in plan.choices}
    for name in ("micro_batches_per_visit", "mlp_tile_tokens", "checkpoints", "offload"):
        assert re.search(
            r": (no faster|only \d+% faster|\d+% slower), [\d.]+ [GM]iB", rejected[name]
        )
    for name in ("layer_slots", "head", "optimizer", "host_weights", "tables", "kernels"):
        assert rejected[name]


def test_an_alternative_differs_in_the_one_decision() -> None:
    """Fewer outputs kept take less memory; only with other micro-batches could they take more."""
    for tokens in (512, 2048, 8192):
        plan = _plan("E4B", data={"max_length": tokens})
        value, _, rejected = _choice(plan, "offload")
        keeps_fewer = len(rejected.partition(":")[0].split(", ")) < len(value.split(", "))
        assert (" more" if keeps_fewer else " less") not in rejected


def test_rows_beyond_the_model_s_positions_are_refused() -> None:
    with pytest.raises(ConfigError, match="262,144 positions") as caught:
        _plan("12B", data={"max_length": 262_145})
    assert "262144 or less" in caught.value.fix


@settings(max_examples=40, deadline=None)
@given(
    size=st.sampled_from(cases.SIZES),
    name=st.sampled_from(["RTX 4060", "RTX 3060", "RTX 2060", "RTX 3050 Laptop GPU", "RTX 4090"]),
    max_length=st.sampled_from([1, 7, 512, 2051, 16_384]),
    rank=st.sampled_from([1, 8, 128]),
    optim=st.sampled_from(["adamw_torch", "adamw_8bit", "paged_adamw_8bit"]),
    host_gib=st.integers(4, 64),
    packing=st.booleans(),
)
def test_a_plan_that_fits_keeps_every_budget(
    size: str, name: str, max_length: int, rank: int, optim: str, host_gib: int, packing: bool
) -> None:
    machine = cases.card(
        name,
        host_total_bytes=host_gib * GIB,
        host_free_bytes=host_gib * GIB - GIB,
        pin_limit_bytes=host_gib * GIB // 2,
    )
    settings_: Config = cases.config(
        data={"max_length": max_length, "packing": packing},
        lora={"r": rank},
        train={"optim": optim},
    )
    plan = make_plan(cases.gemma(size), machine, settings_)
    assert sum(plan.breakdown.values()) == plan.peak_bytes
    assert plan.max_length == max_length <= plan.micro_batch_tokens
    if plan.fits:
        assert plan.peak_bytes <= plan.budget_bytes
        assert plan.host_bytes <= plan.host_budget_bytes
        assert plan.disk_bytes <= machine.disk_free_bytes
    else:
        assert plan.advice
    if plan.host_weights == "pinned" and settings_.memory.host_weights == AUTO:
        assert host_estimate.pinned_bytes(dict(plan.host_breakdown)) <= machine.pin_limit_bytes
