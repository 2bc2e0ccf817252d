"""The ring of slots: frozen weights are copied into a slot just before they are needed.

An item is one decoder layer or one chunk of the head. Its frozen part is copied as Belady's rule
says; its changing part (the layer's adapter) is copied again after each optimizer step, too.
Events order copies and computation; no tensor that autograd keeps ever points into a slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from eightgig.streaming.belady import Cycle, Load, plan_cycle
from eightgig.streaming.meter import WaitMeter
from eightgig.streaming.side import SideStream

_ALIGNMENT_BYTES = 256
_BOUNCE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class RingItem:
    """What a slot is filled with.

    Attributes:
        frozen: Flat uint8 host memory.
        changing: Returns flat host memory that is copied behind `frozen`, after waiting until it
            is up to date; None where there is none.
        changing_bytes: Its size.
        check: Called once, before the first copy; raises if the frozen bytes are damaged.
    """

    frozen: Tensor
    changing: Callable[[], Tensor] | None = None
    changing_bytes: int = 0
    check: Callable[[], None] | None = None

    @property
    def changing_start_bytes(self) -> int:
        """Where the changing part begins in a slot."""
        return -(-self.frozen.numel() // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES

    @property
    def size_bytes(self) -> int:
        """Bytes of a slot that the item takes."""
        return self.changing_start_bytes + self.changing_bytes


class Ring:
    """Slots on a device, filled ahead of a known order of visits.

    Use: `start(visits)` once per order, then for each visit in turn `acquire()`, compute,
    `release()`. The order repeats from its beginning. What computes is the stream that was current
    when the ring was made.

    Args:
        items: Everything that is ever visited.
        num_slots: At least 2, or the number of items.
        device: Where the slots are.
        meter: Times the waits for copies.
        poison: Fill a slot with NaN bytes when its item is replaced (tests).
    """

    def __init__(
        self,
        items: Sequence[RingItem],
        num_slots: int,
        device: torch.device,
        *,
        meter: WaitMeter,
        poison: bool = False,
    ) -> None:
        assert num_slots >= min(2, len(items)), f"{num_slots} slots for {len(items)} items"
        self.items = tuple(items)
        self._device = device
        self._meter = meter
        self.slot_bytes = max(item.size_bytes for item in items)
        self._poison = _poison(self.slot_bytes, device) if poison else None
        self._slots = [
            torch.empty(self.slot_bytes, dtype=torch.uint8, device=device)
            for _ in range(min(num_slots, len(items)))
        ]
        self._lane = _CudaLane(device) if device.type == "cuda" else _HostLane()
        self._ready: list[Completion | None] = [None] * len(self._slots)
        self._contents: list[int | None] = [None] * len(self._slots)
        self._versions = [-1] * len(self._slots)
        self._version = 0
        self._checked: set[int] = set()
        self._cycles: dict[tuple[tuple[int, ...], tuple[int | None, ...]], Cycle] = {}
        self._visits: tuple[int, ...] = ()
        self._at = 0

    @property
    def num_slots(self) -> int:
        """Slots on the device."""
        return len(self._slots)

    def start(self, visits: Sequence[int]) -> None:
        """Follow another order, from its beginning; what the slots hold is used."""
        self._visits = tuple(visits)
        self._begin_cycle()

    def invalidate_changing(self) -> None:
        """Say that the changing parts on the host are new; slots are brought up to date."""
        self._version += 1

    def acquire(self) -> Tensor:
        """The slot of the next visit, (slot_bytes,) uint8; ready for what computes."""
        item, slot = self._visits[self._at], self._cycle.slots[self._at]
        for load in self._cycle.loads[self._at]:
            self._load(load)
        if self._versions[slot] != self._version:
            self._copy_changing(item, slot)
        ready = self._ready[slot]
        if ready is not None:
            self._meter.wait(ready.wait)
        return self._slots[slot]

    def release(self) -> None:
        """End the visit: its slot may be filled anew once the work queued so far is done."""
        slot = self._cycle.slots[self._at]
        self._lane.mark_free(slot)
        self._at += 1
        if self._at == len(self._visits):
            self._begin_cycle()
        self._prefetch_changing()

    def synchronize(self) -> None:
        """Wait for every copy."""
        self._lane.synchronize()

    def close(self) -> None:
        """Wait for every copy and drop the slots."""
        self._lane.close()
        self._slots.clear()

    def _begin_cycle(self) -> None:
        self._at = 0
        contents = tuple(self._contents)
        key = (self._visits, contents)
        if key not in self._cycles:
            self._cycles[key] = plan_cycle(self._visits, contents)
        self._cycle = self._cycles[key]

    def _load(self, load: Load) -> None:
        item = self.items[load.item]
        if item.check is not None and load.item not in self._checked:
            item.check()
            self._checked.add(load.item)
        slot = self._slots[load.slot]
        changing = item.changing() if item.changing is not None else None
        parts = _parts(item, slot, item.frozen, changing)
        if self._poison is not None:
            # As a copy of its own it comes behind the slot's last use and before the item.
            parts = [(slot, self._poison), *parts]
        self._ready[load.slot] = self._lane.copy(load.slot, parts)
        self._contents[load.slot] = load.item
        self._versions[load.slot] = self._version

    def _copy_changing(self, index: int, slot: int) -> None:
        item = self.items[index]
        if item.changing is not None:
            parts = _parts(item, self._slots[slot], None, item.changing())
            self._ready[slot] = self._lane.copy(slot, parts)
        self._versions[slot] = self._version

    def _prefetch_changing(self) -> None:
        """Bring the next visit's adapter up to date where its layer stayed in a slot."""
        if not self._cycle.loads[self._at]:
            slot = self._cycle.slots[self._at]
            if self._versions[slot] != self._version:
                self._copy_changing(self._visits[self._at], slot)


def _poison(size_bytes: int, device: torch.device) -> Tensor:
    """Host memory of NaN in every float format."""
    poison = torch.full((size_bytes,), 0xFF, dtype=torch.uint8)
    return poison.pin_memory() if device.type == "cuda" else poison


def _parts(
    item: RingItem, slot: Tensor, frozen: Tensor | None, changing: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """(target, source) pairs of one load."""
    parts = []
    if frozen is not None:
        parts.append((slot[: frozen.numel()], frozen))
    if changing is not None:
        source = changing.view(torch.uint8)
        start = item.changing_start_bytes
        parts.append((slot[start : start + source.numel()], source))
    return parts


class Completion:
    """A copy under way; `wait` makes what computes wait for it."""

    def __init__(
        self, event: torch.cuda.Event, compute: torch.cuda.Stream, queued: Future[None] | None
    ) -> None:
        self._event = event
        self._compute = compute
        self._queued = queued

    def wait(self) -> None:
        """Order the computation behind the copy; blocks only until the copy is queued."""
        if self._queued is not None:
            self._queued.result()
        self._event.wait(self._compute)


class _HostLane:
    """Copies on a CPU happen at once."""

    def copy(self, slot: int, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        del slot
        for target, source in parts:
            target.copy_(source)

    def mark_free(self, slot: int) -> None:
        """Nothing runs behind our back on a CPU."""

    def synchronize(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing to stop."""


class _CudaLane:
    """Copies on a stream of their own, ordered with the compute stream by events.

    Memory that is not pinned goes through two pinned buffers, filled by a thread, so that the
    copy to the device still runs beside the computation.
    """

    def __init__(self, device: torch.device) -> None:
        self._side = SideStream(device)
        # The slots' memory may still be read by work queued before they were allocated.
        self._side.follow()
        self._free: dict[int, torch.cuda.Event] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._bounce: list[Tensor] = []
        self._bounced: list[torch.cuda.Event] = []

    def copy(self, slot: int, parts: Sequence[tuple[Tensor, Tensor]]) -> Completion:
        free = self._free.get(slot)
        event = torch.cuda.Event()
        if self._thread is None and all(source.is_pinned() for _, source in parts):
            self._queue(free, parts, event)
            return Completion(event, self._side.compute, None)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="eightgig-copy")
            size = _BOUNCE_BYTES
            self._bounce = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in "ab"]
            self._bounced = [torch.cuda.Event() for _ in "ab"]
        queued = self._thread.submit(self._queue, free, parts, event)
        return Completion(event, self._side.compute, queued)

    def mark_free(self, slot: int) -> None:
        self._free[slot] = self._side.mark_compute()

    def synchronize(self) -> None:
        if self._thread is not None:
            self._thread.submit(lambda: None).result()
        self._side.stream.synchronize()

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()
        self._side.stream.synchronize()

    def _queue(
        self,
        free: torch.cuda.Event | None,
        parts: Sequence[tuple[Tensor, Tensor]],
        event: torch.cuda.Event,
    ) -> None:
        with self._side:
            if free is not None:
                free.wait(self._side.stream)
            for target, source in parts:
                if source.is_pinned():
                    target.copy_(source, non_blocking=True)
                else:
                    self._copy_staged(target, source)
            event.record(self._side.stream)

    def _copy_staged(self, target: Tensor, source: Tensor) -> None:
        pairs = zip(target.split(_BOUNCE_BYTES), source.split(_BOUNCE_BYTES), strict=True)
        for number, (target_part, source_part) in enumerate(pairs):
            which = number % 2
            self._bounced[which].synchronize()
            staged = self._bounce[which][: source_part.numel()]
            staged.copy_(source_part)
            target_part.copy_(staged, non_blocking=True)
            self._bounced[which].record(self._side.stream)
