"""Which layout: all sensible ones are estimated; of the fastest that fit, the smallest wins."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Literal

from eightgig.config import AUTO, MemoryConfig
from eightgig.hardware.probe import Hardware, Rates
from eightgig.memory import estimate, host_estimate
from eightgig.memory.budget import Budget
from eightgig.memory.estimate import Layout
from eightgig.memory.host_estimate import HostWeights
from eightgig.memory.speed import (
    DISK_BYTES_PER_SECOND,
    PAGEABLE_BYTES_PER_SECOND,
    StepTime,
    step_time,
)
from eightgig.memory.workload import Workload

# Outputs that the engine can keep in host memory instead of recomputing them, best first: FLOPs
# saved per byte moved.
SUPPORTED_OFFLOADS: tuple[str, ...] = ("down_proj", "o_proj", "attention")
MICRO_BATCH_TOKENS = (1024, 2048, 4096, 8192)
MLP_TILE_TOKENS = (512, 1024, 2048, 4096)
HEAD_TILE_TOKENS = (512, 1024, 2048)
# A faster layout must gain this much to be worth more memory: less is within the forecast's error.
WORTH_RATIO = 1.05
# Slots beyond the fewest must gain more still: they are the memory that other programs, longer
# rows and a wrong forecast would need.
SLOT_WORTH_RATIO = 1.10
# Reading layers from the disk in every step must gain much more: how fast that is depends on
# whatever else wants the page cache.
DISK_WORTH_RATIO = 1.25


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A layout with what it takes.

    Attributes:
        layout: The decisions.
        breakdown: Device bytes by item.
        host: Host bytes by item; on a CPU, what `breakdown` says.
        host_weights: Where the prepared layers lie in main memory.
        time: An ordinary optimizer step.
        fits_device, fits_host: Whether the budgets hold.
    """

    layout: Layout
    breakdown: dict[str, int]
    host: dict[str, int]
    host_weights: HostWeights
    time: StepTime
    fits_device: bool
    fits_host: bool

    @property
    def fits(self) -> bool:
        """Whether device and host budgets hold."""
        return self.fits_device and self.fits_host

    @property
    def peak_bytes(self) -> int:
        """Predicted peak on the device."""
        return sum(self.breakdown.values())

    @property
    def host_bytes(self) -> int:
        """Predicted main memory."""
        return sum(self.host.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """Estimates layouts of one workload on one machine.

    Attributes:
        work: What is asked for.
        hardware: The machine.
        memory: Settings that bind a decision.
        device, host: The budgets.
        rates: Speeds to decide by.
        offloads: Outputs that may be kept instead of recomputed.
    """

    work: Workload
    hardware: Hardware
    memory: MemoryConfig
    device: Budget
    host: Budget
    rates: Rates
    offloads: tuple[str, ...] = SUPPORTED_OFFLOADS

    def run(self) -> tuple[Candidate, list[Candidate]]:
        """The best candidate, and all that were looked at.

        Where none fits, the best is the one that needs the least.
        """
        candidates = [self._with_slots(self._tile_head(layout)) for layout in self._layouts()]
        fitting = [candidate for candidate in candidates if candidate.fits]
        if not fitting:
            return min(candidates, key=self._excess), candidates
        fastest = min(candidate.time.seconds for candidate in fitting)
        undisturbed = [candidate for candidate in fitting if not self._needs_disk(candidate)]
        if undisturbed:
            fastest_undisturbed = min(candidate.time.seconds for candidate in undisturbed)
            if fastest_undisturbed <= fastest * DISK_WORTH_RATIO:
                fitting, fastest = undisturbed, fastest_undisturbed
        close = [c for c in fitting if c.time.seconds <= fastest * WORTH_RATIO]
        return min(close, key=_cost), candidates

    def least_layouts(self) -> list[Layout]:
        """The layouts that need the least memory: on the device, and in host memory."""
        tokens = self._micro_batch_options()[0]
        layouts = [
            layout
            for layout in self._layouts()
            if layout.micro_batch_tokens == tokens
            and layout.micro_batches_per_visit == self._visit_options(tokens)[0]
        ]
        smallest_tile = min(layout.mlp_tile_tokens for layout in layouts)
        return [
            self._tile_head(layout) for layout in layouts if layout.mlp_tile_tokens == smallest_tile
        ]

    def candidate(self, layout: Layout) -> Candidate:
        """`layout` with its bytes and seconds."""
        breakdown = estimate.device_bytes(self.work, layout)
        peak = sum(breakdown.values())
        if not self.work.has_device:
            place: HostWeights = "mapped"
            host, fits_host = breakdown, peak <= self.host.total_bytes
        else:
            place, host = self._place_weights(layout)
            fits_host = sum(host.values()) <= self.host.total_bytes
        return Candidate(
            layout=layout,
            breakdown=breakdown,
            host=host,
            host_weights=place,
            time=step_time(self.work, layout, self.rates, self._source_rate(host, place)),
            fits_device=peak <= self.device.total_bytes,
            fits_host=fits_host,
        )

    def _excess(self, candidate: Candidate) -> tuple[int, int, float]:
        over_device = max(0, candidate.peak_bytes - self.device.total_bytes)
        over_host = max(0, candidate.host_bytes - self.host.total_bytes)
        return over_device, over_host, candidate.time.seconds

    def _needs_disk(self, candidate: Candidate) -> bool:
        """Whether layers may have to be read from the disk in every step."""
        is_read_again = candidate.layout.layer_slots < self.most_slots
        return self.work.has_device and candidate.host_weights == "mapped" and is_read_again

    def _layouts(self) -> list[Layout]:
        """Every combination worth estimating, with the fewest slots."""
        memory = self.memory
        tiles = _options(memory.mlp_tile_tokens, MLP_TILE_TOKENS)
        checkpoints: tuple[Literal["device", "host"], ...] = ("device", "host")
        if not self.work.has_device:
            checkpoints = ("device",)
        elif memory.checkpoints != AUTO:
            checkpoints = (memory.checkpoints,)
        return [
            Layout(
                micro_batch_tokens=tokens,
                micro_batches_per_visit=per_visit,
                layer_slots=self.fewest_slots,
                mlp_tile_tokens=tile,
                head_tile_tokens=HEAD_TILE_TOKENS[-1],
                checkpoints=place,
                kernels=choose_kernels(self.hardware, memory),
                offload=offload,
                is_hopper=is_hopper(self.hardware.compute_capability),
            )
            for tokens in self._micro_batch_options()
            for per_visit, tile, place in itertools.product(
                self._visit_options(tokens),
                sorted({min(tile, tokens) for tile in tiles}),
                checkpoints,
            )
            for offload in self._offload_options(place)
        ]

    @property
    def fewest_slots(self) -> int:
        """Slots of the ring, or the number that is set."""
        if self.memory.layer_slots != AUTO:
            return self.memory.layer_slots
        return min(estimate.RING_SLOTS, self.most_slots)

    @property
    def most_slots(self) -> int:
        """Slots with which everything stays."""
        return estimate.slots_for_everything(self.work)

    def _micro_batch_options(self) -> tuple[int, ...]:
        if self.memory.micro_batch_tokens != AUTO:
            return (self.memory.micro_batch_tokens,)
        longest = self.work.max_length
        if not self.work.is_packed:
            return (longest,)
        step = self.work.step_tokens
        fuller = {min(tokens, step) for tokens in MICRO_BATCH_TOKENS if tokens > longest}
        return (longest, *sorted(fuller))

    def _visit_options(self, tokens: int) -> tuple[int, ...]:
        if self.memory.micro_batches_per_visit != AUTO:
            return (self.memory.micro_batches_per_visit,)
        most = max(1, -(-self.work.step_tokens // tokens))
        if not self.work.is_packed:
            most = self.work.rows_per_step
        doubled = {2**power for power in range(8) if 2**power < most}
        return (*sorted(doubled), most)

    def _offload_options(self, place: str) -> list[tuple[str, ...]]:
        """Nothing, and the best outputs first: as many as are supported."""
        if self.memory.offload != AUTO:
            return [tuple(self.memory.offload)]
        if place == "device":
            return [()]
        return [self.offloads[:count] for count in range(len(self.offloads) + 1)]

    def _tile_head(self, layout: Layout) -> Layout:
        """The largest tile of the head that costs no memory of its own.

        Any tile is exact, and hardly slower than another: it is worth no place in the search.
        """
        if not self.work.has_device:
            return dataclasses.replace(layout, head_tile_tokens=layout.visit_tokens)
        smallest = dataclasses.replace(layout, head_tile_tokens=HEAD_TILE_TOKENS[0])
        least = estimate.device_bytes(self.work, smallest)
        for tokens in reversed(HEAD_TILE_TOKENS):
            tiled = dataclasses.replace(layout, head_tile_tokens=tokens)
            if estimate.device_bytes(self.work, tiled) == least:
                return tiled
        return smallest

    def _with_slots(self, layout: Layout) -> Candidate:
        """`layout` with as few slots as are nearly as fast as all that fit."""
        few = self.candidate(layout)
        if self.memory.layer_slots != AUTO or not few.fits:
            return few
        if not self.work.has_device:
            # The slots are main memory: what is resident is copied once.
            resident = self.candidate(dataclasses.replace(layout, layer_slots=self.most_slots))
            return resident if resident.fits else few
        room = self.device.total_bytes - few.peak_bytes
        most = min(
            self.most_slots,
            layout.layer_slots + room // estimate.slot_bytes(self.work),
        )
        many = self.candidate(dataclasses.replace(layout, layer_slots=most))
        if not many.fits or few.time.seconds <= many.time.seconds * SLOT_WORTH_RATIO:
            return few
        low, high = layout.layer_slots, most
        while high - low > 1:
            middle = (low + high) // 2
            tried = self.candidate(dataclasses.replace(layout, layer_slots=middle))
            if tried.time.seconds <= many.time.seconds * SLOT_WORTH_RATIO:
                high = middle
            else:
                low = middle
        return self.candidate(dataclasses.replace(layout, layer_slots=high))

    def _place_weights(self, layout: Layout) -> tuple[HostWeights, dict[str, int]]:
        """The fastest place that main memory allows."""
        setting = self.memory.host_weights
        if setting != AUTO:
            place: HostWeights = "pinned" if setting == "pinned" else "mapped"
            return place, host_estimate.host_bytes(self.work, layout, place)
        if layout.layer_slots >= self.most_slots:
            # Every layer is read once: nothing need wait in main memory.
            return "mapped", host_estimate.host_bytes(self.work, layout, "mapped")
        host = host_estimate.host_bytes(self.work, layout, "pinned")
        if sum(host.values()) > self.host.total_bytes:
            return "mapped", host_estimate.host_bytes(self.work, layout, "mapped")
        if host_estimate.pinned_bytes(host) <= self.hardware.pin_limit_bytes:
            return "pinned", host
        return "pageable", host

    def _source_rate(self, host: dict[str, int], place: HostWeights) -> float:
        """Bytes per second at which layers and head can be read where they lie.

        Mapped files come from the page cache as far as main memory holds them, else from disk.
        """
        if place == "pinned":
            return math.inf
        if place == "pageable":
            return PAGEABLE_BYTES_PER_SECOND
        mapped = host_estimate.layer_blobs_bytes(self.work) + host_estimate.head_table_bytes(
            self.work
        )
        room = max(0, self.host.total_bytes - sum(host.values()))
        cached = min(1.0, room / mapped)
        return 1 / (cached / PAGEABLE_BYTES_PER_SECOND + (1 - cached) / DISK_BYTES_PER_SECOND)


def choose_kernels(hardware: Hardware, memory: MemoryConfig) -> Literal["triton", "plain"]:
    """Fused kernels where Triton and the card can run them."""
    if memory.kernels != AUTO:
        return memory.kernels
    capability = hardware.compute_capability
    can = hardware.has_triton and capability is not None and capability >= (7, 5)
    return "triton" if can else "plain"


def is_hopper(compute_capability: tuple[int, int] | None) -> bool:
    """Whether a card is of the H100's kind, whose libraries take and reach other sizes."""
    return compute_capability == (9, 0)


def _cost(candidate: Candidate) -> tuple[int, int, float]:
    """What layouts of much the same speed are judged by."""
    return candidate.peak_bytes, candidate.host_bytes, candidate.time.seconds


def _options(setting: int | str, options: tuple[int, ...]) -> tuple[int, ...]:
    return options if isinstance(setting, str) else (setting,)
