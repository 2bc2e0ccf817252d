"""Machines that are not here: `plan --vram "RTX 4060"`, and the table of cards as a page."""

from __future__ import annotations

from eightgig.errors import HardwareError
from eightgig.hardware.card_table import CARDS, Card, card_of_size, closest_names, find_card
from eightgig.hardware.probe import Hardware, card_rates, context_bytes
from eightgig.units import GIB, MIB, format_bytes, parse_bytes

# nvidia-smi shows 8,151 to 8,188 MiB on an 8 GiB card and the driver holds some of that; a desktop
# with a browser takes more.
DRIVER_BYTES = 256 * MIB
DESKTOP_BYTES = 512 * MIB
SMALLEST_CARD_BYTES = GIB
TYPICAL_HOST_BYTES = 32 * GIB
TYPICAL_SYSTEM_BYTES = 4 * GIB
TYPICAL_DISK_BYTES = 200 * GIB


def hardware_from_card(
    name_or_size: str, *, host_total_bytes: int = TYPICAL_HOST_BYTES, has_display: bool = False
) -> Hardware:
    """A machine with the card that `name_or_size` means: `RTX 4060`, `4060 laptop`, `8GiB`.

    A size stands for the slowest common card of that size.

    Args:
        name_or_size: Name or memory of the card.
        host_total_bytes: Main memory, of which the system takes 4 GiB.
        has_display: Whether the desktop is drawn by the card, as on most Windows machines.

    Raises:
        HardwareError: Neither a card of the table nor a size.
    """
    card = find_card(name_or_size)
    total, name = (card.memory_gib * GIB, card.name) if card else (_size(name_or_size), "")
    if card is None:
        card = card_of_size(total)
        name = f"a card of {format_bytes(total)} (rates of {card.name})"
    held = DRIVER_BYTES + (DESKTOP_BYTES if has_display else 0)
    return Hardware(
        device="cuda",
        name=name,
        compute_capability=card.compute_capability,
        has_bf16=card.compute_capability >= (8, 0),
        vram_total_bytes=total,
        vram_free_bytes=max(0, total - held),
        context_bytes=context_bytes(card.name),
        display_bytes=held,
        host_total_bytes=host_total_bytes,
        host_free_bytes=max(0, host_total_bytes - TYPICAL_SYSTEM_BYTES),
        pin_limit_bytes=int(host_total_bytes * (0.5 if has_display else 0.9)),
        disk_free_bytes=TYPICAL_DISK_BYTES,
        cpu_threads=8,
        rates=card_rates(card),
        has_triton=True,
    )


def _size(text: str) -> int:
    try:
        size_bytes = parse_bytes(text)
    except ValueError:
        size_bytes = 0
    if size_bytes < SMALLEST_CARD_BYTES:
        close = closest_names(text) or [card.name for card in CARDS[:4]]
        raise HardwareError(
            f'"{text}" is neither a card of the table nor a size.',
            why="A plan for another machine needs the card's memory and rates.",
            fix=f'Write a size such as "8GiB", or a name such as {", ".join(close)}.',
        )
    return size_bytes


def cards_page() -> str:
    """The table of cards as Markdown."""
    lines = [
        "| card | memory GiB | type | TFLOP/s | memory GB/s | PCIe | pinned copies GB/s |",
        "|---|---:|---|---:|---:|---|---:|",
    ]
    lines += [_row(card) for card in CARDS]
    return "\n".join(lines) + "\n"


def _row(card: Card) -> str:
    rates = card_rates(card)
    return (
        f"| {card.name} | {card.memory_gib} | {card.compute_type} "
        f"| {card.peak_flops_per_second / 1e12:.1f} | {card.memory_gb_per_second} "
        f"| {card.pcie_generation}.0 x{card.pcie_lanes} "
        f"| {rates.host_to_device_bytes_per_second / 1e9:.1f} |"
    )
