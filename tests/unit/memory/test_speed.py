import dataclasses

import pytest

from eightgig.memory import speed
from eightgig.memory.estimate import Layout
from tests.unit.memory import cases

LAYOUT = Layout(
    micro_batch_tokens=2048,
    micro_batches_per_visit=1,
    layer_slots=3,
    mlp_tile_tokens=2048,
    head_tile_tokens=1024,
    checkpoints="host",
    kernels="triton",
)
# reference arithmetic in GFLOP per token: linears with recompute, head, attention at 2,048 tokens.
FLOPS = {
    "E2B": (11.3, 1.6, 1.0),
    "E4B": (23.8, 2.7, 1.1),
    "12B": (65.4, 4.0, 3.5),
    "26B-A4B": (18.5, 3.0, 2.2),
    "31B": (175.7, 5.6, 8.7),
}

H100 = cases.rates(
    gemm_flops_per_second=726.6e12,
    memory_bytes_per_second=2826e9,
    host_to_device_bytes_per_second=52.5e9,
    device_to_host_bytes_per_second=54.2e9,
    both_ways_bytes_per_second=78.8e9,
    copy_engines=2,
    launch_seconds=1.2e-5,
)


def _time(size: str = "12B", layout: Layout = LAYOUT, **changes: object) -> speed.StepTime:
    work = cases.workload(
        cases.gemma(size), max_length=2048, train={"gradient_accumulation_steps": 1}
    )
    return speed.step_time(work, layout, cases.rates(**changes))


@pytest.mark.parametrize("size", cases.SIZES)
def test_operations_per_token_are_those_of_the_architecture(size: str) -> None:
    work = cases.workload(cases.gemma(size), max_length=2048)
    linear, head, attention = FLOPS[size]
    assert speed.linear_flops_per_token(work) / 1e9 == pytest.approx(linear, rel=0.02)
    assert speed.head_flops_per_loss_token(work) / 1e9 == pytest.approx(head, abs=0.06)
    assert speed.attention_flops_per_token(work, 2048) / 1e9 == pytest.approx(attention, abs=0.12)


def test_a_query_sees_half_the_row_or_the_window() -> None:
    assert speed.mean_keys(2048, None) == 1024
    assert speed.mean_keys(512, 1024) == 256
    assert speed.mean_keys(2048, 1024) == 1024 - 1024**2 / 4096


def test_a_card_is_forecast_near_what_its_arithmetic_allows() -> None:
    # 12B on an RTX 4060, one micro-batch of 2,048 tokens: 281 tokens/s were worked out elsewhere.
    work = cases.workload(cases.gemma("12B"), max_length=2048)
    rates = cases.card("RTX 4060").rates
    assert rates is not None
    assert speed.step_time(work, LAYOUT, rates).tokens_per_second == pytest.approx(281, rel=0.15)


def test_small_layers_on_a_fast_card_wait_for_python() -> None:
    work = cases.workload(cases.gemma("E2B"), max_length=1024)
    layout = dataclasses.replace(LAYOUT, micro_batch_tokens=1024)
    faster = dataclasses.replace(H100, gemm_flops_per_second=2e15)
    times = [speed.step_time(work, layout, rates) for rates in (H100, faster)]
    assert times[1].seconds == pytest.approx(times[0].seconds, rel=0.05)
    together = dataclasses.replace(layout, micro_batch_tokens=8192)
    assert speed.step_time(work, together, H100).seconds < 0.5 * times[0].seconds


def test_narrow_models_reach_less_of_a_fast_card() -> None:
    def seconds(rate: float) -> float:
        work = cases.workload(cases.gemma("E2B"), max_length=8192)
        layout = dataclasses.replace(LAYOUT, micro_batch_tokens=8192, mlp_tile_tokens=8192)
        memory = {"memory_bytes_per_second": 1e15, "host_to_device_bytes_per_second": 1e15}
        return speed.step_time(
            work, layout, cases.rates(gemm_flops_per_second=rate, **memory)
        ).compute_seconds

    assert 13 < seconds(20e12) / seconds(300e12) < 14.7


def test_attention_reaches_less_of_a_hopper_card() -> None:
    hopper = _time(layout=dataclasses.replace(LAYOUT, is_hopper=True))
    plain = {"kernels": "plain", "is_hopper": True}
    assert hopper.compute_seconds > _time().compute_seconds
    assert _time(layout=dataclasses.replace(LAYOUT, **plain)).compute_seconds == pytest.approx(
        _time(layout=dataclasses.replace(LAYOUT, kernels="plain")).compute_seconds
    )


def test_a_slow_link_makes_a_step_wait_and_resident_layers_help() -> None:
    slow = {"host_to_device_bytes_per_second": 0.5e9}
    waiting = _time(**slow)
    resident = _time(layout=dataclasses.replace(LAYOUT, layer_slots=40), **slow)
    assert waiting.waiting_seconds > 0.3 * waiting.seconds
    assert resident.seconds < 0.6 * waiting.seconds
    assert resident.waiting_seconds < 0.3 * waiting.waiting_seconds
    assert _time().waiting_seconds == 0


def test_nothing_is_copied_when_everything_stays() -> None:
    work = cases.workload(cases.small_decoder())
    all_slots = speed.slots_for_everything(work)
    assert speed.copies_per_pass(4, all_slots - 4, all_slots) == (0, 0, 0)


@pytest.mark.parametrize(
    ("layers", "chunks", "slots", "copies"),
    [
        (3, 1, 1, (2, 1, 3)),  # the first layer stays over the turn of the step
        (3, 1, 2, (1, 1, 2)),  # the last layer over the head, too
        (3, 0, 1, (2, 0, 2)),
        (4, 0, 4, (0, 0, 0)),
    ],
)
def test_copies_follow_belady(
    layers: int, chunks: int, slots: int, copies: tuple[int, int, int]
) -> None:
    assert speed.copies_per_pass(layers, chunks, slots) == copies


def test_more_slots_never_copy_more() -> None:
    totals = [sum(speed.copies_per_pass(12, 5, slots)) for slots in range(1, 18)]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] == 0


def test_one_copy_engine_takes_one_direction_at_a_time() -> None:
    slow = {"host_to_device_bytes_per_second": 2e9, "device_to_host_bytes_per_second": 2e9}
    one = _time(**slow, both_ways_bytes_per_second=2e9, copy_engines=1)
    two = _time(**slow, both_ways_bytes_per_second=4e9, copy_engines=2)
    assert two.copy_seconds < one.copy_seconds


def test_layers_from_a_disk_are_read_at_its_rate() -> None:
    work = cases.workload(cases.gemma("12B"), max_length=2048)
    pinned = speed.step_time(work, LAYOUT, cases.rates())
    mapped = speed.step_time(work, LAYOUT, cases.rates(), 5e8)
    assert mapped.waiting_seconds > 10 * max(pinned.waiting_seconds, 1)


def test_micro_batches_that_share_a_visit_share_its_copies() -> None:
    work = cases.workload(cases.gemma("12B"), max_length=2048)
    link = cases.rates(host_to_device_bytes_per_second=0.5e9)
    alone = speed.step_time(work, LAYOUT, link)
    shared = dataclasses.replace(LAYOUT, micro_batches_per_visit=8)
    assert speed.step_time(work, shared, link).seconds < 0.5 * alone.seconds


def test_kept_outputs_save_products_and_cost_copies() -> None:
    kept = dataclasses.replace(LAYOUT, offload=("down_proj", "o_proj"))
    plain, saved = _time(), _time(layout=kept)
    assert saved.compute_seconds < 0.93 * plain.compute_seconds
    assert saved.copy_seconds > plain.copy_seconds
    attention = _time(layout=dataclasses.replace(LAYOUT, offload=("attention",)))
    assert attention.compute_seconds < plain.compute_seconds


def test_the_host_optimizer_hides_behind_a_long_step() -> None:
    host = cases.workload(cases.gemma("12B"), max_length=2048)
    time = speed.step_time(host, LAYOUT, cases.rates())
    assert time.optimizer_seconds > 0.05
    assert time.seconds == pytest.approx(time.compute_seconds, rel=0.01)


def test_rows_of_one_length_fill_micro_batches_by_the_row() -> None:
    work = cases.workload(cases.small_decoder(), max_length=1500)
    assert speed.num_micro_batches(work, LAYOUT) == 8
    pairs = dataclasses.replace(LAYOUT, micro_batch_tokens=3000)
    assert speed.num_micro_batches(work, pairs) == 4


def test_mixed_rows_are_packed_and_unpacked_ones_are_not() -> None:
    work = dataclasses.replace(cases.workload(cases.small_decoder()), row_tokens=300.0)
    assert speed.num_micro_batches(work, LAYOUT) == 2
    alone = dataclasses.replace(work, is_packed=False)
    assert speed.num_micro_batches(alone, LAYOUT) == 8
