"""Tensors that wait between forward and backward: on the device, or in pinned host memory.

A bundle is what one layer keeps of one micro-batch: its input, and outputs that the plan keeps
instead of computing them again. Bundles are written in the forward pass and read once in the
backward pass, in an order known beforehand. On the host, a few buffers on the device are used in
turn, for bundles that leave and for those that come back: copies run on streams of their own
beside the computation, and nothing that a layer made outlives its visit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from eightgig.memory.estimate import BUNDLE_BUFFERS
from eightgig.streaming.host import PinnedArenas
from eightgig.streaming.meter import WaitMeter
from eightgig.streaming.side import SideStream

BundleKey = tuple[int, int]
"""Layer and micro-batch."""
Forms = tuple[tuple[str, torch.dtype, torch.Size], ...]
"""Names and forms of the tensors of a bundle."""

_READS_AHEAD = BUNDLE_BUFFERS - 1
_ALIGNMENT_BYTES = 256
_MOST_PLACES = 256  # kept; packed micro-batches have many lengths
_MOST_TENSORS = 8  # of a bundle: so often its bytes may be rounded up


class Waiting(Protocol):
    """Where bundles wait."""

    def begin(self) -> None:
        """Take the memory that copies will need, before a pass takes and frees other."""

    def put(self, key: BundleKey, bundle: dict[str, Tensor]) -> None:
        """Keep tensors; the caller must not change them."""

    def read(self, keys: Sequence[BundleKey]) -> Iterator[dict[str, Tensor]]:
        """The bundles of `keys`; each is valid until the next is asked for."""

    def clear(self) -> None:
        """Forget everything."""

    def close(self) -> None:
        """Forget everything, and give the memory back."""


class DeviceWaiting:
    """Bundles wait where they are."""

    def __init__(self) -> None:
        self._bundles: dict[BundleKey, dict[str, Tensor]] = {}

    def begin(self) -> None:
        """Nothing is copied."""

    def put(self, key: BundleKey, bundle: dict[str, Tensor]) -> None:
        """Keep references."""
        self._bundles[key] = bundle

    def read(self, keys: Sequence[BundleKey]) -> Iterator[dict[str, Tensor]]:
        """Give the references up one by one."""
        for key in keys:
            yield self._bundles.pop(key)

    def clear(self) -> None:
        """Forget everything."""
        self._bundles.clear()

    def close(self) -> None:
        """Forget everything."""
        self.clear()


class HostWaiting:
    """Bundles wait in pinned host memory, whose runs are reused from step to step.

    Args:
        device: Where tensors come from and go to.
        meter: Times the waits for copies.
        expected_bytes: Of all bundles of a step, as planned; host memory is taken in such portions.
        buffer_bytes: Of the largest bundle, as planned.
    """

    def __init__(
        self,
        device: torch.device,
        meter: WaitMeter,
        *,
        expected_bytes: int,
        buffer_bytes: int,
    ) -> None:
        self._device = device
        self._meter = meter
        self._arenas = PinnedArenas(is_pinned=True)
        self._left_bytes = expected_bytes
        self._buffer_bytes = buffer_bytes + _MOST_TENSORS * _ALIGNMENT_BYTES
        self._runs: dict[BundleKey, Tensor] = {}
        self._forms: dict[BundleKey, Forms] = {}
        self._out = SideStream(device)
        self._in = SideStream(device)
        self._buffers: list[Tensor] = []
        self._places: dict[tuple[int, Forms], _Places] = {}
        self._turn = 0
        self._has_left: list[torch.cuda.Event | None] = []

    def begin(self) -> None:
        """Have the buffers: taken later, they would lie between what a pass has left free."""
        self._have_buffers(self._buffer_bytes)

    def put(self, key: BundleKey, bundle: dict[str, Tensor]) -> None:
        """Gather the bundle in a buffer and start its copy to the host."""
        forms = tuple((name, tensor.dtype, tensor.shape) for name, tensor in bundle.items())
        self._have_buffers(_bundle_bytes(forms))
        which = self._turn % len(self._buffers)
        self._turn += 1
        before = self._has_left[which]
        if before is not None:
            self._meter.wait(partial(before.wait, self._out.compute))
        places = self._places_in(which, forms)
        for name, part in places.tensors.items():
            part.copy_(bundle[name])
        run = self._host_run(key, places.whole.numel())
        self._out.follow()
        with self._out:
            run.copy_(places.whole, non_blocking=True)
            self._has_left[which] = self._out.mark()
        self._forms[key] = forms

    def read(self, keys: Sequence[BundleKey]) -> Iterator[dict[str, Tensor]]:
        """Copy ahead of the reader, into the buffers in turn."""
        forms = [self._forms[key] for key in keys]
        self._have_buffers(max(map(_bundle_bytes, forms)))
        free: list[torch.cuda.Event | None] = [None] * len(self._buffers)
        arrived: deque[tuple[dict[str, Tensor], torch.cuda.Event]] = deque()
        self._in.stream.wait_stream(self._out.stream)
        self._in.follow()

        def start(number: int) -> None:
            which = number % len(self._buffers)
            places = self._places_in(which, forms[number])
            run = self._host_run(keys[number], places.whole.numel())
            before = free[which]
            if before is not None:
                before.wait(self._in.stream)
            with self._in:
                places.whole.copy_(run, non_blocking=True)
                arrived.append((places.tensors, self._in.mark()))

        for number in range(min(_READS_AHEAD, len(keys))):
            start(number)
        for number in range(len(keys)):
            targets, event = arrived.popleft()
            self._meter.wait(partial(event.wait, self._in.compute))
            yield targets
            free[number % len(self._buffers)] = self._in.mark_compute()
            if number + _READS_AHEAD < len(keys):
                start(number + _READS_AHEAD)

    def clear(self) -> None:
        """Forget what waits; the memory is kept for the next step."""
        self._forms.clear()

    def close(self) -> None:
        """Wait for copies that nobody waits for any more, and give the memory back."""
        for side in (self._out, self._in):
            side.stream.synchronize()
        self.clear()
        self._runs.clear()
        self._buffers, self._has_left = [], []
        self._places.clear()
        self._arenas = PinnedArenas(is_pinned=True)

    def _host_run(self, key: BundleKey, size_bytes: int) -> Tensor:
        run = self._runs.get(key)
        if run is None or run.numel() < size_bytes:
            expected_bytes = max(self._left_bytes, size_bytes)
            run = self._arenas.take(size_bytes, expected_bytes=expected_bytes)
            self._runs[key] = run
            self._left_bytes -= size_bytes
        return run if run.numel() == size_bytes else run[:size_bytes]

    def _places_in(self, which: int, forms: Forms) -> _Places:
        """Where a bundle of `forms` lies in a buffer; made once, since buffers do not move."""
        places = self._places.get((which, forms))
        if places is None:
            if len(self._places) >= _MOST_PLACES:
                self._places.clear()
            places = self._places[which, forms] = _split(self._buffers[which], forms)
        return places

    def _have_buffers(self, size_bytes: int) -> None:
        if self._buffers and self._buffers[0].numel() >= size_bytes:
            return
        for event in self._has_left:
            if event is not None:
                event.wait(self._out.compute)  # which alone reuses the memory that is given back
        self._buffers = []
        self._places.clear()
        self._buffers = [
            torch.empty(size_bytes, dtype=torch.uint8, device=self._device)
            for _ in range(BUNDLE_BUFFERS)
        ]
        self._has_left = [None] * len(self._buffers)


@dataclass(frozen=True, slots=True)
class _Places:
    """A bundle in a buffer: all its bytes, and the tensors in them."""

    whole: Tensor
    tensors: dict[str, Tensor]


def _bundle_bytes(forms: Forms) -> int:
    return sum(_rounded(_size_bytes(dtype, shape)) for _, dtype, shape in forms)


def _split(buffer: Tensor, forms: Forms) -> _Places:
    """Places at the start of `buffer` for tensors of `forms`."""
    tensors = {}
    start = 0
    for name, dtype, shape in forms:
        size_bytes = _size_bytes(dtype, shape)
        tensors[name] = buffer[start : start + size_bytes].view(dtype).view(shape)
        start += _rounded(size_bytes)
    return _Places(buffer[:start], tensors)


def _size_bytes(dtype: torch.dtype, shape: torch.Size) -> int:
    return shape.numel() * dtype.itemsize


def _rounded(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
