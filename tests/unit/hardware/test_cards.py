from pathlib import Path

import pytest

from eightgig.errors import HardwareError
from eightgig.hardware.card_table import (
    CARDS,
    card_of_gpu,
    card_of_size,
    find_card,
    link_bytes_per_second,
)
from eightgig.hardware.cards import cards_page, hardware_from_card
from eightgig.hardware.probe import card_rates
from eightgig.units import GIB, MIB

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "cards.md"

# TFLOP/s with float32 sums as NVIDIA's architecture papers and product pages give them.
PUBLISHED = {
    "GeForce RTX 2070": 29.9,
    "GeForce RTX 3060": 25.5,
    "GeForce RTX 3070": 40.6,
    "GeForce RTX 3090": 71.0,
    "GeForce RTX 4060": 30.2,
    "GeForce RTX 4060 Laptop GPU": 29.1,
    "GeForce RTX 4070 Laptop GPU": 40.1,
    "GeForce RTX 4090": 165.2,
    "GeForce RTX 5060": 38.4,
    "GeForce RTX 5090": 209.5,
    "Tesla T4": 65.0,
    "L4": 121.0,
    "A100-SXM4-40GB": 312.0,
    "H100 80GB HBM3": 989.0,
}


def test_the_table_has_enough_consumer_and_laptop_cards() -> None:
    consumer = [card for card in CARDS if "GeForce" in card.name]
    assert len(consumer) >= 25
    assert sum(card.is_laptop for card in consumer) >= 10
    assert len({card.name for card in CARDS}) == len(CARDS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_arithmetic_is_as_published(name: str) -> None:
    (card,) = [card for card in CARDS if card.name == name]
    assert card.peak_flops_per_second / 1e12 == pytest.approx(PUBLISHED[name], rel=0.01)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_card_is_found_by_its_name_and_by_the_driver_s(card: object) -> None:
    assert find_card(card.name) is card
    driver_name = f"NVIDIA {card.name.removesuffix(' 8GB').removesuffix(' 16GB')}"
    found = card_of_gpu(driver_name, card.memory_gib * GIB - 200 * MIB)
    assert found is card


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("RTX 4060", "GeForce RTX 4060"),
        ("4060", "GeForce RTX 4060"),
        ("rtx4060", "GeForce RTX 4060"),
        ("rtx 4060 laptop", "GeForce RTX 4060 Laptop GPU"),
        ("NVIDIA GeForce RTX 3060 Ti", "GeForce RTX 3060 Ti"),
        ("3060 8GB", "GeForce RTX 3060 8GB"),
        ("3060 12GiB", "GeForce RTX 3060"),
        ("4060 Ti 16GB", "GeForce RTX 4060 Ti 16GB"),
        ("RTX 4060 Mobile", "GeForce RTX 4060 Laptop GPU"),
    ],
)
def test_people_write_names_in_many_ways(text: str, name: str) -> None:
    card = find_card(text)
    assert card is not None
    assert card.name == name


def test_cards_of_one_name_are_told_apart_by_their_memory() -> None:
    small = card_of_gpu("NVIDIA GeForce RTX 3060", 8 * GIB)
    large = card_of_gpu("NVIDIA GeForce RTX 3060", 12 * GIB)
    assert small is not None
    assert large is not None
    assert (small.memory_gib, large.memory_gib) == (8, 12)


def test_an_unknown_card_is_unknown() -> None:
    assert find_card("RTX 9999") is None
    assert card_of_gpu("NVIDIA GeForce GTX 1080", 8 * GIB) is None
    assert card_of_gpu("NVIDIA GeForce RTX 4060", 24 * GIB) is None


def test_a_size_stands_for_a_common_card() -> None:
    assert card_of_size(8 * GIB).name == "GeForce RTX 4060"
    assert card_of_size(12 * GIB).name == "GeForce RTX 3060"
    assert card_of_size(24 * GIB).memory_gib == 24


def test_a_machine_from_a_name_has_the_card_s_memory_and_rates() -> None:
    machine = hardware_from_card("RTX 2070")
    assert machine.vram_total_bytes == 8 * GIB
    assert machine.compute_capability == (7, 5)
    assert not machine.has_bf16
    assert machine.rates is not None
    assert not machine.rates.is_measured


def test_a_machine_from_a_size_says_whose_rates_it_has() -> None:
    machine = hardware_from_card("8GiB")
    assert machine.vram_total_bytes == 8 * GIB
    assert "RTX 4060" in machine.name


def test_main_memory_is_assumed_or_given() -> None:
    assumed, given = hardware_from_card("4060"), hardware_from_card("4060", host_total_bytes=GIB)
    assert assumed.host_total_bytes == 32 * GIB
    assert assumed.host_free_bytes < 32 * GIB
    assert given.host_total_bytes == GIB
    assert given.host_free_bytes == 0
    assert given.device == "cuda"


def test_a_display_takes_memory() -> None:
    free, shown = (hardware_from_card("RTX 4060", has_display=value) for value in (False, True))
    assert free.vram_free_bytes - shown.vram_free_bytes == 512 * MIB


def test_neither_a_card_nor_a_size_is_refused_with_near_names() -> None:
    with pytest.raises(HardwareError, match="neither a card of the table nor a size") as caught:
        hardware_from_card("RTX 4061")
    assert "RTX 4060" in caught.value.fix


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("A100", "A100-SXM4-40GB"),
        ("h100", "H100 80GB HBM3"),
        ("a2000", "RTX A2000 12GB"),
        ("Laptop 4060", "GeForce RTX 4060 Laptop GPU"),
    ],
)
def test_a_card_with_all_the_words_is_named_first(text: str, first: str) -> None:
    with pytest.raises(HardwareError) as caught:
        hardware_from_card(text)
    assert f'"8GiB", or a name such as {first}' in caught.value.fix


@pytest.mark.parametrize("size", ["0GiB", "8", "512MiB"])
def test_no_card_is_that_small(size: str) -> None:
    with pytest.raises(HardwareError, match="neither a card of the table nor a size") as caught:
        hardware_from_card(size)
    assert "8GiB" in caught.value.fix


def test_an_older_board_slows_the_link() -> None:
    card = find_card("RTX 5060")
    assert card is not None
    new, old = card_rates(card), card_rates(card, generation=4)
    narrow = card_rates(card, lanes=4)
    assert new.host_to_device_bytes_per_second == 2 * old.host_to_device_bytes_per_second
    assert narrow.host_to_device_bytes_per_second < new.host_to_device_bytes_per_second
    # A board cannot make a card faster than its own connector.
    assert card_rates(card, generation=6, lanes=16) == new


def test_an_unusual_link_is_estimated_by_its_lanes() -> None:
    assert link_bytes_per_second(3, 2) == pytest.approx(1.5e9)
    assert link_bytes_per_second(4, 8, is_laptop=True) < link_bytes_per_second(4, 8)


def test_the_page_of_cards_is_up_to_date() -> None:
    assert cards_page() in PAGE.read_text(encoding="utf-8")
