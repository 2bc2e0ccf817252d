"""Which item to load into which slot, and when: Belady's rule over a known order of visits.

The order of a training step is known and repeats, so the best victim is known, too: the item
that is used furthest in the future.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Far enough for a copy to hide behind computation. Loading still earlier would evict what is
# needed sooner than the best victim at the time of need.
_VISITS_AHEAD = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """Copy `item` into `slot`."""

    item: int
    slot: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Cycle:
    """One pass over the visits.

    Attributes:
        loads: For each visit, the loads to start just before it, in order.
        slots: For each visit, the slot its item is in.
        end: Item of each slot after the last visit.
    """

    loads: tuple[tuple[Load, ...], ...]
    slots: tuple[int, ...]
    end: tuple[int | None, ...]


def plan_cycle(visits: Sequence[int], start: Sequence[int | None]) -> Cycle:
    """Loads for one pass over `visits` that will be followed by the same pass again.

    Before visit i, the items of the next visits are loaded in order as long as there is a slot
    whose item is needed later than they are, or never; the item being visited keeps its slot.

    Args:
        visits: Items in the order they are used.
        start: Item of each slot at the beginning, None where it is empty.
    """
    n, num_slots = len(visits), len(start)
    next_use = _next_uses(visits)
    slot_of = {item: slot for slot, item in enumerate(start) if item is not None}
    item_in: list[int | None] = list(start)
    # Position (beyond n: of the next pass) at which each slot's item is used next.
    used_at = [_first_use(visits, item) for item in item_in]
    all_loads, all_slots = [], []
    frontier = 0  # visits before this position have their item in a slot
    for at in range(n):
        loads = []
        frontier = max(frontier, at)
        while frontier <= at + min(_VISITS_AHEAD, num_slots - 1):
            item = visits[frontier % n]
            if item not in slot_of:
                slot = max(range(num_slots), key=lambda s: used_at[s])
                if used_at[slot] <= frontier:
                    break
                evicted = item_in[slot]
                if evicted is not None:
                    del slot_of[evicted]
                item_in[slot], slot_of[item] = item, slot
                used_at[slot] = frontier
                loads.append(Load(item=item, slot=slot))
            frontier += 1
        slot = slot_of[visits[at]]
        all_loads.append(tuple(loads))
        all_slots.append(slot)
        used_at[slot] = next_use[at]
    return Cycle(loads=tuple(all_loads), slots=tuple(all_slots), end=tuple(item_in))


def copied_items(visits: Sequence[int], num_slots: int) -> list[int]:
    """Items copied in one pass once the passes repeat."""
    state: tuple[int | None, ...] = (None,) * num_slots
    seen: dict[tuple[int | None, ...], Cycle] = {}
    while state not in seen:
        seen[state] = plan_cycle(visits, state)
        state = seen[state].end
    return [load.item for loads in seen[state].loads for load in loads]


def _next_uses(visits: Sequence[int]) -> list[int]:
    """Position of the next visit of the same item, counting on into the next pass."""
    n = len(visits)
    following: dict[int, int] = {}
    result = [0] * n
    for position in range(2 * n - 1, -1, -1):
        item = visits[position % n]
        if position < n:
            result[position] = following[item]
        following[item] = position
    return result


def _first_use(visits: Sequence[int], item: int | None) -> int:
    """First visit of `item`; far beyond the pass where it has none."""
    return visits.index(item) if item in visits else 3 * len(visits)
