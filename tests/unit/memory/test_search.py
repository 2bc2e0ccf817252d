import dataclasses
from typing import Any

import pytest

from eightgig.memory.problem import read_problem, search_for
from eightgig.memory.search import (
    DISK_WORTH_RATIO,
    SLOT_WORTH_RATIO,
    WORTH_RATIO,
    Search,
    choose_kernels,
)
from eightgig.units import GIB
from tests.unit.memory import cases

OFFLOADS = ("down_proj", "o_proj", "attention")


def _search(size: str = "12B", machine: Any = None, **groups: Any) -> Search:
    problem = read_problem(
        cases.gemma(size),
        machine or cases.card(),
        cases.config(**{"data": {"max_length": 2048}, **groups}),
        rows=None,
        is_prepared=False,
    )
    return search_for(problem, problem.wanted_length)


def test_the_fastest_within_the_tolerance_takes_the_least_memory() -> None:
    best, candidates = _search().run()
    fitting = [c for c in candidates if c.fits and c.host_weights != "mapped"]
    fastest = min(candidate.time.seconds for candidate in fitting)
    close = [c for c in fitting if c.time.seconds <= WORTH_RATIO * fastest]
    assert best in close
    assert len(close) < len(fitting)
    assert best.peak_bytes == min(c.peak_bytes for c in close)


def test_where_nothing_fits_the_least_is_returned() -> None:
    search = _search(memory={"budget": GIB // 4})
    best, candidates = search.run()
    assert not best.fits
    assert best.peak_bytes == min(candidate.peak_bytes for candidate in candidates)


def test_outputs_are_kept_where_the_link_has_time_and_memory_allows() -> None:
    machine = cases.card(host_total_bytes=96 * GIB, host_free_bytes=90 * GIB)
    outputs = dataclasses.replace(_search(machine=machine), offloads=OFFLOADS)
    best, _ = outputs.run()
    assert best.layout.offload[:2] == ("down_proj", "o_proj")
    assert best.layout.checkpoints == "host"
    assert best.host["offload"] > 0
    recomputing, _ = dataclasses.replace(outputs, offloads=()).run()
    assert best.time.seconds < 0.95 * recomputing.time.seconds


def test_outputs_are_not_kept_where_main_memory_is_short() -> None:
    machine = cases.card(host_total_bytes=16 * GIB, host_free_bytes=14 * GIB)
    best, _ = dataclasses.replace(_search(machine=machine), offloads=OFFLOADS).run()
    assert best.fits
    assert best.host_bytes <= _host_budget(machine)


def _host_budget(machine: Any) -> int:
    return _search(machine=machine).host.total_bytes


def test_outputs_are_not_kept_where_the_link_is_slow() -> None:
    machine = cases.card(
        host_total_bytes=96 * GIB,
        host_free_bytes=90 * GIB,
        rates=cases.rates(
            host_to_device_bytes_per_second=0.3e9,
            device_to_host_bytes_per_second=0.3e9,
            both_ways_bytes_per_second=0.3e9,
        ),
    )
    best, _ = dataclasses.replace(_search(machine=machine), offloads=OFFLOADS).run()
    assert best.layout.offload == ()


def test_slots_grow_only_while_they_make_a_step_faster() -> None:
    rates = cases.rates(host_to_device_bytes_per_second=2e9)
    train = {"gradient_accumulation_steps": 1}
    best, _ = _search(machine=cases.card(rates=rates), train=train).run()
    more = dataclasses.replace(best.layout, layer_slots=best.layout.layer_slots + 5)
    search = _search(machine=cases.card(rates=rates), train=train)
    assert search.candidate(more).time.seconds >= best.time.seconds / SLOT_WORTH_RATIO


def test_the_disk_is_avoided_where_main_memory_allows() -> None:
    best, candidates = _search("31B").run()
    assert best.host_weights == "pinned"
    from_disk = [c.time.seconds for c in candidates if c.fits and c.host_weights == "mapped"]
    assert best.time.seconds / DISK_WORTH_RATIO < min(from_disk) < best.time.seconds


def test_the_disk_is_used_where_it_gains_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eightgig.memory.search.DISK_WORTH_RATIO", 1.0)
    assert _search("31B").run()[0].host_weights == "mapped"


@pytest.mark.parametrize(
    ("capability", "has_triton", "setting", "expected"),
    [
        ((8, 9), True, "auto", "triton"),
        ((7, 5), True, "auto", "triton"),
        ((7, 0), True, "auto", "plain"),
        ((8, 9), False, "auto", "plain"),
        ((8, 9), True, "plain", "plain"),
        ((8, 9), False, "triton", "triton"),
    ],
)
def test_kernels_follow_triton_the_card_and_the_setting(
    capability: tuple[int, int], has_triton: bool, setting: str, expected: str
) -> None:
    machine = cases.card(compute_capability=capability, has_triton=has_triton)
    memory = cases.config(memory={"kernels": setting}).memory
    assert choose_kernels(machine, memory) == expected
