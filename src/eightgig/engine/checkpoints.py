"""Tensors that wait between forward and backward: on the device, or in pinned host memory.

A bundle is what one layer keeps of one micro-batch: its input, and outputs that the plan keeps
instead of computing them again. Bundles are written in the forward pass and read once in the
backward pass, in an order known beforehand. On the host, writing and reading run on streams of
their own beside the computation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from eightgig.memory.estimate import READ_BUFFERS, WRITES_IN_FLIGHT
from eightgig.streaming.host import PinnedArenas
from eightgig.streaming.meter import WaitMeter

BundleKey = tuple[int, int]
"""Layer and micro-batch."""

_READS_AHEAD = READ_BUFFERS - 1
_ALIGNMENT_BYTES = 256
_MOST_TENSORS = 8  # of a bundle: so often its bytes may be rounded up


class Waiting(Protocol):
    """Where bundles wait."""

    def begin(self) -> None:
        """Take the memory that reading will need, before a pass takes and frees other."""

    def put(self, key: BundleKey, bundle: dict[str, Tensor]) -> None:
        """Keep contiguous tensors; the caller must not change them."""

    def read(self, keys: Sequence[BundleKey]) -> Iterator[dict[str, Tensor]]:
        """The bundles of `keys`; each is valid until the next is asked for."""

    def settle(self) -> None:
        """Hold nothing on the device that need not be there."""

    def clear(self) -> None:
        """Forget everything."""


class DeviceWaiting:
    """Bundles wait where they are."""

    def __init__(self) -> None:
        self._bundles: dict[BundleKey, dict[str, Tensor]] = {}

    def begin(self) -> None:
        """Nothing is read back."""

    def put(self, key: BundleKey, bundle: dict[str, Tensor]) -> None:
        """Keep references."""
        self._bundles[key] = bundle

    def read(self, keys: Sequence[BundleKey]) -> Iterator[dict[str, Tensor]]:
        """Give the references up one by one."""
        for key in keys:
            yield self._bundles.pop(key)

    def settle(self) -> None:
        """They stay."""

    def clear(self) -> None:
        """Forget everything."""
        self._bundles.clear()


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
        self._runs: dict[tuple[BundleKey, str], Tensor] = {}
        self._views: dict[BundleKey, dict[str, Tensor]] = {}
        self._out_stream = torch.cuda.Stream(device)
        self._in_stream = torch.cuda.Stream(device)
        self._writing: deque[tuple[dict[str, Tensor], torch.cuda.Event]] = deque()
        self._buffers: list[Tensor] = []

    def begin(self) -> None:
        """Have the buffers: taken later, they would lie between what a pass has left free."""
        self._buffers_for(self._buffer_bytes)

    def put(self, key: BundleKey, bundle: dict[str, Tensor]) -> None:
        """Start the copy to the host once the work queued so far is done."""
        views = {name: self._host_view(key, name, tensor) for name, tensor in bundle.items()}
        self._views[key] = views
        self._out_stream.wait_stream(torch.cuda.current_stream(self._device))
        event = torch.cuda.Event()
        with torch.cuda.stream(self._out_stream):
            for name, tensor in bundle.items():
                views[name].copy_(tensor, non_blocking=True)
            event.record(self._out_stream)
        self._writing.append((bundle, event))
        while len(self._writing) > WRITES_IN_FLIGHT:
            self._finish_write()

    def read(self, keys: Sequence[BundleKey]) -> Iterator[dict[str, Tensor]]:
        """Copy ahead of the reader, into buffers that are used in turn."""
        bundles = [self._views[key] for key in keys]
        buffers = self._buffers_for(max(_bundle_bytes(bundle) for bundle in bundles))
        free: list[torch.cuda.Event | None] = [None] * len(buffers)
        arrived: deque[tuple[dict[str, Tensor], torch.cuda.Event]] = deque()
        while self._writing:
            self._finish_write()
        self._in_stream.wait_stream(torch.cuda.current_stream(self._device))

        def start(number: int) -> None:
            which = number % len(buffers)
            event = torch.cuda.Event()
            targets = _split(buffers[which], bundles[number])
            with torch.cuda.stream(self._in_stream):
                before = free[which]
                if before is not None:
                    self._in_stream.wait_event(before)
                for name, view in bundles[number].items():
                    targets[name].copy_(view, non_blocking=True)
                event.record(self._in_stream)
            arrived.append((targets, event))

        for number in range(min(_READS_AHEAD, len(bundles))):
            start(number)
        for number in range(len(bundles)):
            targets, event = arrived.popleft()
            self._meter.wait(event.wait)
            yield targets
            done = torch.cuda.Event()
            done.record()
            free[number % len(buffers)] = done
            if number + _READS_AHEAD < len(bundles):
                start(number + _READS_AHEAD)

    def settle(self) -> None:
        """Let go of every tensor that is being copied, once it has arrived."""
        while self._writing:
            self._finish_write()

    def clear(self) -> None:
        """Forget what waits; the host memory is kept for the next step."""
        while self._writing:
            self._finish_write()
        self._views.clear()

    def _finish_write(self) -> None:
        """Order the compute stream behind the oldest copy: it alone reuses the tensor's memory."""
        self._writing.popleft()[1].wait()

    def _host_view(self, key: BundleKey, name: str, tensor: Tensor) -> Tensor:
        size_bytes = tensor.numel() * tensor.element_size()
        run = self._runs.get((key, name))
        if run is None or run.numel() < size_bytes:
            expected_bytes = max(self._left_bytes, size_bytes)
            run = self._arenas.take(size_bytes, expected_bytes=expected_bytes)
            self._runs[key, name] = run
            self._left_bytes -= size_bytes
        return run[:size_bytes].view(tensor.dtype).view(tensor.shape)

    def _buffers_for(self, size_bytes: int) -> list[Tensor]:
        if not self._buffers or self._buffers[0].numel() < size_bytes:
            self._buffers = []
            self._buffers = [
                torch.empty(size_bytes, dtype=torch.uint8, device=self._device)
                for _ in range(READ_BUFFERS)
            ]
        return self._buffers


def _bundle_bytes(bundle: dict[str, Tensor]) -> int:
    return sum(_rounded(view) for view in bundle.values())


def _split(buffer: Tensor, bundle: dict[str, Tensor]) -> dict[str, Tensor]:
    """Places in `buffer` for the tensors of `bundle`."""
    places = {}
    start = 0
    for name, view in bundle.items():
        size_bytes = view.numel() * view.element_size()
        part = buffer[start : start + size_bytes]
        places[name] = part.view(view.dtype).view(view.shape)
        start += _rounded(view)
    return places


def _rounded(view: Tensor) -> int:
    size_bytes = view.numel() * view.element_size()
    return -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
