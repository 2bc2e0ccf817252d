"""How much may be used: of the card, of main memory, and what is subtracted from each."""

from __future__ import annotations

from dataclasses import dataclass

from eightgig.config import AUTO, MemoryConfig
from eightgig.hardware.probe import Hardware
from eightgig.units import GIB, MIB

# A wrong plan must fail loudly and not spill into the driver's shared memory, so the last part of
# the card is never promised: other programs and the driver grow during a long run.
CARD_MARGIN_RATIO = 0.05
SMALLEST_CARD_MARGIN_BYTES = 256 * MIB
HOST_MARGIN_RATIO = 0.08
SMALLEST_HOST_MARGIN_BYTES = GIB


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What may be used.

    Attributes:
        total_bytes: The budget.
        available_bytes: What the machine would allow; a setting may stay below it.
        parts: How `total_bytes` came about; they add up to it. `missing` is what is held beyond
            what there is.
    """

    total_bytes: int
    available_bytes: int
    parts: dict[str, int]


def device_budget(hardware: Hardware, memory: MemoryConfig, *, managed_bytes: int) -> Budget:
    """What the CUDA allocator may reserve: the card without what others hold, and a margin.

    `managed_bytes` (paged optimizer states) live on the card but outside the allocator.
    """
    margin = max(SMALLEST_CARD_MARGIN_BYTES, int(hardware.vram_total_bytes * CARD_MARGIN_RATIO))
    parts = {
        "card": hardware.vram_total_bytes,
        "display_and_other_programs": -hardware.display_bytes,
        "context": -hardware.context_bytes,
        "margin": -margin,
        "managed_optimizer": -managed_bytes,
    }
    return _limited(parts, memory.budget)


def host_budget(hardware: Hardware, memory: MemoryConfig) -> Budget:
    """Main memory that may be used: what is free without swapping, and a margin."""
    margin = max(SMALLEST_HOST_MARGIN_BYTES, int(hardware.host_total_bytes * HOST_MARGIN_RATIO))
    parts = {"free": hardware.host_free_bytes, "margin": -margin}
    return _limited(parts, memory.host_budget)


def _limited(parts: dict[str, int], setting: int | str) -> Budget:
    available = max(0, sum(parts.values()))
    total = available if setting == AUTO else int(setting)
    kept = {name: size for name, size in parts.items() if size}
    if total != sum(kept.values()):
        rest = "missing" if setting == AUTO else "set_in_config"
        kept[rest] = total - sum(kept.values())
    return Budget(total_bytes=total, available_bytes=available, parts=kept)
