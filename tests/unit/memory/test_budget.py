import dataclasses

import pytest

from eightgig.config import MemoryConfig
from eightgig.hardware.cards import hardware_from_card
from eightgig.memory.budget import device_budget, host_budget
from eightgig.units import GIB, MIB
from tests.unit.memory import cases


def test_parts_add_up_to_the_budget() -> None:
    for memory in (MemoryConfig(), MemoryConfig(budget=3 * GIB, host_budget=2 * GIB)):
        for budget in (
            device_budget(cases.card(), memory, managed_bytes=100 * MIB),
            host_budget(cases.card(), memory),
        ):
            assert sum(budget.parts.values()) == budget.total_bytes


def test_an_8_gib_card_leaves_what_the_design_says() -> None:
    headless = device_budget(hardware_from_card("8GiB"), MemoryConfig(), managed_bytes=0)
    windows = device_budget(
        hardware_from_card("8GiB", has_display=True), MemoryConfig(), managed_bytes=0
    )
    assert 6.75 * GIB <= headless.total_bytes <= 7.0 * GIB
    assert 6.3 * GIB <= windows.total_bytes <= 6.6 * GIB


def test_what_other_programs_hold_is_subtracted() -> None:
    free = cases.card()
    held = dataclasses.replace(free, display_bytes=free.display_bytes + GIB)
    budgets = [
        device_budget(each, MemoryConfig(), managed_bytes=0).total_bytes for each in (free, held)
    ]
    assert budgets[0] - budgets[1] == GIB


def test_managed_memory_is_subtracted_because_the_cap_does_not_see_it() -> None:
    without, with_it = (
        device_budget(cases.card(), MemoryConfig(), managed_bytes=size) for size in (0, 300 * MIB)
    )
    assert without.total_bytes - with_it.total_bytes == 300 * MIB
    assert with_it.parts["managed_optimizer"] == -300 * MIB


def test_a_number_binds_and_says_how_far_it_is_from_the_machine() -> None:
    budget = device_budget(cases.card(), MemoryConfig(budget=4 * GIB), managed_bytes=0)
    assert budget.total_bytes == 4 * GIB
    assert budget.available_bytes > 6 * GIB
    assert budget.parts["set_in_config"] == 4 * GIB - budget.available_bytes


def test_a_full_card_leaves_nothing_rather_than_less() -> None:
    full = cases.card(display_bytes=8 * GIB)
    budget = device_budget(full, MemoryConfig(), managed_bytes=0)
    assert budget.total_bytes == 0
    assert sum(budget.parts.values()) == 0
    assert budget.parts["missing"] > 0
    assert "set_in_config" not in budget.parts


@pytest.mark.parametrize("total_gib", [8, 16, 64])
def test_main_memory_keeps_a_margin(total_gib: int) -> None:
    machine = cases.card(host_total_bytes=total_gib * GIB, host_free_bytes=total_gib * GIB // 2)
    budget = host_budget(machine, MemoryConfig())
    assert GIB <= machine.host_free_bytes - budget.total_bytes <= 6 * GIB
